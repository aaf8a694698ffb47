"""What all ranks do in one pass: decided by rank 0, the same on all of them. No MLX."""

from dataclasses import dataclass

from mlxtp.generation.settings import Settings


@dataclass(frozen=True)
class GenerationRequest:
    """A request as the ranks are told of it.

    Args:
        id: never used before.
        tokens: (L,), those of the prompt and those generated so far.
        prompt_length: how many of them are the prompt's.
        settings: how tokens are drawn.
        boundaries: lengths of the prompt at which a turn ends.
    """

    id: str
    tokens: tuple[int, ...]
    prompt_length: int
    settings: Settings
    boundaries: tuple[int, ...] = ()


@dataclass(frozen=True)
class Admission:
    """A request that begins: its first `cached` tokens are those of entry `key`."""

    request: GenerationRequest
    key: int | None = None
    cached: int = 0


@dataclass(frozen=True)
class Step:
    """What is done in one pass, in this order.

    Args:
        keep: put caches of requests into the prefix cache: (id, key).
        drop: forget requests, those that have ended too.
        admit: requests whose prompts are read from now on.
        forget: entries of the prefix cache that go: first of all, or, those that are
            taken in this step, behind it.
        join: requests whose prompts are read: they decode from now on.
        draft: rows that draft in this pass, and how many tokens at most: (id, number).
        read: tokens of prompts to be read in this pass: (id, number).
        writes: no pass is made: an entry of the prefix cache is written to disk.
        spares: no pass is made: a step is made to keep another host's slices.
        counts: gather what each rank has counted.
        is_idle: nothing is to be done until the next step, which may take days.
        is_end: the job ends.
    """

    keep: tuple[tuple[str, int], ...] = ()
    drop: tuple[str, ...] = ()
    admit: tuple[Admission, ...] = ()
    forget: tuple[int, ...] = ()
    join: tuple[str, ...] = ()
    draft: tuple[tuple[str, int], ...] = ()
    read: tuple[tuple[str, int], ...] = ()
    writes: bool = False
    spares: bool = False
    counts: bool = False
    is_idle: bool = False
    is_end: bool = False
