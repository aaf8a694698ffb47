"""mlxtp.cluster.reroute: which commands change the routes, and what it says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlxtp.cluster import cables, reroute
from mlxtp.cluster.addresses import ring_address
from mlxtp.cluster.cables import Cable

pytestmark = pytest.mark.once

RING = cables.ring(5)

# Host 1 of 5 in a ring, as launch/cables leaves it.
INTERFACES = {
    "10.89.0.1": "L",
    "10.88.1.13": "L",
    "10.88.1.1": "R",
    "192.168.1.20": "en0",
}
IP_ROUTE = """[
{"dst": "default", "gateway": "192.168.1.1", "dev": "en0", "flags": []},
{"dst": "10.88.1.0/30", "dev": "R", "protocol": "kernel", "prefsrc": "10.88.1.1"},
{"dst": "10.88.1.12/30", "dev": "L", "protocol": "kernel", "prefsrc": "10.88.1.13"},
{"dst": "10.89.0.2", "gateway": "10.88.1.2", "dev": "R", "prefsrc": "10.89.0.1"},
{"dst": "10.89.0.3", "gateway": "10.88.1.2", "dev": "R", "prefsrc": "10.89.0.1"},
{"dst": "10.89.0.4", "gateway": "10.88.1.14", "dev": "L", "prefsrc": "10.89.0.1"},
{"dst": "10.89.0.5", "gateway": "10.88.1.14", "dev": "L", "prefsrc": "10.89.0.1"}
]"""
NETSTAT = """\
Routing tables

Internet:
Destination        Gateway            Flags               Netif Expire
default            192.168.1.1        UGScg                 en0
10.88.1/30         link#9             UCS                     R      !
10.88.1.2          36:0:12:7f:b4:40   UHLWIir                 R   1199
10.88.1.12/30         link#8             UCS                     L      !
10.89.0.1          10.89.0.1          UH                      L
10.89.0.2          10.88.1.2          UGHS                    R
10.89.0.3          10.88.1.2          UGHS                    R
10.89.0.4/32       10.88.1.14          UGSc                    L
10.89.0.5          10.88.1.14          UGHS                    L
127                127.0.0.1          UCS                   lo0
"""


class Host:
    """Stands for the system: what it prints, and the commands that it is given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, system: str) -> None:
        self.interfaces = dict(INTERFACES)
        self.commands: list[str] = []
        self.refuses = ""
        printed = {"ip": IP_ROUTE, "netstat": NETSTAT}
        monkeypatch.setattr(reroute.sys, "platform", system)
        monkeypatch.setattr(reroute, "output", lambda *words: printed[words[0]])
        monkeypatch.setattr(cables, "interfaces", lambda: self.interfaces)
        monkeypatch.setattr(reroute.subprocess, "run", self.run)
        monkeypatch.setattr(os, "geteuid", lambda: 0)

    def run(self, words: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        self.commands.append(" ".join(words))
        failed = bool(self.refuses)
        return subprocess.CompletedProcess(words, failed, "", self.refuses)


@pytest.fixture(params=["linux", "darwin"])
def host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Host:
    return Host(monkeypatch, request.param)


def test_as_wanted_takes_no_command(host: Host) -> None:
    outcome = reroute.reroute(1, 5, RING)
    assert outcome == ("as wanted", "4 routes, 2 of them to neighbours")
    opposite = RING - {Cable(3, 4)}
    assert reroute.reroute(1, 5, opposite).routes == "as wanted"
    assert host.commands == []


def test_the_commands_past_a_cut_cable(host: Host) -> None:
    outcome = reroute.reroute(1, 5, RING - {Cable(2, 3)})
    assert outcome == ("changed", "4 routes, 2 of them to neighbours")
    assert (
        host.commands
        == {
            "linux": [
                "ip route replace 10.89.0.3/32 via 10.88.1.14 dev L src 10.89.0.1",
            ],
            "darwin": [
                "route -n delete -host 10.89.0.3",
                "route -n add -host 10.89.0.3 10.88.1.14 -ifp L -ifa 10.89.0.1",
            ],
        }[sys.platform]
    )


def test_who_is_lost_has_no_route(host: Host) -> None:
    outcome = reroute.reroute(1, 5, RING - {Cable(2, 3), Cable(3, 4)})
    words = "3 routes, 2 of them to neighbours; no way leads to 10.89.0.3"
    assert outcome == ("changed", words)
    delete = {"linux": "ip route del 10.89.0.3/32"}
    mac = "route -n delete -host 10.89.0.3"
    assert host.commands == [delete.get(sys.platform, mac)]


def test_a_mesh_that_lacks_a_cable(host: Host) -> None:
    """Straight where there is a cable; the one without goes through another host."""
    host.interfaces |= {"10.88.1.5": "X", "10.88.1.9": "Y"}
    outcome = reroute.reroute(1, 5, cables.mesh(5))
    assert outcome == ("changed", "4 routes, 4 of them to neighbours")
    laid = {"linux": "ip route replace {}/32 via {} dev {} src 10.89.0.1"}
    mac = "route -n add -host {} {} -ifp {} -ifa 10.89.0.1"
    lay = laid.get(sys.platform, mac).format
    assert [c for c in host.commands if "delete" not in c] == [
        lay("10.89.0.3", "10.88.1.6", "X"),
        lay("10.89.0.4", "10.88.1.10", "Y"),
    ]
    host.commands.clear()
    outcome = reroute.reroute(1, 5, cables.mesh(5) - {Cable(1, 5)})
    assert outcome == ("changed", "4 routes, 3 of them to neighbours")
    assert lay("10.89.0.5", "10.88.1.6", "X") in host.commands


def test_what_it_cannot_do(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in words: no root, no sudo, no cable's address, no address of the ring."""
    monkeypatch.setattr(os, "geteuid", lambda: 501)
    host.refuses = "sudo: a password is required\n"
    outcome = reroute.reroute(1, 5, RING - {Cable(2, 3), Cable(3, 4)})
    assert outcome.routes == "refused" and len(host.commands) == 1
    assert host.commands[0].startswith("sudo -n ")
    assert "failed: sudo: a password is required; by hand: sudo /" in outcome.words
    assert outcome.words.endswith("-m mlxtp.cluster.reroute 1 5 --topology=1-2,1-5,4-5")

    def no_sudo(words: list[str], **_: object) -> None:
        raise FileNotFoundError(2, "No such file or directory", words[0])

    monkeypatch.setattr(reroute.subprocess, "run", no_sudo)
    outcome = reroute.reroute(1, 5, RING - {Cable(2, 3)})
    assert outcome.routes == "refused" and "'sudo'" in outcome.words
    del host.interfaces["10.88.1.13"]
    outcome = reroute.reroute(1, 5, RING - {Cable(2, 3)})
    assert outcome == ("refused", "no interface of this host has 10.88.1.13")
    del host.interfaces["10.89.0.1"]
    outcome = reroute.reroute(1, 5, RING - {Cable(2, 3)})
    assert outcome.routes == "refused"
    assert "no address 10.89.0.1" in outcome.words
    assert "launch/cables gives it" in outcome.words


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mlxtp.cluster.reroute", *words]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize(
    "words, says",
    [
        (["6", "5", "--topology=ring"], "K is one of 1 to 5, not 6"),
        (["1", "1", "--topology=ring"], "cables join 2 to 65 hosts, not 1"),
        (["1", "5", "--topology=star"], "--topology: wanted ring, mesh, or cables"),
        (["1", "5", "--topology=5-6"], "--topology: wanted ring"),
        (["1", "5", "--topology=2;3"], "such as 1-2,2-3, not '2;3'"),
    ],
)
def test_wrong_input(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        reroute.main(words)
    assert ended.value.code == 2 and says in capsys.readouterr().err


@pytest.mark.skipif(ring_address() is not None, reason="this host is in a ring")
def test_a_host_without_cables_says_so() -> None:
    """As a program: a line of JSON, and nothing but the standard library is loaded."""
    done = run("3", "5", "--topology=1-2,4-5,1-5")
    assert done.returncode == 0 and done.stderr == ""
    said = json.loads(done.stdout)
    assert said["routes"] == "refused" and "no address 10.89.0.3" in said["words"]


def test_the_standard_library_is_enough(tmp_path: Path) -> None:
    root = Path(reroute.__file__).parents[2]
    program = f"import sys; sys.path.insert(0, {str(root)!r})\n"
    program += "from mlxtp.cluster import cables, ports, reroute\n"
    # -S: no packages that are installed. -I: no PYTHONPATH.
    words = [sys.executable, "-I", "-S", "-c", program]
    assert subprocess.run(words, cwd=tmp_path).returncode == 0
