"""Tokenizers that know the bytes, and what a test wants as a token."""

import importlib
from collections.abc import Iterable, Sequence
from random import Random
from typing import Any

from mlx_lm.tokenizer_utils import (
    BPEStreamingDetokenizer,
    NaiveStreamingDetokenizer,
    SPMStreamingDetokenizer,
    TokenizerWrapper,
)
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlxtp.generation.token_bytes import token_bytes

END = "<|end|>"


def byte_level(
    pieces: Iterable[str] = (),
    *,
    special: Sequence[str] = (),
    parser: str | None = None,
    template: str | None = None,
    detokenizer: Any = BPEStreamingDetokenizer,
) -> TokenizerWrapper:
    """Tokens are bytes, `pieces`, and special ones; a text is encoded in bytes."""
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    names = [*pre_tokenizers.ByteLevel.alphabet()]
    names += [level.pre_tokenize_str(piece)[0][0] for piece in pieces]
    tokenizer = Tokenizer(models.BPE(_numbered(names), []))
    tokenizer.pre_tokenizer, tokenizer.decoder = level, decoders.ByteLevel()
    return _wrapped(tokenizer, special, parser, template, detokenizer)


def sentence_piece(
    pieces: Iterable[str] = (),
    *,
    special: Sequence[str] = (),
    parser: str | None = None,
    template: str | None = None,
    detokenizer: Any = SPMStreamingDetokenizer,
) -> TokenizerWrapper:
    """The same, with the space as U+2581 and bytes as <0x..>, as Llama 2 has them."""
    names = [f"<0x{byte:02X}>" for byte in range(256)]
    names += ["\u2581", *map(chr, range(33, 127))]
    names += [piece.replace(" ", "\u2581") for piece in pieces]
    model = models.BPE(_numbered(names), [], byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return _wrapped(tokenizer, special, parser, template, detokenizer)


def naive(pieces: Iterable[str] = (), **options: Any) -> TokenizerWrapper:
    """`byte_level`, read by the detokenizer that asks the tokenizer."""
    return byte_level(pieces, detokenizer=NaiveStreamingDetokenizer, **options)


def _numbered(names: Iterable[str]) -> dict[str, int]:
    return {name: token for token, name in enumerate(dict.fromkeys(names))}


def _wrapped(
    tokenizer: Tokenizer,
    special: Sequence[str],
    parser: str | None,
    template: str | None,
    detokenizer: Any,
) -> TokenizerWrapper:
    marks = [AddedToken(text, special=True) for text in (END, *special)]
    tokenizer.add_special_tokens(marks)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)
    fast.chat_template = template
    tools: dict[str, Any] = {}
    if parser is not None:
        module = importlib.import_module(f"mlx_lm.tool_parsers.{parser}")
        tools = {
            "tool_parser": module.parse_tool_call,
            "tool_call_start": module.tool_call_start,
            "tool_call_end": module.tool_call_end,
        }
    return TokenizerWrapper(fast, detokenizer, **tools)


def cut(text: str, tokenizer: TokenizerWrapper, seed: int) -> list[int]:
    """Tokens of a text, cut at places that `seed` chooses, also within characters."""
    of_text = {
        text: token
        for token, text in enumerate(token_bytes(tokenizer, len(tokenizer)))
        if text
    }
    longest, random = max(map(len, of_text)), Random(seed)
    data, tokens = text.encode(), []
    while data:
        lengths = [n for n in range(1, longest + 1) if data[:n] in of_text]
        begin = data[: random.choice(lengths)]
        tokens.append(of_text[begin])
        data = data[len(begin) :]
    return tokens
