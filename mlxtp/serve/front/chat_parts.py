"""Tools, calls and formats as a conversation has them, whatever interface they are of.

So the same tools make the same prompt, which the prefix cache then knows.
"""

from typing import Any

from mlxtp.serve.front.errors import Refusal

Json = dict[str, Any]

TOOL_NAME = r"^[a-zA-Z0-9_.\-]{1,128}$"


def tool(
    name: str, description: str | None, parameters: Json | None, strict: bool | None
) -> Json:
    """Make OpenAI's tool of a function. Templates may read a description of each.

    One without parameters takes no arguments, as OpenAI has it.
    """
    function: Json = {"name": name, "description": description or ""}
    any_object: Json = {"type": "object", "properties": {}}
    if parameters is None:
        parameters = {**any_object, "additionalProperties": False}
    function["parameters"] = parameters or any_object
    if strict:
        function["strict"] = True
    return {"type": "function", "function": function}


def add_tool(tools: dict[str, Json], new: Json, where: str) -> None:
    """Add a tool to those so far, which stand under their names.

    Raises: Refusal (400) for a second one of a name, by its place.
    """
    name = new["function"]["name"]
    if name in tools:
        raise Refusal(400, f"{where}: there is another tool {name}", param=where)
    tools[name] = new


def tool_call(call_id: str | None, name: str, arguments: str) -> Json:
    """Make OpenAI's call of a tool; `arguments` are JSON text."""
    function = {"name": name, "arguments": arguments}
    return {"id": call_id, "type": "function", "function": function}


def grammar(kind: str, schema: Json | None, where: str) -> Json | None:
    """Give the grammar of a format, as `Settings.grammar`; None for any text.

    `kind` is "text", "json_object" or "json_schema", and `where` the place of `schema`.

    Raises: Refusal (400) for a schema that is missing, or goes with another kind.
    """
    if kind == "json_schema" and schema is not None:
        return {"kind": "schema", "schema": schema}
    if kind == "json_schema":
        raise Refusal(400, f"type json_schema needs {where}", param=where)
    if schema is not None:
        raise Refusal(
            400, f"{where} goes with type json_schema; the type is {kind}", param=where
        )
    return {"kind": "json"} if kind == "json_object" else None
