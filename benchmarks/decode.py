"""Decoding and prefill beside mlx-lm's own tensor parallelism over MPI.

Two models with random weights, in float32, on the ranks of this machine:

  1b     shapes of Llama 3.2 1B with eight of its layers and its whole vocabulary: the
         head has a third of the weights, and ours is split
  small  eight layers with a hidden vector of 512 and a vocabulary of 8,000: the layers
         decide, and how long a collective keeps them waiting

All sides load the same checkpoint and generate with mlx-lm's loop; they take turns,
each turn a job of its own, and have to give the same tokens.
"""

import argparse
import json
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
from models import LLAMA_3_2_1B, make
from ranks import measured, print_on_rank_0

# As in the 1B, the layers widen four times and queries share keys and values. Five
# ranks take 4, 4, 4, 2 and 2 of the 16 heads, three take 6, 6 and 4.
SMALL: dict[str, Any] = {
    **LLAMA_3_2_1B,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 32,
    "vocab_size": 8000,
}

# A model's config, and how many tokens its prompt and its answer have unless told: a
# turn then takes seconds.
MODELS = {"1b": (LLAMA_3_2_1B, 64, 24), "small": (SMALL, 512, 200)}

# What can be measured, and the transport of those that are ours.
SIDES = {"mlxtp": "mpi", "mpi-eager": "mpi-eager", "mlx-lm": None}

Turn = dict[str, dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="1b")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument(
        "--sides",
        nargs="+",
        choices=SIDES,
        help="the first is compared with each of the others; mlxtp and mlx-lm, or "
        "mpi-eager where mlx-lm cannot split the model",
    )
    parser.add_argument("--prompt-tokens", type=int)
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--folder", type=Path, help="keep the checkpoint here")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    config, prompt_tokens, max_tokens = MODELS[args.model]
    args.prompt_tokens = args.prompt_tokens or prompt_tokens
    args.max_tokens = args.max_tokens or max_tokens
    if args.side:
        print_on_rank_0(measure(args))
        return
    config = {**config, "num_hidden_layers": args.layers}
    if args.sides is None:
        args.sides = ["mlxtp", partner(config, args.ranks)]
    with tempfile.TemporaryDirectory() as temporary:
        args.folder = args.folder or Path(temporary) / "model"
        make(args.folder, config, mx.float32)
        report(
            args,
            [
                {side: turn(args, side) for side in args.sides}
                for _ in range(args.turns)
            ],
        )


def partner(config: dict[str, Any], ranks: int) -> str:
    """Return the side to compare with: mlx-lm, where it can split the model."""
    widths = "num_attention_heads", "num_key_value_heads", "intermediate_size"
    splits = all(config[width] % ranks == 0 for width in widths)
    return "mlx-lm" if splits else "mpi-eager"


def turn(args: argparse.Namespace, side: str) -> dict[str, Any]:
    options = ["--side", side, "--folder", args.folder]
    options += ["--prompt-tokens", args.prompt_tokens, "--max-tokens", args.max_tokens]
    # MLX's MPI backend opens a library by name; the wheel's plain one is no library.
    library = {"MLX_MPI_LIBNAME": "libmpi.so.40"} if side == "mlx-lm" else {}
    return measured(args.ranks, __file__, *options, **library)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One turn of one side, run by every rank."""
    import mlx_lm
    from mlx_lm.utils import load_model, load_tokenizer

    import mlxtp

    stream_generate: Any
    if transport := SIDES[args.side]:
        comm = mlxtp.Communicator.world(transport)
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
    responses = list(
        stream_generate(model, tokenizer, prompt, max_tokens=args.max_tokens)
    )
    return {
        "prefill": responses[-1].prompt_tps,
        "decode": responses[-1].generation_tps,
        "peak_memory_gb": responses[-1].peak_memory,
        "tokens": [int(response.token) for response in responses],
    }


def report(args: argparse.Namespace, turns: list[Turn]) -> None:
    first, *others = args.sides
    print(
        f"{args.model}: {args.layers} layers, {args.ranks} ranks, prompt of "
        f"{args.prompt_tokens} tokens, {args.max_tokens} generated; medians of "
        f"{args.turns} turns (min-max), tokens a second"
    )
    heads = [f"{side:>25}" for side in args.sides]
    heads += [f"{f'{first} / {other}':>24}" for other in others]
    print(f"{'':8}" + "".join(heads))
    result: dict[str, Any] = {
        "model": args.model,
        "ranks": args.ranks,
        "layers": args.layers,
        "turns": args.turns,
    }
    for what in ("decode", "prefill"):
        cells = [f"{spread([t[side][what] for t in turns]):>25}" for side in args.sides]
        for other in others:
            ratios = [t[first][what] / t[other][what] for t in turns]
            cells.append(f"{spread(ratios):>24}")
            result[f"{what}, {first} / {other}"] = median(ratios)
        print(f"{what:8}" + "".join(cells))
    peaks = [max(t[side]["peak_memory_gb"] for t in turns) for side in args.sides]
    print(f"{'peak, GB':8}" + "".join(f"{peak:>25.2f}" for peak in peaks))
    result["same_tokens"] = compare(args, turns)
    print(json.dumps(result))


def compare(args: argparse.Namespace, turns: list[Turn]) -> bool:
    """Say whether every side has given the same tokens in every turn."""
    expected = turns[0][args.sides[0]]["tokens"]
    differing = {
        f"{side} from token {first_difference(turn[side]['tokens'], expected)} on"
        for turn in turns
        for side in args.sides
        if turn[side]["tokens"] != expected
    }
    others = "; ".join(sorted(differing))
    print(f"{'tokens':8}  " + (others or f"the same {len(expected)} on all sides"))
    return not differing


def first_difference(tokens: list[int], expected: list[int]) -> int:
    pairs = zip(tokens, expected, strict=False)
    differing = [place for place, (a, b) in enumerate(pairs) if a != b]
    return min([*differing, len(tokens), len(expected)])


def spread(values: list[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


if __name__ == "__main__":
    main()
