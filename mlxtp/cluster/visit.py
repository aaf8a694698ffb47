"""Look at one host of a job that has ended: `python -m mlxtp.cluster.visit JOB ...`.

Run on the host itself, over what starts ranks there. It ends what jobs of these names
have left on it, removes the shared memory and folders that nobody uses any more, and
prints what it has seen as one line of JSON: the fields of `Visit`.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence, Set
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from mlxtp.cluster import cables
from mlxtp.cluster.addresses import ring_address
from mlxtp.cluster.commands import output
from mlxtp.cluster.remote import HostError, run_on

# Where Linux keeps shared memory; elsewhere Open MPI keeps it in its folders.
SHARED_MEMORY = Path("/dev/shm")

# A job that starts has made a file before it uses it.
NEW_SECONDS = 2.0

# How long processes that were killed may take to be gone.
GONE_SECONDS = 5.0

# The ranks' own check at their start (comm.same_start) compares them as well.
PACKAGES = ("mlxtp", "mlx", "mlx-lm", "mpi4py")

# Python and its imports take a while on a host that has just started.
VISIT_SECONDS = 20.0


@dataclass(frozen=True)
class Visit:
    """What was seen on a host.

    `ring_address` is the host's on the cables, if it has one. `cables` are the hosts,
    by number, to which it has a cable with an address; `answering` those of them that
    answer there. `gpu_limit_mb` is what macOS was told that its GPU may take
    (iogpu.wired_limit_mb), 0 for its own choice; None elsewhere. `versions` are those
    of the packages that all ranks must have alike.
    """

    ring_address: str | None
    gpu_limit_mb: int | None
    versions: dict[str, str]
    cables: tuple[int, ...] = ()
    answering: tuple[int, ...] = ()


def visit(
    host: str, jobs: Sequence[str], place: tuple[int, int] | None = None
) -> Visit:
    """Visit a host, on which jobs of these names may have left something.

    `place` says that it is host K of N on the cables.

    Raises: HostError if it does not answer, or not as this version of mlxtp does.
    """
    words = ["mlxtp.cluster.visit", *jobs]
    if place is not None:
        words.append(f"--place={place[0]},{place[1]}")
    content = ask(host, words, {each.name for each in fields(Visit)})
    content |= {name: tuple(content[name]) for name in ("cables", "answering")}
    return Visit(**content)


def ask(host: str, words: Sequence[str], names: Set[str]) -> dict[str, Any]:
    """Run a module of Python on a host; return the JSON object that it prints last.

    Raises: HostError if it does not answer, or prints none with just these `names`, as
        another version of mlxtp may.
    """
    command = shlex.join([sys.executable, "-m", *words])
    script = f"cd {shlex.quote(os.getcwd())} && exec {command}"
    said = run_on(host, script, timeout_seconds=VISIT_SECONDS)
    try:
        content: dict[str, Any] = json.loads(said.splitlines()[-1])
    except (ValueError, IndexError) as error:
        raise HostError(f"{host} says {said[-200:]!r}") from error
    if not isinstance(content, dict) or content.keys() != names:
        raise HostError("what it says is of another mlxtp: launch/install")
    return content


def versions() -> dict[str, str]:
    """Return the versions of the packages that all ranks must have alike."""
    return {name: version(name) for name in PACKAGES}


def end_jobs(names: Sequence[str]) -> None:
    """End the ranks and daemons of jobs on this host."""
    until = time.monotonic() + GONE_SECONDS
    while left := list(_of_jobs(names)):
        for process in left:
            with suppress(psutil.Error):  # it has gone
                process.kill()
        psutil.wait_procs(left, 0.2)
        if time.monotonic() > until:
            break


def _of_jobs(names: Sequence[str]) -> Iterator[psutil.Process]:
    """Yield the ranks and daemons of jobs on this host."""
    for process in psutil.process_iter():
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            # A rank knows its job by its environment, a daemon by its command line.
            known = [process.environ().get("PMIX_NAMESPACE", "")]
            if process.name() == "prted":
                known += process.cmdline()
        except psutil.Error:  # it has gone, or is another user's
            continue
        if any(word.startswith(f"{name}@") for word in known for name in names):
            yield process


def remove_leftovers() -> None:
    """Remove this user's shared memory and folders of Open MPI that nobody uses."""
    host = socket.gethostname().partition(".")[0]
    files = filter(_is_old_and_own, SHARED_MEMORY.glob(f"sm_segment.{host}.*"))
    if segments := list(files):
        used = set(_mapped())  # the maps of all processes are read for it
        for file in segments:
            if str(file) not in used:
                file.unlink(missing_ok=True)
    for folder in Path(tempfile.gettempdir()).glob("ompi.*"):
        number = re.fullmatch(r"ompi\.(\d+)", folder.name)
        if number and not psutil.pid_exists(int(number[1])) and _is_old_and_own(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _mapped() -> Iterator[str]:
    """Yield the files in shared memory that processes of this host use."""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            lines = maps.read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            if str(SHARED_MEMORY) in line:
                yield line[line.index("/") :].removesuffix(" (deleted)")


def _is_old_and_own(path: Path) -> bool:
    try:
        seen = path.stat()
    except OSError:
        return False
    return seen.st_uid == os.getuid() and time.time() - seen.st_mtime > NEW_SECONDS


def gpu_limit_mb() -> int | None:
    """Return what macOS was told that its GPU may take."""
    if sys.platform != "darwin":
        return None
    said = output("sysctl", "-n", "iogpu.wired_limit_mb").strip()
    return int(said) if said.isdigit() else None


def main() -> None:
    """End what is left, and print what was seen."""
    parser = argparse.ArgumentParser(prog="mlxtp.cluster.visit", description=__doc__)
    parser.add_argument("jobs", nargs="*", metavar="JOB")
    parser.add_argument("--place", metavar="K,N", help="host K of N on the cables")
    args = parser.parse_args()
    if args.jobs:
        end_jobs(args.jobs)
    remove_leftovers()
    answers: dict[int, bool] = {}
    if args.place is not None:
        answers = cables.answering(*map(int, args.place.split(",")))
    seen = Visit(
        ring_address(),
        gpu_limit_mb(),
        versions(),
        tuple(answers),
        tuple(other for other, is_there in answers.items() if is_there),
    )
    print(json.dumps(asdict(seen)))


if __name__ == "__main__":
    main()
