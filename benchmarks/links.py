"""Decoding where the links decide: over mpi, mpi-eager, and with MPI_Allreduce.

For the lab, or hosts whose links' delay is known. Two models: one with a hidden vector
of 32 KiB and narrow layers, and the one that ships. All sides run mlxtp, take turns and
have to give the same tokens. On the last an allreduce is MPI_Allreduce, and a gather
MPI_Allgather, as Open MPI does them; it adds in an order of its own.
"""

import argparse
import json
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
import numpy as np
from allreduce import MPIGather
from models import LLAMA_3_2_1B, make
from ranks import HOSTFILE, measured, print_on_rank_0

import mlxtp
from mlxtp.comm.allreduce import ALGORITHMS
from mlxtp.stories import PATH as STORIES

# 8,192 elements of float32, which MPI can add, are 32 KiB.
NARROW: dict[str, Any] = {
    **LLAMA_3_2_1B,
    "hidden_size": 8192,
    "intermediate_size": 40,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 4,
    "vocab_size": 512,
}
MODELS = ("32 KiB hidden", "shipped")

# The algorithm in whose place MPI's own collectives are put.
REPLACED = "direct-one-shot"
# Side -> transport and algorithm of an allreduce.
SIDES = {
    "mpi": ("mpi", "auto"),
    "mpi-eager": ("mpi-eager", "auto"),
    "MPI_Allreduce": ("mpi-eager", REPLACED),
}


class MPIAllreduce:
    """MPI's own sum, in an order of its own; it has no 16-bit floats."""

    def __init__(
        self, transport: Any, gather: Any, codec: Any, size: int, dtype: np.dtype
    ) -> None:
        from mpi4py import MPI

        self._comm = MPI.COMM_WORLD
        self._result = np.empty(size, np.float32)

    def start(self, x: np.ndarray) -> None:
        self._dtype = x.dtype
        self._comm.Allreduce(x.astype(np.float32, copy=False), self._result)

    def finish(self) -> np.ndarray:
        return self._result.astype(self._dtype, copy=False)

    def requests(self) -> list[Any]:
        return []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=5)
    parser.add_argument("--hostfile", type=Path, default=HOSTFILE)
    parser.add_argument("--hop-ms", type=float, required=True)
    parser.add_argument("--hops", type=int, default=2, help="the floor of a collective")
    parser.add_argument("--max-tokens", type=int, default=20)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument(
        "--sides",
        nargs="+",
        choices=SIDES,
        default=list(SIDES),
        help="the first is compared with each of the others",
    )
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print_on_rank_0(measure(args))
        return
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.models:
            model = STORIES
            if name != "shipped":
                model = make(Path(folder) / "narrow", NARROW, mx.float32)
            turns = [
                {side: turn(args, side, model) for side in args.sides}
                for _ in range(args.turns)
            ]
            results[name] = report(args, name, turns)
    print(json.dumps(results))


def turn(args: argparse.Namespace, side: str, model: Path) -> dict[str, Any]:
    options = ["--side", side, "--model", model, "--hop-ms", args.hop_ms]
    options += ["--max-tokens", args.max_tokens]
    return measured(args.ranks, __file__, *options, hostfile=args.hostfile)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One turn of one side, run by every rank."""
    if args.side == "MPI_Allreduce":
        ALGORITHMS[REPLACED] = (MPIAllreduce, MPIGather)
    transport, algorithm = SIDES[args.side]
    comm = mlxtp.Communicator.world(transport, allreduce=algorithm)
    model, tokenizer = mlxtp.load(args.model, comm)
    prompt = list(range(2, 10))
    list(mlxtp.stream_generate(model, tokenizer, prompt, max_tokens=4))
    comm.traffic.reset()
    responses = []
    for response in mlxtp.stream_generate(
        model, tokenizer, prompt, max_tokens=args.max_tokens
    ):
        if not responses:  # the prompt is read
            comm.traffic.reset()
        responses.append(response)
    calls, seconds = comm.traffic.calls, comm.traffic.seconds
    return {
        "tokens_per_second": responses[-1].generation_tps,
        "collectives_a_token": calls / (len(responses) - 1),
        "ms_a_collective": 1000 * max(comm.allgather_object(seconds / calls)),
        "tokens": [int(response.token) for response in responses],
    }


def report(
    args: argparse.Namespace, name: str, turns: list[dict[str, dict[str, Any]]]
) -> dict[str, float]:
    floor = args.hops * args.hop_ms
    print(
        f"\n{name}, {args.ranks} ranks, {args.hop_ms:g} ms a hop, medians of "
        f"{args.turns} turns (min-max)"
    )
    result = {}
    first, *others = args.sides
    tokens = turns[0][first]["tokens"]
    for side in args.sides:
        speeds = [turn[side]["tokens_per_second"] for turn in turns]
        times = [turn[side]["ms_a_collective"] for turn in turns]
        calls = turns[0][side]["collectives_a_token"]
        same = all(turn[side]["tokens"] == tokens for turn in turns)
        print(
            f"{side:14} {spread(speeds)} tokens/s, {calls:.1f} collectives a token, "
            f"{spread(times)} ms each = {median(times) / floor:.2f} x the floor, "
            f"{'the same' if same else 'OTHER'} tokens"
        )
        result[f"{side}, x floor"] = median(times) / floor
        result[f"{side}, same tokens"] = same
    for other in others:
        ratios = [
            turn[first]["tokens_per_second"] / turn[other]["tokens_per_second"]
            for turn in turns
        ]
        print(f"{first} / {other}, turn by turn: {spread(ratios)}", flush=True)
        result[f"{first} / {other}"] = median(ratios)
    return result


def spread(values: list[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


if __name__ == "__main__":
    main()
