"""Decoding where the links decide, beside the same program with MPI_Allreduce.

For the lab, or hosts whose links' delay is known. Two models: one with a hidden vector
of 32 KiB and narrow layers, and the one that ships. Both sides run mlxtp; on one of
them an allreduce is MPI_Allreduce, and a gather MPI_Allgather, as Open MPI does them.
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
from ranks import HOSTFILE, measured

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
SIDES = {"mlxtp": "auto", "MPI_Allreduce": "MPI_Allreduce"}


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
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure(args)), flush=True)
        return
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        narrow = make(Path(folder) / "narrow", NARROW, mx.float32)
        for name, model in {"32 KiB hidden": narrow, "shipped": STORIES}.items():
            turns = [
                {side: turn(args, side, model) for side in SIDES}
                for _ in range(args.turns)
            ]
            results[name] = report(args, name, turns)
    print(json.dumps(results))


def turn(args: argparse.Namespace, side: str, model: Path) -> dict[str, float]:
    options = ["--side", side, "--model", model, "--hop-ms", args.hop_ms]
    options += ["--max-tokens", args.max_tokens]
    return measured(args.ranks, __file__, *options, hostfile=args.hostfile)


def measure(args: argparse.Namespace) -> dict[str, float]:
    """One turn of one side, run by every rank."""
    if args.side == "MPI_Allreduce":
        ALGORITHMS["MPI_Allreduce"] = (MPIAllreduce, MPIGather)
    comm = mlxtp.Communicator.world(allreduce=SIDES[args.side])
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
    }


def report(
    args: argparse.Namespace, name: str, turns: list[dict[str, dict[str, float]]]
) -> dict[str, float]:
    floor = args.hops * args.hop_ms
    print(f"\n{name}, {args.ranks} ranks, medians of {args.turns} turns (min-max)")
    result = {}
    for side in SIDES:
        speeds = [turn[side]["tokens_per_second"] for turn in turns]
        times = [turn[side]["ms_a_collective"] for turn in turns]
        calls = turns[0][side]["collectives_a_token"]
        print(
            f"{side:14} {spread(speeds)} tokens/s, {calls:.1f} collectives a token, "
            f"{spread(times)} ms each = {median(times) / floor:.2f} x the floor"
        )
        result[f"{side}, x floor"] = median(times) / floor
    ratios = [
        turn["mlxtp"]["tokens_per_second"] / turn["MPI_Allreduce"]["tokens_per_second"]
        for turn in turns
    ]
    print(f"ratio of tokens/s, turn by turn: {spread(ratios)}", flush=True)
    return result | {"ratio": median(ratios)}


def spread(values: list[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


if __name__ == "__main__":
    main()
