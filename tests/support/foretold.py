"""Drafts of a test: what is known to come, with mistakes."""

from collections.abc import Iterable, Sequence
from typing import Any


class Foretold:
    """Drafts the texts that it is given, but for every `wrong`th token of them.

    Args:
        texts: prompts with their answers.
        wrong: 0 for no mistake.
    """

    def __init__(self, texts: Iterable[Sequence[int]], wrong: int = 4) -> None:
        self.texts, self._wrong = [list(text) for text in texts], wrong

    def begin(self, draw: Any = None, chunk: int = 0) -> "Foretold":
        """Draft for one more sequence."""
        return self

    def propose(self, asked: Any) -> list[list[int]]:
        """Draft for several sequences."""
        return [self._one(tokens, count) for _, tokens, count in asked]

    def _one(self, tokens: Sequence[int], count: int) -> list[int]:
        """Draft what comes behind `tokens`, nothing behind others."""
        length = len(tokens)
        text = next((x for x in self.texts if x[:length] == [*tokens]), [])
        return [
            abs(token - 1) if self._wrong and place % self._wrong == 0 else token
            for place, token in enumerate(text[length : length + count], length)
        ]
