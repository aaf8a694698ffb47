"""What mlx-lm computes in one process, kept for all worlds of one test run.

`launch/test` runs the same tests on several numbers of ranks, and what they are
compared with is the same for all of them. The first world that asks computes it,
and of two processes that run tests side by side, the first.
"""

import os
import pickle
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock
from reference import MODELS, on_rank_0

from mlxtp import Communicator

# The folder that the worlds of one run share; launch/test makes and removes it.
VARIABLE = "MLXTP_TESTS_KEPT"


@cache
def _folder() -> Path:
    """This run's folder; a run of one world has its own."""
    given = os.environ.get(VARIABLE)
    if given:
        return Path(given)
    holder = tempfile.TemporaryDirectory(prefix="mlxtp-kept-")
    _holders.append(holder)  # removed when the process ends
    return Path(holder.name)


_holders: list[tempfile.TemporaryDirectory[str]] = []


def kept(comm: Communicator, name: str, compute: Callable[[Path], Any]) -> Any:
    """What `compute` returns on rank 0 of the first world of this run that asks.

    `name` tells what is computed apart from all else: two tests that share a name
    share the result. `compute` is given a folder that it may fill, and that stays for
    all worlds; nobody may change it afterwards.
    """

    def computed() -> Any:
        folder = _folder() / name
        file = folder.with_name(f"{folder.name}.pickle")
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            if not file.exists():
                folder.mkdir(parents=True, exist_ok=True)
                result = compute(folder)
                part = file.with_suffix(".part")
                part.write_bytes(pickle.dumps(result))
                part.rename(file)
        return pickle.loads(file.read_bytes())

    return on_rank_0(comm, computed)


def kept_model(comm: Communicator, name: str) -> Path:
    """The folder of one of `reference.MODELS`, for all ranks; nobody may change it."""

    def save(folder: Path) -> Path:
        MODELS[name].save(folder)
        return folder

    return kept(comm, name, save)
