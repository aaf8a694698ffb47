"""Decoding and prefill beside mlx-lm's own tensor parallelism over MPI.

The shapes of Llama 3.2 1B with eight of its layers and its whole vocabulary, in
float32, on the ranks of this machine. Both sides load the same checkpoint and
generate with mlx-lm's loop; they take turns, each turn a job of its own.
"""

import argparse
import json
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
from models import LLAMA_3_2_1B, make
from ranks import measured

SIDES = ("mlxtp", "mlx-lm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=24)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="keep the checkpoint here")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure(args)), flush=True)
        return
    with tempfile.TemporaryDirectory() as temporary:
        args.folder = args.folder or Path(temporary) / "model"
        config = {**LLAMA_3_2_1B, "num_hidden_layers": args.layers}
        make(args.folder, config, mx.float32)
        report(
            args,
            [{side: turn(args, side) for side in SIDES} for _ in range(args.turns)],
        )


def turn(args: argparse.Namespace, side: str) -> dict[str, float]:
    options = ["--side", side, "--folder", args.folder]
    options += ["--prompt-tokens", args.prompt_tokens, "--max-tokens", args.max_tokens]
    # MLX's MPI backend opens a library by name; the wheel's plain one is no library.
    library = {"MLX_MPI_LIBNAME": "libmpi.so.40"} if side == "mlx-lm" else {}
    return measured(args.ranks, __file__, *options, **library)


def measure(args: argparse.Namespace) -> dict[str, float]:
    """One turn of one side, run by every rank."""
    import mlx_lm
    from mlx_lm.utils import load_model, load_tokenizer

    import mlxtp

    stream_generate: Any
    if args.side == "mlxtp":
        comm = mlxtp.Communicator.world()
        model, tokenizer = mlxtp.load(args.folder, comm)
        stream_generate = mlxtp.stream_generate
    else:
        group = mx.distributed.init(strict=True, backend="mpi")
        model, _ = load_model(args.folder, lazy=True)
        model.shard(group)
        mx.eval(model.parameters())
        tokenizer = load_tokenizer(args.folder)
        stream_generate = mlx_lm.stream_generate
    prompt = [7 + 3 * i for i in range(args.prompt_tokens)]
    list(stream_generate(model, tokenizer, prompt[:8], max_tokens=4))
    options = {"max_tokens": args.max_tokens}
    *_, last = stream_generate(model, tokenizer, prompt, **options)
    return {
        "prefill": last.prompt_tps,
        "decode": last.generation_tps,
        "peak_memory_gb": mx.get_peak_memory() / 1e9,
    }


def report(args: argparse.Namespace, turns: list[dict[str, dict[str, float]]]) -> None:
    print(
        f"{args.ranks} ranks, {args.layers} layers, medians of {args.turns} (min-max)"
    )
    print(f"{'':8} {'mlxtp':>20} {'mlx-lm':>20} {'ratio, turn by turn':>26}")
    result: dict[str, Any] = {"ranks": args.ranks, "layers": args.layers}
    for what in ("decode", "prefill"):
        speeds = {side: [turn[side][what] for turn in turns] for side in SIDES}
        ratios = [turn["mlxtp"][what] / turn["mlx-lm"][what] for turn in turns]
        cells = [spread(speeds[side], 2) for side in SIDES]
        print(f"{what:8} {cells[0]:>20} {cells[1]:>20} {spread(ratios, 2):>26}")
        result[f"{what}_ratio"] = median(ratios)
    peaks = {
        side: max(turn[side]["peak_memory_gb"] for turn in turns) for side in SIDES
    }
    print("speeds in tokens a second; peak memory of rank 0 in GB:", peaks)
    print(json.dumps(result))


def spread(values: list[float], digits: int) -> str:
    low, middle, high = min(values), median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


if __name__ == "__main__":
    main()
