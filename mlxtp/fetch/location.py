"""Where a model lies: in a folder, whole or cut, or on the hub."""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

import filelock

from mlxtp.checkpoint import cut, verify
from mlxtp.checkpoint.cut import Origin
from mlxtp.checkpoint.headers import Checkpoint, files_of
from mlxtp.comm.communicator import Communicator
from mlxtp.comm.errors import UsageError
from mlxtp.fetch import hub
from mlxtp.fetch.hub import HubError, Repo

T = TypeVar("T")

# What a folder without the weights of a model is, by what is in it, and what to do.
CONVERT = "mlxtp reads safetensors: convert the model with mlx_lm.convert"
NO_MODELS = {
    "adapter_config.json": "is an adapter: --model wants its model, --adapter-path it",
    "*.gguf": f"holds weights of GGUF; {CONVERT}, from the repository it was made of",
    "*.bin": f"holds weights of PyTorch; {CONVERT}",
    "*.pth": f"holds weights of PyTorch; {CONVERT}",
}


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
    commit: str | None = None  # of a repository

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

        Rank 0 asks the hub and tells the others; where the hub does not answer, it is
        the commit that most machines keep slices of. It is not asked for a commit that
        a machine keeps slices of, which is always the same. The headers come once, from
        the hub or from a machine that has slices already. Slices that were damaged
        since they came are removed. Where all machines have all of it in the hub's
        cache, that is read; where some have files of it there, these are used.

        Raises: UsageError on every rank, with what the hub said, and what which host
            lacks.
        """
        small: dict[str, bytes] = {}

        def ask_commit() -> tuple[Repo, list[str]] | str:
            nonlocal small
            try:
                repo, small = hub.small_files(name, revision)
            except HubError as error:
                asking = f" (asked by {comm.host})" if comm.size > 1 else ""
                message = f"{error}{asking}"
                if error.is_final:
                    raise ValueError(message) from error
                return message
            return repo, sorted(small)

        known = _known(comm, name, revision) if _is_commit(revision) else None
        if known is None:
            answer = _from_root(comm, ask_commit)
            if isinstance(answer, str):
                known = _known(comm, name, revision)
                if known is None:
                    raise UsageError(answer)
            else:
                known = answer
        repo, names = known
        lacks = hub.lacking(repo, names)
        hosts = comm.allgather_object((comm.host, lacks, lacks and _is_begun(repo)))
        if not any(lacks for _, lacks, _ in hosts):
            folder = hub.snapshot(repo)
            assert folder is not None
            with comm.agreement(), named(name, folder):
                whole = cls.of_folder(name, folder)
                return replace(whole, commit=repo.commit)
        begun = [rank for rank, (*_, is_begun) in enumerate(hosts) if is_begun]
        origin: Origin | None = None
        if len(begun) < comm.size:

            def give() -> tuple[dict[str, bytes], Origin]:
                if begun:
                    return cut.small_files(repo.folder()), cut.origin_of(repo.folder())
                try:
                    return small, hub.origin(repo, small)
                except HubError as error:
                    host, files, _ = next(host for host in hosts if host[1])
                    raise ValueError(
                        f"{host} lacks {', '.join(files)} of {name}, and the hub did "
                        f"not give it: {error.reason}"
                    ) from error

            small, origin = _from_root(comm, give, root=(begun or [0])[0])
        first_of_host = [host for host, *_ in hosts].index(comm.host)
        with comm.agreement():
            folder = repo.folder()  # which is made
            with named(name, folder):
                if comm.rank == first_of_host:
                    if origin:
                        # Another job may begin the same folder now.
                        lock = folder.with_name(f".{folder.name}.lock")
                        with filelock.FileLock(lock):
                            if not _is_begun(repo):
                                shutil.rmtree(folder, ignore_errors=True)
                            cut.begin(folder, origin, small)
                    for reference in (revision, repo.commit):
                        _remember(repo, reference)
                    verify.drop_damaged(folder)
        with comm.agreement(), named(name, folder):
            return cls(name, folder, hub.here(repo), repo, repo.commit)

    @property
    def is_cut(self) -> bool:
        """Whether it is a cut checkpoint, which may lack slices of a rank."""
        return cut.is_cut(self.folder)

    def origin(self) -> Origin:
        """The whole checkpoint that there are slices of, or all.

        Raises: ValueError if a cut checkpoint does not say of what it is.
        """
        if self.is_cut:
            return cut.origin_of(self.folder)
        there = self.checkpoint
        files = {name: t.pieces[0].file.name for name, t in there.tensors.items()}
        return Origin(self.name, None, dict(there.headers), files, there.different)

    def reopened(self) -> "Location":
        """The same, with the slices that have been fetched since. Errors as before."""
        if self.repo is not None:
            return replace(self, checkpoint=hub.here(self.repo))
        return replace(self, checkpoint=cut.open_checkpoint(self.folder))


def locate(
    path_or_hf_repo: str | Path, comm: Communicator, revision: str | None = None
) -> Location:
    """Find a model: a folder on every host, or else a repository of the hub.

    `revision` is a branch, a tag or a commit of the repository; for a folder it says
    nothing.

    Raises: UsageError on every rank if there is no such model, or its files are broken.
    """
    name = str(path_or_hf_repo)
    path = Path(os.path.expanduser(name))  # Path's own raises for ~nobody
    is_local = name.startswith((".", "/", "~"))
    # os.path: what may not be looked at is not there, either.
    if not (is_local or any(comm.allgather_object(os.path.exists(path)))):
        return Location.of_hub(name, comm, revision)
    with comm.agreement():
        if not path.exists():
            raise ValueError(f"there is no model folder {name}")
        if not path.is_dir():
            raise ValueError(f"the model {name} is a file; give the folder it is in")
        if cut.is_cut(path):
            return Location.of_cut(name, path)
        _check_is_model(name, path)
        return Location.of_folder(name, path)


def _check_is_model(name: str, folder: Path) -> None:
    """Raise ValueError for a folder with what is something else."""
    if files_of(folder):
        return
    for pattern, what in NO_MODELS.items():
        if any(folder.glob(pattern)):
            raise ValueError(f"{name} {what}")


def _is_begun(repo: Repo) -> bool:
    """Whether this machine keeps slices of it: its folder says of what they are."""
    try:
        cut.origin_of(repo.folder())
    except (ValueError, OSError):
        return False
    return True


def _is_commit(revision: str | None) -> bool:
    """Whether a revision is the whole name of a commit."""
    return re.fullmatch(r"[0-9a-f]{40}", revision or "") is not None


def _known(
    comm: Communicator, name: str, revision: str | None
) -> tuple[Repo, list[str]] | None:
    """Find the commit that most hosts keep slices of, without the hub.

    Returns: the repository, and what its small files are called; None if none keeps
    any.
    """
    found = comm.allgather_object(_remembered(name, revision))
    kept = [known for known in found if known is not None]
    commits = [repo.commit for repo, _ in kept]
    return max(kept, key=lambda known: commits.count(known[0].commit), default=None)


def _remembered(name: str, revision: str | None) -> tuple[Repo, list[str]] | None:
    """The commit that this machine keeps slices of, and its small files' names."""
    try:
        repo = Repo(name, _reference(name, revision).read_text())
    except (OSError, ValueError):
        return None
    return (repo, sorted(cut.small_files(repo.folder()))) if _is_begun(repo) else None


def _remember(repo: Repo, revision: str | None) -> None:
    """Note which commit a revision stands for, for when the hub is not there.

    Hosts may share the folder, and it may be read-only: then it is as it was.
    """
    with suppress(OSError):
        reference = _reference(repo.name, revision)
        if reference.exists() and reference.read_text() == repo.commit:
            return
        cut.write_text(reference, repo.commit)


def _reference(name: str, revision: str | None) -> Path:
    """The file that says which commit a revision stands for."""
    return Repo(name, "refs").folder() / quote(revision or "main", safe="")


@contextmanager
def named(name: str, folder: Path) -> Iterator[None]:
    """Let mistakes call a model as the user does, and not by its folder in a cache."""
    try:
        yield
    except ValueError as error:
        if Path(os.path.expanduser(name)) == folder:
            raise
        raise ValueError(str(error).replace(str(folder), name)) from error


def _from_root(comm: Communicator, make: Callable[[], T], root: int = 0) -> T:
    """Make something on `root` and give it to every rank, with one collective.

    Raises: UsageError on every rank for a ValueError or OSError.
    """
    value, message = None, ""
    if comm.rank == root:
        try:
            value = make()
        except (ValueError, OSError) as error:
            message = str(error) or repr(error)
    value, message = comm.bcast_object((value, message), root)
    if message:
        raise UsageError(message)
    assert value is not None
    return value
