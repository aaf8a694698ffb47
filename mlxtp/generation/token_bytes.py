"""The bytes that each token stands for."""

import re
from collections.abc import Sequence

from mlx_lm.tokenizer_utils import (
    BPEStreamingDetokenizer,
    SPMStreamingDetokenizer,
    TokenizerWrapper,
    _byte_decoder,
)

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def known_tokens(tokenizer: TokenizerWrapper, rows: int) -> list[int]:
    """List the tokens below `rows` that mlx-lm's detokenizer has a text for."""
    # Where numbers of tokens have gaps, the last ones are beyond mlx-lm's map.
    mapped = getattr(tokenizer.detokenizer, "tokenmap", range(rows))
    limit = min(rows, len(mapped))
    return sorted(token for token in tokenizer.get_vocab().values() if token < limit)


def token_bytes(tokenizer: TokenizerWrapper, rows: int) -> list[bytes]:
    """List the bytes of each token, as mlx-lm's detokenizers write them.

    They are exact also where a token is a part of a character. A token that comes first
    may lose a space when it is shown.

    Args:
        tokenizer: mlx-lm's.
        rows: the model's vocabulary; those without a token have no bytes.

    Returns: V entries.
    """
    known = known_tokens(tokenizer, rows)
    result = [b""] * rows
    detokenizer = tokenizer.detokenizer
    if isinstance(detokenizer, SPMStreamingDetokenizer | BPEStreamingDetokenizer):
        of_name = _spm if isinstance(detokenizer, SPMStreamingDetokenizer) else _bpe
        for token in known:
            result[token] = of_name(detokenizer.tokenmap[token])
        return result
    names = tokenizer.convert_ids_to_tokens(known)
    # A token that comes first may be written without the space before it.
    anchor = tokenizer.encode("a", add_special_tokens=False)
    before = tokenizer.decode(anchor)
    for token, name in zip(known, names, strict=True):
        result[token] = _decoded(tokenizer, anchor, before, token, name)
    return result


def _spm(name: bytes) -> bytes:
    return name.replace("\u2581".encode(), b" ")


def _bpe(name: str) -> bytes:
    decoder = _byte_decoder()
    try:
        return bytes(map(decoder.__getitem__, name))
    except KeyError:  # an added token, written as it is
        return b"".join(
            bytes([decoder[c]]) if c in decoder else c.encode() for c in name
        )


def _decoded(
    tokenizer: TokenizerWrapper,
    anchor: Sequence[int],
    before: str,
    token: int,
    name: str | bytes,
) -> bytes:
    """Decode a token behind others whose text is `before`."""
    if isinstance(name, bytes):
        return name
    if match := _BYTE_TOKEN.fullmatch(name):
        return bytes([int(match[1], 16)])
    text = tokenizer.decode([*anchor, token]).removeprefix(before)
    if "\ufffd" not in text:
        return text.encode()
    # A part of a character: its bytes are known if the name has them as GPT-2's do.
    result = _bpe(name)
    return result if result.decode(errors="replace") == text else b""
