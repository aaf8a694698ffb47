"""What tests need of the machine, and which package brings it in.

A test that lacks something is skipped with a reason that `conftest.py` sums up at the
end of a run. MLXTP_TESTS_WITHOUT names what is to count as missing ("ip sshd"), so that
a machine that has everything can show what a fresh one does.
"""

import os
import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

PREFIX = "this machine lacks "
HIDDEN = "MLXTP_TESTS_WITHOUT"


class Need(NamedTuple):
    """Something that a machine may lack: its name in a sentence, and who brings it."""

    what: str
    is_here: Callable[[], object]
    brought_by: str = ""


def program(name: str) -> str | None:
    """Where a program is, also one that only root has in PATH."""
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


NEEDS = {
    "linux": Need("Linux", lambda: sys.platform == "linux"),
    "root": Need("root's rights", lambda: os.geteuid() == 0),
    "no root": Need("an ordinary user's rights", lambda: os.geteuid() != 0),
    "tun": Need("/dev/net/tun", Path("/dev/net/tun").exists),
    "ip": Need("the command ip", lambda: program("ip"), "package iproute2"),
    "sshd": Need(
        "OpenSSH's server and client",
        lambda: program("sshd") and program("ssh"),
        "package openssh-server",
    ),
    "torch": Need(
        "PyTorch", lambda: find_spec("torch"), "`source launch/environment reference`"
    ),
}


def missing(*names: str) -> str | None:
    """The reason for skipping what needs all of these, or None where all are here."""
    hidden = os.environ.get(HIDDEN, "").split()
    for name in names:
        need = NEEDS[name]
        if name in hidden or not need.is_here():
            return f"{PREFIX}{need.what}" + (
                f" ({need.brought_by})" if need.brought_by else ""
            )
    return None


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
    lacking = [reason.removeprefix(PREFIX) for reason in reasons if PREFIX in reason]
    if not lacking:
        return []
    counts = {what: lacking.count(what) for what in sorted(set(lacking))}
    said = ", ".join(f"{count} for {what}" for what, count in counts.items())
    lines = [f"Not tested, because this machine lacks something: {said}."]
    packages = sorted(
        need.brought_by.removeprefix("package ")
        for need in NEEDS.values()
        if need.brought_by.startswith("package ") and f"({need.brought_by})" in said
    )
    if packages:
        lines.append(f"As root: apt-get install {' '.join(packages)}")
    return lines
