"""What `/v1/messages` takes: blocks and tools, made into a conversation's."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field

from mlxtp.serve.front.chat_parts import TOOL_NAME, Json, add_tool, tool, tool_call
from mlxtp.serve.front.errors import Refusal
from mlxtp.serve.front.fields import Fields, typed

# Claude Code puts this block first, with other words in every request: a model needs it
# for nothing, and with it no prompt would begin like another.
BILLING_HEADER = "x-anthropic-billing-header:"


class TextBlock(Fields):
    """Text."""

    type: Literal["text"]
    text: str


class ThinkingBlock(Fields):
    """What the model has thought."""

    type: Literal["thinking"]
    thinking: str


class RedactedBlock(Fields):
    """Another server's thinking, which nobody can read here: it is left out."""

    type: Literal["redacted_thinking"]
    data: str


class ToolUseBlock(Fields):
    """A call of a tool that the model has made."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: Json


class ToolResultBlock(Fields):
    """What a tool has answered. The model sees an error as text behind "Error: "."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[Any] = ""
    is_error: bool | None = None


class Message(Fields):
    """A message of a conversation."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Any]


class Tool(Fields):
    """A function that the client has. `strict` holds where a call is forced."""

    type: Literal["custom"] | None = None
    name: str = Field(pattern=TOOL_NAME)
    input_schema: Json
    description: str | None = None
    strict: bool | None = None


TEXT: Mapping[str, type[Fields]] = {"text": TextBlock}
USER: Mapping[str, type[Fields]] = {**TEXT, "tool_result": ToolResultBlock}
ASSISTANT: Mapping[str, type[Fields]] = {
    **TEXT,
    "thinking": ThinkingBlock,
    "redacted_thinking": RedactedBlock,
    "tool_use": ToolUseBlock,
}


def messages(
    given: Sequence[Message], system: str | Sequence[Json] | None
) -> list[Json]:
    """Make OpenAI's messages of Anthropic's.

    A user's message becomes one for each result of a tool, and one for the text between
    them.

    Raises: Refusal for a block that this server cannot take.
    """
    all_messages: list[Json] = []
    text = text_of(system or "", "system", without=BILLING_HEADER)
    if text:
        all_messages.append({"role": "system", "content": text})
    for index, message in enumerate(given):
        where = f"messages.{index}.content"
        if isinstance(message.content, str) or message.role == "system":
            content = text_of(message.content, where)
            all_messages.append({"role": message.role, "content": content})
        elif message.role == "assistant":
            all_messages.append(_assistant(message.content, where))
        else:
            all_messages += _user(message.content, where)
    return all_messages


def _assistant(content: Sequence[Json], where: str) -> Json:
    # Joined once: to lengthen a text by each block takes the square of its length.
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[Json] = []
    for index, value in enumerate(content):
        match typed(ASSISTANT, value, f"{where}.{index}"):
            case TextBlock(text=text):
                texts.append(text)
            case ThinkingBlock(thinking=text):
                thoughts.append(text)
            case ToolUseBlock() as use:
                calls.append(tool_call(use.id, use.name, json.dumps(use.input)))
    message: Json = {"role": "assistant", "content": "".join(texts)}
    if thoughts:
        message["reasoning_content"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _user(content: Sequence[Json], where: str) -> list[Json]:
    if not content:
        raise Refusal(400, f"{where} is empty", param=where, code="invalid")
    all_messages: list[Json] = []
    texts: list[str] = []  # of the blocks that come in a row

    def end_text() -> None:
        if texts:
            all_messages.append({"role": "user", "content": "\n".join(texts)})
            texts.clear()

    for index, value in enumerate(content):
        match typed(USER, value, f"{where}.{index}"):
            case TextBlock(text=text):
                texts.append(text)
            case ToolResultBlock() as result:
                end_text()
                text = text_of(result.content, f"{where}.{index}.content")
                all_messages.append(
                    {
                        "role": "tool",
                        "tool_call_id": result.tool_use_id,
                        "content": f"Error: {text}" if result.is_error else text,
                    }
                )
    end_text()
    return all_messages


def text_of(
    content: str | Sequence[Json], where: str, without: str | None = None
) -> str:
    """Join the text of blocks, leaving out those that begin with `without`.

    Raises: Refusal for a block that is no text.
    """
    if isinstance(content, str):
        return content
    texts = []
    for index, value in enumerate(content):
        block = typed({"text": TextBlock}, value, f"{where}.{index}")
        if without is None or not block.text.startswith(without):
            texts.append(block.text)
    return "\n".join(texts)


def functions(tools: Sequence[Json]) -> list[Json]:
    """Make OpenAI's tools of Anthropic's.

    Raises: Refusal for a tool that this server cannot offer.
    """
    shown: dict[str, Json] = {}
    for index, value in enumerate(tools):
        where = f"tools.{index}"
        given = typed({"custom": Tool}, value, where, "custom")
        new = tool(given.name, given.description, given.input_schema, given.strict)
        add_tool(shown, new, where)
    return [*shown.values()]
