"""`/v1/responses`, as the official client `openai` sees it."""

import asyncio
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import openai
import pytest
from fake_ranks import READY
from front import Front, serving, until
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from mlxtp.generation.settings import Settings
from mlxtp.serve.front import conversation, responses, streaming
from mlxtp.serve.front.errors import Refusal
from mlxtp.serve.front.ranks import Generation, Ranks
from mlxtp.serve.messages import Start

pytestmark = pytest.mark.once

ADD = {
    "type": "function",
    "name": "add",
    "description": "Add two numbers.",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}},
    "strict": True,
}
EVERYTHING = 'think: hmm\nHello\ncall: add {"a": 1}\n'
EVENT = TypeAdapter(ResponseStreamEvent)


@pytest.fixture(scope="module")
def front() -> Iterator[Front]:
    with serving() as front:
        yield front


@pytest.fixture(scope="module")
def client(front: Front) -> Iterator[openai.OpenAI]:
    base_url = f"{front.url}/v1"
    with openai.OpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
        yield client


def create(client: openai.OpenAI, given: Any, **more: Any) -> Response:
    """Ask for a whole response, and check that it has all that the client declares."""
    response = client.responses.create(model="small", input=given, **more)
    Response.model_validate(response.model_dump(by_alias=True), strict=True)
    return response


def streamed(front: Front, given: Any, **more: Any) -> list[dict[str, Any]]:
    """The events of a stream as they are sent; each has what the client declares."""
    body = {"model": "small", "input": given, "stream": True, **more}
    response = front.post("/v1/responses", body)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = []
    for block in response.text.strip().split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        EVENT.validate_python(event)
        events.append(event)
    assert [e["sequence_number"] for e in events] == list(range(len(events)))
    return events


def asked(front: Front) -> dict[str, Any]:
    """What the chat template was last given."""
    return [call.arguments for call in front.fake.calls if call.name == "chat"][-1]


def without_ids(output: Any) -> Any:
    """Items without what no two answers share."""
    return [
        {name: x for name, x in item.items() if name not in ("id", "call_id")}
        for item in output
    ]


def test_whole(client: openai.OpenAI) -> None:
    response = create(client, EVERYTHING, tools=[ADD], metadata={"a": "b"}, user="me")
    reasoning, message, call = response.output
    assert reasoning.content[0].text == "hmm"
    assert response.output_text == "Hello\n"
    assert (message.type, message.role) == ("message", "assistant")
    assert (call.name, call.arguments) == ("add", '{"a": 1}')
    assert (response.status, response.incomplete_details) == ("completed", None)
    assert (response.model, response.metadata, response.user) == (
        "small",
        {"a": "b"},
        "me",
    )
    usage = response.usage
    assert usage.input_tokens_details.cached_tokens == usage.input_tokens // 2
    assert usage.output_tokens_details.reasoning_tokens == len("hmm")
    assert usage.output_tokens == len("hmmHello\n") + 2  # the call, the end
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens


def test_the_events_of_a_stream_and_their_order(
    front: Front, client: openai.OpenAI
) -> None:
    whole = create(client, EVERYTHING, tools=[ADD])
    events = streamed(front, EVERYTHING, tools=[ADD])
    text = ["output_text.delta"] * len("Hello\n") + ["output_text.done"]
    reasoning = ["reasoning_text.delta"] * len("hmm") + ["reasoning_text.done"]
    assert [event["type"].removeprefix("response.") for event in events] == [
        "created",
        "in_progress",
        *["output_item.added", "content_part.added", *reasoning],
        *["content_part.done", "output_item.done"],
        *["output_item.added", "content_part.added", *text],
        *["content_part.done", "output_item.done"],
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    done = [e["item"] for e in events if e["type"] == "response.output_item.done"]
    final = events[-1]["response"]
    assert final["output"] == done
    assert without_ids(done) == without_ids(
        item.model_dump(exclude_unset=True) for item in whole.output
    )
    assert final["usage"] == whole.usage.model_dump(exclude_unset=True)
    assert events[0]["response"]["status"] == "in_progress"
    indices = [event["output_index"] for event in events if "output_index" in event]
    assert indices == sorted(indices)
    assert set(indices) == {0, 1, 2}


def test_helpers_of_the_client(client: openai.OpenAI) -> None:
    with client.responses.stream(model="small", input=EVERYTHING, tools=[ADD]) as s:
        deltas = [e.delta for e in s if e.type == "response.output_text.delta"]
        final = s.get_final_response()
    assert "".join(deltas) == final.output_text == "Hello\n"
    assert final.output[2].parsed_arguments == {"a": 1}

    class Answer(BaseModel):
        words: str = "none"

    parsed = client.responses.parse(model="small", input="x", text_format=Answer)
    assert parsed.output_parsed == Answer()


def test_the_asynchronous_client(front: Front) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=f"{front.url}/v1", api_key="none"
        ) as client:
            async with client.responses.stream(model="small", input="Hi") as stream:
                texts = [e.delta async for e in stream if e.type.endswith("text.delta")]
            whole = await client.responses.create(model="small", input="Hi")
            return ["".join(texts), whole.output_text]

    assert asyncio.run(ask()) == ["Hi", "Hi"]


def test_several_turns_with_a_tool(front: Front, client: openai.OpenAI) -> None:
    first = create(client, EVERYTHING, tools=[ADD], instructions="Be brief.")
    call = first.output[2]
    conversation = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": [{"type": "input_text", "text": EVERYTHING}]},
        *(item.model_dump(exclude_none=True) for item in first.output),
        {
            "type": "function_call_output",
            "call_id": call.call_id,
            "output": [{"type": "input_text", "text": "3"}],
        },
        {"role": "user", "content": "Thanks"},
    ]
    second = create(client, conversation, tools=[ADD], instructions="Be brief.")
    assert second.output_text == "Thanks"
    about = {key: value for key, value in ADD.items() if key != "type"}
    assert asked(front)["tools"] == [{"type": "function", "function": about}]
    assert asked(front)["messages"] == [
        {"role": "system", "content": "Be brief.\n\nBe kind."},
        {"role": "user", "content": EVERYTHING},
        {
            "role": "assistant",
            "content": "Hello\n",
            "reasoning_content": "hmm",
            "tool_calls": [
                {
                    "id": call.call_id,
                    "type": "function",
                    "function": {"name": "add", "arguments": '{"a": 1}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": call.call_id, "content": "3"},
        {"role": "user", "content": "Thanks"},
    ]


def test_what_the_model_said_in_a_row_is_one_message_until_it_begins_again(
    front: Front, client: openai.OpenAI
) -> None:
    summary = {"type": "summary_text", "text": "hm"}
    refusal = {"type": "refusal", "refusal": "No."}
    create(
        client,
        [
            {"role": "user", "content": "x"},
            {"type": "reasoning", "id": "rs_1", "summary": [summary]},
            {"role": "assistant", "content": "a"},
            {
                "type": "reasoning",
                "id": "rs_2",
                "summary": [],
                "encrypted_content": "?",
            },
            {"role": "assistant", "content": [refusal]},
            {"role": "system", "content": "late"},
        ],
    )
    assert asked(front)["messages"][1:] == [
        {"role": "assistant", "content": "a", "reasoning_content": "hm"},
        {"role": "assistant", "content": "No."},
        {"role": "system", "content": "late"},
    ]


def test_no_item_is_blank(client: openai.OpenAI) -> None:
    response = create(client, "think: h\n\n \ncall: add\n\n", tools=[ADD])
    assert [item.type for item in response.output] == ["reasoning", "function_call"]
    assert create(client, "\n Hi").output_text == "\n Hi"


def test_settings(front: Front, client: openai.OpenAI) -> None:
    response = create(
        client,
        "Hello",
        temperature=0.5,
        top_p=0.9,
        max_output_tokens=3,
        parallel_tool_calls=False,
        reasoning={"effort": "high"},
        extra_body={
            "seed": 7,
            "top_k": 5,
            "stop": ["x"],
            "chat_template_kwargs": {"a": 1},
        },
    )
    start = front.fake.starts[-1]
    settings = start.settings
    assert (settings.temperature, settings.top_p, settings.top_k) == (0.5, 0.9, 5)
    assert (settings.max_tokens, settings.seed, settings.logprobs) == (3, 7, None)
    assert (start.stop, start.parallel_tool_calls, start.is_chat) == (
        ["x"],
        False,
        True,
    )
    assert asked(front)["template_arguments"] == {
        "reasoning_effort": "high",
        "enable_thinking": True,
        "a": 1,
    }
    assert response.output_text == "Hel"
    assert (response.status, response.output[0].status) == ("incomplete",) * 2
    assert response.incomplete_details.reason == "max_output_tokens"
    assert (response.temperature, response.reasoning.effort) == (0.5, "high")
    create(client, "Hi", reasoning={"effort": "none"}, max_output_tokens=10_000)
    assert asked(front)["template_arguments"]["enable_thinking"] is False
    last = streamed(front, "Hello", max_output_tokens=3)[-1]
    assert last["type"] == "response.incomplete"


def test_an_effort_goes_to_the_arguments_that_the_template_reads(
    front: Front, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    def template_reads(*names: str) -> None:
        ready = replace(READY, reasoning_arguments=list(names))
        monkeypatch.setattr(front.ranks, "ready", ready)

    template_reads("reasoning_effort")
    create(client, "Hi", reasoning={"effort": "low"})
    assert asked(front)["template_arguments"] == {"reasoning_effort": "low"}
    template_reads()
    for effort in ("low", "none"):
        with pytest.raises(openai.BadRequestError, match=rf"\.effort is '{effort}'"):
            create(client, "Hi", reasoning={"effort": effort})
    # A model that cannot reason does not.
    ready = replace(READY, reasoning_arguments=[], has_reasoning=False)
    monkeypatch.setattr(front.ranks, "ready", ready)
    create(client, "Hi", reasoning={"effort": "none"})
    assert asked(front)["template_arguments"] == {}


def test_reasoning_as_a_summary(front: Front, client: openai.OpenAI) -> None:
    response = create(client, "think: hmm\nHi", reasoning={"summary": "auto"})
    assert response.output[0].summary[0].text == "hmm"
    assert response.output[0].content == []
    events = streamed(front, "think: h\nHi", reasoning={"summary": "auto"})
    assert [e["type"] for e in events if "summary" in e["type"]] == [
        "response.reasoning_summary_part.added",
        "response.reasoning_summary_text.delta",
        "response.reasoning_summary_text.done",
        "response.reasoning_summary_part.done",
    ]


def test_log_probabilities(front: Front, client: openai.OpenAI) -> None:
    include = ["message.output_text.logprobs"]
    given = "think: h\nHé"
    response = create(client, given, include=include, top_logprobs=2)
    logprobs = response.output[1].content[0].logprobs
    assert bytes(b for one in logprobs for b in one.bytes).decode() == "Hé"
    assert all(len(one.top_logprobs) == 2 for one in logprobs)
    events = streamed(front, given, include=include)
    deltas = [e["logprobs"] for e in events if e["type"].endswith("output_text.delta")]
    assert [len(part) for part in deltas] == [1, 2]
    assert create(client, "Hi").output[0].content[0].logprobs == []


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_that_are_too_many_to_be_kept(
    front: Front, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """The last event of a stream has them all."""
    monkeypatch.setattr(conversation, "MOST_LOGPROBS", 10)
    asked = {"model": "small", "input": "x", "stream": stream, "max_output_tokens": 5}
    for name, value in (("include", [responses.LOGPROBS]), ("top_logprobs", 1)):
        body = {**asked, name: value}
        assert front.post("/v1/responses", body).status_code == 200
        answer = front.post("/v1/responses", {**body, "max_output_tokens": 11})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == name


def test_the_form_of_the_text(front: Front, client: openai.OpenAI) -> None:
    schema = {"type": "object"}
    for wanted, grammar in (
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"kind": "json"}),
        (
            {"type": "json_schema", "name": "x", "schema": schema, "strict": True},
            {"kind": "schema", "schema": schema},
        ),
    ):
        response = create(client, "x", text={"format": wanted})
        given = front.fake.starts[-1].settings.grammar
        assert (given and {**given, **(grammar or {})}) == given
        assert (given is None) == (grammar is None)
        assert response.text.format.type == wanted["type"]
    with pytest.raises(openai.BadRequestError, match="nonsense"):
        schema = {"type": "nonsense"}
        wanted = {"type": "json_schema", "name": "x", "schema": schema}
        create(client, "x", text={"format": wanted})


def test_the_choice_of_a_tool(front: Front, client: openai.OpenAI) -> None:
    other = {**ADD, "name": "other"}
    both = [ADD, other]

    def forced() -> list[str] | None:
        grammar = front.fake.starts[-1].settings.grammar
        return grammar and [tool["function"]["name"] for tool in grammar["tools"]]

    def shown() -> list[str]:
        return [t["function"]["name"] for t in asked(front)["tools"] or []]

    named = [{"type": "function", "name": "other"}]
    allowed = {"type": "allowed_tools", "tools": named}
    for choice, names, seen in (
        ("auto", None, ["add", "other"]),
        ("none", None, []),
        ("required", ["add", "other"], ["add", "other"]),
        (named[0], ["other"], ["add", "other"]),
        ({**allowed, "mode": "auto"}, None, ["other"]),
        ({**allowed, "mode": "required"}, ["other"], ["other"]),
    ):
        response = create(client, "x", tools=both, tool_choice=choice)
        assert (forced(), shown()) == (names, seen), choice
        if names:
            assert response.output[0].name == names[0]
    create(client, "x", tools=[ADD, {**other, "strict": False}], tool_choice="required")
    grammar = front.fake.starts[-1].settings.grammar
    stricts = [tool["function"].get("strict") for tool in grammar["tools"]]
    assert stricts == [True, None]
    for choice in ("any", {"type": "web_search"}, {"type": "function", "name": "no"}):
        with pytest.raises(openai.BadRequestError) as caught:
            create(client, "x", tools=both, tool_choice=choice)
        assert caught.value.param == "tool_choice"


def test_functions_in_a_namespace(front: Front, client: openai.OpenAI) -> None:
    tools = [
        ADD,
        {
            "type": "namespace",
            "name": "mcp__math__",
            "description": "Numbers.",
            "tools": [ADD],
        },
    ]
    response = create(client, "call: mcp__math__add\n", tools=tools)
    names = [t["function"]["name"] for t in asked(front)["tools"]]
    assert names == ["add", "mcp__math__add"]
    call = response.output[0]
    assert (call.namespace, call.name) == ("mcp__math__", "add")
    create(client, [{"role": "user", "content": "x"}, call.model_dump()], tools=tools)
    function = asked(front)["messages"][1]["tool_calls"][0]["function"]
    assert function["name"] == "mcp__math__add"


REFUSED = [
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"background": True}, "background"),
    ({"prompt": {"id": "pmpt_1"}}, "prompt"),
    ({"truncation": "auto"}, "truncation"),
    ({"unheard_of": 1}, "unheard_of"),
    ({"n": 2}, "n"),
    ({"text": {"verbosity": "low"}}, "text.verbosity"),
    ({"reasoning": {"mode": "pro"}}, "reasoning.mode"),
    ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
    ({"tools": [{**ADD, "async": True}]}, "tools.0.async"),
    ({"tools": [ADD, ADD]}, "tools.1"),
    ({"temperature": 3}, "temperature"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"input": 7}, "input"),
    ({"input": [7]}, "input.0.type"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input.0.type"),
    ({"input": [{"role": "robot", "content": ""}]}, "input.0.role"),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
        "input.0.content.0",
    ),
    ({"input": [{"type": "function_call", "call_id": "1"}]}, "input.0.name"),
    ({"input": [{"role": "user", "content": "x", "odd": 1}]}, "input.0.odd"),
    (
        {
            "text": {
                "format": {"type": "json_schema", "schema": {"type": "nonsense"}},
            }
        },
        "text.format",
    ),
    (
        {"text": {"format": {"type": "json_object", "schema": {}}}},
        "text.format.schema",
    ),
    (
        {"tools": [ADD], "tool_choice": {"type": "function", "name": "add", "odd": 1}},
        "tool_choice",
    ),
    ({"model": "other"}, "model"),
]


@pytest.mark.parametrize(("body", "param"), REFUSED, ids=[p for _, p in REFUSED])
def test_what_cannot_be_honoured_is_refused_by_name(
    front: Front, body: dict[str, Any], param: str
) -> None:
    response = front.post("/v1/responses", {"model": "small", "input": "x", **body})
    error = response.json()["error"]
    assert response.status_code == (404 if param == "model" else 400)
    assert error["param"].startswith(param)
    assert param in error["message"] or param == "model"


def test_what_changes_no_answer_is_taken(front: Front) -> None:
    body = {
        "background": False,
        "client_metadata": {"a": "b"},
        "include": ["reasoning.encrypted_content"],
        "max_tool_calls": 3,
        "metadata": {"a": "b"},
        "previous_response_id": None,
        "prompt_cache_key": "x",
        "prompt_cache_retention": "24h",
        "reasoning": {"effort": "medium", "summary": None},
        "safety_identifier": "x",
        "service_tier": "auto",
        "store": True,
        "stream": True,
        "stream_options": {"include_obfuscation": False},
        "text": {"verbosity": "medium"},
        "truncation": "disabled",
        "user": "x",
    }
    assert streamed(front, "x", **body)[-1]["type"] == "response.completed"


def test_an_error_in_the_middle_of_an_answer(
    front: Front, client: openai.OpenAI
) -> None:
    for kind, code in (("error", "server_error"), ("mistake", "invalid_prompt")):
        *_, done, last = streamed(front, f"Hi\n{kind}: no memory\n")
        assert done["type"] == "response.output_text.delta"
        assert last["type"] == "response.failed"
        assert last["response"]["error"] == {"code": code, "message": "no memory"}
        assert last["response"]["output"][0]["status"] == "incomplete"
    with pytest.raises(openai.InternalServerError, match="no memory"):
        create(client, "error: no memory\n")
    with pytest.raises(openai.BadRequestError, match="no memory"):
        create(client, "mistake: no memory\n")


def test_an_error_after_a_long_wait_ends_a_stream_that_has_not_begun() -> None:
    start = Start(id="1", prompt=[1], settings=Settings(max_tokens=1, seed=0))
    body = responses.Body(model="small", input="x")
    ranks = Ranks()
    answer = responses.Answer(body, "small", {}, Generation(start, ranks))
    asyncio.run(ranks.close())
    lines = answer.failed(Refusal(503, "gone")).splitlines()
    events = [json.loads(x.removeprefix("data: ")) for x in lines if x[:5] == "data:"]
    assert [event["sequence_number"] for event in events] == [0, 1, 2]
    assert [(event["type"], event["response"]["status"]) for event in events] == [
        ("response.created", "in_progress"),
        ("response.in_progress", "in_progress"),
        ("response.failed", "failed"),
    ]


def test_who_hangs_up_is_forgotten_at_once(front: Front, client: openai.OpenAI) -> None:
    with client.responses.create(model="small", input="Hi\nhang:\n", stream=True) as s:
        assert next(iter(s)).type == "response.created"
    until(lambda: front.fake.starts[-1].id in front.fake.cancelled)
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.2).responses.create(
            model="small", input="hang:\n"
        )
    until(lambda: front.fake.starts[-1].id in front.fake.cancelled)


def test_a_stream_that_waits_is_kept_alive(
    front: Front, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "KEEP_ALIVE_SECONDS", 0.02)
    body = {"model": "small", "input": "wait: 0.5\nHi", "stream": True}
    assert front.post("/v1/responses", body).text.count(streaming.KEEP_ALIVE) > 2
    with client.responses.stream(model="small", input="wait: 0.1\nHi") as stream:
        assert stream.get_final_response().output_text == "Hi"
