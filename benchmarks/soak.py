"""Many clients for a while, some of which behave badly; `serve.py --soak` runs it."""

import asyncio
import json
import random
import time
from dataclasses import dataclass
from statistics import median
from typing import Any
from urllib.parse import urlsplit

import httpx2
import psutil
from serving import MODEL, Server, client, prompt

# How many different requests there are.
KINDS = 40
# One in so many clients behaves badly.
BAD = 8
# Log-probabilities that are as good as the same differ by less.
TIE = 1e-3
# What explains that two answers part: two tokens that are as good as tied, nothing, or
# a draw that falls just between two tokens.
TIED, NOT_TIED, SEED = "tied", "NOT TIED", "with a seed"
# Such a draw explains one parting in so many tokens, or a single one: it is rare, and
# with another seed answers part in the same way.
TOKENS_OF_SEED = 10_000
# Memory counts from here on.
WARM_SECONDS = 60.0

RUBBISH = (
    b"\x00\xff rubbish\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9\r\n\r\n{",
    b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 2\r\n\r\n{]",
    b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
)


@dataclass
class Answer:
    """The tokens of an answer, as text, and the likeliest two at each place."""

    tokens: list[str]
    likeliest: list[dict[str, float]]


def bodies() -> list[dict[str, Any]]:
    """Requests of unlike lengths: half of them greedy, half with a seed."""
    draw = random.Random(16)
    return [
        {
            "model": MODEL,
            "prompt": prompt(10**6 + kind, draw.choice([1, 5, 17, 64, 200])),
            "max_tokens": draw.randrange(8, 64),
            "logprobs": 2,
            **({"temperature": 0} if kind % 2 else {"temperature": 0.8, "seed": kind}),
        }
        for kind in range(KINDS)
    ]


async def ask(http: httpx2.AsyncClient, body: dict[str, Any], streams: bool) -> Answer:
    """Ask for a completion, whole or as it comes."""
    answer = Answer([], [])
    if not streams:
        response = await http.post("/v1/completions", json=body)
        response.raise_for_status()
        _add(answer, response.json())
        return answer
    body = {**body, "stream": True}
    async with http.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                _add(answer, json.loads(line[6:]))
    return answer


def _add(answer: Answer, content: dict[str, Any]) -> None:
    for choice in content["choices"]:
        if logprobs := choice.get("logprobs"):
            answer.tokens += logprobs["tokens"]
            answer.likeliest += logprobs["top_logprobs"]


def parting(
    body: dict[str, Any], alone: Answer, other: Answer
) -> tuple[str, str] | None:
    """Where two answers part, in words, and what explains it; None if they do not.

    Nothing does where the likeliest tokens are others, or not as likely: the ranks have
    read something else before, as where a token is doubled or missing.
    """
    if other.tokens == alone.tokens:
        return None
    pairs = zip(alone.tokens, other.tokens, strict=False)
    places = [place for place, (a, b) in enumerate(pairs) if a != b]
    if not places:
        lengths = f"{len(alone.tokens)} and {len(other.tokens)} tokens"
        return f"{lengths}, the shorter as the longer begins", NOT_TIED
    place = places[0]
    a, b = alone.tokens[place], other.tokens[place]
    here, there = alone.likeliest[place], other.likeliest[place]
    words = f"token {place}: {a!r} alone, {b!r} among others, scores {here} and {there}"
    seed = body["seed"] if body["temperature"] else None
    words = words if seed is None else f"seed {seed}, {words}"
    # Completions name the token that was drawn as well, which is not the same.
    both = here.keys() & there.keys()
    if len(both) < 2 or any(abs(here[x] - there[x]) >= TIE for x in both):
        return words, NOT_TIED
    if seed is not None:
        return words, SEED
    near = {a, b} <= both and abs(here[a] - here[b]) < TIE
    return words, TIED if near else NOT_TIED


def counts(partings: list[tuple[str, str]], tokens: int) -> dict[str, int]:
    """Count answers that part, by what explains them; in `tokens` of all answers."""
    seeds = sum(why == SEED for _, why in partings)
    return {
        "answers that part": len(partings),
        "of these without a tie": sum(why == NOT_TIED for _, why in partings),
        "of these with a seed": seeds,
        "of these too many": max(0, seeds - max(1, tokens // TOKENS_OF_SEED)),
    }


async def good_client(
    url: str, expected: list[tuple[dict[str, Any], Answer]], end: float, number: int
) -> tuple[int, list[tuple[str, str]]]:
    """Ask until the end; return the number of tokens, and where answers part."""
    draw, tokens, partings = random.Random(number), 0, []
    async with client(url) as http:
        while not tokens or time.monotonic() < end:
            body, alone = draw.choice(expected)
            answer = await ask(http, body, draw.random() < 0.5)
            tokens += len(answer.tokens)
            if (parted := parting(body, alone, answer)) is not None:
                partings.append(parted)
    return tokens, partings


async def bad_client(
    url: str, expected: list[tuple[dict[str, Any], Answer]], number: int
) -> None:
    """Hang up, stall, or send rubbish, until it is cancelled."""
    draw, address = random.Random(number), urlsplit(url)
    while True:
        body = {**draw.choice(expected)[0], "stream": True, "max_tokens": 500}
        content = json.dumps(body).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        head += b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        data = draw.choice([*RUBBISH, head % len(content) + content])
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        try:
            writer.write(data)
            if draw.random() < 0.5:
                await asyncio.wait_for(reader.read(200), 5)
            # Nothing is read meanwhile: a server must not wait for that.
            await asyncio.sleep(draw.choice([0.0, 0.3, 5.0]))
        except (OSError, TimeoutError):
            pass  # it hung up first, or waits for the rest
        finally:
            writer.transport.abort()


def processes(server: Server) -> list[psutil.Process]:
    """The server and what it has started on this machine."""
    front = psutil.Process(server.process.pid)
    return [front, *front.children(recursive=True)]


async def watch_memory(server: Server, begin: float, end: float) -> list[float]:
    """The bytes of all processes, once a second from `begin` to `end`."""
    sizes = []
    await asyncio.sleep(begin - time.monotonic())
    while not sizes or time.monotonic() < end:
        sizes.append(float(sum(p.memory_info().rss for p in processes(server))))
        await asyncio.sleep(1)
    return sizes


async def run(server: Server, clients: int, seconds: float) -> dict[str, Any]:
    """Ask alone, then all at once."""
    async with client(server.url) as http:
        expected = [(body, await ask(http, body, False)) for body in bodies()]
    end = time.monotonic() + seconds
    warm = end - seconds + min(WARM_SECONDS, seconds / 3)
    good = [n for n in range(clients) if n % BAD]
    bad = [n for n in range(clients) if not n % BAD]
    worse = [asyncio.create_task(bad_client(server.url, expected, n)) for n in bad]
    sizes, results = await asyncio.gather(
        watch_memory(server, warm, end),
        asyncio.gather(*(good_client(server.url, expected, end, n) for n in good)),
    )
    for task in worse:
        assert not task.done(), task.exception()
        task.cancel()
    await asyncio.gather(*worse, return_exceptions=True)
    partings = [parted for _, those in results for parted in those]
    for words, why in partings:
        print(f"{why}: {words}")
    tokens = sum(number for number, _ in results)
    minutes = [median(sizes[n : n + 60]) for n in range(0, len(sizes), 60)]
    return {
        "clients": clients,
        "bad ones among them": len(bad),
        "tokens": tokens,
        "tokens a second": round(tokens / seconds, 1),
        **counts(partings, tokens),
        "partings in 10,000 tokens": round(1e4 * len(partings) / max(tokens, 1), 3),
        "memory, most / median": round(max(sizes) / median(sizes), 3),
        "memory, least / median": round(min(sizes) / median(sizes), 3),
        "memory, medians of minutes / the first of these": [
            round(minute / minutes[0], 3) for minute in minutes
        ],
    }


def idle(server: Server, seconds: float) -> dict[str, Any]:
    """The part of a core that the busiest rank takes when nobody asks."""

    def used() -> dict[int, float]:
        return {
            p.pid: sum(p.cpu_times()[:2])
            for p in processes(server)
            if "mlxtp.serve.ranks" in p.cmdline() and "mpirun" not in p.name()
        }

    before = used()
    time.sleep(seconds)
    after = used()
    assert before and after.keys() == before.keys(), "the ranks are not the same"
    shares = [(after[pid] - before[pid]) / seconds for pid in before]
    return {"of a core, idle, the busiest rank": round(max(shares), 4)}


def soak(
    server: Server, clients: int, seconds: float, idle_seconds: float
) -> dict[str, Any]:
    """Load a server with clients for so long, then leave it idle.

    Returns: what was seen, by name.
    """
    result = asyncio.run(run(server, clients, seconds))
    if idle_seconds:
        time.sleep(5)  # those that stalled have gone
        result |= idle(server, idle_seconds)
    return result
