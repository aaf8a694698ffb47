"""The text of answers is taken apart, however it is cut into tokens."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper
from toy_tokenizers import byte_level, cut, naive, sentence_piece

from mlxtp.generation.settings import Settings
from mlxtp.serve.messages import Start
from mlxtp.serve.ranks.answer import AnswerText, Piece
from mlxtp.serve.ranks.text import PLAIN_STOP, Text

pytestmark = pytest.mark.once

TEMPLATE = "{{ messages }}{{ tools }}"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer"}, "city": {"type": "string"}},
            },
        },
    }
    for name in ("add", "weather")
]
ADD = ("tool", {"name": "add", "arguments": '{"a": 2}'})
WEATHER = ("tool", {"name": "weather", "arguments": '{"city": "Köln"}'})
THINK = ("<think>", "</think>")


@dataclass(frozen=True)
class Case:
    """An answer, and what it says."""

    parser: str | None
    answer: str
    pieces: list[Piece]
    special: tuple[str, ...] = ()


CASES = {
    "json_tools": Case(
        "json_tools",
        '<think>Hm — so</think>One: <tool_call>\n{"name": "add", "arguments": {"a": 2}}'
        '\n</tool_call>\n<tool_call>{"name": "weather", "arguments": {"city": "Köln"}}'
        "</tool_call>\n",
        [("reasoning", "Hm — so"), ("text", "One: "), ADD, WEATHER],
        THINK,
    ),
    "no parser": Case(
        None,
        '<tool_call>{"name": "add", "arguments": {"a": 2}}</tool_call> Köln <tool_cal',
        [ADD, ("text", "Köln <tool_cal")],
    ),
    "qwen3_coder": Case(
        "qwen3_coder",
        "<tool_call>\n<function=add>\n<parameter=a>\n2\n</parameter>\n</function>\n"
        "</tool_call> done 🌍",
        [ADD, ("text", "done 🌍")],
    ),
    "mistral": Case(
        "mistral",
        'Yes.[TOOL_CALLS]add[ARGS]{"a": 2}[TOOL_CALLS]weather[ARGS]{"city": "Köln"}',
        [("text", "Yes."), ADD, WEATHER],
        ("[TOOL_CALLS]",),
    ),
    "kimi_k2": Case(
        "kimi_k2",
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.add:0"
        '<|tool_call_argument_begin|>{"a": 2}<|tool_call_end|><|tool_call_begin|>'
        'functions.weather:1<|tool_call_argument_begin|>{"city": "Köln"}'
        "<|tool_call_end|><|tool_calls_section_end|>",
        [ADD, WEATHER],
    ),
    "pythonic": Case(
        "pythonic",
        '<|tool_call_start|>[add(a=2), weather(city="Köln")]<|tool_call_end|>',
        [ADD, WEATHER],
    ),
    "glm47": Case(
        "glm47",
        "<think>x</think>\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Köln"
        "</arg_value>\n</tool_call>",
        [("reasoning", "x"), ("text", "\n"), WEATHER],
        THINK,
    ),
    "gemma4": Case(
        "gemma4",
        '<|channel>thought\nhm<channel|><|tool_call>call:weather{city:<|"|>Köln<|"|>}'
        "<tool_call|>",
        [("reasoning", "\nhm"), WEATHER],
        ("<|channel>", "<channel|>"),
    ),
    "a call within the reasoning": Case(
        "json_tools",
        '<think>so<tool_call>{"name": "add", "arguments": {"a": 2}}</tool_call>!',
        [("reasoning", "so"), ADD, ("text", "!")],
        THINK,
    ),
    "no call": Case(
        "minimax_m2",
        "<minimax:tool_call><invoke name></minimax:tool_call>",
        [("text", "<minimax:tool_call><invoke name></minimax:tool_call>")],
    ),
    "no JSON": Case(
        "json_tools",
        "<tool_call>{'a'}</tool_call> <tool_call>[1]</tool_call>.",
        [("text", "<tool_call>{'a'}</tool_call> <tool_call>[1]</tool_call>.")],
    ),
    "no such tool": Case(
        "glm47",
        "<tool_call>I think</tool_call>",
        [("text", "<tool_call>I think</tool_call>")],
    ),
    "minimax_m2": Case(
        "minimax_m2",
        '<minimax:tool_call>\n<invoke name="add">\n<parameter name="a">2</parameter>\n'
        '</invoke>\n<invoke name="weather">\n<parameter name="city">Köln</parameter>\n'
        "</invoke>\n</minimax:tool_call>",
        [ADD, WEATHER],
    ),
    "half a surrogate pair": Case(
        "json_tools",
        '<tool_call>{"name": "weather", "arguments": {"city": "\\ud83c"}}</tool_call>',
        [("tool", {"name": "weather", "arguments": '{"city": "\\ud83c"}'})],
    ),
}
SEEDS = 4
KINDS = {"BPE": byte_level, "SPM": sentence_piece, "naive": naive}


def start(prompt: list[int] | None = None, **options: Any) -> Start:
    grammar = options.pop("grammar", None)
    settings = Settings(max_tokens=None, seed=0, grammar=grammar)
    return Start("x", prompt or [], settings, **({"is_chat": True} | options))


def told(
    tokenizer: TokenizerWrapper,
    tokens: list[int],
    reason: str = "stop",
    **options: Any,
) -> tuple[list[Piece], AnswerText]:
    """All pieces of an answer, those of one kind joined."""
    answer = AnswerText(Text(tokenizer, len(tokenizer)), start(**options))
    pieces = [piece for token in tokens for piece in answer.push(token)]
    return joined(pieces + answer.finish(reason)), answer


def joined(pieces: list[Piece]) -> list[Piece]:
    result: list[Piece] = []
    for kind, value in pieces:
        if kind != "tool" and result and result[-1][0] == kind:
            value = result.pop()[1] + value
        result.append((kind, value))
    return result


@pytest.fixture(scope="module", params=KINDS.values(), ids=[*KINDS])
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.mark.parametrize("case", CASES.values(), ids=[*CASES])
def test_cut_anywhere(case: Case, kind: Any) -> None:
    words = [case.answer[i : i + 5] for i in range(0, min(len(case.answer), 300), 3)]
    tokenizer = kind(words, special=case.special, parser=case.parser, template=TEMPLATE)
    text = Text(tokenizer, len(tokenizer))
    request = start(tools=TOOLS)
    for seed in range(SEEDS):
        tokens = cut(case.answer, tokenizer, seed)
        assert tokenizer.decode(tokens) == case.answer
        answer = AnswerText(text, request)
        told = [answer.push(token) for token in [*tokens, tokenizer.eos_token_id]]
        told.append(answer.finish("stop"))
        assert joined([p for pieces in told for p in pieces]) == case.pieces
        kinds = [name for name, _ in case.pieces]
        assert answer.has_tool_calls == ("tool" in kinds)
        # After a restart it goes on with the same pieces.
        done = (seed + 1) * len(tokens) // (SEEDS + 2)
        again = AnswerText(text, replace(request, generated=tokens[:done]))
        rest = [again.push(token) for token in [*tokens[done:], tokenizer.eos_token_id]]
        assert [*rest, again.finish("stop")] == told[done:]


def test_stop_texts(kind: Any) -> None:
    tokenizer = kind(["ab", "STO", "Pé", "OP"], special=THINK, template=TEMPLATE)
    for seed in range(8):

        def tokens(text: str, seed: int = seed) -> list[int]:
            return cut(text, tokenizer, seed)

        stop = ["STOP", "éé"]
        pieces, answer = told(tokenizer, tokens("abSTOPéab"), stop=stop)
        assert pieces == [("text", "ab")]
        assert answer.stopped == "STOP" and answer.is_over
        pieces, answer = told(tokenizer, tokens("<think>aéé</think>"), stop=stop)
        assert pieces == [("reasoning", "a")] and answer.stopped == "éé"
        pieces, answer = told(tokenizer, tokens("abéSTO"), stop=stop)
        assert pieces == [("text", "abéSTO")] and not answer.is_over
        pieces, answer = told(tokenizer, tokens("STOSTOPx"), stop=stop, is_chat=False)
        assert pieces == [("text", "STO")] and answer.stopped == "STOP"
        call = '<tool_call>{"name": "add'
        pieces, answer = told(tokenizer, tokens(call + "STOP"), stop=stop, tools=TOOLS)
        assert pieces == [("text", call)] and answer.stopped == "STOP"


def test_what_is_held_back_is_given_as_soon_as_it_is_decided() -> None:
    tokenizer = byte_level(["Hi", "<thi", "nk", ">"], special=THINK, template=TEMPLATE)
    answer = AnswerText(Text(tokenizer, len(tokenizer)), start(stop=["Ho"]))
    steps = [("Hi", "Hi"), ("H", ""), ("a", "Ha"), ("<thi", ""), ("s", "<this")]
    for text, expected in steps:
        assert answer.push(token_of(text, tokenizer)) == texts(expected)
    first, second = tokenizer.encode("é")
    assert answer.push(first) == [] and answer.push(second) == [("text", "é")]
    assert answer.push(first) == [] and answer.finish("length") == [("text", "\ufffd")]


def token_of(text: str, tokenizer: TokenizerWrapper) -> int:
    return min((cut(text, tokenizer, seed) for seed in range(20)), key=len)[0]


def texts(text: str) -> list[Piece]:
    return [("text", text)] if text else []


def test_a_call_without_its_end() -> None:
    tokenizer = byte_level(special=THINK, parser="json_tools", template=TEMPLATE)
    call = '<tool_call>{"name": "add", "arguments": {"a": 2}}'
    tokens = tokenizer.encode(call)
    assert told(tokenizer, tokens, tools=TOOLS)[0] == [ADD]
    assert told(tokenizer, tokens, "length", tools=TOOLS)[0] == [("text", call)]
    cut_short = told(tokenizer, tokens[:-5], tools=TOOLS)[0]
    assert cut_short == [("text", call[:-5])]


def test_a_parser_may_raise_anything() -> None:
    tokenizer = byte_level(parser="json_tools", template=TEMPLATE)
    answer = f"<tool_call>{'[' * 1100}</tool_call>"
    with pytest.raises(RecursionError):
        tokenizer.tool_parser("[" * 1100)
    pieces, _ = told(tokenizer, tokenizer.encode(answer), tools=TOOLS)
    assert pieces == [("text", answer)]


def test_forced_calls_that_are_nested_too_deeply() -> None:
    tokenizer = byte_level(template=TEMPLATE)
    answer = '[{"name":"add","arguments":{"a":' + "[" * 5000
    grammar = {"kind": "tools", "tools": TOOLS, "parallel": True}
    pieces, _ = told(tokenizer, tokenizer.encode(answer), "length", grammar=grammar)
    assert pieces == [("text", answer)]


@pytest.mark.parametrize("opens", ["[", '{"a":'])
@pytest.mark.parametrize("is_forced", [True, False])
def test_arguments_are_nested_so_far_and_no_further(
    opens: str, is_forced: bool
) -> None:
    tokenizer = byte_level(parser="json_tools", template=TEMPLATE)
    grammar = {"kind": "tools", "tools": TOOLS, "parallel": True}
    options: dict[str, Any] = {"grammar": grammar} if is_forced else {"tools": TOOLS}
    begin, end = ("[", "]") if is_forced else ("<tool_call>", "</tool_call>")
    for depth in (190, 191, 500, 1500, 5000):
        inner = opens * (depth - 1) + "0" + ("]" if opens == "[" else "}") * (depth - 1)
        arguments = f'{{"a":{inner}}}'
        answer = f'{begin}{{"name":"add","arguments":{arguments}}}{end}'
        [(kind, value)], _ = told(tokenizer, tokenizer.encode(answer), **options)
        if depth > 190:
            assert (kind, value) == ("text", answer)
        else:
            assert kind == "tool"
            assert value["arguments"].replace(" ", "") == arguments


@pytest.mark.parametrize("answer", ["[1]", "x[{}]", '["name"]', '[{"a":1}]'])
def test_forced_calls_that_are_none(answer: str) -> None:
    """Are given as the text that they are."""
    tokenizer = byte_level(template=TEMPLATE)
    grammar = {"kind": "tools", "tools": TOOLS, "parallel": True}
    pieces, _ = told(tokenizer, tokenizer.encode(answer), grammar=grammar)
    assert pieces == [("text", answer)]


def test_one_call_alone() -> None:
    case = CASES["json_tools"]
    for case, before in [(CASES["json_tools"], 2), (CASES["mistral"], 1)]:
        tokenizer = byte_level(
            special=case.special, parser=case.parser, template=TEMPLATE
        )
        tokens = tokenizer.encode(case.answer)
        pieces, answer = told(tokenizer, tokens, tools=TOOLS, parallel_tool_calls=False)
        assert pieces == case.pieces[: before + 1]
        assert answer.is_over and answer.has_tool_calls and answer.stopped is None


def test_nothing_is_taken_apart_where_nothing_was_asked() -> None:
    case = CASES["json_tools"]
    tokenizer = byte_level(special=THINK, parser="json_tools", template=TEMPLATE)
    tokens = tokenizer.encode(case.answer)
    pieces, _ = told(tokenizer, tokens, is_chat=False, tools=TOOLS)
    assert pieces == [("text", case.answer)]
    reasoning, text = case.answer.removeprefix("<think>").split("</think>")
    pieces, _ = told(tokenizer, tokens)
    assert pieces == [("reasoning", reasoning), ("text", text)]
    tokens = tokenizer.encode("so</think>x")
    pieces, _ = told(tokenizer, tokens, initial_state="reasoning")
    assert pieces == [("reasoning", "so"), ("text", "x")]


def test_the_text_begins_where_the_prompt_ends(kind: Any) -> None:
    """A completion keeps the space that it begins with; a chat has none."""
    tokenizer = kind(["ab", " c"], template=TEMPLATE)
    prompt, tokens = tokenizer.encode("ab"), tokenizer.encode(" cé")
    pieces, _ = told(tokenizer, tokens, prompt=prompt, is_chat=False)
    assert pieces == [("text", " cé")]
    grammar = {"kind": "regex", "pattern": " c."}
    for more in ({"grammar": grammar}, {"goes_on": True}):
        pieces, _ = told(tokenizer, tokens, prompt=prompt, **more)
        assert pieces == [("text", " cé")]
    pieces, answer = told(tokenizer, tokens, prompt=prompt, goes_on=True, stop=[" c"])
    assert pieces == [] and answer.stopped == " c"


def test_tokens_without_text(kind: Any) -> None:
    tokenizer = kind(["ab"], special=["<|odd|>"], template=TEMPLATE)
    odd = [tokenizer.eos_token_id, len(tokenizer), len(tokenizer) + 7]
    tokens = tokenizer.encode("é")
    tokens = [*odd, tokens[0], *odd, *tokens[1:], *odd]
    text = Text(tokenizer, len(tokenizer) + 9)
    answer = AnswerText(text, start())
    pieces = [piece for token in tokens for piece in answer.push(token)]
    assert joined(pieces + answer.finish("stop")) == [("text", "é")]


def test_calls_of_a_grammar() -> None:
    tokenizer = byte_level(special=THINK, parser="json_tools", template=TEMPLATE)
    grammar = {"kind": "tools", "tools": TOOLS, "parallel": True}
    calls = [("add", '{"a":\n1e400}'), ("weather", '{"city":"Köln <think>"}')]
    written = [f'{{"name":"{name}","arguments":{text}}}' for name, text in calls]
    array = f"[{','.join(written)}]"
    tokens = tokenizer.encode(array)
    expected = [("tool", {"name": name, "arguments": text}) for name, text in calls]
    # Also where the template has opened the reasoning.
    options: dict[str, Any] = {"grammar": grammar, "initial_state": "reasoning"}
    pieces, answer = told(tokenizer, tokens, **options)
    assert pieces == expected and answer.has_tool_calls
    blank = tokenizer.encode(" \n")
    assert told(tokenizer, [*blank, *tokens], **options)[0] == expected
    pieces, _ = told(tokenizer, tokens[:-9], "length", **options)
    assert pieces[0] == expected[0] and pieces[1][1].startswith('{"name":"weather"')
    options["grammar"] = {**grammar, "after_reasoning": True}
    tokens = tokenizer.encode("so</think>" + array)
    pieces, _ = told(tokenizer, tokens, **options)
    assert pieces == [("reasoning", "so"), *expected]


def test_a_model_without_turns_does_not_go_on_as_the_user() -> None:
    tokenizer = byte_level()
    tokens = tokenizer.encode(f"Hi.{PLAIN_STOP} And")
    pieces, answer = told(tokenizer, tokens)
    assert pieces == [("text", "Hi.")] and answer.is_over and answer.stopped is None
    pieces, answer = told(tokenizer, tokens, is_chat=False)
    assert pieces == [("text", f"Hi.{PLAIN_STOP} And")]
