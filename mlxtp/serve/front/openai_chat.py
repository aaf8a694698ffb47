"""`POST /v1/chat/completions`: OpenAI's chat."""

import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse
from pydantic import BeforeValidator, Field, PlainValidator

from mlxtp.serve.front.answers import (
    MOST_HELD,
    Answer,
    chat_logprobs,
    merged,
    usage,
    visible_logprobs,
)
from mlxtp.serve.front.chat_parts import (
    TOOL_NAME,
    add_tool,
    grammar,
    tool,
    tool_call,
)
from mlxtp.serve.front.config import TheConfig, TheRanks
from mlxtp.serve.front.conversation import Conversation, begin_all, checked_model
from mlxtp.serve.front.errors import Refusal
from mlxtp.serve.front.fields import Fields, Sampling
from mlxtp.serve.front.ranks import Generation
from mlxtp.serve.front.streaming import cancel_all, server_sent, stream
from mlxtp.serve.messages import TokenLogprob

router = APIRouter()


class Part(Fields):
    """A part of a message's content."""

    type: str
    text: str | None = None

    def words(self, path: str) -> str:
        """Give its text.

        Raises: Refusal (400) for images and whatever else is no text, by name.
        """
        if self.type != "text" or self.text is None:
            raise Refusal(
                400,
                f"{path}: a part of type {self.type!r} is not supported: this is a "
                'model of text, which takes {"type": "text", "text": ...}',
                param=path,
                code="unsupported",
            )
        return self.text


class CalledFunction(Fields):
    """The function that an earlier answer called, with its arguments as JSON text."""

    name: str
    arguments: str = "{}"


class ToolCall(Fields):
    """A tool call of an earlier answer."""

    id: str | None = None
    type: Literal["function"] = "function"
    index: int | None = None
    function: CalledFunction


def _parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class Message(Fields):
    """A message. `developer` is another word for `system`."""

    role: Literal["developer", "system", "user", "assistant", "tool"]
    content: Annotated[
        list[Part] | None,
        BeforeValidator(
            _parts, json_schema_input_type=str | list[dict[str, Any]] | None
        ),
    ] = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None

    def plain(self, path: str) -> dict[str, Any]:
        """Give the message as `Conversation` takes it.

        Raises: Refusal (400) for content that is no text.
        """
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise Refusal(
                400, f"{path} has no content", param=f"{path}.content", code="invalid"
            )
        texts = [
            part.words(f"{path}.content.{index}")
            for index, part in enumerate(self.content or [])
        ]
        role = "system" if self.role == "developer" else self.role
        message: dict[str, Any] = {"role": role, "content": "".join(texts)}
        if self.name is not None:
            message["name"] = self.name
        if self.tool_calls:
            message["tool_calls"] = [
                tool_call(call.id, call.function.name, call.function.arguments)
                for call in self.tool_calls
            ]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        reasoning = self.reasoning_content or self.reasoning
        if reasoning:
            message["reasoning_content"] = reasoning
        return message


class Function(Fields):
    """A function that the model may call. `strict` holds where a call is forced."""

    name: str = Field(pattern=TOOL_NAME)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Fields):
    """A tool that the model may call."""

    type: Literal["function"]
    function: Function

    def plain(self) -> dict[str, Any]:
        """Give the tool as `Conversation` takes it."""
        given = self.function
        return tool(given.name, given.description, given.parameters, given.strict)


class JsonSchema(Fields):
    """The schema that an answer has to follow. It always does, `strict` or not."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Fields):
    """What the text of an answer is."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def grammar(self) -> dict[str, Any] | None:
        """Give the grammar, as `Settings.grammar`.

        Raises: Refusal (400) where the schema is missing, or of no use.
        """
        schema = None if self.json_schema is None else self.json_schema.schema_
        return grammar(self.type, schema, "response_format.json_schema.schema")


def _tool_choice(value: Any) -> str | dict[str, str] | None:
    match value:
        case None | "none" | "auto" | "required":
            return value
        case {
            "type": "function",
            "function": {"name": str(name), **inner},
            **outer,
        } if not (inner or outer):
            return {"name": name}
    raise ValueError(
        'one of "none", "auto", "required" and {"type": "function", "function": '
        '{"name": ...}} is wanted'
    )


ToolChoice = Annotated[
    Any,
    PlainValidator(
        _tool_choice,
        json_schema_input_type=Literal["none", "auto", "required"]
        | dict[str, Any]
        | None,
    ),
]


class ChatCompletion(Sampling):
    """The body of `POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    tools: list[Tool] | None = None
    tool_choice: ToolChoice = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: (
        Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None
    ) = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    modalities: list[Literal["text"]] | None = None
    verbosity: Literal["medium"] | None = None

    def conversation(self) -> Conversation:
        """Give what is to be continued, and how.

        Raises: Refusal (400) for what no type says.
        """
        messages = [
            message.plain(f"messages.{index}")
            for index, message in enumerate(self.messages)
        ]
        self.check_names()
        given = self.given()
        given["max_tokens"] = self.max_completion_tokens or self.max_tokens
        if self.logprobs:
            given["logprobs"] = self.top_logprobs or 0
        elif self.top_logprobs is not None:
            raise Refusal(400, "top_logprobs need logprobs: true", param="top_logprobs")
        answer = self.response_format
        tools: dict[str, dict[str, Any]] = {}
        for index, given_tool in enumerate(self.tools or []):
            add_tool(tools, given_tool.plain(), f"tools.{index}")
        return Conversation(
            messages=messages,
            tools=[*tools.values()],
            tool_choice=self.tool_choice or "auto",
            parallel_tool_calls=self.parallel_tool_calls is not False,
            grammar=None if answer is None else answer.grammar(),
            template_arguments=self.chat_template_kwargs or {},
            effort=self.reasoning_effort,
            settings=given,
            stop=self.stop or [],
            continue_final=self._continues(),
            is_streamed=bool(self.stream),
        )

    def _continues(self) -> bool:
        """Whether the answer goes on with the last message."""
        if not self.continue_final_message:
            if self.add_generation_prompt is False:
                raise Refusal(
                    400,
                    "add_generation_prompt: false needs continue_final_message: true",
                    param="add_generation_prompt",
                )
            return False
        if self.add_generation_prompt:
            raise Refusal(
                400,
                "continue_final_message and add_generation_prompt exclude each other",
                param="add_generation_prompt",
            )
        if self.messages[-1].role != "assistant":
            raise Refusal(
                400,
                "continue_final_message needs a last message of the assistant",
                param="messages",
            )
        return True


@dataclass(frozen=True)
class Head:
    """What every chunk of an answer, and the whole of it, begins with."""

    id: str
    created: int
    model: str

    def write(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """Write an object of this kind."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": None,
            "choices": choices,
        }


@router.post("/v1/chat/completions")
async def chat_completions(
    body: ChatCompletion, ranks: TheRanks, config: TheConfig
) -> Response:
    """Answer a conversation, whole or as a stream."""
    model = checked_model(ranks, config, body.model)
    conversation = body.conversation()
    generations = await begin_all(ranks, config, conversation, body.n or 1)
    head = Head(f"chatcmpl-{secrets.token_hex(12)}", int(time.time()), model)
    with_logprobs = bool(body.logprobs)
    if body.stream:
        chunks = _chunks(head, generations, with_logprobs, body.with_usage)
        return await stream(chunks, generations)
    try:
        return JSONResponse(await _whole(head, generations, with_logprobs))
    finally:
        cancel_all(generations)


async def _whole(
    head: Head, generations: Sequence[Generation], with_logprobs: bool
) -> dict[str, Any]:
    answers = [Answer() for _ in generations]
    logprobs: list[list[TokenLogprob]] = [[] for _ in generations]
    async for index, event in merged(generations):
        answers[index].take(event)
        logprobs[index] += visible_logprobs(event)
    choices = []
    for index, answer in enumerate(answers):
        message: dict[str, Any] = {
            "role": "assistant",
            "content": answer.text if answer.text or not answer.calls else None,
            "refusal": None,
        }
        if answer.reasoning:
            message["reasoning_content"] = message["reasoning"] = answer.reasoning
        if answer.calls:
            message["tool_calls"] = answer.calls
        choices.append(
            {
                "index": index,
                "message": message,
                "logprobs": chat_logprobs(logprobs[index]) if with_logprobs else None,
                "finish_reason": answer.finish,
            }
        )
    counted = usage(generations, choices=len(generations))
    return {**head.write("chat.completion", choices), "usage": counted}


async def _chunks(
    head: Head,
    generations: Sequence[Generation],
    with_logprobs: bool,
    with_usage: bool,
) -> AsyncGenerator[str]:
    """Yield an answer's chunks: a role, then what each event brings, then the finish.

    Log-probabilities of tokens that bring no text yet come with the next ones that do,
    or, where they get many, in a chunk that brings nothing else.
    """
    kind = "chat.completion.chunk"
    answers = [Answer() for _ in generations]
    kept: list[list[TokenLogprob]] = [[] for _ in generations]
    has_role = [False] * len(generations)

    def chunk(index: int, delta: dict[str, Any], finish: str | None = None) -> str:
        choice: dict[str, Any] = {"index": index, "delta": delta, "logprobs": None}
        if with_logprobs and kept[index]:
            choice["logprobs"] = chat_logprobs(kept[index])
            kept[index] = []
        content = head.write(kind, [{**choice, "finish_reason": finish}])
        return server_sent({**content, "usage": None} if with_usage else content)

    async for index, event in merged(generations):
        if not has_role[index]:
            has_role[index] = True
            yield chunk(index, {"role": "assistant", "content": ""})
        answer = answers[index]
        calls = len(answer.calls)
        answer.take(event)
        kept[index] += visible_logprobs(event)
        for piece, value in event.pieces:
            if piece == "text":
                yield chunk(index, {"content": value})
            elif piece == "reasoning":
                yield chunk(index, {"reasoning_content": value, "reasoning": value})
            else:
                call = {"index": calls, **answer.calls[calls]}
                yield chunk(index, {"tool_calls": [call]})
                calls += 1
        if event.finish is not None or len(kept[index]) >= MOST_HELD:
            yield chunk(index, {}, event.finish)
    if with_usage:
        counted = usage(generations, choices=len(generations))
        yield server_sent({**head.write(kind, []), "usage": counted})
    yield server_sent("[DONE]")
