"""Perplexity of a model over a file of text.

    mpirun -hostfile HOSTFILE python docs/examples/perplexity.py FILE --model MODEL

FILE lies on rank 0's host. It is cut into windows of --length tokens, each of which
the model reads without those before it.
"""

import argparse
import math
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

import mlxtp
from mlxtp.stories import PATH

parser = argparse.ArgumentParser()
parser.add_argument("file", type=Path)
parser.add_argument("--model", default=PATH)
parser.add_argument("--length", type=int, default=512)
args = parser.parse_args()

comm = mlxtp.Communicator.world()
model, tokenizer = mlxtp.load(args.model, comm)

text = comm.bcast_object(args.file.read_text("utf-8") if comm.rank == 0 else None)
tokens = tokenizer.encode(text)
loss, count = 0.0, 0
for start in range(0, len(tokens) - 1, args.length):
    window = mx.array([tokens[start : start + args.length + 1]])  # (1, length + 1)
    logits = model(window[:, :-1]).astype(mx.float32)  # (1, length, V)
    loss += nn.losses.cross_entropy(logits, window[:, 1:], reduction="sum").item()
    count += window.shape[1] - 1
perplexity = math.exp(loss / count)

if comm.rank == 0:
    print(f"perplexity {perplexity:.4f} over {count} tokens")
