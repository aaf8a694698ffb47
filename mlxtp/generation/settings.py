"""What a request asks of the tokens that are drawn for it: plain data, no MLX."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Settings:
    """How the tokens of one request are drawn, and when they end.

    Values are checked by whoever takes them from people. Random numbers follow from
    `seed` and the position of a token alone, so a request has the same tokens alone, in
    any batch, and after it was interrupted.

    Args:
        max_tokens: the most tokens to generate; None for the end of the context. 0
            reads the prompt alone, for its log-probabilities.
        seed: 64 bits.
        temperature: 0 takes the likeliest token.
        top_p, top_k, min_p, xtc_probability, xtc_threshold: mlx-lm's.
        repetition_penalty: of all tokens before, 1 for none.
        repetition_context_size: for a repetition penalty of the last so many tokens, of
            which the prompt's last one is the first, as mlx-lm's `generate` counts.
        presence_penalty, frequency_penalty: of the generated tokens, 0 for none.
        logit_bias: what is added to the logits of tokens.
        logprobs: give the log-probability of each token, and those of so many of the
            likeliest; None for neither. They are those of the model, before penalties,
            biases, grammar and temperature.
        prompt_logprobs: the same for the tokens of the prompt.
        ignore_eos: go on behind a token that ends the text.
        grammar: what the text must be, as `generation.grammar` takes it; None for
            anything.
    """

    max_tokens: int | None
    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.0
    repetition_penalty: float = 1.0
    repetition_context_size: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    ignore_eos: bool = False
    grammar: Mapping[str, Any] | None = None
