"""A client of OpenAI's interface, by the standard library.

Nothing that a server sends leaves this module with control characters in it: a terminal
would act on them.
"""

import json
import re
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any, Literal
from urllib.parse import SplitResult, urlsplit

from mlxtp.comm.errors import UsageError

# To connect, and to say what it is, takes a server no longer. An answer may.
SHORT_SECONDS = 10.0

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_SURROGATES = re.compile(r"[\ud800-\udfff]")


class ServerError(RuntimeError):
    """A server that is not there, refuses a request, or ends in the middle of one."""


@dataclass(frozen=True)
class Delta:
    """A piece of an answer: its kind, and its text."""

    kind: Literal["text", "reasoning"]
    text: str


@dataclass(frozen=True)
class Usage:
    """How many tokens an answer has, and how many of its prompt were in a cache."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Loading:
    """What a server does before it is ready: words, and the part that is done."""

    words: str
    done: float | None


class Client:
    """A server under an address such as http://127.0.0.1:8080, with or without /v1.

    Raises: UsageError if the address is none.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self._address = _address(url)
        self.url = self._address.geturl()
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def loading(self) -> Loading | None:
        """Ask what the server does before it is ready; None if it is, or says nothing.

        Raises: ServerError if there is no server, or one that ends.
        """
        with self._response("GET", "/health", SHORT_SECONDS) as response:
            body = _read(response)
        if response.status != 503:
            return None
        told = _decoded(body)
        told = told if isinstance(told, dict) else {}
        words = told.get("message") or _message(told) or "it loads"
        if told.get("state") in ("draining", "ended"):
            raise ServerError(f"the server at {self.url} ends: {words}")
        done = told.get("done")
        return Loading(str(words), done if isinstance(done, float) else None)

    def models(self) -> list[str]:
        """List the names of the server's models.

        Raises: ServerError if it does not say.
        """
        with self._response("GET", "/v1/models", SHORT_SECONDS) as response:
            body = _read(response)
        self._check(response, body)
        try:
            return [str(model["id"]) for model in _decoded(body)["data"]]
        except (KeyError, TypeError):
            raise ServerError(f"{self.url} has no list of models") from None

    def chat(self, body: dict[str, Any]) -> Generator[Delta | Usage]:
        """Ask for an answer, and yield it as it comes.

        Closing the generator closes the connection, by which the server learns that
        nobody waits for the rest.

        Raises: ServerError if it is refused, or ends before it is complete.
        """
        body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        path = "/v1/chat/completions"
        with self._response("POST", path, None, body) as response:
            if response.status != 200:
                self._check(response, _read(response))
            try:
                yield from _events(response)
            except (OSError, HTTPException) as error:
                raise ServerError(f"the connection broke: {error}") from None

    @contextmanager
    def _response(
        self,
        method: str,
        path: str,
        seconds: float | None,
        body: dict[str, Any] | None = None,
    ) -> Iterator[HTTPResponse]:
        """Send a request on a connection of its own; give the response, unread.

        `seconds` is how long the server may be silent.
        """
        kind = HTTPSConnection if self._address.scheme == "https" else HTTPConnection
        host, port = self._address.hostname or "", self._address.port
        connection = kind(host, port, timeout=SHORT_SECONDS)
        data = None if body is None else json.dumps(body).encode()
        with closing(connection):
            try:
                connection.connect()
            except OSError as error:
                said = error.strerror or str(error)
                raise ServerError(f"there is no server at {self.url}: {said}") from None
            connection.sock.settimeout(seconds)
            try:
                target = self._address.path + path
                connection.request(method, target, data, self._headers)
                response = connection.getresponse()
            except (OSError, HTTPException) as error:
                raise ServerError(f"{self.url} gave no answer: {error}") from None
            with closing(response):
                yield response

    def _check(self, response: HTTPResponse, body: bytes) -> None:
        """Raise ServerError with what the server says, unless it says yes."""
        status = response.status
        if status == 200:
            return
        said = _message(_decoded(body)) or printable(response.reason)
        key = "; give its key with --api-key-file" if status == 401 else ""
        raise ServerError(f"{self.url} says {status}: {said}{key}")


def printable(text: str) -> str:
    """Leave out what a terminal acts on: control characters, but for \\n and \\t."""
    return _SURROGATES.sub("\ufffd", _CONTROLS.sub("", text))


def _address(url: str) -> SplitResult:
    """Take an address apart; its path is what comes before /v1."""
    try:
        split = urlsplit(url if "://" in url else f"http://{url}")
        is_address = split.scheme in ("http", "https") and bool(split.hostname)
        _ = split.port  # raises if it is no number
    except ValueError:
        is_address = False
    if not is_address or split.query or split.fragment or split.username:
        raise UsageError(
            f"--url is {url!r}: wanted an address such as http://127.0.0.1:8080"
        )
    return split._replace(path=split.path.rstrip("/").removesuffix("/v1"))


def _read(response: HTTPResponse) -> bytes:
    try:
        return response.read()
    except (OSError, HTTPException) as error:
        raise ServerError(f"the connection broke: {error}") from None


def _events(response: HTTPResponse) -> Iterator[Delta | Usage]:
    """Read the server-sent events of an answer.

    Raises: ServerError for an error among them, and if they end too early.
    """
    is_complete = False
    for line in response:
        name, _, data = line.partition(b":")
        if name != b"data":
            continue
        if data.strip() == b"[DONE]":
            return
        chunk = _decoded(data)
        if not isinstance(chunk, dict) or "error" in chunk:
            raise ServerError(_message(chunk) or "the server sent what is no event")
        try:
            choices = chunk.get("choices") or []
            is_complete |= any(choice.get("finish_reason") for choice in choices)
            pieces = [piece for choice in choices for piece in _deltas(choice)]
            usage = _usage(chunk.get("usage"))
        except (AttributeError, TypeError, ValueError):
            raise ServerError("the server sent what is no event") from None
        yield from pieces
        if usage is not None:
            yield usage
    if not is_complete:
        raise ServerError("the connection broke: the answer is not complete")


def _deltas(choice: dict[str, Any]) -> Iterator[Delta]:
    delta = choice.get("delta") or {}
    # vLLM and mlx-lm call it reasoning.
    if reasoning := delta.get("reasoning_content") or delta.get("reasoning"):
        yield Delta("reasoning", str(reasoning))
    if content := delta.get("content"):
        yield Delta("text", str(content))


def _usage(usage: dict[str, Any] | None) -> Usage | None:
    if not usage:
        return None
    details = usage.get("prompt_tokens_details") or {}
    return Usage(
        int(usage.get("prompt_tokens") or 0),
        int(details.get("cached_tokens") or 0),
        int(usage.get("completion_tokens") or 0),
    )


def _decoded(data: bytes) -> Any:
    """Decode JSON, with all of its texts made printable; None if it is none."""
    try:
        return _cleaned(json.loads(data))
    except (ValueError, RecursionError):
        return None


def _cleaned(value: Any) -> Any:
    match value:
        case str():
            return printable(value)
        case list():
            return [_cleaned(item) for item in value]
        case dict():
            return {name: _cleaned(item) for name, item in value.items()}
    return value


def _message(content: Any) -> str:
    """Find the words of an error, as OpenAI's form has them or a server's own."""
    error = content.get("error") if isinstance(content, dict) else None
    if isinstance(error, dict):
        error = error.get("message")
    return " ".join(str(error or "").split())
