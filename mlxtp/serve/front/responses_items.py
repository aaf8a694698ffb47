"""The items of a response, made of an answer's pieces, with the events of a stream."""

import copy
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mlxtp.serve.front.chat_parts import Json


@dataclass(frozen=True)
class TextForm:
    """How one kind of text stands in an item, and is told of in a stream.

    Args:
        item: what the item is.
        prefix: of the item's id.
        parts: the list of the item that the text is in.
        index: what events call the text's place in that list.
        part: the text, before it has any.
        part_event: the events that add the part and end it.
        text_event: the events that extend the text and end it.
    """

    item: Mapping[str, Any]
    prefix: str
    parts: str
    index: str
    part: Mapping[str, Any]
    part_event: str
    text_event: str


_REASONING_ITEM: Json = {
    "type": "reasoning",
    "summary": [],
    "content": [],
    "encrypted_content": None,
}
MESSAGE = TextForm(
    item={"type": "message", "role": "assistant", "content": []},
    prefix="msg",
    parts="content",
    index="content_index",
    part={"type": "output_text", "text": "", "annotations": [], "logprobs": []},
    part_event="response.content_part",
    text_event="response.output_text",
)
REASONING = TextForm(
    item=_REASONING_ITEM,
    prefix="rs",
    parts="content",
    index="content_index",
    part={"type": "reasoning_text", "text": ""},
    part_event="response.content_part",
    text_event="response.reasoning_text",
)
SUMMARY = TextForm(
    item=_REASONING_ITEM,
    prefix="rs",
    parts="summary",
    index="summary_index",
    part={"type": "summary_text", "text": ""},
    part_event="response.reasoning_summary_part",
    text_event="response.reasoning_summary_text",
)


class Items:
    """The items of an answer that grows; each step yields the events that tell of it.

    `done` are the items so far. An event is complete but for its `sequence_number`.
    """

    def __init__(self) -> None:
        self.done: list[Json] = []
        self._form: TextForm | None = None  # of the item that is open
        self._item: Json = {}

    def text(
        self, form: TextForm, text: str, logprobs: list[Json] | None = None
    ) -> Iterator[Json]:
        """Extend the item that is open, if it is of this form; else begin one."""
        if form is not self._form:
            yield from self.close("completed")
            yield from self._open(form)
        part = self._item[form.parts][0]
        part["text"] += text
        more: Json = {}
        if form is MESSAGE:
            more = {"logprobs": logprobs or []}
            part["logprobs"] += more["logprobs"]
        where = {"item_id": self._item["id"], form.index: 0}
        yield self._event(f"{form.text_event}.delta", **where, delta=text, **more)

    def call(self, name: Mapping[str, str], arguments: str) -> Iterator[Json]:
        """Add a tool call; `name` has its name, and its namespace if there is one."""
        yield from self.close("completed")
        item: Json = {
            "id": new_id("fc"),
            "type": "function_call",
            "call_id": new_id("call"),
            **name,
            "arguments": "",
            "status": "in_progress",
        }
        yield self._event("response.output_item.added", item=item)
        whole = {**item, "arguments": arguments, "status": "completed"}
        where = {"item_id": item["id"]}
        kind = "response.function_call_arguments"
        yield self._event(f"{kind}.delta", **where, delta=arguments)
        yield self._event(
            f"{kind}.done", **where, name=name["name"], arguments=arguments
        )
        yield self._event("response.output_item.done", item=whole)
        self.done.append(whole)

    def close(self, status: str) -> Iterator[Json]:
        """End the item that is open, if one is, with this status."""
        if self._form is None:
            return
        form, self._form = self._form, None
        part = self._item[form.parts][0]
        where = {"item_id": self._item["id"], form.index: 0}
        more = {"logprobs": part["logprobs"]} if form is MESSAGE else {}
        yield self._event(f"{form.text_event}.done", **where, text=part["text"], **more)
        yield self._event(f"{form.part_event}.done", **where, part=part)
        self._item["status"] = status
        yield self._event("response.output_item.done", item=self._item)
        self.done.append(self._item)

    def _open(self, form: TextForm) -> Iterator[Json]:
        self._form = form
        self._item = {
            "id": new_id(form.prefix),
            **copy.deepcopy(dict(form.item)),
            "status": "in_progress",
        }
        yield self._event("response.output_item.added", item=copy.deepcopy(self._item))
        part = copy.deepcopy(dict(form.part))
        self._item[form.parts].append(part)
        where = {"item_id": self._item["id"], form.index: 0}
        yield self._event(f"{form.part_event}.added", **where, part=dict(form.part))

    def _event(self, kind: str, **fields: Any) -> Json:
        return {"type": kind, "output_index": len(self.done), **fields}


def new_id(prefix: str) -> str:
    """Make an id that nothing else has."""
    return f"{prefix}_{secrets.token_hex(16)}"
