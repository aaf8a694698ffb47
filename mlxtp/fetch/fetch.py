"""Get what a rank lacks of a checkpoint: from other hosts' disks, or from the hub.

Each byte is had by one rank, from its disk or else from the hub, and sent to all that
lack it, in rounds. What has come is written to its place at once and noted in a
journal, from which the next start goes on. What came from the hub counts once its
hashes of the files have been compared with it.
"""

import hashlib
import logging
import shutil
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path

import filelock
import numpy as np
from huggingface_hub import constants

from mlxtp.checkpoint import cut
from mlxtp.checkpoint.cut import Origin, Shard
from mlxtp.checkpoint.tensors import StoredTensor
from mlxtp.comm.communicator import Communicator
from mlxtp.comm.errors import UsageError
from mlxtp.fetch import confirm, hub
from mlxtp.fetch.hub import Repo
from mlxtp.fetch.journal import Journal
from mlxtp.fetch.location import Location, named
from mlxtp.fetch.rounds import Rounds
from mlxtp.fetch.schedule import Demand, absent_bytes, plan
from mlxtp.partition.spans import Slice, Spans

logger = logging.getLogger(__name__)

# How many times a file is fetched if its bytes do not match the hub's hash: a proxy on
# the way may have changed them.
ATTEMPTS = 2
# How long a step waits at most for the hashes of what has come.
STEP_SECONDS = 0.1


def fill(
    comm: Communicator,
    location: Location,
    shard: Shard,
    wanted: Mapping[str, Slice],
    *,
    only_root: bool = False,
    show: bool = False,
    later_bytes: int = 0,
) -> None:
    """Get what this machine lacks of the `wanted` slices of tensors, and keep it.

    Every rank calls it alike, with its own location, shard and slices.

    Args:
        comm: the ranks that fetch, each for itself and others.
        location: where slices lie on this host; the hub gives what no rank has.
        shard: whose slices they are.
        wanted: slices of tensors, by name.
        only_root: rank 0 alone asks the hub, and passes on what it gets.
        show: show progress bars, on rank 0.
        later_bytes: what this rank will write besides: the disk has to hold it too.

    Raises: UsageError on every rank if something is on no disk and the hub does not
        give it, or a disk is too small.
    """
    steps = filling(
        *(comm, location, shard, wanted),
        only_root=only_root,
        show=show,
        later_bytes=later_bytes,
    )
    deque(steps, maxlen=0)


def filling(
    comm: Communicator,
    location: Location,
    shard: Shard,
    wanted: Mapping[str, Slice],
    *,
    only_root: bool = False,
    show: bool = False,
    later_bytes: int = 0,
    round_bytes: int | None = None,
) -> Iterator[None]:
    """Do what `fill` does in steps: one for each `next`.

    `round_bytes` is what a rank passes on in a step, and has in memory a few times.
    """
    show = show and comm.rank == 0
    name, folder, repo = location.name, location.folder, location.repo
    missing = missing_here(comm, location, wanted)
    if not any(comm.allgather_object(bool(missing))):
        return
    lock = filelock.FileLock(folder / f"{shard.folder}.lock") if missing else None
    yield from _lock(comm, lock, name)
    try:
        # Another job may have fetched some.
        missing = _on_one_axis(comm, missing_here(comm, location, wanted))
        with comm.agreement(), named(name, folder):
            origin = location.origin()
            tensors = location.reopened().checkpoint.tensors
            journal = Journal(folder, shard, origin, missing)
        _check_same(comm, name, origin, folder)
        _check_disks(comm, folder, journal.bytes_to_write + later_bytes)
        hint = _absence(comm, location, tensors, journal.missing, only_root)
        with comm.agreement():
            journal.begin()
        for _ in range(ATTEMPTS):
            moves = plan(_demands(comm, tensors, journal.missing), only_root=only_root)
            rounds = Rounds(
                *(comm, repo, origin, tensors, journal, moves),
                hint=hint,
                round_bytes=round_bytes,
            )
            yield from rounds.run(show=show)
            wrong = _confirmed(comm, repo, origin, tensors, journal, show)
            if not wrong:
                break
        else:
            raise UsageError(
                f"{', '.join(wrong)} of {name} came from the hub twice, and was "
                "not what the hub's SHA-256 says: nothing of it is kept"
            )
        yield from _finish(comm, journal)
    finally:
        if lock:
            lock.release()


def check_there(
    comm: Communicator, location: Location, wanted: Mapping[str, Slice]
) -> None:
    """See whether what ranks lack of the `wanted` slices lies on some host's disk.

    For a model that the hub does not have.

    Raises: UsageError on every rank that says what is missing, and what to do.
    """
    missing = missing_here(comm, location, wanted)
    if any(comm.allgather_object(bool(missing))):
        with comm.agreement(), named(location.name, location.folder):
            origin = location.origin()
        _check_same(comm, location.name, origin, location.folder)
        missing = _on_one_axis(comm, missing)
        _absence(comm, location, location.checkpoint.tensors, missing, False)


def missing_here(
    comm: Communicator, location: Location, wanted: Mapping[str, Slice]
) -> dict[str, Slice]:
    """What of the slices is not on this machine, by tensor's name."""
    with comm.agreement(), named(location.name, location.folder):
        if not wanted:
            return {}
        tensors = location.reopened().checkpoint.tensors
        missing = {name: tensors[name].missing(part) for name, part in wanted.items()}
        return {name: part for name, part in missing.items() if part}


def _finish(comm: Communicator, journal: Journal) -> Iterator[None]:
    """Hash what has come and let it count, a moment in each step."""
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(journal.finish)
        while not all(comm.allgather_object(not wait([done], STEP_SECONDS).not_done)):
            yield
        with comm.agreement():
            done.result()


def _absence(
    comm: Communicator,
    location: Location,
    tensors: Mapping[str, StoredTensor],
    missing: Mapping[str, Slice],
    only_root: bool,
) -> str:
    """See whether the hub has to give what no host has, and whether it can be asked.

    Returns: what is to be said behind what the hub does not give.

    Raises: UsageError on every rank, with what is missing, if it cannot.
    """
    absent = absent_bytes(_demands(comm, tensors, missing))
    held = [] if not cut.is_cut(location.folder) else cut.shards(location.folder)
    everyone = {shard for of_rank in comm.allgather_object(held) for shard in of_rank}
    worlds = {shard.shares for shard in everyone if shard.rank is not None}
    lost = sorted(
        folder
        for shares in worlds
        for rank in range(len(shares))
        if (folder := Shard(shares, rank).folder) not in {s.folder for s in everyone}
    )
    offline = comm.allgather_object(constants.HF_HUB_OFFLINE)
    is_asked = location.repo and not any(offline[:1] if only_root else offline)
    if not absent or (is_asked and not lost):
        return ""
    what = (
        f"{absent / 1e9:.2f} GB of {location.name} are on the disk of no host, none "
        f"has {', '.join(lost) or 'slices of it'}"
    )
    do = "start the host that had it again"
    if location.repo is None:
        raise UsageError(
            f"{what}: {do}, or cut the checkpoint for these ranks and shares with "
            "python -m mlxtp.shard (with --spare, a host's slices are on another too)"
        )
    do += ", or let the hub be asked (with --spare, a host's slices are on another too)"
    if is_asked:
        return f"; {what}: {do}"
    raise UsageError(f"{what}, and {hub.OFFLINE}: {do}")


def _check_same(comm: Communicator, name: str, origin: Origin, folder: Path) -> None:
    """Compare what the slices on each host are of: headers and config.

    Raises: UsageError on every rank, with a host that has those of something else.
    """
    digest = hashlib.sha256()
    for file, header in sorted(origin.headers.items()):
        digest.update(file.encode() + header.beginning)
    with suppress(OSError):
        digest.update((folder / "config.json").read_bytes())
    hosts = comm.allgather_object((comm.host, digest.digest()))
    for host, found in hosts:
        if found != hosts[0][1]:
            raise UsageError(
                f"{name} on {host} is of another checkpoint than on {hosts[0][0]}"
            )


def _confirmed(
    comm: Communicator,
    repo: Repo | None,
    origin: Origin,
    tensors: Mapping[str, StoredTensor],
    journal: Journal,
    show: bool,
) -> list[str]:
    """Files of which something came wrong; the journal forgets what came of them.

    What came from other hosts' disks alone is what was compared when it came there.
    """
    touched = set[str]().union(*comm.allgather_object(journal.files_from_hub))
    if repo is None or not touched:
        return []
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


def _lock(
    comm: Communicator, lock: filelock.BaseFileLock | None, name: str
) -> Generator[None]:
    """Keep other jobs on any of the machines from fetching the same slices.

    A rank that lacks nothing has no `lock`. Each step is one attempt.
    """
    waiting = False
    while True:
        mine: str | None = None
        with comm.agreement():
            try:
                if lock:
                    lock.acquire(blocking=False)
            except filelock.Timeout:
                mine = comm.host
        busy = next(filter(None, comm.allgather_object(mine)), None)
        if busy is None:
            return
        if lock:
            lock.release()  # two jobs that each hold some would wait for each other
        if not waiting and comm.rank == 0:
            logger.warning(f"another job on {busy} fetches {name}: waiting for it")
        waiting = True
        time.sleep(comm.bcast_object(float(np.random.default_rng().uniform(0.5, 1.5))))
        yield


def _demands(
    comm: Communicator,
    tensors: Mapping[str, StoredTensor],
    missing: Mapping[str, Slice],
) -> list[Demand]:
    """What every rank lacks, and what it has of that."""
    lacks = comm.allgather_object(missing)
    names = [name for name in tensors if any(name in of_rank for of_rank in lacks)]
    here = {name: [piece.part for piece in tensors[name].pieces] for name in names}
    has = comm.allgather_object({name: parts for name, parts in here.items() if parts})
    return [
        _demand(
            tensors[name],
            [of_rank.get(name) for of_rank in lacks],
            [of_rank.get(name, []) for of_rank in has],
        )
        for name in names
    ]


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
