"""A repository on the hub: its small files, its headers, and ranges of its files.

Through huggingface-hub's client, with its endpoint, token, cache and offline settings.
"""

import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from huggingface_hub import (
    HfApi,
    cached_assets_path,
    constants,
    hf_hub_url,
    snapshot_download,
)
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import (
    build_hf_headers,
    hf_raise_for_status,
    http_stream_backoff,
)

from mlxtp.checkpoint import cut
from mlxtp.checkpoint.cut import SMALL_FILES, Origin
from mlxtp.checkpoint.headers import (
    INDEX,
    WEIGHTS,
    files_of,
    header_bytes,
    header_of,
    no_weights,
    parse_index,
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
# What may be over when one asks again: too many requests, and faults of the server.
PASSING = (429, 500, 502, 503, 504)
HINTS = {
    401: "it does not exist or is private: check the name, or run hf auth login",
    403: "access to it has to be asked for on its page, with the token's account",
    404: "it, or this revision of it, does not exist",
}

T = TypeVar("T")


@dataclass(frozen=True)
class Repo:
    """A repository on the hub, at one of its commits."""

    name: str
    commit: str

    def folder(self) -> Path:
        """Where this machine keeps slices of it."""
        return cached_assets_path("mlxtp", self.name, self.commit)


def whole(repo: Repo) -> Path | None:
    """Its folder in the hub's cache, if it is there with all weights."""
    try:
        folder = Path(
            snapshot_download(
                repo.name,
                revision=repo.commit,
                allow_patterns=[WEIGHTS, *SMALL_FILES],
                local_files_only=True,
            )
        )
    except (OSError, ValueError):
        return None
    return folder if files_of(folder) else None


def download(repo: Repo, weights: Iterable[str]) -> Path:
    """Fetch what is missing of the files `weights`, and what goes with them.

    Returns: its folder there, with all weights.

    Raises: ValueError with what the hub said.
    """
    return _snapshot(repo.name, repo.commit, [*weights, *SMALL_FILES])


def small_files(
    name: str, revision: str | None = None
) -> tuple[Repo, dict[str, bytes]]:
    """Fetch what goes with the weights of a repository.

    Returns: the commit that `revision` stands for now (default: the newest), and the
        contents of the files by name.

    Raises: ValueError with what the hub said.
    """
    folder = _snapshot(name, revision, SMALL_FILES)
    return Repo(name, folder.name), cut.small_files(folder)


def _snapshot(name: str, revision: str | None, patterns: list[str]) -> Path:
    return Path(
        _ask(
            name,
            lambda: snapshot_download(name, revision=revision, allow_patterns=patterns),
        )
    )


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
        headers[file] = header_of(
            Path(file), content, there[file].size, lfs.sha256 if lfs else None
        )

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
            raise ValueError(_message(repo.name, error)) from error
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

    Raises: ValueError with what the hub said.
    """
    for attempt in range(ATTEMPTS):
        try:
            return ask()
        except HfHubHTTPError as error:
            status = getattr(error.response, "status_code", None)
            if status not in PASSING or attempt == ATTEMPTS - 1:
                raise ValueError(_message(name, error)) from error
        except (OSError, ValueError) as error:
            raise ValueError(_message(name, error)) from error
        except Exception as error:  # all that a connection may break with
            if attempt == ATTEMPTS - 1:
                raise ValueError(_message(name, error)) from error
        time.sleep(WAIT_SECONDS * 2**attempt)
    raise AssertionError("unreachable")


def _message(name: str, error: Exception) -> str:
    """One line: what was asked for, and what the hub said."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    reason = (
        HINTS.get(status or 0) or (str(error).strip() or repr(error)).splitlines()[0]
    )
    return f"there is no folder {name}, and the hub did not give it: {reason}"
