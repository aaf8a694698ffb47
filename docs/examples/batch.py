"""Greedy tokens for several prompts at once.

    mpirun -hostfile HOSTFILE python docs/examples/batch.py --model MODEL PROMPT ...

Prompts may differ in length.
"""

import argparse

import mlxtp
from mlxtp.stories import PATH

PROMPTS = ["One day a girl named Mia", "The dog", "Tom and his cat went to the park"]

parser = argparse.ArgumentParser()
parser.add_argument("prompts", nargs="*", default=PROMPTS, metavar="PROMPT")
parser.add_argument("--model", default=PATH)
parser.add_argument("--max-tokens", type=int, default=20)
args = parser.parse_args()

comm = mlxtp.Communicator.world()
model, tokenizer = mlxtp.load(args.model, comm)

response = mlxtp.batch_generate(
    model,
    tokenizer,
    [tokenizer.encode(prompt) for prompt in args.prompts],
    max_tokens=args.max_tokens,
    return_token_ids=True,
)
if comm.rank == 0:
    for prompt, text in zip(args.prompts, response.texts, strict=True):
        print(f"{prompt}|{text}\n")
