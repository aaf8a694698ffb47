"""Log-probabilities of tokens, as the front is told them."""

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx

from mlxtp.serve.messages import TokenLogprob
from mlxtp.serve.ranks.text import Text

# JSON has no infinity; OpenAI's interface says this of a token that cannot come.
LEAST = -9999.0


def likeliest(logprobs: mx.array, count: int) -> tuple[mx.array, mx.array]:
    """Find the likeliest tokens, at least one, of each row; the likeliest first.

    Shapes: logprobs (..., V) -> tokens (..., count), their log-probabilities (...,
        count), with count at most V.
    """
    count = min(count, logprobs.shape[-1])
    # A sort of all takes 15 times as long.
    tokens = mx.argpartition(-logprobs, kth=count - 1, axis=-1)[..., :count]
    values = mx.take_along_axis(logprobs, tokens, axis=-1)
    order = mx.argsort(-values, axis=-1)
    return (
        mx.take_along_axis(tokens, order, axis=-1),
        mx.take_along_axis(values, order, axis=-1),
    )


def token_logprob(
    text: Text,
    token: int,
    logprob: float,
    tokens: Sequence[int] = (),
    logprobs: Sequence[float] = (),
) -> TokenLogprob:
    """Say how likely a token was.

    Args:
        text: of the model.
        token: that was drawn, or that the prompt has.
        logprob: its log-probability.
        tokens: the likeliest in its place, as `likeliest` gives them.
        logprobs: theirs.
    """
    top = [_one(text, *pair) for pair in zip(tokens, logprobs, strict=True)]
    return replace(_one(text, token, logprob), top=top)


def _one(text: Text, token: int, logprob: float) -> TokenLogprob:
    content = text.bytes_of[token]
    return TokenLogprob(
        token=token,
        text=content.decode(errors="replace"),
        bytes=[*content],
        logprob=max(logprob, LEAST),
    )
