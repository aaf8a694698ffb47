"""mlx-lm's loops on models without weights: what options raise, before one is read."""

import contextlib
import copy
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import cycle, islice
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlxtp.comm.communicator import Communicator
from mlxtp.layers.forward import Forward, change_forward
from mlxtp.sharding.table import SliceTable

# A short run reads a prompt of so many tokens, in chunks of so many, and makes so many.
PROMPT_TOKENS = 5
CHUNK_TOKENS = 2
MADE_TOKENS = 3
# What is drafted for a pass, right and wrong by turns.
DRAFT_TOKENS = 2
# A long run is no longer than this: the windows of all models are shorter.
LONGEST = 1 << 20


def try_options(
    stream_generate: Callable[..., Iterator[Any]],
    models: Sequence[tuple[nn.Module, SliceTable]],
    tokenizer: TokenizerWrapper,
    options: Mapping[str, Any],
    *,
    token: int,
    length: int,
) -> None:
    """Take options through mlx-lm's loops, on models without weights.

    Every call of a model is put into MLX's graph, with layers, masks and caches, and is
    not evaluated: what is sampled from has the logits' shape and dtype, and is cut off
    from the graph. Caches are quantized from the start. Drafts are accepted and
    rejected, at the start and behind `length` tokens.

    Args:
        stream_generate: mlxtp's.
        models: mlx-lm's whole model without weights and its table, then those of the
            draft if there is one. They stay as they are.
        tokenizer: the model's.
        options: those of `stream_generate`, but for a draft that is a model.
        token: one of the tokenizer's, that all models have a row for.
        length: tokens of the prompt and of the text.

    Raises: what mlx-lm raises.
    Communicates: nothing.
    """
    other = int(token == 0)
    read_values = [_reads_values(model) for model, _ in models]

    def run(prompt_tokens: int, chunk_tokens: int) -> None:
        # The draft is right now and then, so that some are taken back and some not.
        favourites = [cycle([token]), cycle([token, other])]
        stand_ins = [
            _StandIn(model, table, tokens, reads_values)
            for (model, table), tokens, reads_values in zip(
                models, favourites, read_values, strict=False
            )
        ]
        target, *drafts = stand_ins
        changes: dict[str, Any] = {"prefill_step_size": chunk_tokens}
        changes |= {"quantized_kv_start": 0}
        if drafts:
            changes["draft_model"] = drafts[0].module
        if drafts or "draft_model" in options:
            changes["num_draft_tokens"] = DRAFT_TOKENS
        prompt = mx.full((prompt_tokens,), token)
        responses = stream_generate(
            target.module, tokenizer, prompt, **{**options, **changes}
        )
        for _ in islice(responses, MADE_TOKENS):
            pass

    with _nothing_evaluated(), _endless(tokenizer):
        run(PROMPT_TOKENS, CHUNK_TOKENS)
        # Models that read values do so token by token: a long run would take long.
        if len(models) > 1 and not any(read_values):
            length = min(length, LONGEST)
            run(length, length)


class _StandIn:
    """A model whose calls put the forward pass of another into the graph.

    `module` is called as the model is. In each call its logits favour the next of the
    tokens `favourites`.
    """

    def __init__(
        self,
        model: nn.Module,
        table: SliceTable,
        favourites: Iterator[int],
        reads_values: bool,
    ) -> None:
        self._favourites = favourites
        # A copy, for some models keep what they compute of their weights.
        self.module = copy.deepcopy(model)
        if reads_values:
            _cut_off_weights(self.module)
        self.module.slice_table, self.module.comm = table, Communicator()
        change_forward(self.module, self._call)

    def _call(
        self, former: Forward, model: nn.Module, tokens: mx.array, cache: list[Any]
    ) -> mx.array:
        """Tokens (B, L) -> logits (B, L, V) that depend on nothing."""
        y = former(model, tokens, cache=cache)
        row = mx.where(mx.arange(y.shape[-1]) == next(self._favourites), 0, -mx.inf)
        return mx.broadcast_to(row.astype(y.dtype), y.shape)


def _reads_values(model: nn.Module) -> bool:
    """Whether a forward pass asks for values, as that of dbrx does for its experts."""
    model = copy.deepcopy(model)

    def trace(tokens: mx.array) -> mx.array:
        model(tokens, cache=make_prompt_cache(model))
        return tokens

    try:
        mx.compile(trace)(mx.zeros((1, 1), mx.int32))
    except Exception as error:  # the run that follows says what else there is
        return "during function transformations" in str(error)
    return False


def _cut_off_weights(model: nn.Module) -> None:
    """Let every layer with weights return zeros, whose values may be asked for."""

    def call(former: Forward, layer: nn.Module, *args: Any, **options: Any) -> mx.array:
        return mx.zeros_like(former(layer, *args, **options))

    for _, module in model.named_modules():
        if any(isinstance(value, mx.array) for value in module.values()):
            change_forward(module, call)


@contextlib.contextmanager
def _nothing_evaluated() -> Iterator[None]:
    """Let mlx-lm's loops evaluate nothing but what they ask the values of.

    What mlx-lm prints, of models that are large, concerns none that is loaded.
    """
    kept = mx.eval, mx.async_eval
    mx.eval = mx.async_eval = lambda *_: None
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        mx.eval, mx.async_eval = kept


@contextlib.contextmanager
def _endless(tokenizer: TokenizerWrapper) -> Iterator[None]:
    """Let no token end a text."""
    ends = tokenizer.eos_token_ids
    tokenizer.eos_token_ids = set()
    try:
        yield
    finally:
        tokenizer.eos_token_ids = ends
