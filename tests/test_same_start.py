"""Ranks that were not started alike are told apart before anything else."""

import sys

import pytest

from mlxtp import Communicator
from mlxtp.generate import check_same_start


def test_alike(comm: Communicator) -> None:
    check_same_start(comm)


@pytest.mark.parametrize(
    ("target", "value", "message"),
    [
        ("mlxtp.__version__", "0.0.1", "version of mlxtp .* '0.0.1' on rank"),
        ("mlxtp.generate.version", lambda name: "9", "version of mlx .* '9' on rank"),
        ("sys.argv", ["", "--seed", "1"], "arguments .* '--seed 1' on rank"),
    ],
)
def test_one_rank_differs(
    target: str,
    value: object,
    message: str,
    comm: Communicator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["mlxtp.generate"])
    if comm.rank == comm.size - 1:
        monkeypatch.setattr(target, value)
    if comm.size == 1:
        check_same_start(comm)
        return
    with pytest.raises(ValueError, match=message):
        check_same_start(comm)
