"""A server with a true model, started as people start it."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
from processes import is_running

LIMIT_SECONDS = 120  # for whatever happens here, on a busy machine
ADDRESS = re.compile(r"mlxtp\.serve: (http://\S+),")


@dataclass
class Server:
    """A server that is ready: its address, its process, and the lines of its log."""

    url: str
    process: "subprocess.Popen[str]"
    lines: list[str] = field(default_factory=list)

    def processes(self) -> list[int]:
        """The front and all that it started, those of mpirun too."""
        return [self.process.pid, *_below(self.process.pid)]


def _below(parent: int) -> list[int]:
    pids = [int(name.name) for name in Path("/proc").iterdir() if name.name.isdigit()]
    result = []
    for pid in pids:
        try:
            status = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            continue
        if int(status.rpartition(")")[2].split()[1]) == parent:
            result += [pid, *_below(pid)]
    return result


@contextmanager
def running(*arguments: object, **environment: str) -> Iterator[Server]:
    """Start `python -m mlxtp.serve` on a free port, and end it by SIGTERM.

    Its status is then 0, and nothing of it is left.
    """
    command = [sys.executable, "-m", "mlxtp.serve", "--port", "0", *map(str, arguments)]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        start_new_session=True,
    )
    server = Server("", process)
    reader = threading.Thread(target=_read, args=(server,), daemon=True)
    reader.start()
    try:
        _wait(lambda: server.url or process.poll() is not None, server)
        _wait(lambda: _is_ready(server) or process.poll() is not None, server)
        assert process.poll() is None, "".join(server.lines)
        yield server
        pids = server.processes()
        process.send_signal(signal.SIGTERM)
        status = process.wait(LIMIT_SECONDS)
        reader.join(LIMIT_SECONDS)
        assert status == 0, "".join(server.lines)
        _wait(lambda: not any(map(is_running, pids)), server)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def _read(server: Server) -> None:
    assert server.process.stderr is not None
    for line in server.process.stderr:
        server.lines.append(line)
        if (address := ADDRESS.match(line)) is not None:
            server.url = address[1]


def _is_ready(server: Server) -> bool:
    return httpx2.get(f"{server.url}/health").status_code == 200


def _wait(condition, server: Server) -> None:
    limit = time.monotonic() + LIMIT_SECONDS
    while not condition():
        assert time.monotonic() < limit, "".join(server.lines)
        time.sleep(0.05)
