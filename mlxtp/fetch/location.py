"""Where a model lies: in a folder, whole or cut, or on the hub."""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from mlxtp.checkpoint import cut, verify
from mlxtp.checkpoint.cut import Origin
from mlxtp.checkpoint.headers import Checkpoint
from mlxtp.comm.communicator import Communicator
from mlxtp.comm.errors import UsageError
from mlxtp.fetch import hub
from mlxtp.fetch.hub import Repo

T = TypeVar("T")


@dataclass(frozen=True)
class Location:
    """Where a model lies, with the headers of its weights read.

    `name` is what the user called it. `folder` has config and tokenizer on this
    machine, and what there is of the weights: `checkpoint`. Slices that are not there
    come from `repo`; where that is None they cannot be had.
    """

    name: str
    folder: Path
    checkpoint: Checkpoint
    repo: Repo | None = None

    @classmethod
    def of_folder(cls, name: str, folder: Path) -> "Location":
        """A folder with all of a checkpoint.

        Raises: ValueError, with the file, if one is missing, cut short or broken.
        """
        return cls(name, folder, Checkpoint.of_folder(folder))

    @classmethod
    def of_cut(cls, name: str, folder: Path) -> "Location":
        """A folder with slices of a checkpoint: those of all ranks, or of some.

        Raises: ValueError, with the file, if one is missing, cut short or broken.
        """
        return cls(name, folder, cut.open_cut(folder))

    @classmethod
    def of_hub(
        cls, name: str, comm: Communicator, revision: str | None = None
    ) -> "Location":
        """A repository on the hub, of which each machine keeps slices in its cache.

        Rank 0 asks the hub and tells the others; the headers come once. Slices that
        were damaged since they came are removed. Where all machines have all of it in
        the hub's cache, that is read.

        Raises: UsageError on every rank, with what the hub said.
        """
        small: dict[str, bytes] = {}

        def ask_commit() -> Repo:
            nonlocal small
            repo, small = hub.small_files(name, revision)
            return repo

        repo = _from_root(comm, ask_commit)
        snapshot, folder = hub.whole(repo), repo.folder()
        hosts = comm.allgather_object(
            (comm.host, snapshot is not None, _is_begun(folder))
        )
        if snapshot is not None and all(is_whole for _, is_whole, _ in hosts):
            with comm.agreement():
                return cls.of_folder(name, snapshot)
        origin: Origin | None = None
        if not all(is_begun for *_, is_begun in hosts):
            small, origin = _from_root(comm, lambda: (small, hub.origin(repo, small)))
        first_of_host = [host for host, *_ in hosts].index(comm.host)
        with comm.agreement():
            if comm.rank == first_of_host:
                if origin:
                    if not _is_begun(folder):
                        shutil.rmtree(folder, ignore_errors=True)
                    cut.begin(folder, origin, small)
                verify.drop_damaged(folder)
        with comm.agreement():
            return replace(cls.of_cut(name, folder), repo=repo)

    @property
    def is_cut(self) -> bool:
        """Whether it is a cut checkpoint, which may lack slices of a rank."""
        return cut.is_cut(self.folder)

    def reopened(self) -> "Location":
        """The same, with the slices that have been fetched since. Errors as before."""
        return replace(self, checkpoint=cut.open_checkpoint(self.folder))


def locate(
    path_or_hf_repo: str | Path, comm: Communicator, revision: str | None = None
) -> Location:
    """Find a model: a folder on every host, or else a repository of the hub.

    `revision` is a branch, a tag or a commit of the repository; for a folder it says
    nothing.

    Raises: UsageError on every rank if there is no such model, or its files are broken.
    """
    name, path = str(path_or_hf_repo), Path(path_or_hf_repo).expanduser()
    is_local = name.startswith((".", "/", "~"))
    # os.path: what may not be looked at is not there, either.
    if not (is_local or any(comm.allgather_object(os.path.exists(path)))):
        return Location.of_hub(name, comm, revision)
    with comm.agreement():
        if not path.exists():
            raise ValueError(f"there is no model folder {path}")
        if not path.is_dir():
            raise ValueError(f"the model {path} is a file; give the folder it is in")
        if cut.is_cut(path):
            return Location.of_cut(name, path)
        return Location.of_folder(name, path)


def _is_begun(folder: Path) -> bool:
    """Whether slices can be put into `folder`: it says whose, and of what."""
    try:
        cut.origin_of(folder)
    except ValueError:
        return False
    return True


def _from_root(comm: Communicator, make: Callable[[], T]) -> T:
    """Make something on rank 0 and give it to every rank, with one collective.

    Raises: UsageError on every rank for a ValueError or OSError.
    """
    value, message = None, ""
    if comm.rank == 0:
        try:
            value = make()
        except (ValueError, OSError) as error:
            message = str(error) or repr(error)
    value, message = comm.bcast_object((value, message))
    if message:
        raise UsageError(message)
    assert value is not None
    return value
