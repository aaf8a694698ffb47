"""`/v1/messages`, as the official client `anthropic` sees it."""

import asyncio
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import anthropic
import pytest
from anthropic.types import RawMessageStreamEvent
from fake_ranks import READY, FakeRanks
from front import Front, serving, until
from pydantic import TypeAdapter

from mlxtp.serve.front import streaming
from mlxtp.serve.ranks.answer import DEEPEST

pytestmark = pytest.mark.once

ADD = {
    "name": "add",
    "description": "Add two numbers.",
    "input_schema": {"type": "object", "properties": {"a": {"type": "integer"}}},
}
EVERYTHING = 'think: hmm\nHello\ncall: add {"a": 1}\n'
EVENT = TypeAdapter(RawMessageStreamEvent)


@pytest.fixture(scope="module")
def front() -> Iterator[Front]:
    with serving() as front:
        yield front


@pytest.fixture(scope="module")
def client(front: Front) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(
        base_url=front.url, api_key="none", max_retries=0
    ) as client:
        yield client


def asking(given: Any, **more: Any) -> dict[str, Any]:
    """The body that asks for an answer to a text, or to messages."""
    messages = [{"role": "user", "content": given}] if isinstance(given, str) else given
    return {"model": "small", "max_tokens": 100, "messages": messages, **more}


def create(client: anthropic.Anthropic, given: Any, **more: Any) -> Any:
    """Ask for a whole message, and check that it has all that the client declares."""
    message = client.messages.create(**asking(given, **more))
    type(message).model_validate(message.model_dump(), strict=True)
    return message


def streamed(front: Front, given: Any, **more: Any) -> list[dict[str, Any]]:
    """The events of a stream as they are sent; each has what the client declares."""
    body = asking(given, stream=True, **more)
    response = front.post("/v1/messages", body)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = []
    for block in response.text.strip().split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        if event["type"] not in ("ping", "error"):
            EVENT.validate_python(event)
        events.append(event)
    return events


def asked(front: Front) -> dict[str, Any]:
    """What the chat template was last given."""
    return [call.arguments for call in front.fake.calls if call.name == "chat"][-1]


def without_ids(content: Any) -> Any:
    """Blocks without what no two answers share."""
    return [{name: x for name, x in block.items() if name != "id"} for block in content]


def test_whole(client: anthropic.Anthropic) -> None:
    message = create(client, EVERYTHING, tools=[ADD], metadata={"user_id": "me"})
    thinking, text, use = message.content
    assert (thinking.thinking, text.text) == ("hmm", "Hello\n")
    assert thinking.signature
    assert (use.type, use.name, use.input) == ("tool_use", "add", {"a": 1})
    assert (message.role, message.model) == ("assistant", "small")
    assert (message.stop_reason, message.stop_sequence) == ("tool_use", None)
    usage = message.usage
    # Half of the prompt was cached, and stands apart from the rest.
    assert usage.cache_read_input_tokens == usage.input_tokens > 0
    assert usage.output_tokens == len("hmmHello\n") + 2  # the call, the end
    assert usage.output_tokens_details.thinking_tokens == len("hmm")


def test_the_events_of_a_stream_and_their_order(
    front: Front, client: anthropic.Anthropic
) -> None:
    whole = create(client, EVERYTHING, tools=[ADD])
    events = streamed(front, EVERYTHING, tools=[ADD])
    kinds = [
        event["delta"]["type"]
        if event["type"] == "content_block_delta"
        else event["type"].removeprefix("content_block_")
        for event in events
    ]
    assert kinds == [
        *["message_start", "ping"],
        *["start", *["thinking_delta"] * len("hmm"), "signature_delta", "stop"],
        *["start", *["text_delta"] * len("Hello\n"), "stop"],
        *["start", "input_json_delta", "stop"],
        *["message_delta", "message_stop"],
    ]
    indices = [event["index"] for event in events if "index" in event]
    assert indices == sorted(indices)
    first, last = events[0]["message"], events[-2]
    usage = whole.usage.model_dump(exclude_unset=True)
    assert first["usage"] == {
        **usage,
        "output_tokens": 0,
        "output_tokens_details": {"thinking_tokens": 0},
    }
    assert (first["content"], first["stop_reason"]) == ([], None)
    assert last["usage"] == usage
    assert last["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}


def test_arguments_that_no_body_can_hold(client: anthropic.Anthropic) -> None:
    """A number beyond all floats, half of a surrogate pair: JSON all the same."""
    message = create(client, 'call: add {"a": 1e400, "b": "x\\ud800"}', tools=[ADD])
    assert message.content[0].input == {"a": sys.float_info.max, "b": "x?"}


def test_the_deepest_arguments_are_told_and_taken_back(
    client: anthropic.Anthropic,
) -> None:
    deep = '{"a":' * DEEPEST + "1" + "}" * DEEPEST
    [call] = create(client, f"call: add {deep}", tools=[ADD]).content
    assert call.input == json.loads(deep)
    said = {"role": "assistant", "content": [call.model_dump(exclude_unset=True)]}
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "2"}
    create(client, [said, {"role": "user", "content": [result]}], tools=[ADD])


def test_helpers_of_the_client(client: anthropic.Anthropic) -> None:
    whole = create(client, EVERYTHING, tools=[ADD])
    with client.messages.stream(**asking(EVERYTHING, tools=[ADD])) as stream:
        assert "".join(stream.text_stream) == "Hello\n"
        final = stream.get_final_message()
    assert without_ids(
        block.model_dump(exclude_unset=True) for block in final.content
    ) == without_ids(block.model_dump(exclude_unset=True) for block in whole.content)
    assert final.usage.model_dump() == whole.usage.model_dump()
    assert final.stop_reason == whole.stop_reason


def test_the_asynchronous_client(front: Front) -> None:
    async def ask() -> list[str]:
        async with anthropic.AsyncAnthropic(
            base_url=front.url, api_key="none"
        ) as client:
            async with client.messages.stream(**asking("Hi")) as stream:
                text = await stream.get_final_text()
            whole = await client.messages.create(**asking("Hi"))
            return [text, whole.content[0].text]

    assert asyncio.run(ask()) == ["Hi", "Hi"]


def test_several_turns_with_a_tool(front: Front, client: anthropic.Anthropic) -> None:
    cached = {"cache_control": {"type": "ephemeral"}}
    system = [
        {"type": "text", "text": "x-anthropic-billing-header: cch=abc;"},
        {"type": "text", "text": "Be brief.", **cached},
        {"type": "text", "text": "Be kind."},
    ]
    tools = [{**ADD, **cached}]
    first = create(client, EVERYTHING, tools=tools, system=system)
    use = first.content[2]
    result = {"type": "tool_result", "tool_use_id": use.id}
    conversation = [
        {"role": "user", "content": EVERYTHING},
        {"role": "assistant", "content": first.content},
        {
            "role": "user",
            "content": [
                {**result, "content": "3"},
                {
                    **result,
                    "content": [{"type": "text", "text": "no"}],
                    "is_error": True,
                },
                {**result},
                {"type": "text", "text": "Is it"},
                {"type": "text", "text": "right?", **cached},
            ],
        },
        {"role": "system", "content": [{"type": "text", "text": "late"}]},
    ]
    second = create(client, conversation, tools=tools, system=system)
    assert second.content[0].text == "Is it\nright?"
    about = {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": ADD["input_schema"],
    }
    tool = {"role": "tool", "tool_call_id": use.id}
    function = {"name": "add", "arguments": '{"a": 1}'}
    assert asked(front)["tools"] == [{"type": "function", "function": about}]
    assert asked(front)["messages"] == [
        {"role": "system", "content": "Be brief.\nBe kind."},
        {"role": "user", "content": EVERYTHING},
        {
            "role": "assistant",
            "content": "Hello\n",
            "reasoning_content": "hmm",
            "tool_calls": [{"id": use.id, "type": "function", "function": function}],
        },
        {**tool, "content": "3"},
        {**tool, "content": "Error: no"},
        {**tool, "content": ""},
        {"role": "user", "content": "Is it\nright?"},
        {"role": "system", "content": "late"},
    ]
    assert asked(front)["continue_final"] is False


def test_the_answer_goes_on_with_what_it_was_begun_with(
    front: Front, client: anthropic.Anthropic
) -> None:
    begun = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    create(client, begun)
    assert asked(front)["continue_final"] is True


def test_settings_and_how_an_answer_ends(
    front: Front, client: anthropic.Anthropic
) -> None:
    message = create(
        client,
        "Hello",
        max_tokens=3,
        stop_sequences=["x"],
        extra_body={"temperature": 0.5, "top_p": 0.9, "top_k": 5},
    )
    start = front.fake.starts[-1]
    settings = start.settings
    assert (settings.temperature, settings.top_p, settings.top_k) == (0.5, 0.9, 5)
    assert (settings.max_tokens, start.stop, start.is_chat) == (3, ["x"], True)
    assert (message.stop_reason, message.content[0].text) == ("max_tokens", "Hel")
    message = create(client, "one!two", stop_sequences=["!"])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "!")
    assert message.content[0].text == "one"
    message = create(client, "Hello")
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    # The prompt leaves room for two tokens; agents ask for more than there may be.
    prompt = "x" * (READY.context - len("<|user|>\n<|assistant|>") - 2)
    message = create(client, prompt, max_tokens=20_000)
    assert message.stop_reason == "model_context_window_exceeded"
    assert message.content[0].text == "xx"


def test_thinking(
    front: Front, client: anthropic.Anthropic, monkeypatch: pytest.MonkeyPatch
) -> None:
    def arguments(**more: Any) -> dict[str, Any]:
        create(client, "Hi", **more)
        given: dict[str, Any] = asked(front)["template_arguments"]
        return given

    assert arguments() == {}
    on = {"type": "enabled", "budget_tokens": 1024}
    assert arguments(thinking=on) == {"enable_thinking": True}
    assert arguments(thinking={"type": "adaptive"}) == {"enable_thinking": True}
    assert arguments(thinking={"type": "disabled"}) == {"enable_thinking": False}
    assert arguments(output_config={"effort": "low"}) == {
        "reasoning_effort": "low",
        "enable_thinking": True,
    }
    events = streamed(front, "think: hmm\nHi", thinking={**on, "display": "omitted"})
    deltas = [
        e["delta"]["type"] for e in events if e.get("index") == 0 and "delta" in e
    ]
    assert deltas == ["signature_delta"]
    # Agents ask every model to think: one that cannot answers all the same. And the
    # effort "high" is Anthropic's default, which Claude Code sends to every model.
    ready = replace(READY, reasoning_arguments=[])
    monkeypatch.setattr(front.ranks, "ready", ready)
    assert arguments(thinking=on, output_config={"effort": "high"}) == {}
    with pytest.raises(anthropic.BadRequestError, match=r"output_config\.effort"):
        arguments(output_config={"effort": "low"})


def test_a_schema(front: Front, client: anthropic.Anthropic) -> None:
    schema = {"type": "object"}
    wanted = {"format": {"type": "json_schema", "schema": schema}}
    assert create(client, "x", output_config=wanted).content[0].text == "{}"
    grammar = front.fake.starts[-1].settings.grammar
    assert (grammar["kind"], grammar["schema"]) == ("schema", schema)


def test_the_choice_of_a_tool(front: Front, client: anthropic.Anthropic) -> None:
    both = [ADD, {**ADD, "name": "other"}]
    for choice, names, count in (
        ({"type": "auto"}, None, 2),
        ({"type": "none"}, None, 0),
        ({"type": "any"}, ["add", "other"], 2),
        ({"type": "tool", "name": "other"}, ["other"], 2),
    ):
        message = create(client, "x", tools=both, tool_choice=choice)
        grammar = front.fake.starts[-1].settings.grammar
        forced = grammar and [tool["function"]["name"] for tool in grammar["tools"]]
        assert (forced, len(asked(front)["tools"] or ())) == (names, count), choice
        if names:
            assert message.content[0].name == names[0]
    create(client, "x", tools=[{**ADD, "strict": True}], tool_choice={"type": "any"})
    grammar = front.fake.starts[-1].settings.grammar
    assert grammar["tools"][0]["function"]["strict"] is True
    once = {"type": "auto", "disable_parallel_tool_use": True}
    twice = "call: add\ncall: add\n"
    assert len(create(client, twice, tools=both).content) == 2
    assert len(create(client, twice, tools=both, tool_choice=once).content) == 1
    with pytest.raises(anthropic.BadRequestError, match="no tool 'no'"):
        create(client, "x", tools=both, tool_choice={"type": "tool", "name": "no"})


def test_counting_tokens(front: Front, client: anthropic.Anthropic) -> None:
    more: dict[str, Any] = {"tools": [ADD], "system": "Be brief."}
    counted = client.messages.count_tokens(
        model="small", messages=[{"role": "user", "content": "Hi"}], **more
    )
    usage = create(client, "Hi", **more).usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens
    assert counted.input_tokens == len(front.fake.starts[-1].prompt)


IMAGE = {"type": "image", "source": {"type": "url", "url": "https://x/y.png"}}
NONSENSE = {"type": "json_schema", "schema": {"type": "nonsense"}}
REFUSED = [
    ({"mcp_servers": [{"name": "x"}]}, "mcp_servers"),
    ({"container": "x"}, "container"),
    ({"unheard_of": 1}, "unheard_of"),
    ({"speed": "fast"}, "speed"),
    ({"thinking": {"type": "between_tools"}}, "thinking.type"),
    ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools.0.type"),
    ({"tools": [{**ADD, "input_examples": [{}]}]}, "tools.0.input_examples"),
    ({"tools": [ADD, ADD]}, "tools.1"),
    ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
    (
        {"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}},
        "context_management.edits.0.type",
    ),
    ({"max_tokens": None}, "max_tokens"),
    ({"temperature": 3}, "temperature"),
    ({"stop_sequences": [""]}, "stop_sequences.0"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "robot", "content": ""}]}, "messages.0.role"),
    ({"messages": [{"role": "user", "content": []}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": [7]}]}, "messages.0.content.0"),
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages.0.content.0.type"),
    (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "tool_result", "tool_use_id": "1", "content": [IMAGE]}
                    ],
                }
            ]
        },
        "messages.0.content.0.content.0.type",
    ),
    ({"system": [IMAGE]}, "system.0.type"),
    ({"output_config": {"format": NONSENSE}}, "output_config.format"),
]


@pytest.mark.parametrize(("more", "name"), REFUSED, ids=[name for _, name in REFUSED])
def test_what_cannot_be_honoured_is_refused_by_name(
    front: Front, more: dict[str, Any], name: str
) -> None:
    response = front.post("/v1/messages", {**asking("x"), **more})
    content = response.json()
    assert response.status_code == 400
    assert (content["type"], content["error"]["type"]) == (
        "error",
        "invalid_request_error",
    )
    assert name in content["error"]["message"]


def test_what_changes_no_answer_is_taken(client: anthropic.Anthropic) -> None:
    message = client.beta.messages.create(
        **asking("x"),
        betas=["context-management-2025-06-27"],
        cache_control={"type": "ephemeral"},
        context_management={
            "edits": [{"type": "clear_thinking_20251015", "keep": "all"}]
        },
        metadata={"user_id": "x"},
        service_tier="auto",
        speed="standard",
        tools=[{**ADD, "defer_loading": False, "strict": True, "type": "custom"}],
    )
    assert message.content[0].text == "x"


def test_errors_have_their_own_form_and_classes(
    front: Front, client: anthropic.Anthropic
) -> None:
    with pytest.raises(anthropic.NotFoundError) as missing:
        create(client, "x", model="other")
    assert missing.value.type == "not_found_error"
    # Claude Code compacts a conversation when it reads these words and numbers.
    too_long = r"prompt is too long: 50\d\d tokens > 4095 maximum"
    with pytest.raises(anthropic.BadRequestError, match=too_long):
        create(client, "x" * 5000)
    with pytest.raises(anthropic.BadRequestError, match="no memory"):
        create(client, "mistake: no memory\n")
    with pytest.raises(anthropic.ServiceUnavailableError) as broken:
        create(client, "error: no memory\n")
    assert broken.value.type == "overloaded_error"
    for kind, name in (
        ("error", "overloaded_error"),
        ("mistake", "invalid_request_error"),
    ):
        asking_for = asking(f"Hi\n{kind}: no memory\n")
        with (
            pytest.raises(anthropic.APIStatusError, match="no memory") as middle,
            client.messages.stream(**asking_for) as stream,
        ):
            stream.get_final_message()
        assert middle.value.type == name


def test_a_full_queue_and_a_key(client: anthropic.Anthropic) -> None:
    with serving(
        FakeRanks(running=1), api_keys=("secret",), max_concurrency=1, max_queue=0
    ) as front:
        there = client.with_options(base_url=front.url, api_key="secret")
        with pytest.raises(anthropic.AuthenticationError):
            create(there.with_options(api_key="other"), "x")
        with there.messages.create(**asking("hang:\n", stream=True)):
            until(lambda: bool(front.fake.starts))
            with pytest.raises(anthropic.RateLimitError) as full:
                create(there, "x")
        assert full.value.response.headers["retry-after"] == "1"


def test_who_hangs_up_is_forgotten_at_once(
    front: Front, client: anthropic.Anthropic
) -> None:
    with client.messages.stream(**asking("Hi\nhang:\n")) as stream:
        assert next(iter(stream)).type == "message_start"
    until(lambda: front.fake.starts[-1].id in front.fake.cancelled)
    with pytest.raises(anthropic.APITimeoutError):
        client.with_options(timeout=0.2).messages.create(**asking("hang:\n"))
    until(lambda: front.fake.starts[-1].id in front.fake.cancelled)


def test_a_stream_that_waits_is_kept_alive(
    front: Front,
    client: anthropic.Anthropic,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(streaming, "KEEP_ALIVE_SECONDS", 0.02)
    events = streamed(front, "wait: 0.2\nHi")
    assert [event["type"] for event in events].count("ping") > 3
    with client.messages.stream(**asking("wait: 0.1\nHi")) as stream:
        assert stream.get_final_text() == "Hi"
