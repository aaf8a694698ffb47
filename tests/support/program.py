"""A program over ranks, run by the ranks that the tests run on."""

import io
import runpy
import sys
from dataclasses import dataclass
from typing import NoReturn

import pytest

from mlxtp import Communicator
from mlxtp.comm import launcher


@dataclass(frozen=True)
class Done:
    """How a program ended: its status and what it printed, on every rank."""

    statuses: list[int]
    stdouts: list[str]
    stderrs: list[str]


def run(name: str, arguments: list[str], comm: Communicator) -> Done:
    """Run `python -m NAME ARGUMENTS` on the ranks of `comm`, which stay connected."""

    def leave(status: int) -> NoReturn:
        sys.exit(status)

    stdout, stderr, status = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *arguments])
        patch.setattr(sys, "stdout", stdout)
        patch.setattr(sys, "stderr", stderr)
        patch.setattr(Communicator, "world", lambda *_, **__: comm)
        patch.setattr(launcher, "leave", leave)
        try:
            runpy.run_module(name, run_name="__main__")
        except SystemExit as end:
            status = int(end.code or 0)
    reports = comm.allgather_object((status, stdout.getvalue(), stderr.getvalue()))
    return Done(*(list(part) for part in zip(*reports, strict=True)))
