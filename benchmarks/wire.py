"""What `--wire int8`, an experiment, loses and saves on the model that ships.

The loss is that of the held-out stories of its training, in nats a token, with parts
as they are and with 8 bits on the wire. Greedy texts are compared up to the first
token that differs, from where on they are different texts; and beside them those of
one rank, for a sum over ranks rounds bfloat16 otherwise than one matrix product.
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
from mlxtp.comm.codec import Int8Codec
from mlxtp.stories import PATH as STORIES
from mlxtp.stories.train import CONFIG, LONG_LENGTH, batch, row

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
    alone = side(args, 1, "plain")
    results = {}
    for ranks in args.ranks:
        sides = {wire: side(args, ranks, wire) for wire in WIRES}
        results[ranks] = report(args, ranks, alone, sides)
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
    args: argparse.Namespace, ranks: int, alone: Side, sides: dict[str, Side]
) -> dict[str, Any]:
    plain, int8 = (sides[wire] for wire in WIRES)
    lost = [b - a for a, b in zip(plain["losses"], int8["losses"], strict=True)]
    error = stdev(lost) / len(lost) ** 0.5 if len(lost) > 1 else 0.0
    print(f"\n{ranks} ranks, {args.batches} batches of held-out stories, nats a token")
    for name, losses in {
        "one rank": alone["losses"],
        "plain": plain["losses"],
        "int8": int8["losses"],
    }.items():
        print(f"{name:12}{mean(losses):9.5f}")
    print(f"{'lost':12}{mean(lost):9.5f} (standard error over batches {error:.5f})")
    alike = {
        "plain, int8": agreeing(plain, int8),
        "one rank, plain": agreeing(alone, plain),
        "one rank, int8": agreeing(alone, int8),
    }
    print(f"greedy tokens before the first that differs, of {MAX_TOKENS}:")
    for names, counts in alike.items():
        print(f"{names:16}{''.join(f'{count:5}' for count in counts)}")
    hidden = CONFIG["hidden_size"]
    saved = Int8Codec().nbytes(hidden) / (2 * hidden)
    print(f"bytes of a part, int8 / bfloat16: {saved:.3f}", flush=True)
    return {
        "one rank": mean(alone["losses"]),
        "plain": mean(plain["losses"]),
        "int8": mean(int8["losses"]),
        "lost": mean(lost),
        "standard error": error,
        "alike": alike,
        "bytes, int8 / bfloat16": saved,
    }


def agreeing(a: Side, b: Side) -> list[int]:
    """Of each text, the tokens before the first that differs."""
    counts = []
    for texts in zip(a["texts"], b["texts"], strict=True):
        pairs = zip(*texts, strict=True)
        counts.append(sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs)))
    return counts


if __name__ == "__main__":
    main()
