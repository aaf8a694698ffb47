"""Which hosts take part in the next job of the ranks, and why others do not.

The rules stand first. A host takes part if it answers; the front's own does in any
case. Hosts that have never answered, as within a batch system's job, take part but
where the last job was lost with them. One with which the last jobs in turn were lost is
left out for a while, and one that comes back without what it had (a Mac that was
restarted has lost its addresses on the cables, and its GPU's limit), or with other
packages, is taken in when that is mended. Routes are laid past cables that do not
answer; a host that no way reaches does not take part. Where the routes cannot be laid,
or no way leads from the first host to another, all take the Ethernet; so they do where
the model does not fit on the hosts that are reached.
"""

import asyncio
import socket
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mlxtp.cluster import cables, reroute
from mlxtp.cluster.addresses import is_here, uses_cables
from mlxtp.cluster.allocation import Allocation
from mlxtp.cluster.cables import Cable
from mlxtp.cluster.hostfile import by_rank, read
from mlxtp.cluster.job import JobError
from mlxtp.cluster.remote import HostError
from mlxtp.cluster.verdict import Verdict
from mlxtp.cluster.visit import Visit, ask, versions, visit

# A host with which so many jobs in turn were lost is left out, for so long: until the
# next job has loaded and been ready for `supervisor.STEADY_SECONDS`, after which these
# losses do not count. Else one host that comes and goes would end an idle service.
LOSSES_OF_HOST = 2
LEFT_OUT_SECONDS = 1800.0

UNREACHED = "its cables do not answer"
LEFT_OUT = "the last jobs were lost with it"

# Cables that are back have to answer so many visits in a row, and twice as many each
# time they are used again: one that is loose would end job after job.
CABLE_VISITS, MOST_CABLE_VISITS = 3, 384

# Reasons for which a verdict names ranks that are not to blame, or none.
BLAMELESS = ("undelivered", "unconnected", "not started", "not ended")
# Reasons that no request can bring about: hosts and cables.
OF_HOSTS = ("silent", "unreachable", *BLAMELESS)


def check_first_host(file: str | None, given: Allocation | None) -> None:
    """Compare this machine with the host of rank 0, to which the front talks.

    Raises: JobError if it is another one, or there is no such hostfile.
    """
    if file is not None:
        try:
            first = by_rank(read(file))[0]
        except ValueError as error:
            raise JobError(str(error)) from None
        source = f"--hostfile {file}"
    elif given is not None:
        first, source = given.hosts[0], f"{given.system}'s hosts"
    else:
        return
    if not is_here(first):
        raise JobError(
            f"{source}: the first host is {first}, and this is {socket.gethostname()}: "
            "start the server on the first host"
        )


@dataclass(frozen=True)
class Loss:
    """A job that has ended by itself.

    `words` say why, `hosts` are those that it has lost, `status` is its exit status.
    `is_of_ranks`: ranks were lost, as a verdict says. `is_refusal`: the ranks say
    themselves what is wrong with what they were given.
    """

    words: str
    hosts: tuple[str, ...] = ()
    status: int = 1
    is_of_ranks: bool = True
    is_refusal: bool = False


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


def lacks(
    before: Visit | None, now: Visit, file: str, versions: dict[str, str]
) -> str | None:
    """Say what is wrong with a host that answers, and how that is mended.

    `before` is how it was when it was visited first, if it was; `versions` are those of
    the packages here.
    """
    for name, wanted in versions.items():
        if (there := now.versions.get(name)) != wanted:
            return (
                f"it has {name} {there}, and here it is {wanted}: launch/install {file}"
            )
    if before is None:
        return None
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


def _is_on_cables(hosts: int) -> bool:
    """Whether this host, the first, has its address and a cable to another."""
    if not uses_cables():
        return False
    there = cables.interfaces()
    return cables.host_address(1) in there and bool(cables.laid(1, hosts, there))


class Hosts:
    """The hosts of a service, and what is known of them.

    Args:
        slots: host -> ranks, in the order of ranks; the first is the front's own. Empty
            where all ranks are here.
        file: the hostfile, for what people are told.

    `part` are those that take part in the job, as `slots`; `missing` says why others
    do not. `notes` are for the log: how the cables are used where some are broken.
    """

    def __init__(self, slots: dict[str, int], file: str) -> None:
        self.slots, self.part = slots, dict(slots)
        self.missing: dict[str, str] = {}
        self.takes_cables = True  # where there are any
        self.notes: list[str] = []
        # Of hosts that were there when those of this job were chosen.
        self._broken: set[Cable] = set()
        self._seen_back = 0  # visits in a row
        self._cable_visits = CABLE_VISITS
        self._file = file
        self._versions = versions()
        self._on_cables = len(slots) > 1 and _is_on_cables(len(slots))
        self._jobs: list[str] = []
        self._before: dict[str, Visit] = {}  # as they were when the service began
        self._answered: set[str] = set()  # at any time
        self._left_out_until: dict[str, float] = {}
        self._last_lost: tuple[str, ...] = ()

    @property
    def ranks(self) -> list[str]:
        """The host of each rank."""
        return by_rank(self.part)

    @property
    def is_whole(self) -> bool:
        """Whether no host is missing, and no cable was broken."""
        return not self.missing and not self._broken

    @property
    def are_cables_back(self) -> bool:
        """Whether the next job does better, by cables that carry something again."""
        return self._seen_back >= self._cable_visits

    def note(self, job: str) -> None:
        """Note the name of a job that was started."""
        self._jobs.append(job)

    async def look(self) -> None:
        """See how the hosts are before anything is lost."""
        for host, seen in (await self._visits(self.slots or ["localhost"], [])).items():
            if isinstance(seen, Visit):
                self._before[host] = seen

    def leave_out(self, hosts: Iterable[str]) -> None:
        """Leave hosts out for a while."""
        until = time.monotonic() + LEFT_OUT_SECONDS
        self._left_out_until |= dict.fromkeys(hosts, until)

    def take_in_left_out(self) -> bool:
        """Let hosts take part again that were left out; say whether there are any."""
        self._left_out_until.clear()
        return LEFT_OUT in self.missing.values()

    async def choose(
        self, losses: Sequence[Loss], *, takes_cables: bool = True
    ) -> None:
        """Decide who takes part in the next job, behind these losses.

        What the jobs before have left is gone from the hosts that answer. Without
        cables all take the Ethernet, those too that no cable reaches.
        """
        self._last_lost = losses[-1].hosts if losses else ()
        self.leave_out(lost_in_turn(losses))
        if self.are_cables_back:
            self._cable_visits = min(2 * self._cable_visits, MOST_CABLE_VISITS)
        self._seen_back = 0
        visits = await self._visits(self.slots or ["localhost"], self._jobs)
        first = next(iter(self.slots), None)
        self.missing, self.notes, self.takes_cables = {}, [], takes_cables
        for host in self.slots:
            words = self._against(host, visits[host])
            if words is not None and host != first:
                self.missing[host] = words
        if self._on_cables:
            well = {h: v for h, v in visits.items() if h not in self.missing}
            laid, carrying = self._cables(well)
            there = {n for h, n in self._numbers().items() if h in well}
            self._broken = {x for x in laid - carrying if {*x} <= there}
            if takes_cables:
                await self._lay_routes(well, carrying)
        if not self.takes_cables:
            self.notes.append("all hosts take the Ethernet")
        self.part = {h: n for h, n in self.slots.items() if h not in self.missing}

    async def returned(self) -> list[str]:
        """Visit the hosts that are missing; return those that can take part again."""
        # The last job runs, and has left nothing.
        visits = await self._visits(self.missing, self._jobs[:-1])
        if self._on_cables:
            # Of each cable both ends have to be seen.
            visits |= await self._visits(self.slots.keys() - self.missing.keys(), [])
        words = {host: self._against(host, visits[host]) for host in self.missing}
        if self._on_cables:
            well = {h: v for h, v in visits.items() if words.get(h) is None}
            back = self._broken & self._cables(well)[1]
            # Where cables are not used at all, some of them may be of no help.
            needed = back if self.takes_cables else self._broken
            is_better = bool(back) and back == needed
            self._seen_back = self._seen_back + 1 if is_better else 0
            for host in self._unreached(well) if self.takes_cables else ():
                if host in self.missing:
                    words[host] = UNREACHED
        self.missing = {host: said or "it is back" for host, said in words.items()}
        return [host for host, said in words.items() if said is None]

    def _numbers(self) -> dict[str, int]:
        """The place of each host on the cables."""
        return {host: number for number, host in enumerate(self.slots, 1)}

    def _cables(
        self, visits: Mapping[str, Visit | str]
    ) -> tuple[set[Cable], set[Cable]]:
        """Return the cables that have addresses, and those that carry something.

        A cable carries something where each of its hosts hears the other.
        """
        laid: set[Cable] = set()
        heard: Counter[Cable] = Counter()
        for host, number in self._numbers().items():
            seen = visits.get(host)
            if isinstance(seen, Visit):
                laid |= {cables.between(number, other) for other in seen.cables}
                heard.update(cables.between(number, o) for o in seen.answering)
        return laid, {cable for cable, ends in heard.items() if ends == 2}

    def _unreached(self, visits: Mapping[str, Visit | str]) -> list[str]:
        """Return the hosts that no cables which carry something join with this one."""
        reached = cables.routes(1, self._cables(visits)[1])
        return [h for h, n in self._numbers().items() if n != 1 and n not in reached]

    async def _lay_routes(
        self, well: Mapping[str, Visit | str], carrying: set[Cable]
    ) -> None:
        """Lay the routes past the cables that do not answer."""
        numbers = self._numbers()
        unreached = [h for h in self._unreached(well) if h not in self.missing]
        part = [h for h in numbers if h not in self.missing and h not in unreached]
        if unreached and len(part) == 1:
            self.notes = [f"no cable leads from {part[0]} to another host"]
            self.takes_cables = False
            return

        def lay(host: str) -> str | None:
            place = [str(numbers[host]), str(len(numbers))]
            topology = f"--topology={cables.listed(carrying)}"
            words = ["mlxtp.cluster.reroute", *place, topology]
            try:
                said = ask(host, words, set(reroute.Outcome._fields))
            except HostError as error:
                return f"{host}: {error}"
            return f"{host}: {said['words']}" if said["routes"] == "refused" else None

        done = await asyncio.gather(*(asyncio.to_thread(lay, host) for host in part))
        refused = [words for words in done if words is not None]
        self.takes_cables = not refused
        if refused:
            self.notes = refused
            return
        self.missing |= dict.fromkeys(unreached, UNREACHED)
        if self._broken:
            words = ", ".join(map(str, sorted(self._broken)))
            self.notes = [f"the routes are laid past cable {words}"]

    def _against(self, host: str, seen: Visit | str) -> str | None:
        """Say why a host does not take part; None if it does."""
        before = self._before.get(host)
        if isinstance(seen, str):
            is_judged = host in self._answered or host in self._last_lost
            return f"it does not answer: {seen}" if is_judged else None
        if self._left_out_until.get(host, 0.0) > time.monotonic():
            return LEFT_OUT
        return lacks(before, seen, self._file, self._versions)

    async def _visits(
        self, hosts: Iterable[str], jobs: Sequence[str]
    ) -> dict[str, Visit | str]:
        """Visit hosts, all at once; of those that do not answer, why."""

        numbers = self._numbers()

        def visited(host: str) -> Visit | str:
            place = (numbers[host], len(numbers)) if self._on_cables else None
            try:
                return visit(host, jobs, place)
            except HostError as error:
                return str(error)

        names = list(hosts)
        tasks = [asyncio.to_thread(visited, host) for host in names]
        seen = dict(zip(names, await asyncio.gather(*tasks), strict=True))
        self._answered |= {h for h, each in seen.items() if isinstance(each, Visit)}
        return seen
