"""One job of the ranks after the other: when one ends by itself, the next goes on.

`Supervisor.run` is its whole life. After a loss the hosts are visited (`serve/hosts`),
a job starts on those that answer, and the front hands it all that is under way
(`serve/front/ranks`).
"""

import argparse
import asyncio
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlxtp.cluster import hostfile
from mlxtp.cluster.addresses import CABLES_VARIABLE
from mlxtp.cluster.allocation import Allocation
from mlxtp.cluster.job import (
    END_SECONDS,
    Job,
    JobError,
    Outcome,
    RunningJob,
    start_alone,
)
from mlxtp.serve import options
from mlxtp.serve.front.ranks import Generation, Ranks, State
from mlxtp.serve.hosts import OF_HOSTS, Hosts, Loss, lost_hosts
from mlxtp.serve.log import say, say_line
from mlxtp.serve.messages import FOLDER_VARIABLE, Event
from mlxtp.serve.next_job import NextJob

Future = asyncio.Future[Any]

# What every rank runs.
PROGRAM = (sys.executable, "-m", "mlxtp.serve.ranks")

# So many losses without a token between them end it.
MOST_LOSSES = 3

# The status of a program that has said itself what is wrong with what it was given: it
# is not to be started again (docs/serving.md).
MISTAKE = 2

# How long it may take until rank 0 comes: mpirun's daemons, Python and its imports, on
# a cold disk and a busy machine. What ranks do afterwards has limits of its own.
START_SECONDS = 300.0

# A job that was ready for so long counts like a token.
STEADY_SECONDS = 600.0

# When rank 0 has gone, how long mpirun may take to end the others and to say why.
LAST_WORDS_SECONDS = 3.0

# How often hosts that are missing are visited.
VISIT_EVERY_SECONDS = 5.0

# How often a job is tried again on hosts that it did not fit on.
TRY_AGAIN_SECONDS = 60.0


class Supervisor:
    """Runs one job of the ranks after the other.

    Args:
        args: the server's options.
        given: the hosts of a batch system, where that gives them.
        ranks: to which rank 0 of each job connects.
        name: how clients call the model.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        given: Allocation | None,
        ranks: Ranks,
        name: str,
    ) -> None:
        self._args, self._given, self._ranks, self._name = args, given, ranks, name
        file = args.hostfile
        self._hostfile = None if file is None else Path(file).read_bytes()
        self._hosts = Hosts({} if file is None else hostfile.read(file), str(file))
        self._next = NextJob(args, self._hosts)
        self._was_ready = False
        self._give_up_at: float | None = None  # while the model does not fit
        self._losses: list[Loss] = []  # without a token between them
        self._job: RunningJob | None = None
        self._ended: Future | None = None  # of the job that runs
        ranks.observers.append(self._observe)

    async def start(self) -> None:
        """Start a job on the hosts that take part, and print its line.

        Raises: JobError where there is no mpirun, or for a wrong number of ranks;
            OSError where a file cannot be written, or a process not be started.
        """
        args, hosts = self._args, self._hosts
        folder = await self._ranks.listen()
        os.environ[FOLDER_VARIABLE] = str(folder)
        command = [*PROGRAM, *options.ranks_arguments(self._next.arguments())]
        if args.ranks is None and args.hostfile is None and self._given is None:
            say_line(command)  # one rank needs no mpirun
            self._job = start_alone(command, stdin=subprocess.DEVNULL)
        else:
            job = Job(command, args.hostfile, args.ranks, verdict=True)
            file = folder / "hosts"
            if hosts.part != hosts.slots:
                file.write_text(hostfile.text(hosts.part))
                job = replace(job, hostfile=file, ranks=self._next.count())
            elif self._hostfile is not None and self._job is not None:
                # Who has edited the hostfile meanwhile means the next service.
                file.write_bytes(self._hostfile)
                job = replace(job, hostfile=file)
            with _cables(hosts.takes_cables):
                say_line(job.line())
                self._job = job.start(stdin=subprocess.DEVNULL)
        hosts.note(self._job.name)
        self._ended = asyncio.ensure_future(asyncio.to_thread(self._job.wait))

    async def run(self) -> int:
        """Let jobs follow each other; return the status when there is none to come."""
        looking = asyncio.create_task(self._hosts.look())
        try:
            loss = await self._until_it_ends()
            while True:
                await asyncio.wait([looking])
                if loss is None:
                    self._next.note_fitted()
                    await self._choose()
                elif self._is_the_last(loss):
                    self._ranks.lost(loss.words)
                    return self._status(loss)
                elif loss.is_refusal:
                    await self._make_it_fit(loss.words)
                else:
                    await self._choose(loss)
                loss = await self._follow()
        finally:
            looking.cancel()

    async def _follow(self) -> Loss | None:
        """Start a job that follows another, and wait for its end; None as there."""
        try:
            await self.start()
        except (JobError, OSError) as error:
            # A full disk may have room again, and mpirun be installed anew.
            await asyncio.sleep(VISIT_EVERY_SECONDS)
            return Loss(f"no job could be started: {error}")
        return await self._until_it_ends()

    def _status(self, last: Loss) -> int:
        """Return the status of the end: no MISTAKE of what was ready once."""
        return 1 if self._was_ready and last.status == MISTAKE else last.status

    async def end(self, second: Future) -> None:
        """End the job that runs: in order, else by a signal, else by force."""
        in_order = self._ranks.is_ready.is_set()  # ranks that load do not listen
        await self._ranks.close()
        self._ranks.lost("the server ends")
        if in_order:
            await first_of(self._running, second, timeout_seconds=END_SECONDS)
        await self._end_mpirun(END_SECONDS)

    @property
    def _running(self) -> Future:
        assert self._ended is not None
        return self._ended

    async def _end_mpirun(self, seconds: float) -> Outcome:
        """End the job by a signal, else by force."""
        assert self._job is not None
        if not self._running.done():
            self._job.process.terminate()
            await first_of(self._running, timeout_seconds=seconds)
        if not self._running.done():
            self._job.process.kill()
        # To be cancelled here is no reason to forget how the job ends.
        outcome: Outcome = await asyncio.shield(self._running)
        return outcome

    async def _until_it_ends(self) -> Loss | None:
        """Wait for the end of the job; None where it was ended for a larger one."""
        come = asyncio.create_task(self._ranks.has_come.wait())
        gone = asyncio.create_task(self._ranks.is_gone.wait())
        larger = asyncio.create_task(self._until_hosts_are_back())
        try:
            await first_of(self._running, come, timeout_seconds=START_SECONDS)
            is_late = not (come.done() or self._running.done())
            if come.done():
                await first_of(self._running, gone, larger)
            is_asked = larger.done() and not (gone.done() or self._running.done())
        finally:
            for task in (come, gone, larger):
                task.cancel()
        if is_asked:
            larger.result()
            self._ranks.end_job()
            await first_of(self._running, timeout_seconds=END_SECONDS)
        elif not is_late:
            await self._hear_last_words()
        outcome = await self._end_mpirun(LAST_WORDS_SECONDS)
        return None if is_asked else self._loss(outcome, is_late)

    async def _hear_last_words(self) -> None:
        """Let mpirun end the others, or a rank say why: it may not end by itself."""
        assert self._job is not None
        until = time.monotonic() + LAST_WORDS_SECONDS
        while not (
            self._running.done() or self._job.is_judged or time.monotonic() > until
        ):
            await first_of(self._running, timeout_seconds=0.1)

    async def _until_hosts_are_back(self) -> None:
        """Tell when the job is ready; return when a better one can take its place."""
        ranks, hosts, rejoin = self._ranks, self._hosts, self._args.rejoin
        await ranks.is_ready.wait()
        self._note_ready()
        steady_at = time.monotonic() + STEADY_SECONDS
        wanted = hostfile.by_rank(hosts.slots)[: self._args.ranks]
        while True:
            await asyncio.sleep(VISIT_EVERY_SECONDS)
            if time.monotonic() > steady_at:
                self._losses.clear()
            if hosts.is_whole or rejoin == "never" or ranks.is_draining:
                continue
            back = set(await hosts.returned()).intersection(wanted)
            ranks.missing = dict(hosts.missing)
            is_better = bool(back) or hosts.are_cables_back
            if is_better and (rejoin == "now" or not ranks.generations):
                return

    def _note_ready(self) -> None:
        """Note what the ranks say of themselves, and tell it."""
        ready, hosts = self._ranks.ready, self._hosts
        assert ready is not None
        self._was_ready, self._give_up_at = True, None
        self._next.note_ready()
        if ready.commit is not None:
            self._args.revision = ready.commit
        if not hosts.slots and self._given is not None:
            hosts.slots = dict(Counter(rank.host for rank in ready.ranks))
            hosts.part = dict(hosts.slots)
        count = len(ready.ranks)
        on_ranks = "one rank" if count == 1 else f"{count} ranks"
        if hosts.missing:
            on_ranks += f", without {', '.join(hosts.missing)}"
            self._ranks.words = f"ready on {on_ranks}"
        say(f"ready: {self._name} on {on_ranks}, {ready.context:,} tokens of context")
        for note in ready.notes:
            say(note)

    def _loss(self, outcome: Outcome, is_late: bool) -> Loss:
        verdict = outcome.verdict
        refusal = self._ranks.refusal
        # mpirun that misses a daemon ends with 0, before a rank can say who is lost.
        is_of_mpirun = verdict is None and outcome.status == 0
        if not is_of_mpirun and (verdict is None or verdict.why not in OF_HOSTS):
            self._ranks.suspect()
        if refusal is not None:
            words = refusal
        elif verdict is not None:
            words = verdict.sentence().removeprefix("mlxtp: ")
            words = words.removesuffix(": all ranks end")
        elif is_late:
            words = f"rank 0 has not come within {START_SECONDS:g} s"
        elif is_of_mpirun:
            words = "mpirun has lost a host"
        else:
            words = f"the ranks have ended with status {outcome.status}"
        hosts = lost_hosts(verdict, self._hosts.ranks)
        return Loss(
            words,
            hosts,
            outcome.status or 1,
            is_of_ranks=verdict is not None or is_of_mpirun,
            is_refusal=refusal is not None,
        )

    def _is_the_last(self, loss: Loss) -> bool:
        """Whether no job follows: a mistake at the start, or losses without an end."""
        if not self._was_ready and not loss.is_of_ranks:
            if loss.status != MISTAKE:  # else the ranks have said it themselves
                say(loss.words)
            return True
        if loss.is_refusal:
            return False
        self._losses.append(loss)
        self._ranks.losses += 1
        if len(self._losses) < MOST_LOSSES:
            return False
        say(f"{MOST_LOSSES} jobs in turn were lost without a token between them:")
        for each in self._losses:
            say(each.words)
        return True

    async def _choose(
        self, loss: Loss | None = None, *, takes_cables: bool = True
    ) -> None:
        """Decide who takes part in the next job, and tell it."""
        ranks, hosts = self._ranks, self._hosts
        state: State = "recovering" if self._give_up_at is None else "waiting"
        words = loss.words if loss else "what is back takes part again"
        ranks.recover(words, state)
        losses = self._losses if loss else ()
        before = set(hosts.part)
        await hosts.choose(losses, takes_cables=takes_cables)
        if not before.issuperset(hosts.part):
            self._next.note_grown()
        ranks.missing = dict(hosts.missing)
        if loss and hosts.missing:
            words = f"{', '.join(hosts.missing)} lost ({words})"
        words += (
            f": going on with {self._next.count()} ranks"
            if hosts.slots
            else ": going on"
        )
        say(words)
        for note in hosts.notes:
            say(note)
        ranks.recover(words, state)

    async def _make_it_fit(self, words: str) -> None:
        """Take another way to a job that fits, or wait until there are more hosts."""
        remedy = self._next.remedy()
        if remedy is None:
            await self._wait_for_hosts(words)
            return
        say(f"{words}: {remedy.words}")
        if remedy.of_hosts:
            await self._choose(takes_cables=remedy.takes_cables)
        else:
            self._ranks.recover(words)

    async def _wait_for_hosts(self, words: str) -> None:
        """Wait until hosts are back, or for a while; then decide who takes part."""
        ranks, hosts = self._ranks, self._hosts
        ranks.missing = dict(hosts.missing)
        lacking = ", ".join(f"{host} ({why})" for host, why in hosts.missing.items())
        words = f"{words}; missing: {lacking or 'no host'}"
        if self._give_up_at is None:
            say(f"{words}: waiting")
            self._give_up_at = time.monotonic() + self._args.give_up_seconds
        ranks.recover(words, "waiting")
        # What took the memory of a host that is there may go.
        try_again_at = time.monotonic() + TRY_AGAIN_SECONDS
        while time.monotonic() < try_again_at:
            await asyncio.sleep(VISIT_EVERY_SECONDS)
            if time.monotonic() > self._give_up_at:
                ranks.fail(words)
            if await hosts.returned():
                break
            ranks.missing = dict(hosts.missing)
        await self._choose()

    def _observe(self, generation: Generation, event: Event | None) -> None:
        if event is not None and event.tokens and not event.is_told_again:
            self._losses.clear()


@asynccontextmanager
async def supervised(
    args: argparse.Namespace,
    given: Allocation | None,
    ranks: Ranks,
    name: str,
    second: Future,
) -> AsyncIterator[asyncio.Task[int]]:
    """Let jobs follow each other in this block; give the task that returns the status.

    Arguments are those of `Supervisor`; when `second` is done, the end does not wait.
    No process is left behind.

    Raises: JobError where there is no mpirun, or for a wrong number of ranks.
    """
    supervisor = Supervisor(args, given, ranks, name)
    try:
        await supervisor.start()
    except OSError as error:
        raise JobError(f"no job could be started: {error}") from None
    supervising = asyncio.create_task(supervisor.run())
    try:
        yield supervising
    finally:
        supervising.cancel()
        await asyncio.wait([supervising])
        await supervisor.end(second)


@contextmanager
def _cables(are_used: bool) -> Iterator[None]:
    """Let what starts in this block leave the cables alone, if they are not used."""
    if are_used or CABLES_VARIABLE in os.environ:
        yield
        return
    os.environ[CABLES_VARIABLE] = "0"
    try:
        yield
    finally:
        del os.environ[CABLES_VARIABLE]


@contextmanager
def signals() -> Iterator[tuple[Future, Future]]:
    """Give two futures: of the first signal that asks for the end, and of the second.

    A signal that is ignored stays so: nohup lets a process outlive its terminal.
    """
    loop = asyncio.get_running_loop()
    first, second = loop.create_future(), loop.create_future()

    def note() -> None:
        if not first.done():
            first.set_result(None)
        elif not second.done():
            second.set_result(None)

    numbers = [
        number
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) != signal.SIG_IGN
    ]
    for number in numbers:
        loop.add_signal_handler(number, note)
    try:
        yield first, second
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


async def first_of(*futures: Future, timeout_seconds: float | None = None) -> None:
    """Wait until one of them is done, or for so long."""
    await asyncio.wait(
        futures, timeout=timeout_seconds, return_when=asyncio.FIRST_COMPLETED
    )
