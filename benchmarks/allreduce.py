"""An allreduce, all algorithms side by side, from an MLX array to an MLX array.

Ours stand twice, as `--transport mpi` makes them (`native`, in MLX's graph) and as
`mpi-eager` does (`eager`), and take turns in one job. Beside them: the same over MPI's
own allgather (`eager mpi-one-shot` and `mpi-two-shot`), MPI_Allreduce as Open MPI
chooses it, each of Open MPI's algorithms, the sums of MLX's ring, and what plain TCP
takes to bring everyone's part to everyone, without MPI and without a sum: what the
machine and its links leave to be had. Where the links' delay is known (in the lab)
times are also given as multiples of the floor, which is the hops between the farthest
ranks. Parts are bfloat16, for MPI_Allreduce float32 of as many bytes.
"""

import argparse
import json
import select
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from ranks import HOSTFILE, measured, print_on_rank_0

from mlxtp.cluster.addresses import own_address
from mlxtp.cluster.units import binary_size
from mlxtp.comm.allreduce import ALGORITHMS, OneShot, TwoShot, algorithms
from mlxtp.comm.eager import EagerCollectives
from mlxtp.comm.gathers import Gather
from mlxtp.comm.graph import GraphCollectives
from mlxtp.comm.heartbeat import Heartbeat
from mlxtp.comm.native.collectives import NativeCollectives
from mlxtp.comm.native.start import start
from mlxtp.comm.progress import Progress
from mlxtp.comm.traffic import Traffic
from mlxtp.comm.transports import connect, start_backend
from mlxtp.comm.verdict import Limits

# 32 KiB is the hidden vector of Llama 3.1 405B in 16 bits.
SIZES = [2**power for power in (10, 12, 14, 15, 16, 18, 20, 22, 24)]

# Numbers of coll_tuned_allreduce_algorithm.
OPEN_MPI = {
    "default": 0,
    "linear": 1,
    "nonoverlapping": 2,
    "recursive doubling": 3,
    "ring": 4,
    "segmented ring": 5,
    "Rabenseifner": 6,
}
RING = "MLX over ring"
SOCKETS = "plain sockets"

# Rounds before those that count: buffers of sockets grow with what passes them.
WARM_UP = 2

# Name of what is timed -> median seconds by bytes.
Times = dict[str, dict[str, float]]


class MPIGather(Gather):
    """MPI's own allgather, by whichever of its algorithms Open MPI chooses."""

    def start(self, mine: np.ndarray) -> None:
        from mpi4py import MPI

        aliased = np.may_share_memory(mine, self.joined)
        part = MPI.IN_PLACE if aliased else (mine, MPI.BYTE)
        if len(set(self.counts)) == 1:  # MPI has faster algorithms for equal parts
            MPI.COMM_WORLD.Allgather(part, (self.joined, MPI.BYTE))
        else:
            MPI.COMM_WORLD.Allgatherv(part, (self.joined, self.counts, MPI.BYTE))

    def finish(self) -> None:
        """Nothing is under way any more."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3, 4, 5, 6, 7, 8])
    parser.add_argument("--hostfile", type=Path, default=HOSTFILE)
    parser.add_argument("--hop-ms", type=float, help="the delay of a link")
    parser.add_argument("--topology", choices=["ring", "mesh"], default="ring")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=5, help="in a round, up to 1 MiB")
    parser.add_argument("--only", nargs="+", help="parts of names")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        print_on_rank_0(measure(args))
        return
    results = {}
    for ranks in args.ranks:
        times: Times = {}
        for job, env in jobs(args).items():
            times |= measured(
                ranks, __file__, *forwarded(args, job), hostfile=args.hostfile, **env
            )
        results[ranks] = times
        report(args, ranks, times)
    print(json.dumps({"hop_ms": args.hop_ms, "seconds": results}))


def jobs(args: argparse.Namespace) -> dict[str, dict[str, str]]:
    """What one mpirun each measures, with its environment."""
    tuned = {"OMPI_MCA_coll_tuned_use_dynamic_rules": "1"}
    algorithm = "OMPI_MCA_coll_tuned_allreduce_algorithm"
    all_jobs: dict[str, dict[str, str]] = {"mlxtp": {}}
    for name, number in OPEN_MPI.items():
        chosen = {**tuned, algorithm: str(number)} if number else {}
        all_jobs[f"Open MPI, {name}"] = chosen
    all_jobs |= {RING: {}, SOCKETS: {}}
    wanted = args.only or [""]
    return {
        job: env for job, env in all_jobs.items() if any(word in job for word in wanted)
    }


def forwarded(args: argparse.Namespace, job: str) -> list[object]:
    options: list[object] = ["--job", job, "--sizes", *args.sizes]
    return [*options, "--rounds", args.rounds, "--calls", args.calls]


def measure(args: argparse.Namespace) -> Times:
    """One job, on every rank: each algorithm's median seconds, on the slowest rank."""
    control: Any = connect()
    progress = Progress()
    heartbeat = Heartbeat(control, progress, Limits(600, 600))
    cores = None
    if args.job == "mlxtp":
        cores = start(control)
        sums = our_sums(control, cores, progress)
    elif args.job == RING:
        sums = sums_in_graph(start_backend("ring", control), progress)
    elif args.job == SOCKETS:
        sums = {SOCKETS: exchange_of_sockets(control)}
    else:
        sums = {args.job: sum_of_mpi}
    result: Times = {algorithm: {} for algorithm in sums}
    for size in args.sizes:
        calls = args.calls if size <= 2**20 else 1
        x = mx.zeros(size // 2, mx.bfloat16)
        mx.eval(x)
        rounds = range(WARM_UP + args.rounds)
        turns = [[timed(sums[name], x, calls) for name in sums] for _ in rounds]
        medians = np.median(turns[WARM_UP:], axis=0)
        slowest = np.max(control.allgather_object(medians), axis=0)
        for algorithm, seconds in zip(sums, slowest.tolist(), strict=True):
            result[algorithm][str(size)] = seconds
    heartbeat.leave()
    for core in cores or ():
        core.close()
    return result


def timed(allreduce: Callable[[mx.array], mx.array], x: mx.array, calls: int) -> float:
    """Seconds a call, each of which takes the result of the last.

    One before them is not timed: whatever another algorithm left between the ranks,
    they are then no farther apart than the hops between them.
    """
    allreduce(x)
    begin = time.perf_counter()
    for _ in range(calls):
        x = allreduce(x)
    return (time.perf_counter() - begin) / calls


def our_sums(control: Any, cores: Any, progress: Progress) -> dict[str, Any]:
    """Ours by name; eager ones alone where this host cannot compile the others."""

    def native(name: str) -> Callable[[mx.array], mx.array]:
        arrays = NativeCollectives(cores, control, progress, Traffic(), allreduce=name)
        return lambda x: evaluated(arrays.allreduce(x, ""))

    def eager(name: str) -> Callable[[mx.array], mx.array]:
        arrays = EagerCollectives(control, progress, Traffic(), allreduce=name)
        return lambda x: arrays.allreduce(x, "")

    names = ["auto", *algorithms(control.size)]
    of_mpi = {
        "mpi-one-shot": (OneShot, MPIGather),
        "mpi-two-shot": (TwoShot, MPIGather),
    }
    sums = {f"native {name}": native(name) for name in names if cores is not None}
    sums |= {f"eager {name}": eager(name) for name in names}
    ALGORITHMS.update(of_mpi)
    return sums | {f"eager {name}": eager(name) for name in of_mpi}


def evaluated(x: mx.array) -> mx.array:
    mx.eval(x)
    return x


def sum_of_mpi(x: mx.array) -> mx.array:
    from mpi4py import MPI

    part = np.asarray(x.view(mx.float32))
    total = np.empty_like(part)
    MPI.COMM_WORLD.Allreduce(part, total)
    return mx.array(total).view(mx.bfloat16)


def exchange_of_sockets(control: Any) -> Callable[[mx.array], mx.array]:
    """Everyone's part to everyone, over a connection for each two ranks."""
    rank, size = control.rank, control.size
    address = own_address(control.allgather_object(socket.gethostname()))
    ends: list[socket.socket] = []
    with socket.create_server((address, 0)) as server:
        servers = control.allgather_object(server.getsockname())
        ends += [socket.create_connection(servers[peer]) for peer in range(rank)]
        ends += [server.accept()[0] for _ in range(rank + 1, size)]
    for end in ends:
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        end.setblocking(False)

    def exchange(x: mx.array) -> mx.array:
        part = memoryview(np.asarray(x.view(mx.uint8)))
        to_send = dict.fromkeys(ends, part)
        to_come = {end: memoryview(bytearray(len(part))) for end in ends}
        while to_send or to_come:
            readable, writable, _ = select.select([*to_come], [*to_send], [])
            for end in readable:
                to_come[end] = to_come[end][end.recv_into(to_come[end]) :]
            for end in writable:
                to_send[end] = to_send[end][end.send(to_send[end]) :]
            to_come = {end: rest for end, rest in to_come.items() if rest}
            to_send = {end: rest for end, rest in to_send.items() if rest}
        return x

    return exchange


def sums_in_graph(transport: Any, progress: Progress) -> dict[str, Any]:
    ours = GraphCollectives(transport, progress, Traffic())
    return {
        "ring, gather and sum": lambda x: evaluated(ours.allreduce(x, "")),
        "ring, all_sum": lambda x: evaluated(mx.distributed.all_sum(x)),
    }


def report(args: argparse.Namespace, ranks: int, times: Times) -> None:
    print(f"\n{ranks} ranks, milliseconds; medians of {args.rounds} rounds")
    print(f"{'':26}" + "".join(f"{binary_size(size):>10}" for size in args.sizes))
    for name, row in times.items():
        cells = "".join(f"{1000 * row[str(size)]:10.3f}" for size in args.sizes)
        print(f"{name:26}{cells}")
    theirs = [row for name, row in times.items() if name.startswith("Open MPI")]
    for name in ("native auto", "eager auto", SOCKETS):
        if name in times:
            compare(args, ranks, name, times[name], theirs)
    print(end="", flush=True)


def compare(
    args: argparse.Namespace,
    ranks: int,
    name: str,
    row: dict[str, float],
    theirs: list[dict[str, float]],
) -> None:
    """Print one of ours as a rate, in floors, and beside the best of Open MPI."""

    def line(words: str, values: list[float], digits: int) -> None:
        cells = "".join(f"{value:10.{digits}f}" for value in values)
        print(f"{f'{name}, {words}':26}{cells}")

    seconds = {size: row[str(size)] for size in args.sizes}
    line("GB/s", [size / taken / 1e9 for size, taken in seconds.items()], 3)
    if args.hop_ms:
        hops = ranks // 2 if args.topology == "ring" else 1
        floor = hops * args.hop_ms / 1000
        line(f"x {1000 * floor:g} ms", [taken / floor for taken in seconds.values()], 2)
    if theirs:
        best = [min(other[str(size)] for other in theirs) for size in args.sizes]
        ratios = [a / b for a, b in zip(seconds.values(), best, strict=True)]
        line("/ Open MPI", ratios, 2)


if __name__ == "__main__":
    main()
