"""The command `mlxtp`, and programs over ranks that start themselves."""

import json
import runpy
import subprocess
import sys
import tomllib
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

from mlxtp import __main__ as command
from mlxtp import job_options, options
from mlxtp.cluster import job
from mlxtp.comm import launcher
from mlxtp.serve import options as serve_options

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[1]


def python(*words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *words],
        capture_output=True,
        text=True,
        input=stdin,
        timeout=100,
        cwd=ROOT,
    )


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables of a job of two ranks, whose end is not this process's."""
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setattr(launcher, "finish", lambda: None)
    monkeypatch.setattr(launcher, "is_started", lambda: False)


@pytest.mark.slow
def test_it_says_what_there_is() -> None:
    said = python("mlxtp")
    assert said.returncode == 0 and said.stderr == ""
    assert python("mlxtp", "--help").stdout == said.stdout
    for name, does in command.COMMANDS.items():
        assert f"  {name}" in said.stdout and does in said.stdout
        assert find_spec(f"mlxtp.{name}") is not None
    assert python("mlxtp", "--version").stdout == f"mlxtp {version('mlxtp')}\n"


@pytest.mark.skipif(sys.platform != "linux", reason="MLX on a Mac has Metal")
def test_without_a_backend_of_mlx(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every program says it in a line, and the library in an ImportError."""
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx/core.py").write_text("raise ImportError('libmlx.so')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    wanted = "MLX has no backend here: pip install 'mlxtp[cpu]', or "
    for name in ("mlxtp", *(f"mlxtp.{name}" for name in command.COMMANDS)):
        ended = python(name)
        assert ended.returncode == 2 and ended.stdout == ""
        assert ended.stderr.startswith(f"mlxtp: error: {wanted}")
        assert ended.stderr.count("\n") == 1
    program = "from mlxtp.cluster import job; import mlxtp; mlxtp.Communicator"
    library = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT
    )
    assert f"\nImportError: {wanted}" in library.stderr


def test_it_is_installed_as_mlxtp() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"mlxtp": f"{command.__name__}:main"}


@pytest.mark.parametrize("rank", [0, 1])
def test_an_unknown_command_is_one_line_of_rank_0(
    rank: int,
    two_ranks: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", str(rank))
    monkeypatch.setattr(sys, "argv", ["mlxtp", "generat", "--seed", "1"])
    with pytest.raises(SystemExit) as ended:
        command.main()
    wanted = "generate, serve, chat, shard, plan, doctor"
    line = f"mlxtp: there is no command 'generat': wanted {wanted}\n"
    assert capsys.readouterr() == ("", "" if rank else line)
    assert ended.value.code == (0 if rank else 2)  # mpirun's is then 2


@pytest.mark.parametrize("name", command.COMMANDS)
def test_each_runs_its_module(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_module(module: str, run_name: str, alter_sys: bool) -> None:
        ran.append((module, run_name, alter_sys, sys.argv[1:]))

    ran: list[tuple[str, str, bool, list[str]]] = []
    monkeypatch.setattr(runpy, "run_module", run_module)
    monkeypatch.setattr(sys, "argv", ["mlxtp", name, "--help", "x"])
    command.main()
    assert ran == [(f"mlxtp.{name}", "__main__", True, ["--help", "x"])]


@pytest.mark.slow
def test_a_command_is_the_same_as_its_module() -> None:
    words = ["--model", "nowhere", "--ranks", "2"]
    said, direct = python("mlxtp", "plan", *words), python("mlxtp.plan", *words)
    assert said.returncode == direct.returncode == 2
    assert said.stderr == direct.stderr
    assert said.stderr.startswith("mlxtp.plan: error: ")


def test_generate_starts_itself_and_hands_its_input_to_the_ranks() -> None:
    program = ["--max-tokens", "8", "--json", "--prompt"]
    alone = python("mlxtp.generate", *program, "Once there")
    assert "more" not in alone.stderr  # nobody reads it
    started = python(
        "mlxtp", "generate", *program, "-", "--ranks", "3", stdin="Once there"
    )
    assert started.returncode == 0, started.stderr
    report = json.loads(started.stdout)
    assert report["world_size"] == 3
    assert report["tokens"] == json.loads(alone.stdout)["tokens"]
    line = started.stderr.splitlines()[0]
    assert "/mpirun --prefix " in line and " -n 3 " in line
    assert line.endswith(f"{sys.executable} -m mlxtp.generate {' '.join(program)} -")


@pytest.mark.slow
def test_a_world_of_one_says_how_more_are_started() -> None:
    program = ["mlxtp.generate", "--max-tokens", "2"]
    says = "mlxtp.generate: one rank; --ranks N or --hostfile HOSTFILE starts more"
    assert python(*program).stderr.count(says) == 1
    assert says not in python(*program, "--quiet").stderr


def test_a_wrong_number_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["mlxtp.generate", "--ranks", "0"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("mlxtp.generate", run_name="__main__")
    assert ended.value.code == 2
    mistake = "mlxtp.generate: error: the number of ranks is 0: wanted 1 or more\n"
    assert capsys.readouterr() == ("", mistake)


@pytest.mark.parametrize("rank", [0, 1])
def test_mpirun_has_started_ranks_already(
    rank: int,
    two_ranks: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", str(rank))
    monkeypatch.setattr(sys, "argv", ["mlxtp.generate", "--ranks", "2"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("mlxtp.generate", run_name="__main__")
    assert ended.value.code == (0 if rank else 2)
    said = capsys.readouterr().err
    if rank:
        assert said == ""
    else:
        assert said.endswith("mpirun has started 2: leave out one or the other\n")
        assert said.count("\n") == 1


@pytest.mark.parametrize(
    "given, transport",
    [
        ("--transport ring --no-such-option", "ring"),
        ("--transport ring --temp -1", "ring"),
        ("--transport pigeon --temp -1", None),
        ("--transport ring --timeout 0", None),
        ("--transport ring --silence-timeout 0", None),
    ],
)
def test_a_refused_command_line_tells_how_the_others_connect(
    given: str, transport: str | None
) -> None:
    assert job_options.connection_alone(given.split()).get("transport") == transport


def test_who_ends_when_a_rank_is_silent() -> None:
    """A service soon; and where nothing is said, after the limit of a collective."""
    assert job_options.connection_alone([])["silence_seconds"] is None
    given = job_options.connection_alone(["--silence-timeout", "7"])
    assert (given["timeout_seconds"], given["silence_seconds"]) == (60, 7)
    assert given["on_loss"] == "end"
    service = job_options.connection(serve_options.parse_ranks([]))
    assert (service["timeout_seconds"], service["silence_seconds"]) == (60, 10)


def test_a_shortened_option_is_taken_out_of_what_the_ranks_get(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """argparse takes any beginning of an option that no other has."""
    started: list[job.Job] = []
    monkeypatch.setattr(job.Job, "exec", lambda self, **_: started.append(self))
    arguments = ["--rank", "3", "--hostf=F", "--seed", "1"]
    args = options.parse(arguments)
    job.start_if_asked(args, arguments, "mlxtp.generate", started=0)
    [one] = started
    assert (one.ranks, one.hostfile) == (3, "F")
    assert one.command == [sys.executable, "-m", "mlxtp.generate", "--seed", "1"]
