"""What a rank lacks of a checkpoint on the hub, got from there or from other ranks.

Each byte is fetched once, by one rank, and sent to all that lack it, in rounds. What
has come is written to its place at once and noted in a journal, from which the next
start goes on. It counts once the hub's hashes of the files have been compared with it.
"""

import logging
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import filelock
import numpy as np

from mlxtp.checkpoint import cut, verify
from mlxtp.checkpoint.cut import Origin, Shard, lacking
from mlxtp.checkpoint.tensors import Tensor, seen_from
from mlxtp.comm.communicator import Communicator
from mlxtp.comm.errors import UsageError
from mlxtp.fetch import confirm
from mlxtp.fetch.hub import Repo
from mlxtp.fetch.journal import Partial
from mlxtp.fetch.rounds import Rounds
from mlxtp.fetch.schedule import Demand, Move, plan
from mlxtp.partition.spans import Slice, Spans

logger = logging.getLogger(__name__)


def fill(
    comm: Communicator,
    repo: Repo,
    shard: Shard,
    wanted: Mapping[str, Slice],
    *,
    only_root: bool = False,
    show: bool = False,
) -> None:
    """Get what this machine lacks of the `wanted` slices of tensors, and keep it.

    Every rank calls it alike, with its own shard and slices.

    Raises: UsageError on every rank if the hub does not give something, or a disk
        is too small.
    """
    folder = repo.folder()
    with comm.agreement():
        verify.drop_damaged(folder)
    if not any(comm.allgather_object(bool(_lacks(folder, wanted)))):
        return
    with _locked(comm, folder / f"{shard.folder}.lock", repo.name):
        with comm.agreement():
            lacks = _lacks(folder, wanted)
        lacks = _on_one_axis(comm, lacks)
        with comm.agreement():
            origin = cut.origin_of(folder)
            tensors = cut.open_cut(folder)
            partial = Partial(folder, shard, origin, lacks)
        _check_disks(comm, folder, partial.bytes_to_write)
        with comm.agreement():
            partial.begin()
        wrong = _fetched(comm, repo, origin, tensors, partial, only_root, show)
        if wrong:  # once more: it may have been the way
            wrong = _fetched(comm, repo, origin, tensors, partial, only_root, show)
        if wrong:
            raise UsageError(
                f"{', '.join(wrong)} of {repo.name} came from the hub twice, and was "
                "not what the hub's SHA-256 says: nothing of it is kept"
            )
        with comm.agreement():
            partial.finish()


def _fetched(
    comm: Communicator,
    repo: Repo,
    origin: Origin,
    tensors: Mapping[str, Tensor],
    partial: Partial,
    only_root: bool,
    show: bool,
) -> list[str]:
    """Get what is missing; files of which something came wrong, which is let go of."""
    moves = _planned(comm, tensors, partial, only_root)
    Rounds(comm, repo, tensors, partial, moves).run(show)
    touched = set[str]().union(*comm.allgather_object(partial.files))
    headers = {file: it for file, it in origin.headers.items() if file in touched}
    wrong = confirm.wrong_files(
        comm, repo, headers, {**tensors, **partial.tensors(tensors)}, show
    )
    if wrong:
        with comm.agreement():
            partial.forget(wrong)
    return wrong


def _on_one_axis(comm: Communicator, lacks: Mapping[str, Slice]) -> dict[str, Slice]:
    """Whole tensors in the place of slices where the ranks' are cut on other axes."""
    axes: dict[str, set[int | None]] = {}
    mine = {name: part.axis for name, part in lacks.items()}
    for of_rank in comm.allgather_object(mine):
        for name, axis in of_rank.items():
            axes.setdefault(name, set()).add(axis)
    return {
        name: part if len(axes[name] - {None}) < 2 else Slice(part.full_shape)
        for name, part in lacks.items()
    }


def _lacks(folder: Path, wanted: Mapping[str, Slice]) -> dict[str, Slice]:
    tensors = cut.open_cut(folder)
    gone = lacking({tensors[name]: part for name, part in wanted.items()})
    return {tensor.name: part for tensor, part in gone.items()}


@contextmanager
def _locked(comm: Communicator, file: Path, name: str) -> Iterator[None]:
    """While no other job on any of the machines fetches the same slices."""
    lock = filelock.FileLock(file)
    waiting = False
    while True:
        try:
            lock.acquire(blocking=False)
            mine = None
        except filelock.Timeout:
            mine = comm.host
        busy = next(filter(None, comm.allgather_object(mine)), None)
        if busy is None:
            break
        lock.release()  # two jobs that each hold some would wait for each other
        if not waiting and comm.rank == 0:
            logger.warning(f"another job on {busy} fetches {name}: waiting for it")
        waiting = True
        time.sleep(comm.bcast_object(float(np.random.default_rng().uniform(0.5, 1.5))))
    try:
        yield
    finally:
        lock.release()


def _planned(
    comm: Communicator,
    tensors: Mapping[str, Tensor],
    partial: Partial,
    only_root: bool,
) -> list[Move]:
    """What every rank gets from where."""
    lacks = comm.allgather_object(partial.missing)
    names = [name for name in tensors if any(name in of_rank for of_rank in lacks)]
    here = {name: [piece.part for piece in tensors[name].pieces] for name in names}
    has = comm.allgather_object({name: parts for name, parts in here.items() if parts})
    demands = [
        _demand(
            tensors[name],
            [of_rank.get(name) for of_rank in lacks],
            [of_rank.get(name, []) for of_rank in has],
        )
        for name in names
    ]
    return plan(demands, only_root=only_root)


def _demand(
    tensor: Tensor, lacks: Sequence[Slice | None], has: Sequence[Sequence[Slice]]
) -> Demand:
    cuts = {part.axis for part in lacks if part} - {None}
    axis = cuts.pop() if cuts else 0
    assert axis is not None
    rows, items, item_bytes = seen_from(tensor, axis)
    return Demand(
        tensor.name,
        axis,
        rows,
        items,
        item_bytes,
        tuple(part.on(axis) if part else Spans() for part in lacks),
        tuple(
            Spans(
                span
                for part in parts
                if part.axis in (None, axis)
                for span in part.on(axis)
            )
            for parts in has
        ),
    )


def _check_disks(comm: Communicator, folder: Path, bytes_to_write: int) -> None:
    """Compare what the ranks of each host will write with what its disk has free.

    Raises: UsageError, with the numbers of a host that lacks space.
    """
    free = shutil.disk_usage(folder).free
    everyone = comm.allgather_object((comm.host, bytes_to_write, free))
    for host in dict.fromkeys(host for host, *_ in everyone):
        wanted = sum(size for other, size, _ in everyone if other == host)
        free = min(free for other, _, free in everyone if other == host)
        if wanted > free:
            raise UsageError(
                f"{host} needs {wanted / 1e9:.1f} GB of disk for its slices and has "
                f"{free / 1e9:.1f} GB free in {folder}: make room, or set HF_HOME to "
                "another disk"
            )
