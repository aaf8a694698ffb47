"""Command lines, and commands on many hosts at once: what the scripts here share.

Imported first, it puts the checkout on Python's path: what these scripts take from
mlxtp needs the standard library alone.
"""

import argparse
import getpass
import shlex
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

# macOS brings an older one, which reads no further than this.
if sys.version_info < (3, 11):  # noqa: UP036
    sys.exit(
        "launch/ needs Python 3.11 or newer: source launch/environment, then again"
    )

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from mlxtp.cluster import hostfile  # noqa: E402
from mlxtp.cluster.remote import HostError, run_on  # noqa: E402


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes, or those of its hostfile, are one line."""

    def __init__(self, prog: str, description: str | None, epilog: str = "") -> None:
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, None, description, epilog, formatter_class=layout)

    def error(self, message: str) -> NoReturn:
        """End the program with one line and status 2."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")

    def add_ssh(self) -> None:
        """Add `--ssh`, a command in words."""
        self.add_argument(
            "--ssh",
            metavar="COMMAND",
            type=shlex.split,
            default=["ssh"],
            help="what to take for ssh, such as 'ssh -F FILE'",
        )

    def add_apply(self, does: str) -> None:
        """Add `--apply`, without which nothing is changed."""
        self.add_argument("--apply", action="store_true", help=does)

    def add_password(self) -> None:
        """Add `--ask-password`, for `password_of`."""
        self.add_argument(
            "--ask-password",
            action="store_true",
            help="ask here, once, for the password that sudo wants on the hosts",
        )

    def hosts(self, file: str) -> list[str]:
        """Return the names in a hostfile, each once; a wrong one ends the program."""
        try:
            return list(hostfile.read(file))
        except ValueError as error:
            self.error(str(error))


def on_each(
    hosts: Sequence[str], act: Callable[[str], str], most_lines: int = 1
) -> bool:
    """Call `act` for all hosts at once; print its results in order, a line each.

    A host that fails stops no other, and shows up to `most_lines` of what it printed.

    Returns: whether none failed.
    """
    width = max(map(len, hosts))
    well = True
    with ThreadPoolExecutor(len(hosts)) as pool:
        for host, future in [(host, pool.submit(act, host)) for host in hosts]:
            try:
                says = future.result()
            except HostError as error:
                well = False
                says = f"FAILED: {error}"
                said_before = error.lines[-most_lines:-1]
                says += "".join(f"\n  | {line}" for line in said_before)
            print(f"{host:{width}}  {says}", flush=True)
    return well


def password_of(options: argparse.Namespace) -> bytes | None:
    """Ask for the password of sudo, if --ask-password is given."""
    if not options.ask_password:
        return None
    return getpass.getpass("Password for sudo on the hosts: ").encode() + b"\n"


def run_as_root(
    host: str, command: str, ssh: Sequence[str], password: bytes | None
) -> str:
    """Run a command on a host as root, by sudo where needed; return what it prints.

    The password goes to standard input, where no other user sees it.

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
    return run_on(host, script, ssh, given=password or b"")
