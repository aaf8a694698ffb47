"""Logits of a model that is too large for one machine: the likeliest next tokens.

    mpirun -hostfile HOSTFILE python docs/examples/logits.py --model MODEL --text TEXT

MODEL is a folder or a name on the hub.
"""

import argparse

import mlx.core as mx

import mlxtp
from mlxtp.stories import PATH

parser = argparse.ArgumentParser()
parser.add_argument("--model", default=PATH)
parser.add_argument("--text", default="One day a girl named")
args = parser.parse_args()

comm = mlxtp.Communicator.world()
model, tokenizer = mlxtp.load(args.model, comm)

tokens = mx.array([tokenizer.encode(args.text)])  # (1, L)
logits = model(tokens)  # (1, L, V), the same bytes on every rank
probabilities = mx.softmax(logits[0, -1])  # (V,)
likeliest = mx.argsort(-probabilities)[:5]

# Every rank computes all of it; rank 0 alone prints.
lines = [
    f"{probabilities[token].item():6.1%}  {tokenizer.decode([token])!r}"
    for token in likeliest.tolist()
]
if comm.rank == 0:
    print(*lines, sep="\n")
