"""The native collectives as a C++ program of their own, under the sanitizers."""

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import run

import pytest
from needs import skip_without
from ranks import mpirun

from mlxtp.comm import native

SOURCES = Path(native.__file__).parent
PROGRAM = Path(__file__).with_name("native_program.cpp")
LIMIT_SECONDS = 120

# Name -> what the compiler and the environment of the ranks are given. The program ends
# with another status than 0 where a sanitizer reports anything.
SANITIZERS = {
    "address": (
        ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
        {
            "LSAN_OPTIONS": "print_suppressions=0:suppressions="
            + str(PROGRAM.with_suffix(".leaks"))
        },
    ),
    "thread": (
        ["-fsanitize=thread"],
        {
            # Open MPI's own locks are not seen, so neither is what they protect.
            "TSAN_OPTIONS": "halt_on_error=1:ignore_noninstrumented_modules=1",
            # The sanitizer takes the addresses at which PMIx wants to share memory.
            "PMIX_MCA_gds": "hash",
            # UCX hooks madvise, also where a thread has ended for the sanitizer.
            "UCX_MEM_MMAP_HOOK_MODE": "none",
        },
    ),
}


@pytest.mark.once
@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_program(sanitizer: str, tmp_path: Path) -> None:
    """Five ranks, and worlds of one to four of them."""
    skip_without("sanitizers")
    flags, environment = SANITIZERS[sanitizer]
    flags = [*flags, "-std=c++20", "-O1", "-g1", f"-I{SOURCES}"]
    flags.append(f"-DWITH_{sanitizer.upper()}_SANITIZER")
    mpicxx = Path(sys.executable).with_name("mpicxx")

    def compiled(source: Path) -> Path:
        compiled_to = tmp_path / f"{source.stem}.o"
        command = [mpicxx, *flags, "-c", source, "-o", compiled_to]
        done = run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return compiled_to

    with ThreadPoolExecutor() as pool:
        objects = list(pool.map(compiled, [PROGRAM, SOURCES / "collectives.cpp"]))
    program = tmp_path / "program"
    run([mpicxx, *flags, *objects, "-o", program], check=True)
    done = mpirun("-n", 5, program, timeout_seconds=LIMIT_SECONDS, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "passed\n", done.stdout + done.stderr
