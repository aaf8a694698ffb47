"""What people see: answers as they come, as Markdown or as plain text."""

import os
import signal
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import pairwise
from typing import Protocol

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, RenderableType
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment
from rich.text import Text

from mlxtp.chat.client import Delta, printable
from mlxtp.comm.errors import UsageError

# What a model writes in HTML is shown as it stands: a terminal has nothing to make of
# it, and rich leaves out the text within.
_PARSER = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])

# How often the block that grows is drawn.
DRAWING_SECONDS = 0.05

# Shows words, and the part that is done.
Progress = Callable[[str, float | None], None]


class Display(Protocol):
    """Shows one answer after the other."""

    def begin(self) -> None:
        """Begin an answer."""

    def add(self, delta: Delta) -> None:
        """Show a piece of it."""

    def end(self) -> None:
        """End it, where it may be."""

    def note(self, words: str) -> None:
        """Show a line that is no answer."""

    def progress(self) -> AbstractContextManager[Progress]:
        """Give a function that shows what a server does that loads."""


class Plain:
    """Plain text: answers on standard output, all else on standard error."""

    def begin(self) -> None:
        """Begin an answer."""
        self._is_empty = True

    def add(self, delta: Delta) -> None:
        """Print a piece of the answer; its reasoning is left out."""
        if delta.kind == "text":
            self._write(delta.text)
            self._is_empty = False

    def end(self) -> None:
        """End the answer's last line."""
        if not self._is_empty:
            self._write("\n")

    def note(self, words: str) -> None:
        """Print a line on standard error."""
        print(words, file=sys.stderr, flush=True)

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """Print the words on standard error when they change."""
        last = None

        def show(words: str, _: float | None) -> None:
            nonlocal last
            if words != last:
                self.note(words)
            last = words

        yield show

    def _write(self, text: str) -> None:
        """Print on standard output.

        Raises: UsageError if that takes no more: a full disk, or a reader that has
            gone.
        """
        try:
            print(text, end="", flush=True)
        except OSError as error:
            # What is left in the buffer would fail again when Python ends.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            said = error.strerror
            raise UsageError(f"cannot write standard output: {said}") from None


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Let Ctrl+C wait for the end of this block: half a drawing cannot be redrawn."""
    came: list[int] = []
    former = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)
    if came:
        raise KeyboardInterrupt


class _Markdown(Markdown):
    """Markdown without HTML, and with the addresses of links beside their text."""

    def __init__(self, text: str) -> None:
        super().__init__("", hyperlinks=False)
        self.parsed = _PARSER.parse(text)


class _Block:
    """A block of an answer with an empty line behind it, or the end of one that grows.

    Characters of a link may be escaped, as in `<http://a/%1b[2J>`, and come to light
    when it is shown. So what is cleaned is the output.
    """

    def __init__(self, delta: Delta, *, grows: bool = False) -> None:
        self._grows = grows
        self._content: RenderableType = _Markdown(delta.text)
        if delta.kind == "reasoning":
            self._content = Text(delta.text.strip(), style="dim")

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[Segment]:
        """Yield its lines; of one that grows the last, as many as there is room for."""
        options = options.update(height=None)
        lines = console.render_lines(self._content, options, pad=False)
        # rich puts empty lines around some kinds of blocks.
        while lines and _is_empty(lines[0]):
            del lines[0]
        while lines and _is_empty(lines[-1]):
            del lines[-1]
        if self._grows:
            lines = lines[-max(1, console.height - 2) :]
        for line in lines:
            for segment in line:
                yield Segment(printable(segment.text), segment.style)
            yield Segment.line()
        if lines and not self._grows:
            yield Segment.line()


def _is_empty(line: list[Segment]) -> bool:
    """Whether a line shows nothing, not even a background."""
    return not any(s.text.strip() or (s.style and s.style.bgcolor) for s in line)


class Terminal:
    """Markdown as it comes, below it what is not complete yet.

    A block (a paragraph, a list, a piece of code) is printed for good when the next one
    begins, and scrolls away as all that is printed does. The last one is drawn anew
    while it grows, as much of its end as the screen has room for.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._growing = Delta("text", "")
        self._lock = threading.Lock()  # of `_growing`, and of the screen

    def begin(self) -> None:
        """Begin an answer."""
        self._live = Live(
            self,
            console=self._console,
            auto_refresh=False,  # its thread would draw while this one prints
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._has_ended = threading.Event()
        self._drawing = threading.Thread(target=self._draw, daemon=True)
        _echo_keys(False)  # a ^C on the screen would move what is drawn anew
        self._live.start()
        self._drawing.start()

    @_undisturbed()
    def add(self, delta: Delta) -> None:
        """Add a piece of the answer, and print the blocks that it completes."""
        with self._lock:
            if delta.kind != self._growing.kind:
                self._print([self._growing], Delta(delta.kind, ""))
            text = self._growing.text + delta.text
            if "\n" in delta.text:
                blocks, text = _split(delta.kind, text)
                complete = [Delta(delta.kind, block) for block in blocks]
                self._print(complete, Delta(delta.kind, text))
            self._growing = Delta(delta.kind, text)

    @_undisturbed()
    def end(self) -> None:
        """Print what is left of the answer."""
        self._has_ended.set()
        self._drawing.join()
        self._print([self._growing], Delta("text", ""))
        self._live.stop()
        _echo_keys(True)

    def _draw(self) -> None:
        """Draw the block that grows, until the answer ends."""
        while not self._has_ended.wait(DRAWING_SECONDS):
            with self._lock:
                self._live.refresh()

    def _print(self, complete: list[Delta], growing: Delta) -> None:
        """Print blocks for good; another one grows below them."""
        self._growing = growing
        for block in complete:
            self._console.print(_Block(block))

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[_Block]:
        """Yield the block that grows, as it is now."""
        yield _Block(self._growing, grows=True)

    def note(self, words: str) -> None:
        """Print a dim line."""
        self._console.print(Text(words, style="dim"))

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """Show the words beside a spinner, which vanishes at the end."""
        with self._console.status("") as status:
            yield lambda words, done: status.update(
                Text(words if done is None else f"{words}: {done:.0%}")
            )


def _split(kind: str, text: str) -> tuple[list[str], str]:
    """Split a text into the blocks that are complete, and the last one.

    Only whole lines tell where a block begins. Of reasoning, which is no Markdown, a
    block is a paragraph.
    """
    lines = text.split("\n")
    whole = lines[:-1]
    if kind == "reasoning":
        starts = [number for number, line in enumerate(whole, 1) if not line.strip()]
    else:
        tokens = _PARSER.parse("\n".join(whole))
        starts = [t.map[0] for t in tokens if t.level == 0 and t.map and t.nesting >= 0]
    spans = pairwise([0, *starts])
    blocks = ["\n".join(lines[start:stop]) for start, stop in spans]
    last = starts[-1] if starts else 0
    return [block for block in blocks if block.strip()], "\n".join(lines[last:])


def _echo_keys(shown: bool) -> None:
    """Let the terminal show what is typed, or not."""
    if not sys.stdin.isatty():
        return
    mode = termios.tcgetattr(sys.stdin)
    mode[3] = mode[3] | termios.ECHO if shown else mode[3] & ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSANOW, mode)
