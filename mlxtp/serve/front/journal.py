"""Requests under way, on disk: a client that asks again gets the answer that was begun.

A request is known by its Idempotency-Key. When the front dies, its requests end; the
same key, asked again at the next front, goes on with the seed and the tokens that were
there. A request has a file of its own, readable for its user alone, which is removed
when the answer is whole:

    {"request": digest of all that was asked, "seeds": [of each choice]}
    [choice, token, token, ...]
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from mlxtp.serve.front.errors import Refusal
from mlxtp.serve.front.ranks import Generation, Ranks
from mlxtp.serve.messages import Event, Start

# The header's value, of the request that is at work.
idempotency_key: ContextVar[str | None] = ContextVar("idempotency_key", default=None)

LONGEST_KEY = 255

# What nobody has asked for again is forgotten.
KEPT_SECONDS = 24 * 3600.0


@dataclass
class _Open:
    """A request that is under way: its file, and the choices that have not ended."""

    file: Path
    choices: dict[str, int]  # by the request's id


class Journal:
    """Writes down what the requests of `ranks` have got.

    Args:
        folder: for this user alone; it is made where there is none.
        ranks: whose requests are followed.

    Raises: OSError if there can be no such folder.
    """

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder = folder
        self._open: dict[str, _Open] = {}  # by the name of the file
        self._of: dict[str, _Open] = {}  # by a request's id
        for file in folder.glob("*.jsonl"):
            if time.time() - file.stat().st_mtime > KEPT_SECONDS:
                file.unlink(missing_ok=True)
        ranks.observers.append(self._observe)

    def begin(self, key: str, starts: Sequence[Start]) -> list[Start]:
        """Note requests, or find those that were begun under the same key.

        Returns: the requests as they are to be handed to the ranks.

        Raises: Refusal where the key belongs to another request, or to one that is
            under way.
        """
        if len(key) > LONGEST_KEY:
            raise Refusal(400, f"Idempotency-Key: at most {LONGEST_KEY} characters")
        name = hashlib.sha256(key.encode()).hexdigest()
        if name in self._open:
            raise Refusal(
                409,
                "the request with this Idempotency-Key is under way",
                code="idempotency_key_in_use",
                retry_seconds=1,
            )
        file, digest = self._folder / f"{name}.jsonl", _digest(starts)
        known = _read(file)
        if known is not None and known[0] != digest:
            raise Refusal(
                422,
                "this Idempotency-Key was used for another request",
                code="idempotency_key_reused",
            )
        if known is not None:
            starts = [
                _again(start, seed, tokens)
                for start, (seed, tokens) in zip(starts, known[1], strict=True)
            ]
        head = {"request": digest, "seeds": [s.settings.seed for s in starts]}
        lines = [head, *([i, *s.generated] for i, s in enumerate(starts))]
        new = file.with_suffix(".new")
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as writing:
            writing.writelines(f"{json.dumps(line)}\n" for line in lines)
        new.rename(file)
        entry = _Open(file, {start.id: i for i, start in enumerate(starts)})
        self._open[name] = entry
        self._of |= dict.fromkeys(entry.choices, entry)
        return list(starts)

    def _observe(self, generation: Generation, event: Event | None) -> None:
        entry = self._of.get(generation.start.id)
        if entry is None or event is None:
            return
        # What was told again stands there already.
        if event.tokens and not event.is_told_again:
            with entry.file.open("a") as writing:
                choice = entry.choices[event.id]
                writing.write(f"{json.dumps([choice, *event.tokens])}\n")
        if event.finish is None:
            return
        del self._of[event.id], entry.choices[event.id]
        if event.finish == "cancelled" or (
            event.finish == "error" and not event.is_mistake
        ):
            self._open.pop(entry.file.stem, None)  # it can be asked for again
        elif not entry.choices and entry.file.stem in self._open:
            del self._open[entry.file.stem]
            entry.file.unlink(missing_ok=True)


def default_folder() -> Path:
    """Return where journals are kept on this system."""
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Application Support"
    else:
        base = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state")
    return base / "mlxtp" / "journal"


def _digest(starts: Sequence[Start]) -> str:
    """Return what tells requests apart; ids and seeds are new each time."""
    asked = []
    for start in starts:
        content = asdict(start)
        del content["id"], content["settings"]["seed"]
        asked.append(content)
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def _again(start: Start, seed: int, tokens: list[int]) -> Start:
    """Return a request that goes on with what it had.

    Log-probabilities are not written down: such a request begins anew, with its seed.
    """
    settings = replace(start.settings, seed=seed)
    if settings.logprobs is not None or settings.prompt_logprobs is not None:
        tokens = []
    return replace(
        start, settings=settings, generated=tokens, tells_generated=bool(tokens)
    )


def _read(file: Path) -> tuple[str, list[tuple[int, list[int]]]] | None:
    """Read a file: the digest, and each choice's seed and tokens; None for no file."""
    try:
        lines = file.read_text().splitlines()
        head = json.loads(lines[0])
        choices: list[tuple[int, list[int]]] = [(seed, []) for seed in head["seeds"]]
        for line in lines[1:]:
            try:
                choice, *tokens = json.loads(line)
            except ValueError:  # the front died while it wrote
                break
            choices[choice][1].extend(tokens)
        return head["request"], choices
    except (OSError, ValueError, LookupError):
        return None
