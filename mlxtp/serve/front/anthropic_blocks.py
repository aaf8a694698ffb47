"""The content blocks of a message, made of an answer's pieces, with their events."""

import json
import secrets
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mlxtp.serve.front.chat_parts import Json

# Clients give thinking back with its signature. Nobody checks this one.
SIGNATURE = "unsigned"


@dataclass(frozen=True)
class TextForm:
    """How one kind of text stands in a block, whose type is the name of its field."""

    type: str
    empty: Mapping[str, Any]


TEXT = TextForm("text", {"type": "text", "text": ""})
THINKING = TextForm("thinking", {"type": "thinking", "thinking": "", "signature": ""})


class Blocks:
    """The blocks of an answer that grows; each step yields the events that tell of it.

    `done` are the blocks so far.
    """

    def __init__(self) -> None:
        self.done: list[Json] = []
        self._form: TextForm | None = None  # of the block that is open
        self._block: Json = {}

    def text(self, form: TextForm, text: str) -> Iterator[Json]:
        """Extend the block that is open, if it is of this form; else begin one."""
        if form is not self._form:
            yield from self.close()
            self._form, self._block = form, dict(form.empty)
            yield self._event("content_block_start", content_block=form.empty)
        if text:
            self._block[form.type] += text
            yield self._delta(f"{form.type}_delta", form.type, text)

    def call(self, name: str, arguments: str) -> Iterator[Json]:
        """Add a tool call; `arguments` is JSON text."""
        yield from self.close()
        block = {
            "type": "tool_use",
            "id": f"toolu_{secrets.token_hex(12)}",
            "name": name,
            "input": {},
        }
        yield self._event("content_block_start", content_block=block)
        yield self._delta("input_json_delta", "partial_json", arguments)
        yield self._event("content_block_stop")
        self.done.append({**block, "input": _input(arguments)})

    def close(self) -> Iterator[Json]:
        """End the block that is open, if one is."""
        if self._form is None:
            return
        if self._form is THINKING:
            self._block["signature"] = SIGNATURE
            yield self._delta("signature_delta", "signature", SIGNATURE)
        yield self._event("content_block_stop")
        self.done.append(self._block)
        self._form = None

    def _delta(self, kind: str, field: str, text: str) -> Json:
        return self._event("content_block_delta", delta={"type": kind, field: text})

    def _event(self, kind: str, **fields: Any) -> Json:
        return {"type": kind, "index": len(self.done), **fields}


def _input(arguments: str) -> Json:
    """Read a call's arguments as what a body can hold.

    A model may write what JSON has a form for and a body has not: a number beyond all
    floats, and half of a surrogate pair.
    """

    def finite(number: str) -> float:
        most = sys.float_info.max
        return max(-most, min(float(number), most))

    read = json.loads(arguments, parse_float=finite)
    whole = json.dumps(read, ensure_ascii=False).encode(errors="replace")
    content: Json = json.loads(whole)
    return content
