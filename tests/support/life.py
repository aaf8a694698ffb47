"""A front in this process, whose ranks are programs: for tests of its whole life."""

import asyncio
import json
import os
import sys
import time
from contextlib import closing
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, NamedTuple

import fake_ranks
import pytest
from processes import is_running

from mlxtp.serve import __main__ as front
from mlxtp.serve import options, supervisor
from mlxtp.serve.messages import FOLDER_VARIABLE

# Notes its process, then is the fake rank 0.
FAKE = (
    "import os, runpy, sys; print(os.getpid(), file=open(sys.argv.pop(1), 'a')); "
    f"runpy.run_path({fake_ranks.__file__!r}, run_name='__main__')"
)


class Answer(NamedTuple):
    """What came back."""

    status: int
    headers: Any
    text: str


@dataclass
class Server:
    """A server in this process; `life` gives its status."""

    port: int
    life: "asyncio.Task[int]"
    pids: Path

    async def get(self, path: str, body: dict[str, Any] | None = None) -> Answer:
        """What comes back, or of a POST with `body`."""
        return await asyncio.to_thread(self._get, path, body)

    def _get(self, path: str, body: dict[str, Any] | None) -> Answer:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=20)
        with closing(connection):
            method = "GET" if body is None else "POST"
            headers = {"Content-Type": "application/json"}
            connection.request(method, path, json.dumps(body), headers)
            answer = connection.getresponse()
            return Answer(answer.status, answer.headers, answer.read().decode())

    async def is_ready(self) -> None:
        while (await self.get("/health")).status != 200:
            await asyncio.sleep(0.02)

    async def ask(self, prompt: str) -> Answer:
        """Everything that a stream answers."""
        body = {"model": "stories", "prompt": prompt, "stream": True}
        return await self.get("/v1/completions", body)

    async def ranks(self, count: int = 1) -> list[int]:
        """The processes of the ranks, when so many are there."""
        while not (self.pids.exists() and self.pids.read_text().count("\n") == count):
            await asyncio.sleep(0.02)
        return [int(pid) for pid in self.pids.read_text().split()]

    async def end(self) -> int:
        """The status, when everything has ended and nothing is left."""
        status = await asyncio.wait_for(self.life, 60)
        assert not Path(os.environ[FOLDER_VARIABLE]).exists()
        pids = [int(pid) for pid in self.pids.read_text().split()]
        assert pids and not any(map(is_running, pids))
        with pytest.raises(ConnectionRefusedError):
            await self.get("/health")
        return status


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A function that starts a server on a free port, whose ranks are a program."""
    monkeypatch.setenv(FOLDER_VARIABLE, "")  # is put back at the end
    monkeypatch.setenv("PYTHONPATH", str(Path(fake_ranks.__file__).parent), ":")

    def start(program: str, *arguments: str) -> Server:
        pids = tmp_path / f"pids-{time.monotonic_ns()}"
        command = (sys.executable, "-c", program, str(pids))
        monkeypatch.setattr(supervisor, "PROGRAM", command)
        args = options.parse(["--port", "0", *arguments])
        listener = front.listen(args.host, args.port)
        config = options.config(args, listener.getsockname()[1])
        life = asyncio.create_task(front.serve(args, config, listener, None))
        return Server(config.port, life, pids)

    return start
