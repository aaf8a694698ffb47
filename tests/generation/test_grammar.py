"""Masks allow what follows the grammar, all of it and nothing else."""

import itertools
import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import toy_tokenizers
from mlx_lm.tokenizer_utils import TokenizerWrapper
from toy_tokenizers import byte_level, naive, sentence_piece

from mlxtp.generation.grammar import Grammars, Matcher, _on_large_stack
from mlxtp.generation.token_bytes import token_bytes

pytestmark = pytest.mark.once

PIECES = ['{"', '":', '"}', '",', ' "', "true", "null", "12", "abc", " the", "é", "\\u"]
THINK = ["<think>", "</think>"]
KINDS = {"BPE": byte_level, "SPM": sentence_piece, "naive": naive}
PADDED = 9  # rows of the model that no token has

CALL = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"n": {"$ref": "#/$defs/n"}},
            "required": ["n"],
            "additionalProperties": False,
            "$defs": {"n": {"enum": [1, 2]}},
        },
    },
}
OTHER = {"type": "function", "function": {"name": "now"}}


def is_person(value: Any) -> bool:
    return (
        [*value] in (["name", "age", "tags"], ["name", "age"])
        and 1 <= len(value["name"]) <= 5
        and type(value["age"]) is int
        and 0 <= value["age"] <= 130
        and set(value.get("tags", [])) <= {'é"\\', "b", None}
        and len(value.get("tags", [])) <= 3
    )


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {
            "type": "array",
            "items": {"enum": ['é"\\', "b", None]},
            "maxItems": 3,
        },
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
NESTED = {
    "$defs": {
        "tree": {
            "type": "object",
            "properties": {
                "v": {"type": "number", "minimum": -1, "exclusiveMaximum": 1.5},
                "of": {
                    "type": "array",
                    "items": {"$ref": "#/$defs/tree"},
                    "maxItems": 1,
                },
            },
            "required": ["v"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/tree",
}


def is_tree(value: Any) -> bool:
    return (
        set(value) <= {"v", "of"}
        and -1 <= value["v"] < 1.5
        and all(map(is_tree, value.get("of", [])))
    )


def are_calls(value: Any) -> bool:
    return len(value) > 0 and all(
        call in ({"name": "now", "arguments": {}},)
        or (call["name"] == "add" and call["arguments"]["n"] in (1, 2))
        for call in value
    )


def schema(content: Any) -> dict[str, Any]:
    return {"kind": "schema", "schema": content}


def of_tool(parameters: Any, **more: Any) -> dict[str, Any]:
    function = {"name": "f", "parameters": parameters, **more}
    return {"kind": "tools", "tools": [{"function": function}], "parallel": True}


SHARED = byte_level()
MANY = {"type": "object", "properties": {f"a{i}": {} for i in range(1000)}}

# A grammar, and what its texts are.
GRAMMARS: dict[str, tuple[dict[str, Any], Callable[[str], Any]]] = {
    "object": ({"kind": "json"}, lambda text: isinstance(json.loads(text), dict)),
    "person": (schema(PERSON), lambda text: is_person(json.loads(text))),
    "nested": (schema(NESTED), lambda text: is_tree(json.loads(text))),
    "pattern": (
        schema({"type": "string", "pattern": '^[é"]{2}$'}),
        lambda text: re.fullmatch('[é"]{2}', json.loads(text)),
    ),
    "date": (
        schema({"type": "string", "format": "date"}),
        lambda text: re.fullmatch(r"\d{4}-\d\d-\d\d", json.loads(text)),
    ),
    "any of": (
        schema({"anyOf": [{"const": 7}, {"type": "boolean"}, {"const": {"a": [1]}}]}),
        lambda text: json.loads(text) in (7, True, False, {"a": [1]}),
    ),
    "calls": (
        {"kind": "tools", "tools": [CALL, OTHER], "parallel": True},
        lambda text: are_calls(json.loads(text)),
    ),
    "one call": (
        {"kind": "tools", "tools": [CALL], "parallel": False},
        lambda text: len(json.loads(text)) == 1 and are_calls(json.loads(text)),
    ),
    "regex": (
        {"kind": "regex", "pattern": r"[a-c]{2,4}-(é|[0-9]){1,3}"},
        lambda text: re.fullmatch(r"[a-c]{2,4}-(é|[0-9]){1,3}", text),
    ),
    "lark": (
        {"kind": "lark", "grammar": 'start: "(" start ")" | "x"'},
        lambda text: (
            re.fullmatch(r"\(*x\)*", text) and text.count("(") == text.count(")")
        ),
    ),
}


@pytest.fixture(scope="module", params=KINDS.values(), ids=[*KINDS])
def tokenizer(request: pytest.FixtureRequest) -> TokenizerWrapper:
    return request.param(PIECES, special=THINK)


@pytest.fixture(scope="module")
def rows(tokenizer: TokenizerWrapper) -> int:
    return len(tokenizer) + PADDED


@pytest.fixture(scope="module")
def grammars(tokenizer: TokenizerWrapper, rows: int) -> Grammars:
    return Grammars(tokenizer, rows)


@pytest.mark.parametrize("name", GRAMMARS)
def test_what_is_drawn_under_the_mask_follows_the_grammar(
    name: str, tokenizer: TokenizerWrapper, rows: int, grammars: Grammars
) -> None:
    spec, is_right = GRAMMARS[name]
    grammars.check(spec)
    of_token = token_bytes(tokenizer, rows)
    closing = {t for t, text in enumerate(of_token) if text in (b'"', b"}", b"]", b")")}
    for seed in range(4):
        random, matcher = np.random.default_rng(seed), grammars.matcher(spec)
        tokens: list[int] = []
        while not matcher.is_over:
            mask = matcher.mask()
            assert mask is not None and mask.shape == (rows,)
            allowed = np.flatnonzero(mask)
            if tokenizer.eos_token_id in allowed and random.random() < 0.5:
                break
            closes = [t for t in allowed if t in closing]
            if closes and random.random() < 0.2 + len(tokens) / 500:
                allowed = closes
            drawn = [t for t in allowed if t != tokenizer.eos_token_id]
            tokens.append(int(random.choice(drawn)))
            matcher.accept(tokens[-1])
        assert matcher.mask()[tokenizer.eos_token_id]
        text = b"".join(of_token[token] for token in tokens).decode()
        assert text == tokenizer.decode(tokens)
        assert is_right(text), text
        # After a restart it goes on from the same tokens.
        middle = len(tokens) // 2
        again = grammars.matcher(spec, tokens[:middle])
        for token in tokens[middle:]:
            assert again.mask()[token]
            again.accept(token)
        assert (again.mask() == matcher.mask()).all()


@pytest.mark.parametrize("is_json", [False, True])
@pytest.mark.parametrize(
    "texts", [["abc the", "abcé", "ab", "12,", 'a"}', "éé1"], ["éé abc the"]]
)
def test_masks_are_exact(
    texts: list[str],
    is_json: bool,
    tokenizer: TokenizerWrapper,
    rows: int,
    grammars: Grammars,
) -> None:
    """At every place of a few texts: tokens that go on to one of them, and no other."""
    texts = [json.dumps(t, ensure_ascii=False) for t in texts] if is_json else texts
    pattern = {"kind": "regex", "pattern": "|".join(map(re.escape, texts))}
    spec = schema({"enum": [*map(json.loads, texts)]}) if is_json else pattern
    of_token = token_bytes(tokenizer, rows)
    encoded = [text.encode() for text in texts]
    by_byte = {text: token for token, text in enumerate(of_token) if len(text) == 1}
    places = {text[:n] for text in encoded for n in range(len(text) + 1)}
    ends = np.array([token in tokenizer.eos_token_ids for token in range(rows)])
    for place in places:
        tokens = [by_byte[bytes([byte])] for byte in place]
        matcher = grammars.matcher(spec, tokens)
        expected = [
            len(text) > 0 and any(e.startswith(place + text) for e in encoded)
            for text in of_token
        ]
        assert (matcher.mask() == np.where(ends, place in encoded, expected)).all()
        goes_on = any(e.startswith(place) and e != place for e in encoded)
        assert matcher.is_over == (not goes_on)


def test_what_ends_the_text() -> None:
    """All tokens that end it may; special ones are no text, nor are unused rows."""
    tokenizer = byte_level(special=["<|turn|>", "<|odd|>"])
    turn, odd = tokenizer.convert_ids_to_tokens(0), tokenizer.get_vocab()["<|odd|>"]
    turn = tokenizer.get_vocab()["<|turn|>"]
    tokenizer.add_eos_token("<|turn|>")
    ends = {turn, tokenizer.eos_token_id}
    rows = len(tokenizer) + PADDED
    matcher = Grammars(tokenizer, rows).matcher({"kind": "regex", "pattern": "(?s:.*)"})
    mask = matcher.mask()
    assert mask[[*ends]].all() and not mask[odd] and not mask[len(tokenizer) :].any()
    matcher.accept(turn)
    assert matcher.is_over and {*np.flatnonzero(matcher.mask())} == ends
    # A model that has fewer rows than its tokenizer has tokens.
    few = Grammars(tokenizer, turn)
    assert few.matcher({"kind": "json"}).mask().shape == (turn,)
    with pytest.raises(ValueError, match="needs a token that ends the text"):
        Grammars(tokenizer, 3).check({"kind": "json"})


def test_after_the_reasoning() -> None:
    spec = {"kind": "regex", "pattern": "ab", "after_reasoning": True}
    for special, end in [
        (THINK, "</think>"),
        (["<|channel>", "<channel|>"], "<channel|>"),
        (["<|open|>", "<|close|>", "<|sep|>", "<|end_of_msg|>"], None),
    ]:
        tokenizer = byte_level(special=special)
        end = end or "<|close|>think<|sep|>"
        grammars = Grammars(tokenizer, len(tokenizer))
        text = tokenizer.encode("no a" + end[:-1] + end)
        for done in range(len(text)):
            matcher = grammars.matcher(spec, text[:done])
            assert matcher.mask() is None and not matcher.is_over
        matcher = grammars.matcher(spec, text)
        assert {*np.flatnonzero(matcher.mask())} == {*tokenizer.encode("a")}
        matcher.accept(*tokenizer.encode("a"))
        matcher.accept(*tokenizer.encode("b"))
        assert matcher.is_over
        # However the end is cut into tokens: answers are taken apart by their text.
        text = [*tokenizer.encode("no a" + end[:-2]), *tokenizer.encode(end[-2:])]
        assert grammars.matcher(spec, text).mask() is not None
        copies = grammars.matcher(spec, text[:-1]).masks(
            [text[-1], *tokenizer.encode("a")]
        )
        assert [mask is None for mask in copies] == [True, False, False]
    # Of a token that goes on behind the end the grammar would not see the rest.
    for rest, is_well in ((b"\n", True), (b"{", False)):
        matcher = Matcher(Mock(), [b"</thi", b"nk>" + rest], b"</think>")
        matcher.accept(0)
        with nullcontext() if is_well else pytest.raises(ValueError, match="within"):
            matcher.accept(1)
    tokenizer = byte_level()
    with pytest.raises(ValueError, match="marks no end of its reasoning"):
        Grammars(tokenizer, len(tokenizer)).check(spec)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"kind": "yaml"}, "is 'yaml': it is one of json, schema, tools, regex, lark"),
        ({"kind": "regex"}, "lacks pattern"),
        ({"kind": "json", "schema": {}}, "has no field schema"),
        ({"kind": "regex", "pattern": "a("}, "unclosed group"),
        ({"kind": "regex", "pattern": "(?=a)"}, "look-around"),
        ({"kind": "lark", "grammar": "x: y"}, "no start rule"),
        (schema({"type": "strin"}), "Invalid type: strin"),
        (schema({"type": "string", "format": "odd"}), "Unknown format: odd"),
        (schema({"$ref": "#/x"}), "Pointer '/x' does not exist"),
        (schema({"$ref": "#"}), "no token of the model can come next"),
        (
            schema({"type": "integer", "minimum": 2, "maximum": 1}),
            "minimum .2. is greater than maximum",
        ),
        (schema({"type": "object", "minProperties": 2}), "minProperties above 1"),
        (schema({"type": "integer", "multipleOf": 1000003}), "numbers up to 100,000"),
        (schema({"type": "number", "multipleOf": 1e300 + 1e285}), "numbers up to"),
        (schema({"multipleOf": 10**400 + 1}), "numbers up to 100,000"),
        (
            schema({"allOf": [{"multipleOf": 10007}, {"multipleOf": 10009}]}),
            "least common multiple",
        ),
        (
            schema({"multipleOf": 1009, "anyOf": [{"multipleOf": 1013}]}),
            "least common multiple",
        ),
        (schema({"items": [{"multipleOf": 49999}] * 3}), "for their sum"),
        (
            of_tool({"properties": {"a": {"multipleOf": 123457}}}),
            "numbers up to 100,000",
        ),
        (schema({"oneOf": [{"type": "string"}] * 2}), "oneOf constraints are not"),
        *(
            (schema({"properties": {"a": {key: value}}, "type": "object"}), key)
            for key, value in {
                "not": {},
                "if": {},
                "uniqueItems": True,
                "contains": {},
                "propertyNames": {},
                "dependentRequired": {},
                "unevaluatedProperties": False,
            }.items()
        ),
        # No way around, and no way to cost much.
        (schema({"x-guidance": {"lenient": True}, "not": {}}), "not"),
        (schema(MANY), "Current row has"),
        ({"kind": "tools", "tools": [], "parallel": True}, "needs a tool"),
        (of_tool({"type": "array"}), "parameters of tool f"),
        (of_tool({"not": {}}, strict=True), "not"),
        (schema({"description": "a" * (1 << 18)}), "at most 262,144"),
    ],
)
def test_what_cannot_be_done_is_refused(spec: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Grammars(SHARED, len(SHARED)).check(spec)


def test_what_is_taken() -> None:
    grammars = Grammars(SHARED, len(SHARED))
    notes = {"title": "x", "description": "x", "default": 1, "examples": [1]}
    notes |= {"$schema": "http://json-schema.org/draft-07/schema#", "$comment": "x"}
    grammars.check(schema({"type": "integer", **notes, "deprecated": True}))
    several = [{"multipleOf": x} for x in (0.01, 5, 60, 86400)]
    grammars.check(schema({"type": "number", "allOf": several}))
    # Only a tool that is strict promises its schema.
    grammars.check(of_tool({"not": {}, "format": "odd"}))


REFERENCES = """
import sys
sys.path.insert(0, sys.argv[1])
from toy_tokenizers import byte_level
from mlxtp.generation.grammar import Grammars
forms = {
    "items": lambda part: {"items": part},
    "allOf": lambda part: {"allOf": [part]},
    "anyOf": lambda part: {"anyOf": [part, {"type": "null"}]},
    "properties": lambda part: {"properties": {"a": part}},
}
tokenizer = byte_level()
grammars = Grammars(tokenizer, len(tokenizer))
for name, form in forms.items():
    for count, levels in ((3000, 1), (1900, 5), (300, 40)):
        definitions = {f"{count:x}": {"type": "string"}}
        for number in range(count):
            part = {"$ref": f"#/$defs/{number + 1:x}"}
            for _ in range(levels):
                part = form(part)
            definitions[f"{number:x}"] = part
        spec = {"kind": "schema", "schema": {"$ref": "#/$defs/0", "$defs": definitions}}
        try:
            grammars.check(spec)
        except ValueError as error:
            print(name, count, error)
print("went on")
"""


def test_a_large_stack_is_that_of_one_thread_alone() -> None:
    """Also where two ask for one at once: rank 0's text thread and its main one."""
    usual = threading.stack_size()
    with ThreadPoolExecutor(2) as pool:
        for _ in pool.map(lambda _: _on_large_stack(lambda: None), range(400)):
            pass
    assert threading.stack_size() == usual


def test_long_chains_of_references_are_taken_or_refused() -> None:
    """They do not end the process, which others need."""
    words = [
        sys.executable,
        "-c",
        REFERENCES,
        str(Path(toy_tokenizers.__file__).parent),
    ]
    done = subprocess.run(words, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and done.stdout.endswith("went on\n"), done


@pytest.mark.parametrize(
    ("text", "is_right"),
    [
        ('{"a":null}', True),
        ('{"a":null,"x":"\\n\\"é"}', True),
        ('{"a":null,"x":1,"b":null}', True),
        ('{"a":null,"b":1}', False),
        ('{"a":null,"a":1}', False),
        ('{"a":null,"\\u0061":1}', False),
        ('{"a":null,"\\u0062":1}', False),
        ('{"a":null' + " " * 66 + "}", False),
        ('{"x":1}', False),
    ],
)
def test_names_that_come_twice(text: str, is_right: bool) -> None:
    spec = schema(
        {
            "type": "object",
            "properties": {"a": {"type": "null"}},
            "patternProperties": {"^b": {"type": "null"}},
            "required": ["a"],
        }
    )
    grammars = Grammars(SHARED, len(SHARED))
    if is_right:
        assert grammars.matcher(spec, SHARED.encode(text)).is_over
    else:
        with pytest.raises(ValueError, match="cannot be followed"):
            grammars.matcher(spec, SHARED.encode(text))


@pytest.mark.parametrize(
    ("parameters", "arguments", "is_right"),
    [(None, "{}", True), (None, '{"a":1}', False), ({}, '{"a":1}', True)],
)
def test_a_tool_without_parameters_takes_no_arguments(
    parameters: Any, arguments: str, is_right: bool
) -> None:
    """One with an empty schema takes any."""
    grammars = Grammars(SHARED, len(SHARED))
    tokens = SHARED.encode(f'[{{"name":"f","arguments":{arguments}}}]')
    if is_right:
        grammars.matcher(of_tool(parameters), tokens)
    else:
        with pytest.raises(ValueError, match="cannot be followed"):
            grammars.matcher(of_tool(parameters), tokens)


def test_a_token_that_is_not_allowed() -> None:
    grammars = Grammars(SHARED, len(SHARED))
    [a], [b] = SHARED.encode("a"), SHARED.encode("b")
    with pytest.raises(ValueError, match="cannot be followed"):
        grammars.matcher({"kind": "regex", "pattern": "ab"}, [b])
    first, second = itertools.tee([a, b])
    one = grammars.matcher({"kind": "regex", "pattern": "ab"})
    for token in first:
        one.accept(token)
    # Matchers of one grammar do not know of each other.
    other: Matcher = grammars.matcher({"kind": "regex", "pattern": "ab"})
    assert one.is_over and other.mask()[next(second)]
