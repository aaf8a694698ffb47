"""What was planned is fetched, passed on and written down, a round after another."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
from tqdm import tqdm

from mlxtp.checkpoint.cut import Origin
from mlxtp.checkpoint.progress import progress_bar
from mlxtp.checkpoint.tensors import StoredTensor
from mlxtp.comm.communicator import Communicator
from mlxtp.fetch import hub
from mlxtp.fetch.hub import Repo
from mlxtp.fetch.journal import Journal
from mlxtp.fetch.schedule import Move
from mlxtp.partition.spans import Spans

# What a rank fetches and passes on at a time, the most of it that is one request, and
# how many requests there are at once.
ROUND_BYTES = 64 * 1024 * 1024
RUN_BYTES = 8 * 1024 * 1024
CONNECTIONS = 8
# How often the progress bar learns what has come to all ranks.
SHOW_SECONDS = 0.5


@dataclass
class _Run:
    """Moves whose bytes lie together in a file of the hub: one request."""

    file: str
    start: int
    stop: int
    moves: list[Move]


class Rounds:
    """Gets and passes on what was planned, a round after another."""

    def __init__(
        self,
        comm: Communicator,
        repo: Repo | None,
        origin: Origin,
        tensors: Mapping[str, StoredTensor],
        journal: Journal,
        moves: Sequence[Move],
        *,
        hint: str = "",
        round_bytes: int | None = None,
    ) -> None:
        """Share the moves out over rounds.

        `origin` says where tensors lie in the whole checkpoint, `tensors` what of them
        is here, and what comes is written to the `journal`. Without a `repo` no move
        may be from the hub. `hint` is said behind what the hub does not give.
        `round_bytes` is what a rank passes on in a round. Default: ROUND_BYTES.
        """
        self._comm, self._repo, self._journal = comm, repo, journal
        self._hint = hint
        self._round_bytes = round_bytes or ROUND_BYTES
        self._tensors = tensors
        self._at_hub = origin.tensors
        self._came, self._counting = 0, threading.Lock()  # bytes from the hub
        self._rounds = self._in_rounds(moves)

    def _in_rounds(self, moves: Sequence[Move]) -> list[list[Move]]:
        """The moves of each round: of every rank about `round_bytes`."""
        rounds: list[list[Move]] = []
        planned = [0] * self._comm.size
        for move in sorted(moves, key=self._position):
            number = planned[move.source] // self._round_bytes
            planned[move.source] += self._stop(move) - self._start(move)
            while len(rounds) <= number:
                rounds.append([])
            rounds[number].append(move)
        return rounds

    def _position(self, move: Move) -> tuple[str, int]:
        """The file at the hub, and the first byte in it."""
        return self._at_hub[move.name].pieces[0].file.name, self._start(move)

    def _start(self, move: Move) -> int:
        """The first byte, in the file at the hub."""
        return self._byte(move, move.rows.start, move.span.start)

    def _stop(self, move: Move) -> int:
        return self._byte(move, move.rows.stop - 1, move.span.stop)

    def _byte(self, move: Move, row: int, item: int) -> int:
        stored = self._at_hub[move.name]
        _, items, item_bytes = stored.tensor.seen_from(move.axis)
        return stored.pieces[0].offset + (row * items + item) * item_bytes

    def run(self, *, show: bool) -> Iterator[None]:
        """Make all rounds; while one is passed on the next is fetched.

        `show` shows a progress bar.

        Yields: after each round.

        Raises: UsageError on every rank if the hub does not give something, or a file
            cannot be read or written.
        """
        comm = self._comm
        total = sum(self._bytes_of(moves) for moves in self._rounds)
        with (
            ThreadPoolExecutor(CONNECTIONS) as pool,
            progress_bar("Fetching", total, show=show) as bar,
        ):
            try:
                under_way = self._begin(pool, 0)
                for number, moves in enumerate(self._rounds):
                    self._await([done for *_, done in under_way], bar)
                    with comm.agreement():
                        messages = self._messages(moves, self._arrived(under_way))
                    under_way = self._begin(pool, number + 1)
                    received = comm.exchange(messages, self._sizes(moves))
                    with comm.agreement():
                        self._write(moves, received)
                        self._journal.note()
                    bar.update(self._bytes_of([m for m in moves if not m.from_hub]))
                    yield
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _bytes_of(self, moves: Sequence[Move]) -> int:
        return sum(self._stop(move) - self._start(move) for move in moves)

    def _await(self, fetches: Sequence[Future[None]], bar: "tqdm[NoReturn]") -> None:
        """Wait for what all ranks fetch in a round, and show what comes."""
        comm, under_way = self._comm, True
        while under_way:
            left = wait(fetches, SHOW_SECONDS).not_done
            failed = any(done.exception() for done in fetches if done not in left)
            with self._counting:
                came, self._came = self._came, 0
            everyone = comm.allgather_object((came, len(left), failed, comm.host))
            bar.update(sum(came for came, *_ in everyone))
            requests = [left for _, left, *_ in everyone]
            slowest = max(range(comm.size), key=requests.__getitem__)
            failures = [failed for *_, failed, _ in everyone]
            if under_way := any(requests) and not any(failures):
                host = everyone[slowest][3]
                bar.set_postfix_str(f"slowest: rank {slowest} on {host}", refresh=False)

    def _count(self, size: int) -> None:
        with self._counting:
            self._came += size

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
            file, start = self._position(move)
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
            assert self._repo is not None
            target = np.empty(run.stop - run.start, np.uint8)
            future = pool.submit(
                hub.fetch, self._repo, run.file, run.start, target, self._count
            )
            under_way.append((run, target, future))
        return under_way

    def _arrived(
        self, under_way: Sequence[tuple[_Run, np.ndarray, Future[None]]]
    ) -> dict[Move, np.ndarray]:
        """The bytes of each move that was fetched."""
        arrived = {}
        for run, target, future in under_way:
            try:
                future.result()
            except ValueError as error:
                raise ValueError(f"{error}{self._hint}") from error
            for move in run.moves:
                start, stop = self._start(move), self._stop(move)
                arrived[move] = target[start - run.start : stop - run.start]
        return arrived

    def _messages(
        self, moves: Sequence[Move], arrived: Mapping[Move, np.ndarray]
    ) -> list[np.ndarray]:
        """What this rank sends to each in a round: bytes, (n,) uint8."""
        to: list[list[np.ndarray]] = [[] for _ in range(self._comm.size)]
        for move in moves:
            if move.source == self._comm.rank:
                for target, spans in move.targets:
                    to[target].append(self._items(move, spans, arrived))
        nothing = np.empty(0, np.uint8)
        return [np.concatenate(parts) if parts else nothing for parts in to]

    def _sizes(self, moves: Sequence[Move]) -> list[int]:
        """How many bytes come from each in a round."""
        sizes = [0] * self._comm.size
        for move, spans in self._to_here(moves):
            sizes[move.source] += self._bytes(move, spans)
        return sizes

    def _write(self, moves: Sequence[Move], received: Sequence[np.ndarray]) -> None:
        """Write down what came in a round."""
        read = [0] * self._comm.size
        for move, spans in self._to_here(moves):
            start = read[move.source]
            read[move.source] += self._bytes(move, spans)
            data = received[move.source][start : read[move.source]]
            self._journal.write(
                *(move.name, move.axis, move.rows, spans, data), from_hub=move.from_hub
            )

    def _to_here(self, moves: Sequence[Move]) -> Iterator[tuple[Move, Spans]]:
        """The moves that have something for this rank, and which items."""
        for move in moves:
            for target, spans in move.targets:
                if target == self._comm.rank:
                    yield move, spans

    def _bytes(self, move: Move, spans: Spans) -> int:
        item_bytes = self._at_hub[move.name].tensor.seen_from(move.axis).item_bytes
        return move.rows.length * spans.length * item_bytes

    def _items(
        self, move: Move, spans: Spans, arrived: Mapping[Move, np.ndarray]
    ) -> np.ndarray:
        """Items `spans` of each row of a move, one row after the other: (n,) uint8."""
        if not move.from_hub:
            return self._tensors[move.name].items(move.axis, move.rows, spans)
        stack = self._at_hub[move.name].tensor.seen_from(move.axis)
        first, item = move.span.start, stack.item_bytes
        rows = np.lib.stride_tricks.as_strided(
            arrived[move],
            (move.rows.length, move.span.length * item),
            (stack.row_bytes, 1),
        )
        parts = [
            rows[:, (start - first) * item : (stop - first) * item]
            for start, stop in spans
        ]
        return np.concatenate(parts, axis=1).reshape(-1)
