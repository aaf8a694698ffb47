"""A mixture of experts on unlike machines, and what it costs to agree on the experts.

One rank stands for another machine: the weights of its norms are off by the last bit of
bfloat16, up or down. Sides are the ranks' own choices of experts, and rank 0's
(`agree_experts`). The mixture has random weights, in float32: on a CPU MLX multiplies
with no experts of 16 bits. All ranks run on this machine; sides take turns, each turn a
job of its own.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from decode import spread
from models import QWEN3_30B_A3B, make
from ranks import measured

SIDES = ("own", "agreed")
CONFIG: dict[str, Any] = {
    **QWEN3_30B_A3B,
    "hidden_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "moe_intermediate_size": 128,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "vocab_size": 1024,
}
PROMPT = [(7 + 31 * place * place) % 1024 for place in range(300)]
# So many tokens of it stand before those that are generated.
SHORT = 20
STEPS = 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="keep the checkpoint here")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--with-noise", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure(args)), flush=True)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = make(args.folder or Path(temporary) / "model", CONFIG, mx.float32)
        report(
            {
                ranks: [
                    {side: turn(folder, ranks, side, number == 0) for side in SIDES}
                    for number in range(args.turns)
                ]
                for ranks in args.ranks
            }
        )


def turn(folder: Path, ranks: int, side: str, with_noise: bool) -> dict[str, Any]:
    options = ["--side", side, "--folder", folder]
    options += ["--with-noise"] if with_noise else []
    return measured(ranks, __file__, *options)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One turn of one side, run by every rank."""
    from mlx_lm.generate import generate_step

    import mlxtp

    comm = mlxtp.Communicator.world()
    model, _ = mlxtp.load_model(args.folder, comm, agree_experts=args.side == "agreed")

    def tokens() -> list[int]:
        prompt = mx.array(PROMPT[:SHORT])
        return [token for token, _ in generate_step(prompt, model, max_tokens=STEPS)]

    tokens()
    begin = time.perf_counter()
    alike = tokens()
    ms = 1e3 * (time.perf_counter() - begin) / STEPS
    if not args.with_noise:
        return {"ms": ms}
    comm.traffic.reset()
    clean, _ = forward(model)
    collectives = comm.traffic.calls
    if comm.rank == 1:
        add_noise(model)
    noisy, chosen = forward(model)
    of_rank_0, of_rank_1, *_ = comm.allgather_object(chosen)
    unlike = comm.allgather_object(tokens())
    return {
        "ms": ms,
        "collectives": collectives,
        "differing": sum(a != b for a, b in zip(of_rank_0, of_rank_1, strict=True)),
        "choices": len(of_rank_0),
        "noise": float(np.abs(noisy - clean).max() / np.abs(clean).max()),
        "equal_tokens": equal(unlike[0], unlike[1]),
        "as_without_noise": equal(unlike[0], alike),
    }


def add_noise(model: nn.Module) -> None:
    """Change the weights of all norms, each by 2^-8 of it up or down."""
    mx.random.seed(1)
    for module in model.modules():
        if isinstance(module, nn.RMSNorm):
            signs = 2 * mx.random.randint(0, 2, module.weight.shape) - 1
            module.weight = module.weight * (1 + 2**-8 * signs)


def forward(model: nn.Module) -> tuple[np.ndarray, list[set[int]]]:
    """Read the prompt; return its logits, and the experts of each token and layer."""
    from mlx_lm.models.switch_layers import SwitchGLU

    former, chosen = SwitchGLU.__call__, []

    def call(self: nn.Module, x: mx.array, which: mx.array) -> mx.array:
        chosen.extend(set(experts) for experts in which.flatten(0, -2).tolist())
        return former(self, x, which)

    SwitchGLU.__call__ = call
    logits = np.array(model(mx.array([PROMPT])))
    SwitchGLU.__call__ = former
    return logits, chosen


def equal(tokens: list[int], others: list[int]) -> int:
    """How many tokens are equal before the first that differs."""
    pairs = zip(tokens, others, strict=True)
    return next((n for n, (one, other) in enumerate(pairs) if one != other), STEPS)


def report(worlds: dict[int, list[dict[str, dict[str, Any]]]]) -> None:
    result: dict[str, Any] = {}
    for ranks, turns in worlds.items():
        print(f"{ranks} ranks, medians of {len(turns)} turns (min-max)")
        print(f"{'':44} {'own choice':>22} {'rank 0s choice':>22}")
        for what, text in (
            ("collectives", "collectives of a forward pass"),
            ("differing", "choices that differ on rank 1"),
            ("choices", "  of"),
            ("noise", "logits off by, as a part of the largest"),
            ("equal_tokens", f"of {STEPS} tokens equal on both ranks"),
            ("as_without_noise", f"of {STEPS} tokens equal to those without noise"),
        ):
            cells = [f"{turns[0][side][what]:.4g}" for side in SIDES]
            print(f"{text:44} {cells[0]:>22} {cells[1]:>22}")
        times = {side: [turn[side]["ms"] for turn in turns] for side in SIDES}
        cells = [spread(times[side], 2) for side in SIDES]
        ratios = [turn["agreed"]["ms"] / turn["own"]["ms"] for turn in turns]
        print(f"{'ms a token':44} {cells[0]:>22} {cells[1]:>22}")
        print(f"ratio, turn by turn: {spread(ratios, 2)}")
        result[f"{ranks} ranks"] = {
            **{side: turns[0][side] for side in SIDES},
            "time_ratio": median(ratios),
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
