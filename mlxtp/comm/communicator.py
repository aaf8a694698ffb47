"""`Communicator`: what a rank knows of the others, and its collectives."""

import atexit
import pickle
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from types import TracebackType
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from mlxtp.comm import launcher
from mlxtp.comm.arithmetic import machines_differ
from mlxtp.comm.choices import (
    ALLREDUCES,
    BACKENDS,
    ON_LOSS,
    TIMEOUT_SECONDS,
    TRANSPORTS,
    WIRES,
)
from mlxtp.comm.eager import EagerCollectives
from mlxtp.comm.errors import RankLostError, UsageError
from mlxtp.comm.graph import GraphCollectives
from mlxtp.comm.heartbeat import Heartbeat
from mlxtp.comm.native.collectives import NativeCollectives
from mlxtp.comm.native.start import start as start_native
from mlxtp.comm.progress import Progress
from mlxtp.comm.request import Request
from mlxtp.comm.traffic import Traffic
from mlxtp.comm.transports import (
    MessageRequest,
    MessageTransport,
    connect,
    start_backend,
)
from mlxtp.comm.verdict import Limits

# No allreduce has it; MPI promises tags up to 32767.
EXCHANGE_TAG = 32767

# `Communicator.announce`: the tag, how much of an object the first message holds, and
# how long a rank sleeps at most before it looks again for it: while passes are made,
# and while nothing is to be done, which is to take less than a hundredth of a core.
ANNOUNCE_TAG = 32766
ANNOUNCE_BYTES = 4096
NAP_SECONDS = 50e-6
IDLE_NAP_SECONDS = 20e-3

T = TypeVar("T")

# State of the calls of one thread: `Communicator.dry_run`.
_DRY_RUNS: ContextVar[tuple["Communicator", ...]] = ContextVar("_DRY_RUNS", default=())


class Communicator:
    """The ranks of one job, each a process, numbered from 0 to `size` - 1.

    Every rank makes the same collective calls in the same order. The names say what
    is sent: a plain name (`allreduce`) takes MLX arrays, one that ends in `_object`
    any object that pickle can write, and one that begins with `i` is nonblocking and
    returns a `Request`. `exchange` alone takes bytes, as numpy arrays.

    Over "mpi" and MLX's backends, collectives on arrays are part of MLX's graph; over
    "mpi-eager" they evaluate their input. With one rank they return it as it is.

    `machines_differ` says whether chips or builds of MLX differ between ranks, and with
    them the last bits of what each rank computes for itself.
    """

    def __init__(
        self,
        control: MessageTransport | None = None,
        transport: str = "mpi",
        *,
        allreduce: str = "auto",
        wire: str = "plain",
        timeout_seconds: float = TIMEOUT_SECONDS,
        silence_seconds: float | None = None,
        measure: bool = True,
        heartbeat: bool = True,
        on_loss: str = "raise",
    ) -> None:
        """Join the ranks that `control` connects; without it, a world of size 1.

        Arguments, effects and errors are those of `world`.
        """
        self.rank = control.rank if control else 0
        self.size = control.size if control else 1
        self.host = socket.gethostname()
        self.traffic = Traffic()
        self.is_timed = True  # `traffic.seconds` counts what collectives take
        self.machines_differ = False
        self._control = control
        if control is None:
            return
        self._progress = Progress()
        self._announcing: list[MessageRequest] = []  # sends that may be under way
        self._heartbeat: Heartbeat | None = None
        if heartbeat:
            silence = timeout_seconds if silence_seconds is None else silence_seconds
            limits = Limits(timeout_seconds, silence)
            control.raise_if_lost = self._progress.raise_if_lost
            raises = on_loss == "raise"
            self._heartbeat = Heartbeat(control, self._progress, limits, raises=raises)
            sys.excepthook = self._end_all_ranks
        try:
            self._arrays = self._start(control, transport, allreduce, wire, measure)
            self.machines_differ = machines_differ(self)
        except RankLostError:
            control.abandon()  # else MPI would wait for the lost rank at the end
            raise
        self.is_timed = self._arrays.is_timed
        atexit.register(self._close)

    @classmethod
    def world(
        cls,
        transport: str = "mpi",
        *,
        allreduce: str = "auto",
        wire: str = "plain",
        timeout_seconds: float = TIMEOUT_SECONDS,
        silence_seconds: float | None = None,
        start_seconds: float | None = None,
        measure: bool = True,
        heartbeat: bool = True,
        on_loss: str = "raise",
    ) -> "Communicator":
        """Join all ranks that mpirun started; without mpirun, a world of size 1.

        With several ranks this changes the process:

        - It starts MPI, which is ended when Python exits.
        - It starts the thread of the heartbeat, and installs `sys.excepthook` and,
          where nothing handles SIGTERM yet, a handler of it. From then on an
          exception that nothing catches ends all ranks and is printed once, with rank
          and host; and a rank that is lost ends all others, or raises RankLostError.
        - Over MPI it measures the algorithms of an allreduce, for about a second.

        Args:
            transport: which collectives on arrays, of `choices.TRANSPORTS`.
            allreduce: the algorithm of an allreduce, as in `allreduce.ALGORITHMS`, or
                "ring" or "direct" for both of its kind; of several the fastest is
                taken for each size.
            wire: "plain", or "int8" to send activations with 8 bits, inexactly: an
                experiment, for which "mpi" takes the collectives of "mpi-eager".
            timeout_seconds: the longest that a rank may wait in one collective, or for
                the others to end.
            silence_seconds: the longest that a rank may not be heard; by default the
                same. A rank that computes or loads is heard all the while.
            start_seconds: the longest that MPI may take to start on all ranks; by
                default as long as `timeout_seconds`, and never less than 10 s.
            measure: False measures nothing. Of the algorithms that `allreduce` admits
                parts below 256 KiB then take a one-shot one and larger parts a
                two-shot one, direct before ring.
            heartbeat: False starts no thread and installs no hooks. Then nothing
                notices that a rank is lost, or ends the others where one fails; the
                limit for MPI to start remains.
            on_loss: "raise": where a rank is lost collectives raise RankLostError, and
                the process ends if none does within two seconds. "end": it ends.

        Raises:
            UsageError: for a name that does not exist, or if the transport is not
                available.
            RuntimeError: if mpirun and mpi4py belong to different MPIs.
        """
        _check_names(transport, allreduce, wire, on_loss)
        started = launcher.size()
        if started == 0:
            return cls()
        if start_seconds is None:
            start_seconds = timeout_seconds
        with launcher.limited_start(start_seconds):
            control = connect()
        if control.size != started:
            raise RuntimeError(
                f"mpirun started {started} ranks, {control} sees {control.size}: they "
                "belong to different MPI libraries; start with the mpirun of the "
                "environment that mpi4py is installed in"
            )
        if control.size == 1:
            return cls()
        return cls(
            control,
            transport,
            allreduce=allreduce,
            wire=wire,
            timeout_seconds=timeout_seconds,
            silence_seconds=silence_seconds,
            measure=measure,
            heartbeat=heartbeat,
            on_loss=on_loss,
        )

    def allreduce(self, x: mx.array, at: str = "") -> mx.array:
        """Sum `x` over ranks: in rank order, the same bits on every rank.

        `at` is the path of the layer, which messages name if a rank is lost.

        Shapes: x (...) partial -> (...) replicated, of the same dtype.
        Communicates: one allreduce of x.size elements.
        """
        if self._control is None or self in _DRY_RUNS.get():
            return x
        return self._arrays.allreduce(x, at)

    def iallreduce(self, x: mx.array, at: str = "") -> Request:
        """Start to sum `x` over ranks; the request's `wait` returns the sum.

        The sum has the same bits as that of `allreduce`. Other collectives may be
        started or made meanwhile, of the same size too. All ranks start and wait for
        the same requests in the same order. Over "mpi-eager" a rank that does not wait
        does not pass on either, so others may be held up until it does.

        Shapes: x (...) partial -> (...) replicated, of the same dtype.
        Communicates: one allreduce of x.size elements.
        """
        if self._control is None or self in _DRY_RUNS.get():
            alone = mx.reshape(x, x.shape)  # what changes x in place leaves it as it is
            return Request(lambda: alone)
        return self._arrays.iallreduce(x, at)

    @property
    def takes_turns(self) -> bool:
        """Whether what one computation sends travels while another computes."""
        return self._control is not None and self._arrays.takes_turns

    def take_turns(
        self, first: Callable[[], T], second: Callable[[], T]
    ) -> tuple[T, T]:
        """Make two computations whose collectives take turns; return what they return.

        Each puts what it computes into MLX's graph, one after the other, so that the
        results are those of two plain calls, to the bit. Then the first collective of
        each is begun, the second of each, and so on: one computes while what the other
        has sent travels. Where the second needs what the first sends later, it waits.

        With one rank, in a dry run, and over "mpi-eager", whose collectives evaluate
        what they send, nothing travels meanwhile.

        Communicates: what the computations do.
        """
        if self._control is None or self in _DRY_RUNS.get():
            return first(), second()
        return self._arrays.take_turns(first, second)

    def allgather(self, x: mx.array, sizes: Sequence[int], at: str = "") -> mx.array:
        """Join the ranks' arrays along the last axis, in rank order.

        Shapes: x (..., sizes[rank]) sharded -> (..., sum(sizes)) replicated.
        Communicates: one allgather of x.size elements a rank.
        Raises: ValueError if `sizes` do not fit x or the number of ranks.
        """
        fits = len(sizes) == self.size and x.shape[-1:] == (sizes[self.rank],)
        if not fits or min(sizes) < 0:
            raise ValueError(
                f"allgather of x {x.shape} with sizes {list(sizes)}: wanted a size for "
                f"each of {self.size} ranks, for rank {self.rank} that of x's last axis"
            )
        if self._control is None:
            return x
        if self in _DRY_RUNS.get():
            return mx.zeros((*x.shape[:-1], sum(sizes)), x.dtype)
        return self._arrays.allgather(x, sizes, at)

    @contextmanager
    def dry_run(self) -> Iterator[None]:
        """Within it collectives on arrays send nothing and evaluate nothing.

        What they return has the right shape and dtype, and no other meaning. It holds
        for this thread's calls alone: other threads go on with true collectives.
        """
        token = _DRY_RUNS.set((*_DRY_RUNS.get(), self))
        try:
            yield
        finally:
            _DRY_RUNS.reset(token)

    def describe(self) -> str:
        """Tell how arrays are sent: the transport, and the measured algorithms."""
        if self._control is None:
            return "one rank: nothing travels"
        return f"{self.size} ranks over {self._arrays.over}\n{self._arrays}"

    def bcast(self, x: mx.array, root: int = 0, at: str = "") -> mx.array:
        """Give every rank the array of `root`: all give one of its shape and dtype.

        Shapes: x (...) -> (...) replicated, of the same dtype.
        Communicates: one broadcast of x.size elements.
        Raises: ValueError if there is no rank `root`.
        """
        if not 0 <= root < self.size:
            raise ValueError(f"bcast from root {root}: there are {self.size} ranks")
        if self._control is None or self in _DRY_RUNS.get():
            return x
        return self._arrays.bcast(x, root, at)

    def bcast_object(self, value: Any, root: int = 0) -> Any:
        """Give every rank the object of `root`."""
        if self._control is None:
            return value
        with self._in_python("bcast"):
            return self._control.bcast_object(value, root)

    def announce(self, value: Any, *, is_idle: bool = False) -> Any:
        """Give every rank the object of rank 0: `bcast_object` for small ones, often.

        A rank that waits sleeps in between, so that it leaves the cores to what is
        computed meanwhile. With `is_idle`, which all ranks give alike, it may wait for
        days: it takes next to nothing of a core, and no limit of time holds.
        """
        if self._control is None:
            return value
        with self.unlimited() if is_idle else nullcontext(), self._in_python("bcast"):
            return self._announced(self._control, value, is_idle)

    def _announced(self, control: MessageTransport, value: Any, is_idle: bool) -> Any:
        room = ANNOUNCE_BYTES - 8
        if self.rank == 0:
            control.wait_napping(self._announcing, NAP_SECONDS)  # the last one
            first = np.zeros(ANNOUNCE_BYTES, np.uint8)
            content = np.frombuffer(pickle.dumps(value), np.uint8)
            first[:8].view(np.int64)[0] = content.size
            first[8 : 8 + content.size] = content[:room]
            parts = [first, content[room:]] if content.size > room else [first]
            self._announcing = [
                control.send(part, to, ANNOUNCE_TAG)
                for to in range(1, self.size)
                for part in parts
            ]
            return value
        first = np.empty(ANNOUNCE_BYTES, np.uint8)
        self._receive(control, first, IDLE_NAP_SECONDS if is_idle else NAP_SECONDS)
        size = int(first[:8].view(np.int64)[0])
        rest = np.empty(max(size - room, 0), np.uint8)
        if rest.size:
            self._receive(control, rest, NAP_SECONDS)
        return pickle.loads(first[8 : 8 + min(size, room)].tobytes() + rest.tobytes())

    def _receive(
        self, control: MessageTransport, buffer: np.ndarray, nap_seconds: float
    ) -> None:
        """Receive one part of an announcement."""
        requests = [control.prepare_receive(buffer, 0, ANNOUNCE_TAG)]
        control.start(requests)
        control.wait_napping(requests, nap_seconds)
        control.free(requests)

    def allgather_object(self, value: Any) -> list[Any]:
        """Give every rank the object of every rank, in rank order."""
        if self._control is None:
            return [value]
        with self._in_python("allgather"):
            return self._control.allgather_object(value)

    def exchange(self, to: Sequence[np.ndarray], sizes: Sequence[int]) -> list[Any]:
        """Send each rank a message, and receive one of `sizes[rank]` bytes from each.

        (MPI's alltoallv.)

        Shapes: messages (n,) uint8; empty ones are not sent. Its own message comes
        back to a rank as it is.
        Communicates: one message to each other rank.
        """
        received = [np.empty(size, np.uint8) for size in sizes]
        received[self.rank] = to[self.rank]
        if self._control is None:
            return received
        with self._in_python("exchange"):
            others = [rank for rank in range(self.size) if rank != self.rank]
            receives = [
                self._control.prepare_receive(received[rank], rank, EXCHANGE_TAG)
                for rank in others
                if sizes[rank]
            ]
            self._control.start(receives)
            sends = [
                self._control.send(to[rank], rank, EXCHANGE_TAG)
                for rank in others
                if to[rank].size
            ]
            self._control.wait([*receives, *sends])
            self._control.free(receives)
        return received

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        if self._control is not None:
            with self._in_python("barrier"):
                self._control.barrier()

    def _in_python(self, name: str) -> AbstractContextManager[None]:
        """Note a collective of Python's for the block.

        What stands in the graph is begun first: another rank may have to wait for it
        before it comes here.
        """
        self._arrays.flush()
        return self._progress.collective(name)

    def unlimited(self) -> AbstractContextManager[None]:
        """Let the others take as long as they need in the block, to load, say.

        Ranks that die, stop or are cut off are noticed all the same.
        """
        return nullcontext() if self._control is None else self._progress.unlimited()

    @contextmanager
    def agreement(self) -> Iterator[None]:
        """Turn a mistake found on any rank into the same `UsageError` on all.

        For a block without collectives that checks what people gave us: what one
        rank alone sees (a file missing on its host) ends it on every rank.

        Communicates: one allgather of objects, at the end of the block.
        Raises: UsageError for a ValueError or OSError on any rank, with rank and
            host where not all ranks have the same.
        """
        mistake = None
        try:
            yield
        except (ValueError, OSError) as error:
            mistake = error
        mine = mistake and (str(mistake) or repr(mistake), self.host)
        reports = self.allgather_object(mine)
        reporting = [rank for rank, report in enumerate(reports) if report is not None]
        if not reporting:
            return
        message, host = reports[reporting[0]]
        if any(other is None or other[0] != message for other in reports):
            message = f"rank {reporting[0]} on {host}: {message}"
        raise UsageError(message) from mistake

    @contextmanager
    def raising_together(self) -> Iterator[None]:
        """Let an exception leave the block on all ranks or on none.

        For a block of collectives, as a forward pass is. A rank that raises waits until
        all others have raised in their block, after as many collectives; then the
        exception goes on its way. If another rank goes on instead, or none comes within
        the time limit, the job ends, and the message says which ranks raised what. A
        block that does not raise sends nothing. Without a heartbeat nothing is waited
        for.
        """
        try:
            yield
        except RankLostError:
            raise  # nobody is to be waited for
        except Exception as error:
            if self._control is not None and self not in _DRY_RUNS.get():
                self._progress.end_block(raised=True)
                if self._heartbeat is not None:
                    self._heartbeat.wait_until_all_raise(error)
            raise
        if self._control is not None and self not in _DRY_RUNS.get():
            self._progress.end_block(raised=False)

    def _start(
        self,
        control: MessageTransport,
        transport: str,
        allreduce: str,
        wire: str,
        measure: bool,
    ) -> NativeCollectives | EagerCollectives | GraphCollectives:
        """Start what makes the collectives on arrays."""
        counted = (control, self._progress, self.traffic)
        if transport in BACKENDS:
            try:
                backend = start_backend(transport, control)
            except ValueError as error:
                raise UsageError(str(error)) from error
            return GraphCollectives(backend, self._progress, self.traffic)
        if transport == "mpi" and wire == "plain":
            with self._progress.unlimited():  # a compiler may take long
                cores = start_native(control)
            if cores is not None:
                return NativeCollectives(
                    cores, *counted, allreduce=allreduce, measure=measure
                )
        return EagerCollectives(
            *counted, allreduce=allreduce, wire=wire, measure=measure
        )

    def _close(self) -> None:
        assert self._control is not None
        if self._progress.has_raised:
            self._control.abandon()
            return
        try:
            if not self._control.is_over():  # as after a mistake
                self._arrays.close()
        except Exception as error:
            if self._heartbeat is None:
                raise
            self._end_all_ranks(type(error), error, error.__traceback__)
        with self._heartbeat.finish() if self._heartbeat else nullcontext():
            self._control.close()

    def _end_all_ranks(
        self,
        kind: type[BaseException],
        error: BaseException,
        trace: TracebackType | None,
    ) -> None:
        """Print an exception and end every rank: the `sys.excepthook` of `world`."""
        assert self._heartbeat is not None
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, RankLostError):
                if cause is not error:
                    traceback.print_exception(kind, error, trace)
                self._heartbeat.end_lost(cause.verdict)
            cause = cause.__cause__ or cause.__context__
        # The others may have failed alike: the first to print ends them all.
        time.sleep(launcher.report_delay_seconds())
        self._heartbeat.fail("".join(traceback.format_exception(kind, error, trace)))


def _check_names(transport: str, allreduce: str, wire: str, on_loss: str) -> None:
    """Compare names with those that exist.

    Raises: UsageError, with what is wanted.
    """
    for what, name, known in (
        ("transport", transport, TRANSPORTS),
        ("allreduce", allreduce, ALLREDUCES),
        ("wire", wire, WIRES),
        ("on_loss", on_loss, ON_LOSS),
    ):
        if name not in known:
            raise UsageError(f"{what} {name!r}: wanted one of {', '.join(known)}")
