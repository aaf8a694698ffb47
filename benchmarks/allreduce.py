"""An allreduce, all algorithms side by side, from an MLX array to an MLX array.

Beside ours: the same over MPI's own allgather (`mpi-one-shot` and `mpi-two-shot`),
MPI_Allreduce as Open MPI chooses it, each of Open MPI's algorithms, and
the sums of MLX's backends. Where the links' delay is known (in the lab) times are
also given as multiples of the floor, which is the hops between the farthest ranks.
Parts are bfloat16, for MPI_Allreduce float32 of as many bytes.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from ranks import HOSTFILE, measured

from mlxtp.cluster.units import binary_size
from mlxtp.comm.allreduce import ALGORITHMS, OneShot, TwoShot, algorithms
from mlxtp.comm.eager import EagerCollectives
from mlxtp.comm.gathers import Gather
from mlxtp.comm.graph import GraphCollectives
from mlxtp.comm.heartbeat import Heartbeat
from mlxtp.comm.progress import Progress
from mlxtp.comm.traffic import Traffic
from mlxtp.comm.transports import connect, start_backend

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
MLX = ["ring"]

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
        print(json.dumps(measure(args)), flush=True)
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
    all_jobs |= {f"MLX over {name}": {} for name in MLX}
    wanted = args.only or [""]
    return {
        job: env for job, env in all_jobs.items() if any(word in job for word in wanted)
    }


def forwarded(args: argparse.Namespace, job: str) -> list[object]:
    options: list[object] = ["--job", job, "--sizes", *args.sizes]
    return [*options, "--rounds", args.rounds, "--calls", args.calls]


def measure(args: argparse.Namespace) -> Times:
    """One job, on every rank: each algorithm's median seconds, on the slowest rank."""
    name = args.job.removeprefix("MLX over ")
    backend = name if name in MLX else "mpi"
    control = connect()
    progress = Progress()
    heartbeat = Heartbeat(control, progress, timeout_seconds=600)
    transport: Any = start_backend(backend, control)
    if name in MLX:
        sums = sums_in_graph(transport, progress, name)
    elif name == "mlxtp":
        sums = our_sums(transport, progress)
    else:
        sums = {name: sum_of_mpi}
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


def our_sums(transport: Any, progress: Progress) -> dict[str, Any]:
    def sum_by(name: str) -> Callable[[mx.array], mx.array]:
        arrays = EagerCollectives(transport, progress, Traffic(), allreduce=name)
        return lambda x: arrays.allreduce(x, "")

    sums = {name: sum_by(name) for name in ["auto", *algorithms(transport.size)]}
    of_mpi = {
        "mpi-one-shot": (OneShot, MPIGather),
        "mpi-two-shot": (TwoShot, MPIGather),
    }
    ALGORITHMS.update(of_mpi)
    return sums | {name: sum_by(name) for name in of_mpi}


def sum_of_mpi(x: mx.array) -> mx.array:
    from mpi4py import MPI

    part = np.asarray(x.view(mx.float32))
    total = np.empty_like(part)
    MPI.COMM_WORLD.Allreduce(part, total)
    return mx.array(total).view(mx.bfloat16)


def sums_in_graph(transport: Any, progress: Progress, name: str) -> dict[str, Any]:
    ours = GraphCollectives(transport, progress, Traffic())

    def evaluated(total: mx.array) -> mx.array:
        mx.eval(total)
        return total

    return {
        f"{name}, gather and sum": lambda x: evaluated(ours.allreduce(x, "")),
        f"{name}, all_sum": lambda x: evaluated(mx.distributed.all_sum(x)),
    }


def report(args: argparse.Namespace, ranks: int, times: Times) -> None:
    print(f"\n{ranks} ranks, milliseconds; medians of {args.rounds} rounds")
    print(f"{'':26}" + "".join(f"{binary_size(size):>10}" for size in args.sizes))
    for name, row in times.items():
        cells = "".join(f"{1000 * row[str(size)]:10.3f}" for size in args.sizes)
        print(f"{name:26}{cells}")
    ours = times.get("auto")
    if ours is None:
        return
    rates = "".join(f"{size / ours[str(size)] / 1e9:10.3f}" for size in args.sizes)
    print(f"{'auto, GB/s of a part':26}{rates}")
    if args.hop_ms:
        hops = ranks // 2 if args.topology == "ring" else 1
        floor = hops * args.hop_ms / 1000
        cells = "".join(f"{ours[str(size)] / floor:10.2f}" for size in args.sizes)
        print(f"{f'auto, x {1000 * floor:g} ms':26}{cells}")
    theirs = [row for name, row in times.items() if name.startswith("Open MPI")]
    if theirs:
        best = {size: min(row[str(size)] for row in theirs) for size in args.sizes}
        cells = "".join(f"{ours[str(s)] / best[s]:10.2f}" for s in args.sizes)
        print(f"{'auto / best of Open MPI':26}{cells}", flush=True)


if __name__ == "__main__":
    main()
