"""Starts ranks of its own, for tests that look at a job from outside."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
TIMEOUT_SECONDS = 120


def mpirun(
    ranks: int, *arguments: str, stdin: str | None = None, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run Python with `arguments` on `ranks` ranks of this machine."""
    return run(["-n", str(ranks), sys.executable, *arguments], stdin, **env)


def run(
    what: list[str], stdin: str | None = None, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run mpirun with any arguments behind the hostfile."""
    launcher = Path(sys.executable).parent / "mpirun"
    return subprocess.run(
        [str(launcher), "-hostfile", str(ROOT / "hostfiles" / "localhost"), *what],
        input=stdin or "",
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        env={**os.environ, **env},
    )
