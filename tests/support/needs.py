"""What tests need of the machine, and which package brings it in.

A test that lacks something is skipped with a reason that `conftest.py` sums up at the
end of a run. MLXTP_TESTS_WITHOUT names what is to count as missing ("ip sshd"), so that
a machine that has everything can show what a fresh one does.
"""

import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from subprocess import run
from tempfile import TemporaryDirectory
from typing import NamedTuple

import pytest

PREFIX = "this machine lacks "
SEPARATOR = "; "
HIDDEN = "MLXTP_TESTS_WITHOUT"


class Need(NamedTuple):
    """Something that a machine may lack: its name in a sentence, and who brings it."""

    what: str
    is_here: Callable[[], object]
    brought_by: str = ""

    def in_words(self) -> str:
        """What it is, and who brings it."""
        return f"{self.what} ({self.brought_by})" if self.brought_by else self.what


def program(name: str) -> str | None:
    """Where a program is, also one that only root has in PATH."""
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


@cache
def sanitizers() -> bool:
    """Whether programs that are compiled with the sanitizers run here."""
    compiler = shutil.which("c++")
    if compiler is None:
        return False
    with TemporaryDirectory() as folder:
        program = Path(folder) / "program"

        def runs(names: str) -> bool:
            command = [compiler, f"-fsanitize={names}", "-x", "c++", "-", "-o", program]
            compiled = run(command, input=b"int main() {}", capture_output=True)
            if compiled.returncode != 0:
                return False
            return run([program], capture_output=True).returncode == 0

        return runs("address,undefined") and runs("thread")


NEEDS = {
    "linux": Need("Linux", lambda: sys.platform == "linux"),
    "root": Need("root's rights", lambda: os.geteuid() == 0),
    "tun": Need("/dev/net/tun", Path("/dev/net/tun").exists),
    "ip": Need("the command ip", lambda: program("ip"), "package iproute2"),
    "sshd": Need(
        "OpenSSH's server and client",
        lambda: program("sshd") and program("ssh"),
        "package openssh-server",
    ),
    "chromium": Need("Chromium", lambda: program("chromium"), "package chromium"),
    "sanitizers": Need(
        "a C++ compiler with the address and the thread sanitizer",
        sanitizers,
        "package g++",
    ),
    "torch": Need(
        "PyTorch", lambda: find_spec("torch"), "`source launch/environment reference`"
    ),
}


def missing(*names: str) -> str | None:
    """The reason for skipping what needs all of these, or None where all are here."""
    hidden = os.environ.get(HIDDEN, "").split()
    lacking = [
        NEEDS[name].in_words()
        for name in names
        if name in hidden or not NEEDS[name].is_here()
    ]
    return PREFIX + SEPARATOR.join(lacking) if lacking else None


def needs(*names: str) -> pytest.MarkDecorator:
    """A mark that skips a test where one of these is missing."""
    reason = missing(*names)
    return pytest.mark.skipif(reason is not None, reason=reason or "")


def skip_without(*names: str) -> None:
    """Skip the running test, or all that use the running fixture."""
    reason = missing(*names)
    if reason is not None:
        pytest.skip(reason)


def summary(reasons: list[str]) -> list[str]:
    """Sentences for people about the tests that were skipped for these reasons."""
    lacking = Counter(
        what
        for reason in reasons
        if reason.startswith(PREFIX)
        for what in reason.removeprefix(PREFIX).split(SEPARATOR)
    )
    if not lacking:
        return []
    said = "; ".join(f"{count} for {what}" for what, count in lacking.items())
    lines = [f"Tests skipped for what this machine lacks: {said}."]
    packages = [
        need.brought_by.removeprefix("package ")
        for need in NEEDS.values()
        if need.in_words() in lacking and need.brought_by.startswith("package ")
    ]
    if packages:
        lines.append(f"Debian brings them with: apt-get install {' '.join(packages)}")
    return lines
