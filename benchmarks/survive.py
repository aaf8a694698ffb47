"""Machines die while a server answers: what is lost, and how long it takes to go on.

In the lab: a server on five hosts, the model that ships in float32, clients that ask
all the while. A seeded die chooses faults, and each strikes when eight streams or more
are in mid-answer; with --each all kinds strike once, and some while prompts are read,
while nothing is asked, and while the ranks load. Then what was broken is mended, and
the host is taken in again. Every answer is compared with the one that the same request
got before anything was broken; the status is 1 where one is lost, or parts from that
and nothing explains it.

    launch/lab up --delay-ms 1
    launch/lab run python benchmarks/survive.py --hostfile hostfiles/studio5
"""

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

import httpx2
from serving import MODEL, Server, client, in_float32, served
from soak import NOT_TIED, Answer, counts, parting

ROOT = Path(__file__).parent.parent
LAB = ROOT / "launch" / "lab"

# A fault strikes when so many streams have got so many tokens.
STREAMS = 8
TOKENS = 3

# Prompts are being read so long after they were sent.
READING_SECONDS = 0.1

# A prompt of so many characters takes the ranks a while to read.
LONG_PROMPT = 300

# How long it may take until streams go on, and until a host is taken in again.
LIMIT_SECONDS = 300.0


def bodies() -> list[dict[str, Any]]:
    """Requests of all kinds, each with its path."""
    completion, chat = "/v1/completions", "/v1/chat/completions"
    tool = {
        "type": "function",
        "function": {
            "name": "look",
            "parameters": {
                "type": "object",
                "properties": {"where": {"type": "string", "maxLength": 60}},
                "required": ["where"],
            },
        },
    }
    tales = ["One day a dog", "The sun was warm", "A girl had a kite", "Tim was sad"]
    long = "Once upon a time there was a little mouse who lived in a big house. " * 6
    greedy, drawn = {"temperature": 0}, {"temperature": 1, "seed": 7}

    def said(text: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": text}]

    kinds: list[dict[str, Any]] = [
        *({"path": completion, "prompt": tale, **greedy} for tale in tales),
        *({"path": completion, "prompt": tale, **drawn} for tale in tales),
        {"path": completion, "prompt": long + "It said", **greedy},
        {"path": completion, "prompt": long + "Then", **drawn, "top_p": 0.9},
        {"path": completion, "prompt": "A cat", **drawn, "frequency_penalty": 0.5},
        {"path": completion, "prompt": "The end", **greedy, "stop": ["\n\n\n"]},
        {
            "path": chat,
            "messages": said("Tell me of a bird."),
            **drawn,
            "response_format": {
                "type": "json_schema",
                "json_schema": {
                    "name": "tale",
                    "schema": {
                        "type": "object",
                        "properties": {"tale": {"type": "string", "maxLength": 300}},
                        "required": ["tale"],
                    },
                },
            },
        },
        {
            "path": chat,
            "messages": said("Where is it?"),
            **greedy,
            "tools": [tool],
            "tool_choice": "required",
        },
    ]
    common = {"model": MODEL, "stream": True, "max_tokens": 120}
    for body in kinds:
        of_chat = {"logprobs": True, "top_logprobs": 2}
        body |= common | (of_chat if body["path"] == chat else {"logprobs": 2})
    return kinds


@dataclass
class Stream:
    """An answer as it comes."""

    answer: Answer = field(default_factory=lambda: Answer([], []))
    text: str = ""
    times: list[float] = field(default_factory=list)


async def ask(http: httpx2.AsyncClient, body: dict[str, Any], stream: Stream) -> None:
    """Ask, and follow the answer to its end.

    Raises: RuntimeError or httpx2.HTTPError if it has none.
    """
    path, body = body["path"], {k: v for k, v in body.items() if k != "path"}
    async with http.stream("POST", path, json=body) as response:
        response.raise_for_status()
        finish = None
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            content = json.loads(line[6:])
            if "error" in content:
                raise RuntimeError(str(content["error"]))
            for choice in content["choices"]:
                finish = choice.get("finish_reason") or finish
                _add(stream, choice)
        if finish is None:
            raise RuntimeError("the stream has no end")


def _add(stream: Stream, choice: dict[str, Any]) -> None:
    delta = choice.get("delta") or {}
    stream.text += choice.get("text") or delta.get("content") or ""
    for call in delta.get("tool_calls") or ():
        stream.text += call["function"].get("name") or ""
        stream.text += call["function"].get("arguments") or ""
    logprobs = choice.get("logprobs") or {}
    if "content" in logprobs:
        tokens = [entry["token"] for entry in logprobs["content"]]
        likeliest = [
            {other["token"]: other["logprob"] for other in entry["top_logprobs"]}
            for entry in logprobs["content"]
        ]
    else:
        tokens = logprobs.get("tokens") or []
        likeliest = logprobs.get("top_logprobs") or []
    stream.answer.tokens += tokens
    stream.answer.likeliest += likeliest
    if tokens:
        stream.times.append(time.monotonic())


@dataclass
class Load:
    """Clients that ask all the while: what is under way, and what has come of it."""

    url: str
    expected: list[tuple[dict[str, Any], Stream]]
    under_way: dict[int, Stream] = field(default_factory=dict)
    begun: int = 0
    right: int = 0
    lost: list[str] = field(default_factory=list)
    partings: list[tuple[str, str]] = field(default_factory=list)
    tokens: int = 0
    last_token: float = 0.0  # when it came, of the streams that have ended
    ready_at: float = 0.0  # when these ranks were ready
    may_ask: asyncio.Event = field(default_factory=asyncio.Event)

    async def client(self, number: int) -> None:
        """Ask until it is cancelled."""
        draw = random.Random(number)
        async with client(self.url) as http:
            while True:
                await self.may_ask.wait()
                await self.ask_one(http, number, *draw.choice(self.expected))

    async def ask_one(
        self,
        http: httpx2.AsyncClient,
        number: int,
        body: dict[str, Any],
        alone: Stream,
    ) -> None:
        """Ask once, and compare the answer with the one that it had `alone`."""
        stream = self.under_way[number] = Stream()
        self.begun += 1
        try:
            await ask(http, body, stream)
        except (RuntimeError, httpx2.HTTPError) as error:
            self.lost.append(f"{type(error).__name__}: {error}")
            await asyncio.sleep(1)
            return
        finally:
            del self.under_way[number]
        self.tokens += len(stream.answer.tokens)
        self.last_token = stream.times[-1]
        parted = parting(body, alone.answer, stream.answer)
        if parted is not None:
            self.partings.append(parted)
        elif stream.text != alone.text:
            self.partings.append((f"texts: {body}", NOT_TIED))
        else:
            self.right += 1

    async def read_long(self, http: httpx2.AsyncClient) -> None:
        """Ask what has a long prompt, all at once."""
        long = [x for x in self.expected if len(x[0].get("prompt", "")) > LONG_PROMPT]
        asked = enumerate(long * (STREAMS // len(long)))
        await asyncio.gather(*(self.ask_one(http, -1 - n, *one) for n, one in asked))

    def in_mid_answer(self, tokens: int = TOKENS) -> int:
        """How many streams have got so many tokens from the ranks that are there."""
        times = [s.times[-tokens:] for s in self.under_way.values()]
        return sum(len(t) == tokens and t[0] > self.ready_at for t in times)

    def has_token(self) -> bool:
        """Whether these ranks have given a token to any stream."""
        times = [s.times[-1] for s in self.under_way.values() if s.times]
        return max([*times, self.last_token]) > self.ready_at


def lab(*words: object) -> None:
    """Run launch/lab."""
    subprocess.run([str(LAB), *map(str, words)], check=True, capture_output=True)


def neighbours(host: int, hosts: int) -> tuple[str, str]:
    """The hosts on both sides in a ring, by name."""
    return f"studio{(host - 2) % hosts + 1}", f"studio{host % hosts + 1}"


def ranks_on(host: str) -> list[int]:
    """The processes of ranks on a host of the lab."""
    done = subprocess.run(["ip", "netns", "pids", host], capture_output=True, text=True)
    pids = []
    for pid in map(int, done.stdout.split()):
        with suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if b"mlxtp.serve.ranks" in words and b"python" in words[0]:
                pids.append(pid)
    return pids


def strike_ranks(host: str, number: int) -> None:
    """Send a signal to the ranks of a host."""
    for pid in ranks_on(host):
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def cut(host: str, hosts: int) -> None:
    """Cut both cables of a host."""
    for other in neighbours(int(host.removeprefix("studio")), hosts):
        lab("cut", host, other)


def restore(host: str, hosts: int) -> None:
    """Switch a host on, and give it its addresses on the cables."""
    lab("on", host)
    number = int(host.removeprefix("studio"))
    before, after = (n.removeprefix("studio") for n in neighbours(number, hosts))
    options = ["--ports", f"{before}=tb0,{after}=tb1", "--os", "linux", "--apply"]
    words = [sys.executable, ROOT / "launch" / "cables", number, hosts, *options]
    lab("run", "--on", host, *words)


# What strikes a host, and what mends it: of its name, and how many there are.
Act = Callable[[str, int], None]


def nothing(host: str, hosts: int) -> None:
    """Mend nothing."""


def isolate(host: str, hosts: int) -> None:
    """Cut a host off from the cables and from the Ethernet."""
    cut(host, hosts)
    lab("cut", "--ethernet", host)


def mend(host: str, hosts: int) -> None:
    """Mend all cables and Ethernets."""
    lab("mend")


FAULTS: dict[str, tuple[Act, Act]] = {
    "killed": (lambda host, _: strike_ranks(host, signal.SIGKILL), nothing),
    "stopped": (lambda host, _: strike_ranks(host, signal.SIGSTOP), nothing),
    "cables cut": (cut, mend),
    "cut off": (isolate, mend),
    "off": (lambda host, _: lab("off", host), restore),
    "one cable": (
        lambda host, hosts: lab(
            "cut", host, neighbours(int(host.removeprefix("studio")), hosts)[1]
        ),
        mend,
    ),
    "rank 0 killed": (lambda _, __: strike_ranks("studio1", signal.SIGKILL), nothing),
}

# Behind these no host may be missing, and a job follows that uses the cables again.
OF_CABLES = ("cables cut", "one cable")


@dataclass
class Seen:
    """What a fault did: seconds from the strike on."""

    fault: str
    hosts: str
    streams: int
    notice: float
    ready: float
    token: float
    back: float


async def state(http: httpx2.AsyncClient) -> dict[str, Any]:
    """What /cluster says."""
    with suppress(httpx2.HTTPError):
        content: dict[str, Any] = (await http.get("/cluster")).json()
        return content
    return {"state": "no answer", "words": "", "missing": {}, "ranks": []}


async def until(condition: Callable[[], Any], what: str) -> None:
    """Wait until a condition holds.

    Raises: RuntimeError if that takes too long.
    """
    limit = time.monotonic() + LIMIT_SECONDS
    while True:
        holds = condition()
        if asyncio.iscoroutine(holds):
            holds = await holds
        if holds:
            return
        if time.monotonic() > limit:
            raise RuntimeError(f"{what}: not within {LIMIT_SECONDS:g} s")
        await asyncio.sleep(0.05)


# When a fault strikes. "loading": the second host, while the ranks load without the
# first.
Moment = Literal["answering", "reading", "idle", "loading"]


@dataclass(frozen=True)
class Strike:
    """What strikes which hosts, and when."""

    fault: str
    hosts: list[str]
    moment: Moment = "answering"


# Each kind of fault, and each moment. The ranks that load after the idle ones have no
# prompts in their prefix cache, and have to read them. Without the cables of studio2
# and of studio5 the first host has none either.
EACH = [
    Strike("off", ["studio3", "studio5"], "loading"),
    Strike("cut off", ["studio4"]),
    Strike("one cable", ["studio3"]),
    Strike("rank 0 killed", ["studio1"]),
    Strike("cables cut", ["studio2", "studio5"], "loading"),
    Strike("stopped", ["studio3", "studio2"]),
    Strike("killed", ["studio5"], "idle"),
    Strike("killed", ["studio4"], "reading"),
]


async def strike(load: Load, one: Strike, count: int) -> Seen:
    """Wait for the moment, strike, wait until streams go on, and mend."""
    hosts, (hit, undo) = one.hosts, FAULTS[one.fault]
    again = one.moment == "loading"
    fault = one.fault if one.moment == "answering" else f"{one.fault}, {one.moment}"
    async with client(load.url) as http:
        reading: asyncio.Task[None] | None = None
        if one.moment in ("answering", "loading"):
            await until(
                lambda: load.in_mid_answer() >= STREAMS, "streams in mid-answer"
            )
        else:
            load.may_ask.clear()
            await until(lambda: not load.under_way, "nothing under way")
        if one.moment == "reading":
            reading = asyncio.create_task(load.read_long(http))
            await asyncio.sleep(READING_SECONDS)
            assert load.under_way and load.in_mid_answer(1) == 0, "tokens have come"
        streams, begun = load.in_mid_answer(), time.monotonic()

        def seconds() -> float:
            return time.monotonic() - begun

        async def is_in(*states: str) -> bool:
            return (await state(http))["state"] in states

        async def goes_on() -> bool:
            return "going on with" in (await state(http))["words"]

        async def lacks_cables_alone() -> bool:
            return one.fault in OF_CABLES and not (await state(http))["missing"]

        async def is_left() -> bool:
            return not await is_in("ready")

        for host in hosts[:1] if again else hosts:
            await asyncio.to_thread(hit, host, count)
        await until(lambda: is_in("recovering", "waiting"), f"{fault}: noticed")
        notice = seconds()
        if again:
            await until(goes_on, f"{fault}: a job without the first host")
            await asyncio.sleep(2)
            assert not await is_in("ready"), "the ranks have loaded already"
            for host in hosts[1:]:
                await asyncio.to_thread(hit, host, count)
        await until(lambda: is_in("ready"), f"{fault}: ready")
        ready, load.ready_at = seconds(), time.monotonic()
        load.may_ask.set()
        await until(load.has_token, f"{fault}: a token")
        token = seconds()
        is_to_end = await lacks_cables_alone()
        for host in hosts:
            await asyncio.to_thread(undo, host, count)
        if is_to_end:
            await until(is_left, f"{fault}: the cables are used again")

        async def is_whole() -> bool:
            now = await state(http)
            return (
                now["state"] == "ready"
                and not now["missing"]
                and len(now["ranks"]) == count
            )

        await until(is_whole, f"{fault}: all hosts")
        load.ready_at = time.monotonic()  # of the ranks of all hosts
        if reading is not None:
            await reading
        return Seen(fault, ", ".join(hosts), streams, notice, ready, token, seconds())


def each(part: str) -> list[Strike]:
    """Return part K/N of `EACH`."""
    number, count = map(int, part.split("/"))
    size = len(EACH) // count
    return EACH[(number - 1) * size : number * size]


def thrown(args: argparse.Namespace) -> Iterator[Strike]:
    """Throw the die for each fault."""
    die = random.Random(args.seed)
    others = [f"studio{n}" for n in range(2, args.hosts + 1)]
    for _ in range(args.faults):
        fault = die.choice(args.only)
        again = die.random() < args.second
        two = again or die.random() < args.two
        hosts = die.sample(others, 2 if two else 1)
        yield Strike(fault, hosts, "loading" if again else "answering")


async def run(server: Server, args: argparse.Namespace) -> dict[str, Any]:
    """Ask all once, then go on asking while faults strike."""
    expected = [(body, Stream()) for body in bodies()]
    async with client(server.url) as http:
        await asyncio.gather(*(ask(http, body, told) for body, told in expected))
    load = Load(server.url, expected)
    load.may_ask.set()
    clients = [asyncio.create_task(load.client(n)) for n in range(args.clients)]
    strikes = each(args.each) if args.each else list(thrown(args))
    seen = []
    try:
        for number, now in enumerate(strikes, 1):
            one = await strike(load, now, args.hosts)
            seen.append(one)
            print(
                f"{number:3} {one.fault:22}{one.hosts:18}{one.streams:3} streams"
                f"{one.notice:7.1f} s to notice{one.ready:7.1f} ready{one.token:7.1f} "
                f"a token{one.back:7.1f} all hosts",
                flush=True,
            )
        load.may_ask.clear()
        await until(lambda: not load.under_way, "answers at the end")
    finally:
        for task in clients:
            if task.done():
                task.result()
            task.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
    for words, why in load.partings:
        print(f"{why}: {words}")
    for words in load.lost:
        print(f"LOST: {words}")
    return {
        "faults": len(seen),
        "requests begun": load.begun,
        "ended right": load.right,
        "lost": len(load.lost),
        **counts(load.partings, load.tokens),
        "tokens": load.tokens,
        "seconds to notice": round(median(one.notice for one in seen), 2),
        "seconds until ready": round(median(one.ready - one.notice for one in seen), 2),
        "seconds until a token": round(
            median(one.token - one.ready for one in seen), 2
        ),
    }


def start_seconds(args: argparse.Namespace) -> float:
    """How long a server on one host fewer takes from its start to a first token."""
    with tempfile.NamedTemporaryFile("w", suffix=".hosts") as file:
        file.writelines(f"studio{n} slots=1\n" for n in range(1, args.hosts))
        file.flush()
        begun = time.monotonic()
        fewer = argparse.Namespace(**{**vars(args), "hostfile": file.name})
        with served("mlxtp", fewer):
            return time.monotonic() - begun


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hostfile", type=Path, required=True)
    parser.add_argument("--hosts", type=int, default=5, help="in the hostfile")
    parser.add_argument("--faults", type=int, default=30)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--seed", type=int, default=17)
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS))
    parser.add_argument(
        "--each",
        nargs="?",
        const="1/1",
        metavar="K/N",
        help="no die: all kinds once, or the K-th of N parts of them",
    )
    parser.add_argument("--two", type=float, default=0.1, help="two hosts at once")
    parser.add_argument("--second", type=float, default=0.1, help="one after another")
    parser.add_argument("--log", action="store_true", help="what the server says")
    args = parser.parse_args()
    args.ranks = None
    args.options = ["--rejoin", "now"]
    with tempfile.TemporaryDirectory() as temporary:
        args.folder = in_float32(Path(temporary) / "model")
        start = None if args.each else start_seconds(args)
        with served("mlxtp", args) as server:
            result = asyncio.run(run(server, args))
            if result["lost"] or args.log:
                print(server.said())
        result["status at the end"] = server.process.returncode
    if start is not None:
        recovery = result["seconds until ready"] + result["seconds until a token"]
        result["seconds of a start on one host fewer"] = round(start, 2)
        result["recovery / start"] = round(recovery / start, 2)
    for name, value in result.items():
        print(f"{name:40} {value}")
    print(json.dumps(result))
    wrong = ("lost", "of these without a tie", "of these too many")
    sys.exit(1 if any(result[name] for name in wrong) else 0)


if __name__ == "__main__":
    main()
