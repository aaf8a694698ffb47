"""Ranks that were not started alike are told apart before anything else."""

import importlib.metadata

import pytest

from mlxtp import Communicator
from mlxtp.comm.same_start import check_same_start


def test_alike(comm: Communicator) -> None:
    check_same_start(comm, ["--seed", "1"])


def test_other_arguments(comm: Communicator) -> None:
    is_last = comm.rank == comm.size - 1
    check(comm, ["--seed", str(int(is_last))], "arguments '--seed 0' .* '--seed 1' on")


@pytest.mark.parametrize("package", ["mlxtp", "mlx", "mlx-lm"])
def test_another_version(
    package: str, comm: Communicator, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = importlib.metadata.version
    if comm.rank == comm.size - 1:
        monkeypatch.setattr(
            "mlxtp.comm.same_start.version",
            lambda name: "0.0.1" if name == package else version(name),
        )
    check(comm, [], f"version of {package} .* '0.0.1' on rank {comm.size - 1}")


def check(comm: Communicator, arguments: list[str], message: str) -> None:
    """Expect a mistake wherever there is another rank to differ from."""
    if comm.size == 1:
        check_same_start(comm, arguments)
        return
    with pytest.raises(ValueError, match=message):
        check_same_start(comm, arguments)
