"""A draft model: where it is held, whether it fits, and loading it."""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlxtp import loading
from mlxtp.checkpoint.memory import gpu_limit_bytes
from mlxtp.cluster import memory
from mlxtp.comm.communicator import Communicator
from mlxtp.comm.errors import UsageError
from mlxtp.generation.choices import NGRAM
from mlxtp.generation.drafts import Drafts, ModelDrafts, NgramDrafts
from mlxtp.loading import Fetch, Prepared
from mlxtp.partition.shares import Share
from mlxtp.stories import DRAFT_NAME, DRAFT_PATH

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Whole on one rank, whole on all, or split over them. Of the first two "auto" takes the
# quicker.
Where = Literal["auto", "one", "all", "split"]

# To see which is quicker, so many tokens are drafted so many times.
MEASURED_TOKENS, MEASURED_ROUNDS = 8, 4


@dataclass(frozen=True)
class PreparedDraft:
    """What drafts, known and checked before a weight is read.

    Args:
        comm: the ranks of the model that is drafted for.
        places: where it may be held, "one", "all" or "split"; none without a model.
        root: the rank of "one".
        prepared: the draft model, on ranks that may hold it.
    """

    comm: Communicator
    places: tuple[Where, ...]
    root: int
    prepared: Prepared | None

    def load(self, *, progress: bool = False, **how: Any) -> Drafts:
        """Load the draft model where it is quickest.

        `how` is what `mlxtp.load` takes for a model that is split.

        Communicates: what loading does; for two places, a few drafts of each.
        Raises: UsageError on every rank if it cannot be loaded on one.
        """
        if not self.places:
            return NgramDrafts()
        if self.places == ("split",):
            assert self.prepared is not None
            model = self.prepared.load(progress=progress, **how)
            return ModelDrafts(model, self.comm)
        model = self._load_whole(progress)
        drafts = []
        if "one" in self.places:
            of_root = model if self.comm.rank == self.root else None
            drafts.append(ModelDrafts(of_root, self.comm, self.root))
        if all(self.comm.allgather_object(model is not None)):
            drafts.append(ModelDrafts(model, self.comm))
        return _quickest(drafts, self.comm)

    def _load_whole(self, progress: bool) -> nn.Module | None:
        """Load the whole model on ranks that have prepared it.

        A rank that cannot goes without where one is enough.
        """
        comm, whole = self.comm, self.prepared

        def load() -> nn.Module | None:
            if whole is not None:
                with suppress(*_may_fail(comm.rank, self.root, self.places)):
                    return whole.load(progress=progress and comm.rank == 0)
            return None

        return _in_turns(comm, load)


def prepare(
    name: str,
    where: Where,
    rank: int | None,
    target: Prepared,
    tokenizer: TokenizerWrapper,
    *,
    shares: Sequence[int | Share] | Literal["auto"] | None = None,
    fetch: Fetch = "all",
) -> PreparedDraft:
    """Find a draft for a model, and see whether it fits.

    Args:
        name: a folder or a name on the hub; "stories-draft", which ships; or "ngram".
        where: the ranks that hold it.
        rank: the one rank that holds it. None for any: for one it is rank 0, or, where
            that lacks the memory, a rank on the host with the most left.
        target: the model that is drafted for.
        tokenizer: its tokenizer.
        shares: of the ranks, as they are given for the target.
        fetch: who fetches from the hub. "root" does not fetch whole drafts for others,
            so that rank 0 has it, and no other, where nobody says which.

    Raises: UsageError on every rank: for a rank that does not exist, a draft that does
        not load, does not fit in memory, or does not know the model's tokens.
    Communicates: objects that tell the ranks what each has found.
    """
    comm, root = target.comm, rank or 0
    if name == NGRAM:
        return PreparedDraft(comm, (), root, None)
    if root >= comm.size:
        raise UsageError(
            f"--draft-rank {root}: wanted 0 to {comm.size - 1}, there are {comm.size}"
        )
    path = DRAFT_PATH if name == DRAFT_NAME else name
    if where == "split":
        draft = loading.prepare(path, comm, shares=shares, beside=target)
        draft_tokenizer = draft.load_tokenizer()
        with comm.agreement():
            check_vocabularies(target, tokenizer, draft, draft_tokenizer)
        return PreparedDraft(comm, ("split",), root, draft)
    places = _places(where, rank, comm, fetch)

    def prepare_whole() -> Prepared | None:
        if "all" in places or comm.rank == root:
            with suppress(*_may_fail(comm.rank, root, places)):
                draft = loading.prepare(path, Communicator())
                check_vocabularies(target, tokenizer, draft, draft.load_tokenizer())
                return draft
        return None

    whole = _in_turns(comm, prepare_whole)
    if "one" in places and not all(comm.allgather_object(whole is not None)):
        places = ("one",)

    def check_memory(is_here: bool) -> None:
        held = target.nbytes + (whole.nbytes if whole is not None and is_here else 0)
        names = f"{target.name} and the whole {name}"
        try:
            loading.check_memory(comm, held, names, target.turn_bytes)
        except UsageError as error:
            if shares != "auto":
                raise
            raise UsageError(
                f"{error}; --shares auto does not count the draft: give --shares in "
                "numbers, or --draft-model ngram"
            ) from error

    if "one" in places:
        try:
            check_memory(comm.rank == root)
        except UsageError:
            # With "root" others may not reach the hub.
            stays = rank is not None or fetch == "root"
            roomiest = root if stays else _roomiest(target)
            if roomiest == root:
                raise
            if comm.rank == 0:
                logger.warning(
                    f"{name} is on rank {roomiest}, which has the most memory left: "
                    f"rank {root} has too little for it"
                )
            return prepare(
                *(name, "one", roomiest, target, tokenizer), shares=shares, fetch=fetch
            )
    if "all" in places:
        try:
            check_memory(True)
        except UsageError:
            if "one" not in places:
                raise
            places = ("one",)
    is_here = "all" in places or comm.rank == root
    return PreparedDraft(comm, places, root, whole if is_here else None)


def _roomiest(target: Prepared) -> int:
    """The first rank on the host that has the most memory left beside the model.

    Communicates: an allgather of objects.
    """
    comm, available = target.comm, memory.available_bytes(gpu_limit_bytes())
    told = comm.allgather_object((comm.host, target.nbytes, available))
    left: dict[str, int] = {host: free for host, _, free in told}
    for host, held, _ in told:
        left[host] -= held
    of_ranks = [left[host] for host, *_ in told]
    return of_ranks.index(max(of_ranks))


def _places(
    where: Where, rank: int | None, comm: Communicator, fetch: Fetch
) -> tuple[Where, ...]:
    """Where a whole draft may be held, of what a person asks for."""
    if comm.size == 1:
        return ("all",)
    if where != "auto":
        return (where,)
    # On machines that differ each rank would have to wait for rank 0's drafts.
    is_one = rank is not None or comm.machines_differ or fetch == "root"
    return ("one",) if is_one else ("one", "all")


def _in_turns(comm: Communicator, make: Callable[[], T]) -> T:
    """Make something on every rank, on each host by one rank after the other.

    So the first fetches what the others find there.

    Communicates: an agreement for each turn.
    Raises: UsageError on every rank for a mistake on any.
    """
    hosts = comm.allgather_object(comm.host)
    turn = hosts[: comm.rank].count(comm.host)
    made = []
    for number in range(max(map(hosts.count, hosts))):
        with comm.unlimited(), comm.agreement():
            if number == turn:
                made.append(make())
    return made[0]


def _may_fail(
    rank: int, root: int, places: Sequence[Where]
) -> tuple[type[ValueError], ...]:
    """The errors with which a rank may go without the whole draft: one has it."""
    return (ValueError,) if "one" in places and rank != root else ()


def check_vocabularies(
    target: Prepared,
    tokenizer: TokenizerWrapper,
    draft: Prepared,
    draft_tokenizer: TokenizerWrapper,
) -> None:
    """Compare what tokens a model and its draft know.

    Raises: ValueError if the tokenizers differ in size, or if the draft lacks a token
        that the model has and its tokenizer knows.
    """
    known = 1 + max(tokenizer.get_vocab().values())
    needed = min(known, target.table.vocabulary_rows)
    rows = draft.table.vocabulary_rows
    if draft_tokenizer.vocab_size != tokenizer.vocab_size:
        raise ValueError(
            f"--draft-model knows {draft_tokenizer.vocab_size} tokens, the model "
            f"{tokenizer.vocab_size}: they do not fit together"
        )
    if rows < needed:
        raise ValueError(
            f"--draft-model {draft.name} has an embedding of {rows} rows, the "
            f"model's tokens are {needed}: they do not fit together"
        )


def _quickest(drafts: Sequence[ModelDrafts], comm: Communicator) -> ModelDrafts:
    """Draft a little with each, and take the quicker by rank 0's clock.

    Communicates: drafts, barriers, and one object.
    """
    if len(drafts) == 1:
        return drafts[0]
    seconds = [_seconds(each, comm) for each in drafts]
    told: list[float] = comm.bcast_object(seconds)
    return drafts[told.index(min(told))]


def _seconds(drafts: ModelDrafts, comm: Communicator) -> float:
    """What it takes until all ranks have a few drafted tokens."""
    drafter, tokens, times = drafts.begin(), [0], []
    for _ in range(MEASURED_ROUNDS):
        comm.barrier()
        begin = time.perf_counter()
        tokens += drafter.propose(tokens, MEASURED_TOKENS) or []
        comm.barrier()
        times.append(time.perf_counter() - begin)
    return min(times[1:])  # the first fills caches of all kinds
