"""A repository on the hub: its small files, its headers, and ranges of its files.

Through huggingface-hub's client, with its endpoint, token, cache and offline settings.
"""

import re
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from huggingface_hub import (
    HfApi,
    cached_assets_path,
    constants,
    hf_hub_url,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    build_hf_headers,
    disable_progress_bars,
    enable_progress_bars,
    hf_raise_for_status,
    http_stream_backoff,
)

from mlxtp.checkpoint import cut
from mlxtp.checkpoint.cut import SMALL_FILES, Origin
from mlxtp.checkpoint.headers import (
    INDEX,
    WEIGHTS,
    Checkpoint,
    files_of,
    header_bytes,
    header_of,
    index_of,
    no_weights,
    parse_index,
    read_header,
    tensor_files,
    weight_files,
)
from mlxtp.checkpoint.progress import Advance, ignore
from mlxtp.checkpoint.tensors import StoredTensor
from mlxtp.partition.spans import Slice

# Most headers are shorter: they come with the first request.
BEGINNING_BYTES = 100_001
# Copies of tensors are compared in parts of this size.
COMPARE_BYTES = 8 * 1024 * 1024
CONNECTIONS = 8
# How often something is asked for that breaks off or comes wrong, and the first wait.
ATTEMPTS = 5
WAIT_SECONDS = 0.5
# huggingface-hub asks again itself, for 23 s: then nobody asks once more.
PATIENCE_SECONDS = 20.0
# What may be over when one asks again: too many requests, and faults of the server.
PASSING = (429, 500, 502, 503, 504)
HINTS = {
    401: "it does not exist or is private: check the name, or run hf auth login",
    403: "access to it has to be asked for on its page, with the token's account",
    404: "it, or this revision of it, does not exist",
}

OFFLINE = "the hub is not asked: HF_HUB_OFFLINE is set"
# The names of files that say how many of them there are.
NUMBERED = re.compile(r"(model.*-)\d+-of-(\d+)\.safetensors")

T = TypeVar("T")


@dataclass(frozen=True)
class Repo:
    """A repository on the hub, at one of its commits."""

    name: str
    commit: str

    def folder(self) -> Path:
        """Where this machine keeps slices of it."""
        return cached_assets_path("mlxtp", self.name, self.commit)


class HubError(ValueError):
    """The hub did not give what was asked for; `reason` says why."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(
            f"there is no folder {name}, and the hub did not give it: {reason}"
        )
        self.reason = reason

    @property
    def is_final(self) -> bool:
        """Whether the hub answered, and said that there is no such thing for us."""
        return self.reason in HINTS.values()


def snapshot(repo: Repo) -> Path | None:
    """Its folder in the hub's cache, with all of its files or with some."""
    config = _cached(repo, "config.json")
    return config and config.parent


def lacking(repo: Repo, small: Iterable[str]) -> list[str]:
    """Which of its files are not in the hub's cache; `small` are those but weights.

    Names such as model-00001-of-00003.safetensors say how many files of weights there
    are; without one of them an index does, if it names one that is there.
    """
    absent = [file for file in small if _cached(repo, file) is None]
    folder = snapshot(repo)
    if folder is None:
        return absent or ["config.json"]
    return [*absent, *sorted(_lacking_weights(folder))]


def _lacking_weights(folder: Path) -> set[str]:
    present = {file.name for file in files_of(folder) if file.is_file()}
    numbered = [match for file in present if (match := NUMBERED.fullmatch(file))]
    wanted = {
        f"{stem}{n:0{len(count)}}-of-{count}.safetensors"
        for stem, count in {match.groups() for match in numbered}
        for n in range(1, int(count) + 1)
    }
    if not numbered:
        promised = set(index_of(folder).files.values())
        wanted = promised if promised & present or not present else set()
    return wanted - present or (set() if present else {WEIGHTS})


def here(repo: Repo) -> Checkpoint:
    """Read which slices of it this machine has: those it keeps, and the hub's cache.

    Raises: ValueError, with the file, if one that it keeps is missing or broken.
    """
    kept = cut.open_cut(repo.folder())
    files = {file: path for file in kept.headers if (path := _sound(repo, file))}
    if not files:
        return kept
    tensors = dict(kept.tensors)
    for name, stored in cut.origin_of(repo.folder()).tensors.items():
        for piece in stored.pieces:
            if path := files.get(str(piece.file)):
                pieces = (*tensors[name].pieces, replace(piece, file=path))
                tensors[name] = replace(tensors[name], pieces=pieces)
    return replace(kept, tensors=tensors)


def _sound(repo: Repo, file: str) -> Path | None:
    """A file of weights in the hub's cache; None if it is not there, or cut short."""
    path = _cached(repo, file)
    try:
        if path is not None:
            read_header(path)
        return path
    except ValueError:
        return None


def _cached(repo: Repo, file: str) -> Path | None:
    path = try_to_load_from_cache(repo.name, file, revision=repo.commit)
    return Path(path) if isinstance(path, str) else None


def download(repo: Repo, weights: Iterable[str], *, show: bool = False) -> Path:
    """Fetch what is missing of the files `weights`, and what goes with them.

    With `show` huggingface-hub shows its progress bars.

    Returns: its folder there, with all weights.

    Raises: ValueError with what the hub said.
    """
    with nullcontext() if show else _silent():
        return _snapshot(repo.name, repo.commit, [*weights, *SMALL_FILES])


def small_files(
    name: str, revision: str | None = None
) -> tuple[Repo, dict[str, bytes]]:
    """Fetch what goes with the weights of a repository.

    Returns: the commit that `revision` stands for now (default: the newest), and the
        contents of the files by name.

    Raises: ValueError with what the hub said.
    """
    with _silent():
        folder = _snapshot(name, revision, SMALL_FILES)
    return Repo(name, folder.name), cut.small_files(folder)


def _snapshot(name: str, revision: str | None, patterns: list[str]) -> Path:
    return Path(
        _ask(
            name,
            lambda: snapshot_download(name, revision=revision, allow_patterns=patterns),
        )
    )


@contextmanager
def _silent() -> Iterator[None]:
    """Let huggingface-hub show no progress bars: a message stands alone."""
    shows_bars = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shows_bars:
            enable_progress_bars()


def origin(repo: Repo, small: dict[str, bytes]) -> Origin:
    """Read the headers of a repository's safetensors files.

    `small` are the contents of its small files, by name: an index may be among them.

    Raises: ValueError with what the hub said, or what is wrong with a header.
    """
    api = HfApi()
    there = _ask(
        repo.name,
        lambda: {
            file.path: file
            for file in api.list_repo_tree(repo.name, revision=repo.commit)
            if isinstance(file, RepoFile)
        },
    )
    index = parse_index(small.get(INDEX, b"")).files
    names = weight_files(there, index)
    if not names:
        raise ValueError(no_weights(f"{repo.name} on the hub", index))

    def beginning(file: str) -> bytes:
        """All of a file before its first tensor; less of what is no such file."""
        start = np.empty(min(there[file].size, BEGINNING_BYTES), np.uint8)
        fetch(repo, file, 0, start)
        length = min(header_bytes(start[:8].tobytes()), there[file].size)
        more = np.empty(max(0, length - start.size), np.uint8)
        fetch(repo, file, start.size, more)
        return start.tobytes()[:length] + more.tobytes()

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        beginnings = list(pool.map(beginning, names))
    headers = {}
    for file, content in zip(names, beginnings, strict=True):
        lfs = there[file].lfs
        sha256 = lfs.sha256 if lfs else None
        try:
            headers[file] = header_of(Path(file), content, there[file].size, sha256)
        except ValueError as error:
            raise ValueError(f"{repo.name}/{error}") from None

    def are_equal(one: StoredTensor, other: StoredTensor) -> bool:
        return _are_equal(repo, one, other)

    files, different = tensor_files(headers, index, are_equal, compare_all=True)
    return Origin(repo.name, repo.commit, headers, files, different)


def _are_equal(repo: Repo, one: StoredTensor, other: StoredTensor) -> bool:
    """Fetch two tensors of the same type and shape, and compare their bytes."""
    size = one.tensor.bytes_of(Slice(one.tensor.shape))

    def part_is_equal(start: int) -> bool:
        parts = np.empty((2, min(COMPARE_BYTES, size - start)), np.uint8)
        for part, (piece,) in zip(parts, (one.pieces, other.pieces), strict=True):
            fetch(repo, piece.file.name, piece.offset + start, part)
        return np.array_equal(parts[0], parts[1])

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        return all(pool.map(part_is_equal, range(0, size, COMPARE_BYTES)))


def fetch(
    repo: Repo,
    file: str,
    offset: int,
    target: np.ndarray,
    advance: Advance = ignore,
) -> None:
    """Fill `target`, (n,) uint8, with the bytes of a file from `offset` on.

    What breaks off goes on where it broke off. `advance` is told of bytes as they come.

    Raises: ValueError with what the hub said, or did.
    """
    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"{file} of {repo.name} is not in the cache, and {OFFLINE}")
    url = hf_hub_url(repo.name, file, revision=repo.commit)
    done, failures, reason = 0, 0, ""
    while done < target.size:
        if failures == ATTEMPTS:
            raise ValueError(f"{file} of {repo.name} could not be fetched: {reason}")
        if failures:
            time.sleep(WAIT_SECONDS * 2 ** (failures - 1))
        first, last = offset + done, offset + target.size - 1
        headers = {
            **build_hf_headers(),
            "Range": f"bytes={first}-{last}",
            "Accept-Encoding": "identity",
        }
        got = 0
        try:
            with http_stream_backoff(
                "GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
            ) as response:
                hf_raise_for_status(response)
                reason = _is_not_range(response, first, last)
                if not reason:
                    got, reason = _receive(response, target[done:], advance)
        except HfHubHTTPError as error:
            raise HubError(repo.name, _reason(error)) from error
        except Exception as error:  # all that a connection may break with
            reason = repr(error)
        done += got
        failures = 0 if got else failures + 1


def _is_not_range(response: Any, first: int, last: int) -> str:
    """What of a response is not the range that was asked for; nothing if it is."""
    if response.status_code != 206:
        return f"the hub does not give ranges of files (status {response.status_code})"
    given = response.headers.get("Content-Range", "")
    wanted = f"bytes {first}-{last}/"
    if given.startswith(wanted):
        return ""
    return f"asked for {wanted}, the hub gave {given}"


def _receive(response: Any, target: np.ndarray, advance: Advance) -> tuple[int, str]:
    """Put what comes into `target`: how many bytes came, and why there are no more."""
    got = 0
    try:  # not outside: huggingface-hub's retries cannot begin in the middle
        for chunk in response.iter_bytes():
            if got + len(chunk) > target.size:
                advance(-got)
                return 0, "the hub gave more bytes than were asked for"
            target[got : got + len(chunk)] = np.frombuffer(chunk, np.uint8)
            got += len(chunk)
            advance(len(chunk))
    except Exception as error:  # all that a connection may break with
        return got, repr(error)
    return got, "the connection ended early"


def _ask(name: str, ask: Callable[[], T]) -> T:
    """Ask the hub about the repository `name`, again where that may help.

    Raises: HubError with what the hub said; ValueError if the cache cannot be written.
    """
    begin = time.monotonic()
    for attempt in range(ATTEMPTS):
        try:
            return ask()
        except HfHubHTTPError as error:
            status = getattr(error.response, "status_code", None)
            if status not in PASSING or attempt == ATTEMPTS - 1:
                raise HubError(name, _reason(error)) from error
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno and error.filename:
                raise ValueError(
                    f"{name} cannot be kept in {error.filename}: {error.strerror}"
                ) from error
            raise HubError(name, _reason(error)) from error
        except Exception as error:  # all that a connection may break with
            is_last = time.monotonic() - begin > PATIENCE_SECONDS
            if is_last or attempt == ATTEMPTS - 1:
                raise HubError(name, _reason(error)) from error
        time.sleep(WAIT_SECONDS * 2**attempt)
    raise AssertionError("unreachable")


def _reason(error: Exception) -> str:
    """Say in one line why the hub did not give something."""
    if constants.HF_HUB_OFFLINE:
        return OFFLINE
    status = getattr(getattr(error, "response", None), "status_code", None)
    said = (str(error).strip() or repr(error)).splitlines()[0]
    return HINTS.get(status or 0) or said.removeprefix("Got: ")
