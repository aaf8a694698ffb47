"""Which hosts take part in the next job of the ranks, and why others do not.

The rules stand first. A host takes part if it answers; the front's own does in any
case. One with which the last jobs in turn were lost is left out for a while, and one
that comes back without what it had (a Mac that was restarted has lost its addresses on
the cables, and its GPU's limit) is taken in when that is mended.
"""

import asyncio
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mlxtp.cluster.hostfile import by_rank
from mlxtp.cluster.remote import HostError
from mlxtp.cluster.verdict import Verdict
from mlxtp.cluster.visit import Visit, visit

# A host with which so many jobs in turn were lost is left out, for so long.
LOSSES_OF_HOST = 2
LEFT_OUT_SECONDS = 300.0

# Reasons for which a verdict names ranks that are not to blame, or none.
BLAMELESS = ("undelivered", "unconnected", "not started", "not ended")


@dataclass(frozen=True)
class Loss:
    """A job that has ended by itself.

    `words` say why, `hosts` are those that it has lost, `status` is its exit status.
    `is_of_ranks`: ranks were lost, as a verdict says.
    """

    words: str
    hosts: tuple[str, ...] = ()
    status: int = 1
    is_of_ranks: bool = True


def lost_hosts(verdict: Verdict | None, ranks: Sequence[str]) -> tuple[str, ...]:
    """Return the hosts that a verdict blames; `ranks` has the host of each rank."""
    if verdict is None or verdict.why in BLAMELESS:
        return ()
    lost = [rank.rank for rank in verdict.lost if rank.rank < len(ranks)]
    return tuple(dict.fromkeys(ranks[rank] for rank in lost))


def lost_in_turn(losses: Sequence[Loss]) -> set[str]:
    """Return the hosts with which the last jobs in turn were lost."""
    last = [set(loss.hosts) for loss in losses[-LOSSES_OF_HOST:]]
    return set.intersection(*last) if len(last) == LOSSES_OF_HOST else set()


def lacks(before: Visit, now: Visit, file: str) -> str | None:
    """Say what a host has lost since it was visited first, and how that is mended."""
    if before.ring_address is not None and now.ring_address is None:
        return (
            f"it has lost its address on the cables, {before.ring_address}: "
            f"launch/cables {file} --apply"
        )
    if before.gpu_limit_mb != now.gpu_limit_mb:
        return (
            f"its GPU may take {now.gpu_limit_mb} MB, and it was "
            f"{before.gpu_limit_mb}: launch/memory {file} --apply"
        )
    return None


class Hosts:
    """The hosts of a service, and what is known of them.

    Args:
        slots: host -> ranks, in the order of ranks; the first is the front's own. Empty
            where all ranks are here.
        file: the hostfile, for what people are told.

    `part` are those that take part in the job, as `slots`; `missing` says why others
    do not.
    """

    def __init__(self, slots: dict[str, int], file: str) -> None:
        self.slots, self.part = slots, dict(slots)
        self.missing: dict[str, str] = {}
        self._file = file
        self._jobs: list[str] = []
        self._before: dict[str, Visit] = {}  # as they were when the service began
        self._left_out_until: dict[str, float] = {}

    @property
    def ranks(self) -> list[str]:
        """The host of each rank."""
        return by_rank(self.part)

    def note(self, job: str) -> None:
        """Note the name of a job that was started."""
        self._jobs.append(job)

    async def look(self) -> None:
        """See how the hosts are before anything is lost."""
        for host, seen in (await self._visits(self.slots or ["localhost"], [])).items():
            if isinstance(seen, Visit):
                self._before[host] = seen

    async def choose(self, losses: Sequence[Loss]) -> None:
        """Decide who takes part in the next job, behind these losses.

        What the jobs before have left is gone from the hosts that answer.
        """
        now = time.monotonic()
        for host in lost_in_turn(losses):
            self._left_out_until[host] = now + LEFT_OUT_SECONDS
        visits = await self._visits(self.slots or ["localhost"], self._jobs)
        first = next(iter(self.slots), None)
        self.missing = {}
        for host in self.slots:
            words = self._against(host, visits[host])
            if words is not None and host != first:
                self.missing[host] = words
        self.part = {h: n for h, n in self.slots.items() if h not in self.missing}

    async def returned(self) -> list[str]:
        """Visit the hosts that are missing; return those that can take part again."""
        visits = await self._visits(self.missing, self._jobs)
        back = []
        for host, seen in visits.items():
            words = self._against(host, seen)
            if words is None:
                back.append(host)
            self.missing[host] = words or "it is back"
        return back

    def _against(self, host: str, seen: Visit | str) -> str | None:
        """Say why a host does not take part; None if it does."""
        if isinstance(seen, str):
            return f"it does not answer: {seen}"
        if self._left_out_until.get(host, 0.0) > time.monotonic():
            return "the last jobs were lost with it"
        before = self._before.get(host)
        return lacks(before, seen, self._file) if before is not None else None

    async def _visits(
        self, hosts: Iterable[str], jobs: Sequence[str]
    ) -> dict[str, Visit | str]:
        """Visit hosts, all at once; of those that do not answer, why."""

        def visited(host: str) -> Visit | str:
            try:
                return visit(host, jobs)
            except HostError as error:
                return str(error)

        names = list(hosts)
        tasks = [asyncio.to_thread(visited, host) for host in names]
        return dict(zip(names, await asyncio.gather(*tasks), strict=True))
