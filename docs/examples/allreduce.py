"""Measure an allreduce: time and bandwidth for arrays of several sizes.

    mpirun -hostfile HOSTFILE python docs/examples/allreduce.py --calls 20

A collective ends together: a call takes as long as its slowest rank.
"""

import argparse
import statistics
import time

import mlx.core as mx

import mlxtp

parser = argparse.ArgumentParser()
parser.add_argument("--calls", type=int, default=20)
args = parser.parse_args()

comm = mlxtp.Communicator.world()
medians = {}  # bytes -> seconds
for size in (1 << 12, 1 << 16, 1 << 20, 1 << 24):
    x = mx.random.normal((size // 4,))  # float32
    mx.eval(x)
    seconds = []
    for _ in range(args.calls):
        comm.barrier()
        begin = time.perf_counter()
        mx.eval(comm.allreduce(x))
        seconds.append(time.perf_counter() - begin)
    medians[size] = max(comm.allgather_object(statistics.median(seconds)))

if comm.rank == 0:
    print(comm.describe())
    for size, median in medians.items():
        speed = size / median / 1e9
        print(f"{size / 1e3:9.0f} kB {median * 1e3:9.3f} ms {speed:7.2f} GB/s")
