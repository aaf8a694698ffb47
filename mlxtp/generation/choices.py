"""What a person chooses for drafts: names and numbers, without MLX."""

from collections.abc import Callable
from typing import Any

from mlxtp.generation.pays import MOST

# The name of drafts that need no model.
NGRAM = "ngram"

# How many tokens may be drafted for a pass, in words and as a test.
DRAFT_LENGTH: tuple[str, Callable[[Any], bool]] = (
    f"auto, or from 1 to {MOST}",
    lambda n: n == "auto" or (isinstance(n, int) and 1 <= n <= MOST),
)
