"""No body makes the server answer 500, hang or die."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from front import Front, serving, until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.once

# What each endpoint takes; an example changes some of it.
MESSAGES = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": MESSAGES, "tools": TOOLS},
    "/v1/completions": {"prompt": "hi"},
    "/v1/responses": {"model": "small", "input": "hi"},
    "/v1/messages": {"model": "small", "max_tokens": 9, "messages": MESSAGES},
    "/v1/messages/count_tokens": {"model": "small", "messages": MESSAGES},
    "/tokenize": {"prompt": "hi"},
    "/detokenize": {"tokens": [1, 2]},
}
# Words that mean something in bodies, so that examples get past the first check.
WORDS = (
    *("arguments", "auto", "content", "function", "function_call", "id", "image_url"),
    *("function_call_output", "input", "input_text", "json_object", "json_schema"),
    *("message", "name", "none", "output", "parameters", "reasoning", "required"),
    *("role", "schema", "system", "text", "thinking", "tool", "tool_calls", "type"),
    *("tool_choice", "tool_result", "tool_use", "user", "assistant"),
)

words = st.sampled_from(WORDS)
leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([-1, 0, 1, 2**31, 2**63, 10**30])
    | st.floats()
    | st.text(st.characters(exclude_categories=[]), max_size=20)
    | words
)
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(words | st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def front() -> Iterator[Front]:
    """A front that all examples share."""
    with serving() as running:
        yield running


@pytest.fixture(scope="module")
def names(front: Front) -> dict[str, list[str]]:
    """The fields of each endpoint, as its own description has them."""
    described = front.get("/openapi.json").json()
    posts = {
        path: of["post"] for path, of in described["paths"].items() if "post" in of
    }
    schemas = {
        path: post["requestBody"]["content"]["application/json"]["schema"]
        for path, post in posts.items()
    }
    assert schemas.keys() == BODIES.keys()
    return {
        path: sorted(
            described["components"]["schemas"][schema["$ref"].split("/")[-1]][
                "properties"
            ]
        )
        for path, schema in schemas.items()
    }


def check(front: Front, path: str, content: bytes) -> None:
    """The answer comes, and blames the client at most."""
    headers = {"Content-Type": "application/json"}
    answer = front.client.post(f"{front.url}{path}", content=content, headers=headers)
    assert answer.status_code < 500, (content, answer.text)
    if answer.status_code != 200:
        assert answer.json()["error"]["message"]
    elif answer.headers["content-type"].startswith("text/event-stream"):
        assert "server_error" not in answer.text and "api_error" not in answer.text


@settings(max_examples=80, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_bodies(front: Front, names: dict[str, list[str]], data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(sorted(BODIES)))
    some = st.dictionaries(st.sampled_from(names[path]) | words, values, max_size=3)
    body = json.dumps({**BODIES[path], **data.draw(some)})
    check(front, path, body.encode())


@settings(max_examples=20, suppress_health_check=list(HealthCheck))
@given(path=st.sampled_from(sorted(BODIES)), content=st.binary(max_size=50))
def test_bytes(front: Front, path: str, content: bytes) -> None:
    check(front, path, content)
    check(front, path, b'{"prompt": "' + content + b'"}')


def test_it_goes_on(front: Front) -> None:
    """Behind all that nothing is left, and the next request is answered."""
    answer = front.post("/v1/completions", {"prompt": "fine"})
    assert answer.json()["choices"][0]["text"] == "fine"
    until(lambda: not front.ranks.generations)
