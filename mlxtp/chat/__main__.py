"""Talk with a model in the terminal: `python -m mlxtp.chat [--url URL]`.

The whole program: connect to a server, or start one; take turns; end.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import Any, NoReturn

from prompt_toolkit import PromptSession
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from rich.console import Console

from mlxtp.chat import options
from mlxtp.chat.client import Client, ServerError, Usage, printable
from mlxtp.chat.conversation import Conversation, Turn
from mlxtp.chat.display import Display, Plain, Terminal
from mlxtp.chat.server import Server, explained
from mlxtp.comm.errors import UsageError

# How often a server that loads is asked how far it is.
LOADING_SECONDS = 0.2

# How long a server that lost its ranks takes to end.
LOSS_SECONDS = 10.0


def main() -> None:
    """Run the program. A mistake of the person who started it is one line, status 2."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            signal.signal(number, _leave)
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    console = Console(highlight=False, markup=False, emoji=False)
    display: Display = Terminal(console) if is_terminal else Plain()
    try:
        args, for_server = options.parse(sys.argv[1:])
        with connected(args.url, args.api_key, for_server, display) as (client, server):
            model = choose_model(client, args.model if args.url else None)
            chat = Chat(client, model, options.settings(args), args.system, display)
            status = talk(chat, server) if is_terminal else read_turns(chat, server)
    except (UsageError, ServerError) as error:
        print(f"mlxtp.chat: error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    sys.exit(status)


@contextmanager
def connected(
    url: str | None, api_key: str | None, arguments: Sequence[str], display: Display
) -> Iterator[tuple[Client, Server | None]]:
    """Wait for the server under `url`, or start one with `arguments` and end it.

    Raises: ServerError if it does not come.
    """
    if url is not None:
        client = Client(url, api_key)
        wait_until_loaded(client, display)
        yield client, None
        return
    server = Server(arguments)
    try:
        with explained(server, LOSS_SECONDS):
            client = Client(server.address(), api_key)
            wait_until_loaded(client, display)
        yield client, server
    finally:
        server.end()


def wait_until_loaded(client: Client, display: Display) -> None:
    """Show what the server does until it is ready."""
    with display.progress() as show:
        while (loading := client.loading()) is not None:
            show(loading.words, loading.done)
            time.sleep(LOADING_SECONDS)


def choose_model(client: Client, name: str | None) -> str:
    """Return the model of this name, or the server's first.

    Raises: UsageError if it has none of this name.
    """
    models = client.models()
    if not models:
        raise ServerError(f"{client.url} has no model")
    if name is not None and name not in models:
        raise UsageError(f"--model is {name!r}: {client.url} has {', '.join(models)}")
    return name or models[0]


class Chat:
    """A conversation with a model of a server, and the commands that change it."""

    def __init__(
        self,
        client: Client,
        model: str,
        settings: dict[str, Any],
        system: str | None,
        display: Display,
    ) -> None:
        self.client, self.model = client, model
        self.display = display
        self._settings = settings
        self._conversation = Conversation(system)
        # What each command is called with, what it does, and how.
        self.commands: dict[str, tuple[str, str, Callable[[str], None]]] = {
            "/system": ("[TEXT]", "set the system message, or show it", self.system),
            "/reset": ("", "begin a new conversation", self.reset),
            "/retry": ("", "ask for the last answer again", self.retry),
            "/save": ("FILE", "write the conversation, .json or .md", self.save),
            "/load": ("FILE", "go on with one that was saved as .json", self.load),
            "/help": ("", "show this", self.help),
            "/exit": ("", "end, as Ctrl+D does", self.exit),
        }

    def take(self, line: str) -> None:
        """Obey a command, or answer what a person says.

        Raises: UsageError for a mistake; ServerError if there is no answer, or a part;
            EOFError if the person wants to end; KeyboardInterrupt if the answer was
            stopped.
        """
        if not line.startswith("/"):
            if line.strip():
                self._answer(self._conversation.ask(line))
            return
        name, _, rest = line.strip().partition(" ")
        if name not in self.commands:
            raise UsageError(
                f"there is no command {printable(name)}: see /help; a turn that "
                "begins with / is written behind a space"
            )
        self.commands[name][2](rest.strip())

    def system(self, text: str) -> None:
        """Set the system message, or show it."""
        if text:
            self._conversation.system = text
        else:
            self.display.note(printable(self._conversation.system or "(nothing)"))

    def reset(self, _: str) -> None:
        """Forget all turns; the system message stays."""
        self._conversation.turns.clear()

    def retry(self, _: str) -> None:
        """Ask for the last answer again."""
        self._answer(self._conversation.retry())

    def save(self, name: str) -> None:
        """Write the conversation to a file."""
        self._conversation.save(_file(name, "/save"), self.model)

    def load(self, name: str) -> None:
        """Go on with the conversation of a file."""
        self._conversation = Conversation.load(_file(name, "/load"))

    def help(self, _: str) -> None:
        """Show the commands and the keys."""
        for name, (argument, does, _run) in self.commands.items():
            self.display.note(f"{f'{name} {argument}':16} {does}")
        self.display.note(f"{'Alt+Enter':16} a new line (or Esc, then Enter)")
        self.display.note(f"{'Ctrl+C':16} stop the answer, and keep what came of it")

    def exit(self, _: str) -> None:
        """End the conversation."""
        raise EOFError

    def _answer(self, turn: Turn) -> None:
        """Get the answer of a turn and show it, with figures behind it."""
        messages = self._conversation.messages()
        body = {**self._settings, "model": self.model, "messages": messages}
        pieces, usage = 0, None
        first = last = begun = time.perf_counter()
        self.display.begin()
        try:
            with closing(self.client.chat(body)) as answer:
                for piece in answer:
                    if isinstance(piece, Usage):
                        usage = piece
                        continue
                    last = time.perf_counter()
                    first = first if pieces else last
                    pieces += 1
                    turn.add(piece)
                    self.display.add(piece)
        finally:
            self.display.end()
            if pieces:
                self.display.note(_figures(pieces, usage, first - begun, last - first))


def _figures(
    pieces: int, usage: Usage | None, first_seconds: float, seconds: float
) -> str:
    """Say how fast an answer came; without `usage` each piece counts as a token."""
    tokens = pieces if usage is None else usage.completion_tokens
    parts = [f"{'about ' if usage is None else ''}{tokens} tokens"]
    if seconds:
        parts.append(f"{(tokens - 1) / seconds:.1f} tokens/s")
    parts.append(f"the first after {first_seconds:.2f} s")
    if usage is not None:
        parts.append(f"prompt of {usage.prompt_tokens}, {usage.cached_tokens} cached")
    return ", ".join(parts)


def _file(name: str, command: str) -> Path:
    if not name:
        raise UsageError(f"{command}: wanted the name of a file")
    return Path(name).expanduser()


def read_turns(chat: Chat, server: Server | None) -> int:
    """Take each line of standard input; return the status. What fails ends it."""
    for line in sys.stdin:
        try:
            with explained(server):
                chat.take(line.rstrip("\n"))
        except EOFError:
            break
        except ServerError as error:
            print(f"mlxtp.chat: error: {error}", file=sys.stderr)
            return 1
    return 0


def talk(chat: Chat, server: Server | None) -> int:
    """Take what a person types; return the status."""
    session = typing()
    chat.display.note(f"{chat.model} at {chat.client.url}: /help, Ctrl+D ends")
    while True:
        try:
            line = session.prompt()
        except KeyboardInterrupt:
            chat.display.note("Ctrl+D ends")
            continue
        except EOFError:
            return 0
        try:
            with explained(server):
                chat.take(line)
        except KeyboardInterrupt:
            chat.display.note("stopped")
        except EOFError:
            return 0
        except (UsageError, ServerError) as error:
            chat.display.note(f"error: {error}")
            if server is not None and server.has_ended():
                return 1


def typing() -> PromptSession[str]:
    """Read what a person types, over several lines, with what was typed before."""
    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return PromptSession(
        "> ",
        multiline=True,
        prompt_continuation="  ",
        key_bindings=keys,
        history=_history(),
    )


def _history() -> History:
    """What was typed before, in a file for this user alone, if one can be written."""
    folder = Path(os.environ.get("XDG_STATE_HOME", ""))
    try:
        if not folder.is_absolute():
            folder = Path.home() / ".local" / "state"
        file = folder / "mlxtp" / "chat_history"
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(file, os.O_WRONLY | os.O_CREAT, 0o600))
    except (OSError, RuntimeError):  # there is no home
        return InMemoryHistory()
    return FileHistory(str(file))


def _leave(number: int, _: object) -> NoReturn:
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
