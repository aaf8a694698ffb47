"""launch/lab: hosts without Ethernet, without power, and back again."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from five_hosts import LAB, good, lab
from five_hosts import the_lab_can_be_built as the_lab_can_be_built
from lab_hosts import cables, over_agent, reached

pytestmark = [pytest.mark.lab, pytest.mark.once]


# Holds two connections, over the Ethernet and over a cable; the other end counts those
# that have ended when a line comes.
HOLD = """
import socket, time
server = socket.create_server(("", 9997))
held = [server.accept() for _ in range(2)]
time.sleep(1000)
"""
COUNT_ENDED = """
import select, socket, sys, time
ends = []
for address in "10.90.0.3", "10.89.0.3":
    while True:
        try:
            ends.append(socket.create_connection((address, 9997)))
            break
        except ConnectionRefusedError:
            time.sleep(0.05)
print("connected", flush=True)
sys.stdin.readline()
print(len(select.select(ends, [], [], 0.5)[0]))
"""


@pytest.fixture
def ring() -> Iterator[None]:
    """A ring of five, left as it was found."""
    good("up", "--delay-ms", "1")
    yield
    good("mend")
    for host in json.loads(good("status", "--json"))["off"]:
        good("on", host)
        cables(host)


def start(host: str, *command: str) -> subprocess.Popen[str]:
    """Start a command on a host, with pipes."""
    return subprocess.Popen(
        [sys.executable, LAB, "run", "--on", host, *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_host_without_ethernet(ring: None) -> None:
    """Neither it nor what stands for ssh gets through, both ways, until mended."""
    good("cut", "--ethernet", "studio3")
    assert "studio3: Ethernet CUT" in good("status")
    others = {"10.90.0.4", "10.89.0.3"}  # another host, and over the cables
    assert reached("studio1", "10.90.0.3", *others) == others
    assert reached("studio3", "10.90.0.1", "10.89.0.1") == {"10.89.0.1"}
    for source, host in ("studio1", "studio3"), ("studio3", "studio1"):
        begin = time.monotonic()
        done = over_agent(source, host)
        assert done.returncode == 255 and done.stdout == ""
        says = f"ssh: connect to host {host} port 22: Connection timed out\n"
        assert done.stderr == says
        assert 1 <= time.monotonic() - begin < 4
    assert over_agent("studio1", "studio2").stdout == "studio2\n"
    good("mend", "--ethernet", "studio3")
    deadline = time.monotonic() + 10  # addresses may have to be asked for anew
    for source, address in ("studio3", "10.90.0.1"), ("studio1", "10.90.0.3"):
        while not reached(source, address):
            assert time.monotonic() < deadline, (source, address)
    assert over_agent("studio3", "studio1").stdout == "studio1\n"
    good("cut", "--ethernet", "studio5")
    good("mend")
    assert over_agent("studio1", "studio5").stdout == "studio5\n"
    assert "CUT" not in good("status")


def test_a_host_without_power(ring: None) -> None:
    """All on it ends and nothing reaches it; it comes back without its addresses.

    Nobody gets to hear of the end. A cable that was cut before stays cut.
    """
    holder = start("studio3", sys.executable, "-c", HOLD)
    counter = start("studio2", sys.executable, "-c", COUNT_ENDED)
    assert counter.stdout is not None and counter.stdout.readline() == "connected\n"
    stubborn = "trap '' TERM HUP INT; while true; do sleep 1; done"
    job = start("studio3", "sh", "-c", stubborn)
    good("cut", "studio3", "studio4")
    assert job.poll() is None
    good("off", "studio3")
    for process in job, holder:
        assert process.wait(timeout=5) == -signal.SIGKILL
    assert counter.communicate("\n", timeout=10)[0] == "0\n"
    pids = ["ip", "netns", "pids", "studio3"]
    assert subprocess.run(pids, capture_output=True, check=True).stdout == b""
    own = {"10.90.0.3", "10.89.0.3"}
    others = {"10.90.0.2", "10.89.0.1", "10.89.0.2"}
    assert reached("studio1", *own, *others) == others
    assert not reached("studio4", *own)
    assert over_agent("studio1", "studio3").returncode == 255
    assert "studio3 is off" in lab("run", "--on", "studio3", "true").stderr
    good("mend", "studio1", "studio2")  # what it sets back is not the power
    assert json.loads(good("status", "--json"))["off"] == ["studio3"]
    assert "studio3: OFF" in good("status")
    good("on", "studio3")
    assert "OFF" not in good("status")
    assert over_agent("studio1", "studio3").stdout == "studio3\n"
    left = good("run", "--on", "studio3", "sh", "-c", "ip address; ip route")
    assert "10.90.0.3" in left and "10.89." not in left and "10.88." not in left
    assert reached("studio2", *own) == {"10.90.0.3"}
    cables("studio3")
    assert reached("studio2", *own, "10.89.0.4") == own  # through studio3
    assert reached("studio3", "10.89.0.2", "10.89.0.4") == {"10.89.0.2"}
    good("mend")
    assert reached("studio2", "10.89.0.4")


def test_names_that_the_lab_has_not(ring: None) -> None:
    for words in (["off", "studio9"], ["cut", "--ethernet", "studio9"]):
        assert "no host studio9, only studio1" in lab(*words).stderr
    assert "studio2 is on" in lab("on", "studio2").stderr
    both = lab("cut", "studio1", "studio2", "--ethernet", "studio3")
    assert "name two hosts, or one with --ethernet" in both.stderr
    assert "takes two hosts" in lab("cut").stderr
