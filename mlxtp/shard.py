"""Cut a checkpoint ahead of time, check what was cut, put it together again.

python -m mlxtp.shard --model MODEL --ranks 5 --output DIR
python -m mlxtp.shard --verify DIR
python -m mlxtp.shard --join DIR --output FOLDER
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

from mlxtp import job_options
from mlxtp.checkpoint import cut, verify, writing
from mlxtp.checkpoint.cut import Origin, Shard
from mlxtp.checkpoint.headers import (
    Checkpoint,
    equal_on_disk,
    index_of,
    tensor_files,
)
from mlxtp.checkpoint.progress import progress_bar
from mlxtp.checkpoint.tensors import bytes_of
from mlxtp.cluster.measured import Host, Measured
from mlxtp.comm import launcher
from mlxtp.comm.communicator import Communicator
from mlxtp.dryrun.chosen import CONTEXT
from mlxtp.dryrun.fitting import Fitting
from mlxtp.fetch import hub
from mlxtp.fetch.location import locate, named
from mlxtp.fetch.spare import kept_besides
from mlxtp.model.skeleton import build
from mlxtp.model.sources import needed
from mlxtp.partition.shares import Share, Shares
from mlxtp.partition.spans import Slice
from mlxtp.sharding.decide import slice_table


def main() -> None:
    """Run the command line: status 2 for a mistake, 1 for slices that are damaged."""
    launcher.replace_unprintable()
    try:
        args = _parse(sys.argv[1:])
        if args.verify:
            sys.exit(0 if report(args.verify, show=not args.quiet) else 1)
        elif args.join:
            size = cut.size_bytes(args.join)
            with progress_bar("Joining", size, show=not args.quiet) as bar:
                writing.join(args.join, args.output, bar.update)
        else:
            hosts = Measured.read(args.measured).hosts if args.measured else ()
            shares = shard(
                args.model,
                args.shares,
                args.output,
                hosts=hosts,
                context=args.context,
                show=not args.quiet,
            )
            if args.shares == "auto":
                print(f"--shares {shares}")
            if args.spare:
                print("\n".join(copies(shares)))
    except (ValueError, OSError) as error:
        launcher.refuse("mlxtp.shard", error)


def shard(
    path_or_hf_repo: str | Path,
    shares: Iterable[int | Share] | Literal["auto"],
    output: Path,
    *,
    hosts: Sequence[Host] = (),
    context: int = CONTEXT,
    show: bool = False,
) -> Shares:
    """Cut a checkpoint into the slices of each rank, with little memory.

    Args:
        path_or_hf_repo: a folder, or a name on the hub, as for `mlxtp.load`.
        shares: one positive number or `Share` a rank, in whose proportion they share;
            "auto" are those that suit `hosts`.
        output: a new folder, or one with slices of the same checkpoint.
        hosts: for "auto", the host of each rank, as doctor has measured it.
        context: for "auto", tokens that caches are to have room for.
        show: show progress bars.

    Returns: the shares.

    Raises: ValueError if it is no model, or cannot be cut, before weights are fetched;
        OSError if a file cannot be read or written.
    """
    location = locate(path_or_hf_repo, Communicator())
    name, folder, checkpoint = location.name, location.folder, location.checkpoint
    if location.repo is None and location.is_cut:
        raise ValueError(f"{name} is cut already: join it first")
    with named(name, folder):
        rebuild = partial(build, folder, checkpoint=checkpoint, name=name)
        empty = rebuild()
        if shares == "auto":
            has_gpu = all(host.has_gpu for host in hosts)
            fitting = Fitting(rebuild, hosts, context, is_fused=has_gpu)
            shares = fitting.suited(context)
        shares = Shares(shares)
        table = slice_table(empty.model, shares)
        empty.settle(table.slices(0))
    if location.repo is not None:  # only now: it is a model that can be cut
        folder = hub.download(location.repo, checkpoint.headers, show=show)
        with named(name, folder):
            checkpoint = Checkpoint.of_folder(folder)
    size = len(shares)
    ranks = [needed(empty.sources, table.slices(r), r, size) for r in range(size)]
    of_ranks = [{tensor.name: part for tensor, part in r.items()} for r in ranks]
    headers = dict(checkpoint.headers)
    files, different = tensor_files(
        headers, index_of(folder).files, equal_on_disk, compare_all=True
    )
    origin = Origin(folder.name, None, headers, files, different)
    of_nobody = writing.rest(origin, of_ranks)
    cut.begin(output, origin, cut.small_files(folder))
    parts = [
        (Shard(shares, rank), origin.by_file(slices))
        for rank, slices in enumerate(of_ranks)
    ]
    if any(of_nobody.values()):
        parts.append((Shard(shares, None), of_nobody))
    total = sum(
        bytes_of(of_file) for _, by_file in parts for of_file in by_file.values()
    )
    with progress_bar("Cutting", total, show=show) as bar:
        for owner, by_file in parts:
            writing.write(output, owner, origin, checkpoint, by_file, bar.update)
    return shares


def copies(shares: Iterable[int | Share]) -> list[str]:
    """Say which folders go to which host, one rank on each, if all are kept twice."""
    shares = Shares(shares)
    besides = kept_besides([str(rank) for rank in range(len(shares))])
    return [
        f"host {host}: "
        + " and ".join(Shard(shares, rank).folder for rank in (host, *others))
        for host, others in enumerate(besides)
    ]


def report(folder: Path, *, show: bool = False) -> bool:
    """Print whose slices are in `folder`, and what is wrong with them.

    Returns: whether nothing is.

    Raises: ValueError if it is no cut checkpoint, or a file is missing or cut short.
    """
    checkpoint = cut.open_cut(folder)
    size = cut.size_bytes(folder)
    with progress_bar("Verifying", size, show=show) as bar:
        faults = verify.verify(folder, bar.update)
    for line in faults:
        print(line)
    names = ", ".join(shard.folder for shard in cut.shards(folder))
    print(f"{folder} holds {names or 'no slices'}: {size:,} bytes")
    whole = sum(
        stored.tensor.bytes_of(Slice(stored.tensor.shape))
        for header in checkpoint.headers.values()
        for stored in header.tensors.values()
    )
    absent = writing.absent_bytes(checkpoint)
    print(
        f"{absent:,} of {whole:,} bytes of the checkpoint are not here"
        if absent
        else "together they are the whole checkpoint"
    )
    print(f"{len(faults)} slices are damaged" if faults else "every hash is right")
    return not faults


def _parser() -> argparse.ArgumentParser:
    result = job_options.Parser(
        prog="mlxtp.shard",
        description="Cut a checkpoint into the slices of each rank, ahead of time and "
        "with little memory; check such slices; join them again.",
    )
    task = result.add_mutually_exclusive_group(required=True)
    task.add_argument("--model", help="cut this: a folder or a Hugging Face repo")
    task.add_argument(
        "--verify",
        type=Path,
        metavar="DIR",
        help="compare all slices with their hashes",
    )
    task.add_argument(
        "--join", type=Path, metavar="DIR", help="put the whole checkpoint together"
    )
    world = result.add_mutually_exclusive_group()
    world.add_argument("--ranks", type=int, help="for so many ranks, with equal shares")
    world.add_argument(
        "--shares",
        type=job_options.shares,
        metavar="SHARES",
        help="shares of the ranks, whole numbers such as 2,1,1,1,1, or for each kind "
        "of layer, such as attention=2,1,1/mlp=1,1,2; auto: what suits the hosts of "
        "--measured",
    )
    result.add_argument(
        "--measured",
        type=Path,
        metavar="FILE",
        help="with --shares auto, the hosts of the ranks, as python -m mlxtp.doctor "
        "--json FILE measured them",
    )
    result.add_argument(
        "--context",
        type=int,
        default=CONTEXT,
        metavar="TOKENS",
        help="with --shares auto, tokens that caches are to have room for. "
        f"Default: {CONTEXT}",
    )
    result.add_argument(
        "--spare",
        action="store_true",
        help="say which folders to copy to which host, so that each has those of the "
        "host before it as well and none is lost with its host",
    )
    result.add_argument("--output", type=Path, metavar="DIR", help="where to write")
    result.add_argument("--quiet", action="store_true", help="no progress bars")
    return result


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = _parser()
    args = launcher.parse(parser, arguments)
    job_options.check(args, job_options.LIMITS, ())
    if args.model and not args.shares:
        if args.ranks is None or args.ranks < 1:
            parser.error("--model goes with --ranks, at least 1, or --shares")
        args.shares = [1] * args.ranks
    if not args.model and (args.shares or args.ranks is not None or args.spare):
        parser.error("--ranks, --shares and --spare go with --model")
    if (args.shares == "auto") != (args.measured is not None):
        parser.error(
            "--shares auto goes with --measured, and neither without the other"
        )
    if (args.output is None) != bool(args.verify):
        parser.error("--output goes with --model and --join, and neither without it")
    return args


if __name__ == "__main__":
    main()
