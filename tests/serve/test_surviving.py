"""The ranks end, and the answers go on: with ranks that have no model."""

import asyncio
import errno
import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from unittest.mock import Mock

import fake_ranks
import mlx.core as mx
import pytest
from life import FAKE, Server
from mlx_lm.sample_utils import make_logits_processors

from mlxtp import options as generate_options
from mlxtp.cluster import cables
from mlxtp.cluster import visit as visit_module
from mlxtp.cluster.cables import Cable
from mlxtp.cluster.job import JobError, Outcome
from mlxtp.cluster.remote import HostError
from mlxtp.cluster.verdict import RankOnHost, Verdict, Why
from mlxtp.cluster.visit import Visit, versions
from mlxtp.comm.errors import UsageError
from mlxtp.generation.drawing import Processors
from mlxtp.generation.settings import Settings
from mlxtp.generation.standard_input import text_of
from mlxtp.partition.shares import Share, Shares
from mlxtp.serve import hosts as hosts_module
from mlxtp.serve import messages, options, supervisor, survive
from mlxtp.serve.front.ranks import Ranks, Unavailable
from mlxtp.serve.hosts import (
    CABLE_VISITS,
    Hosts,
    Loss,
    lacks,
    lost_hosts,
    lost_in_turn,
)
from mlxtp.serve.log import say_line
from mlxtp.serve.messages import Event, Start

pytestmark = pytest.mark.once

# The first job serves; those that follow say that the model does not fit.
TOO_LARGE = f"""
import os, runpy, sys
is_first = not os.path.exists(sys.argv[1])
print(os.getpid(), file=open(sys.argv.pop(1), "a"))
sys.argv += [] if is_first else ["--refusal", "it does not fit: 8 GB are lacking"]
runpy.run_path({fake_ranks.__file__!r}, run_name="__main__")
"""

# The first job serves; those that follow end with the status of a mistake.
MISTAKEN = TOO_LARGE.replace("sys.argv +=", "is_first or sys.exit(2); sys.argv +=")


def texts(stream: str) -> str:
    """The text of a stream of completions."""
    events = [json.loads(line[6:]) for line in stream.splitlines() if "{" in line]
    assert not [event for event in events if "error" in event], events
    return "".join(choice["text"] for event in events for choice in event["choices"])


def test_streams_go_on_where_they_stopped(start, capfd) -> None:
    """Nothing is missing, doubled or different; requests that come meanwhile wait."""

    async def life() -> None:
        server: Server = start(FAKE, "--served-model-name", "stories")
        await server.is_ready()
        told = [
            asyncio.create_task(server.ask(f"wait: 0.5\nNo. {i}\nwait: 1\nmore"))
            for i in range(4)
        ]
        await asyncio.sleep(0.8)
        [first] = await server.ranks()
        os.kill(first, signal.SIGKILL)
        while (health := await server.get("/health")).status == 200:
            await asyncio.sleep(0.02)
        assert json.loads(health.text)["state"] == "recovering"
        late = asyncio.create_task(server.ask("late"))
        assert [texts((await task).text) for task in told] == [
            f"No. {i}\nmore" for i in range(4)
        ]
        assert texts((await late).text) == "late"
        await server.ranks(2)
        os.kill(os.getpid(), signal.SIGTERM)
        assert await server.end() == 0

    asyncio.run(life())
    said = capfd.readouterr().err
    assert "mlxtp.serve: the ranks have ended with status 137: going on\n" in said
    assert said.count("mlxtp.serve: ready: stories") == 2


def test_ranks_that_do_not_come_are_not_waited_for(start, monkeypatch, capfd) -> None:
    """As where a host is cut off before mpirun has started a rank."""
    monkeypatch.setattr(supervisor, "START_SECONDS", 0.5)

    async def life() -> None:
        note = "import sys; print(os.getpid(), file=open(sys.argv[1], 'a'))"
        server: Server = start(f"import os, time; {note}; time.sleep(1000)")
        assert await server.end() != 0

    asyncio.run(life())
    said = capfd.readouterr().err
    assert "mlxtp.serve: rank 0 has not come within 0.5 s\n" in said


def test_losses_without_a_token_between_them_end_it(start, capfd) -> None:
    async def life() -> None:
        server: Server = start(FAKE, "--served-model-name", "stories")
        await server.is_ready()
        answer = await server.ask("die:")
        assert "the ranks have ended with status 137" in answer.text
        assert await server.end() == 128 + signal.SIGKILL

    asyncio.run(life())
    said = capfd.readouterr().err
    assert said.count("the ranks have ended with status 137: going on") == 2
    assert said.endswith(
        "mlxtp.serve: 3 jobs in turn were lost without a token between them:\n"
        + 3 * "mlxtp.serve: the ranks have ended with status 137\n"
    )


def test_a_token_between_losses_counts(start) -> None:
    async def life() -> None:
        server: Server = start(FAKE, "--served-model-name", "stories")
        await server.is_ready()
        for _ in range(4):
            assert texts((await server.ask("a\nwait: 0.2\ndie:\nb")).text) == "a\nb"
        os.kill(os.getpid(), signal.SIGTERM)
        assert await server.end() == 0

    asyncio.run(life())


def test_requests_wait_for_hosts_and_get_an_error_at_last(
    start, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    monkeypatch.setattr(supervisor, "VISIT_EVERY_SECONDS", 0.5)

    async def life() -> None:
        server: Server = start(TOO_LARGE, "--give-up-seconds", "1")
        await server.is_ready()
        stream = asyncio.create_task(server.ask("a\nhang:"))
        await asyncio.sleep(0.3)
        [first] = await server.ranks()
        os.kill(first, signal.SIGKILL)
        while "does not fit" not in (await server.get("/health")).text:
            await asyncio.sleep(0.02)
        refused = await server.ask("new")
        assert refused.status == 503 and refused.headers["Retry-After"]
        assert "8 GB are lacking" in refused.text
        assert "8 GB are lacking" in (await stream).text
        os.kill(os.getpid(), signal.SIGTERM)
        assert await server.end() == 0

    asyncio.run(life())


@pytest.mark.parametrize("what", [messages.KEY_NAME, messages.SOCKET_NAME, "."])
def test_what_is_removed_from_temporary_files_is_made_anew(start, what: str) -> None:
    """As systems remove what nobody has read for days."""

    async def life() -> None:
        server: Server = start(FAKE, "--served-model-name", "stories")
        await server.is_ready()
        path = Path(os.environ[messages.FOLDER_VARIABLE]) / what
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
        assert texts((await server.ask("a\nwait: 0.2\ndie:\nb")).text) == "a\nb"
        os.kill(os.getpid(), signal.SIGTERM)
        assert await server.end() == 0

    asyncio.run(life())


def test_a_server_that_was_ready_may_be_started_again(start) -> None:
    """Status 2 would keep it from that (docs/serving.md), though ranks end with it."""

    async def life() -> None:
        server: Server = start(MISTAKEN, "--served-model-name", "stories")
        await server.is_ready()
        assert "the ranks have ended with status 2" in (await server.ask("die:")).text
        assert await server.end() == 1

    asyncio.run(life())


@pytest.mark.parametrize("slots", ["", " slots=2"])
def test_jobs_that_follow_take_the_hostfile_of_the_start(
    slots: str, start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd
) -> None:
    """Whoever edits it does so for the next start."""
    monkeypatch.setattr(hosts_module, "visit", lambda *_: Visit(None, None, versions()))
    file = tmp_path / "hosts"
    file.write_text(f"localhost{slots}\n")
    used = []  # what is in the hostfile of each job

    def note(line: list[str]) -> None:
        used.append(Path(line[line.index("-hostfile") + 1]).read_text())
        say_line(line)

    monkeypatch.setattr(supervisor, "say_line", note)

    async def life() -> None:
        server: Server = start(
            FAKE, "--hostfile", str(file), "--served-model-name", "stories"
        )
        await server.is_ready()
        file.write_text("no hostfile at all\n")
        assert texts((await server.ask("a\nwait: 0.2\ndie:\nb")).text) == "a\nb"
        os.kill(os.getpid(), signal.SIGTERM)
        assert await server.end() == 0

    asyncio.run(life())
    assert used == [f"localhost{slots}\n"] * 2
    first = capfd.readouterr().err.splitlines()[0]
    assert f" -hostfile {file} --map-by " in first  # what a person would type


@pytest.mark.parametrize(
    ("failures", "error"),
    [
        (1, OSError(errno.ENOSPC, "No space left on device")),
        (2, OSError(errno.ENOSPC, "No space left on device")),
        (2, JobError("there is no mpirun")),
    ],
)
def test_a_job_that_cannot_be_started_is_a_loss(
    failures: int, error: Exception, start, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    """It is tried again, and at last the server ends with words, and so do streams."""
    monkeypatch.setattr(supervisor, "VISIT_EVERY_SECONDS", 0.05)
    starts = [supervisor.start_alone, *[Mock(side_effect=error)] * failures]
    starts.append(supervisor.start_alone)
    monkeypatch.setattr(
        supervisor, "start_alone", lambda *words, **how: starts.pop(0)(*words, **how)
    )

    async def life() -> None:
        server: Server = start(FAKE, "--served-model-name", "stories")
        await server.is_ready()
        text = (await server.ask("a\nwait: 0.2\ndie:\nb")).text
        if failures == 2:
            assert f"no job could be started: {error}" in text
            assert await server.end() == 1
            return
        assert texts(text) == "a\nb"
        os.kill(os.getpid(), signal.SIGTERM)
        assert await server.end() == 0

    asyncio.run(life())
    said = capfd.readouterr().err
    assert f"mlxtp.serve: no job could be started: {error}: going on\n" in said
    assert "Traceback" not in said


def test_requests_are_not_blamed_for_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that is off may end mpirun, with 0; processes that crash, with more."""

    async def life() -> None:
        ranks = Ranks()
        supervised = supervisor.Supervisor(options.parse([]), None, ranks, "stories")
        suspect = Mock()
        monkeypatch.setattr(ranks, "suspect", suspect)
        off = supervised._loss(Outcome(0, None), False)
        assert off.is_of_ranks and not suspect.called
        assert off.words == "mpirun has lost a host" and off.status == 1
        crashed = supervised._loss(Outcome(139, None), False)
        assert not crashed.is_of_ranks and suspect.called
        await ranks.close()

    asyncio.run(life())


@pytest.mark.parametrize("is_judged", [False, True])
def test_who_has_said_why_is_not_listened_to(is_judged: bool, monkeypatch) -> None:
    """mpirun does not end by itself where a host is cut off."""
    monkeypatch.setattr(supervisor, "LAST_WORDS_SECONDS", 0.4)

    async def life() -> float:
        ranks = Ranks()
        supervised = supervisor.Supervisor(options.parse([]), None, ranks, "stories")
        supervised._job = Mock(is_judged=is_judged)
        supervised._ended = asyncio.get_running_loop().create_future()
        begun = time.monotonic()
        await supervised._hear_last_words()
        await ranks.close()
        return time.monotonic() - begun

    assert (asyncio.run(life()) < 0.3) == is_judged


def test_what_follows_from_a_verdict() -> None:
    def verdict(why: Why, *ranks: int) -> Verdict:
        lost = tuple(RankOnHost(rank, f"host{rank}.local") for rank in ranks)
        return Verdict(why, lost, RankOnHost(0, "host0.local"), None, 10.0)

    of_ranks = ["a", "b", "b", "c"]
    assert lost_hosts(verdict("died", 2, 1, 3), of_ranks) == ("b", "c")
    assert lost_hosts(verdict("silent", 0), of_ranks) == ("a",)
    assert lost_hosts(verdict("undelivered", 1), of_ranks) == ()
    assert lost_hosts(verdict("died", 7), of_ranks) == ()
    assert lost_hosts(None, of_ranks) == ()
    assert lost_in_turn([Loss("x", ("b",))]) == set()
    assert lost_in_turn([Loss("x", ("b",)), Loss("y", ("a", "b"))]) == {"b"}
    assert lost_in_turn([Loss("x", ("b",)), Loss("y", ())]) == set()


def test_what_a_host_lacks_that_is_back() -> None:
    here = {"mlx": "0.32.4"}
    before = Visit("10.89.0.3", 57344, here)

    def lacking(address: str | None, limit: int | None, mlx: str) -> str:
        now = Visit(address, limit, {"mlx": mlx})
        return lacks(before, now, "hosts", here) or ""

    assert lacking("10.89.0.3", 57344, "0.32.4") == ""
    assert "launch/cables hosts --apply" in lacking(None, 57344, "0.32.4")
    assert "launch/memory hosts --apply" in lacking("10.89.0.3", 0, "0.32.4")
    words = lacking("10.89.0.3", 57344, "0.33.0")
    assert "it has mlx 0.33.0, and here it is 0.32.4: launch/install hosts" in words
    on_linux = Visit(None, None, here)
    assert lacks(on_linux, on_linux, "hosts", here) is None
    assert lacks(None, on_linux, "hosts", here) is None


def test_who_takes_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who answers, but for whom jobs were lost with in turn; the first in any case."""
    away: set[str] = set()

    def visit(host: str, jobs: object, place: object) -> Visit:
        if host in away:
            raise HostError("no route")
        return Visit(None, None, versions())

    monkeypatch.setattr(hosts_module, "visit", visit)

    async def life() -> None:
        hosts = Hosts({"a": 1, "b": 2, "c": 1}, "hostfile")
        assert hosts.ranks == ["a", "b", "b", "c"]
        await hosts.look()
        await hosts.choose([Loss("x", ("b",))])
        assert hosts.part == hosts.slots and not hosts.missing
        away.update("ab")
        await hosts.choose([Loss("x", ("b",))])
        assert hosts.part == {"a": 1, "c": 1}
        assert hosts.missing == {"b": "it does not answer: no route"}
        assert await hosts.returned() == []
        away.clear()
        assert await hosts.returned() == ["b"]
        await hosts.choose([Loss("x", ("c",)), Loss("y", ("c",))])
        assert hosts.part == {"a": 1, "b": 2}
        assert await hosts.returned() == []
        monkeypatch.setattr(hosts_module.time, "monotonic", lambda: 1e9)
        assert await hosts.returned() == ["c"]

        # In a job of a batch system nobody may be let in from outside.
        away.update("bc")
        unvisited = Hosts({"a": 1, "b": 2, "c": 1}, "hostfile")
        await unvisited.look()
        await unvisited.choose([Loss("x", ("c",))])
        assert unvisited.part == {"a": 1, "b": 2}
        # One that was only too slow to answer at first is known from then on.
        away.clear()
        await unvisited.choose(())
        away.add("b")
        await unvisited.choose(())
        assert unvisited.part == {"a": 1, "c": 1}

    asyncio.run(life())


def test_what_a_job_is_told_that_follows_another() -> None:
    """Log-probabilities of a prompt are told once, and a request is admitted once."""

    async def life() -> None:
        ranks = Ranks()
        ranks.ready = fake_ranks.READY
        settings = Settings(max_tokens=8, seed=1, prompt_logprobs=0)
        generation = ranks.start(Start("a", [1, 2, 3, 4], settings))
        score = messages.TokenLogprob(1, "a", [97], -1.0)
        ranks._take(Event("a", admitted=True, cached=2))
        ranks._take(Event("a", prompt_logprobs=[None, score]))
        assert generation.again().settings == settings
        ranks._take(Event("a", admitted=True, cached=0))
        assert generation.cached == 2
        ranks._take(Event("a", prompt_logprobs=[None]))
        ranks._take(Event("a", prompt_logprobs=[score, score, score]))
        assert generation.told_logprobs == 4
        ranks._take(Event("a", tokens=[5, 6]))
        again = generation.again()
        assert again.settings.prompt_logprobs is None
        assert (again.prompt, again.generated) == ([1, 2, 3, 4], [5, 6])
        ranks.recover("a host is lost", "waiting")
        with pytest.raises(Unavailable, match="a host is lost"):
            ranks.start(Start("b", [1], settings))
        ranks._take(Event("a", finish="length"))
        told = [event async for event in generation]
        assert sum(len(event.prompt_logprobs or ()) for event in told) == 4
        await ranks.close()

    asyncio.run(life())


def test_a_text_survives(start, monkeypatch: pytest.MonkeyPatch, capsys, tmp_path):
    """`mlxtp.generate --survive`: the whole text, and once only."""
    pids = tmp_path / "pids"
    monkeypatch.setattr(supervisor, "PROGRAM", (sys.executable, "-c", FAKE, str(pids)))
    args = options.parse_survive(["--quiet", "--prompt", r"a\nwait: 0.2\ndie:\nb"])
    assert asyncio.run(survive.run(args, text_of(args.prompt, None))) == 0
    assert capsys.readouterr().out == "a\nb\n"
    assert pids.read_text().count("\n") == 2

    args = options.parse_survive(["--quiet", "--prompt", "die:"])
    assert (
        asyncio.run(survive.run(args, text_of(args.prompt, None)))
        == 128 + signal.SIGKILL
    )
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("most", "is_whole"), [("3", True), ("100", False)])
def test_a_text_that_is_cut_says_so(most: str, is_whole: bool, monkeypatch, capfd):
    """The ranks that are left have room for three tokens alone."""

    async def call(name: str, **arguments: object) -> dict[str, list[int]]:
        return {"tokens": [1]}

    async def life() -> bool:
        async with Ranks() as ranks:
            ranks.ready = fake_ranks.READY
            ranks.is_ready.set()
            monkeypatch.setattr(ranks, "call", call)
            args = options.parse_survive(["--quiet", "--max-tokens", most])
            answered = asyncio.create_task(survive.answered(args, ranks, "x"))
            while not ranks.generations:
                await asyncio.sleep(0)
            [name] = ranks.generations
            pieces = [("text", "abc")]
            event = Event(name, tokens=[1, 2, 3], pieces=pieces, finish="length")
            ranks._take(event)
            return await answered

    assert asyncio.run(life()) == is_whole
    out, said = capfd.readouterr()
    assert out == "abc\n" and ("cut behind 3 tokens" in said) != is_whole


def test_calls_that_may_have_ended_the_ranks(monkeypatch) -> None:
    """Are handed in once more, if their client is there; those of this job alone."""

    async def life() -> None:
        async with Ranks() as ranks:
            ranks.ready = fake_ranks.READY
            sent: list[int] = []
            is_there = True

            def send(message: messages.Message) -> bool:
                if is_there and isinstance(message, messages.Call):
                    sent.append(message.call)
                return is_there

            monkeypatch.setattr(ranks, "_send", send)
            bad, gone = (
                asyncio.create_task(ranks.call("chat", messages=[])) for _ in range(2)
            )
            await asyncio.sleep(0)
            assert sent == [0, 1]
            gone.cancel()
            for expected in ([0], [2]):
                ranks.suspect()  # rank 0 was at the first of those that it has
                is_there = False
                ranks.recover("rank 2 died")
                ranks.suspect()  # a job that was lost before it had the call
                ranks.recover("rank 2 died")
                sent.clear()
                is_there = True
                await asyncio.sleep(0)
                ranks._hand_in()
                assert sent == expected
                if expected == [0]:
                    good = asyncio.create_task(ranks.call("chat", messages=[]))
                    await asyncio.sleep(0)  # the one without a client left its room
                    await asyncio.sleep(0)
                    assert sent == [0, 2]
            with pytest.raises(Unavailable, match="lost 2 times in turn with it"):
                await bad
            ranks._hear(messages.Answer(2, {"tokens": [1]}))
            assert await good == {"tokens": [1]}

    asyncio.run(life())


def test_who_may_have_ended_the_ranks() -> None:
    """Who was worked on in each job that was lost, without a token; the last alone."""

    async def life() -> None:
        async with Ranks() as ranks:
            settings = Settings(max_tokens=8, seed=1)
            sent: list[str] = []

            def handed_in() -> list[str]:
                """What a new job is given at first."""
                sent.clear()
                ranks._hand_in()
                return list(sent)

            def lost(*at_work: str) -> None:
                for name in at_work:
                    ranks._take(Event(name, admitted=True))
                ranks.suspect()

            ranks.ready = fake_ranks.READY
            bad, good, late = (
                ranks.start(Start(name, [1, 2], settings))
                for name in ("bad", "good", "late")
            )

            def send(message: messages.Message) -> None:
                if isinstance(message, Start):
                    sent.append(message.id)

            ranks._send = send  # type: ignore[method-assign]
            lost("bad", "good")
            assert handed_in() == ["bad", "good", "late"]
            handed_in()  # as where hosts are taken in again: nobody is to blame
            ranks._take(Event("good", tokens=[1]))
            lost("bad", "good")
            assert [g.fruitless for g in (bad, good, late)] == [2, 0, 0]
            assert handed_in() == ["good", "late"]
            lost("good")  # once more, and nobody had worked on the one held back
            assert handed_in() == ["good", "late"] and bad.fruitless == 2
            ranks._take(Event("good", tokens=[1]))
            late.cancel()
            assert sent[-1] == "bad"
            lost("bad")
            assert handed_in() == ["good"]
            with pytest.raises(Unavailable, match="3 times in turn"):
                async for _ in bad:
                    pass

    asyncio.run(life())


def test_mistakes_of_a_text_that_is_to_survive(monkeypatch, tmp_path, capsys) -> None:
    argv = ["generate", "--prompt-file", str(tmp_path / "no")]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit, match="2"):
        survive.main()
    assert "error: --prompt-file: there is no file" in capsys.readouterr().err
    with pytest.raises(UsageError, match="unrecognized arguments: --prompt-cache-file"):
        options.parse_survive(["--prompt-cache-file", "x"])
    for seed in ("-1", str(2**64)):
        with pytest.raises(UsageError, match=f"--seed is {seed}: wanted from 0 to"):
            options.parse_survive(["--seed", seed])
    with pytest.raises(UsageError, match="--prompt and --prompt-file: give one"):
        options.parse_survive(["--prompt", "a", "--prompt-file", "b"])
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(JobError, match="starts mpirun itself"):
        options.parse_survive([])


def test_survival_is_an_option_of_generate(capsys) -> None:
    """Its beginning is, and where texts begin like options."""
    with pytest.raises(SystemExit, match="0"):
        generate_options.parse(["--help"])
    assert "--survive" in capsys.readouterr().out
    words = ["--prompt", "--what", "--surv", "--rejoin", "now", "--seed", "-1"]
    program = [sys.executable, "-m", "mlxtp.generate", *words]
    done = subprocess.run(program, capture_output=True, text=True, timeout=60)
    assert "error: --seed is -1: wanted from 0" in done.stderr and done.returncode == 2


def test_a_text_that_survives_is_penalized_like_another() -> None:
    """By mlx-lm's last 20 tokens, of which the prompt's last is the first."""
    usual = inspect.signature(make_logits_processors).parameters
    assert usual["repetition_context_size"].default == survive.REPETITION_CONTEXT
    prompt, answer = list(range(10)), list(range(10, 40))
    x = mx.random.normal((1, 64))
    for count in (0, 1, 18, 19, 20, 30):
        generated = answer[:count]
        settings = Settings(9, 0, repetition_penalty=1.3, repetition_context_size=20)
        ours = Processors(settings, [*prompt, *generated], generated)(x)
        [processor] = make_logits_processors(repetition_penalty=1.3)
        theirs = processor(mx.array([prompt[-1], *generated]), mx.array(x))
        assert mx.array_equal(ours, theirs), count


@pytest.mark.parametrize("said", ["{}", "[1]", '{"routes": "refused"}', "no JSON"])
def test_a_host_with_another_mlxtp_ends_nothing(
    said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it says has other fields, and it does not take part until that is mended."""
    monkeypatch.setattr(visit_module, "run_on", lambda *_, **__: f"warning\n{said}\n")

    async def life() -> None:
        hosts = Hosts({"a": 1, "b": 1}, "hostfile")
        await hosts.choose([Loss("x", ("b",))])
        words = "no JSON" if said == "no JSON" else "of another mlxtp: launch/install"
        assert words in hosts.missing["b"] and await hosts.returned() == []
        hosts._on_cables = True
        await hosts._lay_routes({}, set())
        assert not hosts.takes_cables and words in hosts.notes[0]

    asyncio.run(life())


def test_cables_that_do_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who no way reaches is missing until a cable answers; or all take the Ethernet."""
    there = cables.ring(5)
    broken: set[Cable] = set()
    deaf: set[tuple[int, int]] = set()  # a host, and the neighbour it does not hear
    says = {"routes": "as wanted", "words": ""}
    asked: list[list[str]] = []

    def visit(host: str, jobs: object, place: tuple[int, int]) -> Visit:
        own = cables.neighbours(place[0], there)
        answering = cables.neighbours(place[0], there - broken)
        heard = [k for k in answering if (place[0], k) not in deaf]
        return Visit(None, None, versions(), tuple(own), tuple(heard))

    def ask(host: str, words: list[str], names: object) -> dict[str, str]:
        asked.append([host, *words])
        return says

    monkeypatch.setattr(hosts_module, "visit", visit)
    monkeypatch.setattr(hosts_module, "ask", ask)

    async def life() -> None:
        nonlocal there
        hosts = Hosts(dict.fromkeys("abcde", 1), "hostfile")
        hosts._on_cables = True
        await hosts.look()
        broken.update({Cable(2, 3), Cable(3, 4)})
        await hosts.choose([Loss("x", ("c",))])
        assert hosts.missing == {"c": "its cables do not answer"}
        assert [words[0] for words in asked] == ["a", "b", "d", "e"]
        left = "--topology=1-2,1-5,4-5"
        assert asked[0][1:] == ["mlxtp.cluster.reroute", "1", "5", left]
        assert hosts.notes == ["the routes are laid past cable 2-3, 3-4"]
        assert await hosts.returned() == []
        broken.remove(Cable(2, 3))
        assert await hosts.returned() == ["c"]
        await hosts.choose(())
        assert hosts.part == hosts.slots
        # A cable that is mended is used again, though no host is missing.
        assert not hosts.is_whole
        assert await hosts.returned() == [] and not hosts.are_cables_back
        broken.clear()
        # It may be loose: it has to answer for a while, and longer the next time.
        for visits in range(CABLE_VISITS):
            assert not hosts.are_cables_back, visits
            assert await hosts.returned() == []
        assert hosts.are_cables_back
        await hosts.choose(())
        assert hosts.is_whole
        broken.add(Cable(3, 4))
        await hosts.choose(())
        broken.clear()
        for _ in range(CABLE_VISITS):
            await hosts.returned()
        assert not hosts.are_cables_back
        # Two hosts that hear each other alone.
        broken.update({Cable(1, 2), Cable(3, 4)})
        await hosts.choose(())
        assert list(hosts.missing) == ["b", "c"] and await hosts.returned() == []
        says["routes"], says["words"] = "refused", "no root"
        await hosts.choose(())
        assert hosts.part == hosts.slots and not hosts.takes_cables
        assert hosts.notes[-1] == "all hosts take the Ethernet"
        # In a mesh the same two are reached through others.
        there = cables.mesh(5)
        says["routes"] = "changed"
        asked.clear()
        await hosts.choose(())
        assert hosts.missing == {} and hosts.takes_cables
        left = cables.listed(there - broken)
        assert [words[-1] for words in asked] == [f"--topology={left}"] * 5
        assert hosts.notes == ["the routes are laid past cable 1-2, 3-4"]
        # A cable that carries one way only is none.
        deaf.add((5, 2))
        await hosts.choose(())
        assert hosts.notes == ["the routes are laid past cable 1-2, 2-5, 3-4"]
        # In a ring the first host itself is cut: it is not to go on alone.
        there = cables.ring(5)
        broken.clear()
        broken.update({Cable(1, 2), Cable(1, 5)})
        await hosts.choose([Loss("x", ("c",))])
        assert hosts.part == hosts.slots and not hosts.takes_cables
        ethernet = "all hosts take the Ethernet"
        assert hosts.notes == ["no cable leads from a to another host", ethernet]
        # Where none is used, some are of no help.
        broken.remove(Cable(1, 2))
        assert await hosts.returned() == [] and not hosts.are_cables_back
        broken.clear()
        for _ in range(2 * CABLE_VISITS):
            assert await hosts.returned() == []
        assert hosts.are_cables_back

    asyncio.run(life())


def test_a_draft_model_without_room_is_left_out() -> None:
    """Before shares change or hosts are waited for, and ngram stays."""

    async def arguments(*words: str) -> list[str]:
        ranks, args = Ranks(), options.parse([*words])
        supervised = supervisor.Supervisor(args, None, ranks, "stories")
        await supervised._make_it_fit("it does not fit")
        await ranks.close()
        assert args.draft_model == words[1]
        return options.ranks_arguments(supervised._next.arguments())

    how = ["--draft", "one", "--draft-rank", "1"]
    left = asyncio.run(arguments("--draft-model", "small", *how))
    assert not [word for word in left if "draft" in word]
    options.parse_ranks(left)


@asynccontextmanager
async def on_two_hosts() -> AsyncIterator[supervisor.Supervisor]:
    """A supervisor of hosts a and b, which waits for nobody."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hosts_module, "visit", lambda *_: Visit(None, None, versions()))
        patch.setattr(supervisor, "TRY_AGAIN_SECONDS", 0)
        async with Ranks() as ranks:
            args = options.parse(["--shares", "auto"])
            supervised = supervisor.Supervisor(args, None, ranks, "stories")
            supervised._hosts.slots = {"a": 1, "b": 1}
            yield supervised


@pytest.mark.parametrize("why", [hosts_module.UNREACHED, "it does not answer"])
def test_a_model_that_fits_on_all_hosts_takes_the_ethernet(why: str) -> None:
    """Hosts that no cable reaches are there all the same."""

    async def life() -> None:
        async with on_two_hosts() as supervised:
            hosts = supervised._hosts
            hosts.part, hosts.missing = {"a": 1}, {"b": why}
            await supervised._make_it_fit("it does not fit")
            assert hosts.part == hosts.slots
            assert hosts.takes_cables == (why != hosts_module.UNREACHED)

    asyncio.run(life())


def test_what_was_taken_in_and_does_not_fit_goes_again() -> None:
    """The hosts before fitted."""

    async def life() -> None:
        async with on_two_hosts() as supervised:
            hosts = supervised._hosts
            hosts.part, hosts.missing = {"a": 1}, {"b": "it does not answer"}
            supervised._next.note_fitted()
            await supervised._choose()
            assert hosts.part == hosts.slots
            await supervised._make_it_fit("it does not fit")
            assert hosts.part == {"a": 1}
            assert hosts.missing == {"b": hosts_module.LEFT_OUT}

    asyncio.run(life())


@pytest.mark.parametrize("what", ["a host", "cables"])
@pytest.mark.parametrize("rejoin", ["quiet", "now", "never"])
def test_when_what_is_back_takes_part_again(
    rejoin: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When no request is under way, at once, or not by itself."""
    monkeypatch.setattr(supervisor, "VISIT_EVERY_SECONDS", 0.01)

    async def life() -> None:
        async with on_two_hosts() as supervised:
            hosts, ranks = supervised._hosts, supervised._ranks
            supervised._args.rejoin = rejoin
            visits, is_back = 0, False

            async def returned() -> list[str]:
                nonlocal visits
                visits += 1
                if is_back and what == "cables":
                    hosts._seen_back = CABLE_VISITS
                return ["b"] if is_back and what == "a host" else []

            async def ends_job(expected: bool) -> bool:
                """Whether a better job is to follow: for a No that takes a while."""
                await asyncio.wait([waiting], timeout=20 if expected else 0.2)
                return waiting.done()

            monkeypatch.setattr(hosts, "returned", returned)
            if what == "cables":
                hosts._broken = {Cable(1, 2)}
            else:
                hosts.part, hosts.missing = {"a": 1}, {"b": "it does not answer"}
            waiting = asyncio.create_task(supervised._until_hosts_are_back())
            ranks._hear(fake_ranks.READY)
            ranks.start(Start("x", [1], Settings(max_tokens=8, seed=1)))
            assert not await ends_job(False)
            is_back, is_now = True, rejoin == "now"
            assert await ends_job(is_now) == is_now
            ranks._take(Event("x", finish="length"))
            is_at_last = rejoin != "never"
            assert await ends_job(is_at_last) == is_at_last
            assert bool(visits) == is_at_last
            waiting.cancel()

    asyncio.run(life())


@pytest.mark.parametrize("loss", [None, Loss("studio3 died", ("studio3",))])
def test_a_draft_model_has_another_try_with_more_hosts(loss: Loss | None) -> None:
    """However they come to take part."""

    async def life() -> None:
        async with on_two_hosts() as supervised:
            hosts, args = supervised._hosts, supervised._args
            args.draft_model = "small"
            hosts.part, hosts.missing = {"a": 1}, {"b": "it does not answer"}
            await supervised._make_it_fit("it does not fit")
            assert supervised._next.arguments().draft_model is None
            await supervised._choose(loss)
            assert hosts.part == hosts.slots
            assert supervised._next.arguments().draft_model == "small"

    asyncio.run(life())


def test_hosts_that_were_left_out_are_tried_before_all_wait() -> None:
    """Once: then they are left out until the model fits or their time is over."""

    async def life() -> None:
        async with on_two_hosts() as supervised:
            hosts = supervised._hosts
            for part in (hosts.slots, {"a": 1}):
                hosts.leave_out(["b"])
                hosts.part, hosts.missing = {"a": 1}, {"b": hosts_module.LEFT_OUT}
                await supervised._make_it_fit("it does not fit")
                assert hosts.part == part

    asyncio.run(life())


def test_a_host_that_was_left_out_is_taken_in_once(monkeypatch) -> None:
    """The losses that it was left out for do not count again."""
    now = 1e9
    monkeypatch.setattr(hosts_module.time, "monotonic", lambda: now)
    monkeypatch.setattr(
        hosts_module, "visit", lambda host, *_: Visit(None, None, versions())
    )

    async def life() -> None:
        nonlocal now
        hosts = Hosts({"a": 1, "b": 1}, "hostfile")
        await hosts.choose([Loss("x", ("b",)), Loss("y", ("b",))])
        assert hosts.part == {"a": 1} and await hosts.returned() == []
        now += supervisor.STEADY_SECONDS + 600  # these losses are forgotten before
        assert await hosts.returned() == []
        now += 1000
        assert await hosts.returned() == ["b"]
        await hosts.choose(())
        assert hosts.part == {"a": 1, "b": 1}

    asyncio.run(life())


@pytest.mark.parametrize(
    ("options_given", "part", "shares", "count"),
    [
        (["--shares", "4,3,2,1"], {"a": 1, "c": 1, "d": 1}, [4, 2, 1], 3),
        (["--ranks", "3", "--shares", "4,3,2"], {"a": 1, "c": 1, "d": 1}, [4, 2, 3], 3),
        (["--ranks", "3", "--shares", "4,3,2"], {"a": 1, "c": 1}, [4, 2], 2),
        (
            ["--shares", "queries=27,24,27,24"],
            {"a": 1, "c": 1, "d": 1},
            [Share(27, 1, 1), Share(27, 1, 1), Share(24, 1, 1)],
            3,
        ),
        (["--shares", "auto"], {"a": 1, "b": 1}, "auto", 2),
        ([], {"a": 1, "b": 1}, None, 2),
    ],
)
def test_ranks_and_shares_that_are_left(
    options_given, part, shares, count, tmp_path
) -> None:
    file = tmp_path / "hosts"
    file.write_text("".join(f"{host} slots=1\n" for host in "abcd"))
    args = options.parse(["--hostfile", str(file), *options_given])

    async def life() -> None:
        ranks = Ranks()
        supervised = supervisor.Supervisor(args, None, ranks, "stories")
        supervised._hosts.part = part
        left = Shares(shares) if isinstance(shares, list) else shares
        assert (supervised._next.arguments().shares, supervised._next.count()) == (
            left,
            count,
        )
        if left != "auto":
            await supervised._make_it_fit("it does not fit")
            assert supervised._next.arguments().shares == "auto"
        await ranks.close()

    asyncio.run(life())
