"""Train the tiny models that ship with the package: `python -m mlxtp.stories.train`.

Everything is seeded. The shipped model saw 4.3 million tokens in 2600 steps: held-out
loss 0.470 nats per token, in 22 minutes 44 seconds on two shared CPU cores. OpenBLAS
stood in for the reference BLAS of MLX's Linux wheel, which is several times slower.
After 1000 steps the loss is 0.649, and the text loses more often who is who.

Its draft (`--draft --steps 1500`) saw 2.4 million tokens: held-out loss 0.681, in ten
minutes of processor time.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.llama import Model, ModelArgs
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mlxtp.stories import PATH
from mlxtp.stories.grammar import story

END = "<|end|>"
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "head_dim": 12,
    "hidden_act": "silu",
    "hidden_size": 192,
    "intermediate_size": 512,
    "max_position_embeddings": 512,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 16,
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "vocab_size": 1024,
}
# The model that drafts for it, of at most 1 MB: two layers are the fewest that copy a
# name from earlier in the text.
DRAFT_CONFIG: dict[str, Any] = {
    **CONFIG,
    "head_dim": 16,
    "hidden_size": 128,
    "intermediate_size": 336,
    "num_attention_heads": 8,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
}
BATCH = 12
LENGTH, LONG_LENGTH = 128, 224


def train_tokenizer(rng: Random) -> Tokenizer:
    """Learn byte-level BPE: any text can be written, common words are one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((story(rng) for _ in range(8000)), trainer)
    return tokenizer


def row(rng: Random, tokenizer: Tokenizer, length: int) -> list[int]:
    """Pack stories into a row; half of the rows begin in the middle of a story."""
    tokens: list[int] = [*tokenizer.encode(story(rng)).ids, 0]
    if rng.random() < 0.5:
        tokens = tokens[rng.randrange(len(tokens) // 2) :]
    while len(tokens) < length:
        tokens += [*tokenizer.encode(story(rng)).ids, 0]
    return tokens[:length]


def batch(rng: Random, tokenizer: Tokenizer, length: int) -> tuple[mx.array, mx.array]:
    """Return inputs and targets, both (B, L)."""
    rows = mx.array([row(rng, tokenizer, length + 1) for _ in range(BATCH)])
    return rows[:, :-1], rows[:, 1:]


def train(
    model: Model, tokenizer: Tokenizer, rng: Random, num_steps: int
) -> Callable[[mx.array, mx.array], mx.array]:
    """Train the model in place and return its loss function, in nats per token."""
    warmup = min(50, num_steps // 10 + 1)
    schedule = optim.join_schedules(
        [
            optim.linear_schedule(0.0, 4e-3, warmup),
            optim.cosine_decay(4e-3, num_steps - warmup, 4e-5),
        ],
        [warmup],
    )
    optimizer = optim.AdamW(schedule, betas=[0.9, 0.98], weight_decay=0.05)

    streams = [mx.new_stream(mx.default_device()) for _ in range(2)]

    def loss(inputs: mx.array, targets: mx.array) -> mx.array:
        return nn.losses.cross_entropy(model(inputs), targets, reduction="mean")

    state = [model.state, optimizer.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step(inputs: mx.array, targets: mx.array) -> mx.array:
        # Half of the batch on each stream, which on a CPU is a core for each.
        halves = []
        for stream, x, y in zip(
            streams, mx.split(inputs, 2), mx.split(targets, 2), strict=True
        ):
            with mx.stream(stream):
                halves.append(nn.value_and_grad(model, loss)(x, y))
        (value, grads), (other_value, other_grads) = halves
        grads = tree_map(lambda g, other: (g + other) / 2, grads, other_grads)
        grads, _ = optim.clip_grad_norm(grads, 1.0)  # type: ignore[no-untyped-call]
        optimizer.update(model, grads)
        return (value + other_value) / 2

    start = time.perf_counter()
    for i in range(num_steps):
        # Attention over short rows is cheap; the last steps teach the far positions.
        length = LENGTH if i < 0.9 * num_steps else LONG_LENGTH
        value = step(*batch(rng, tokenizer, length))
        mx.eval(state, value)
        if i % 20 == 0 or i == num_steps - 1:
            seconds = time.perf_counter() - start
            print(f"step {i:5d}  loss {value.item():.3f}  {seconds:5.0f} s", flush=True)
    return loss


def save(
    model: Model, config: dict[str, Any], tokenizer: Tokenizer, output: Path
) -> None:
    """Write the folder that mlx-lm and transformers read, weights in bfloat16."""
    output.mkdir(parents=True, exist_ok=True)
    model.set_dtype(mx.bfloat16)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(
        str(output / "model.safetensors"), weights, metadata={"format": "pt"}
    )
    tokenizer.save(str(output / "tokenizer.json"), pretty=False)
    tokenizer_config = {
        "clean_up_tokenization_spaces": False,
        "eos_token": END,
        "model_max_length": CONFIG["max_position_embeddings"],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    generation_config = {"bos_token_id": 0, "eos_token_id": 0}
    for name, content in (
        ("config.json", config),
        ("tokenizer_config.json", tokenizer_config),
        ("generation_config.json", generation_config),
    ):
        (output / name).write_text(json.dumps(content, indent=2) + "\n")


def main() -> None:
    """Train the tokenizer and the model, report the held-out loss, and save both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--draft", action="store_true", help="train the draft model")
    options = parser.parse_args()
    config = DRAFT_CONFIG if options.draft else CONFIG

    mx.random.seed(0)
    if options.draft:  # it has to have the model's tokens
        tokenizer = Tokenizer.from_file(str(PATH / "tokenizer.json"))
    else:
        tokenizer = train_tokenizer(Random(1))
    model = Model(ModelArgs.from_dict(config))
    loss = train(model, tokenizer, Random(2), options.steps)
    held_out = Random(3)
    losses = [loss(*batch(held_out, tokenizer, LONG_LENGTH)).item() for _ in range(8)]
    print(f"held-out loss {sum(losses) / len(losses):.3f} nats per token")
    save(model, config, tokenizer, options.output)


if __name__ == "__main__":
    main()
