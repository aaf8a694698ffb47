"""How an allreduce and an allgather are made out of sends and receives.

An allreduce is *one-shot* (everyone gets every part and adds them) or *two-shot*
(everyone adds one block, then gets the others' sums). Either way the parts are
added in rank order, so the result is the same to the bit on every rank and
whatever the algorithm. Under both lies one of the `gathers`.

For parts of n bytes on a ring of five, a cable carries in each direction 2n bytes
one-shot by the ring, 3n directly, and n two-shot by the ring, 3n/5 for the parts of
the blocks and 2n/5 for their sums. Fewer bytes would take adding on the way, which
changes the order of the sum.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np

from mlxtp.comm import choices
from mlxtp.comm.codec import GROUP_SIZE, Codec, Int8Codec, PlainCodec
from mlxtp.comm.gathers import DirectGather, Gather, RingGather, in_pieces
from mlxtp.comm.transports import MessageRequest, MessageTransport
from mlxtp.partition.shares import cut_axis

# Buffers and requests are kept for the sizes used last, up to so many bytes.
KEPT_BYTES = 256 * 1024 * 1024

FLOATS = {np.dtype(kind) for kind in ("f2", "f4", ml_dtypes.bfloat16)}


class OneShot:
    """Everyone gets every part and adds them.

    Shapes: x (size,) partial -> (size,) replicated.
    Communicates: one gather of the encoded part.
    """

    def __init__(
        self,
        transport: MessageTransport,
        gather: type[Gather],
        codec: Codec,
        size: int,
        dtype: np.dtype,
    ) -> None:
        self._rank = transport.rank
        self._codec = codec
        self._result = np.empty(size, dtype)
        self._gather = gather(transport, [codec.nbytes(size)] * transport.size)

    def start(self, x: np.ndarray) -> None:
        """Begin to send x (size,), which stays as it is until `finish`."""
        self._mine = self._codec.encode(x)
        self._gather.start(self._mine)

    def finish(self) -> np.ndarray:
        """Wait for the parts and return their sum (size,)."""
        self._gather.finish()
        parts = list(self._gather.parts)
        parts[self._rank] = self._mine
        self._codec.sum(parts, self._result)
        del self._mine
        return self._result

    def requests(self) -> list[MessageRequest]:
        """Return the persistent requests, which have to be freed in the end."""
        return self._gather.requests()


class TwoShot:
    """Everyone gets all parts of one block and adds them, then gathers the sums.

    Shapes: x (size,) partial -> (size,) replicated.
    Communicates: blocks of the encoded part, then a gather of the blocks' sums.
    """

    def __init__(
        self,
        transport: MessageTransport,
        gather: type[Gather],
        codec: Codec,
        size: int,
        dtype: np.dtype,
    ) -> None:
        self._transport = transport
        self._codec = codec
        ranks, rank = transport.size, transport.rank
        edges = [0]
        for _, stop in cut_axis(-(-size // GROUP_SIZE), [1] * ranks):
            edges.append(min(stop * GROUP_SIZE, size))
        self._blocks = list(pairwise(edges))
        sizes = [stop - start for start, stop in self._blocks]
        self._gather = gather(transport, [n * dtype.itemsize for n in sizes])
        self._result = self._gather.joined.view(dtype)
        self._sum = self._gather.parts[rank].view(dtype)
        self._parts = list(np.empty((ranks, codec.nbytes(sizes[rank])), np.uint8))
        self._peers = [(rank + 1 + i) % ranks for i in range(ranks - 1)]
        self._receives = [
            transport.prepare_receive(piece, peer, tag=peer)
            for peer in self._peers
            for piece in in_pieces(self._parts[peer])
        ]

    def start(self, x: np.ndarray) -> None:
        """Begin to send x (size,), which stays as it is until `finish`."""
        transport, rank = self._transport, self._transport.rank
        transport.start(self._receives)
        self._encoded = [self._codec.encode(x[low:high]) for low, high in self._blocks]
        self._sends = [
            transport.send(piece, peer, tag=rank)
            for peer in self._peers
            for piece in in_pieces(self._encoded[peer])
        ]

    def finish(self) -> np.ndarray:
        """Wait for the parts of this rank's block, gather and return the sums (size,).

        The second step begins here, so the others come no further before.
        """
        rank = self._transport.rank
        self._parts[rank] = self._encoded[rank]
        self._transport.wait([*self._receives, *self._sends])
        self._codec.sum(self._parts, self._sum)
        del self._encoded, self._sends
        self._gather.start(self._sum.view(np.uint8))
        self._gather.finish()
        return self._result

    def requests(self) -> list[MessageRequest]:
        """Return the persistent requests, which have to be freed in the end."""
        return [*self._receives, *self._gather.requests()]


Sum = OneShot | TwoShot

# What buffers are for: an algorithm and sizes.
Key = tuple[object, ...]

# The algorithms of an allreduce, by name.
ALGORITHMS: dict[str, tuple[type[OneShot] | type[TwoShot], type[Gather]]] = {
    "ring-one-shot": (OneShot, RingGather),
    "ring-two-shot": (TwoShot, RingGather),
    "direct-one-shot": (OneShot, DirectGather),
    "direct-two-shot": (TwoShot, DirectGather),
}
assert tuple(ALGORITHMS) == choices.ALGORITHMS


def algorithms(size: int, name: str = "auto") -> list[str]:
    """Return the algorithms that `name` admits with `size` ranks.

    "ring" admits both of the ring, "direct" both direct ones, "auto" all. On a ring
    of up to three ranks all are neighbours: the direct algorithms are its own.
    """
    if size <= 3:
        name = name.replace("ring", "direct")
        names = [known for known in ALGORITHMS if not known.startswith("ring")]
    else:
        names = list(ALGORITHMS)
    return [
        known
        for known in names
        if name in ("auto", known) or known.startswith(f"{name}-")
    ]


@dataclass(frozen=True, eq=False)
class StartedSum:
    """An allreduce that has been started: its buffers, and what they are kept under.

    `sent` is the memory that is being sent.
    """

    key: Key
    nbytes: int
    plan: Sum
    sent: np.ndarray


class Collectives:
    """Sums and gathers of arrays over all ranks, with buffers that are kept.

    What a call returns is overwritten by the next of its kind. Every rank starts and
    finishes the same collectives in the same order.
    """

    def __init__(self, transport: MessageTransport, wire: str = "plain") -> None:
        """`wire` is "plain", or "int8" to send floats with 8 bits (an experiment)."""
        self._transport = transport
        self._wire = wire
        # What is not in use, by what it is for; what was used last stands last.
        self._kept: OrderedDict[Key, list[_Kept]] = OrderedDict()
        self._kept_bytes = 0
        # MPI reads and writes their memory, whether or not anybody waits for them.
        self._started: set[StartedSum] = set()

    def allreduce(self, x: np.ndarray, algorithm: str) -> np.ndarray:
        """Sum `x` over ranks, by one of `ALGORITHMS`.

        Shapes: x (n,) partial -> (n,) replicated.
        """
        return self.finish_allreduce(self.start_allreduce(x, algorithm))

    def start_allreduce(self, x: np.ndarray, algorithm: str) -> StartedSum:
        """Begin an allreduce of x (n,), which stays as it is until it is finished."""
        kind, gather = ALGORITHMS[algorithm]

        def prepare() -> Sum:
            quantized = self._wire == "int8" and x.dtype in FLOATS
            codec = Int8Codec() if quantized else PlainCodec(x.dtype)
            return kind(self._transport, gather, codec, x.size, x.dtype)

        nbytes = x.nbytes * (self._transport.size + 1 if kind is OneShot else 2)
        key = (algorithm, x.size, x.dtype)
        plan = self._take(key, nbytes, prepare)
        started = StartedSum(key, nbytes, plan, x)
        self._started.add(started)
        plan.start(x)
        return started

    def finish_allreduce(self, started: StartedSum) -> np.ndarray:
        """Wait for an allreduce that was started and return the sum (n,)."""
        total = started.plan.finish()
        self._started.remove(started)
        self._keep(started.key, started.nbytes, started.plan)
        return total

    def allgather(
        self, x: np.ndarray, counts: Sequence[int], algorithm: str
    ) -> np.ndarray:
        """Join the ranks' arrays in rank order, by the gather of `algorithm`.

        Shapes: x (counts[rank],) sharded -> (sum(counts),) replicated.
        """
        gather = ALGORITHMS[algorithm][1]
        sizes = [count * x.itemsize for count in counts]
        nbytes, key = sum(sizes), (gather, tuple(sizes))
        plan = self._take(key, nbytes, lambda: gather(self._transport, sizes))
        mine = x.view(np.uint8)
        plan.start(mine)
        plan.finish()
        plan.parts[self._transport.rank][:] = mine
        self._keep(key, nbytes, plan)
        return plan.joined.view(x.dtype)

    def _take(self, key: Key, nbytes: int, prepare: Callable[[], Any]) -> Any:
        """Take what is kept under `key`; prepare it where nothing is."""
        kept = self._kept.get(key)
        if kept is None:
            self._make_room(nbytes)
            return prepare()
        if len(kept) == 1:
            del self._kept[key]
        self._kept_bytes -= nbytes
        return kept.pop().plan

    def _keep(self, key: Key, nbytes: int, plan: Sum | Gather) -> None:
        """Keep what is not in use any more; it counts as used last."""
        self._make_room(nbytes)
        self._kept.setdefault(key, []).append(_Kept(nbytes, plan))
        self._kept.move_to_end(key)
        self._kept_bytes += nbytes

    def _make_room(self, nbytes: int) -> None:
        while self._kept and self._kept_bytes + nbytes > KEPT_BYTES:
            self._forget_oldest()

    def forget(self) -> None:
        """Give up all buffers and requests that are not in use."""
        while self._kept:
            self._forget_oldest()

    def _forget_oldest(self) -> None:
        _, oldest = self._kept.popitem(last=False)
        for kept in oldest:
            self._kept_bytes -= kept.nbytes
            self._transport.free(kept.plan.requests())


@dataclass(frozen=True)
class _Kept:
    nbytes: int
    plan: Sum | Gather
