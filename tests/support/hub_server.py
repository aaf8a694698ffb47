"""A hub on loopback: the endpoints that huggingface-hub asks, and their faults."""

import functools
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE_BYTES = 10_000  # what is larger lies elsewhere: the hub redirects there


@dataclass
class Request:
    """What was asked for, before it is answered."""

    method: str
    path: str
    range: str | None
    number: int  # of requests for ranges so far, from 1


@dataclass
class Hub:
    """Serves folders as repositories, from threads of its own.

    `fault` may give a status to answer with in place of what was asked for, or one of
    "drop" (half of it, then the connection ends), "shifted" (another range), "no range"
    (all of the file), "long" and "wrong" (a bit of the last byte is another).
    """

    repos: dict[str, Path]
    fault: Callable[[Request], int | str | None] = lambda request: None
    delay_seconds: float = 0.0
    token: str | None = None
    branches: frozenset[str] = frozenset({"main"})  # all at the last commit
    sent: int = 0  # bytes of weights
    ranges: list[str] = field(default_factory=list)

    def __enter__(self) -> "Hub":
        hub, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                path = unquote(urlsplit(self.path).path)
                asked = self.headers.get("Range")
                with lock:
                    if asked and "bytes=0-100000" not in asked:
                        hub.ranges.append(asked)
                    request = Request(self.command, path, asked, len(hub.ranges))
                    fault = hub.fault(request)
                is_hub = not path.startswith("/cdn/")
                known = self.headers.get("Authorization") == f"Bearer {hub.token}"
                if hub.token and is_hub and not known:
                    fault = 401
                if is_hub and not hub.is_now(path):
                    return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
                if isinstance(fault, int):
                    return self.answer(fault, b"{}", {"Retry-After": "0"})
                if path.startswith("/api/models/"):
                    return self.api(path.removeprefix("/api/models/"))
                parts = path.strip("/").split("/")
                if parts[0] == "cdn":
                    return self.file("/".join(parts[1:3]), parts[-1], asked, fault)
                name = "/".join(parts[:2])
                if len(parts) < 5 or not (file := hub.file(name, parts[-1])):
                    return self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
                size = file.stat().st_size
                more = {"X-Repo-Commit": hub.commit(name), "ETag": etag(file)}
                if size <= LARGE_BYTES:
                    return self.file(name, parts[-1], asked, fault, more)
                more |= {
                    "X-Linked-Etag": etag(file),
                    "X-Linked-Size": str(size),
                    "Location": f"http://localhost:{hub.port}/cdn/{name}/{parts[-1]}",
                }
                return self.answer(302, b"", more)

            def api(self, path: str) -> None:
                name = "/".join(path.split("/")[:2])
                if name not in hub.repos:
                    more = {"X-Error-Code": "RepoNotFound"}
                    return self.answer(404, b'{"error": "Repository not found"}', more)
                files = sorted(f for f in hub.repos[name].iterdir() if f.is_file())
                if "/tree/" in path:
                    content: Any = [
                        {"type": "file", "path": f.name, "size": f.stat().st_size,
                         "oid": etag(f), "lfs": lfs(f)}
                        for f in files
                    ]  # fmt: skip
                else:
                    siblings = [{"rfilename": f.name} for f in files]
                    content = {
                        "id": name,
                        "sha": hub.commit(name),
                        "siblings": siblings,
                    }
                self.answer(200, json.dumps(content).encode(), {})

            def file(
                self,
                name: str,
                leaf: str,
                asked: str | None,
                fault: str | int | None,
                more: dict[str, str] | None = None,
            ) -> None:
                file = hub.repos[name] / leaf
                more = {"Accept-Ranges": "bytes", **(more or {})}
                if not asked or fault == "no range":
                    return self.answer(200, file.read_bytes(), more)
                size = file.stat().st_size
                first, last = asked.removeprefix("bytes=").split("-")
                start, stop = int(first), min(int(last), size - 1) + 1
                if fault == "shifted":
                    start, stop = start + 1, stop + 1
                more["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
                with open(file, "rb") as opened:
                    opened.seek(start)
                    body = opened.read(stop - start)
                if fault == "long":
                    body += b"more"
                if fault == "wrong":
                    body = body[:-1] + bytes([body[-1] ^ 1])
                if leaf.endswith(".safetensors"):
                    with lock:
                        hub.sent += len(body)
                time.sleep(hub.delay_seconds)
                self.answer(206, body, more, drop=fault == "drop")

            def answer(
                self, status: int, body: bytes, more: dict[str, str], drop: bool = False
            ) -> None:
                self.send_response(status)
                for name, value in more.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body[: len(body) // 2] if drop else body)
                if drop:
                    self.wfile.flush()
                    self.close_connection = True

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

        self._server = Server(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def file(self, name: str, leaf: str) -> Path | None:
        file = self.repos.get(name, Path()) / leaf
        return file if name in self.repos and file.is_file() else None

    def is_now(self, path: str) -> bool:
        """Whether the commit in a path, if there is one, is the last one."""
        if commit := re.search(r"/([0-9a-f]{40})(/|$)", path):
            return commit[1] in map(self.commit, self.repos)
        branch = re.search(r"/revision/([^/]+)$", path)
        return not branch or branch[1] in self.branches

    def commit(self, name: str) -> str:
        """Another one whenever a file has changed."""
        files = sorted(f for f in self.repos[name].iterdir() if f.is_file())
        return hashlib.sha1("".join(map(etag, files)).encode()).hexdigest()


def lfs(file: Path) -> dict[str, str | int] | None:
    """What the hub says of a file that it keeps elsewhere."""
    if not file.name.endswith(".safetensors"):
        return None
    return {"oid": sha256(file), "size": file.stat().st_size, "pointerSize": 134}


def etag(file: Path) -> str:
    return hashlib.sha1(f"{file.name} {sha256(file)}".encode()).hexdigest()


def sha256(file: Path) -> str:
    return _sha256(file, file.stat().st_mtime_ns)


@functools.cache
def _sha256(file: Path, _: int) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
