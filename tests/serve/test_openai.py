"""OpenAI's endpoints, asked by OpenAI's client, before a rank 0 without a model."""

import asyncio
import json
import re
import time
import weakref
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_ranks
import openai
import pytest
from fake_ranks import END, READY, FakeRanks
from front import Front, serving, until

from mlxtp.serve.front import (
    anthropic,
    conversation,
    fields,
    models,
    openai_chat,
    openai_completions,
    responses,
    streaming,
)
from mlxtp.serve.front.answers import MOST_HELD
from mlxtp.serve.front.openai_chat import ChatCompletion
from mlxtp.serve.front.openai_completions import Completion
from mlxtp.serve.messages import Event, TokenLogprob

pytestmark = pytest.mark.once

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
OTHER_TOOL = {"type": "function", "function": {"name": "time"}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
TOKENS = [str(token) for token in range(END + 1)]


@pytest.fixture(scope="module")
def front() -> Iterator[Front]:
    """A front that all tests here share."""
    with serving() as running:
        yield running


@pytest.fixture(scope="module")
def client(front: Front) -> Iterator[openai.OpenAI]:
    """OpenAI's client of that front; it tries nothing twice."""
    with openai.OpenAI(
        base_url=f"{front.url}/v1", api_key="any", max_retries=0
    ) as made:
        yield made


def user(text: str) -> list[Any]:
    """A conversation of one message."""
    return [{"role": "user", "content": text}]


def prompt_text(front: Front) -> str:
    """What the last request's prompt says."""
    return bytes(front.fake.starts[-1].prompt).decode()


def refused(front: Front, path: str, **body: Any) -> dict[str, Any]:
    """The error of a request that is wrong in itself."""
    if path == "chat/completions":
        body = {"messages": user("hi"), **body}
    elif path == "completions":
        body = {"prompt": "hi", **body}
    answer = front.post(f"/v1/{path}", body)
    assert answer.status_code == 400, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    return error


def test_a_chat(client: openai.OpenAI, front: Front) -> None:
    answer = client.chat.completions.create(
        model="small",
        messages=[
            {"role": "developer", "content": "be kind"},
            {"role": "user", "content": "one"},
            {"role": "assistant", "content": [{"type": "text", "text": "two"}]},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "think: hm\nth"},
                    {"type": "text", "text": "rée"},
                ],
            },
        ],
    )
    assert prompt_text(front).startswith(
        "<|system|>be kind\n<|user|>one\n<|assistant|>two\n<|user|>think: hm\nthrée\n"
    )
    assert answer.id.startswith("chatcmpl-")
    assert (answer.object, answer.model) == ("chat.completion", "small")
    [choice] = answer.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "stop", None)
    assert (choice.message.role, choice.message.content) == ("assistant", "thrée")
    assert choice.message.model_extra == {
        "reasoning_content": "hm",
        "reasoning": "hm",
    }
    start = front.fake.starts[-1]
    usage = answer.usage
    assert usage is not None and usage.prompt_tokens_details is not None
    assert usage.completion_tokens_details is not None
    assert usage.prompt_tokens == len(start.prompt)
    assert usage.completion_tokens == len("hm" + "thrée") + 1 + 1  # é, and the end
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens == len(start.prompt) // 2
    assert usage.completion_tokens_details.reasoning_tokens == 2
    assert start.is_chat and start.tools is None
    assert len(start.boundaries) == 4
    # To the end of the context, and OpenAI's defaults.
    assert start.settings.max_tokens == 4096 - len(start.prompt)
    assert (start.settings.temperature, start.settings.top_p) == (1, 1)


def test_a_chat_as_a_stream(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="small",
            messages=user('think: hm\nhé\ncall: weather {"city": "Rome"}\ncall: time'),
            tools=[TOOL, OTHER_TOOL],
            stream=True,
            stream_options={"include_usage": True, "include_obfuscation": False},
            logprobs=True,
            top_logprobs=2,
        )
    )
    assert len({chunk.id for chunk in chunks}) == 1
    *told, last = chunks
    assert not last.choices and last.usage is not None
    assert last.usage.completion_tokens == 2 + 4 + 2 + 1
    assert all(chunk.usage is None for chunk in told)
    deltas = [chunk.choices[0].delta for chunk in told]
    assert deltas[0].role == "assistant"
    reasoning = [(delta.model_extra or {}).get("reasoning_content") for delta in deltas]
    assert "".join(filter(None, reasoning)) == "hm"
    assert "".join(delta.content or "" for delta in deltas) == "hé\n"
    calls = [call for delta in deltas for call in delta.tool_calls or []]
    assert [call.index for call in calls] == [0, 1]
    assert len({call.id for call in calls}) == 2
    assert [(c.function.name, c.function.arguments) for c in calls if c.function] == [
        ("weather", '{"city": "Rome"}'),
        ("time", "{}"),
    ]
    finishes = [chunk.choices[0].finish_reason for chunk in told]
    assert finishes == [None] * (len(told) - 1) + ["tool_calls"]
    logprobs = [
        entry
        for chunk in told
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content or []
    ]
    whole = bytes(byte for entry in logprobs for byte in entry.bytes or [])
    assert whole.decode() == "hmhé\n@@"
    assert all(len(entry.top_logprobs) == 2 for entry in logprobs)
    assert logprobs[0].logprob == logprobs[0].top_logprobs[0].logprob == -0.5


def test_a_stream_ends_with_done(front: Front) -> None:
    body = {"messages": user("a"), "stream": True}
    answer = front.post("/v1/chat/completions", body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = answer.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert "usage" not in json.loads(events[0].removeprefix("data: "))


@pytest.mark.parametrize(
    ("name", "value", "setting", "expected"),
    [
        ("temperature", 0, "temperature", 0),
        ("top_p", 0.5, "top_p", 0.5),
        ("top_k", 7, "top_k", 7),
        ("top_k", -1, "top_k", 0),
        ("min_p", 0.1, "min_p", 0.1),
        ("xtc_probability", 0.3, "xtc_probability", 0.3),
        ("xtc_threshold", 0.2, "xtc_threshold", 0.2),
        ("repetition_penalty", 1.5, "repetition_penalty", 1.5),
        ("presence_penalty", -1, "presence_penalty", -1),
        ("frequency_penalty", 2, "frequency_penalty", 2),
        ("seed", 5, "seed", 5),
        ("seed", -1, "seed", (1 << 63) - 1),
        ("logit_bias", {"7": -100, "8": 2.5}, "logit_bias", {7: -100, 8: 2.5}),
        ("max_tokens", 9, "max_tokens", 9),
        ("ignore_eos", True, "ignore_eos", True),
    ],
)
@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_a_setting(
    front: Front, path: str, name: str, value: Any, setting: str, expected: Any
) -> None:
    body = {"messages": user("a")} if path.startswith("chat") else {"prompt": "a"}
    answer = front.post(f"/v1/{path}", {**body, name: value})
    assert answer.status_code == 200, answer.text
    assert getattr(front.fake.starts[-1].settings, setting) == expected


def test_what_is_left_open() -> None:
    """The request's, then the command line's, generation_config.json's, OpenAI's."""
    ready = replace(READY, defaults={"temperature": 0.6, "top_p": 0.9, "top_k": 20})
    config = {"defaults": {"temperature": 0.3, "top_k": 4, "max_tokens": 5000}}
    with serving(FakeRanks(ready=ready), **config) as front:
        body = {"messages": user("a"), "temperature": 0.1}
        assert front.post("/v1/chat/completions", body).status_code == 200
        settings = front.fake.starts[-1].settings
        assert settings.temperature == 0.1
        assert settings.top_k == 4
        assert settings.top_p == 0.9
        assert settings.min_p == 0
        # The command line's is cut to the context; only a request's own is refused.
        length = len(front.fake.starts[-1].prompt)
        assert settings.max_tokens == 4096 - length
        seeds = {start.settings.seed for start in front.fake.starts}
        front.post("/v1/chat/completions", body)
        assert front.fake.starts[-1].settings.seed not in seeds


def test_several_choices(client: openai.OpenAI, front: Front) -> None:
    """Each has its seed, the first the request's, and all are the same once more."""

    def texts(count: int, stream: bool) -> list[str | None]:
        asked: dict[str, Any] = {
            "model": "small",
            "messages": user("seed:"),
            "seed": 3,
            "n": count,
        }
        if not stream:
            answer = client.chat.completions.create(**asked)
            assert answer.usage is not None
            assert answer.usage.prompt_tokens == len(front.fake.starts[-1].prompt)
            return [choice.message.content for choice in answer.choices]
        told = [""] * count
        for chunk in client.chat.completions.create(**asked, stream=True):
            for choice in chunk.choices:
                told[choice.index] += choice.delta.content or ""
        return list(told)

    whole = texts(3, stream=False)
    assert len(set(whole)) == 3
    assert whole[0] == "3"
    assert texts(3, stream=True) == whole
    assert texts(2, stream=False) == whole[:2]


def test_stop_and_length(client: openai.OpenAI, front: Front) -> None:
    answer = client.chat.completions.create(
        model="small", messages=user("abcd"), stop="c"
    )
    assert answer.choices[0].message.content == "ab"
    assert answer.choices[0].finish_reason == "stop"
    stops = [str(number) for number in range(16)]
    client.completions.create(model="small", prompt="a", stop=stops)
    assert front.fake.starts[-1].stop == stops
    answer = client.chat.completions.create(
        model="small", messages=user("abcd"), max_completion_tokens=3
    )
    assert answer.choices[0].message.content == "abc"
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize("stream", [False, True])
def test_completions(client: openai.OpenAI, front: Front, stream: bool) -> None:
    """Prompts as text, tokens and lists of both, with an echo and log-probabilities."""
    text = list(b"hi")
    for prompt, count in (("hi", 1), (text, 1), (["hi", "hi"], 2), ([text, text], 2)):
        asked: dict[str, Any] = {
            "model": "small",
            "prompt": prompt,
            "n": 2,
            "best_of": 2,
            "echo": True,
            "logprobs": 1,
        }
        told = [""] * count * 2
        logprobs: list[dict[str, list[Any]]] = [
            {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
            for _ in told
        ]
        finishes: list[str | None] = [None] * len(told)
        if stream:
            asked["stream_options"] = {"include_usage": True}
            parts = list(client.completions.create(**asked, stream=True))
        else:
            parts = [client.completions.create(**asked)]
        assert all(part.id.startswith("cmpl-") for part in parts)
        for choice in [choice for part in parts for choice in part.choices]:
            told[choice.index] += choice.text
            finishes[choice.index] = choice.finish_reason
            assert choice.logprobs is not None
            for name, values in logprobs[choice.index].items():
                values += getattr(choice.logprobs, name)
        usage = parts[-1].usage
        assert usage is not None and usage.prompt_tokens_details is not None
        assert usage.prompt_tokens == 2 * count
        assert usage.completion_tokens == 3 * len(told)  # with the end
        assert usage.prompt_tokens_details.cached_tokens == count
        assert told == ["hihi"] * len(told)
        assert finishes == ["stop"] * len(told)
        for entry in logprobs:
            assert entry["tokens"] == ["h", "i", "h", "i"]
            assert entry["token_logprobs"] == [None, -0.5, -0.5, -0.5]
            assert entry["top_logprobs"][:2] == [None, {"i": -0.5}]
            assert entry["text_offset"] == [0, 1, 2, 3]
        assert front.fake.starts[-1].settings.max_tokens == 16
        assert not front.fake.starts[-1].is_chat


def test_offsets_of_parts_of_characters(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="small", prompt="né!", logprobs=0)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["n", r"bytes:\xc3", r"bytes:\xa9", "!"]
    assert logprobs.text_offset == [0, 1, 1, 2]


@pytest.mark.parametrize(
    ("before", "prompt", "offsets"),
    [("^", "hi", [0, 0, 1]), (" ", "hi", [0, 0, 1]), ("", "\xe9", [0, 0])],
)
def test_offsets_of_an_echo(
    front: Front,
    monkeypatch: pytest.MonkeyPatch,
    before: str,
    prompt: str,
    offsets: list[int],
) -> None:
    """A token that tokenizers put before a text, or a space, is none of its text."""

    def text(text: str) -> dict[str, Any]:
        return {"tokens": list(f"{before}{text}".encode())}

    monkeypatch.setitem(fake_ranks.CALLS, "text", text)
    body = {"prompt": prompt, "echo": True, "logprobs": 0, "max_tokens": 0}
    choice = front.post("/v1/completions", body).json()["choices"][0]
    assert choice["text"] == prompt
    assert choice["logprobs"]["text_offset"] == offsets


def test_the_prompt_alone(client: openai.OpenAI) -> None:
    """No token, for the log-probabilities of a text."""
    answer = client.completions.create(
        model="small", prompt="abc", max_tokens=0, echo=True, logprobs=0
    )
    assert answer.choices[0].text == "abc"
    assert answer.choices[0].finish_reason == "length"
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs == [None, -0.5, -0.5]


def test_tools(client: openai.OpenAI, front: Front) -> None:
    """What the model is shown, and what its answer has to be, for each choice."""

    def choose(choice: Any, **more: Any) -> Any:
        asked: dict[str, Any] = {"tools": [TOOL, OTHER_TOOL], "tool_choice": choice}
        return client.chat.completions.create(
            model="small", messages=user("call: time {}"), **asked, **more
        ).choices[0]

    parameters = {"type": "object", "properties": {}, "additionalProperties": False}
    time_alone = {"name": "time", "description": "", "parameters": parameters}
    plain = [TOOL, {"type": "function", "function": time_alone}]

    assert choose("auto").message.tool_calls[0].function.name == "time"
    start = front.fake.starts[-1]
    assert start.tools == plain and start.settings.grammar is None
    assert "<|tools|>" in prompt_text(front)

    choose("none")
    start = front.fake.starts[-1]
    assert start.tools is None and start.settings.grammar is None
    assert "<|tools|>" not in prompt_text(front)

    answer = choose("required", parallel_tool_calls=False)
    assert answer.finish_reason == "tool_calls" and answer.message.content is None
    start = front.fake.starts[-1]
    grammar = {"kind": "tools", "tools": plain, "parallel": False}
    assert start.settings.grammar == {**grammar, "after_reasoning": False}
    assert not start.parallel_tool_calls

    by_name = {"type": "function", "function": {"name": "time"}}
    answer = choose(by_name, extra_body={"chat_template_kwargs": {}})
    assert answer.message.tool_calls[0].function.name == "time"
    start = front.fake.starts[-1]
    assert start.tools == plain
    assert start.settings.grammar == {
        "kind": "tools",
        "tools": plain[1:],
        "parallel": True,
        "after_reasoning": False,
    }

    # What comes of a call goes back to the model.
    client.chat.completions.create(
        model="small",
        messages=[
            *user("hi"),
            answer.message.model_dump(exclude_none=True),
            {"role": "tool", "tool_call_id": "x", "content": "noon"},
        ],
        tools=[TOOL],  # type: ignore[list-item]
    )
    messages = front.fake.calls[-1].arguments["messages"]
    assert messages[1]["tool_calls"][0]["function"]["name"] == "time"
    assert messages[2] == {"role": "tool", "content": "noon", "tool_call_id": "x"}


def test_response_format(client: openai.OpenAI, front: Front) -> None:
    def grammar(**more: Any) -> Any:
        client.chat.completions.create(model="small", messages=user("a"), **more)
        return front.fake.starts[-1].settings.grammar

    assert grammar(response_format={"type": "text"}) is None
    no_reasoning = {"after_reasoning": False}
    assert grammar(response_format={"type": "json_object"}) == {
        "kind": "json",
        **no_reasoning,
    }
    schema = {"name": "a", "schema": SCHEMA, "strict": True}
    form = {"type": "json_schema", "json_schema": schema}
    expected = {"kind": "schema", "schema": SCHEMA, **no_reasoning}
    assert grammar(response_format=form) == expected
    # A model that begins with its reasoning may end that first.
    thinking = {"reasoning_effort": "high", "response_format": form}
    assert grammar(**thinking) == {**expected, "after_reasoning": True}


def test_template_arguments(client: openai.OpenAI, front: Front) -> None:
    def arguments(**more: Any) -> Any:
        client.chat.completions.create(model="small", messages=user("a"), **more)
        return front.fake.calls[-1].arguments["template_arguments"]

    assert arguments() == {}
    assert arguments(reasoning_effort="none") == {
        "reasoning_effort": "none",
        "enable_thinking": False,
    }
    kwargs = {"chat_template_kwargs": {"enable_thinking": True, "x": [1]}}
    assert arguments(reasoning_effort="none", extra_body=kwargs) == {
        "reasoning_effort": "none",
        "enable_thinking": True,
        "x": [1],
    }
    assert front.fake.starts[-1].initial_state == "reasoning"
    kwargs = {"chat_template_kwargs": {"chat_template": "x"}}
    assert "chat_template" in refused(front, "chat/completions", **kwargs)["message"]


def test_the_last_message_goes_on(front: Front) -> None:
    messages = [*user("hi"), {"role": "assistant", "content": "once upon"}]
    body: dict[str, Any] = {"messages": messages, "continue_final_message": True}
    answer = front.post(
        "/v1/chat/completions", {**body, "add_generation_prompt": False}
    )
    assert answer.status_code == 200
    assert prompt_text(front).endswith("<|assistant|>once upon")
    path = "chat/completions"
    param = "add_generation_prompt"
    assert refused(front, path, **body, add_generation_prompt=True)["param"] == param
    assert refused(front, path, add_generation_prompt=False)["param"] == param
    assert refused(front, path, continue_final_message=True)["param"] == "messages"


def test_fields_without_effect(front: Front) -> None:
    taken: dict[str, Any] = dict.fromkeys(fields.WITHOUT_EFFECT, "x")
    hint = {"cache_control": {"type": "ephemeral"}}
    messages = [{"role": "user", "content": [{"type": "text", "text": "a", **hint}]}]
    for path, body in (
        ("chat/completions", {"messages": messages, "tools": [{**TOOL, **hint}]}),
        ("completions", {"prompt": "a"}),
    ):
        nothing = {"audio": None, "logprobs": None, "stream": None, "stop": None}
        answer = front.post(f"/v1/{path}", {**body, **taken, **nothing})
        assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        ("chat/completions", {"functions": []}, "functions", "not supported"),
        ("chat/completions", {"verbosity": "low"}, "verbosity", "'medium'"),
        ("chat/completions", {"modalities": ["audio"]}, "modalities.0", "'text'"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": "a", "mood": 1}]},
            "messages.0.mood",
            "not supported",
        ),
        (
            "chat/completions",
            {"messages": user([{"type": "image_url", "image_url": {}}])},  # type: ignore[arg-type]
            "messages.0.content.0",
            "'image_url' is not supported",
        ),
        ("chat/completions", {"messages": []}, "messages", "at least 1"),
        ("chat/completions", {"messages": [{"role": "user"}]}, None, "no content"),
        ("chat/completions", {"messages": user("a") * 0 + [{}]}, None, "required"),
        ("chat/completions", {"top_logprobs": 2}, "top_logprobs", "logprobs: true"),
        ("chat/completions", {"stream_options": {}}, "stream_options", "stream: true"),
        (
            "chat/completions",
            {"stream": True, "stream_options": {"each": True}},
            "stream_options.each",
            "not supported",
        ),
        ("chat/completions", {"tool_choice": "some"}, "tool_choice", '"required"'),
        ("chat/completions", {"tool_choice": "required"}, "tool_choice", "no tools"),
        (
            "chat/completions",
            {
                "tools": [TOOL],
                "tool_choice": {"type": "function", "function": {"name": "x"}},
            },
            "tool_choice",
            "the tools are: weather",
        ),
        ("chat/completions", {"tools": [TOOL, TOOL]}, "tools.1", "another tool"),
        (
            "chat/completions",
            {
                "tools": [TOOL],
                "tool_choice": "required",
                "response_format": {"type": "json_object"},
            },
            "response_format",
            "tool call",
        ),
        (
            "chat/completions",
            {"response_format": {"type": "json_schema"}},
            "response_format.json_schema.schema",
            "json_schema.schema",
        ),
        (
            "chat/completions",
            {"response_format": {"type": "json_object", "json_schema": {"schema": {}}}},
            "response_format.json_schema.schema",
            "the type is json_object",
        ),
        (
            "chat/completions",
            {
                "tools": [TOOL],
                "tool_choice": {
                    "type": "function",
                    "function": {"name": "weather", "strict": True},
                },
            },
            "tool_choice",
            '"required"',
        ),
        (
            "chat/completions",
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "schema": {"type": "nonsense"}},
                }
            },
            "response_format",
            "'nonsense'",
        ),
        ("completions", {"suffix": "x"}, "suffix", "not supported"),
        ("completions", {"best_of": 3, "n": 2}, "best_of", "equals n"),
        ("completions", {"prompt": ""}, None, "empty"),
        ("completions", {"prompt": []}, "prompt", "list of tokens"),
        ("completions", {"prompt": [1, "a"]}, "prompt", "list of tokens"),
        ("completions", {"prompt": [END + 1]}, None, f"0 to {END}"),
        ("completions", {"logit_bias": {"x": 1}}, "logit_bias", "tokens"),
        ("completions", {"logit_bias": {"257": 1}}, "logit_bias", "0 to 256"),
        ("completions", {"temperature": "1"}, "temperature", "valid number"),
        ("completions", {"temperature": 2.5}, "temperature", "less than or equal to 2"),
        ("completions", {"stop": ["x"] * 17}, "stop", "at most 16"),
        ("completions", {"stop": [""]}, "stop.0", "at least 1"),
        ("completions", {"n": 0}, "n", "greater than or equal to 1"),
        ("completions", {"max_tokens": 5000}, None, "2 tokens, and max_tokens asks"),
        ("completions", {"prompt": "a" * 4096}, None, "4096 tokens > 4095 maximum"),
        # litellm, and so aider, knows a full context by these words.
        ("completions", {"prompt": "a" * 4096}, None, "model's maximum context length"),
        (
            "completions",
            {"prompt": "a" * 4000, "echo": True, "logprobs": 20, "n": 13},
            "logprobs",
            "at most 1,048,576",
        ),
        (
            "chat/completions",
            {"logprobs": True, "top_logprobs": 20, "n": 128},
            "logprobs",
            "or for a stream",
        ),
        (
            "completions",
            {"prompt": ["a", "b"], "n": 128, "logit_bias": dict.fromkeys(TOKENS, 1)},
            "logit_bias",
            "65,792 entries, counted for each answer; at most 65,536",
        ),
        ("completions", {"prompt": "mistake: too odd"}, None, "too odd"),
    ],
)
def test_refused(
    front: Front, path: str, body: dict[str, Any], param: str | None, words: str
) -> None:
    error = refused(front, path, **body)
    assert words in error["message"]
    assert param is None or error["param"] == param


def test_prompts_that_are_too_long_together(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversation, "MOST_PROMPT_TOKENS", 5)
    assert refused(front, "completions", prompt="abc", n=2)["param"] == "n"
    assert refused(front, "completions", prompt=["abc", "abc"])["param"] == "n"
    answer = front.post("/v1/completions", {"prompt": "abcdef"})
    assert answer.status_code == 200


def test_log_probabilities_that_are_too_many_to_be_kept(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of answers that are whole, and of prompts that are echoed, together."""
    monkeypatch.setattr(conversation, "MOST_LOGPROBS", 24)
    asked = {"messages": user("a"), "logprobs": True, "top_logprobs": 2, "n": 2}
    words = refused(front, "chat/completions", **asked, max_tokens=5)["message"]
    assert "30 log-probabilities" in words and "or for a stream" in words
    assert "fewer tokens" in refused(front, "chat/completions", **asked)["message"]
    for some in ({"max_tokens": 4}, {"max_tokens": 5, "stream": True}):
        answer = front.post("/v1/chat/completions", {**asked, **some})
        assert answer.status_code == 200
    asked = {"prompt": ["abc", "abc"], "logprobs": 1, "max_tokens": 4}
    assert front.post("/v1/completions", asked).status_code == 200
    words = refused(front, "completions", **asked, echo=True)["message"]
    assert "28 log-probabilities" in words and "or for a stream" in words
    echoed = {**asked, "echo": True, "stream": True}
    assert front.post("/v1/completions", echoed).status_code == 200
    echoed["prompt"] = ["abcdef", "abcdefg"]
    words = refused(front, "completions", **echoed)["message"]
    assert "26 log-probabilities" in words and "stream" not in words


class Told:
    """A generation that tells these events; `tokens` are of no matter."""

    def __init__(self, events: Iterator[Event]) -> None:
        self._events = events

    async def __aiter__(self) -> AsyncGenerator[Event]:
        for event in self._events:
            yield event


@pytest.mark.parametrize("pieces", [[("text", "a")], []], ids=["text", "no text"])
@pytest.mark.parametrize("is_chat", [True, False])
def test_a_stream_keeps_no_log_probabilities(
    is_chat: bool, pieces: list[tuple[str, Any]]
) -> None:
    made: list[weakref.ref[TokenLogprob]] = []
    most = 0  # that were there at once

    def events() -> Iterator[Event]:
        nonlocal most
        for _ in range(2000):
            logprob = TokenLogprob(97, "a", [97], -0.5)
            made.append(weakref.ref(logprob))
            most = max(most, sum(one() is not None for one in made))
            yield Event("x", tokens=[97], pieces=pieces, logprobs=[logprob])
        yield Event("x", finish="length")

    async def told() -> int:
        generations: Any = [Told(events())]
        if is_chat:
            head = openai_chat.Head("x", 0, "small")
            chunks = openai_chat._chunks(head, generations, True, False)
        else:
            choices = [openai_completions.Choice(0, None, True)]
            chunks = openai_completions._chunks({}, generations, choices, None)
        written = '"bytes": [97]' if is_chat else '{"a": -0.5}'
        return sum([chunk.count(written) async for chunk in chunks])

    assert asyncio.run(told()) == 2000
    assert most <= MOST_HELD + 1


def test_the_ranks_fail(client: openai.OpenAI, front: Front) -> None:
    """A status before the stream has begun; an error in it after that."""
    asked: dict[str, Any] = {"model": "small", "messages": user("error: out of luck")}
    with pytest.raises(openai.InternalServerError) as caught:
        client.chat.completions.create(**asked)
    assert caught.value.status_code == 503 and "out of luck" in str(caught.value)
    with pytest.raises(openai.APIError, match="out of luck"):
        list(client.chat.completions.create(**asked, stream=True))
    asked["messages"] = user("a\nerror: out of luck")
    asked["n"] = 2
    told = ""
    with pytest.raises(openai.APIError, match="out of luck"):
        for chunk in client.chat.completions.create(**asked, stream=True):
            told += chunk.choices[0].delta.content or ""
    assert "a\n" in told
    until(lambda: not front.ranks.generations)  # the other one was cancelled


def test_models(client: openai.OpenAI, front: Front) -> None:
    names = [model.id for model in client.models.list()]
    assert names == ["small", "fake", "fake-model"]  # the model's own name comes last
    for name in names:  # each is taken
        client.completions.create(model=name, prompt="a", max_tokens=1)
    model = client.models.retrieve("fake-model")
    assert model.model_extra is not None
    assert model.model_extra["max_model_len"] == 4096
    with pytest.raises(openai.NotFoundError, match="small, fake, fake-model") as caught:
        client.chat.completions.create(model="gpt-4", messages=user("a"))
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError, match="small, fake"):
        client.models.retrieve("a/b")
    answer = front.post("/v1/completions", {"prompt": "a"})
    assert answer.json()["model"] == "small"


def test_tokenize(front: Front) -> None:
    def tokenize(**body: Any) -> Any:
        return front.post("/tokenize", {"model": "small", **body}).json()

    assert tokenize(prompt="ab", return_token_strs=True) == {
        "count": 2,
        "max_model_len": 4096,
        "tokens": [97, 98],
        "token_strs": ["a", "b"],
    }
    assert tokenize(prompt="ab", add_special_tokens=False)["token_strs"] is None
    assert not front.fake.calls[-1].arguments["add_special_tokens"]
    chat = tokenize(messages=user("a"), tools=[TOOL], return_token_strs=True)
    assert "".join(chat["token_strs"]).startswith("<|tools|>")
    assert "either prompt or messages" in tokenize()["error"]["message"]
    for name, value in (("tools", [TOOL]), ("add_generation_prompt", False)):
        assert tokenize(prompt="a", **{name: value})["error"]["param"] == name
    told = tokenize(messages=user("a"), add_special_tokens=False)
    assert told["error"]["param"] == "add_special_tokens"
    answer = front.post("/detokenize", {"tokens": [97, 98]})
    assert answer.json() == {"prompt": "ab"}
    answer = front.post("/detokenize", {"tokens": [1000]})
    assert answer.status_code == 400 and "0 to 256" in answer.text


def test_before_the_ranks_are_ready() -> None:
    with serving(FakeRanks(loading_seconds=0.5)) as front:
        until(lambda: front.ranks.state == "loading")
        health = front.get("/health")
        assert health.status_code == 503 and health.headers["retry-after"]
        assert health.json()["state"] == "loading"
        for path, body in (
            ("/v1/chat/completions", {"messages": user("a")}),
            ("/v1/completions", {"prompt": "a"}),
            ("/tokenize", {"prompt": "a"}),
        ):
            answer = front.post(path, body)
            assert answer.status_code == 503 and answer.headers["retry-after"]
            assert answer.json()["error"]["code"] == "loading"
        assert front.get("/v1/models").json()["data"][0]["id"] == "small"
        until(lambda: front.ranks.state == "ready")
        health = front.get("/health")
        assert health.status_code == 200 and health.json()["state"] == "ready"
        front.ranks.state = "draining"
        answer = front.post("/v1/completions", {"prompt": "a"})
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "draining"


def hang_up_after(front: Front, path: str, body: Any, wanted: bytes = b"") -> None:
    """Send a request, read until some bytes have come, and close the connection."""
    with front.connected(path, body) as connection:
        received = b""
        while wanted not in received:
            received += connection.recv(1000) or pytest.fail(f"ended: {received!r}")


def test_who_hangs_up_is_cancelled() -> None:
    """While it is encoded, waits, reads or decodes; whole or as a stream."""
    fake = FakeRanks(running=1)
    with serving(fake, max_concurrency=1, max_queue=3) as front:
        fake.call_seconds = 0.2
        asked = {"messages": user("hang:")}
        with front.connected("/v1/chat/completions", asked):
            until(lambda: len(fake.calls) == 1)
        fake.call_seconds = 0
        time.sleep(0.3)
        assert not fake.starts

        streamed = {**asked, "stream": True}
        hang_up_after(front, "/v1/chat/completions", streamed, b"data:")
        until(lambda: len(fake.cancelled) == 1)
        streamed["messages"] = user("abc\nhang:")
        hang_up_after(front, "/v1/chat/completions", {**streamed, "n": 2}, b'"c"')
        until(lambda: len(fake.cancelled) == 3)
        for path, body in (  # one decodes, one waits
            ("/v1/completions", {"prompt": ["hang:", "hang:"]}),
            ("/v1/chat/completions", {**asked, "n": 2}),
        ):
            with front.connected(path, body):
                until(lambda: front.ranks.running_and_waiting() == (1, 1))
            until(lambda: not front.ranks.generations)
        until(lambda: len(fake.cancelled) == len(fake.starts) == 7)
        answer = front.post("/v1/completions", {"prompt": "fine"})
        assert answer.json()["choices"][0]["text"] == "fine"


def test_a_full_queue() -> None:
    with serving(FakeRanks(running=1), max_concurrency=1, max_queue=2) as front:
        body = {"prompt": "hang:", "n": 2}
        with ExitStack() as stack:
            stack.enter_context(front.connected("/v1/completions", body))
            # Else the other one might come first, and be over.
            until(lambda: front.ranks.running_and_waiting() == (1, 1))
            stack.enter_context(front.connected("/v1/completions", {"prompt": "a"}))
            until(lambda: front.ranks.running_and_waiting() == (1, 2))
            answer = front.post("/v1/completions", {"prompt": "a"})
            assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
            assert "1 requests run, 2 wait" in answer.json()["error"]["message"]
            answer = front.post("/v1/completions", {"prompt": "a", "n": 4})
            assert answer.status_code == 400 and "at most 3" in answer.text
            encoded = len(front.fake.calls)
            many = {"prompt": ["a"] * 128, "n": 128}
            assert front.post("/v1/completions", many).status_code == 400
            assert len(front.fake.calls) == encoded
        until(lambda: not front.ranks.generations)


def test_who_waits_hears_something(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "KEEP_ALIVE_SECONDS", 0.05)
    with serving(FakeRanks(running=1)) as front:
        body = {"messages": user("a\nwait: 0.3\nb"), "stream": True}
        told = front.post("/v1/chat/completions", body).text
        assert told.count(streaming.KEEP_ALIVE) >= 2
        first, _, rest = told.partition(streaming.KEEP_ALIVE)
        assert '"a"' in first and '"b"' in rest and rest.endswith("data: [DONE]\n\n")


def test_what_makes_a_stream_ends_with_it() -> None:
    """Also where it waits for a client that reads nothing, and then hangs up."""
    ended = []

    async def events() -> AsyncGenerator[str]:
        try:
            while True:
                yield "data: x"
        finally:
            ended.append(True)

    async def life() -> None:
        making = events()  # is known here, so that nobody else ends it
        response = await streaming.stream(making, [])
        forever = asyncio.Event().wait
        sending = asyncio.create_task(
            response({"type": "http"}, lambda: forever(), lambda message: forever())  # type: ignore[arg-type, return-value]
        )
        await asyncio.sleep(0.01)
        sending.cancel()
        await asyncio.wait({sending})
        await asyncio.sleep(0.01)
        assert ended

    asyncio.run(life())


OF_BOTH = "Fields of both kinds of completions"


@pytest.mark.parametrize(
    ("names", "titles"),
    [
        (ChatCompletion.model_fields, (OF_BOTH, "`/v1/chat/completions`")),
        (Completion.model_fields, (OF_BOTH, "`/v1/completions`")),
        (models.Tokenize.model_fields, ("`/tokenize`, `/detokenize`",)),
        (models.Detokenize.model_fields, ("`/tokenize`, `/detokenize`",)),
        (responses.Body.model_fields, ("`POST /v1/responses`",)),
        (
            anthropic.Body.model_fields,
            ("`POST /v1/messages`, `/v1/messages/count_tokens`",),
        ),
        (fields.WITHOUT_EFFECT, ("Fields without effect",)),
    ],
)
def test_what_the_docs_list(names: Iterable[str], titles: tuple[str, ...]) -> None:
    """The parts of the page that are about an endpoint name all of its fields."""
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    parts = dict(
        part.split("\n", 1) for part in re.split("^##+ ", page, flags=re.MULTILINE)[1:]
    )
    content = "".join(parts[title] for title in titles)
    assert {name for name in names if f"`{name}`" not in content} == set()
