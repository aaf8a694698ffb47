"""MLX's backends as transports: ranks of their own, and RDMA as text."""

import sys

import pytest
from needs import needs
from pyramid import sweep
from ranks import mpirun
from recorded import HARDWARE_PORTS, PROFILE

from mlxtp.cluster.ports import hardware_ports
from mlxtp.comm.transports import rdma
from mlxtp.comm.transports.rdma import Port

pytestmark = pytest.mark.once

# What a rank does with a transport that it has connected.
CHECKS = """
import sys
import mlx.core as mx
from mlxtp.comm.transports import start_backend, connect

transport = start_backend(sys.argv[1], connect())
rank, size = transport.rank, transport.size

def everyones(part):
    return mx.stack([part(other) for other in range(size)])

def check(part):
    gathered = transport.allgather(part(rank))
    expected = everyones(part)
    assert gathered.dtype == expected.dtype, gathered.dtype
    assert gathered.shape == expected.shape, gathered.shape
    assert mx.array_equal(gathered, expected), (gathered, expected)

assert size == int(sys.argv[2])
for name in ("bool_ uint8 uint16 uint32 uint64 int8 int16 int32 int64 "
             "float16 bfloat16 float32 complex64").split():
    dtype = getattr(mx, name)
    check(lambda r: (mx.arange(6) * 5 + r).reshape(2, 3).astype(dtype))
    check(lambda r: mx.array(r).astype(dtype))
check(lambda r: mx.array([r / 3]))
check(lambda r: (mx.arange(300_000) * (r + 1)).astype(mx.bfloat16))
check(lambda r: mx.arange(3_000_000).reshape(3, 1000, 1000).T + r)
check(lambda r: mx.zeros((2, 0)))

# Nothing is evaluated before it is asked for, and many at once keep their order.
gathers = [transport.allgather(mx.full((40,), rank + 100 * k)) for k in range(20)]
mx.eval(sum(reversed(gathers)))
for k, gathered in enumerate(gathers):
    assert mx.array_equal(gathered[:, 0], mx.arange(size) + 100 * k)

# A token loop starts a step before it reads the one before, on a stream of its own.
stream = mx.new_thread_local_stream(mx.default_device())
def step(x):
    with mx.stream(stream):
        for _ in range(4):
            x = transport.allgather(x + 1).sum(0) / size
        return x
x = step(mx.zeros(64))
mx.async_eval(x)
for count in range(1, 30):
    following = step(x)
    mx.async_eval(following)
    assert x[0].item() == 4 * count
    x = following

left_over = transport.allgather(mx.ones(3))  # never evaluated
print(f"rank {rank} passed", flush=True)
"""

COMPLAINT = """
import sys
from mlxtp.comm.transports import start_backend, connect
try:
    start_backend(sys.argv[1], connect())
except ValueError as error:
    print(error, flush=True)
"""


def run(ranks: int, program: str, *arguments: object, **env: str) -> str:
    done = mpirun(
        "-n",
        ranks,
        sys.executable,
        "-c",
        program,
        *arguments,
        timeout_seconds=60,
        **env,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("ranks", sweep([1, 2, 3, 5], [3]))
def test_ring(ranks: int) -> None:
    said = run(ranks, CHECKS, "ring", ranks)
    assert sorted(said.split("\n")[:-1]) == [f"rank {r} passed" for r in range(ranks)]


@pytest.mark.slow
def test_rings_side_by_side() -> None:
    program = """
from mpi4py import MPI
import mlx.core as mx
from mlxtp.comm.transports.mlx import MLXTransport

class Half:
    def __init__(self):
        self.comm = MPI.COMM_WORLD.Split(MPI.COMM_WORLD.rank % 2)
        self.rank, self.size = self.comm.rank, self.comm.size
    def allgather_object(self, value): return self.comm.allgather(value)
    def barrier(self): self.comm.barrier()

half = MPI.COMM_WORLD.rank % 2
transport = MLXTransport("ring", Half())
assert transport.allgather(mx.array(half)).tolist() == [half] * transport.size
"""
    run(6, program)


@pytest.mark.slow
@needs("linux")
def test_missing() -> None:
    assert run(2, COMPLAINT, "jaccl") == 2 * (
        "--transport jaccl: needs macOS 26.2 or later, Thunderbolt 5 and RDMA enabled "
        "in Recovery (rdma_ctl enable); this is Linux\n"
    )


@pytest.mark.slow
def test_missing_on_one_rank() -> None:
    program = """
import os
from mlxtp.comm.transports import backends
if os.environ["OMPI_COMM_WORLD_RANK"] == "1":
    backends.missing = lambda backend: "has no ring"
    backends.socket.gethostname = lambda: "studio2"
"""
    said = run(3, program + COMPLAINT, "ring")
    assert said == 3 * "--transport ring: rank 1 on studio2: has no ring\n"


IBV_DEVICES = """\
    device          \t   node GUID
    ------          \t----------------
    rdma_en2        \t8096a9d9edbaac05
    rdma_en3        \t8196a9d9edbaac05
    rdma_en4        \t8296a9d9edbaac05
"""


def test_ports() -> None:
    assert rdma.device_names(IBV_DEVICES) == {"rdma_en2", "rdma_en3", "rdma_en4"}
    assert hardware_ports(HARDWARE_PORTS)["Thunderbolt 4"] == "en5"
    assert rdma.ports(PROFILE, HARDWARE_PORTS, IBV_DEVICES) == [
        Port("rdma_en2", "A-1", "B-1"),
        Port("rdma_en3", "A-2", None),
        Port("rdma_en4", "A-3", None),
    ]
    assert rdma.ports("", "", "") == []


def cabled(size: int, *cables: tuple[int, int]) -> list[list[Port]]:
    """The ports of hosts that cables join, each in the next free port."""
    ends: list[list[Port]] = [[] for _ in range(size)]
    for a, b in cables:
        domain_a, domain_b = (f"{host}-{len(ends[host])}" for host in (a, b))
        for host, mine, other in (a, domain_a, domain_b), (b, domain_b, domain_a):
            ends[host].append(Port(f"rdma_en{2 + len(ends[host])}", mine, other))
    return ends


def hosts(size: int) -> list[str]:
    return [f"studio{rank + 1}" for rank in range(size)]


def test_mesh_of_three() -> None:
    table = rdma.devices(hosts(3), cabled(3, (0, 1), (0, 2), (1, 2)))
    assert rdma.is_mesh(table)
    assert table == [
        [[], ["rdma_en2"], ["rdma_en3"]],
        [["rdma_en2"], [], ["rdma_en3"]],
        [["rdma_en2"], ["rdma_en3"], []],
    ]


def test_ring_of_five() -> None:
    chord = (1, 3)
    ports = cabled(5, (0, 1), chord, (1, 2), (2, 3), (3, 4), (4, 0))
    table = rdma.devices(hosts(5), ports)
    assert not rdma.is_mesh(table)
    assert table == [
        [[], ["rdma_en2"], [], [], ["rdma_en3"]],
        [["rdma_en2"], [], ["rdma_en4"], [], []],
        [[], ["rdma_en2"], [], ["rdma_en3"], []],
        [[], [], ["rdma_en3"], [], ["rdma_en4"]],
        [["rdma_en3"], [], [], ["rdma_en2"], []],
    ]


def test_two_cables_between_two_hosts() -> None:
    crossed = [
        [Port("rdma_en2", "A", "Y"), Port("rdma_en3", "B", "X")],
        [Port("rdma_en2", "X", "B"), Port("rdma_en3", "Y", "A")],
    ]
    table = rdma.devices(hosts(2), crossed)
    assert table[0][1] == ["rdma_en2", "rdma_en3"]
    assert table[1][0] == ["rdma_en3", "rdma_en2"]


def test_equally_many_cables() -> None:
    ports = cabled(3, (0, 1), (0, 1), (1, 2), (2, 0))
    table = rdma.devices(hosts(3), ports)
    assert {len(names) for row in table for names in row} == {0, 1}


@pytest.mark.parametrize(
    ("cables", "pair"),
    [
        ([(0, 1), (1, 2), (2, 3)], r"studio1 \(rank 0\) and studio4 \(rank 3\)"),
        (
            [(0, 2), (2, 1), (1, 3), (3, 0)],
            r"studio1 \(rank 0\) and studio2 \(rank 1\)",
        ),
        ([], r"studio1 \(rank 0\) and studio2 \(rank 1\)"),
    ],
    ids=["line", "ring in another order", "none"],
)
def test_missing_cable(cables: list[tuple[int, int]], pair: str) -> None:
    with pytest.raises(ValueError, match=f"no cable that does RDMA joins {pair}"):
        rdma.devices(hosts(4), cabled(4, *cables))


def test_two_ranks_on_a_host() -> None:
    with pytest.raises(ValueError, match="a host for each rank, studio1 has 2"):
        rdma.devices(["studio2", "studio1", "studio1"], cabled(3, (0, 1)))
