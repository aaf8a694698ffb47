"""A tool makes the same prompt, whatever interface it comes by."""

import pytest

from mlxtp.serve.front.anthropic_input import functions as of_anthropic
from mlxtp.serve.front.openai_chat import Tool
from mlxtp.serve.front.responses_input import functions as of_responses

pytestmark = pytest.mark.once


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
    assert chat["function"].get("description") == (description or None)
