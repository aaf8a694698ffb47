"""Whether the job has to end: pure functions of what is known of the other ranks.

Nothing here sends, waits or reads a clock. Times are seconds of the monotonic clock.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mlxtp.cluster.verdict import CollectiveCall, RankOnHost, Verdict, Why
from mlxtp.comm.progress import Blocks, Wait

# How often a rank says that it lives: so often within the limit of silence, and at
# least once in so many seconds.
BEATS = 5
BEAT_SECONDS = 1.0

# A rank that has not been heard for so many beats is not heard at the moment.
UNHEARD_BEATS = 3

NO_BLOCKS = Blocks()


@dataclass
class Peer:
    """What is known of another rank.

    `heard` is when it was heard last, 0 before the first time. `gone`: its host says
    that nobody listens there any more. `left`: it said good-bye. `number` counts the
    collectives that its main thread has called, `begun` is the number of the last in
    MLX's graph that its native core has begun. `blocks` counts how it has left forward
    passes.
    """

    rank: int
    host: str
    heard: float = 0.0
    gone: bool = False
    left: bool = False
    number: int = 0
    begun: int = 0
    blocks: Blocks = NO_BLOCKS


@dataclass(frozen=True)
class ThisRank:
    """What this rank does.

    `number` counts the collectives that it has called, `last_call` is the last of
    them. `waits` are those in which its main thread and its native core are now.
    `limited_since` is since when waits have a limit, None while they have none.
    `blocks` counts how it has left forward passes. `is_connected`: it has made the
    first exchange with all others.
    """

    rank: int
    host: str
    number: int = 0
    last_call: CollectiveCall | None = None
    waits: Sequence[Wait] = ()
    limited_since: float | None = 0.0
    blocks: Blocks = NO_BLOCKS
    is_connected: bool = True

    def longest_wait(self) -> Wait | None:
        """Return the wait that has lasted longest: the one that counts."""
        return min(self.waits, key=lambda wait: wait.since, default=None)

    def collective(self) -> CollectiveCall | None:
        """Return what verdicts name: what it waits in, or else what it called last."""
        wait = self.longest_wait()
        return self.last_call if wait is None else wait.call()


@dataclass(frozen=True)
class Limits:
    """How long a rank may wait for the others, and how long it may be silent."""

    timeout_seconds: float
    silence_seconds: float

    @property
    def beat_seconds(self) -> float:
        """How often each rank says that it lives."""
        return min(BEAT_SECONDS, self.silence_seconds / BEATS)


def judge(
    peers: Sequence[Peer], now: float, limits: Limits, this: ThisRank
) -> Verdict | None:
    """Return why the job has to end, as this rank sees it; None if it goes on.

    It ends if a peer has been silent, or this rank has waited in a collective, for
    longer than its limit. In the first exchange silence's limit holds: all ranks are
    there, for MPI has started. A peer is missed only after it was heard once: one that
    was not heard then, though all ranks came through the exchange, lives behind a
    firewall.
    """
    silent = [
        peer
        for peer in peers
        if peer.heard and not peer.left and now - peer.heard > limits.silence_seconds
    ]
    if silent:
        return _verdict("silent", silent, limits, this)
    wait = this.longest_wait()
    if wait is None:
        return None
    if not this.is_connected:
        is_over = now - wait.since > limits.silence_seconds
        return _verdict("unconnected", [], limits, this) if is_over else None
    if not _is_over(wait.since, now, limits, this):
        return None
    if left := [peer for peer in peers if peer.left]:
        return _verdict("left", left, limits, this)
    if late := [peer for peer in peers if not _has_come(peer, wait)]:
        return _verdict("late", late, limits, this)
    return _verdict("undelivered", [], limits, this)


def _is_over(since: float, now: float, limits: Limits, this: ThisRank) -> bool:
    """Whether the limit of a wait that began at `since` is over."""
    if this.limited_since is None:
        return False
    return now - max(since, this.limited_since) > limits.timeout_seconds


def _has_come(peer: Peer, wait: Wait) -> bool:
    """Whether a peer has come to the collective that this rank waits in.

    In MLX's graph it may have called the collective long before.
    """
    return (peer.begun if wait.in_graph else peer.number) >= wait.number


def have_all_raised(peers: Sequence[Peer], this: ThisRank) -> bool:
    """Whether all ranks have raised as this rank has, after as many collectives."""
    return all(_has_raised(peer, this) for peer in peers)


def judge_raised(
    peers: Sequence[Peer],
    now: float,
    since: float,
    limits: Limits,
    this: ThisRank,
    error: str,
) -> Verdict | None:
    """Return the verdict where this rank has raised and another rank does not.

    `since` is when it raised `error`. Another rank does not if it went on: it has left
    the block, or has called a collective that this rank does not come to, in MLX's
    graph or out of it. It is waited for as long as the limit.
    """
    raised = [peer for peer in peers if _has_raised(peer, this)]
    went_on = any(
        peer.left or peer.number > this.number or peer.blocks.ended >= this.blocks.ended
        for peer in peers
        if peer not in raised
    )
    if went_on or _is_over(since, now, limits, this):
        ranks: list[Peer | ThisRank] = [*raised, this]
        ranks.sort(key=lambda rank: rank.rank)
        return replace(_verdict("raised", ranks, limits, this), error=error)
    return None


def _has_raised(peer: Peer, this: ThisRank) -> bool:
    """Whether a peer has raised as this rank has; it may have raised again since."""
    mine, theirs = this.blocks, peer.blocks
    if theirs.raised == mine.raised:
        return theirs.raised_at == mine.raised_at
    return theirs.raised > mine.raised


def reconsider(
    report: Verdict,
    peers: Sequence[Peer],
    now: float,
    limits: Limits,
    this: ThisRank,
) -> Verdict:
    """Correct what a higher rank reports by what this rank knows better.

    The higher rank may miss others because of a cable between them alone.
    """
    missed = tuple(lost for lost in report.lost if lost.rank != this.rank)
    if report.why != "silent" or not missed:
        return report
    if silent := unheard(peers, now, limits):
        return replace(report, lost=_places(silent))
    return replace(report, why="unreachable", lost=missed)


def judge_termination(
    peers: Sequence[Peer], asked: float, limits: Limits, this: ThisRank
) -> Verdict | None:
    """Return which ranks have died, after mpirun began to end this one.

    All peers were asked to answer at the time `asked`. The lowest rank that is alive
    says it, and None is for all others, and where nobody has died.
    """
    silent = [peer for peer in peers if peer.heard < asked and not peer.left]
    # A busy rank may be too slow to answer, but its host does not say it is gone.
    dead = [peer for peer in silent if peer.gone] or silent
    alive = [peer.rank for peer in peers if peer.heard >= asked]
    if not dead or this.rank > min(alive, default=this.rank):
        return None
    return _verdict("died", dead, limits, this)


def is_heard(peer: Peer, now: float, limits: Limits) -> bool:
    """Whether a peer has been heard lately."""
    return peer.heard > now - UNHEARD_BEATS * limits.beat_seconds


def unheard(peers: Sequence[Peer], now: float, limits: Limits) -> list[Peer]:
    """Return the peers that were there once and have not been heard lately."""
    known = [peer for peer in peers if peer.heard and not peer.left]
    return [peer for peer in known if not is_heard(peer, now, limits)]


def is_cut_off(peers: Sequence[Peer], now: float, limits: Limits) -> bool:
    """Whether it is rather this rank that is cut off than its peers."""
    return len(unheard(peers, now, limits)) > max(1, len(peers) / 2)


def failed(limits: Limits, this: ThisRank) -> Verdict:
    """Return the verdict of a rank that an exception ends."""
    return _verdict("failed", [this], limits, this)


def not_ended(limits: Limits, this: ThisRank) -> Verdict:
    """Return the verdict of a rank whose peers do not let it end."""
    return _verdict("not ended", [], limits, this)


def _verdict(
    why: Why, lost: Sequence[Peer | ThisRank], limits: Limits, this: ThisRank
) -> Verdict:
    reporter = RankOnHost(this.rank, this.host)
    is_silence = why in ("silent", "unconnected")
    seconds = limits.silence_seconds if is_silence else limits.timeout_seconds
    return Verdict(why, _places(lost), reporter, this.collective(), seconds)


def _places(ranks: Sequence[Peer | ThisRank]) -> tuple[RankOnHost, ...]:
    return tuple(RankOnHost(rank.rank, rank.host) for rank in ranks)
