"""Requests under way, on disk: a client that asks again gets the answer that was begun.

A request is known by its Idempotency-Key. When the front dies, its requests end; the
same key, asked again at the next front, goes on with the seed and the tokens that were
there. A request has a file of its own, readable for its user alone, which is removed
when the answer is whole:

    {"request": digest of all that was asked, "seeds": [of each choice]}
    [choice, token, token, ...]
    [choice, finish]

What stands there is the beginning of what was told: where a line cannot be written (the
disk is full), none follows it. The next front goes on from there, with the same tokens.
"""

import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mlxtp.serve.front.errors import Refusal
from mlxtp.serve.front.ranks import Generation, Ranks
from mlxtp.serve.messages import Event, Start

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asked:
    """A request that has an Idempotency-Key, and a digest of who asks for what."""

    key: str
    digest: str

    @classmethod
    def of(cls, key: str | None, *parts: bytes) -> "Asked | None":
        """Make one of all parts of a request that count; None without a key."""
        if key is None:
            return None
        digest = hashlib.sha256()
        for part in parts:
            digest.update(len(part).to_bytes(8, "little") + part)
        return cls(key, digest.hexdigest())


# Of the request that is at work.
asked_now: ContextVar[Asked | None] = ContextVar("asked_now", default=None)

LONGEST_KEY = 255

# What nobody has asked for again is forgotten.
KEPT_SECONDS = 24 * 3600.0
# And so are all but the newest files, which are looked at once in so many seconds.
MOST_KEPT = 1000
LOOK_SECONDS = 60.0

# How answers end that can be asked for again.
UNFINISHED = ("cancelled", "error")


@dataclass
class _Open:
    """A request that is under way: its file, and the choices that have not ended."""

    file: Path
    choices: dict[str, int]  # by the request's id
    is_broken_off: bool = False
    is_kept: bool = True  # all that was told stands in the file


@dataclass
class _Choice:
    """What is known of a choice."""

    seed: int
    tokens: list[int] = field(default_factory=list)
    finish: str | None = None


class Journal:
    """Writes down what the requests of `ranks` have got.

    Args:
        folder: for this user alone; it is made where there is none.
        ranks: whose requests are followed.
        model: what tells the model from others whose requests may be in the folder.

    Raises: OSError if there can be no such folder.
    """

    def __init__(self, folder: Path, ranks: Ranks, model: str = "") -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder, self._model = folder, model
        self._open: dict[str, _Open] = {}  # by the name of the file
        self._of: dict[str, _Open] = {}  # by a request's id
        self._looked: float | None = None  # for old files
        self._forget_old()
        ranks.observers.append(self._observe)

    def begin(self, asked: Asked, starts: Sequence[Start]) -> list[Start]:
        """Note requests, or find those that were begun under the same key.

        Returns: the requests as they are to be handed to the ranks.

        Raises: Refusal where the key belongs to another request, or to one that is
            under way.
        """
        if len(asked.key) > LONGEST_KEY:
            raise Refusal(400, f"Idempotency-Key: at most {LONGEST_KEY} characters")
        self._forget_old()
        name = hashlib.sha256(f"{self._model}\0{asked.key}".encode()).hexdigest()
        if name in self._open:
            raise Refusal(
                409,
                "the request with this Idempotency-Key is under way",
                code="idempotency_key_in_use",
                retry_seconds=1,
            )
        file = self._folder / f"{name}.jsonl"
        known = _read(file)
        if known is not None and known[0] != asked.digest:
            raise Refusal(
                422,
                "this Idempotency-Key was used for another request",
                code="idempotency_key_reused",
            )
        if known is not None and len(known[1]) == len(starts):
            starts = [_again(s, c) for s, c in zip(starts, known[1], strict=True)]
        entry = _Open(file, {start.id: i for i, start in enumerate(starts)})
        try:
            self._write(file, asked, starts)
        except OSError as error:  # what stood in the file is right, and stays
            entry.is_kept = False
            log.warning("the journal does not keep a request: %s", error)
        self._open[name] = entry
        self._of |= dict.fromkeys(entry.choices, entry)
        return list(starts)

    def _write(self, file: Path, asked: Asked, starts: Sequence[Start]) -> None:
        head = {"request": asked.digest, "seeds": [s.settings.seed for s in starts]}
        lines: list[Any] = [head, *([i, *s.generated] for i, s in enumerate(starts))]
        lines += [[i, s.finished] for i, s in enumerate(starts) if s.finished]
        new = file.with_suffix(".new")
        new.unlink(missing_ok=True)
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as writing:
            writing.writelines(f"{json.dumps(line)}\n" for line in lines)
        new.rename(file)

    def _observe(self, generation: Generation, event: Event | None) -> None:
        entry = self._of.get(generation.start.id)
        if entry is None or event is None:
            return
        choice = entry.choices[event.id]
        is_whole = event.finish is not None and (
            event.finish not in UNFINISHED or event.is_mistake
        )
        # What was told again stands there already.
        if not event.is_told_again:
            lines: list[list[Any]] = [[choice, *event.tokens]] if event.tokens else []
            self._append(entry, [*lines, [choice, event.finish]] if is_whole else lines)
        if event.finish is None:
            return
        entry.is_broken_off = entry.is_broken_off or not is_whole
        del self._of[event.id], entry.choices[event.id]
        if not entry.choices:
            del self._open[entry.file.stem]
            if not entry.is_broken_off:
                with suppress(OSError):
                    entry.file.unlink()

    def _append(self, entry: _Open, lines: Sequence[list[Any]]) -> None:
        if not lines or not entry.is_kept:
            return
        try:
            descriptor = os.open(entry.file, os.O_WRONLY | os.O_APPEND)
            with os.fdopen(descriptor, "a") as writing:
                writing.writelines(f"{json.dumps(line)}\n" for line in lines)
        except OSError as error:
            entry.is_kept = False
            log.warning("the journal keeps a request no further: %s", error)

    def _forget_old(self) -> None:
        """Remove files that are old, or too many, if it is time to look again."""
        now = time.monotonic()
        if self._looked is not None and now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        changed: list[tuple[float, Path]] = []
        for file in (*self._folder.glob("*.jsonl"), *self._folder.glob("*.new")):
            if file.stem not in self._open:
                with suppress(OSError):
                    changed.append((file.stat().st_mtime, file))
        changed.sort(reverse=True)
        for place, (when, file) in enumerate(changed):
            if place >= MOST_KEPT or time.time() - when > KEPT_SECONDS:
                with suppress(OSError):
                    file.unlink()


def default_folder() -> Path:
    """Return where journals are kept on this system."""
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Application Support"
    else:
        base = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state")
    return base / "mlxtp" / "journal"


def _again(start: Start, choice: _Choice) -> Start:
    """Return a request that goes on with what it had.

    Log-probabilities are not written down: such a request begins anew, with its seed.
    """
    settings = replace(start.settings, seed=choice.seed)
    if settings.logprobs is not None or settings.prompt_logprobs is not None:
        return replace(start, settings=settings)
    return replace(
        start,
        settings=settings,
        generated=choice.tokens,
        tells_generated=bool(choice.tokens),
        finished=choice.finish if choice.tokens else None,
    )


def _read(file: Path) -> tuple[str, list[_Choice]] | None:
    """Read a file: the digest, and what is known of each choice; None for no file."""
    try:
        lines = file.read_text().splitlines()
        head = json.loads(lines[0])
        choices = [_Choice(seed) for seed in head["seeds"]]
        for line in lines[1:]:
            try:
                number, *told = json.loads(line)
            except ValueError:  # the front died while it wrote
                break
            if told and isinstance(told[0], str):
                choices[number].finish = told[0]
            else:
                choices[number].tokens += told
        return head["request"], choices
    except (OSError, ValueError, LookupError, TypeError):
        return None
