"""`POST /v1/responses`: OpenAI's newer interface, streamed and whole."""

import time
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any, Literal

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse
from pydantic import Field

from mlxtp.serve.front import responses_input
from mlxtp.serve.front.answers import Pieces, visible_logprobs
from mlxtp.serve.front.chat_parts import Json, grammar
from mlxtp.serve.front.config import TheConfig, TheRanks
from mlxtp.serve.front.conversation import Conversation, begin, checked_model
from mlxtp.serve.front.errors import Refusal
from mlxtp.serve.front.fields import Fields, Sampling
from mlxtp.serve.front.ranks import Generation
from mlxtp.serve.front.responses_items import MESSAGE, REASONING, SUMMARY, Items, new_id
from mlxtp.serve.front.streaming import server_sent, stream
from mlxtp.serve.messages import Event, TokenLogprob

router = APIRouter()

# What a client asks to be included. Other things are those of tools that OpenAI runs.
LOGPROBS = "message.output_text.logprobs"


class Reasoning(Fields):
    """How much the model is to think, and where its reasoning stands.

    Where a `summary` is wanted, of any kind, the reasoning itself stands there; else it
    is the content of its item.
    """

    context: Literal["auto"] | None = None
    mode: Literal["standard"] | None = None
    effort: (
        Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None
    ) = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class Format(Fields):
    """What the text of the answer is to be. A schema holds, `strict` or not."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    schema_: Json | None = Field(default=None, alias="schema")


class Text(Fields):
    """How the text is to be. Of verbosities models know the one in the middle."""

    format: Format | None = None
    verbosity: Literal["medium"] | None = None


class Body(Sampling):
    """What a client asks for, with the settings of completions besides OpenAI's own."""

    model: str
    input: str | list[Any]
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    n: Literal[1] | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    include: list[str] | None = None
    tools: list[Any] | None = None
    tool_choice: str | Json | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    text: Text | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    chat_template_kwargs: Json | None = None


class Answer:
    """A response that grows: its events for a stream, and itself."""

    def __init__(
        self, body: Body, model: str, names: Mapping[str, Json], generation: Generation
    ) -> None:
        self._names = names
        self._generation = generation
        self._items = Items()
        self._pieces = Pieces()
        self._logprobs: list[Json] = []
        self._number = 0
        self._about = _about(body, model, generation)
        wanted = body.reasoning or Reasoning()
        has_summary = wanted.summary or wanted.generate_summary
        self._reasoning = SUMMARY if has_summary else REASONING

    async def events(self) -> AsyncIterator[Json]:
        """Yield the events of a stream, each with its number.

        Raises: Mistake or Unavailable where the generation fails.
        """
        async for event in self._generation:
            for told in [*self._begun(), *self._told(event)]:
                yield self._numbered(told)
        yield self._numbered(self._state(self._about["status"]))

    def _begun(self) -> Iterator[Json]:
        """The events that a stream begins with, if it has not begun."""
        if not self._number:
            yield self._state("created")
            yield self._state("in_progress")

    def _told(self, event: Event) -> Iterator[Json]:
        """What has become of the items in a step."""
        self._logprobs += [_logprob(logprob) for logprob in visible_logprobs(event)]
        for kind, value in self._pieces.take(event):
            logprobs, self._logprobs = self._logprobs, []
            match kind:
                case "text":
                    yield from self._items.text(MESSAGE, value, logprobs)
                case "reasoning":
                    yield from self._items.text(self._reasoning, value)
                case "tool":
                    name = self._names.get(value["name"], {"name": value["name"]})
                    yield from self._items.call(name, value["arguments"])
        if event.finish is not None:
            is_cut = event.finish == "length"
            status = "incomplete" if is_cut else "completed"
            yield from self._items.close(status)
            self._about["status"] = status
            if is_cut:
                self._about["incomplete_details"] = {"reason": "max_output_tokens"}
            else:
                self._about["completed_at"] = int(time.time())

    def failed(self, error: Refusal) -> str:
        """End a stream with an error."""
        begun = list(self._begun())
        for _ in self._items.close("incomplete"):
            pass  # nobody waits for its events
        code = "invalid_prompt" if error.status == 400 else "server_error"
        self._about |= {
            "status": "failed",
            "error": {"code": code, "message": error.message},
        }
        events = [*begun, self._state("failed")]
        return "".join(sent(self._numbered(event)) for event in events)

    def response(self) -> Json:
        """Give the response as it is now."""
        response = {**self._about, "output": list(self._items.done)}
        if response["status"] in ("completed", "incomplete"):
            response["usage"] = self._usage()
        return response

    def _usage(self) -> Json:
        read = len(self._generation.start.prompt)
        made = len(self._generation.tokens)
        return {
            "input_tokens": read,
            "input_tokens_details": {
                "cached_tokens": self._generation.cached,
                "cache_write_tokens": 0,
            },
            "output_tokens": made,
            "output_tokens_details": {
                "reasoning_tokens": self._generation.reasoning_tokens
            },
            "total_tokens": read + made,
        }

    def _state(self, name: str) -> Json:
        """The event that gives the whole response, in this state."""
        return {"type": f"response.{name}", "response": self.response()}

    def _numbered(self, event: Json) -> Json:
        self._number += 1
        return {**event, "sequence_number": self._number - 1}


@router.post("/v1/responses")
async def responses(body: Body, ranks: TheRanks, config: TheConfig) -> Response:
    """Answer an input, whole or as a stream."""
    body.check_names()
    model = checked_model(ranks, config, body.model)
    tools, names = responses_input.functions(body.tools or [])
    generation = await begin(ranks, config, _conversation(body, tools))
    answer = Answer(body, model, names, generation)
    if body.stream:
        events = (sent(event) async for event in answer.events())
        return await stream(events, [generation], error_event=answer.failed)
    try:
        async for _ in answer.events():
            pass
        return JSONResponse(answer.response())
    finally:
        generation.cancel()


def sent(event: Json) -> str:
    """Write an event of a stream."""
    return server_sent(event, event["type"])


def _conversation(body: Body, tools: list[Json]) -> Conversation:
    """Make the conversation that a body asks to continue."""
    given = body.given()
    given["max_tokens"] = body.max_output_tokens
    given["logprobs"] = body.top_logprobs
    if body.top_logprobs is None and LOGPROBS in (body.include or ()):
        given["logprobs"] = 0
    choice, allowed = _choice(body.tool_choice or "auto")
    if allowed is not None:
        tools = [tool for tool in tools if tool["function"]["name"] in allowed]
    text, reasoning = body.text or Text(), body.reasoning or Reasoning()
    shape = text.format or Format(type="text")
    return Conversation(
        messages=responses_input.messages(body.input, body.instructions),
        tools=tools,
        tool_choice=choice,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        grammar=grammar(shape.type, shape.schema_, "text.format.schema"),
        template_arguments=body.chat_template_kwargs or {},
        effort=reasoning.effort,
        settings=given,
        stop=body.stop or [],
        is_cut=True,
        grammar_field="text.format",
        effort_field="reasoning.effort",
        logprobs_field="include" if body.top_logprobs is None else "top_logprobs",
    )


def _choice(choice: str | Json) -> tuple[str | Json, set[str] | None]:
    """Give the choice as a conversation has it, and the tools allowed; None for all.

    Raises: Refusal (400) for a choice that no function can meet.
    """
    match choice:
        case "auto" | "none" | "required":
            return choice, None
        case {"type": "function"}:
            return {"name": _function_name(choice)}, None
        case {
            "type": "allowed_tools",
            "mode": "auto" | "required" as mode,
            "tools": [*tools],
            **more,
        } if not more:
            return mode, {_function_name(tool) for tool in tools}
    raise _no_choice(choice)


def _function_name(choice: Any) -> str:
    """The name by which the model knows the function that a choice names."""
    match choice:
        case {
            "type": "function",
            "name": str(name),
            "namespace": str(namespace),
            **more,
        } if not more:
            return responses_input.flat_name(namespace, name)
        case {"type": "function", "name": str(name), **more} if not more:
            return name
    raise _no_choice(choice)


def _no_choice(choice: Any) -> Refusal:
    return Refusal(
        400,
        "tool_choice: this server takes 'auto', 'none', 'required', a function by its "
        f"name, and allowed_tools that are functions; given: {str(choice)[:80]}",
        param="tool_choice",
        code="unsupported",
    )


def _about(body: Body, model: str, generation: Generation) -> Json:
    """What a response says of its request."""
    settings = generation.start.settings
    reasoning = body.reasoning or Reasoning()
    text = body.text or Text()
    shown = text.format or Format(type="text")
    return {
        "id": new_id("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": (body.model_extra or {}).get("metadata") or {},
        "model": model,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "reasoning": {"effort": reasoning.effort, "summary": reasoning.summary},
        "store": False,
        "temperature": settings.temperature,
        "text": {"format": shown.model_dump(by_alias=True, exclude_unset=True)},
        "tool_choice": body.tool_choice or "auto",
        "tools": body.tools or [],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": settings.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": (body.model_extra or {}).get("user"),
    }


def _logprob(one: TokenLogprob) -> Json:
    """Write a log-probability, with those of the likeliest tokens."""

    def entry(token: TokenLogprob) -> Json:
        return {"token": token.text, "bytes": token.bytes, "logprob": token.logprob}

    return {**entry(one), "top_logprobs": [entry(other) for other in one.top]}
