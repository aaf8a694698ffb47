"""What "equal" means of tokens: those of mlx-lm, or two words were as good as tied."""

import warnings
from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import numpy as np

# Sums that are made in another order (other ranks, other batches, several tokens at
# once) differ by some 1e-6 of the largest logit in float32 for the models here. They
# may part words whose scores are so near, and a fault does not hide in it: of 131
# random scores two lie within 1e-4 once in a thousand tokens.
TIE = 1e-4


class Tied(UserWarning):
    """Two words were as good as tied, and one run chose the one, one the other."""


class Tokens(list[int]):
    """Tokens that a model chose, each with the scores that it was chosen by.

    `==` says whether they are equal: the same tokens, up to where two words are as good
    as tied by the scores of both sides. That case is a warning, which pytest prints,
    and what comes after it is not compared. A plain list has no scores of its own.
    """

    def __init__(self, tokens: Iterable[int], scores: Iterable[mx.array]) -> None:
        super().__init__(tokens)
        # Logits, or these less a constant: (len(tokens), V).
        self.scores = [np.array(row.astype(mx.float32)) for row in scores]

    @classmethod
    def of(cls, steps: Iterable[tuple[Any, ...]]) -> "Tokens":
        """What one of mlx-lm's loops yields: a token, its scores, and more."""
        steps = list(steps)
        return cls([int(step[0]) for step in steps], [step[1] for step in steps])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, list) or len(self) != len(other):
            return False
        for at, words in enumerate(zip(self, other, strict=True)):
            if words[0] == words[1]:
                continue
            gaps = [
                _gap(side.scores[at], *words)
                for side in (self, other)
                if isinstance(side, Tokens)
            ]
            if max(gaps) > TIE:
                return False
            warnings.warn(
                f"token {at} is {words[0]} or {words[1]}: their scores are {gaps} of "
                "the largest logit apart; what follows is not compared",
                Tied,
                stacklevel=2,
            )
            return True
        return True

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None


def _gap(scores: np.ndarray, one: int, other: int) -> float:
    """How far two words' scores are apart, as a fraction of the largest logit.

    Whatever constant the scores have lost, the largest logit is no smaller than half
    of what lies between the largest score and the smallest.
    """
    finite = scores[np.isfinite(scores)]
    return float(abs(scores[one] - scores[other]) / ((finite.max() - finite.min()) / 2))
