"""Prefill in two halves that take turns, beside prefill of the whole.

Llama with random weights, in float32. All ways read the same prompt by turns, in one
job. The caches of the halves have to be those of two calls, one after the other, to the
bit.

  python benchmarks/prefill.py --turns 20             # ranks of this machine
  launch/lab up --hosts 2 --delay-ms 5                # as it is: a core for each host
  launch/lab run python benchmarks/prefill.py --hostfile HOSTFILE --ranks 2 \\
      --model shipped --prompt-tokens 65
  launch/lab up --delay-ms 5 --rate-gbps 0.5          # modelled: see below
  launch/lab run python benchmarks/prefill.py --hostfile hostfiles/studio5 \\
      --ranks 5 --modelled --layers 16 --prompt-tokens 2049 --turns 3

Five hosts that share two cores cannot show what five machines would: what each hides
is computed by the others. With `--modelled` every product of the layers, those of
attention too, is replaced by a node of the graph that waits for its modelled length.
Norms, rotations and activations are passed over; embeddings, residuals and caches are
computed, and all messages are sent as they are. The length is that with which computing
takes as long as the collectives, which are timed first. The part of them that is hidden
is (whole - halves) / (whole - computing alone). Links of 0.5 Gb/s need little of the
two cores; of 10 Gb/s the cores deliver a half, and nothing is left for anything else.
"""

import argparse
import dataclasses
import importlib.util
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from decode import SMALL
from models import make
from ranks import HOSTFILE, measured, print_on_rank_0

from mlxtp.stories import PATH as STORIES

WAITING = Path(__file__).parent / "waiting"

# Ways to read a prompt: in one call, in halves, as it is decided, and without
# collectives.
WAYS = ("whole", "halves", "decided", "computing")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--hostfile", type=Path, default=HOSTFILE)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument(
        "--model",
        choices=["small", "shipped"],
        default="small",
        help="whose shapes: the small one of decode.py, or the model that ships",
    )
    parser.add_argument(
        "--prompt-tokens",
        type=int,
        default=513,
        help="read in one part; the last is not read: it begins decoding",
    )
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--modelled", action="store_true")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.folder:
        print_on_rank_0(measure(args))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        config = SMALL
        if args.model == "shipped":
            config = json.loads((STORIES / "config.json").read_text())
        make(folder, {**config, "num_hidden_layers": args.layers}, mx.float32)
        options = ["--folder", folder, "--prompt-tokens", args.prompt_tokens]
        options += ["--turns", args.turns, *["--modelled"] * args.modelled]
        result = measured(args.ranks, __file__, *options, hostfile=args.hostfile)
    report(args, result)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All turns, run by every rank."""
    from mlx_lm.models.cache import make_prompt_cache

    import mlxtp
    from mlxtp.generation.halves import Halves, read_in_halves
    from mlxtp.layers.sums import outputs_unread
    from mlxtp.loading import load_model

    comm = mlxtp.Communicator.world()
    model, _ = load_model(args.folder, comm)
    length = args.prompt_tokens - 1
    tokens = mx.array([[7 + 3 * i % 1000 for i in range(length)]])

    def seconds(read: Callable[..., Any]) -> tuple[float, list[mx.array]]:
        caches = make_prompt_cache(model)
        comm.barrier()
        begin = time.perf_counter()
        with outputs_unread():
            read(tokens, cache=caches)
        mx.eval([cache.state for cache in caches])
        taken = max(comm.allgather_object(time.perf_counter() - begin))
        return taken, [array for cache in caches for array in cache.state]

    def without_collectives(tokens: mx.array, **options: Any) -> None:
        with comm.dry_run():
            model(tokens, **options)
            mx.eval([cache.state for cache in options["cache"]])

    def one_after_the_other(tokens: mx.array, **options: Any) -> None:
        half = (length + 1) // 2
        model(tokens[:, :half], **options)
        mx.eval([cache.state for cache in options["cache"]])
        model(tokens[:, half:], **options)

    halves = Halves(model)
    ways = {
        "whole": model,
        "halves": lambda *args, **options: read_in_halves(
            model, model, *args, **options
        ),
        "decided": lambda *args, **options: halves(model, *args, **options),
        "computing": without_collectives,
    }
    costs = halves.costs()
    modelled = wait_for_products(model, seconds, ways) if args.modelled else None
    for read in ways.values():
        seconds(read)
    turns = []
    for turn in range(args.turns):
        order = WAYS if turn % 2 else WAYS[::-1]
        turns.append({way: seconds(ways[way])[0] for way in order})
    parts = zip(
        seconds(ways["halves"])[1], seconds(one_after_the_other)[1], strict=True
    )
    return {
        "turns": turns,
        "same_bits": all(mx.array_equal(a, b).item() for a, b in parts),
        "pays": costs is not None and costs.pay(length),
        "costs": repr(costs),
        "gflops": modelled,
        "hosts": len(set(comm.allgather_object(comm.host))),
    }


def wait_for_products(
    model: nn.Module, seconds: Callable[..., Any], ways: dict[str, Any]
) -> float:
    """Let products wait so that they take as long as the collectives.

    Returns 1e9 operations a second of the modelled rank that has most to compute.
    """
    from mlx_lm.models import llama

    wait = waiting().wait
    speed = [float("inf")]  # operations a second
    asked: list[float] = []  # operations of a pass

    def length(flops: float) -> float:
        asked.append(flops)
        return flops / speed[0]

    class Product(nn.Module):
        def __init__(self, linear: nn.Module) -> None:
            super().__init__()
            self.linear = linear

        def __call__(self, x: mx.array) -> mx.array:
            out, width = self.linear.weight.shape
            flops = 2 * x.size / width * out * width
            return wait([x], [*x.shape[:-1], out], length(flops))

    def attention(
        queries: mx.array, keys: mx.array, values: mx.array, *_: Any, **__: Any
    ) -> mx.array:
        # Of a causal mask half is computed.
        before = keys.shape[2] - queries.shape[2] / 2
        flops = 4 * queries.size * before
        return wait([queries, keys, values], list(queries.shape), length(flops))

    def passed(x: mx.array, *_: Any, **__: Any) -> mx.array:
        return wait([x], list(x.shape), 0.0)

    llama.scaled_dot_product_attention = attention
    llama.swiglu = lambda gate, x: wait([x, gate], list(x.shape), 0.0)
    for layer in model.layers:
        replace(layer, {nn.Linear: Product, nn.RMSNorm: lambda _: passed})
        layer.self_attn.rope = passed
    asked.clear()
    seconds(ways["computing"])
    flops = max(model.comm.allgather_object(sum(asked)))
    waits = 0.0  # seconds of a pass
    for _ in range(3):
        whole, computing = (seconds(ways[way])[0] for way in ("whole", "computing"))
        waits = max(waits + whole - 2 * computing, 1e-3)
        speed[0] = flops / waits
    return speed[0] / 1e9


def replace(module: nn.Module, stand_ins: dict[type, Callable[[Any], Any]]) -> None:
    """Replace the layers of some types within a module."""
    for name, child in list(module.items()):
        if type(child) in stand_ins:
            setattr(module, name, stand_ins[type(child)](child))
        elif isinstance(child, nn.Module):
            replace(child, stand_ins)


def waiting() -> Any:
    """The module of waits, compiled as mlxtp compiles its collectives."""
    from mlxtp.native import build

    extension = dataclasses.replace(build.collectives(), sources=WAITING)
    path = build.build(extension, build.cache_folder(), print)
    spec = importlib.util.spec_from_file_location(extension.name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def report(args: argparse.Namespace, result: dict[str, Any]) -> None:
    turns = result["turns"]
    products = "waits of a modelled length" if args.modelled else "computed"
    print(
        f"{args.ranks} ranks on {result['hosts']} hosts, {args.layers} layers, "
        f"{args.prompt_tokens - 1} tokens; products are {products}; medians of "
        f"{len(turns)} turns (min-max)"
    )
    if args.modelled:
        print(f"modelled: {result['gflops']:.1f} GFLOPS on the rank with most products")
    for way in WAYS:
        print(f"{way:10} {spread([1000 * turn[way] for turn in turns])} ms")
    ratios = {
        way: [turn["whole"] / turn[way] for turn in turns]
        for way in ("halves", "decided")
    }
    hidden = [
        (turn["whole"] - turn["halves"]) / (turn["whole"] - turn["computing"])
        for turn in turns
    ]
    for way, values in ratios.items():
        print(f"{way} are {spread(values)} x as fast as the whole")
    decided = "halves" if result["pays"] else "the whole"
    print(f"decided: {decided}, from {result['costs']}")
    print(f"hidden: {spread([100 * part for part in hidden])} % of the collectives")
    print(f"caches of halves: {'the same bits' if result['same_bits'] else 'OTHER'}")
    print(
        json.dumps(
            {
                "ranks": args.ranks,
                "hosts": result["hosts"],
                "modelled": args.modelled,
                "pays": result["pays"],
                "same_bits": result["same_bits"],
                "whole / halves": median(ratios["halves"]),
                "whole / decided": median(ratios["decided"]),
                "hidden": median(hidden),
            }
        )
    )


def spread(values: list[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


if __name__ == "__main__":
    main()
