"""What `/v1/responses` takes: items and tools, made into a conversation's."""

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from mlxtp.serve.front.chat_parts import TOOL_NAME, Json, add_tool, tool, tool_call
from mlxtp.serve.front.errors import Refusal
from mlxtp.serve.front.fields import Fields, typed

# The parts that are text.
TEXT_PARTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")


class Part(Fields):
    """A part of a content."""

    type: str
    text: str | None = None
    refusal: str | None = None
    logprobs: list[Any] | None = None  # of an earlier answer


def _parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


Content = Annotated[list[Part], BeforeValidator(_parts)]


class MessageItem(Fields):
    """A message of whoever has this role."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content


class CallItem(Fields):
    """A call of a tool that the model has made."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    namespace: str | None = None


class OutputItem(Fields):
    """What a tool has answered. Its name is that of the call."""

    type: Literal["function_call_output"]
    call_id: str
    output: Content
    name: str | None = None
    namespace: str | None = None


class ReasoningItem(Fields):
    """What the model has thought: its content, or else its summary."""

    type: Literal["reasoning"]
    summary: list[Part] | None = None
    content: list[Part] | None = None


class FunctionTool(Fields):
    """A function that the client has. `strict` holds where a call is forced."""

    type: Literal["function"]
    name: str = Field(pattern=TOOL_NAME)
    description: str | None = None
    parameters: Json | None = None
    strict: bool | None = None


class NamespaceTool(Fields):
    """Functions under one name; the model sees each as `flat_name` has it."""

    type: Literal["namespace"]
    name: str = Field(pattern=TOOL_NAME)
    description: str | None = None
    tools: list[Any]


ITEMS: Mapping[str, type[Fields]] = {
    "message": MessageItem,
    "function_call": CallItem,
    "function_call_output": OutputItem,
    "reasoning": ReasoningItem,
}
TOOLS: Mapping[str, type[Fields]] = {
    "function": FunctionTool,
    "namespace": NamespaceTool,
}


def messages(given: str | Sequence[Any], instructions: str | None) -> list[Json]:
    """Make the messages of a conversation out of an input's items.

    What the model has said in a row is one message: reasoning, text, calls. The
    messages of system and developer at the beginning are one, for templates that know
    one alone.

    Raises: Refusal for an item that this server cannot take.
    """
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    all_messages: list[Json] = []
    if instructions:
        all_messages.append({"role": "system", "content": instructions})
    for index, item in enumerate(given):
        where = f"input.{index}"
        _add(all_messages, typed(ITEMS, item, where, "message"), where)
    # Once, at the end: to lengthen a text by each item takes the square of its length.
    begin = [*takewhile(lambda message: message["role"] == "system", all_messages)]
    if begin:
        whole = "\n\n".join(message["content"] for message in begin)
        all_messages[: len(begin)] = [{"role": "system", "content": whole}]
    for message in all_messages:
        if "reasoning_content" in message:
            message["reasoning_content"] = "".join(message["reasoning_content"])
    return all_messages


def _add(messages: list[Json], item: Fields, where: str) -> None:
    """Add what an item says to the messages so far; reasoning in parts."""
    match item:
        case MessageItem(role="assistant"):
            text = text_of(item.content, f"{where}.content")
            _turn(messages, begun_by=("content", "tool_calls"))["content"] = text
        case MessageItem(role="user"):
            text = text_of(item.content, f"{where}.content")
            messages.append({"role": "user", "content": text})
        case MessageItem():
            text = text_of(item.content, f"{where}.content")
            messages.append({"role": "system", "content": text})
        case ReasoningItem():
            text = text_of(item.content or item.summary or (), f"{where}.content")
            if text:
                turn = _turn(messages, begun_by=("content", "tool_calls"))
                turn.setdefault("reasoning_content", []).append(text)
        case CallItem():
            name = flat_name(item.namespace, item.name)
            call = tool_call(item.call_id, name, item.arguments)
            _turn(messages).setdefault("tool_calls", []).append(call)
        case OutputItem():
            text = text_of(item.output, f"{where}.output")
            messages.append(
                {"role": "tool", "tool_call_id": item.call_id, "content": text}
            )


def _turn(messages: list[Json], begun_by: Sequence[str] = ()) -> Json:
    """The model's message at the end; a new one where that has one of these fields."""
    last = messages[-1] if messages else {"role": None}
    if last["role"] != "assistant" or any(last.get(field) for field in begun_by):
        last = {"role": "assistant", "content": ""}
        messages.append(last)
    return last


def text_of(parts: Sequence[Part], where: str) -> str:
    """Join the text of parts.

    Raises: Refusal (400) for a part that is no text.
    """
    texts = []
    for index, part in enumerate(parts):
        text = part.refusal if part.type == "refusal" else part.text
        if text is None or part.type not in (*TEXT_PARTS, "refusal"):
            raise Refusal(
                400,
                f"{where}.{index}: a part of type {part.type!r} is not supported: this "
                "is a model of text",
                param=f"{where}.{index}",
                code="unsupported",
            )
        texts.append(text)
    return "".join(texts)


def functions(tools: Sequence[Any]) -> tuple[list[Json], dict[str, dict[str, str]]]:
    """Make OpenAI's chat tools of a response's, and say what each name stands for.

    Returns: the tools, and for each name that the model sees the `name` and, where the
        tool has one, the `namespace` that a call of it has.

    Raises: Refusal for a tool that this server cannot offer.
    """
    shown: dict[str, Json] = {}
    names: dict[str, dict[str, str]] = {}
    for index, value in enumerate(tools):
        where = f"tools.{index}"
        match typed(TOOLS, value, where):
            case NamespaceTool(name=name, tools=inner):
                namespace = {"namespace": name}
                places = {f"{where}.tools.{i}": tool for i, tool in enumerate(inner)}
            case _:
                namespace, places = {}, {where: value}
        for place, other in places.items():
            function = typed({"function": FunctionTool}, other, place)
            name = flat_name(namespace.get("namespace"), function.name)
            names[name] = {"name": function.name, **namespace}
            new = tool(name, function.description, function.parameters, function.strict)
            add_tool(shown, new, place)
    return [*shown.values()], names


def flat_name(namespace: str | None, name: str) -> str:
    """The name by which the model knows a function."""
    return name if namespace is None else f"{namespace.rstrip('_')}__{name}"
