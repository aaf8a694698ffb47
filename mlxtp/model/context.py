"""For how long a context a model was made, as its config says."""

from collections.abc import Mapping
from typing import Any

# Under which names configs of models keep the length that they were made for, and what
# is taken where they say nothing.
CONTEXTS = (
    *("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length"),
    *("seq_length", "n_ctx", "model_max_length"),
)
LONGEST_CONTEXT = 1 << 20


def longest_context(config: Mapping[str, Any]) -> int:
    """Return the most tokens that a model was made for, as its config says."""
    text_config = config.get("text_config")
    inner = text_config if isinstance(text_config, Mapping) else {}
    for name in CONTEXTS:
        for values in (config, inner):
            value = values.get(name)
            if isinstance(value, int) and value > 0:
                return value
    return LONGEST_CONTEXT
