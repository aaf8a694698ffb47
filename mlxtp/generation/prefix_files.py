"""Entries of the prefix cache on a host's disk: a file for each, of one rank."""

import base64
import json
import logging
import os
import re
import time
from array import array
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache

logger = logging.getLogger(__name__)

SUFFIX = ".safetensors"
# A file that is being written: its name begins so.
UNFINISHED = "."
# A folder of caches that no model has asked for since is removed.
UNUSED_SECONDS = 30 * 24 * 3600.0


def identity(
    model: nn.Module, rank: int, config: Mapping[str, Any], options: Mapping[str, Any]
) -> str:
    """Name all that decides what is in caches: other caches have another name.

    That is how the model is split, its config, what the rank's weights sum up to (an
    adapter's too), mlx-lm's version, and `options` of the caches.
    """
    sums = [
        (name, str(x.dtype), x.shape, _sum(x))
        for name, x in tree_flatten(model.parameters())
    ]
    parts = {
        "config": config,
        "slices": str(model.slice_table),
        "rank": rank,
        "weights": sums,
        "mlx-lm": version("mlx-lm"),
        "mlxtp": version("mlxtp"),
        "options": options,
    }
    text = json.dumps(parts, sort_keys=True, default=str)
    return blake2b(text.encode(), digest_size=16).hexdigest()


def _sum(x: mx.array) -> int:
    """Add up an array as if it were whole numbers, modulo 2^32."""
    size = next(n for n in (4, 2, 1) if x.nbytes % n == 0)
    words = {4: mx.uint32, 2: mx.uint16, 1: mx.uint8}[size]
    total: Any = mx.sum(mx.contiguous(x).reshape(-1).view(words)).item()
    return int(total)


def name_of(tokens: Sequence[int]) -> str:
    """Name an entry after its tokens: the same on all ranks."""
    return blake2b(array("I", tokens).tobytes(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Stored:
    """An entry in a file: its name, its tokens, and whether it can be taken back."""

    name: str
    tokens: "array[int]"
    is_trimmable: bool


class PrefixFiles:
    """One rank's files: `folder`/`identity`/, which only the user can read.

    A file is complete or not there: it is written under another name, and renamed.
    Nothing is written any more once the disk is full. A folder's time says when it was
    last used.

    Raises: OSError if the folder cannot be made, or is another user's.
    """

    def __init__(self, folder: Path, identity: str) -> None:
        self._folder = folder / identity
        self._folder.mkdir(parents=True, exist_ok=True)
        self._folder.chmod(0o700)
        os.utime(self._folder)
        self._is_full = False
        for file in self._folder.glob(f"{UNFINISHED}*{SUFFIX}"):
            file.unlink(missing_ok=True)

    def remove_unused(self) -> None:
        """Remove the folders of other identities that were not used for a month.

        All ranks of this host must have theirs before.
        """
        for folder in self._folder.parent.glob("[0-9a-f]*"):
            is_ours = re.fullmatch("[0-9a-f]{32}", folder.name)
            with suppress(OSError):  # another rank may be removing it
                unused = time.time() - folder.stat().st_mtime
                if is_ours and unused > UNUSED_SECONDS:
                    for file in folder.glob(f"*{SUFFIX}"):
                        file.unlink(missing_ok=True)
                    folder.rmdir()

    def names(self) -> list[str]:
        """The entries that are there, those that were written first at the front."""
        files = [
            file
            for file in self._folder.glob(f"*{SUFFIX}")
            if not file.name.startswith(UNFINISHED) and file.is_file()
        ]
        files.sort(key=lambda file: file.stat().st_mtime_ns)
        return [file.stem for file in files]

    def write(
        self, tokens: Sequence[int], is_trimmable: bool, caches: list[Any]
    ) -> None:
        """Write an entry, by mlx-lm's `save_prompt_cache`."""
        name = name_of(tokens)
        file = self._file(name)
        with suppress(OSError):  # the folder is used, though it may keep nothing new
            os.utime(self._folder)
        if self._is_full or file.exists():
            return
        part = file.with_name(f"{UNFINISHED}{file.name}")
        metadata = {
            "tokens": base64.b64encode(array("I", tokens).tobytes()).decode(),
            "is_trimmable": str(int(is_trimmable)),
        }
        try:
            save_prompt_cache(str(part), caches, metadata)
            with part.open("rb") as written:
                os.fsync(written.fileno())
            part.rename(file)
        except Exception as error:  # MLX and mlx-lm name no errors for it
            part.unlink(missing_ok=True)
            self._is_full = True
            logger.warning(
                f"{self._folder}: the prefix cache is not kept here any more: {error}"
            )

    def tokens(self, name: str) -> Stored | None:
        """Read what an entry is of; None if the file is broken."""
        try:
            loaded: Any = mx.load(str(self._file(name)), return_metadata=True)
            _, metadata = loaded
            # The first of the metadata that mlx-lm writes is what it was given.
            tokens = array("I", base64.b64decode(metadata["0.tokens"]))
            if name_of(tokens) != name:
                raise ValueError("it has another name than its tokens")
            return Stored(name, tokens, metadata["0.is_trimmable"] == "1")
        except Exception as error:  # whatever a broken file may raise
            self._skip(name, error)
            return None

    def read(self, name: str) -> list[Any] | None:
        """Read the caches of an entry; None if the file is broken."""
        try:
            caches: list[Any] = load_prompt_cache(str(self._file(name)))
            mx.eval([cache.state for cache in caches])
            return caches
        except Exception as error:  # whatever a broken file may raise
            self._skip(name, error)
            return None

    def remove(self, name: str) -> None:
        """Remove an entry, if it is there and the disk can be written to."""
        try:
            self._file(name).unlink(missing_ok=True)
        except OSError as error:
            logger.warning(f"{self._file(name)} cannot be removed: {error.strerror}")

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}{SUFFIX}"

    def _skip(self, name: str, error: Exception) -> None:
        logger.warning(f"{self._file(name)} is no entry of a prefix cache: {error}")
