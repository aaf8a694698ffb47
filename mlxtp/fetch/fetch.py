"""Fetch what a rank lacks of a checkpoint: from the hub or from other ranks.

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

from mlxtp.checkpoint import cut
from mlxtp.checkpoint.cut import Origin, Shard
from mlxtp.checkpoint.tensors import StoredTensor
from mlxtp.comm.communicator import Communicator
from mlxtp.comm.errors import UsageError
from mlxtp.fetch import confirm, hub
from mlxtp.fetch.hub import Repo
from mlxtp.fetch.journal import Journal
from mlxtp.fetch.location import named
from mlxtp.fetch.rounds import Rounds
from mlxtp.fetch.schedule import Demand, Move, plan
from mlxtp.partition.spans import Slice, Spans

logger = logging.getLogger(__name__)

# How many times a file is fetched if its bytes do not match the hub's hash: a proxy on
# the way may have changed them.
ATTEMPTS = 2


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

    Args:
        comm: the ranks that fetch, each for itself and others.
        repo: where slices come from that no rank has.
        shard: whose slices they are.
        wanted: slices of tensors, by name.
        only_root: rank 0 alone asks the hub, and passes on what it gets.
        show: show progress bars, on rank 0.

    Raises: UsageError on every rank if the hub does not give something, or a disk
        is too small.
    """
    show = show and comm.rank == 0
    with comm.agreement():
        folder = repo.folder()
        with named(repo.name, folder):
            lacks = bool(_missing(repo, wanted))
    if not any(comm.allgather_object(lacks)):
        return
    with _locked(comm, folder / f"{shard.folder}.lock", repo.name):
        # Another job may have fetched some.
        with comm.agreement(), named(repo.name, folder):
            missing = _missing(repo, wanted)
        missing = _on_one_axis(comm, missing)
        with comm.agreement(), named(repo.name, folder):
            origin = cut.origin_of(folder)
            tensors = hub.here(repo).tensors
            journal = Journal(folder, shard, origin, missing)
        _check_disks(comm, folder, journal.bytes_to_write)
        with comm.agreement():
            journal.begin()
        for _ in range(ATTEMPTS):
            moves = _planned(comm, tensors, journal, only_root)
            Rounds(comm, repo, origin, tensors, journal, moves).run(show=show)
            wrong = _confirmed(comm, repo, origin, tensors, journal, show)
            if not wrong:
                break
        else:
            raise UsageError(
                f"{', '.join(wrong)} of {repo.name} came from the hub twice, and was "
                "not what the hub's SHA-256 says: nothing of it is kept"
            )
        with comm.agreement():
            journal.finish()


def _confirmed(
    comm: Communicator,
    repo: Repo,
    origin: Origin,
    tensors: Mapping[str, StoredTensor],
    journal: Journal,
    show: bool,
) -> list[str]:
    """Files of which something came wrong; the journal forgets what came of them."""
    touched = set[str]().union(*comm.allgather_object(journal.files))
    wrong = confirm.wrong_files(
        comm, repo, origin, touched, journal.tensors(tensors), show=show
    )
    if wrong:
        with comm.agreement():
            journal.forget(wrong)
    return wrong


def _on_one_axis(comm: Communicator, missing: Mapping[str, Slice]) -> dict[str, Slice]:
    """Whole tensors in place of slices of which ranks lack some on another axis."""
    axes: dict[str, set[int | None]] = {}
    mine = {name: part.axis for name, part in missing.items()}
    for of_rank in comm.allgather_object(mine):
        for name, axis in of_rank.items():
            axes.setdefault(name, set()).add(axis)
    return {
        name: part if len(axes[name] - {None}) < 2 else Slice(part.full_shape)
        for name, part in missing.items()
    }


def _missing(repo: Repo, wanted: Mapping[str, Slice]) -> dict[str, Slice]:
    """What of the slices is not on this machine, by tensor's name."""
    tensors = hub.here(repo).tensors
    missing = {name: tensors[name].missing(part) for name, part in wanted.items()}
    return {name: part for name, part in missing.items() if part}


@contextmanager
def _locked(comm: Communicator, file: Path, name: str) -> Iterator[None]:
    """Keep other jobs on any of the machines from fetching the same slices."""
    lock = filelock.FileLock(file)
    waiting = False
    while True:
        mine: str | None = None
        with comm.agreement():
            try:
                lock.acquire(blocking=False)
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
    tensors: Mapping[str, StoredTensor],
    journal: Journal,
    only_root: bool,
) -> list[Move]:
    """What every rank gets from where."""
    lacks = comm.allgather_object(journal.missing)
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
    stored: StoredTensor,
    lacks: Sequence[Slice | None],
    has: Sequence[Sequence[Slice]],
) -> Demand:
    cuts = {part.axis for part in lacks if part} - {None}
    axis = cuts.pop() if cuts else 0
    assert axis is not None
    return Demand(
        stored.tensor.name,
        axis,
        *stored.tensor.seen_from(axis),
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
    with comm.agreement():
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
