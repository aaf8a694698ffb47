"""What a rank holds and reads while it loads, against the least it could.

Makes a checkpoint with random weights and the shapes of Llama 3.2 1B, loads it on
the ranks of this machine (Linux) and shows for each: the bytes of its slices, the
peak of its anonymous memory above what the imports take (RssAnon of /proc, looked
at every 2 ms), and what it read (rchar of /proc). Columns lie apart in the file:
their floor is the pages they lie in.

Then, in turns, the time in which all ranks together load it from the page cache, and
that of mlx-lm's loading in one process; imports and tokenizers count for neither.

With --alone one rank loads its slices while no other computes, of a world of one and
of one of five, in turns with mlx-lm: bytes a second that are read, bytes of slices that
come of it (between columns lies what is read for nothing), and bytes of slices by the
time of all from the config to the arrays.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm import utils as mlx_lm_utils
from models import LLAMA_3_2_1B, QWEN3_30B_A3B, make, take_experts_apart
from proc import PeakMemory, read_bytes
from ranks import measured

import mlxtp
from mlxtp.checkpoint.runs import PAGE_BYTES
from mlxtp.checkpoint.tensors import StoredTensor, Tensor
from mlxtp.layers import parallelize as parallelize  # not timed: load imports it
from mlxtp.loading import load_model
from mlxtp.model import sources
from mlxtp.model.reading import read_slices
from mlxtp.model.skeleton import EmptyModel, build
from mlxtp.model.sources import Computed
from mlxtp.native import loader
from mlxtp.partition.shares import Shares
from mlxtp.partition.spans import Slice
from mlxtp.sharding.decide import slice_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=5)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, help="default: the model's")
    parser.add_argument("--bits", type=int, help="quantize; default: bfloat16")
    parser.add_argument(
        "--experts",
        action="store_true",
        help="the shapes of Qwen3 30B-A3B, a tensor for each expert, 2 layers",
    )
    parser.add_argument(
        "--computed",
        action="store_true",
        help="follow no weight transform: with --experts the ranks compute "
        "each stack of experts in turn, one rank for all",
    )
    parser.add_argument(
        "--alone", action="store_true", help="time one rank alone, and no memory"
    )
    parser.add_argument(
        "--cut", action="store_true", help="with --alone: of a cut checkpoint"
    )
    parser.add_argument(
        "--plain", action="store_true", help="with --alone: without what is compiled"
    )
    parser.add_argument("--rank", type=int, default=0, help="with --alone")
    parser.add_argument("--turns", type=int, default=5, help="of the timing")
    parser.add_argument("--folder", type=Path, help="keep the checkpoint here")
    sides = {"memory": measure, "mlxtp": time_mlxtp, "mlx-lm": time_mlx_lm}
    parser.add_argument("--side", choices=[*sides, "alone"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.computed:
        sources.PRIMITIVES = {}
    if args.plain:
        loader.reading = lambda: None
    if args.side == "alone":
        time_alone(args.folder, args.ranks, args.rank)
        return
    if args.side:
        sides[args.side](args.folder)
        return
    with tempfile.TemporaryDirectory() as temporary:
        args.folder = args.folder or Path(temporary) / "model"
        config = {**LLAMA_3_2_1B, "num_hidden_layers": args.layers}
        if args.experts:
            config = {**QWEN3_30B_A3B, "num_hidden_layers": 2}
        if args.vocabulary:
            config["vocab_size"] = args.vocabulary
        make(args.folder, config, mx.bfloat16, args.bits)
        if args.experts:
            take_experts_apart(args.folder)
        if args.alone:
            report_alone(args)
            return

        def side(name: str, ranks: int) -> dict[str, Any]:
            more = ["--computed"] if args.computed else []
            options = ["--side", name, "--folder", args.folder, *more]
            return measured(ranks, __file__, *options)

        result = side("memory", args.ranks)
        turns = [
            (side("mlxtp", args.ranks)["seconds"], side("mlx-lm", 1)["seconds"])
            for _ in range(args.turns)
        ]
        report(args, {**result, "turns": turns})


def report(args: argparse.Namespace, result: dict[str, Any]) -> None:
    ranks = result["ranks"]
    whole = sum(file.stat().st_size for file in args.folder.glob("*.safetensors")) / 1e6
    print(f"a checkpoint of {whole:.0f} MB on {len(ranks)} ranks; all in MB")
    print(
        f"{'rank':>4} {'slices':>8} {'peak memory':>12} {'allowed':>8} {'read':>8} "
        f"{'least to read':>14} {'read/least':>11}"
    )
    for number, rank in enumerate(ranks):
        allowed = 1.2 * rank["slices_mb"] + 64 + rank["computed_mb"]
        print(
            f"{number:4} {rank['slices_mb']:8.1f} {rank['peak_mb']:12.1f} "
            f"{allowed:8.1f} {rank['read_mb']:8.1f} {rank['floor_mb']:14.1f} "
            f"{rank['read_mb'] / rank['floor_mb']:11.3f}"
        )
    for name, figures in (
        ("mlxtp, seconds", [ours for ours, _ in result["turns"]]),
        ("mlx-lm in one process", [theirs for _, theirs in result["turns"]]),
        ("mlx-lm / mlxtp", [theirs / ours for ours, theirs in result["turns"]]),
    ):
        if figures:
            middle = statistics.median(figures)
            print(f"{name:22} {middle:.2f} ({min(figures):.2f} to {max(figures):.2f})")
    print(json.dumps(result))


def report_alone(args: argparse.Namespace) -> None:
    """Time one rank alone and mlx-lm, in turns; print it."""
    size = sum(file.stat().st_size for file in args.folder.glob("*.safetensors"))
    print(f"a checkpoint of {size / 1e6:.0f} MB; GB/s")
    sides: dict[str, list[object]] = {"mlx-lm": ["--side", "mlx-lm"]}
    for world in (1, args.ranks):
        folder = cut_for(args.folder, world) if args.cut else args.folder
        rank = args.rank if world > 1 else 0
        sides[f"one of {world}"] = [
            *("--side", "alone", "--folder", folder, "--ranks", world),
            *("--rank", rank, *(["--plain"] if args.plain else [])),
        ]
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for turn in range(args.turns + 1):
        for name, options in sides.items():
            command = [__file__, "--folder", args.folder, *options]
            done = subprocess.run(
                [sys.executable, *map(str, command)],
                capture_output=True,
                text=True,
                check=True,
            )
            if turn:  # the first one fills the page cache
                turns[name].append(json.loads(done.stdout.splitlines()[-1]))

    def speeds(name: str, what: str, within: str) -> list[float]:
        return [turn[what] / turn[within] / 1e9 for turn in turns[name]]

    def shown(figures: list[float]) -> str:
        middle = statistics.median(figures)
        return f"{middle:.2f} ({min(figures):.2f} to {max(figures):.2f})"

    for name in sides:
        first = turns[name][0]
        sizes = f"{first['slices'] / 1e6:.0f} MB of slices, {first['read'] / 1e6:.0f}"
        print(f"{name}: {sizes} MB read")
        for label, what, within in (
            ("bytes read", "read", "reading"),
            ("slices", "slices", "reading"),
            ("slices, by all of the time", "slices", "all"),
        ):
            ours, theirs = speeds(name, what, within), speeds("mlx-lm", what, within)
            ratios = [one / other for one, other in zip(ours, theirs, strict=True)]
            print(f"  {label:27} {shown(ours):22} mlx-lm's x {shown(ratios)}")
    print(json.dumps({"mb": size / 1e6, "turns": turns}))


def cut_for(folder: Path, world: int) -> Path:
    """Cut the checkpoint for so many ranks, beside it, unless that is done."""
    cut = folder.with_name(f"{folder.name}-cut-{world}")
    if not cut.exists():
        command = [sys.executable, "-m", "mlxtp.shard", "--model", folder]
        command += ["--ranks", str(world), "--output", cut]
        subprocess.run(list(map(str, command)), capture_output=True, check=True)
    return cut


def time_alone(folder: Path, world: int, rank: int) -> None:
    """How long one rank of `world` takes, the only one that there is."""
    loader.reading()  # an import
    begin = time.perf_counter()
    empty = build(folder)
    slices = slice_table(empty.model, Shares([1] * world)).slices(rank)
    empty.settle(slices)
    built, before = time.perf_counter(), read_bytes()
    read_slices(empty, empty.checkpoint, slices)
    end, read = time.perf_counter(), read_bytes() - before
    figures = {"reading": end - built, "all": end - begin}
    figures |= {"slices": empty.bytes_of(slices), "read": read}
    print(json.dumps(figures), flush=True)


def measure(folder: Path) -> None:
    """Load on this rank and tell what it took; rank 0 prints it for all."""
    comm = mlxtp.Communicator.world()
    empty = build(folder)
    slices = slice_table(empty.model, [1] * comm.size).slices(comm.rank)
    slice_bytes = empty.bytes_of(slices)
    floor = floor_bytes(empty, slices)
    computed = max(
        (
            math.prod(source.shape) * source.dtype.size
            for source in empty.sources.values()
            if isinstance(source, Computed)
        ),
        default=0,
    )
    del empty
    with PeakMemory() as memory:
        model, _ = mlxtp.load(folder, comm)
    figures = {
        "slices_mb": slice_bytes / 1e6,
        "peak_mb": memory.above_bytes / 1e6,
        "read_mb": memory.read_bytes / 1e6,
        "floor_mb": floor / 1e6,
        # The largest parameter that is computed whole, and the tensors behind it.
        "computed_mb": 2 * computed / 1e6,
    }
    ranks = comm.allgather_object(figures)
    assert model is not None
    if comm.rank == 0:
        print(json.dumps({"ranks": ranks}), flush=True)


def time_mlxtp(folder: Path) -> None:
    """How long all ranks take to load."""
    comm = mlxtp.Communicator.world()
    comm.barrier()
    begin = time.perf_counter()
    model, _ = load_model(folder, comm)
    comm.barrier()
    seconds = time.perf_counter() - begin
    assert model is not None
    if comm.rank == 0:
        print(json.dumps({"seconds": seconds}), flush=True)


def time_mlx_lm(folder: Path) -> None:
    """How long mlx-lm takes."""
    begin = time.perf_counter()
    model, _ = mlx_lm_utils.load_model(folder, lazy=True)
    built, before = time.perf_counter(), read_bytes()
    mx.eval(model.parameters())
    end, read = time.perf_counter(), read_bytes() - before
    nbytes = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    figures = {"reading": end - built, "all": end - begin, "seconds": end - begin}
    figures |= {"slices": nbytes, "read": read}
    print(json.dumps(figures), flush=True)


def floor_bytes(empty: EmptyModel, slices: dict[str, Slice]) -> int:
    """The least to read: rows as they are, columns with the pages they lie in.

    What mlx-lm computes of several tensors counts as it is.
    """
    floor = 0
    for name, part in slices.items():
        source = empty.sources[name]
        if isinstance(source, Tensor) and part.axis not in (None, 0):
            floor += page_bytes(empty.checkpoint.tensors[source.name], part)
        else:
            floor += part.size * source.dtype.size
    return floor


def page_bytes(stored: StoredTensor, part: Slice) -> int:
    """Bytes of the pages in which the columns `part` of a matrix lie."""
    rows, columns = stored.tensor.shape
    item = stored.tensor.dtype.size
    starts = stored.pieces[0].offset + np.arange(rows) * columns * item
    pages: set[int] = set()
    for start, stop in part.spans:
        first = (starts + start * item) // PAGE_BYTES
        last = (starts + stop * item - 1) // PAGE_BYTES
        for page in range(int((last - first).max()) + 1):
            pages.update(np.minimum(first + page, last).tolist())
    return len(pages) * PAGE_BYTES


if __name__ == "__main__":
    main()
