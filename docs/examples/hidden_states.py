"""The hidden state behind each layer: how large it grows.

    mpirun -hostfile HOSTFILE python docs/examples/hidden_states.py --model MODEL

The layers are called one by one, as mlx-lm's Llama calls them: for models like it.
"""

import argparse

import mlx.core as mx

import mlxtp
from mlxtp.stories import PATH

parser = argparse.ArgumentParser()
parser.add_argument("--model", default=PATH)
parser.add_argument("--text", default="One day a girl named Mia went to the park.")
args = parser.parse_args()

comm = mlxtp.Communicator.world()
model, tokenizer = mlxtp.load(args.model, comm)

tokens = mx.array([tokenizer.encode(args.text)])  # (1, L)
states = [model.model.embed_tokens(tokens)]  # each (1, L, D), replicated
for layer in model.layers:
    # Its heads and columns are this rank's; what comes out is summed over ranks.
    states.append(layer(states[-1], mask="causal"))

norms = [mx.linalg.norm(state[0, -1]).item() for state in states]
if comm.rank == 0:
    print(f"norm of the last token's state, embedded: {norms[0]:.2f}")
    for number, norm in enumerate(norms[1:]):
        print(f"behind layer {number}: {norm:.2f}")
