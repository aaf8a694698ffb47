"""What `import mlxtp` gives, and what it brings in."""

import subprocess
import sys
from importlib import import_module

import pytest

import mlxtp

pytestmark = pytest.mark.once

HEAVY = ("mlx", "mlx_lm", "transformers", "numpy", "mpi4py")


def imported(code: str) -> set[str]:
    """Which of `HEAVY` a new process has imported after `code`."""
    report = f"import sys; print(*(sys.modules.keys() & {set(HEAVY)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; {report}"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split())


def test_import_alone_brings_in_no_package() -> None:
    assert imported("import mlxtp; dir(mlxtp); mlxtp.__version__") == set()


def test_only_what_runs_models_brings_in_transformers() -> None:
    """mlx-lm imports it whichever of its modules is asked for."""
    light = "mlxtp.Communicator.world(), mlxtp.SliceTable, mlxtp.UsageError"
    assert imported(f"import mlxtp; {light}") == {"mlx", "numpy"}


@pytest.mark.parametrize("name", mlxtp.__all__)
def test_every_name_is_there(name: str) -> None:
    thing = getattr(mlxtp, name)
    assert name in dir(mlxtp)
    assert name == "__version__" or thing.__name__ == name


def test_generate_is_always_the_function() -> None:
    """Also where somebody has imported the program of that name."""
    with pytest.raises(ImportError, match=r"python -m mlxtp\.generate"):
        import_module("mlxtp.generate")
    from mlxtp import generate

    assert generate is mlxtp.generate
    assert generate.__module__ == "mlxtp.generation.text"


def test_what_is_not_there() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'generator'"):
        mlxtp.generator  # noqa: B018
