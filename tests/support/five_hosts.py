"""The lab for tests: five hosts on this machine, where it can have them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from needs import skip_without

ROOT = Path(__file__).parents[2]
LAB = ROOT / "launch" / "lab"
HOSTFILE = ROOT / "hostfiles" / "studio5"
HOSTS = [f"studio{k}" for k in range(1, 6)]


NEEDS = ("linux", "root", "ip", "tun")


def lab(*arguments, timeout=60, **env):
    """Run launch/lab with this Python's programs first in PATH."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        [sys.executable, LAB, *arguments],
        capture_output=True,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=timeout,
        cwd=ROOT,
        env={**os.environ, "PATH": path, **env},
    )


def good(*arguments, **options):
    """Run launch/lab, which has to succeed; return what it prints."""
    done = lab(*arguments, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def in_namespaces():
    """Return the processes that run on the lab's hosts."""
    return [
        pid
        for host in HOSTS
        for pid in subprocess.run(
            ["ip", "netns", "pids", host], capture_output=True, text=True
        ).stdout.split()
    ]


@pytest.fixture(scope="module", autouse=True)
def the_lab_can_be_built():
    """Skip where there can be no lab, and take it down at the end of a file.

    It brings none up: every test, or a fixture that it takes, does so itself.
    """
    skip_without(*NEEDS)
    if Path("/run/mlxtp-lab").exists():
        pytest.skip("a lab is up already: launch/lab down")
    yield
    good("down")
