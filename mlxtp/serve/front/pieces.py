"""The pieces of an answer, as interfaces with blocks or items take them."""

from collections.abc import Iterator
from typing import Any

from mlxtp.serve.messages import Event


class Pieces:
    """Hold blank text back until other text of its kind follows; count reasoning.

    Models write empty lines around reasoning and tool calls: no block is to hold
    nothing else. `reasoning_tokens` are those that came until other text did.
    """

    def __init__(self, initial_state: str) -> None:
        self.reasoning_tokens = 0
        self._kind = "reasoning" if initial_state == "reasoning" else "text"
        self._blank = ""
        self._is_blank = True

    def take(self, event: Event) -> Iterator[tuple[str, Any]]:
        """Yield the pieces of an event that are to be told now."""
        kinds = {kind for kind, _ in event.pieces} or {self._kind}
        if "reasoning" in kinds:
            self.reasoning_tokens += len(event.tokens)
        for kind, value in event.pieces:
            if kind != self._kind:
                self._kind, self._blank, self._is_blank = kind, "", True
            if kind != "tool" and self._is_blank:
                self._blank += value
                if not self._blank.strip():
                    continue
                self._is_blank, value = False, self._blank
            yield kind, value


def effort_arguments(effort: str | None) -> dict[str, Any]:
    """Give the arguments of the chat template that stand for an effort of reasoning."""
    if effort is None:
        return {}
    return {"reasoning_effort": effort, "enable_thinking": effort != "none"}
