"""Structured output: which tokens may come next, so that the text follows a grammar.

Grammars are llguidance's, and so is what they can say. A grammar is plain data:

    {"kind": "json"}                         an object
    {"kind": "schema", "schema": {...}}      JSON that a JSON schema describes
    {"kind": "tools", "tools": [...],        an array of {"name", "arguments"}: calls of
     "parallel": true}                       OpenAI's tools; one if not parallel
    {"kind": "regex", "pattern": "..."}      Rust's regular expressions, the whole text
    {"kind": "lark", "grammar": "..."}       llguidance's form of Lark's grammars

With `"after_reasoning": true` the text begins within the model's reasoning; anything is
allowed up to its end, by whatever tokens that is written.
"""

import functools
import json
import math
import textwrap
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, regex_to_lark
from llguidance import TokenizerWrapper as TokenizerForMatcher
from mlx_lm.tokenizer_utils import TokenizerWrapper
from numpy.typing import NDArray

from mlxtp.generation.token_bytes import token_bytes

if TYPE_CHECKING:  # not there at run time
    from llguidance._lib import JsonCompileOptions

Spec = Mapping[str, Any]
T = TypeVar("T")

# They count work, not time, so that all ranks come to the same end. A grammar at these
# limits takes 0.4 s to compile, and 15 ms and 40 MB for a mask.
_LIMITS = LLParserLimits(
    max_grammar_size=20_000, max_lexer_states=20_000, verbose_errors=False
)
_COMPILED = 32  # grammars that are kept
_LONGEST = 1 << 18  # characters of a grammar, as llguidance takes it
# llguidance calls itself for each reference behind another one: 1,000 of them take more
# than the 8 MiB of a usual stack, the longest grammar less than 64 MiB.
_STACK_BYTES = 256 << 20
# Of `multipleOf`, its digits without zeros at the end: llguidance counts to it.
_LARGEST_MULTIPLE = 100_000
_AT_ONCE = {"allOf", "anyOf", "oneOf", "$ref"}
_TRIED = 4  # tokens: what is too complex mostly is so behind the first bracket
# Where one text alone can come next, llguidance would allow only one way to cut it into
# tokens, its own; the model is to choose.
_HEADER = '%llguidance {"no_forcing": true}\n'
# Models get lost in white space: this much still indents 16 levels by 4 spaces.
_STRICT: "JsonCompileOptions" = {
    "lenient": False,
    "coerce_one_of": False,
    "whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,65}",
    # Without u: "\\u0061" would be taken for another name than "a".
    "json_allowed_escapes": 'bfnrt"\\',
}
# OpenAI promises a tool's schema only where the tool is `strict`.
_LENIENT: "JsonCompileOptions" = {**_STRICT, "lenient": True, "coerce_one_of": True}


class Grammars:
    """Compile grammars for a tokenizer; the same on all ranks.

    To make one takes about a second for 128,000 tokens.

    Args:
        tokenizer: mlx-lm's.
        rows: V, of the model's vocabulary. Tokens that the tokenizer does not know, and
            special ones within the text, are never allowed.
    """

    def __init__(self, tokenizer: TokenizerWrapper, rows: int) -> None:
        self._wrapped, self._rows = tokenizer, rows
        ends = sorted(token for token in tokenizer.eos_token_ids if token < rows)
        self._tokenizer: LLTokenizer | None = None
        self._bytes_of: Sequence[bytes] = ()
        if ends:
            vocabulary = _Vocabulary(tokenizer, rows, ends)
            self._bytes_of = vocabulary.tokens
            self._tokenizer = LLTokenizer(
                TokenizerForMatcher(vocabulary), eos_token=ends
            )
        self._kept = functools.lru_cache(_COMPILED)(self._compiled)

    def check(self, spec: Spec) -> None:
        """Compile a grammar and try its first tokens; may run in any thread.

        Nothing of it is kept: what a matcher may still compute must not depend on which
        grammars one rank has checked.

        Raises: ValueError for what is no grammar, cannot be done, or costs too much.
        """
        matcher = Matcher(self._compiled(_source(spec)), self._bytes_of)
        for _ in range(_TRIED):
            mask = matcher.mask()
            assert mask is not None
            if matcher.is_over:
                break
            matcher.accept(int(mask.argmax()))
        self._reasoning_end(spec)

    def matcher(self, spec: Spec, generated: Sequence[int] = ()) -> "Matcher":
        """Make a matcher for a request that has `generated` (L,) tokens already.

        Raises: ValueError as `check`, or if the tokens do not follow the grammar.
        """
        compiled = self._kept(_source(spec)).deep_copy()
        matcher = Matcher(compiled, self._bytes_of, self._reasoning_end(spec))
        for token in generated:
            matcher.accept(token)
        return matcher

    def _reasoning_end(self, spec: Spec) -> bytes:
        """The text behind which the grammar begins; none for the text's beginning."""
        if not spec.get("after_reasoning"):
            return b""
        if not self._wrapped.think_end:
            raise ValueError(
                "after_reasoning: the model's tokenizer marks no end of its reasoning"
            )
        return str(self._wrapped.think_end).encode()

    def _compiled(self, source: str) -> LLMatcher:
        if self._tokenizer is None:
            raise ValueError(
                "a grammar needs a token that ends the text: the tokenizer has none"
            )
        tokenizer = self._tokenizer
        matcher = _on_large_stack(
            lambda: LLMatcher(tokenizer, source, limits=_LIMITS, log_level=0)
        )
        _raise_error(matcher)
        return matcher


class Matcher:
    """How far a text has followed its grammar.

    Args:
        matcher: llguidance's.
        bytes_of: each token's (V,).
        reasoning_end: the text behind which the grammar begins.
    """

    def __init__(
        self, matcher: LLMatcher, bytes_of: Sequence[bytes], reasoning_end: bytes = b""
    ) -> None:
        self._matcher, self._bytes_of = matcher, bytes_of
        self._reasoning_end = reasoning_end
        self._latest = b""  # of the reasoning, as much as its end has

    @property
    def _is_reasoning(self) -> bool:
        return self._latest != self._reasoning_end

    def mask(self) -> NDArray[np.bool_] | None:
        """Which tokens (V,) may come next; None for any.

        Raises: ValueError if none may, or if the grammar is too complex here.
        """
        if self._is_reasoning:
            return None
        packed = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        _raise_error(self._matcher)
        bits = np.unpackbits(packed, count=len(self._bytes_of), bitorder="little")
        return bits.view(np.bool_)

    def masks(self, draft: Sequence[int]) -> list[NDArray[np.bool_] | None]:
        """The masks here and behind each token of a draft, as far as it may be written.

        The matcher stays where it is, and is as far within its limits as before.

        Raises: ValueError as `mask`, for the first one alone.
        """
        if not draft:
            return [self.mask()]
        matcher = self._matcher.deep_copy()
        copy = Matcher(matcher, self._bytes_of, self._reasoning_end)
        copy._latest = self._latest
        result = [copy.mask()]
        for token in draft:
            here = result[-1]
            if here is not None and not here[token]:
                break
            try:
                copy.accept(token)
                result.append(copy.mask())
            except ValueError:  # as it will be told if the draft is right so far
                break
        return result

    def accept(self, token: int) -> None:
        """Go on behind a token.

        Raises: ValueError if it does not follow the grammar.
        """
        if self._is_reasoning:
            end = self._reasoning_end
            text = self._latest + self._bytes_of[token]
            # As answers are taken apart: the first of such texts counts, however it is
            # cut into tokens.
            if end not in text:
                self._latest = text[-len(end) :]
                return
            self._latest = end
            if text.partition(end)[2].strip():
                raise ValueError(
                    "the reasoning ends within a token: the grammar cannot begin there"
                )
        else:
            self._matcher.consume_token(token)
            _raise_error(self._matcher)

    @property
    def is_over(self) -> bool:
        """Only a token that ends the text may follow."""
        return not self._is_reasoning and self._matcher.is_stopped()


class _Vocabulary:
    """What llguidance asks of a tokenizer."""

    bos_token_id = None

    def __init__(
        self, tokenizer: TokenizerWrapper, rows: int, ends: Sequence[int]
    ) -> None:
        self.tokens = token_bytes(tokenizer, rows)
        self.eos_token_id = ends[0]
        added = tokenizer.added_tokens_decoder.items()
        special = {token for token, content in added if content.special}
        special |= {*tokenizer.all_special_ids, *ends}
        self.special_token_ids = sorted(token for token in special if token < rows)
        self._of_byte = {
            text: token for token, text in enumerate(self.tokens) if len(text) == 1
        }

    def __call__(self, text: bytes) -> list[int]:
        """Any tokens of a text: masks do not depend on which."""
        return [self._of_byte.get(bytes([byte]), 0) for byte in text]


_changing_stacks = threading.Lock()  # their size is that of all threads to come


def _on_large_stack(work: Callable[[], T]) -> T:
    """Return what `work` does in a thread with a large stack."""
    with ThreadPoolExecutor(1) as pool:
        with _changing_stacks:
            usual = threading.stack_size(_STACK_BYTES)
            try:
                done = pool.submit(work)  # starts the thread
            finally:
                threading.stack_size(usual)
        return done.result()


def _raise_error(matcher: LLMatcher) -> None:
    if not matcher.is_error():
        return
    said = matcher.get_error().split("\n<")[0]
    if said == "NoExtensionBias":
        said = "no token of the model can come next"
    said = textwrap.shorten(said, 300)
    raise ValueError(f"the grammar cannot be followed: {said}")


def _source(spec: Spec) -> str:
    """Write a grammar in Lark, as llguidance takes it.

    Raises: ValueError if it is none of the kinds, has other fields than its kind, or is
        too long.
    """
    kind = spec.get("kind")
    if kind not in _KINDS:
        kinds = ", ".join(_KINDS)
        raise ValueError(f"the kind of a grammar is {kind!r}: it is one of {kinds}")
    fields, write = _KINDS[kind]
    others = sorted({*spec} - {"kind", "after_reasoning", *fields})
    missing = [name for name in fields if name not in spec]
    if others or missing:
        wrong = f"lacks {missing[0]}" if missing else f"has no field {others[0]}"
        raise ValueError(f"a grammar of kind {kind} {wrong}")
    try:
        source = _HEADER + write(*(spec[name] for name in fields))
    except RecursionError:
        raise ValueError("the grammar is nested too deeply") from None
    if len(source) > _LONGEST:
        raise ValueError(
            f"the grammar has {len(source):,} characters, descriptions in schemas "
            f"among them; at most {_LONGEST:,} are taken"
        )
    return source


def _json() -> str:
    return _schema({"type": "object"})


def _schema(schema: Mapping[str, Any]) -> str:
    _check_properties_count(schema)
    _check_multiples(schema)
    return f"start: {_of_schema(schema, _STRICT)}"


def _of_schema(schema: Mapping[str, Any], options: "JsonCompileOptions") -> str:
    """A schema as a term of a Lark grammar. Options of its own are not heard."""
    return f"%json {json.dumps({**schema, 'x-guidance': options})}"


def _check_properties_count(schema: Any) -> None:
    """Refuse `minProperties` where a name may come twice, and count as one.

    Raises: ValueError.
    """
    for part in _parts(schema):
        least = part.get("minProperties")
        is_open = part.get("additionalProperties", True) or "patternProperties" in part
        if isinstance(least, int) and least > 1 and is_open:
            raise ValueError(
                "minProperties above 1 cannot be honoured where names are not given "
                "one by one: give properties, and additionalProperties false"
            )


def _check_multiples(schema: Any) -> None:
    """Refuse `multipleOf` of numbers that take long to count to.

    Each number is counted to; where parts of a schema may hold at once, so is the least
    common multiple.

    Raises: ValueError.
    """
    digits, hold_at_once = [1], False
    for part in _parts(schema):
        multiple = part.get("multipleOf")
        if isinstance(multiple, int | float) and not isinstance(multiple, bool):
            number = Decimal(str(multiple))
            if number.is_finite():  # llguidance refuses others
                text = "".join(map(str, number.as_tuple().digits))
                digits.append(int(text.rstrip("0") or "1"))
        hold_at_once |= not _AT_ONCE.isdisjoint(part)
    most = max(sum(digits), math.lcm(*digits) if hold_at_once else 0)
    if most > _LARGEST_MULTIPLE:
        raise ValueError(
            f"multipleOf: numbers up to {_LARGEST_MULTIPLE:,} are taken, zeros at the "
            "end not counted, and so much for their sum; beside allOf, anyOf, oneOf or "
            "$ref for their least common multiple as well"
        )


def _parts(schema: Any) -> Iterator[Mapping[str, Any]]:
    """Yield all objects of a schema."""
    waiting = [schema]
    while waiting:
        part = waiting.pop()
        if isinstance(part, Mapping):
            yield part
            waiting += part.values()
        elif isinstance(part, list):
            waiting += part


def _tools(tools: Sequence[Mapping[str, Any]], parallel: bool) -> str:
    """An array of calls, without white space around arguments.

    Each schema stands for itself, so that references in it keep their root.
    """
    if not tools:
        raise ValueError("a grammar of kind tools needs a tool")
    _check_multiples(list(tools))
    rules = ['start: "[" call' + (' ("," call)*' if parallel else "") + ' "]"']
    rules.append("call: " + " | ".join(f"call_{i}" for i in range(len(tools))))
    for i, tool in enumerate(tools):
        function = tool["function"]
        name, parameters = function["name"], function.get("parameters")
        if parameters is None:  # it takes no arguments, as OpenAI has it
            parameters = {"additionalProperties": False}
        if parameters.get("type", "object") != "object":
            raise ValueError(f"parameters of tool {name}: their type is not object")
        options = _STRICT if function.get("strict") else _LENIENT
        schema = _of_schema({"type": "object", **parameters}, options)
        head = f'{{"name":{json.dumps(name)},"arguments":'
        rules.append(f'call_{i}: {json.dumps(head)} {schema} "}}"')
    return "\n".join(rules)


def _regex(pattern: str) -> str:
    return f"start: /{regex_to_lark(pattern, '')}/"


def _lark(grammar: str) -> str:
    return grammar


# For each kind its fields, and what writes it.
_KINDS: dict[Any, tuple[tuple[str, ...], Any]] = {
    "json": ((), _json),
    "schema": (("schema",), _schema),
    "tools": (("tools", "parallel"), _tools),
    "regex": (("pattern",), _regex),
    "lark": (("grammar",), _lark),
}
