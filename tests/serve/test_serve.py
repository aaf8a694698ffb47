"""The whole server with the model that ships, asked by the official clients."""

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anthropic
import httpx2
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from pyramid import sweep
from server import Server, running
from serving import in_float32
from soak import idle

pytestmark = pytest.mark.once

STORY = "Once upon a time a girl named Mia lived by the sea with her dog Tom. "
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 6}, "age": {"enum": [7, 8]}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "look", "parameters": SCHEMA}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model in float32: batches and ranks add up in other orders."""
    return in_float32(tmp_path_factory.mktemp("model") / "stories32")


@pytest.fixture(scope="module", params=sweep([1, 3, 5], [3]), ids="{} ranks".format)
def server(request: pytest.FixtureRequest, folder: Path) -> Iterator[Server]:
    """A server on so many ranks that all tests here share."""
    with running("--model", folder, "--ranks", request.param) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    """OpenAI's client."""
    with openai.OpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120
    ) as client:
        yield client


def test_every_endpoint(server: Server, client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    text = client.completions.create(
        model=model.id, prompt=STORY, max_tokens=12, temperature=0, echo=True
    )
    assert text.choices[0].text.startswith(STORY)
    assert text.usage is not None and text.usage.completion_tokens == 12
    messages: list[Any] = [{"role": "user", "content": "Tell me of Mia."}]
    asked = {"model": model.id, "messages": messages, "seed": 5, "max_tokens": 16}
    whole = client.chat.completions.create(**asked)
    with client.chat.completions.create(**asked, stream=True) as stream:
        parts = [c.choices[0].delta.content or "" for c in stream if c.choices]
    assert "".join(parts) == whole.choices[0].message.content != ""
    response = client.responses.create(
        model=model.id, input="Tell me of Mia.", max_output_tokens=9, temperature=0
    )
    assert response.status == "incomplete" and response.output_text
    with anthropic.Anthropic(base_url=server.url, api_key="none") as other:
        message = other.messages.create(
            model=model.id,
            max_tokens=9,
            messages=messages,
            extra_body={"temperature": 0},
        )
        counted = other.messages.count_tokens(model=model.id, messages=messages)
    assert message.content[0].text == response.output_text
    assert (
        message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0)
        == counted.input_tokens
    )
    asked = {"model": model.id, "prompt": STORY}
    tokens = httpx2.post(f"{server.url}/tokenize", json=asked).json()["tokens"]
    back = httpx2.post(f"{server.url}/detokenize", json={"tokens": tokens}).json()
    assert STORY in back["prompt"]
    text = httpx2.get(f"{server.url}/metrics").text
    metrics = {x.name: x for x in text_string_to_metric_families(text)}
    assert metrics["mlxtp:generation_tokens"].samples[0].value >= 12 + 16 + 16 + 9 + 9
    cluster = httpx2.get(f"{server.url}/cluster").json()
    assert cluster["state"] == "ready"
    assert "<html" in httpx2.get(f"{server.url}/").text


def test_other_interfaces_stream(server: Server, client: openai.OpenAI) -> None:
    """Texts and forced calls, event by event: together they are the whole answer."""
    asked: dict[str, Any] = {"model": client.models.list().data[0].id, "temperature": 0}
    nothing = {"type": "object", "properties": {}, "additionalProperties": False}
    of_tool: dict[str, Any] = {
        "tools": [{"type": "function", "name": "look", "parameters": nothing}],
        "tool_choice": "required",
        "parallel_tool_calls": False,
    }
    for more in ({}, of_tool):
        body = {**asked, **more, "input": "Who is Mia?", "max_output_tokens": 99}
        [whole] = client.responses.create(**body).output
        with client.responses.create(**body, stream=True) as events:
            parts = [x.delta for x in events if x.type.endswith(".delta")]
        text = whole.arguments if more else whole.content[0].text
        assert "".join(parts) == text != ""
    of_tool = {
        "tools": [{"name": "look", "input_schema": nothing}],
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
    }
    asked["messages"] = [{"role": "user", "content": "Who is Mia?"}]
    asked["extra_body"] = {"temperature": asked.pop("temperature")}
    with anthropic.Anthropic(base_url=server.url, api_key="none") as other:
        for more in ({}, of_tool):
            body = {**asked, **more, "max_tokens": 99}
            message = other.messages.create(**body)
            with other.messages.stream(**body) as stream:
                streamed = stream.get_final_message()
            assert streamed.stop_reason == message.stop_reason
            [here], [there] = streamed.content, message.content
            assert (here.type, there.type) == (("tool_use" if more else "text"),) * 2
            if more:
                assert (here.name, here.input) == (there.name, there.input)
            else:
                assert here.text == there.text != ""


def fits(text: str) -> bool:
    """Whether a text is JSON as `SCHEMA` says."""
    person = json.loads(text)
    return (
        person.keys() == {"name", "age"}
        and isinstance(person["name"], str)
        and len(person["name"]) <= 6
        and person["age"] in (7, 8)
    )


def test_structured(client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "Who is Mia?"}]
    asked: dict[str, Any] = {"model": client.models.list().data[0].id, "seed": 1}
    # Else a model of tales fills all that a grammar allows with spaces.
    ends_soon = {"frequency_penalty": 2, "max_tokens": 120}
    answer = client.chat.completions.create(
        messages=messages,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "person", "schema": SCHEMA, "strict": True},
        },
        logprobs=True,
        top_logprobs=3,
        **asked,
        **ends_soon,
    ).choices[0]
    assert answer.finish_reason == "stop" and fits(answer.message.content)
    assert answer.logprobs is not None
    assert len(answer.logprobs.content[0].top_logprobs) == 3
    called = client.chat.completions.create(
        messages=messages,
        tools=[TOOL],
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=0,
        **asked,
        **ends_soon,
    ).choices[0]
    assert called.finish_reason == "tool_calls"
    [call] = called.message.tool_calls
    assert call.function.name == "look" and fits(call.function.arguments)
    with pytest.raises(openai.BadRequestError, match="no type"):
        client.chat.completions.create(
            messages=messages,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"type": "no type"}},
            },
            **asked,
        )


# Settings that OpenAI's client does not know.
CUTS = {"top_k": 30, "min_p": 0.02, "repetition_penalty": 1.1}
CUTS |= {"xtc_probability": 0.3, "xtc_threshold": 0.1}

# What is asked at once: beginnings, lengths and settings of all kinds.
MIXED: list[dict[str, Any]] = [
    {
        "prompt": STORY * (1 + n % 4) + ("One day " if n % 3 else ""),
        "max_tokens": 6 + 5 * (n % 7),
        **(
            {"temperature": 0},
            {"temperature": 0.9, "seed": n},
            {"temperature": 1.1, "seed": n, "top_p": 0.9, "presence_penalty": 0.5},
            {"temperature": 0, "frequency_penalty": 0.7, "logprobs": 2},
            {"temperature": 0.8, "seed": n, "stop": ["the", "."], "n": 2},
            {"temperature": 0, "logit_bias": {"11": -100}, "stream": True},
            {"temperature": 0, "echo": True, "logprobs": 1},
            {"temperature": 1, "seed": n, "extra_body": CUTS},
        )[n % 8],
    }
    for n in range(16)
]


def test_many_at_once_get_what_each_gets_alone(
    server: Server, client: openai.OpenAI
) -> None:
    """Beside clients that hang up, stall and send rubbish."""
    model = client.models.list().data[0].id
    over = threading.Event()

    def disturb(number: int) -> None:
        while not over.is_set():
            try:
                with httpx2.stream(
                    "POST",
                    f"{server.url}/v1/completions",
                    json={"prompt": STORY * (number + 1), "stream": True, "n": 2},
                    timeout=0.05 * (number + 1),
                ) as response:
                    response.read() if number == 1 else next(response.iter_bytes())
            except (httpx2.HTTPError, StopIteration):
                pass
            rubbish = httpx2.post(
                f"{server.url}/v1/completions",
                content=[b"{", b"[]", b'{"prompt": 7}'][number],
                headers={"content-type": "application/json"},
            )
            assert rubbish.status_code == 400

    with ThreadPoolExecutor(16) as pool:
        disturbing = [pool.submit(disturb, number) for number in range(3)]
        together = list(pool.map(lambda body: ask(client, model, body), MIXED))
        over.set()
        for future in disturbing:
            future.result()
    alone = [ask(client, model, body) for body in MIXED]
    assert together == alone
    deadline = time.monotonic() + 20
    while metric(server, "mlxtp:num_requests_running") > 0:
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_drafts_change_no_answer(folder: Path, client: openai.OpenAI) -> None:
    """Of several requests at once; how many were accepted is told."""
    expected = [ask(client, client.models.list().data[0].id, body) for body in MIXED]
    options = ["--draft-model", "ngram", "--num-draft-tokens", 4]
    with running("--model", folder, "--ranks", 2, *options) as server:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as other:
            model = other.models.list().data[0].id
            with ThreadPoolExecutor(16) as pool:
                answers = pool.map(lambda body: ask(other, model, body), MIXED)
                assert list(answers) == expected
        time.sleep(1.1)  # so often the front is told
        ask_once = {"model": model, "prompt": STORY, "max_tokens": 2}
        httpx2.post(f"{server.url}/v1/completions", json=ask_once)
        drafted = metric(server, "mlxtp:spec_decode_num_draft_tokens")
        assert drafted > metric(server, "mlxtp:spec_decode_num_accepted_tokens") > 0


def ask(client: openai.OpenAI, model: str, body: dict[str, Any]) -> list[Any]:
    """The texts of an answer, and why each ended."""
    answer = client.completions.create(model=model, **body)
    if not body.get("stream"):
        return [(choice.text, choice.finish_reason) for choice in answer.choices]
    with answer:
        chunks = [chunk.choices[0] for chunk in answer if chunk.choices]
    return [("".join(c.text for c in chunks), chunks[-1].finish_reason)]


def metric(server: Server, name: str) -> float:
    """The value of a metric without labels."""
    text = httpx2.get(f"{server.url}/metrics").text
    families = text_string_to_metric_families(text)
    return next(x.samples[0].value for x in families if x.name == name)


def test_a_second_turn_reads_what_is_new(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": client.models.list().data[0].id,
        "temperature": 0,
        "max_tokens": 10,
    }
    first = [{"role": "user", "content": f"A second turn. {STORY}"}]
    one = client.chat.completions.create(messages=first, **asked)
    turn = {"role": "assistant", "content": one.choices[0].message.content}
    more = [*first, turn, {"role": "user", "content": "And then?"}]
    two = client.chat.completions.create(messages=more, **asked)
    assert one.usage is not None and two.usage is not None
    # The plain template puts words between that the first turn has not read.
    assert two.usage.prompt_tokens_details.cached_tokens >= one.usage.prompt_tokens - 1


# JSON schemas, some of which nobody can follow, and some that are none.
SCHEMAS = st.recursive(
    st.sampled_from([{}, {"type": "integer"}, {"type": "null"}, {"type": "strin"}])
    | st.lists(st.text(max_size=3) | st.integers(0, 9), max_size=3).map(
        lambda values: {"enum": values}
    )
    | st.builds(
        lambda length: {"type": "string", "maxLength": length}, st.integers(-1, 3)
    ),
    lambda inner: (
        st.builds(lambda item: {"type": "array", "items": item, "maxItems": 2}, inner)
        | st.lists(inner, max_size=2).map(lambda parts: {"anyOf": parts})
        | st.builds(
            lambda of, needed: {"type": "object", "properties": of, "required": needed},
            st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
            st.lists(st.sampled_from("abc"), max_size=2),
        )
    ),
    max_leaves=4,
)
TOOLS = st.builds(
    lambda schema, strict: {
        "type": "function",
        "function": {"name": "look", "parameters": schema, "strict": strict},
    },
    SCHEMAS,
    st.booleans(),
)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "response_format": SCHEMAS.map(
        lambda schema: {"type": "json_schema", "json_schema": {"schema": schema}}
    )
    | st.just({"type": "json_object"}),
    "tools": st.lists(TOOLS, max_size=2),
    "tool_choice": st.sampled_from(["auto", "none", "required"]),
    "logit_bias": st.dictionaries(
        st.integers(-1, 1024).map(str), st.floats(-100, 100), max_size=5
    ),
    "logprobs": st.booleans(),
    "ignore_eos": st.booleans(),
    "parallel_tool_calls": st.booleans(),
    "presence_penalty": st.floats(-2, 2),
    "repetition_penalty": st.floats(0.01, 10),
    "stop": st.text(min_size=1, max_size=2),
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0, 1),
    "xtc_probability": st.floats(0, 1),
}


def test_nothing_that_is_asked_makes_it_fail(server: Server) -> None:
    """What the ranks are asked is answered or refused, and they go on."""
    hi = [{"role": "user", "content": "Hi"}]
    chat, completion = (f"{server.url}/v1/{x}completions" for x in ("chat/", ""))

    @settings(max_examples=20, suppress_health_check=list(HealthCheck))
    @given(fields=st.fixed_dictionaries({}, optional=FIELDS), count=st.integers(1, 2))
    def ask(fields: dict[str, Any], count: int) -> None:
        body = {"messages": hi, "max_tokens": 6, "seed": 1, "n": count, **fields}
        answer = httpx2.post(chat, json=body, timeout=60)
        assert answer.status_code in (200, 400), answer.text

    ask()
    plain = {"prompt": STORY, "max_tokens": 1}
    assert httpx2.post(completion, json=plain, timeout=60).status_code == 200
    assert metric(server, "mlxtp:job_losses") == 0


def test_what_can_never_fit(client: openai.OpenAI) -> None:
    model = client.models.list().data[0].id
    with pytest.raises(openai.BadRequestError, match="512"):
        client.completions.create(model=model, prompt=STORY * 100)
    with pytest.raises(openai.NotFoundError, match="other"):
        client.completions.create(model="other", prompt=STORY)


@pytest.mark.slow
def test_nobody_asks_for_longer_than_a_collective_may_take() -> None:
    """The ranks stay, take next to nothing of a core, and answer."""
    with running("--ranks", 2, "--timeout", 5) as server:
        assert idle(server, 8)["of a core, idle, the busiest rank"] < 0.1
        body = {"prompt": STORY, "max_tokens": 4}
        answer = httpx2.post(f"{server.url}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 200
        assert metric(server, "mlxtp:job_losses") == 0
