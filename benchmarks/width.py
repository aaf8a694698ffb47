"""Large models at their real width on the ranks of this machine (Linux).

Of each a layer of every kind is kept, with random 4-bit weights. It shows the bytes
that the ranks hold, of the whole model and of the layers alone, against an even share
of them; the peak of a rank's anonymous memory while it loads and runs; the collectives
and bytes of a token, counted, against what the slice table says; and how far the
logits, computed in 32 bits, are from those of one rank.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from proc import PeakMemory
from ranks import measured
from wide_models import WIDE, make_quantized

import mlxtp
from mlxtp.loading import load_model
from mlxtp.model.skeleton import build

PROMPT = [[1, 20, 300, 4000]]
ITEM_BYTES = 2  # of bfloat16, in which activations travel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=5)
    parser.add_argument("--only", nargs="*", choices=WIDE, default=list(WIDE))
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--logits", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.folder:
        measure(args.folder, args.logits)
        return
    results = {}
    for name in args.only:
        with tempfile.TemporaryDirectory() as temporary:
            folder = make_quantized(Path(temporary) / "model", *WIDE[name])
            results[name] = on_ranks(folder, args.ranks)
            report(name, results[name])
    print(json.dumps(results))


def on_ranks(folder: Path, ranks: int) -> dict[str, Any]:
    """Run the model on `ranks` ranks and on one, and compare their logits."""
    files = [folder / "one.npy", folder / "all.npy"]
    one, result = (
        measured(number, __file__, "--folder", folder, "--logits", file)
        for number, file in zip((1, ranks), files, strict=True)
    )
    wanted, got = (np.load(file) for file in files)
    result["whole"] = one["ranks"][0]
    result["error"] = float(np.sqrt(((got - wanted) ** 2).mean() / wanted.var()))
    result["same_tokens"] = float((got.argmax(-1) == wanted.argmax(-1)).mean())
    return result


def report(name: str, result: dict[str, Any]) -> None:
    ranks, whole = result["ranks"], result["whole"]
    count = len(ranks)
    print(f"{name}: {whole['held_mb']:.0f} MB, {whole['layers_mb']:.0f} in layers")
    for key in ("held_mb", "layers_mb"):
        held = [rank[key] for rank in ranks]
        print(
            f"  {key:10} {min(held):8.1f} to {max(held):8.1f} MB a rank, "
            f"{max(held) * count / whole[key]:.3f} x an even share"
        )
    for key in ("table_mb", "peak_mb"):
        figures = [rank[key] for rank in ranks]
        print(f"  {key:10} {min(figures):8.1f} to {max(figures):8.1f} MB a rank")
    print(
        f"  a token: {ranks[0]['calls']} collectives (table: {result['calls']}), "
        f"{sum(rank['sent'] for rank in ranks)} bytes of parts of all ranks "
        f"(table: {result['bytes']})"
    )
    print(
        f"  logits: {result['error']:.1e} of their standard deviation from one "
        f"rank's; {100 * result['same_tokens']:.0f} % of the likeliest tokens alike",
        flush=True,
    )


def measure(folder: Path, logits_file: Path) -> None:
    """Load and run on this rank; rank 0 prints what it took on all."""
    comm = mlxtp.Communicator.world()
    with PeakMemory() as memory:
        model, _ = load_model(folder, comm)
        cache = make_prompt_cache(model)
        mx.eval(model(mx.array(PROMPT), cache=cache))
        comm.traffic.reset()
        mx.eval(model(mx.array([[5]]), cache=cache))
    calls, sent = comm.traffic.calls, comm.traffic.bytes
    table = model.slice_table
    slices = table.slices(comm.rank)
    empty = build(folder)
    parameters = tree_flatten(model.parameters())
    figures = {
        "held_mb": sum(array.nbytes for _, array in parameters) / 1e6,
        "layers_mb": sum(a.nbytes for name, a in parameters if ".layers." in name)
        / 1e6,
        "table_mb": empty.bytes_of(slices) / 1e6,
        "peak_mb": memory.above_bytes / 1e6,
        "calls": calls,
        "sent": sent,
    }
    # Roundings of 16 bits would send tokens to other experts where routers nearly tie.
    model.set_dtype(mx.float32)
    logits = model(mx.array(PROMPT))
    mx.eval(logits)
    ranks = comm.allgather_object(figures)
    if comm.rank == 0:
        np.save(logits_file, np.array(logits.astype(mx.float32)))
        made = table.collectives() if comm.size > 1 else []
        parts = {"allreduce": comm.size, "allgather": 1}  # of all ranks, in wholes
        sent = sum(parts[one.kind] * one.elements for one in made) * ITEM_BYTES
        print(json.dumps({"ranks": ranks, "calls": len(made), "bytes": sent}))


if __name__ == "__main__":
    main()
