"""How many connections there are, and how long one may say nothing."""

import resource
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from unittest.mock import Mock
from urllib.parse import urlsplit

import pytest
from front import Front, serving, until

from mlxtp.serve.front import connections

pytestmark = pytest.mark.once

HEAD = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"


@pytest.fixture
def front() -> Iterator[Front]:
    """A front of its own for each test: there is no other connection."""
    with serving() as running:
        yield running


def connect(front: Front) -> socket.socket:
    return socket.create_connection(("127.0.0.1", urlsplit(front.url).port), 20)


def read_all(connection: socket.socket) -> bytes:
    """What is sent until the server closes the connection."""
    received = b""
    try:
        while more := connection.recv(10_000):
            received += more
    except ConnectionResetError:
        pass
    return received


@pytest.mark.parametrize("sent", [b"", HEAD, HEAD + b"\r\n" + HEAD])
def test_a_head_that_does_not_come(
    front: Front, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    """Also behind a request that was answered."""
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.1)
    with connect(front) as connection:
        connection.sendall(sent)
        received = read_all(connection)
        assert received.count(b" 200 ") == sent.count(b"\r\n\r\n")


@pytest.mark.parametrize(("bytes_", "status"), [(30_000, b" 200 "), (50_000, b" 431 ")])
def test_a_long_head_may_come_in_parts(
    front: Front, bytes_: int, status: bytes
) -> None:
    with connect(front) as connection:
        connection.sendall(HEAD + b"Connection: close\r\nX: " + b"a" * bytes_)
        time.sleep(0.1)  # so that it is read apart
        connection.sendall(b"\r\n\r\n")
        assert status in read_all(connection)


def test_an_answer_may_take_longer_than_a_head(
    front: Front, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "HEAD_SECONDS", 0.1)
    assert front.post("/v1/completions", {"prompt": "wait: 0.3\na"}).status_code == 200


def test_who_still_reads_an_answer_is_not_cut_off() -> None:
    """It is behind, and goes on; one that reads nothing is."""
    one = connections.Connection.__new__(connections.Connection)
    one.cycle, one._head = None, None
    one.transport, one.loop = Mock(), Mock()
    one.transport.get_write_buffer_size.side_effect = [100, 40, 40, 40]
    one._watch_head()
    one._end_head()
    one.transport.abort.assert_not_called()
    one._end_head()
    one.transport.abort.assert_called_once()


def test_one_too_many(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    few = connections.SPARE_FILES + 2
    monkeypatch.setattr(resource, "getrlimit", lambda _: (few, few))
    with ExitStack() as stack:
        first, second, third = (stack.enter_context(connect(front)) for _ in range(3))
        assert read_all(third) == b""
        for connection in (first, second):
            connection.sendall(HEAD + b"\r\n")
            assert b" 200 " in connection.recv(1000)


@pytest.mark.parametrize("early", [b"\r\n", HEAD, HEAD + b"\r\n"])
def test_who_hangs_up_after_sending_more(front: Front, early: bytes) -> None:
    with front.connected("/v1/completions", {"prompt": "hang:"}) as connection:
        until(lambda: len(front.fake.starts) == 1)
        for _ in range(2):
            connection.sendall(early)
            time.sleep(0.05)  # so that it is read apart
        assert not front.fake.cancelled
    until(lambda: bool(front.fake.cancelled))


def test_who_sends_too_much_meanwhile(front: Front) -> None:
    with front.connected("/v1/completions", {"prompt": "hang:"}) as connection:
        until(lambda: len(front.fake.starts) == 1)
        connection.sendall(b"a" * (connections.MOST_HEAD_BYTES + 1))
        assert read_all(connection) == b""
    until(lambda: bool(front.fake.cancelled))


def test_the_next_request_may_come_early(front: Front) -> None:
    with front.connected("/v1/completions", {"prompt": "wait: 0.2\na"}) as connection:
        until(lambda: len(front.fake.starts) == 1)
        connection.sendall(HEAD)
        time.sleep(0.05)
        connection.sendall(b"Connection: close\r\n\r\n")
        received = read_all(connection)
    assert received.count(b" 200 ") == 2 and b'"text":"a"' in received


def test_open_files() -> None:
    """As many as may be, but for what others need."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))
    try:
        connections.raise_open_files()
        raised = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        assert raised == min(hard, connections.MOST_FILES)
        assert connections.most_connections() == raised - connections.SPARE_FILES
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
