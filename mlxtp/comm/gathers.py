"""How every rank gets every rank's part: the allgathers under an allreduce.

ring     to both neighbours, which pass on: floor(N/2) hops, and every cable
         carries each part once in each direction at most
direct   to everyone at once: one hop on a mesh or a switch; on a ring the
         hosts between forward, so the far parts cross several cables

Several gathers may be under way at once. Every message is sent, and its receive
posted, in the same `start` or `finish`, and all ranks call these in the same order.
So messages with the same tag between two ranks never get mixed up.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np

from mlxtp.comm.transports import MessageRequest, MessageTransport

# Longer parts go as several messages; a transport sends one of this size at once.
PIECE_BYTES = 512 * 1024


class Gather(ABC):
    """Everyone's part to everyone (MPI's allgatherv): counts[rank] bytes each.

    `parts` are views of one buffer, `joined`, in rank order. A gather fills all but
    the rank's own.

    Shapes: parts[rank] (counts[rank],) uint8; joined (sum(counts),) uint8.
    """

    def __init__(self, transport: MessageTransport, counts: Sequence[int]) -> None:
        self.transport = transport
        self.counts = counts
        self.joined = np.empty(sum(counts), np.uint8)
        edges = pairwise(accumulate(counts, initial=0))
        self.parts = [self.joined[start:stop] for start, stop in edges]
        self.prepare()

    def prepare(self) -> None:  # noqa: B027 - a gather may need none
        """Make the persistent requests that every gather starts."""

    @abstractmethod
    def start(self, mine: np.ndarray) -> None:
        """Begin to send this rank's part; it stays as it is until `finish`.

        Shapes: mine (counts[rank],) uint8.
        """

    @abstractmethod
    def finish(self) -> None:
        """Wait until all parts are here and `mine` may change."""

    def requests(self) -> list[MessageRequest]:
        """Return the persistent requests, which have to be freed in the end."""
        return []


class DirectGather(Gather):
    """Send to everyone and receive from everyone, all at once."""

    def prepare(self) -> None:
        """Make a receive for each piece of each peer's part."""
        rank, size = self.transport.rank, self.transport.size
        # Beginning with the next rank, so that not all send to rank 0 first.
        self._peers = [(rank + 1 + i) % size for i in range(size - 1)]
        self._receives = [
            self.transport.prepare_receive(piece, peer, tag=peer)
            for peer in self._peers
            for piece in in_pieces(self.parts[peer])
        ]

    def start(self, mine: np.ndarray) -> None:
        """Post the receives and send this rank's part."""
        transport = self.transport
        transport.start(self._receives)
        self._sends = [
            transport.send(piece, peer, tag=transport.rank)
            for piece in in_pieces(mine)
            for peer in self._peers
        ]

    def finish(self) -> None:
        """Wait for all messages."""
        self.transport.wait([*self._receives, *self._sends])
        self._sends = []

    def requests(self) -> list[MessageRequest]:
        """Return the receives."""
        return self._receives


class RingGather(Gather):
    """Send to both neighbours, and pass on what comes from one to the other.

    For at least four ranks: with fewer all are neighbours. With an even number the
    part of the rank opposite comes in two halves, one from each side.
    """

    def prepare(self) -> None:
        """Make the receives, by hops, and the send that each is passed on as."""
        transport, size = self.transport, self.transport.size
        rank, hops = transport.rank, size // 2
        neighbours = (rank - 1) % size, (rank + 1) % size
        self._neighbours = neighbours
        self._receives: list[MessageRequest] = []
        self._forwards: list[MessageRequest | None] = []
        for hop in range(1, hops + 1):
            for side, step in enumerate((-1, 1)):
                origin = (rank + step * hop) % size
                further = self._pieces(origin, hop + 1, side) if hop < hops else {}
                for tag, piece in self._pieces(origin, hop, side).items():
                    self._receives.append(
                        transport.prepare_receive(piece, neighbours[side], tag)
                    )
                    self._forwards.append(
                        transport.prepare_send(further[tag], neighbours[1 - side], tag)
                        if tag in further
                        else None
                    )
            if hop == 1:
                self._first_hop = len(self._receives)

    def _pieces(self, origin: int, hop: int, side: int) -> dict[int, np.ndarray]:
        """What travels of a part on its `hop`th hop, coming from `side`, by tags."""
        part, size = self.parts[origin], self.transport.size
        start, stop = 0, part.size
        if 2 * hop == size:
            start, stop = (stop // 2, stop) if side else (0, stop // 2)
        return {
            2 * (size * number + origin) + side: part[max(start, low) : min(stop, high)]
            for number, (low, high) in enumerate(_cuts(part.size))
            if max(start, low) < min(stop, high)
        }

    def start(self, mine: np.ndarray) -> None:
        """Post the receives of the first hop and send this rank's part.

        What neighbours pass on they send in `finish`, so it is received there.
        """
        transport = self.transport
        transport.start(self._receives[: self._first_hop])
        self._sends = [
            transport.send(
                piece,
                self._neighbours[1 - side],
                2 * (transport.size * number + transport.rank) + side,
            )
            for number, piece in enumerate(in_pieces(mine))
            for side in (0, 1)
        ]

    def finish(self) -> None:
        """Pass on what comes until all parts are here."""
        transport = self.transport
        transport.start(self._receives[self._first_hop :])
        missing = len(self._receives)
        while missing:
            done = transport.wait_some(self._receives)
            missing -= len(done)
            forwards = [f for place in done if (f := self._forwards[place]) is not None]
            transport.start(forwards)
            self._sends += forwards
        transport.wait(self._sends)
        self._sends = []

    def requests(self) -> list[MessageRequest]:
        """Return the receives and the sends that pass on."""
        return [*self._receives, *filter(None, self._forwards)]


def in_pieces(part: np.ndarray) -> list[np.ndarray]:
    """Cut a part into messages that are short enough to be sent at once.

    Shapes: part (n,) -> views (at most `PIECE_BYTES`,).
    """
    return [part[start:stop] for start, stop in _cuts(part.size)]


def _cuts(size: int) -> list[tuple[int, int]]:
    return [
        (start, min(start + PIECE_BYTES, size)) for start in range(0, size, PIECE_BYTES)
    ]
