"""Chats become prompts as the chat template writes them, or are refused in words."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.utils import load_tokenizer
from toy_tokenizers import END, byte_level, naive, sentence_piece

import mlxtp.stories
from mlxtp.serve.messages import TokenLogprob
from mlxtp.serve.ranks.logprobs import token_logprob
from mlxtp.serve.ranks.text import Template, Text

pytestmark = pytest.mark.once

LOOP = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% for c in m.tool_calls %}[{{ c.function.name }}"
    "{% for k, v in c.function.arguments.items() %} {{ k }}={{ v }}{% endfor %}]"
    "{% endfor %}<|end|>{% endfor %}"
)
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    + LOOP
    + "{% if add_generation_prompt %}<|assistant|>{{ effort }}{% endif %}"
)
# Opens the reasoning, and leaves that of earlier turns out.
REASONS = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if loop.last and m.reasoning_content %}{{ m.reasoning_content }}</think>"
    "{% endif %}{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>"
    "{% if not enable_thinking %}</think>{% endif %}{% endif %}"
)
THINK = ["<think>", "</think>"]
TOOL = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {}}},
}


def text_of(template: str | None = TEMPLATE, **options: Any) -> Text:
    special = options.pop("special", THINK)
    tokenizer = byte_level(special=special, template=template)
    written = Template(tokenizer, ignore=options.pop("ignore", False))
    return Text(tokenizer, len(tokenizer), template=written, **options)


def said(role: str, content: str | None, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def prompt(text: Text, *messages: Any, **options: Any) -> str:
    """The text of a prompt."""
    tokens = text.chat(list(messages), **options)["tokens"]
    return text.detokenize(tokens)["text"]


HI = said("user", "Hi é")


def test_in_the_template() -> None:
    text = text_of(template_arguments={"effort": "low"})
    assert text.notes and text.template.is_there and not text.template.has_tools
    assert prompt(text, HI) == "<|user|>Hi é<|end|><|assistant|>low"
    given = {"effort": "high"}
    assert prompt(text, HI, template_arguments=given).endswith("high")
    call = {
        "id": "1",
        "type": "function",
        "function": {"name": "add", "arguments": '{"a": [1, "é"]}'},
    }
    messages = [
        HI,
        said("assistant", None, tool_calls=[call]),
        said("tool", "3", tool_call_id="1"),
    ]
    assert prompt(text, *messages, tools=[TOOL]) == (
        f"[{json.dumps(TOOL)}]<|user|>Hi é<|end|><|assistant|>[add a=[1, 'é']]<|end|>"
        "<|tool|>3<|end|><|assistant|>low"
    )
    assert prompt(text, HI, said("assistant", "So "), continue_final=True) == (
        "<|user|>Hi é<|end|><|assistant|>So "
    )
    text = text_of()
    with pytest.raises(ValueError, match=r"arguments of the call of add are no JSON"):
        call["function"] = {"name": "add", "arguments": "[1]"}
        text.chat(messages)
    with pytest.raises(ValueError, match="at least one"):
        text.chat([])


@pytest.mark.parametrize(
    ("template", "said_of_it"),
    [
        ("{{ raise_exception('No system role.') }}", "No system role"),
        ("{{ 1 // 0 }}", "raises ZeroDivisionError"),
        ("{% if %}", "raises TemplateSyntaxError"),
        ("{{ messages[0].content.__class__.__mro__ }}", "raises SecurityError"),
        ("{{ messages.append(1) }}", "raises SecurityError"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "raises OverflowError"),
        (
            "{% for i in range(400) %}{{ 'x' * 100000 }}{% endfor %}" + LOOP,
            "most 33554432 are read",
        ),
        ("{{ bos_token }}fixed", r"leaves message 1 \(system\) out"),
        (LOOP.replace("messages", "messages[1:]"), r"leaves message 1 \(system\) out"),
        (LOOP.replace("messages", "messages[:1]"), r"leaves message 2 \(user\) out"),
        ("{{ '' }}", "leaves message"),
    ],
)
def test_templates_that_fail(template: str, said_of_it: str) -> None:
    text = text_of(template)
    with pytest.raises(ValueError, match=said_of_it):
        text.chat([said("system", "x"), said("user", "fixed")])


def test_what_a_template_leaves_out() -> None:
    text = text_of("{% for m in messages %}{{ m.content }}{% endfor %}")
    call = {"function": {"name": "add", "arguments": "{}"}}
    with pytest.raises(ValueError, match=r"message 2 \(assistant\) out"):
        text.chat([HI, said("assistant", "", tool_calls=[call]), HI])
    with pytest.raises(ValueError, match="cannot tell it of tools"):
        text.chat([HI], tools=[TOOL])
    # Who speaks is told where the template does it.
    assert prompt(text, said("user", "x", name="Mia")) == "x"
    naming = "{% for m in messages %}{{ m.name }}: {{ m.content }}{% endfor %}"
    assert prompt(text_of(naming), said("user", "x", name="Mia")) == "Mia: x"
    text = text_of("{% for m in messages %}[{{ m.content | trim }}]{% endfor %}")
    assert prompt(text, said("user", " x ")) == "[x]"
    assert prompt(text, said("user", ""), said("user", "x")) == "[][x]"
    with pytest.raises(ValueError, match="final message does not appear"):
        text = text_of("{{ messages[0].content }}{{ messages[-1].content | upper }}")
        text.chat([HI, said("assistant", "so")], continue_final=True)


def test_arguments_of_templates() -> None:
    text = text_of()
    for name in (
        "messages",
        "tools",
        "tokenize",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "eos_token",
        "raise_exception",
        "namespace",
    ):
        with pytest.raises(ValueError, match=f"{name} cannot be set"):
            text.chat([HI], template_arguments={name: ""})
    with pytest.raises(ValueError, match="template takes no argument reasoning_effort"):
        text.chat([HI], template_arguments={"reasoning_effort": "low"})
    # A model that does not reason can be told not to.
    text = text_of(special=[])
    assert text.chat([HI], template_arguments={"enable_thinking": False})
    with pytest.raises(ValueError, match="template takes no argument enable_thinking"):
        text.chat([HI], template_arguments={"enable_thinking": True})


def test_where_the_answer_begins() -> None:
    text = text_of(REASONS)
    assert text.chat([HI])["initial_state"] == "reasoning"
    off = {"enable_thinking": False}
    answer = text.chat([HI], template_arguments=off)
    assert answer["initial_state"] == "normal"
    about = said("user", "What is <think>?")
    answer = text.chat([about], template_arguments=off)
    assert answer["initial_state"] == "normal"
    for begun, state in [("<think>so", "reasoning"), ("<think>so</think>x", "normal")]:
        messages = [about, said("assistant", begun)]
        assert text.chat(messages, continue_final=True)["initial_state"] == state
    assert text_of(TEMPLATE).chat([about])["initial_state"] == "normal"


@pytest.mark.parametrize("template", [TEMPLATE, REASONS, None])
def test_boundaries_are_prefixes_of_the_next_prompts(template: str | None) -> None:
    text = text_of(template)
    system = said("system", "Be brief.")
    chat = [system, HI]
    first = text.chat(chat)
    assert all(0 < n <= len(first["tokens"]) for n in first["boundaries"])
    shared, turn = (first["tokens"][:n] for n in first["boundaries"])
    other = text.chat([system, said("user", "What?")])["tokens"]
    assert other[: len(shared)] == shared
    assert "brief" in text.detokenize(shared)["text"]
    for answer in ("Yes.", "é", " no", "\n"):
        reply = said("assistant", answer, reasoning_content="so")
        second = text.chat([*chat, reply, said("user", "?")])["tokens"]
        assert second[: len(turn)] == turn
    assert "Hi" in text.detokenize(turn)["text"]
    reply = said("assistant", "Yes")
    begun = text.chat([*chat, reply], continue_final=True)
    assert begun["boundaries"][-1] == len(begun["tokens"])


def test_a_model_without_a_template() -> None:
    text = text_of(None)
    assert not text.template.is_there and "no chat template" in text.notes[0]
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        said("system", "Be brief."),
        HI,
        said("assistant", "", tool_calls=[call]),
    ]
    assert prompt(text, *messages, said("tool", "3"), tools=[TOOL]) == (
        "System: These tools can be called:\n"
        f"{json.dumps(TOOL['function'])}\n"
        'A call is <tool_call>{"name": ..., "arguments": {...}}</tool_call>\n'
        "System: Be brief.\n"
        "User: Hi é\n"
        'Assistant: <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>\n'
        "Tool: 3\n"
        "Assistant:"
    )
    begun = said("assistant", "So ")
    assert prompt(text, HI, begun, continue_final=True) == "User: Hi é\nAssistant: So "
    ignoring = text_of(ignore=True)
    assert prompt(ignoring, HI) == "User: Hi é\nAssistant:"


def test_the_model_that_ships() -> None:
    tokenizer = load_tokenizer(Path(mlxtp.stories.__file__).parent / "model")
    text = Text(tokenizer, 1024)
    assert prompt(text, said("user", "Hi")) == "User: Hi\nAssistant:"
    story = "Once upon a time there was a fox. "
    tokens = text.text(story)["tokens"]
    assert tokens == tokenizer.encode(story)
    assert "".join(text.decode_each(tokens)["texts"]) == story


@pytest.mark.parametrize("kind", [byte_level, sentence_piece, naive])
def test_tokens_to_text_and_back(kind: Any) -> None:
    tokenizer = kind([" the", "ab"])
    text = Text(tokenizer, len(tokenizer) + 2)
    given = "a thé 🌍\n"
    tokens = text.tokenize(given)["tokens"]
    assert len(text.tokenize(given)["strings"]) == len(tokens)
    assert text.detokenize(tokens) == {"text": given}
    of = {bytes_: token for token, bytes_ in enumerate(text.bytes_of) if bytes_}
    assert {of[b" the"], of[b"ab"], of[b"\xc3"], of[END.encode()]} < set(text.known)
    answer = text.decode_each([of[b" the"], of[b"\xc3"], of[b"\xa9"], of[b"ab"]])
    assert answer["texts"] == [" the", "\ufffd", "\ufffd", "ab"]
    assert answer["offsets"] == [0, 4, 4, 5]
    assert answer["bytes"] == [[*b" the"], [0xC3], [0xA9], [*b"ab"]]
    assert text.bytes_of[len(tokenizer) :] == [b"", b""]
    assert text.tokens([3]) == {"tokens": [3]}
    for wrong in ([], [-1], [len(tokenizer) + 2]):
        with pytest.raises(ValueError, match="token"):
            text.tokens(wrong)
    with pytest.raises(ValueError, match="needs at least one"):
        text.text("")


def test_of_a_text_that_is_much_too_long_only_the_beginning_is_encoded() -> None:
    text = text_of(context=4)
    lengths = []
    encode = text.tokenizer._tokenizer.encode
    text.tokenizer._tokenizer.encode = lambda x, **options: (
        lengths.append(len(x)) or encode(x, **options)
    )
    assert len(text.tokenize("a" * 64)["tokens"]) == 64  # the front says of it
    for ask in (text.text, text.tokenize, lambda long: text.chat([said("user", long)])):
        with pytest.raises(ValueError, match=r"characters the first 64 are \d+ tokens"):
            ask("a" * 1000)
    assert max(lengths) == 64


def test_how_likely_tokens_are() -> None:
    tokenizer = byte_level([" the", "ab"])
    text = Text(tokenizer, len(tokenizer) + 2)
    of = {bytes_: token for token, bytes_ in enumerate(text.bytes_of)}
    [the, part] = of[b" the"], of[b"\xc3"]
    told = token_logprob(text, of[b"ab"], -3.0, [part, the], [-0.5, -1.0])
    assert told == TokenLogprob(
        of[b"ab"],
        "ab",
        [97, 98],
        -3.0,
        [
            TokenLogprob(part, "\ufffd", [0xC3], -0.5),
            TokenLogprob(the, " the", [*b" the"], -1.0),
        ],
    )
    # No infinity: JSON has none.
    told = token_logprob(text, the, -math.inf, [part], [-math.inf])
    assert [told.logprob, told.top[0].logprob] == [-9999, -9999]


def test_grammars_are_checked() -> None:
    text = text_of()
    assert text.check_grammar({"kind": "json"}) == {}
    with pytest.raises(ValueError, match=r'Unimplemented keys: \["not"\]'):
        text.check_grammar({"kind": "schema", "schema": {"not": {}}})
