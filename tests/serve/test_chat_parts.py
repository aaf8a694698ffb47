"""Tools and texts make the same prompt, whatever interface they come by, and soon."""

import time
from typing import Any

import pytest

from mlxtp.serve.front import anthropic_input, responses_input
from mlxtp.serve.front.anthropic_input import functions as of_anthropic
from mlxtp.serve.front.chat_parts import Json, add_tool, tool
from mlxtp.serve.front.openai_chat import Tool
from mlxtp.serve.front.responses_input import functions as of_responses

pytestmark = pytest.mark.once

MANY = 20_000
WORDS = "x" * 2000


@pytest.mark.parametrize("description", [None, "", "Add two numbers."])
@pytest.mark.parametrize("parameters", [{}, {"type": "object", "required": ["a"]}])
def test_one_tool(description: str | None, parameters: dict[str, object]) -> None:
    about = {"name": "add", "description": description, "strict": True}
    function = {**about, "parameters": parameters}
    chat = Tool.model_validate({"type": "function", "function": function}).plain()
    [response], _ = of_responses([{"type": "function", **function}])
    [message] = of_anthropic([{**about, "input_schema": parameters}])
    assert chat == response == message
    assert chat["function"]["strict"] is True
    # gpt-oss's template, for one, cannot do without.
    assert chat["function"]["description"] == (description or "")


def test_a_tool_without_parameters() -> None:
    """It takes no arguments; one with an empty schema takes any."""
    chat = Tool.model_validate({"type": "function", "function": {"name": "now"}})
    [response], _ = of_responses([{"type": "function", "name": "now"}])
    assert chat.plain() == response
    assert response["function"]["parameters"]["additionalProperties"] is False
    open_ = tool("now", None, {}, None)["function"]["parameters"]
    assert open_ == {"type": "object", "properties": {}}


def test_many_tools() -> None:
    """Each name is looked up, not compared with all before it."""
    compared = 0

    class Name(str):
        __hash__ = str.__hash__

        def __eq__(self, other: object) -> bool:
            nonlocal compared
            compared += 1
            return str.__eq__(self, other)

    tools: dict[str, Json] = {}
    for index in range(1000):
        add_tool(tools, tool(Name(f"f{index}"), None, {}, None), f"tools.{index}")
    assert len(tools) == 1000 and compared < 1000


def anthropic_message(role: str, kind: str, field: str) -> list[Json]:
    """The messages of one whose content is many blocks."""
    content = [{"type": kind, field: WORDS} for _ in range(MANY)]
    message = anthropic_input.Message.model_validate({"role": role, "content": content})
    return anthropic_input.messages([message], None)


def response_items(**item: Any) -> list[Json]:
    """The messages of many items."""
    return responses_input.messages([item] * MANY, None)


@pytest.mark.parametrize(
    ("make", "field", "joint"),
    [
        (lambda: anthropic_message("user", "text", "text"), "content", "\n"),
        (lambda: anthropic_message("assistant", "text", "text"), "content", ""),
        (
            lambda: anthropic_message("assistant", "thinking", "thinking"),
            "reasoning_content",
            "",
        ),
        (lambda: response_items(role="system", content=WORDS), "content", "\n\n"),
        (
            lambda: response_items(
                type="reasoning", content=[{"type": "reasoning_text", "text": WORDS}]
            ),
            "reasoning_content",
            "",
        ),
    ],
    ids=["user", "assistant", "thinking", "system", "reasoning"],
)
def test_many_texts(make: Any, field: str, joint: str) -> None:
    """They are joined once: to lengthen a text by each would take minutes."""
    begun = time.process_time()
    [message] = make()
    assert time.process_time() - begun < 4
    assert message[field] == joint.join([WORDS] * MANY)
