"""Log-probabilities of tokens, as the front is told them."""

from collections.abc import Sequence
from dataclasses import replace

from mlxtp.serve.messages import TokenLogprob
from mlxtp.serve.ranks.text import Text

# JSON has no infinity; OpenAI's interface says this of a token that cannot come.
LEAST = -9999.0


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
        tokens: the likeliest in its place, in their order.
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
