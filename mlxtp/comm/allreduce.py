"""How an allreduce and an allgather are made out of sends and receives.

An allreduce is *one-shot* (everyone gets every part and adds them) or *two-shot*
(everyone adds one block, then gets the others' sums). Either way the parts are
added in rank order, so the result is the same to the bit on every rank and
whatever the way. Under both lies one of the `gathers`; "mpi" collects the block of a
two-shot sum directly.

For parts of n bytes on a ring of five, a cable carries in each direction 2n bytes
one-shot by the ring, 3n directly, and n two-shot by the ring, 3n/5 for the parts of
the blocks and 2n/5 for their sums. Fewer bytes would take adding on the way, which
changes the order of the sum.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np

from mlxtp.comm.codec import GROUP_SIZE, Int8Wire, PlainWire, Wire
from mlxtp.comm.gathers import DirectGather, Gather, MPIGather, RingGather, in_pieces
from mlxtp.comm.transports import MessageTransport, Request
from mlxtp.partition.shares import cut_axis

# Buffers and requests are kept for the sizes used last, up to so many bytes.
KEPT_BYTES = 256 * 1024 * 1024

FLOATS = {np.dtype(kind) for kind in ("f2", "f4", ml_dtypes.bfloat16)}


class OneShot:
    """Everyone gets every part and adds them."""

    def __init__(
        self,
        transport: MessageTransport,
        gather: type[Gather],
        wire: Wire,
        size: int,
        dtype: np.dtype,
    ) -> None:
        self._rank = transport.rank
        self._wire = wire
        self._result = np.empty(size, dtype)
        self._gather = gather(transport, [wire.nbytes(size)] * transport.size)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        mine = self._wire.encode(x)
        self._gather(mine)
        parts = list(self._gather.parts)
        parts[self._rank] = mine
        self._wire.sum(parts, self._result)
        return self._result

    def requests(self) -> list[Request]:
        return self._gather.requests()


class TwoShot:
    """Everyone gets all parts of one block and adds them, then gathers the sums."""

    def __init__(
        self,
        transport: MessageTransport,
        gather: type[Gather],
        wire: Wire,
        size: int,
        dtype: np.dtype,
    ) -> None:
        self._transport = transport
        self._wire = wire
        ranks, rank = transport.size, transport.rank
        edges = [0]
        for _, stop in cut_axis(-(-size // GROUP_SIZE), [1] * ranks):
            edges.append(min(stop * GROUP_SIZE, size))
        self._blocks = list(pairwise(edges))
        sizes = [stop - start for start, stop in self._blocks]
        self._gather = gather(transport, [n * dtype.itemsize for n in sizes])
        self._result = self._gather.joined.view(dtype)
        self._sum = self._gather.parts[rank].view(dtype)
        self._parts = list(np.empty((ranks, wire.nbytes(sizes[rank])), np.uint8))
        self._peers = [(rank + 1 + i) % ranks for i in range(ranks - 1)]
        self._receives = [
            transport.prepare_receive(piece, peer, tag=peer)
            for peer in self._peers
            for piece in in_pieces(self._parts[peer])
        ]

    def __call__(self, x: np.ndarray) -> np.ndarray:
        transport, rank = self._transport, self._transport.rank
        transport.start(self._receives)
        blocks = [self._wire.encode(x[start:stop]) for start, stop in self._blocks]
        sends = [
            transport.send(piece, peer, tag=rank)
            for peer in self._peers
            for piece in in_pieces(blocks[peer])
        ]
        self._parts[rank] = blocks[rank]
        transport.wait([*self._receives, *sends])
        self._wire.sum(self._parts, self._sum)
        self._gather(self._sum.view(np.uint8))
        return self._result

    def requests(self) -> list[Request]:
        return [*self._receives, *self._gather.requests()]


Sum = OneShot | TwoShot

# The ways of an allreduce, by name.
WAYS: dict[str, tuple[type[OneShot] | type[TwoShot], type[Gather]]] = {
    "ring-one-shot": (OneShot, RingGather),
    "ring-two-shot": (TwoShot, RingGather),
    "direct-one-shot": (OneShot, DirectGather),
    "direct-two-shot": (TwoShot, DirectGather),
    "mpi-one-shot": (OneShot, MPIGather),
    "mpi-two-shot": (TwoShot, MPIGather),
}


def ways(size: int, name: str = "auto") -> list[str]:
    """The ways that `name` admits with `size` ranks; "ring" admits both of the ring.

    On a ring of up to three ranks all are neighbours: the direct ways are its own.
    """
    if size <= 3:
        name = name.replace("ring", "direct")
        names = [way for way in WAYS if not way.startswith("ring")]
    else:
        names = list(WAYS)
    return [way for way in names if name in ("auto", way) or way.startswith(f"{name}-")]


class Collectives:
    """Sums and gathers of arrays over all ranks, with buffers that are kept.

    What a call returns is overwritten by the next.
    """

    def __init__(self, transport: MessageTransport, wire: str = "plain") -> None:
        self._transport = transport
        self._wire = wire
        self._kept: OrderedDict[tuple[object, ...], Sum | Gather] = OrderedDict()
        self._kept_bytes: dict[tuple[object, ...], int] = {}

    def allreduce(self, x: np.ndarray, way: str) -> np.ndarray:
        """Sum `x` (n,) over ranks, in one of `WAYS`."""
        kind, gather = WAYS[way]

        def prepare() -> Sum:
            quantized = self._wire == "int8" and x.dtype in FLOATS
            wire = Int8Wire() if quantized else PlainWire(x.dtype)
            return kind(self._transport, gather, wire, x.size, x.dtype)

        nbytes = x.nbytes * (self._transport.size + 1 if kind is OneShot else 2)
        plan = self._plan((way, x.size, x.dtype), nbytes, prepare)
        return plan(x)

    def allgather(self, x: np.ndarray, counts: Sequence[int], way: str) -> np.ndarray:
        """Join every rank's `x` (counts[rank],) in rank order, as `way` gathers."""
        gather = WAYS[way][1]
        nbytes = [count * x.itemsize for count in counts]
        key = (gather, tuple(nbytes))
        plan = self._plan(key, sum(nbytes), lambda: gather(self._transport, nbytes))
        mine = x.view(np.uint8)
        plan(mine)
        plan.parts[self._transport.rank][:] = mine
        return plan.joined.view(x.dtype)

    def _plan(
        self, key: tuple[object, ...], nbytes: int, prepare: Callable[[], Any]
    ) -> Any:
        """What is kept under `key`; what was used longest ago makes room for it."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        while self._kept and sum(self._kept_bytes.values()) + nbytes > KEPT_BYTES:
            self._forget_oldest()
        self._kept[key] = prepare()
        self._kept_bytes[key] = nbytes
        return self._kept[key]

    def forget(self) -> None:
        """Give up all buffers and requests."""
        while self._kept:
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        oldest, plan = self._kept.popitem(last=False)
        del self._kept_bytes[oldest]
        self._transport.free(plan.requests())
