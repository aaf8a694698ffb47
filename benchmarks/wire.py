"""What `--wire int8` loses and saves, on the model that ships.

The loss is that of the held-out stories of its training, in nats a token, with parts
as they are and with 8 bits on the wire; then greedy tokens are compared, up to the
first that differs: from there on the two write different texts.
"""

import argparse
import json
from itertools import takewhile
from random import Random
from statistics import mean, stdev
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step
from ranks import measured
from tokenizers import Tokenizer

import mlxtp
from mlxtp.stories import PATH as STORIES
from mlxtp.stories.train import LONG_LENGTH, batch, row
from mlxtp.wire import Int8Wire

WIRES = ["plain", "int8"]
MAX_TOKENS = 100
PROMPT_TOKENS = 8

# Losses of the batches, and the greedy tokens behind each prompt.
Side = dict[str, list[Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 5])
    parser.add_argument("--batches", type=int, default=8, help="of 12 rows each")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--wire", choices=WIRES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.wire:
        print(json.dumps(measure(args)), flush=True)
        return
    results = {}
    for ranks in args.ranks:
        sides = {wire: side(args, ranks, wire) for wire in WIRES}
        results[ranks] = report(args, ranks, sides)
    print(json.dumps(results))


def side(args: argparse.Namespace, ranks: int, wire: str) -> Side:
    options = ["--batches", args.batches, "--prompts", args.prompts]
    return measured(ranks, __file__, "--wire", wire, *options)


def measure(args: argparse.Namespace) -> Side:
    """One side, run by every rank."""
    comm = mlxtp.Communicator.world(wire=args.wire)
    model, _ = mlxtp.load(STORIES, comm)
    tokenizer = Tokenizer.from_file(str(STORIES / "tokenizer.json"))
    held_out = Random(3)  # as in training
    losses = []
    for _ in range(args.batches):
        inputs, targets = batch(held_out, tokenizer, LONG_LENGTH)
        logits = model(inputs).astype(mx.float32)
        losses.append(nn.losses.cross_entropy(logits, targets).mean().item())
    texts = []
    for _ in range(args.prompts):
        prompt = mx.array(row(held_out, tokenizer, PROMPT_TOKENS))
        steps = generate_step(prompt, model, max_tokens=MAX_TOKENS)
        texts.append([token for token, _ in steps])
    return {"losses": losses, "texts": texts}


def report(
    args: argparse.Namespace, ranks: int, sides: dict[str, Side]
) -> dict[str, Any]:
    plain, int8 = (sides[wire]["losses"] for wire in WIRES)
    lost = [b - a for a, b in zip(plain, int8, strict=True)]
    texts = zip(*(sides[wire]["texts"] for wire in WIRES), strict=True)
    agreeing = [
        len(list(takewhile(lambda pair: pair[0] == pair[1], zip(*pair, strict=True))))
        for pair in texts
    ]
    print(f"\n{ranks} ranks, {args.batches} batches; nats a token")
    print(f"{'plain':8}{mean(plain):10.5f}")
    print(f"{'int8':8}{mean(int8):10.5f}")
    error = stdev(lost) / len(lost) ** 0.5 if len(lost) > 1 else 0.0
    print(f"{'lost':8}{mean(lost):10.5f} +- {error:.5f} (standard error over batches)")
    print(f"greedy tokens alike, of {MAX_TOKENS}: {', '.join(map(str, agreeing))}")
    hidden = 192
    saved = Int8Wire().nbytes(hidden) / (2 * hidden)
    print(f"bytes of a part, int8 / bfloat16: {saved:.3f}", flush=True)
    return {
        "plain": mean(plain),
        "int8": mean(int8),
        "lost": mean(lost),
        "standard_error": error,
        "alike": agreeing,
        "bytes_ratio": saved,
    }


if __name__ == "__main__":
    main()
