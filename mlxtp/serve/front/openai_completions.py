"""`POST /v1/completions`: a text goes on."""

import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse
from pydantic import Field, PlainValidator

from mlxtp.serve.front.answers import (
    MOST_HELD,
    Answer,
    CompletionLogprobs,
    merged,
    usage,
    visible_logprobs,
)
from mlxtp.serve.front.config import TheConfig, TheRanks
from mlxtp.serve.front.conversation import (
    Prompt,
    admit,
    check_room,
    checked_model,
    choices,
    complete,
    ready_ranks,
)
from mlxtp.serve.front.errors import Refusal
from mlxtp.serve.front.fields import Sampling
from mlxtp.serve.front.ranks import Generation, Ranks
from mlxtp.serve.front.streaming import cancel_all, server_sent, stream
from mlxtp.serve.messages import Event, Start, TokenLogprob

router = APIRouter()

DEFAULT_MAX_TOKENS = 16  # OpenAI's
MOST_PROMPTS = 128


def _is_tokens(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(type(token) is int for token in value)
    )


def _prompts(value: Any) -> list[str | list[int]]:
    if isinstance(value, str) or _is_tokens(value):
        return [value]
    if (
        isinstance(value, list)
        and 0 < len(value) <= MOST_PROMPTS
        and all(isinstance(one, str) or _is_tokens(one) for one in value)
    ):
        return value
    raise ValueError(
        "a text, a list of tokens, or a list of at most "
        f"{MOST_PROMPTS} of either is wanted"
    )


Prompts = Annotated[
    Any,
    PlainValidator(
        _prompts,
        json_schema_input_type=str | list[str] | list[int] | list[list[int]],
    ),
]


class Completion(Sampling):
    """The body of `POST /v1/completions`."""

    prompt: Prompts
    max_tokens: int | None = Field(default=None, ge=0)
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: bool | None = None
    best_of: int | None = Field(default=None, ge=1)
    suffix: str | None = None

    def settings(self) -> dict[str, Any]:
        """Give the settings that the client gave, in `Settings`' names.

        Raises: Refusal (400) for what no type says.
        """
        self.check_names()
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise Refusal(
                400,
                "best_of is not supported unless it equals n",
                param="best_of",
                code="unsupported",
            )
        if self.suffix:
            raise Refusal(
                400, "suffix is not supported", param="suffix", code="unsupported"
            )
        given = self.given()
        given["max_tokens"] = self.max_tokens
        given["logprobs"] = self.logprobs
        if self.echo:
            given["prompt_logprobs"] = self.logprobs
        return given


class Choice:
    """One choice of an answer, as far as it has come.

    With an echo its text begins with the prompt's, and its log-probabilities with those
    of the prompt's tokens.
    """

    def __init__(self, index: int, echo: "Echo | None", with_logprobs: bool) -> None:
        self.index = index
        self.answer = Answer()
        self._echo = echo
        self._writer = CompletionLogprobs() if with_logprobs else None
        self._logprobs: list[TokenLogprob] = []

    @property
    def holds_many(self) -> bool:
        """Whether many log-probabilities wait to be written; an echo's may."""
        return self._echo is None and len(self._logprobs) >= MOST_HELD

    def take(self, event: Event) -> str:
        """Add what an event brings, and give the new text."""
        text = ""
        if self._echo is not None and event.prompt_logprobs is not None:
            self._logprobs += self._echo.logprobs(event.prompt_logprobs)
        if self._echo is not None and (event.tokens or event.finish):
            text, self._echo = self._echo.text, None
        before = len(self.answer.text)
        self.answer.take(event)
        self._logprobs += visible_logprobs(event)
        return text + self.answer.text[before:]

    def write(self, text: str) -> dict[str, Any]:
        """Write the choice, with the log-probabilities since it was last written."""
        logprobs = None
        if self._writer is not None:
            logprobs, self._logprobs = self._writer.write(self._logprobs), []
        return {
            "index": self.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": self.answer.finish,
        }


@dataclass(frozen=True)
class Echo:
    """A prompt that is told with its answer: its text, and its first token's."""

    text: str
    first: TokenLogprob

    def logprobs(self, of_prompt: Sequence[TokenLogprob | None]) -> list[TokenLogprob]:
        """Put the first token, which has no log-probability, before the others."""
        return [one or self.first for one in of_prompt]


@router.post("/v1/completions")
async def completions(body: Completion, ranks: TheRanks, config: TheConfig) -> Response:
    """Continue texts, whole or as a stream."""
    model = checked_model(ranks, config, body.model)
    given, count = body.settings(), body.n or 1
    ready = ready_ranks(ranks)
    check_room(ranks, config, len(body.prompt) * count)
    starts: list[Start] = []
    echoes: list[Echo | None] = []
    for prompt in body.prompt:
        tokens = await _tokens(ranks, prompt)
        settings = complete(
            config, ready, Prompt(tokens), given, max_tokens=DEFAULT_MAX_TOKENS
        )
        start = Start("", tokens, settings, stop=body.stop or [])
        starts += choices(start, count)
        echoes += [await _echo(ranks, prompt, tokens) if body.echo else None] * count
    generations = admit(ranks, config, starts, is_streamed=bool(body.stream))
    with_logprobs = body.logprobs is not None
    told = [Choice(i, echo, with_logprobs) for i, echo in enumerate(echoes)]
    head = {
        "id": f"cmpl-{secrets.token_hex(12)}",
        "object": "text_completion",
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": None,
    }
    if body.stream:
        chunks = _chunks(head, generations, told, count if body.with_usage else None)
        return await stream(chunks, generations)
    texts = [""] * len(told)
    try:
        async for index, event in merged(generations):
            texts[index] += told[index].take(event)
    finally:
        cancel_all(generations)
    written = [choice.write(text) for choice, text in zip(told, texts, strict=True)]
    counted = usage(generations, choices=count)
    return JSONResponse({**head, "choices": written, "usage": counted})


async def _chunks(
    head: dict[str, Any],
    generations: Sequence[Generation],
    told: Sequence[Choice],
    counted_by: int | None,
) -> AsyncGenerator[str]:
    """Yield chunks; usage, where it is wanted, counts a prompt for so many choices."""
    with_usage = {} if counted_by is None else {"usage": None}
    async for index, event in merged(generations):
        text = told[index].take(event)
        if text or event.finish is not None or told[index].holds_many:
            choice = told[index].write(text)
            yield server_sent({**head, "choices": [choice], **with_usage})
    if counted_by is not None:
        counted = usage(generations, choices=counted_by)
        yield server_sent({**head, "choices": [], "usage": counted})
    yield server_sent("[DONE]")


async def _tokens(ranks: Ranks, prompt: str | list[int]) -> list[int]:
    if isinstance(prompt, str):
        result = await ranks.call("text", text=prompt)
    else:
        result = await ranks.call("tokens", tokens=prompt)
    tokens: list[int] = result["tokens"]
    return tokens


async def _echo(ranks: Ranks, prompt: str | list[int], tokens: list[int]) -> Echo:
    if isinstance(prompt, str):
        text = prompt
    else:
        text = (await ranks.call("detokenize", tokens=prompt))["text"]
    first = await ranks.call("decode_each", tokens=tokens[:1])
    # Of a token that the tokenizer puts before the text, or a space, nothing is shown.
    whole = bytes(first["bytes"][0])
    parts = (whole, whole.removeprefix(b" "), b"")
    shown = next(part for part in parts if text.encode().startswith(part))
    nothing = float("nan")
    return Echo(text, TokenLogprob(tokens[0], first["texts"][0], [*shown], nothing))
