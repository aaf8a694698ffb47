"""The program mlxtp.chat, before a front without a model."""

import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
from fake_ranks import FakeRanks
from front import Front, serving, until
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from mlxtp.chat import __main__ as program
from mlxtp.chat import display
from mlxtp.chat import server as servers
from mlxtp.chat.client import Delta
from mlxtp.chat.display import Terminal

pytestmark = pytest.mark.once

HOSTILE = "\x1b[2J\x1b]0;title\x07\x9b31m"


@pytest.fixture(scope="module")
def front() -> Iterator[Front]:
    with serving(FakeRanks(), api_keys=("right",)) as running:
        yield running


@pytest.fixture
def chat(monkeypatch, capsys, front):
    """Run the program with lines of input; return its status and what it printed."""

    def run(*lines: str, url: str = front.url, options: tuple[str, ...] = ()):
        words = ["--url", url] if url else []
        monkeypatch.setattr(sys, "argv", ["mlxtp.chat", *words, *options])
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{x}\n" for x in lines)))
        with pytest.raises(SystemExit) as ended:
            program.main()
        return (ended.value.code, *capsys.readouterr())

    numbers = (signal.SIGTERM, signal.SIGHUP)
    former = [signal.getsignal(number) for number in numbers]
    monkeypatch.setenv("MLXTP_API_KEY", "right")
    yield run
    for number, handler in zip(numbers, former, strict=True):
        signal.signal(number, handler)


def prompts(front: Front, number: int) -> list[str]:
    """The last prompts that the ranks were asked to answer."""
    return [bytes(start.prompt).decode() for start in front.fake.starts[-number:]]


def test_turns_by_pipe(chat, front: Front, tmp_path: Path) -> None:
    saved, page = tmp_path / "saved.json", tmp_path / "saved.md"
    lines = ["hello you", "", "/system Be brief", "and you", f"/save {saved}"]
    lines += [f"/save {page}", "/reset", "alone", f"/load {saved}", "/retry", "/help"]
    lines += ["/exit", "never"]
    status, answers, notes = chat(*lines, options=("--temp", "0", "--seed", "5"))
    assert (status, answers) == (0, "hello you\nand you\nalone\nand you\n")
    first, second, third, fourth = prompts(front, 4)
    assert first == "<|user|>hello you\n<|assistant|>"
    turns = "<|user|>hello you\n<|assistant|>hello you\n<|user|>and you\n"
    assert second == f"<|system|>Be brief\n{turns}<|assistant|>"
    assert third == "<|system|>Be brief\n<|user|>alone\n<|assistant|>"
    assert fourth == second
    assert front.fake.starts[-1].settings.temperature == 0
    assert front.fake.starts[-1].settings.seed == 5
    assert re.search(r"10 tokens, [\d.]+ tokens/s, the first after [\d.]+ s", notes)
    assert "/save FILE" in notes
    content = json.loads(saved.read_text())
    assert content["model"] == "small"
    assert [message["role"] for message in content["messages"]] == [
        *("system", "user", "assistant", "user", "assistant")
    ]
    assert "## System\n\nBe brief\n\n## User\n\nhello you\n" in page.read_text()


def test_a_turn_that_fails_ends_it_by_pipe(chat, front: Front) -> None:
    """The server's words are one line; what came of the answer is printed."""
    status, answers, notes = chat("hello", "error: it burns", "never")
    assert status == 1 and answers == "hello\n"
    assert notes.splitlines()[-1] == "mlxtp.chat: error: it burns"


@pytest.mark.parametrize(
    ("said", "lines", "options"),
    [
        ("says 401: ", [], ["--api-key", "wrong"]),
        ("--model is 'x': ", [], ["--model", "x"]),
        (
            "there is no server at http://127.0.0.1:1: Connection refused",
            [],
            ["--url", "127.0.0.1:1"],
        ),
        ("--url is 'ftp://a': wanted an address such as", [], ["--url", "ftp://a"]),
        ("--ranks: there is no such option beside --url", [], ["--ranks", "3"]),
        ("--temp is -1.0: wanted at least 0", [], ["--temp", "-1"]),
        ("argument --seed: invalid int value: 'x'", [], ["--seed", "x"]),
        ("--api-key-file: /nowhere: No such file", [], ["--api-key-file", "/nowhere"]),
        ("cannot write /nowhere/a.json: No such file", ["/save /nowhere/a.json"], []),
        ("a.txt: wanted a name that ends in .json or .md", ["/save a.txt"], []),
        ("there is nothing to ask again", ["/retry"], []),
        ("there is no command /nonsense: see /help", ["/nonsense 1"], []),
        ("is no JSON file of a conversation", [f"/load {__file__}"], []),
    ],
)
def test_a_mistake_is_one_line(chat, said: str, lines: list[str], options) -> None:
    status, answers, notes = chat(*lines, options=options)
    assert (status, answers) == (2, "")
    assert notes.startswith("mlxtp.chat: error: ") and notes.count("\n") == 1
    assert said in notes


def test_what_a_model_writes_controls_no_terminal(chat, capsys) -> None:
    status, answers, _ = chat(f"a{HOSTILE}b", f"error: {HOSTILE}c")
    assert answers == "a[2J]0;title31mb\n" and status == 1
    text = "<http://a/%1b[2J%9b> [x](http://a/%1b]0;t%07) &#27;[2J [bold]x[/bold]\n\n"
    shown = screen_of([Delta("text", text), Delta("reasoning", "[dim]y")])
    assert "http://a/[2J" in shown and "[bold]x[/bold]" in shown and "[dim]y" in shown


def test_it_needs_neither_mlx_nor_mpi() -> None:
    program = "import mlxtp.chat.__main__, sys; print(*sys.modules)"
    imported = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert not {"mlx", "mlx_lm", "mpi4py"} & set(imported.stdout.split())


# A server by hand: what HTTP's libraries would not do.


def whole_request(connection: socket.socket) -> bytes:
    """Receive it all: what is unread at the end would reset the connection."""
    data, length = b"", re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
    while True:
        head, end, body = data.partition(b"\r\n\r\n")
        given = length.search(head)
        if end and len(body) >= int(given[1] if given else 0):
            return data
        received = connection.recv(1 << 16)
        if not received:
            return data
        data += received


@contextmanager
def by_hand(answer: bytes) -> Iterator[str]:
    """A server that sends `answer` to each POST, and closes the connection."""

    def reply(data: bytes) -> bytes:
        if data.startswith(b"GET /health"):
            return b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
        if data.startswith(b"GET"):
            return b'HTTP/1.0 200 OK\r\n\r\n{"data": [{"id": "m"}]}'
        return answer

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.sendall(reply(whole_request(connection)))

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1/"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
    thread.join()


EVENT = (
    b'data: {"choices": [{"delta": {"content": "half"}, "finish_reason": null}]}\n\n'
)
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("answer", "answers", "said"),
    [
        (CHUNKED + b"%x\r\n%s\r\n" % (len(EVENT), EVENT), "half\n", "connection broke"),
        (CHUNKED + b"ff\r\n" + EVENT, "half\n", "connection broke"),
        (b"HTTP/1.0 200 OK\r\n\r\n" + EVENT, "half\n", "connection broke"),
        (b"HTTP/1.0 200 OK\r\n\r\n" + EVENT + b"data: [DONE]\n\n", "half\n", ""),
        (b"", "", "gave no answer"),
        (b"HTTP/1.0 200 OK\r\n\r\ndata: nonsense\n\n", "", "what is no event"),
        (
            b'HTTP/1.0 500 No\r\n\r\n{"error": "\\u001b[2J it\\nburns"}',
            "",
            "[2J it burns",
        ),
        (b"HTTP/1.0 502 \x1b[2J\r\n\r\n<html>", "", "says 502: [2J"),
    ],
)
def test_a_server_that_breaks(chat, answer: bytes, answers: str, said: str) -> None:
    with by_hand(answer) as url:
        status, printed, notes = chat("hello", url=url)
    assert printed == answers and status == (1 if said else 0)
    assert said in notes and "\x1b" not in notes


# The terminal.


def emulated(output: str, height: int) -> list[str]:
    """The lines of a terminal after `output`, with those that scrolled away."""
    lines, row = [""], 0
    for part in re.findall(r"\x1b\[[?\d;]*[a-zA-Z]|\x1b|[^\x1b\r\n]+|\r|\n", output):
        if part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part.endswith("A") and part.startswith("\x1b["):
            row = max(row - int(part[2:-1]), len(lines) - height, 0)
        elif part == "\x1b[2K":
            lines[row] = ""
        elif part == "\r" or re.fullmatch(r"\x1b\[[\d;]*m|\x1b\[\?25[hl]", part):
            pass  # each line is written from its beginning
        else:
            assert "\x1b" not in part, f"{part!r} is none that the display sends"
            lines[row] += part
    return [line.rstrip() for line in lines]


def screen_of(deltas: list[Delta]) -> str:
    """What a terminal of ten lines shows of an answer."""
    file = io.StringIO()
    console = Console(
        file=file, force_terminal=True, width=40, height=10, markup=False, emoji=False
    )
    terminal = Terminal(console)
    terminal.begin()
    for delta in deltas:
        terminal.add(delta)
    terminal.end()
    return "\n".join(emulated(file.getvalue(), 10))


DOCUMENT = (
    """# Title

Some *words* and a line that is longer than the terminal is wide.
The same paragraph.

1. one

   more of it
2. two
   - nested

| a | b |
|---|---|
| 1 | 2 |

<div>
HTML
</div>

```python
"""
    + "".join(f"x{i} = {i}\n" for i in range(30))
    + "```\n> quoted\n\nThe end."
)


@settings(deadline=None, max_examples=10)
@given(st.lists(st.integers(1, len(DOCUMENT)), min_size=5, max_size=40))
def test_markdown_as_it_comes_is_the_whole_one(cuts: list[int]) -> None:
    """In pieces of any size each block is shown once, in a terminal that is low.

    The block that grows is drawn all the time.
    """
    places = sorted({0, *cuts, len(DOCUMENT)})
    deltas = [Delta("reasoning", "I think.\n\nLong: " + "so " * 20)]
    pieces = [Delta("text", DOCUMENT[a:b]) for a, b in pairwise(places)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(display, "DRAWING_SECONDS", 0.002)
        shown = screen_of(deltas + pieces)
    assert shown == screen_of([*deltas, Delta("text", DOCUMENT)])
    assert shown.count("x29 = 29") == 1 and "HTML" in shown and "│" not in shown


# What prompt_toolkit sends when it begins to read: pasted text is to be told apart.
PROMPT = "\x1b[?2004h"


class Screen:
    """The program in a terminal of its own."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        # Ctrl+C goes to those whose terminal it is.
        start = "import fcntl, runpy, sys, termios\n"
        start += "fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
        start += "runpy.run_module('mlxtp.chat', run_name='__main__', alter_sys=True)"
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-c", start, *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            env={**os.environ, "PROMPT_TOOLKIT_NO_CPR": "1", **environment},
        )
        os.close(slave)
        self.output = ""

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def wait_for(self, words: str, seconds: float = 20.0) -> str:
        """Wait until these words were printed; return all up to them."""
        end = time.monotonic() + seconds
        while words not in self.output:
            assert time.monotonic() < end, f"no {words!r} in {self.output!r}"
            if select.select([self._master], [], [], 0.1)[0]:
                self.output += os.read(self._master, 1 << 16).decode()
        before, _, self.output = self.output.partition(words)
        return before

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


def test_in_a_terminal(front: Front, tmp_path: Path) -> None:
    """Several lines, Markdown, Ctrl+C that cancels, what was typed before, Ctrl+D."""
    screen = Screen(
        *("--url", front.url, "--system", "Be brief"),
        **{"XDG_STATE_HOME": str(tmp_path), "MLXTP_API_KEY": "right"},
    )
    try:
        screen.wait_for("small at http://127.0.0.1")
        screen.wait_for(PROMPT)
        screen.type("think: I wonder\x1b\r- *one*\x1b\r- two\r")
        screen.wait_for("I wonder")
        assert "\x1b[3mone" in screen.wait_for("tokens/s, the first after")
        assert "- *one*\n- two" in prompts(front, 1)[0]

        cancelled = len(front.fake.cancelled)
        screen.wait_for(PROMPT)
        screen.type("\x1b[200~begun\n" + "hang:\x1b[201~\r")  # pasted
        screen.wait_for("begun")
        until(lambda: len(front.fake.starts) and "hang:" in prompts(front, 1)[0])
        screen.wait_for("begun")  # of the answer
        screen.type("\x03")
        screen.wait_for("stopped")
        until(lambda: len(front.fake.cancelled) == cancelled + 1)
        screen.wait_for(PROMPT)
        screen.type("/system\r")
        screen.wait_for("Be brief")
        screen.wait_for(PROMPT)
        screen.type("and on\r")
        screen.wait_for("tokens/s")
        kept = "<|user|>begun\nhang:\n<|assistant|>begun\n\n<|user|>and on\n"
        assert prompts(front, 1)[0].endswith(f"{kept}<|assistant|>")
        screen.wait_for(PROMPT)
        screen.type("/nonsense\r")
        screen.wait_for("error: there is no command /nonsense")
        screen.wait_for(PROMPT)
        screen.type("\x04")
        assert screen.process.wait(10) == 0
    finally:
        screen.close()
    history = tmp_path / "mlxtp" / "chat_history"
    assert "+hang:" in history.read_text()
    assert history.stat().st_mode & 0o777 == 0o600


# A server of its own.

SERVER = f"""
import os, signal, sys, time
sys.path[:0] = {sys.path[:]!r}
from front import serving
from fake_ranks import FakeRanks
if "--broken" in sys.argv:
    print("mlxtp.serve: error: --broken: \\033[2Jwanted another")
    sys.exit(2)
signal.signal(signal.SIGTERM, lambda *_: sys.exit())
with serving(FakeRanks(loading_seconds=0.5)) as front:
    print(f"mlxtp.serve: {{front.url}}, loading", *sys.argv[1:], flush=True)
    time.sleep(100)
"""


def test_a_server_of_its_own(chat, monkeypatch) -> None:
    """It is started with the options, waited for, and ended."""
    started = []

    class Recorded(servers.Server):
        def __init__(self, arguments):
            started.append(self)
            super().__init__(arguments)

    monkeypatch.setattr(servers, "PROGRAM", (sys.executable, "-c", SERVER))
    monkeypatch.setattr(program, "Server", Recorded)
    monkeypatch.delenv("MLXTP_API_KEY")
    options = ("--model", "m", "--ranks", "3", "--system", "Be brief")
    status, answers, notes = chat("hello", url="", options=options)
    assert (status, answers) == (0, "hello\n")
    assert "the ranks load the model" in notes
    last = started[0].last_words()
    assert last.startswith("the server ended with status 0: mlxtp.serve: http://127")
    assert last.endswith(" --port 0 --ranks 3 --model m")

    status, answers, notes = chat("hello", url="", options=("--broken",))
    assert status == 2 and answers == ""
    assert "ended with status 2: mlxtp.serve: error: --broken: [2Jwanted" in notes
    assert notes.count("\n") == 1
