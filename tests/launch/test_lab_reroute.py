"""In the lab: routes past a cut cable and past a host without power."""

import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pytest
from five_hosts import HOSTFILE, HOSTS, good, lab
from five_hosts import the_lab_can_be_built as the_lab_can_be_built
from lab_hosts import cables, reached

from mlxtp.cluster.cables import listed, parse
from mlxtp.cluster.cables import ring as ring_of

pytestmark = [pytest.mark.lab, pytest.mark.once]

T = TypeVar("T")

ANSWERING = """
from mlxtp.cluster import cables
print(sorted(k for k, answers in cables.answering({}, 5).items() if answers))
"""


@pytest.fixture
def ring() -> Iterator[None]:
    """A ring of five hosts."""
    good("up", "--delay-ms", "1")
    yield
    good("down")  # with the routes that a test has left


# Sends each other more than a megabyte, and is heard by the heartbeat.
JOB = """
import mlxtp
comm = mlxtp.Communicator.world("mpi-eager", timeout_seconds=20)
assert len(comm.allgather_object("x" * 300_000)) == 5
if comm.rank == 0:
    print("well", flush=True)
"""


def reroute(broken: str, hosts: list[str] = HOSTS) -> list[str]:
    """Let hosts lay their routes past broken cables of a ring; say how it went."""
    left = listed(ring_of(5) - parse(broken, 5))

    def act(host: str) -> str:
        module = ["mlxtp.cluster.reroute", host[-1], "5", "--topology", left]
        said = good("run", "--on", host, sys.executable, "-m", *module)
        return json.loads(said)["routes"]

    return on_each(act, hosts)


def routes() -> list[list[str]]:
    """Return the routes of all hosts."""
    return on_each(
        lambda host: sorted(good("run", "--on", host, "ip", "route").splitlines()),
        HOSTS,
    )


def on_each(act: Callable[[str], T], hosts: list[str]) -> list[T]:
    """Call a function for all hosts at once."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(act, hosts))


def answering(host: str) -> list[int]:
    """Return the neighbours of a host that answer, by number."""
    program = ANSWERING.format(host[-1])
    return json.loads(good("run", "--on", host, sys.executable, "-c", program))


def test_past_a_cut_cable_and_a_lost_host(ring: None) -> None:
    """Others reach each other again; all is as it was when the host is back."""
    before = routes()
    good("cut", "studio2", "studio3")
    assert answering("studio2") == [1]
    assert reached("studio1", "10.89.0.3") == set()
    # The shorter ways of studio5, opposite, do not pass the cable.
    assert reroute("2-3") == [*["changed"] * 4, "as wanted"]
    assert reached("studio1", "10.89.0.3")
    others = {"10.89.0.1", "10.89.0.3", "10.89.0.4", "10.89.0.5"}
    assert reached("studio2", *others) == others

    good("mend")
    good("off", "studio3")
    left = ["studio1", "studio2", "studio4", "studio5"]
    assert answering("studio4") == [5]
    assert reroute("2-3,3-4", left) == ["changed"] * 4
    assert reroute("2-3,3-4", ["studio5"]) == ["as wanted"]
    assert reached("studio2", *others) == others - {"10.89.0.3"}
    # Nothing leads to the host that is gone: who asks for it is told at once.
    assert "10.89.0.3" not in good("run", "--on", "studio2", "ip", "route")

    good("on", "studio3")
    module = ["mlxtp.cluster.reroute", "3", "5", "--topology", "ring"]
    said = json.loads(good("run", "--on", "studio3", sys.executable, "-m", *module))
    assert said["routes"] == "refused" and "no address 10.89.0.3" in said["words"]
    cables("studio3")
    assert answering("studio3") == [2, 4]
    assert reroute("", left) == ["changed"] * 4
    assert routes() == before


def test_a_job_takes_the_ethernet(ring: None) -> None:
    """With MLXTP_CABLES=0, while cables are cut and routes still lead through them."""
    good("cut", "studio2", "studio3")
    good("cut", "studio3", "studio4")
    start = """
from mlxtp.cluster.job import Job
Job(["python", "-c", {!r}], "{}").exec()
"""
    program = start.format(JOB, HOSTFILE)
    done = lab("run", sys.executable, "-c", program, MLXTP_CABLES="0")
    assert done.stdout == "well\n", done.stderr
    carried = json.loads(good("status", "--json"))["links"]
    assert sum(link["bytes"] + link["lost"] for link in carried) < 10_000
