"""What events of a request add up to: text, pieces, tokens, log-probabilities."""

import asyncio
import codecs
import secrets
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlxtp.serve.front.ranks import Generation
from mlxtp.serve.messages import Event, TokenLogprob

# Tokens of a stream's answer whose log-probabilities wait for text. A call may be long
# before it is whole, and some tokens have no text at all.
MOST_HELD = 256


async def merged(
    generations: Sequence[Generation],
) -> AsyncIterator[tuple[int, Event]]:
    """Yield the events of several requests as they come, each with its request's index.

    Raises: Mistake or Unavailable where one of them fails.
    """
    if len(generations) == 1:
        async for event in generations[0]:
            yield 0, event
        return
    queue: asyncio.Queue[tuple[int, Event | Exception]] = asyncio.Queue(1)

    async def feed(index: int) -> None:
        try:
            async for event in generations[index]:
                await queue.put((index, event))
        except Exception as error:
            await queue.put((index, error))

    tasks = [asyncio.create_task(feed(index)) for index in range(len(generations))]
    left = len(generations)
    try:
        while left:
            index, told = await queue.get()
            if isinstance(told, Exception):
                raise told
            yield index, told
            left -= told.finish is not None
    finally:
        for task in tasks:
            task.cancel()


class Pieces:
    """Hold blank text back until other text of its kind follows.

    Models write empty lines around reasoning and tool calls: no block or item of an
    answer is to hold nothing else.
    """

    def __init__(self) -> None:
        self._kind: str | None = None
        self._blank = ""
        self._is_blank = True

    def take(self, event: Event) -> Iterator[tuple[str, Any]]:
        """Yield the pieces of an event that are to be told now."""
        for kind, value in event.pieces:
            if kind != self._kind:
                self._kind, self._blank, self._is_blank = kind, "", True
            if kind != "tool" and self._is_blank:
                self._blank += value
                if not self._blank.strip():
                    continue
                self._is_blank, value = False, self._blank
            yield kind, value


@dataclass
class Answer:
    """The text of one request, as far as it has come, without log-probabilities."""

    text: str = ""
    reasoning: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    finish: str | None = None

    def take(self, event: Event) -> None:
        """Add what an event brings."""
        for kind, value in event.pieces:
            if kind == "text":
                self.text += value
            elif kind == "reasoning":
                self.reasoning += value
            else:
                self.calls.append(tool_call(value))
        self.finish = event.finish


def tool_call(value: dict[str, str]) -> dict[str, Any]:
    """Write a tool call of the model as OpenAI's, with an id."""
    return {
        "id": f"call_{secrets.token_hex(12)}",
        "type": "function",
        "function": {"name": value["name"], "arguments": value["arguments"]},
    }


def visible_logprobs(event: Event) -> list[TokenLogprob]:
    """The log-probabilities of an event, without that of the token that ends a text."""
    if event.finish == "stop" and event.stop is None:
        return event.logprobs[:-1]
    return event.logprobs


def chat_logprobs(logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
    """Write log-probabilities in the form of chat completions."""

    def entry(one: TokenLogprob) -> dict[str, Any]:
        return {"token": one.text, "logprob": one.logprob, "bytes": one.bytes}

    return {
        "content": [
            {**entry(one), "top_logprobs": [entry(other) for other in one.top]}
            for one in logprobs
        ],
        "refusal": None,
    }


class CompletionLogprobs:
    """Writes log-probabilities in the form of completions, with offsets into the text.

    A character may be spread over several tokens: each of them has its offset.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def write(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Write those that come next. NaN stands for a first token, which has none."""
        offsets = []
        for one in logprobs:
            offsets.append(self._offset)
            self._offset += len(self._decoder.decode(bytes(one.bytes)))
        has_any = [one.logprob == one.logprob for one in logprobs]
        return {
            "tokens": [_token_text(one) for one in logprobs],
            "token_logprobs": [
                one.logprob if has else None
                for one, has in zip(logprobs, has_any, strict=True)
            ],
            "top_logprobs": [
                {_token_text(other): other.logprob for other in [one, *one.top]}
                if has
                else None
                for one, has in zip(logprobs, has_any, strict=True)
            ],
            "text_offset": offsets,
        }


def _token_text(one: TokenLogprob) -> str:
    """A token's text; OpenAI's form of bytes where it is a part of a character."""
    if "\N{REPLACEMENT CHARACTER}" not in one.text:
        return one.text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in one.bytes)


def usage(generations: Sequence[Generation], *, choices: int = 1) -> dict[str, Any]:
    """Count tokens: a prompt once, though it has several choices.

    Args:
        generations: all choices of the first prompt, then all of the next.
        choices: of each prompt.
    """
    firsts = generations[::choices]
    prompt = sum(len(generation.start.prompt) for generation in firsts)
    answer = sum(len(generation.tokens) for generation in generations)
    reasoning = sum(generation.reasoning_tokens for generation in generations)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
        "prompt_tokens_details": {
            "cached_tokens": sum(generation.cached for generation in firsts)
        },
        "completion_tokens_details": {"reasoning_tokens": reasoning},
    }
