"""Who is let in, and how much they may send."""

import asyncio
import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from fake_ranks import FakeRanks
from front import Front, serving, until

from mlxtp.serve.front import security
from mlxtp.serve.front.config import Config

pytestmark = pytest.mark.once

BODY = {"prompt": "a"}
HOST = [(b"host", b"localhost")]
SITE = "https://chat.example"
PATHS = ("/v1/models", "/metrics", "/cluster", "/openapi.json", "/nothing")


@pytest.fixture(scope="module")
def front() -> Iterator[Front]:
    """A front without keys that lets one site in."""
    with serving(allowed_origins=(SITE,), max_body_bytes=1000) as running:
        yield running


@pytest.fixture(scope="module")
def locked() -> Iterator[Front]:
    """A front with two keys."""
    with serving(api_keys=("first-key", "zweiter-schlüssel")) as running:
        yield running


def test_keys(locked: Front) -> None:
    def status(path: str, **headers: str) -> int:
        return locked.get(path, headers=headers).status_code

    for path in ("/health", "/", "/page/app.js"):
        assert status(path) == 200
    for path in PATHS:
        assert status(path) == 401
    models = "/v1/models"
    assert status(models, Authorization="Bearer first-key") == 200
    assert status(models, Authorization="bearer first-key") == 200
    assert status(models, **{"x-api-key": "first-key"}) == 200
    raw = [(b"x-api-key", "zweiter-schlüssel".encode())]
    assert locked.client.get(f"{locked.url}{models}", headers=raw).status_code == 200
    for wrong in ("x", "first-ke", "first-keyy", "first-key zweiter", "FIRST-KEY"):
        assert status(models, Authorization=f"Bearer {wrong}") == 401
        assert status(models, **{"x-api-key": wrong}) == 401
    assert status(models, Authorization="Basic first-key") == 401
    answer = locked.post("/v1/completions", BODY)
    assert answer.status_code == 401 and not locked.fake.starts
    assert answer.json()["error"]["code"] == "invalid_api_key"
    answer = locked.post("/v1/messages", BODY)
    assert answer.json()["error"]["type"] == "authentication_error"
    assert answer.json()["type"] == "error"


def test_hosts(front: Front, locked: Front) -> None:
    """Without a key only addresses and own names, so that no name can be rebound."""

    def status(of: Front, host: str, **more: str) -> int:
        return of.get("/v1/models", headers={"Host": host, **more}).status_code

    own = ["localhost", "LOCALHOST:8080", "127.0.0.1:1", "[::1]:80", "192.168.1.5"]
    for host in [*own, socket.gethostname(), "a.localhost"]:
        assert status(front, host) == 200, host
    for host in ("evil.example", "evil.example:8080", "127.0.0.1.evil.example", "[x"):
        assert status(front, host) == 403, host
    # Who has a key is no page that was led here.
    key = {"x-api-key": "first-key"}
    assert status(locked, "proxy.example", **key) == 200
    assert front.get("/health", headers={"Host": "evil.example"}).status_code == 403
    with serving(host="studio.example") as named:
        assert status(named, "studio.example:8080") == 200


def test_origins(front: Front) -> None:
    """Another site's page is refused, also where no browser would ask first."""
    simple = {"Content-Type": "text/plain", "Origin": "https://evil.example"}
    url = f"{front.url}/v1/completions"
    before = len(front.fake.starts)
    for origin in ("https://evil.example", "null", "http://127.0.0.1:1", "http://["):
        headers = {"Origin": origin}
        answer = front.post("/v1/completions", BODY, headers=headers)
        assert answer.status_code == 403, origin
        assert "access-control-allow-origin" not in answer.headers
    answer = front.client.post(url, content=json.dumps(BODY), headers=simple)
    assert answer.status_code == 403
    # Without an Origin such a body is refused too: no form makes application/json.
    answer = front.client.post(
        url, content=json.dumps(BODY), headers={"Content-Type": "text/plain"}
    )
    assert answer.status_code == 415
    assert len(front.fake.starts) == before

    for origin in (front.url, SITE):
        answer = front.post("/v1/completions", BODY, headers={"Origin": origin})
        assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == SITE
    asks = {
        "Origin": SITE,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, content-type",
    }
    answer = front.client.options(url, headers=asks)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == SITE
    asks["Origin"] = "https://evil.example"
    assert front.client.options(url, headers=asks).status_code == 400


def test_sizes(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = front.post("/v1/completions", {"prompt": "a" * 1000})
    assert answer.status_code == 413 and "1000 bytes" in answer.text
    headers = {"Content-Type": "application/json"}
    url = f"{front.url}/v1/completions"
    for count in (11, 100):  # without Content-Length, read at once or piece by piece
        chunks = (b"a" * 100 for _ in range(count))
        answer = front.client.post(url, content=chunks, headers=headers)
        assert answer.status_code == 413
    assert front.post("/v1/messages", {"a": "a" * 1000}).json() == {
        "type": "error",
        "error": {
            "type": "request_too_large",
            "message": "the body is longer than 1000 bytes",
        },
    }
    many = {f"x-{number}": "a" * 1000 for number in range(40)}
    assert front.get("/health", headers=many).status_code == 431
    # A body that does not come.
    monkeypatch.setattr(security, "BODY_SECONDS", 0.1)
    with front.connected("/v1/completions", BODY) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        )
        received = b""
        while more := connection.recv(1000):  # until it is closed
            received += more
        assert b" 200 " in received and b" 408 " in received


def test_requests_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(security, "SPARE_REQUESTS", 0)
    fake = FakeRanks()
    fake.call_seconds = 30.0
    with serving(fake, max_concurrency=1, max_queue=1) as front:
        with (
            front.connected("/v1/completions", BODY),
            front.connected("/v1/completions", BODY),
        ):
            until(lambda: len(fake.calls) == 2)
            answer = front.get("/health")
            assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
        until(lambda: front.get("/health").status_code == 200)


def test_who_does_not_read(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Is let go: an answer that nobody reads holds no place for ever."""
    monkeypatch.setattr(security, "SEND_SECONDS", 0.05)
    ended = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await send({"type": "http.response.start", "status": 200})
        finally:
            ended.append(scope["path"])

    async def request() -> None:
        scope = {"type": "http", "path": "/", "method": "GET", "headers": HOST}
        parts = [{"type": "http.request"}]

        async def receive() -> Any:
            return parts.pop() if parts else await asyncio.Event().wait()

        async def send(message: Any) -> None:
            await asyncio.Event().wait()

        guard = security.Guard(app, Config(("small",)))
        await asyncio.wait_for(guard(scope, receive, send), 10)

    asyncio.run(request())
    assert ended == ["/"]
    assert "read nothing" in caplog.text


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"1",
        b'{"prompt": NaN}',
        b'{"prompt": "a", "metadata": {"a": [1e400]}}',
        b'{"prompt": "a", "metadata": {"a": -1e400}}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\xff"}',
        b'{"prompt": ' + b"[" * 400 + b"]" * 400 + b"}",
        '{"prompt": "a"}'.encode("utf-16"),
    ],
)
def test_garbage(front: Front, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    answer = front.client.post(
        f"{front.url}/v1/completions", content=body, headers=headers
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_many_objects(monkeypatch: pytest.MonkeyPatch, front: Front) -> None:
    """Wherever they stand: messages, items, parts, tools."""
    monkeypatch.setattr(security, "MOST_OBJECTS", 5)
    many = {**BODY, "metadata": {"a": [{}, [], {}]}}
    assert front.post("/v1/completions", many).status_code == 400
    many["metadata"]["a"].pop()
    assert front.post("/v1/completions", many).status_code == 200


def test_nothing_of_a_mistake_of_ours(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception that nobody foresaw is 500, in the right form, without its text."""

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(front.ranks, "call", broken)
    answer = front.post("/v1/completions", BODY)
    assert answer.status_code == 500
    assert answer.json()["error"]["type"] == "server_error"
    assert "secret" not in answer.text


def test_prompts_in_the_log(front: Front, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    secret = {"prompt": "my secret"}
    assert front.post("/v1/completions", secret).status_code == 200
    assert "secret" not in caplog.text
    with serving(log_prompts=True) as talking:
        talking.post("/v1/completions", secret)
    assert '"my secret"' in caplog.text and ": my secret" in caplog.text
