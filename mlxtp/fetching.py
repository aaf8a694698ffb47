"""What a rank lacks of a checkpoint on the hub, got from there or from other ranks.

Each byte is fetched once, by one rank, and sent to all that lack it, in rounds. What
has come is written to its place at once and noted in a journal, from which the next
start goes on.
"""

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import filelock
import numpy as np
from tqdm import tqdm

from mlxtp import cut_checkpoint, hub
from mlxtp.communicator import AgreedError, Communicator
from mlxtp.cut_checkpoint import Share, lacking
from mlxtp.hub import Repo
from mlxtp.moves import Demand, Move, plan
from mlxtp.partial import Partial
from mlxtp.partition import Slice, Spans, length, spans_on
from mlxtp.tensors import Tensor, band, flattened, read_bytes, seen_from

# What a rank fetches and passes on at a time, the most of it that is one request, and
# how many requests there are at once.
ROUND_BYTES = 64 * 1024 * 1024
RUN_BYTES = 8 * 1024 * 1024
CONNECTIONS = 8


def fill(
    comm: Communicator,
    repo: Repo,
    share: Share,
    wanted: Mapping[str, Slice],
    *,
    only_root: bool = False,
    show: bool = False,
) -> None:
    """Get what this machine lacks of the `wanted` slices of tensors, and keep it.

    Every rank calls it alike, with its own share and slices.

    Raises: AgreedError on every rank if the hub does not give something, or a disk
        is too small.
    """
    folder = repo.folder()
    with comm.agreement():
        cut_checkpoint.drop_damaged(folder)
    if not any(comm.allgather_objects(bool(_lacks(folder, wanted)))):
        return
    with _locked(comm, folder / f"{share.folder}.lock", repo.name):
        with comm.agreement():
            lacks = _lacks(folder, wanted)
        lacks = _on_one_axis(comm, lacks)
        with comm.agreement():
            origin = cut_checkpoint.origin_of(folder)
            tensors = cut_checkpoint.open_cut(folder)
            partial = Partial(folder, share, origin, lacks)
        moves = _planned(comm, tensors, partial, only_root)
        _check_disks(comm, folder, partial.bytes_to_write)
        with comm.agreement():
            partial.begin()
        _Rounds(comm, repo, tensors, partial, moves).run(show)
        with comm.agreement():
            partial.finish()


def _on_one_axis(comm: Communicator, lacks: Mapping[str, Slice]) -> dict[str, Slice]:
    """Whole tensors in the place of slices where the ranks' are cut on other axes."""
    axes: dict[str, set[int | None]] = {}
    mine = {name: part.axis for name, part in lacks.items()}
    for of_rank in comm.allgather_objects(mine):
        for name, axis in of_rank.items():
            axes.setdefault(name, set()).add(axis)
    return {
        name: part if len(axes[name] - {None}) < 2 else Slice(part.full_shape)
        for name, part in lacks.items()
    }


def _lacks(folder: Path, wanted: Mapping[str, Slice]) -> dict[str, Slice]:
    tensors = cut_checkpoint.open_cut(folder)
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
        busy = next(filter(None, comm.allgather_objects(mine)), None)
        if busy is None:
            break
        lock.release()  # two jobs that each hold some would wait for each other
        if not waiting and comm.rank == 0:
            print(f"another job on {busy} fetches {name}: waiting for it")
        waiting = True
        time.sleep(comm.bcast(float(np.random.default_rng().uniform(0.5, 1.5))))
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
    lacks = comm.allgather_objects(partial.missing)
    names = [name for name in tensors if any(name in of_rank for of_rank in lacks)]
    here = {name: [piece.part for piece in tensors[name].pieces] for name in names}
    has = comm.allgather_objects({name: parts for name, parts in here.items() if parts})
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
        tuple(spans_on(part, axis) if part else () for part in lacks),
        tuple(
            tuple(
                span
                for part in parts
                if part.axis in (None, axis)
                for span in spans_on(part, axis)
            )
            for parts in has
        ),
    )


def _check_disks(comm: Communicator, folder: Path, bytes_to_write: int) -> None:
    """Compare what the ranks of each host will write with what its disk has free.

    Raises: AgreedError, with the numbers of a host that lacks space.
    """
    free = shutil.disk_usage(folder).free
    everyone = comm.allgather_objects((comm.host, bytes_to_write, free))
    for host in dict.fromkeys(host for host, *_ in everyone):
        wanted = sum(size for other, size, _ in everyone if other == host)
        free = min(free for other, _, free in everyone if other == host)
        if wanted > free:
            raise AgreedError(
                f"{host} needs {wanted / 1e9:.1f} GB of disk for its slices and has "
                f"{free / 1e9:.1f} GB free in {folder}: make room, or set HF_HOME to "
                "another disk"
            )


@dataclass
class _Run:
    """Moves whose bytes lie together in a file of the hub: one request."""

    file: str
    start: int
    stop: int
    moves: list[Move]


class _Rounds:
    """Gets and passes on what was planned, a round after another."""

    def __init__(
        self,
        comm: Communicator,
        repo: Repo,
        tensors: Mapping[str, Tensor],
        partial: Partial,
        moves: Sequence[Move],
    ) -> None:
        self._comm, self._repo, self._partial = comm, repo, partial
        self._tensors = tensors
        origin = cut_checkpoint.origin_of(repo.folder())
        self._at_hub = origin.tensors
        self._rounds = self._in_rounds(moves)

    def _in_rounds(self, moves: Sequence[Move]) -> list[list[Move]]:
        """The moves of each round: of every rank about ROUND_BYTES."""
        rounds: list[list[Move]] = []
        planned = [0] * self._comm.size
        for move in sorted(moves, key=self._place):
            number = planned[move.source] // ROUND_BYTES
            planned[move.source] += self._stop(move) - self._start(move)
            while len(rounds) <= number:
                rounds.append([])
            rounds[number].append(move)
        return rounds

    def _place(self, move: Move) -> tuple[str, int]:
        return str(self._at_hub[move.name].pieces[0].file), self._start(move)

    def _start(self, move: Move) -> int:
        """The first byte, in the file at the hub."""
        return self._byte(move, move.rows[0], move.span[0])

    def _stop(self, move: Move) -> int:
        return self._byte(move, move.rows[1] - 1, move.span[1])

    def _byte(self, move: Move, row: int, item: int) -> int:
        tensor = self._at_hub[move.name]
        _, items, item_bytes = seen_from(tensor, move.axis)
        return tensor.pieces[0].offset + (row * items + item) * item_bytes

    def run(self, show: bool) -> None:
        """Make all rounds; while one is passed on the next is fetched."""
        comm = self._comm
        sizes = [
            [
                sum(self._stop(m) - self._start(m) for m in moves if m.source == rank)
                for rank in range(comm.size)
            ]
            for moves in self._rounds
        ]
        with (
            ThreadPoolExecutor(CONNECTIONS) as pool,
            tqdm(
                total=sum(map(sum, sizes)), unit="B", unit_scale=True,
                desc="Fetching", leave=False, disable=not (show and comm.rank == 0),
            ) as bar,
        ):  # fmt: skip
            try:
                under_way = self._begin(pool, 0)
                for number, moves in enumerate(self._rounds):
                    began = time.monotonic()
                    with comm.agreement():
                        arrived = self._arrived(under_way)
                    waited = comm.allgather_objects(time.monotonic() - began)
                    under_way = self._begin(pool, number + 1)
                    self._pass_on(moves, arrived)
                    with comm.agreement():
                        self._partial.note()
                    slowest = max(range(comm.size), key=lambda r: waited[r])
                    bar.set_postfix_str(f"slowest: rank {slowest}", refresh=False)
                    bar.update(sum(sizes[number]))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _begin(
        self, pool: ThreadPoolExecutor, number: int
    ) -> list[tuple[_Run, np.ndarray, Future[None]]]:
        """Begin to fetch what this rank fetches in a round."""
        if number >= len(self._rounds):
            return []
        runs: list[_Run] = []
        for move in self._rounds[number]:
            if move.source != self._comm.rank or not move.from_hub:
                continue
            file, start = self._place(move)
            stop = self._stop(move)
            last = runs[-1] if runs else None
            if (
                last
                and last.file == file
                and last.stop == start
                and (stop - last.start <= RUN_BYTES)
            ):
                last.moves.append(move)
                last.stop = stop
            else:
                runs.append(_Run(file, start, stop, [move]))
        under_way = []
        for run in runs:
            target = np.empty(run.stop - run.start, np.uint8)
            future = pool.submit(hub.fetch, self._repo, run.file, run.start, target)
            under_way.append((run, target, future))
        return under_way

    def _arrived(
        self, under_way: Sequence[tuple[_Run, np.ndarray, Future[None]]]
    ) -> dict[Move, np.ndarray]:
        """The bytes of each move that was fetched."""
        arrived = {}
        for run, target, future in under_way:
            future.result()
            for move in run.moves:
                start, stop = self._start(move), self._stop(move)
                arrived[move] = target[start - run.start : stop - run.start]
        return arrived

    def _pass_on(self, moves: Sequence[Move], arrived: dict[Move, np.ndarray]) -> None:
        """Send what others lack of a round, and write down what comes from them."""
        rank, ranks = self._comm.rank, range(self._comm.size)
        to: list[list[np.ndarray]] = [[] for _ in ranks]
        sizes = [0 for _ in ranks]
        for move in moves:
            for target, spans in move.targets:
                if move.source == rank:
                    to[target].append(self._items(move, spans, arrived))
                if target == rank:
                    sizes[move.source] += self._bytes(move, spans)
        nothing = np.empty(0, np.uint8)
        messages = [np.concatenate(parts) if parts else nothing for parts in to]
        received = self._comm.exchange(messages, sizes)
        read = [0 for _ in ranks]
        for move in moves:
            for target, spans in move.targets:
                if target == rank:
                    start = read[move.source]
                    read[move.source] += self._bytes(move, spans)
                    data = received[move.source][start : read[move.source]]
                    self._partial.write(move.name, move.axis, move.rows, spans, data)

    def _bytes(self, move: Move, spans: Spans) -> int:
        _, _, item = seen_from(self._at_hub[move.name], move.axis)
        return (move.rows[1] - move.rows[0]) * length(spans) * item

    def _items(
        self, move: Move, spans: Spans, arrived: Mapping[Move, np.ndarray]
    ) -> np.ndarray:
        """Items `spans` of each row of a move, one row behind the other: (n,)."""
        rows = move.rows[1] - move.rows[0]
        if not move.from_hub:
            flat = flattened(self._tensors[move.name], move.axis)
            some = band(flat, *move.rows)
            return read_bytes(some, Slice(some.shape, 1, spans))
        _, items, item = seen_from(self._at_hub[move.name], move.axis)
        first, last = move.span
        bytes_of_rows = np.lib.stride_tricks.as_strided(
            arrived[move], (rows, (last - first) * item), (items * item, 1)
        )
        parts = [
            bytes_of_rows[:, (start - first) * item : (stop - first) * item]
            for start, stop in spans
        ]
        return np.concatenate(parts, axis=1).reshape(-1)
