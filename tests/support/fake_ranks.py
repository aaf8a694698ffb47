"""A rank 0 without a model: it speaks `serve/messages.py` and answers by a script.

A token is a byte of UTF-8, and `END` ends a text. What the last user message says, line
by line, is the answer:

    think: words         reasoning
    call: name {json}    a tool call
    wait: seconds        nothing for so long
    die:                 the ranks end by SIGKILL, but not where they go on behind it
    hang:                nothing, until the request is cancelled
    error: words         the request fails by the server's fault
    mistake: words       the request fails by its own
    seed:                the request's seed, as text
    any other line       text, as it stands

A prompt without messages is its own last user message. Where a grammar forces tool
calls, the first tool is called with no arguments, and where it forces JSON, `{}` is
the answer.

As a program it connects to the front that FOLDER_VARIABLE names:

    python tests/support/fake_ranks.py [--step-seconds S] [--loading-seconds S]
        [--refusal WORDS]
"""

import argparse
import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlxtp.serve import messages
from mlxtp.serve.messages import Event, Start, TokenLogprob

END = 256  # the token that ends a text
ROLES = ("system", "user", "assistant", "tool")

RANKS = [
    messages.Rank(
        rank=rank,
        host=f"studio{rank}",
        share=0.2,
        chip="Apple M3 Ultra",
        weights_bytes=9 << 30,
        cache_limit_bytes=100 << 30,
        memory_bytes=256 << 30,
    )
    for rank in range(5)
]

READY = messages.Ready(
    model="fake-model",
    context=4096,
    vocabulary=END + 1,
    defaults={},
    ranks=RANKS,
    has_template=True,
    has_tools=True,
    has_reasoning=True,
    is_batched=True,
    links="ring over TCP",
    reasoning_arguments=["enable_thinking", "reasoning_effort"],
)


def chat(
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None = None,
    template_arguments: dict[str, Any] | None = None,
    continue_final: bool = False,
) -> dict[str, Any]:
    """Render messages, each as <|role|>content and a line's end.

    `enable_thinking` in the template arguments begins the answer in its reasoning.
    """
    if "chat_template" in (template_arguments or {}):
        raise ValueError("chat_template_kwargs: chat_template cannot be set")
    text = f"<|tools|>{json.dumps(tools)}\n" if tools else ""
    boundaries = []
    for message in messages:
        if message["role"] not in ROLES:
            raise ValueError(f"the template knows no role {message['role']!r}")
        calls = message.get("tool_calls")
        text += f"<|{message['role']}|>{message.get('content') or ''}"
        text += (json.dumps(calls) if calls else "") + "\n"
        boundaries.append(len(text.encode()))
    if continue_final:
        text = text[:-1]
        boundaries.pop()
    else:
        text += "<|assistant|>"
    is_thinking = (template_arguments or {}).get("enable_thinking")
    return {
        "tokens": list(text.encode()),
        "boundaries": boundaries,
        "initial_state": "reasoning" if is_thinking else "normal",
    }


def text(text: str) -> dict[str, Any]:
    """Encode a text."""
    return {"tokens": list(text.encode())}


def tokens(tokens: list[int]) -> dict[str, Any]:
    """Check tokens."""
    for token in tokens:
        if not 0 <= token <= END:
            raise ValueError(f"token {token}: the model has tokens 0 to {END}")
    return {"tokens": tokens}


def tokenize(text: str, add_special_tokens: bool = True) -> dict[str, Any]:
    """Encode a text, and give each token's text."""
    encoded = list(text.encode())
    return {"tokens": encoded, "strings": [_text(token) for token in encoded]}


def detokenize(tokens: list[int]) -> dict[str, Any]:
    """Decode tokens."""
    known = globals()["tokens"](tokens)["tokens"]
    return {"text": bytes(t for t in known if t != END).decode(errors="replace")}


def decode_each(tokens: list[int]) -> dict[str, Any]:
    """Decode tokens one by one."""
    encoded = [[] if token == END else [token] for token in tokens]
    return {"texts": [_text(token) for token in tokens], "bytes": encoded}


def check_grammar(grammar: dict[str, Any]) -> dict[str, Any]:
    """Refuse a schema with the type "nonsense", and a grammar of no known kind."""
    if grammar["kind"] not in ("json", "schema", "tools", "regex", "lark"):
        raise ValueError(f"no grammar {grammar['kind']!r}")
    if grammar.get("schema", {}).get("type") == "nonsense":
        raise ValueError("a schema's type is not 'nonsense'")
    return {}


CALLS = {
    function.__name__: function
    for function in (
        chat,
        text,
        tokens,
        tokenize,
        detokenize,
        decode_each,
        check_grammar,
    )
}


def _text(token: int) -> str:
    return "" if token == END else bytes([token]).decode(errors="replace")


def _logprob(token: int, top: int = 0) -> TokenLogprob:
    """The log-probability of a token: it is always the likeliest."""
    others = [(token + i) % END for i in range(top)]
    return TokenLogprob(
        token,
        _text(token),
        [] if token == END else [token],
        -0.5,
        [
            TokenLogprob(other, _text(other), [other], -0.5 - i)
            for i, other in enumerate(others)
        ],
    )


def last_user_message(prompt: list[int]) -> str:
    """What the last user has said, or the prompt where nobody is named."""
    whole = bytes(token for token in prompt if token != END).decode(errors="replace")
    if "<|user|>" not in whole:
        return whole
    return whole.rpartition("<|user|>")[2].partition("\n<|")[0]


def script(start: Start) -> list[tuple[str, Any]]:
    """What is to be answered, in order: pieces, and "wait", "hang", "error", ..."""
    grammar = start.settings.grammar
    if grammar is not None and grammar["kind"] == "tools":
        function = grammar["tools"][0]["function"]
        return [("tool", {"name": function["name"], "arguments": "{}"})]
    if grammar is not None:
        return [("text", "{}")]
    steps: list[tuple[str, Any]] = []
    for line in last_user_message(start.prompt).splitlines(keepends=True):
        name, _, rest = line.partition(":")
        rest = rest.strip()
        if name == "call" and start.is_chat:
            function, _, arguments = rest.partition(" ")
            steps.append(("tool", {"name": function, "arguments": arguments or "{}"}))
        elif name == "think" and start.is_chat:
            steps.append(("reasoning", rest))
        elif name == "seed":
            steps.append(("text", str(start.settings.seed)))
        elif name == "wait":
            steps.append(("wait", float(rest)))
        elif name in ("hang", "error", "mistake", "die"):
            steps.append((name, rest))
        else:
            steps.append(("text", line))
    return steps


@dataclass
class FakeRanks:
    """A rank 0 that answers by the script; `running` requests go on at once.

    A call takes `call_seconds`. `starts`, `calls` and `cancelled` note what the front
    has asked for.
    """

    ready: messages.Ready = READY
    step_seconds: float = 0.0
    loading_seconds: float = 0.0
    call_seconds: float = 0.0
    running: int = 32
    refusal: str = ""
    starts: list[Start] = field(default_factory=list)
    calls: list[messages.Call] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    steps: int = 0

    async def run(self, folder: Path) -> None:
        """Serve a front until it says End, or has gone."""
        reader, writer = await asyncio.open_unix_connection(
            folder / messages.SOCKET_NAME, limit=messages.LONGEST_LINE
        )
        self._writer = writer
        self._room = asyncio.Semaphore(self.running)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._send(messages.Hello((folder / messages.KEY_NAME).read_text()))
        for part in range(10) if self.loading_seconds else ():
            self._send(messages.State("the ranks load the model", part / 10))
            await asyncio.sleep(self.loading_seconds / 10)
        if self.refusal:
            self._send(messages.Refused(self.refusal))
            await writer.drain()
            raise SystemExit(2)
        self._send(self.ready)
        telling = asyncio.create_task(self._tell_stats())
        try:
            while line := await reader.readline():
                message = messages.decoded(line)
                if isinstance(message, messages.End):
                    return
                self._hear(message)
        finally:
            for task in [telling, *self._tasks.values()]:
                task.cancel()
            writer.close()

    def _send(self, message: messages.Message) -> None:
        self._writer.write(messages.encoded(message))

    def _tell(self, start: Start, **changes: Any) -> None:
        self._send(messages.Events([Event(start.id, **changes)]))

    def _hear(self, message: messages.Message) -> None:
        match message:
            case messages.Call():
                self.calls.append(message)
                name = f"call {message.call}"
                self._tasks[name] = asyncio.create_task(self._answer_call(message))
            case Start():
                self.starts.append(message)
                self._tasks[message.id] = asyncio.create_task(self._generate(message))
            case messages.Cancel(request_id):
                self.cancelled.append(request_id)
                if task := self._tasks.pop(request_id, None):
                    task.cancel()

    async def _answer_call(self, call: messages.Call) -> None:
        await asyncio.sleep(self.call_seconds)
        try:
            result = CALLS[call.name](**call.arguments)
            self._send(messages.Answer(call.call, result))
        except ValueError as error:
            self._send(messages.Answer(call.call, error=str(error)))
        self._tasks.pop(f"call {call.call}", None)

    async def _generate(self, start: Start) -> None:
        async with self._room:
            self._tell(start, admitted=True, cached=len(start.prompt) // 2)
            top = start.settings.prompt_logprobs
            self._tell(
                start,
                read=len(start.prompt),
                prompt_logprobs=None
                if top is None
                else [None, *(_logprob(token, top) for token in start.prompt[1:])],
            )
            known = len(start.generated)
            async for changes in self._answer(start):
                if known > 0:  # told by the job before
                    known -= len(changes.get("tokens", ()))
                    continue
                await asyncio.sleep(self.step_seconds)
                self._tell(start, **changes)
                self.steps += 1
        self._tasks.pop(start.id, None)

    async def _answer(self, start: Start) -> AsyncIterator[dict[str, Any]]:
        """What happens to a request once its prompt has been read, step by step."""
        settings = start.settings
        left = settings.max_tokens
        whole, has_called = "", False
        if left == 0:
            yield {"finish": "length"}
            return
        for kind, value in script(start):
            if kind == "wait":
                await asyncio.sleep(value)
                continue
            if kind == "hang":
                await asyncio.Event().wait()
            if kind == "die":
                if not start.generated:
                    os.kill(os.getpid(), signal.SIGKILL)
                continue
            if kind in ("error", "mistake"):
                is_mistake = kind == "mistake"
                yield {"finish": "error", "error": value, "is_mistake": is_mistake}
                return
            if kind == "tool":
                yield {
                    "tokens": [ord("@")],
                    "pieces": [(kind, value)],
                    "logprobs": []
                    if settings.logprobs is None
                    else [_logprob(ord("@"), settings.logprobs)],
                }
                has_called = True
                if not start.parallel_tool_calls:
                    break
                continue
            rest = b""
            for token in value.encode():
                rest += bytes([token])
                with suppress(UnicodeDecodeError):
                    whole, piece, rest = whole + rest.decode(), rest.decode(), b""
                changes: dict[str, Any] = {"tokens": [token]}
                if settings.logprobs is not None:
                    changes["logprobs"] = [_logprob(token, settings.logprobs)]
                if not rest:
                    changes["pieces"] = [(kind, piece)]
                for stop in start.stop if kind == "text" else ():
                    if whole.endswith(stop):
                        # The text before was told already: the tests' are one letter.
                        yield {**changes, "pieces": [], "finish": "stop", "stop": stop}
                        return
                left = None if left is None else left - 1
                if left == 0:
                    yield {**changes, "finish": "length"}
                    return
                yield changes
        yield {
            "tokens": [END],
            "logprobs": []
            if settings.logprobs is None
            else [_logprob(END, settings.logprobs)],
            "finish": "tool_calls" if has_called else "stop",
        }

    async def _tell_stats(self) -> None:
        while True:
            await asyncio.sleep(0.2)
            self._send(
                messages.Stats(
                    running=min(len(self._tasks), self.running),
                    waiting=max(0, len(self._tasks) - self.running),
                    cache_use=min(1.0, len(self._tasks) / self.running),
                    prefix_entries=3,
                    prefix_bytes=1 << 20,
                    prefix_queries=100,
                    prefix_hits=50,
                    preemptions=0,
                    steps=self.steps,
                    step_seconds=self.step_seconds or None,
                    ranks=[
                        messages.RankStats(
                            rank=rank.rank,
                            collective_seconds=0.25 * self.steps,
                            sent_bytes=1000 * self.steps,
                            memory_bytes=10 << 30,
                            peak_memory_bytes=12 << 30,
                        )
                        for rank in self.ready.ranks
                    ],
                    drafts=10,
                    drafted=40,
                    accepted=30,
                )
            )


def main() -> None:
    """Serve the front that the environment names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--step-seconds", type=float, default=0.01)
    parser.add_argument("--loading-seconds", type=float, default=0.0)
    parser.add_argument("--refusal", default="")
    arguments, _ = parser.parse_known_args()  # others are those of true ranks
    fake = FakeRanks(**vars(arguments))
    asyncio.run(fake.run(Path(os.environ[messages.FOLDER_VARIABLE])))


if __name__ == "__main__":
    main()
