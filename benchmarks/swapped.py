"""Collectives in MLX's graph beside those of Python, in one job.

The model that ships is loaded once; between turns the collectives of the communicator
are swapped. So two sides differ in nothing else, and a turn takes seconds. Before it,
layers of a product of 512 x 512 and a sum, each of which needs the one before.
"""

import argparse
import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import mlx.core as mx
from ranks import measured, print_on_rank_0

import mlxtp
from mlxtp.comm.eager import EagerCollectives
from mlxtp.comm.transports import connect
from mlxtp.stories import PATH as STORIES

LAYERS, WIDTH, PASSES = 16, 512, 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=150)
    parser.add_argument("--job", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job:
        print_on_rank_0(measure(args))
        return
    options = ["--job", "--turns", args.turns, "--max-tokens", args.max_tokens]
    result = measured(args.ranks, __file__, *options)
    print(f"{args.ranks} ranks, medians of {args.turns} turns (min-max)")
    for what, sides in result.items():
        ratios = [a / b for a, b in zip(*sides.values(), strict=True)]
        cells = [f"{side} {spread(values)}" for side, values in sides.items()]
        print(f"{what:24} {', '.join(cells)}, ratio {spread(ratios)}")
    print(json.dumps(result))


def measure(args: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """All turns of both sides, run by every rank."""
    comm = mlxtp.Communicator.world()
    eager = EagerCollectives(connect(), comm._progress, comm.traffic)
    sides = {"mpi": comm._arrays, "mpi-eager": eager}
    model, tokenizer = mlxtp.load(STORIES, comm)
    prompt = [7 + 3 * i for i in range(64)]
    result: dict[str, dict[str, list[float]]] = {
        what: {side: [] for side in sides}
        for what in ("microseconds a layer", "decode, tokens/s", "prefill, tokens/s")
    }
    for _ in range(args.turns):
        for side, arrays in sides.items():
            comm._arrays = arrays
            comm.barrier()
            layer = layer_microseconds(comm.allreduce)
            options = {"max_tokens": args.max_tokens}
            *_, last = mlxtp.stream_generate(model, tokenizer, prompt, **options)
            speeds = layer, last.generation_tps, last.prompt_tps
            for what, value in zip(result, speeds, strict=True):
                result[what][side].append(value)
    comm._arrays = sides["mpi"]
    return result


def layer_microseconds(allreduce: Callable[[mx.array], mx.array]) -> float:
    """The time of a layer, with one pass under way ahead of the one that is read."""
    weights = [mx.random.normal((WIDTH, WIDTH)) for _ in range(LAYERS)]
    mx.eval(weights)

    def layers(x: mx.array) -> Any:
        for weight in weights:
            y = mx.fast.rms_norm(x, None, 1e-5) @ weight
            x = x + allreduce(y) * 0.01
        return x

    x = layers(mx.ones((1, WIDTH)))
    mx.eval(x)
    begin = time.perf_counter()
    for _ in range(PASSES):
        following = layers(x)
        mx.async_eval(following)
        mx.eval(x)
        x = following
    mx.eval(x)
    return (time.perf_counter() - begin) / PASSES / LAYERS * 1e6


def spread(values: list[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


if __name__ == "__main__":
    main()
