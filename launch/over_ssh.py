"""The hosts of a hostfile, and commands on all of them: what the scripts here share."""

import argparse
import getpass
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NoReturn

# macOS brings an older one, which reads no further than this.
if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit(
        "launch/ needs Python 3.11 or newer: source launch/environment, then again"
    )

ROOT = Path(__file__).resolve().parent.parent

# An address of this network is what `launch/ring` gives a host, and what mlxtp's
# transports look for to tell MPI which network to use.
HOST_NETWORK = "10.89.0.0/24"

# Nobody is there to type a password, and a host that sleeps must not hold up the rest.
SSH_OPTIONS = "-o BatchMode=yes -o ConnectTimeout=5"
KEEP_ALIVE = "-o ServerAliveInterval=5 -o ServerAliveCountMax=3"

HOSTFILE_LINE = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_.-]*)( (max[-_])?slots=\d+)*")


class HostError(Exception):
    """What went wrong on a host: the last line of what it said, and all `lines`."""

    def __init__(self, said: str) -> None:
        self.lines = [line.rstrip() for line in said.splitlines() if line.strip()]
        super().__init__(self.lines[-1].strip())


class Parser(argparse.ArgumentParser):
    """A command line; what is wrong with it, or with what it names, is one line."""

    def __init__(self, prog: str, description: str | None, epilog: str = "") -> None:
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, None, description, epilog, formatter_class=layout)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")

    def add_ssh(self) -> None:
        self.add_argument(
            "--ssh",
            metavar="COMMAND",
            type=shlex.split,
            default=["ssh"],
            help="what to take for ssh, such as 'ssh -F FILE'",
        )

    def add_apply(self, does: str) -> None:
        self.add_argument("--apply", action="store_true", help=does)

    def add_password(self) -> None:
        self.add_argument(
            "--ask-password",
            action="store_true",
            help="ask here, once, for the password that sudo wants on the hosts",
        )

    def hosts(self, hostfile: str) -> list[str]:
        """The names in a hostfile, each once; a wrong one ends the program."""
        try:
            return hosts_in(Path(hostfile).read_text())
        except OSError as error:
            self.error(f"no hostfile {hostfile}: {error.strerror}")
        except ValueError as error:
            self.error(f"{hostfile}: {error}")


def hosts_in(text: str) -> list[str]:
    """The names in the text of an Open MPI hostfile, in order, each once.

    Raises: ValueError, with the line, for what is none.
    """
    names = []
    for number, line in enumerate(text.splitlines(), 1):
        words = " ".join(re.sub(r"\s*=\s*", "=", line.partition("#")[0]).split())
        if not words:
            continue
        match = HOSTFILE_LINE.fullmatch(words)
        if match is None:
            raise ValueError(
                f"line {number} is to be a host's name and slots=N, not {words!r}"
            )
        names.append(match[1])
    if not names:
        raise ValueError("it names no host")
    return list(dict.fromkeys(names))


@cache
def is_here(host: str) -> bool:
    """Whether a name is this machine's: one of its addresses can be taken here."""
    own = socket.gethostname().removesuffix(".local")
    # In Bonjour no two machines have one name.
    if host == "localhost" or host.removesuffix(".local") == own:
        return True
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_DGRAM)
    except OSError:
        return False
    return any(_is_own(family, address) for family, *_, address in found)


def _is_own(family: int, address: tuple[str | int, ...]) -> bool:
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind(address)
    except OSError:
        return False
    return True


def run_on(host: str, script: str, ssh: Sequence[str], given: bytes = b"") -> str:
    """What a program for sh prints on a host, with `given` as its standard input.

    This machine takes no ssh. Raises: HostError if it fails.
    """
    command = ["sh", "-c", script]
    if not is_here(host):
        options = f"{SSH_OPTIONS} {KEEP_ALIVE}".split()
        # Whatever shell the user has there, sh reads the script.
        command = [*ssh, *options, host, f"exec sh -c {shlex.quote(script)}"]
    try:
        done = subprocess.run(command, input=given, capture_output=True)
    except OSError as error:
        raise HostError(f"{command[0]}: {error.strerror}") from None
    output = done.stdout.decode(errors="replace")
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip() or output.strip()
        raise HostError(said or f"it ended with status {done.returncode}")
    return output


def on_each(
    hosts: Sequence[str], act: Callable[[str], str], most_lines: int = 1
) -> bool:
    """Act on all hosts at once and print what comes of it, in order, a line each.

    A host that fails stops no other, and shows up to `most_lines` of what it said.
    Returns: whether all went well.
    """
    width = max(map(len, hosts))
    well = True
    with ThreadPoolExecutor(len(hosts)) as pool:
        for host, coming in [(host, pool.submit(act, host)) for host in hosts]:
            try:
                says = coming.result()
            except HostError as error:
                well = False
                says = f"FAILED: {error}"
                says += "".join(f"\n  | {it}" for it in error.lines[-most_lines:-1])
            print(f"{host:{width}}  {says}", flush=True)
    return well


def password_of(options: argparse.Namespace) -> bytes | None:
    """What sudo is to be given on the hosts: asked for here, where that is wanted."""
    if not options.ask_password:
        return None
    return getpass.getpass("Password for sudo on the hosts: ").encode() + b"\n"


def run_as_root(
    host: str, command: str, ssh: Sequence[str], password: bytes | None
) -> str:
    """What one command for sh prints on a host as root, by sudo where need be.

    The password goes the way of standard input, where no other user sees it.
    Raises: HostError if it fails.
    """
    sudo = "sudo -n" if password is None else "sudo -S -p ''"
    script = f"""
        if [ "$(id -u)" = 0 ]; then exec {command}; fi
        if [ {int(password is None)} = 1 ] && ! sudo -n true 2>/dev/null; then
            echo "sudo wants a password: add --ask-password" >&2
            exit 1
        fi
        exec {sudo} {command}"""
    return run_on(host, script, ssh, password or b"")
