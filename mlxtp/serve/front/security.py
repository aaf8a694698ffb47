"""Who is let in, and how much they may send: what every request passes first.

- *Keys*: where the server has any, each request carries one of them, but for what
  `OPEN` names.
- *Hosts*: a page of another site can point its own name at this machine (DNS
  rebinding), and a browser then takes the server for a part of that site. So the Host
  header has to be an address, which no name can be turned into, or a name of this
  machine. Where there are keys every name will do (a proxy's, for instance): the page
  has none of them.
- *Origins*: a browser says which site's page asks. Others than the server's own are let
  in where they are named, else refused, also where the browser would only hide the
  answer.
- *Sizes*: of headers, of bodies, of all bodies together, of the time that sending and
  reading may take, and of the number of requests at once.
- *Garbage*: a body that is no JSON, nested too deep, or of very many objects goes no
  further.

Who has hung up is noticed here too, at every stage: the request's task is cancelled.
"""

import asyncio
import hmac
import ipaddress
import logging
import math
import socket
from typing import Any
from urllib.parse import urlsplit

from pydantic_core import from_json
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlxtp.serve.front import errors
from mlxtp.serve.front.config import Config
from mlxtp.serve.front.errors import Refusal
from mlxtp.serve.front.journal import Asked, asked_now
from mlxtp.serve.front.ranks import Unavailable

log = logging.getLogger(__name__)

# Paths that need no key: the page has to load before somebody can type one into it.
OPEN = ("/", "/health")
OPEN_FOLDER = "/page/"

MAX_HEADER_BYTES = 32 << 10
# Objects and arrays of a body: as what endpoints make of them they take much more room.
MOST_OBJECTS = 100_000
BODY_SECONDS = 60.0
SEND_SECONDS = 300.0  # how long a client may read nothing of what is sent to it
# All bodies together, in bodies of the largest size.
BODIES = 8
# Requests at once besides those that wait or run: for /health, /metrics, the page.
SPARE_REQUESTS = 64


class Guard:
    """Lets requests through to `app`, as the module says. ASGI middleware."""

    def __init__(self, app: ASGIApp, config: Config) -> None:
        self._app = app
        self._config = config
        self._keys = [key.encode() for key in config.api_keys]
        self._names = _own_names(config.host)
        self._most_requests = config.max_concurrency + config.max_queue + SPARE_REQUESTS
        self._requests = 0
        self._body_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, as ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_sent = is_stalled = False

        async def watched_send(message: Message) -> None:
            nonlocal is_sent, is_stalled
            is_sent = True
            try:
                async with asyncio.timeout(SEND_SECONDS):
                    await send(message)
            except TimeoutError:
                is_stalled = True
                raise

        self._requests += 1
        body = bytearray()
        try:
            self._check(scope)
            await self._read(scope, receive, body)
            content = bytes(body)
            asked_now.set(_asked(scope, content))
            await _until_gone(self._app, scope, content, receive, watched_send)
        except _Gone:
            pass
        except asyncio.CancelledError:
            # uvicorn, at its end. What leaves this function it would log.
            if not is_sent:
                answer = errors.response(Unavailable("the server ends"), scope["path"])
                await answer(scope, receive, send)
        except Exception as error:
            if is_stalled:
                log.warning("a client read nothing for %.0f s", SEND_SECONDS)
            elif is_sent:
                raise
            else:
                answer = errors.response(error, scope["path"])
                await answer(scope, receive, send)
        finally:
            self._requests -= 1
            self._body_bytes -= len(body)

    def _check(self, scope: Scope) -> None:
        """Look at what stands before the body.

        Raises: Refusal.
        """
        headers = Headers(scope=scope)
        if sum(len(k) + len(v) for k, v in scope["headers"]) > MAX_HEADER_BYTES:
            raise Refusal(431, f"the headers are longer than {MAX_HEADER_BYTES} bytes")
        host = headers.get("host", "")
        if not self._keys and not self._is_own(host):
            raise Refusal(
                403,
                f"the Host {host!r} is no name of this server: without an API key it "
                "answers to addresses, to localhost, and to its own names",
                code="unknown_host",
            )
        origin = headers.get("origin")
        allowed = self._config.allowed_origins
        if (
            origin is not None
            and origin not in (f"http://{host}", f"https://{host}")
            and origin not in allowed
            and "*" not in allowed
        ):
            raise Refusal(
                403,
                f"pages of {origin} are not let in; --allowed-origins names those that "
                "are",
                code="origin_not_allowed",
            )
        path = scope["path"]
        is_open = path in OPEN or path.startswith(OPEN_FOLDER)
        if self._keys and not is_open and not self._has_key(headers):
            raise Refusal(
                401,
                "no API key was given, or a wrong one: Authorization: Bearer KEY, or "
                "x-api-key: KEY, is wanted",
                code="invalid_api_key",
            )
        if self._requests > self._most_requests:
            raise Refusal(
                429,
                f"at most {self._most_requests} requests are answered at once",
                code="too_many_requests",
                retry_seconds=1,
            )

    def _is_own(self, host: str) -> bool:
        """Whether a Host header names this machine, or is an address."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name.rstrip(".") in self._names or name.endswith(".localhost"):
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def _has_key(self, headers: Headers) -> bool:
        """Compare with every key, in a time that does not tell which one is near."""
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = [headers.get("x-api-key", "")]
        if scheme.lower() == "bearer":
            given.append(bearer.strip())
        matches = [
            hmac.compare_digest(one.encode("latin-1"), key)
            for one in given
            for key in self._keys
        ]
        return any(matches)

    async def _read(self, scope: Scope, receive: Receive, body: bytearray) -> None:
        """Read a body, and look whether it is JSON.

        Raises: Refusal: 413, 429, 408, 415 or 400.
        """
        headers = Headers(scope=scope)
        try:
            async with asyncio.timeout(BODY_SECONDS):
                await self._read_all(receive, headers, body)
        except TimeoutError as error:
            raise Refusal(
                408, f"the body did not come within {BODY_SECONDS:.0f} s"
            ) from error
        if scope["method"] == "POST":
            _check_json(bytes(body), headers.get("content-type", ""))
            if self._config.log_prompts:
                log.info("%s: %s", scope["path"], body.decode())

    async def _read_all(
        self, receive: Receive, headers: Headers, body: bytearray
    ) -> None:
        most = self._config.max_body_bytes
        announced = headers.get("content-length", "0")
        size = int(announced) if announced.isdecimal() else 0
        is_whole = False
        while True:
            if max(size, len(body)) > most:
                raise Refusal(413, f"the body is longer than {most} bytes")
            if self._body_bytes > BODIES * most:
                raise Refusal(
                    429,
                    "too much is being sent at once",
                    code="too_many_requests",
                    retry_seconds=1,
                )
            if is_whole:
                return
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _Gone
            part = message.get("body", b"")
            body += part
            self._body_bytes += len(part)
            is_whole = not message.get("more_body")


class _Gone(Exception):
    """The client has hung up."""


async def _until_gone(
    app: ASGIApp, scope: Scope, body: bytes, receive: Receive, send: Send
) -> None:
    """Let `app` answer a request whose body was read; cancel it if the client goes.

    Raises: _Gone, then.
    """
    gone = asyncio.Event()
    bodies = [body]

    async def replay() -> Message:
        if bodies:
            return {"type": "http.request", "body": bodies.pop(), "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        gone.set()

    answering = asyncio.ensure_future(app(scope, replay, send))
    watching = asyncio.ensure_future(watch())
    try:
        await asyncio.wait({answering, watching}, return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            raise _Gone
        answering.result()
    finally:
        watching.cancel()
        answering.cancel()
        await asyncio.wait({answering})


def _check_json(body: bytes, content_type: str) -> None:
    """Raise Refusal where a body is not what JSON calls an object.

    Stricter than Python's reader: no NaN, no half of a character, no deep nesting, no
    number that is read as infinity.
    """
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise Refusal(
            415,
            f"a body of type {media_type or 'none'} was sent: Content-Type: "
            "application/json is wanted",
        )
    try:
        content = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise Refusal(400, f"the body is no JSON: {error}", code="invalid") from error
    if not isinstance(content, dict):
        raise Refusal(400, "the body is no JSON object", code="invalid")
    _check_values(content)


def _check_values(content: dict[str, Any]) -> None:
    """Raise Refusal where a number of a body is infinite, or it has too many objects.

    1e400 is JSON, but no answer could say it again.
    """
    objects: list[Any] = [content]
    for one in objects:  # which grows
        for value in one.values() if isinstance(one, dict) else one:
            if isinstance(value, dict | list):
                objects.append(value)
            elif isinstance(value, float) and not math.isfinite(value):
                raise Refusal(400, "the body has a number beyond 1e308", code="invalid")
        if len(objects) > MOST_OBJECTS:
            words = f"the body has more than {MOST_OBJECTS:,} objects and arrays"
            raise Refusal(400, words, code="invalid")


def _own_names(host: str) -> set[str]:
    """The names of this machine, and of the address that it listens on."""
    name = socket.gethostname().lower()
    short = name.partition(".")[0]
    return {"localhost", host.lower(), name, short, f"{short}.local"}


def _asked(scope: Scope, body: bytes) -> Asked | None:
    """Return what a request asks for, if it has an Idempotency-Key."""
    headers = Headers(scope=scope)
    who = headers.get("authorization", "") + headers.get("x-api-key", "")
    key = headers.get("idempotency-key")
    return Asked.of(key, scope["path"].encode(), who.encode(), body)
