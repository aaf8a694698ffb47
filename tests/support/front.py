"""A front on a free port of loopback, before a rank 0 without a model."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx2
import uvicorn
from fake_ranks import FakeRanks

from mlxtp.serve.front.app import create_app
from mlxtp.serve.front.config import Config
from mlxtp.serve.front.connections import Connection
from mlxtp.serve.front.ranks import Ranks

NAMES = ("small", "fake")  # the model's


@dataclass
class Front:
    """A front that runs in a thread of its own."""

    url: str
    ranks: Ranks
    fake: FakeRanks
    client: httpx2.Client

    def get(self, path: str, **more: Any) -> httpx2.Response:
        """Get a path."""
        return self.client.get(f"{self.url}{path}", **more)

    def post(self, path: str, body: Any, **more: Any) -> httpx2.Response:
        """Post JSON."""
        return self.client.post(f"{self.url}{path}", json=body, **more)

    @contextmanager
    def connected(self, path: str, body: Any) -> Iterator[socket.socket]:
        """Post JSON over a connection that is closed at the end, answered or not."""
        content = json.dumps(body).encode()
        with socket.create_connection(("127.0.0.1", urlsplit(self.url).port)) as made:
            made.sendall(
                f"POST {path} HTTP/1.1\r\nHost: localhost\r\n"
                "Content-Type: application/json\r\n"
                f"Content-Length: {len(content)}\r\n\r\n".encode()
                + content
            )
            yield made


@contextmanager
def serving(fake: FakeRanks | None = None, **config: Any) -> Iterator[Front]:
    """Serve `fake` with a `Config` of these fields, and end in order."""
    fake = fake or FakeRanks()
    begun: list[Front] = []
    server: list[uvicorn.Server] = []

    async def run() -> None:
        ranks = Ranks()
        serving_ranks = asyncio.create_task(fake.run(await ranks.listen()))
        app = create_app(ranks, Config(**{"model_names": NAMES, **config}))
        options = uvicorn.Config(
            app, port=0, log_level="warning", http=Connection, lifespan="off"
        )
        server.append(uvicorn.Server(options))
        running = asyncio.create_task(server[0].serve())
        while not server[0].started:
            await asyncio.sleep(0.005)
        if not fake.loading_seconds:
            await ranks.is_ready.wait()
        port = server[0].servers[0].sockets[0].getsockname()[1]
        client = httpx2.Client(timeout=30, verify=False, trust_env=False)
        begun.append(Front(f"http://127.0.0.1:{port}", ranks, fake, client))
        try:
            await running
        finally:
            await ranks.close()
            await serving_ranks  # it was told End
            await asyncio.sleep(0.01)

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    try:
        until(lambda: bool(begun) or not thread.is_alive())
        yield begun[0]
    finally:
        for front in begun:
            front.client.close()
        # What a failed test has left open is not waited for.
        server[0].should_exit = server[0].force_exit = True
        thread.join()


def until(is_so: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait until something is so.

    Raises: TimeoutError if it does not get so.
    """
    end = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > end:
            raise TimeoutError
        time.sleep(0.005)
