"""In the lab: a mesh is found, set up, used, and gone round where a cable is out."""

import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from five_hosts import HOSTFILE, HOSTS, ROOT, good, lab
from five_hosts import the_lab_can_be_built as the_lab_can_be_built
from lab_hosts import reached

from mlxtp.cluster import cables

pytestmark = [pytest.mark.lab, pytest.mark.once]

CABLES = ROOT / "launch" / "cables"

# Each rank sends each other one as many bytes as their numbers say, with the settings
# of mlxtp. The second messages are too long to go out at once.
SENDS = """
import numpy as np
from mlxtp.comm.transports.openmpi import set_defaults
set_defaults()
from mpi4py import MPI
comm = MPI.COMM_WORLD
others = [rank for rank in range(comm.size) if rank != comm.rank]
def message(a, b, nbytes, value):
    return np.full((1 + comm.size * a + b) * nbytes, value, np.uint8)
for nbytes in 4096, 100_000:
    out = {b: message(comm.rank, b, nbytes, 1) for b in others}
    got = {a: message(a, comm.rank, nbytes, 0) for a in others}
    requests = [comm.Irecv(got[a], a) for a in others]
    requests += [comm.Isend(out[b], b) for b in others]
    MPI.Request.Waitall(requests)
    assert all(got[a].all() for a in others)
"""


@pytest.fixture
def mesh() -> Iterator[None]:
    """A mesh of five hosts, which a test that passes leaves as it was found."""
    good("up", "--topology", "mesh", "--delay-ms", "1")
    yield
    good("mend")


def carried() -> dict[tuple[str, str], int]:
    """The bytes that each direction of each cable has carried."""
    links = json.loads(good("status", "--json"))["links"]
    return {(link["from"], link["to"]): link["bytes"] for link in links}


def on_each(*command: str) -> list[str]:
    """Run a command on all hosts at once; return what it prints."""
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda h: good("run", "--on", h, *command), HOSTS))


def test_a_mesh_from_its_ports(mesh: None) -> None:
    """What was set up is found again after it was undone, and is used by MPI."""
    before = on_each("ip", "route")
    run = [sys.executable, CABLES, HOSTFILE]
    assert "Cables: a mesh." in good("run", *run)  # it is there already
    good("run", *run, "--undo", "--apply")
    left = "".join(on_each("sh", "-c", "ip route; ip -4 address"))
    assert "10.88." not in left and "10.89." not in left
    on_each("sh", "-c", "for k in 1 2 3 4 5; do ip link set tb$k up; done; true")
    good("cut", "studio2", "studio4")
    said = lab("run", *run, "--topology", "mesh")
    assert "\nstudio1 tb5 - studio5 tb1\n" in said.stdout
    assert "MISSING: a cable from studio2 tb4 to studio4 tb2\n" in said.stdout
    good("mend")
    assert "Cables: a mesh." in good("run", *run, "--apply")
    assert on_each("ip", "route") == before

    start = carried()
    mpirun = ["mpirun", "-hostfile", HOSTFILE, sys.executable, "-c", SENDS]
    good("run", *mpirun)
    end = carried()
    for a, source in enumerate(HOSTS):
        for b, target in enumerate(HOSTS):
            if a != b:
                sent = (1 + 5 * a + b) * 104_096
                grown = end[source, target] - start[source, target]
                # Acknowledgements of what comes the other way, and MPI's start.
                assert sent < grown < 1.05 * sent + 100_000, (source, target)


def test_a_mesh_past_a_cable_and_a_host(mesh: None) -> None:
    """Two hosts go through a third; a host without power is nobody's way."""
    module = "from mlxtp.cluster import cables; import json, socket; "
    module += "print(json.dumps(cables.answering(int(socket.gethostname()[-1]), 5)))"
    good("cut", "studio2", "studio4")
    assert reached("studio2", "10.89.0.3", "10.89.0.4") == {"10.89.0.3"}
    answers = [json.loads(text) for text in on_each(sys.executable, "-c", module)]
    silent = [
        (host, int(other))
        for host, there in enumerate(answers, 1)
        for other, answer in there.items()
        if not answer
    ]
    assert silent == [(2, 4), (4, 2)]

    def reroute(topology: frozenset[cables.Cable]) -> list[str]:
        words = ["--topology", cables.listed(topology)]
        place = '$(hostname | tr -d a-z) 5 "$@"'
        script = f'"$0" -m mlxtp.cluster.reroute {place}'
        said = on_each("sh", "-c", script, sys.executable, *words)
        return [json.loads(text)["routes"] for text in said]

    mesh_of_five = cables.mesh(5)
    left = mesh_of_five - {cables.Cable(2, 4)}
    assert reroute(left) == [
        "as wanted",
        "changed",
        "as wanted",
        "changed",
        "as wanted",
    ]
    start = carried()
    assert reached("studio2", "10.89.0.4") and reached("studio4", "10.89.0.2")
    end = carried()
    through = cables.routes(2, left)[4]
    assert end["studio2", HOSTS[through - 1]] > start["studio2", HOSTS[through - 1]]
    good("mend")
    assert reroute(mesh_of_five).count("changed") == 2
    good("off", "studio3")
    others = {"10.89.0.1", "10.89.0.2", "10.89.0.5"}
    assert reached("studio4", *others, "10.89.0.3") == others
    good("on", "studio3")
    good("run", sys.executable, CABLES, HOSTFILE, "--apply")
    assert reached("studio4", *others, "10.89.0.3") == {*others, "10.89.0.3"}
