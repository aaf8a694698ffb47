"""`POST /v1/messages` and `/v1/messages/count_tokens`: Anthropic's interface."""

import secrets
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse
from pydantic import Field

from mlxtp.serve.front import anthropic_input, errors
from mlxtp.serve.front.answers import Pieces
from mlxtp.serve.front.anthropic_blocks import TEXT, THINKING, Blocks
from mlxtp.serve.front.chat_parts import Json, grammar
from mlxtp.serve.front.config import TheConfig, TheRanks
from mlxtp.serve.front.conversation import (
    Conversation,
    begin,
    checked_model,
    encode,
)
from mlxtp.serve.front.errors import Refusal
from mlxtp.serve.front.fields import Fields
from mlxtp.serve.front.ranks import Generation
from mlxtp.serve.front.streaming import server_sent, stream
from mlxtp.serve.messages import Event

router = APIRouter()


class Thinking(Fields):
    """Whether the model is to think, if it can. None keeps to a budget of tokens."""

    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: int | None = None
    display: Literal["summarized", "omitted"] | None = None


class ToolChoice(Fields):
    """Whether the model is to call a tool, and which."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class OutputFormat(Fields):
    """The schema that the text of the answer is to follow."""

    type: Literal["json_schema"]
    schema_: Json = Field(alias="schema")


class OutputConfig(Fields):
    """How the answer is to be."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class Edit(Fields):
    """What becomes of earlier thinking: that is left to the chat template."""

    type: Literal["clear_thinking_20251015"]
    keep: Any = None


class ContextManagement(Fields):
    """What is taken out of a conversation that gets long."""

    edits: list[Edit] | None = None


class Asked(Fields):
    """What makes the prompt: the body of `POST /v1/messages/count_tokens`."""

    model: str
    messages: list[anthropic_input.Message] = Field(min_length=1)
    system: str | list[Any] | None = None
    tools: list[Any] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    context_management: ContextManagement | None = None
    speed: Literal["standard"] | None = None

    def conversation(self) -> Conversation:
        """Give what is to be continued, and how.

        Raises: Refusal (400) for what no type says.
        """
        self.check_names()
        choice = self.tool_choice or ToolChoice(type="auto")
        output = self.output_config or OutputConfig()
        messages = anthropic_input.messages(self.messages, self.system)
        return Conversation(
            messages=messages,
            tools=anthropic_input.functions(self.tools or []),
            tool_choice=_choice(choice),
            parallel_tool_calls=not choice.disable_parallel_tool_use,
            grammar=None
            if output.format is None
            else grammar(
                output.format.type, output.format.schema_, "output_config.format"
            ),
            effort=output.effort,
            default_effort="high",
            thinking=None
            if self.thinking is None
            else self.thinking.type != "disabled",
            continue_final=messages[-1]["role"] == "assistant",
            grammar_field="output_config.format",
            effort_field="output_config.effort",
        )


class Body(Asked):
    """The body of `POST /v1/messages`."""

    max_tokens: int = Field(ge=1)
    stop_sequences: (
        Annotated[
            list[Annotated[str, Field(min_length=1, max_length=1000)]],
            Field(max_length=16),
        ]
        | None
    ) = None
    stream: bool | None = None
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0, lt=1 << 31)


class Answer:
    """A message that grows: its events for a stream, and itself."""

    def __init__(self, body: Body, model: str, generation: Generation) -> None:
        self._generation = generation
        self._blocks = Blocks()
        self._pieces = Pieces()
        self._is_silent = (
            body.thinking is not None and body.thinking.display == "omitted"
        )
        self._max_tokens = body.max_tokens
        self._about: Json = {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
        }

    async def events(self) -> AsyncIterator[Json]:
        """Yield the events of a stream.

        Raises: Mistake or Unavailable where the generation fails.
        """
        has_begun = False
        async for event in self._generation:
            if not has_begun:
                has_begun = True
                yield {"type": "message_start", "message": self.message()}
                yield {"type": "ping"}
            for told in self._told(event):
                yield told
        yield {
            "type": "message_delta",
            "delta": {
                "stop_reason": self._about["stop_reason"],
                "stop_sequence": self._about["stop_sequence"],
            },
            "usage": self._usage(),
        }
        yield {"type": "message_stop"}

    def _told(self, event: Event) -> Iterator[Json]:
        """What has become of the blocks in a step."""
        for kind, value in self._pieces.take(event):
            match kind:
                case "text":
                    yield from self._blocks.text(TEXT, value)
                case "reasoning":
                    told = "" if self._is_silent else value
                    yield from self._blocks.text(THINKING, told)
                case "tool":
                    yield from self._blocks.call(value["name"], value["arguments"])
        if event.finish is not None:
            yield from self._blocks.close()
            self._about["stop_reason"] = self._stop_reason(event)
            self._about["stop_sequence"] = event.stop

    def _stop_reason(self, event: Event) -> str:
        match event.finish:
            case "tool_calls":
                return "tool_use"
            case "length" if len(self._generation.tokens) < self._max_tokens:
                return "model_context_window_exceeded"
            case "length":
                return "max_tokens"
        return "end_turn" if event.stop is None else "stop_sequence"

    def message(self) -> Json:
        """Give the message as it is now."""
        return {
            **self._about,
            "content": list(self._blocks.done),
            "usage": self._usage(),
        }

    def _usage(self) -> Json:
        """Count tokens: those of the prompt that were cached stand apart.

        The message that begins a stream has none of its own yet.
        """
        cached = self._generation.cached
        is_over = self._about["stop_reason"] is not None
        made = len(self._generation.tokens) if is_over else 0
        thinking = self._generation.reasoning_tokens if is_over else 0
        return {
            "input_tokens": len(self._generation.start.prompt) - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": made,
            "output_tokens_details": {"thinking_tokens": thinking},
        }


@router.post("/v1/messages")
async def messages(body: Body, ranks: TheRanks, config: TheConfig) -> Response:
    """Answer a conversation, whole or as a stream."""
    model = checked_model(ranks, config, body.model)
    settings = {
        "max_tokens": body.max_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
    }
    conversation = replace(
        body.conversation(),
        settings=settings,
        stop=body.stop_sequences or [],
        is_cut=True,
    )
    generation = await begin(ranks, config, conversation)
    answer = Answer(body, model, generation)
    if body.stream:
        events = (sent(event) async for event in answer.events())
        return await stream(
            events, [generation], error_event=error, keep_alive=sent({"type": "ping"})
        )
    try:
        async for _ in answer.events():
            pass
        return JSONResponse(answer.message())
    finally:
        generation.cancel()


@router.post("/v1/messages/count_tokens")
async def count_tokens(
    body: Asked, ranks: TheRanks, config: TheConfig
) -> dict[str, int]:
    """Count the tokens that a conversation's prompt has."""
    checked_model(ranks, config, body.model)
    prompt = await encode(ranks, body.conversation())
    return {"input_tokens": len(prompt.tokens)}


def sent(event: Json) -> str:
    """Write an event of a stream."""
    return server_sent(event, event["type"])


def error(refusal: Refusal) -> str:
    """Write an error that comes in the middle of a stream."""
    return sent(errors.body(refusal, is_anthropic=True))


def _choice(choice: ToolChoice) -> str | dict[str, str]:
    """Give the choice as a conversation has it."""
    match choice.type:
        case "any":
            return "required"
        case "tool":
            if choice.name is None:
                raise Refusal(
                    400,
                    "tool_choice.name is wanted where the type is tool",
                    param="tool_choice.name",
                )
            return {"name": choice.name}
    return choice.type
