"""`load`: from a checkpoint to a model of which each rank holds its slices."""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack, overload

import mlx.nn as nn

from mlxtp.checkpoint.cut import CHOSEN, Shard
from mlxtp.checkpoint.headers import Checkpoint
from mlxtp.checkpoint.memory import gpu_limit_bytes
from mlxtp.checkpoint.progress import Advance, ignore, progress_bar
from mlxtp.checkpoint.tensors import Tensor
from mlxtp.cluster import memory
from mlxtp.comm.communicator import Communicator
from mlxtp.comm.errors import MemoryLackingError
from mlxtp.fetch.fetch import check_there, fill, filling
from mlxtp.fetch.location import Location, locate, named
from mlxtp.fetch.spare import STEP_BYTES, bytes_besides, kept_besides
from mlxtp.model.reading import compute_slices, read_slices
from mlxtp.model.skeleton import (
    EmptyModel,
    build,
    check_quantized_activations,
    check_values,
)
from mlxtp.model.sources import needed
from mlxtp.model.tokenizer import load_tokenizer
from mlxtp.model.turns import (
    bytes_of_turn,
    compute_alike,
    computed,
    tensors_behind,
)
from mlxtp.partition.shares import Share, Shares
from mlxtp.partition.spans import Slice
from mlxtp.sharding.decide import slice_table
from mlxtp.sharding.table import SliceTable

# mlx-lm imports transformers, which takes seconds: it comes when a model is loaded.
if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

logger = logging.getLogger(__name__)

# Who fetches from the hub.
Fetch = Literal["all", "root"]


class _Options(TypedDict, total=False):
    """What both forms of `load` take besides."""

    shares: Sequence[int | Share] | Literal["auto"] | None
    context: int | None
    adapter_path: str | Path | None
    tokenizer_config: dict[str, Any] | None
    model_config: dict[str, Any] | None
    revision: str | None
    trust_remote_code: bool
    fetch: Fetch
    spare: bool
    agree_experts: bool
    progress: bool


@overload
def load(
    path_or_hf_repo: str | Path,
    comm: Communicator,
    *,
    return_config: Literal[False] = False,
    **options: Unpack[_Options],
) -> "tuple[nn.Module, TokenizerWrapper]": ...
@overload
def load(
    path_or_hf_repo: str | Path,
    comm: Communicator,
    *,
    return_config: Literal[True],
    **options: Unpack[_Options],
) -> "tuple[nn.Module, TokenizerWrapper, dict[str, Any]]": ...
def load(
    path_or_hf_repo: str | Path,
    comm: Communicator,
    *,
    shares: Sequence[int | Share] | Literal["auto"] | None = None,
    context: int | None = None,
    adapter_path: str | Path | None = None,
    tokenizer_config: dict[str, Any] | None = None,
    model_config: dict[str, Any] | None = None,
    return_config: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    fetch: Fetch = "all",
    spare: bool = False,
    agree_experts: bool = False,
    progress: bool = False,
) -> Any:
    """Load a model and its tokenizer, split over the ranks of `comm`.

    Every rank calls it alike. It reads and keeps its own slices of the weights.
    The model is mlx-lm's and is called as such: `model(tokens, cache=cache)` with
    tokens (B, L) gives logits (B, L, V), the same bytes on every rank.

    Args:
        path_or_hf_repo: a folder, whole or cut by `mlxtp.shard`, or a name on the
            hub, of which each rank fetches its slices and keeps them.
        comm: the ranks to split it over.
        shares: one positive number a rank, in whose proportion the ranks get
            work and memory, or a `Share` for each; "auto" is what fits and is fastest,
            chosen once and kept with the slices. Default: equal.
        context: tokens that caches are to have room for where shares are "auto".
            Default: 8192.
        adapter_path: a folder with LoRA adapters or full weights of mlx-lm's
            tuner.
        tokenizer_config: more arguments for the tokenizer.
        model_config: what replaces entries of the model's config.json.
        return_config: return the model's config as well.
        revision: a branch, a tag or a commit, for a name on the hub.
        trust_remote_code: run Python code that the checkpoint carries.
        fetch: "all" ranks fetch from the hub, or "root" for all: rank 0.
        spare: keep on each host's disk the slices of the host before it as well: then
            no host that is lost takes with it what the others have to read.
        agree_experts: all ranks take rank 0's choice of experts, which costs a
            collective in each layer that has them. For machines that differ
            (`comm.machines_differ`).
        progress: show progress bars on rank 0.

    Returns: the model and the tokenizer; with `return_config` the config, too.

    Raises: UsageError (a ValueError) on every rank, with one message, if what was
        given does not make a model or its slices do not fit in memory, before a
        weight is fetched or read.
    """
    prepared = prepare(
        path_or_hf_repo,
        comm,
        shares=shares,
        context=context,
        adapter_path=adapter_path,
        model_config=model_config,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    tokenizer = prepared.load_tokenizer(tokenizer_config)
    model = prepared.load(
        fetch=fetch, spare=spare, agree_experts=agree_experts, progress=progress
    )
    return (model, tokenizer, prepared.config) if return_config else (model, tokenizer)


def load_model(
    path_or_hf_repo: str | Path,
    comm: Communicator,
    *,
    shares: Sequence[int | Share] | Literal["auto"] | None = None,
    context: int | None = None,
    adapter_path: str | Path | None = None,
    model_config: dict[str, Any] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    fetch: Fetch = "all",
    spare: bool = False,
    agree_experts: bool = False,
    progress: bool = False,
) -> tuple[nn.Module, dict[str, Any]]:
    """Load a model without its tokenizer.

    Arguments and errors are those of `load`.

    Returns: the model, split, and its config.
    """
    prepared = prepare(
        path_or_hf_repo,
        comm,
        shares=shares,
        context=context,
        adapter_path=adapter_path,
        model_config=model_config,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    return prepared.load(
        fetch=fetch, spare=spare, agree_experts=agree_experts, progress=progress
    ), prepared.config


@dataclass(frozen=True)
class Prepared:
    """A model that is known and checked, before a weight is fetched or read.

    `empty` is mlx-lm's whole model without weights, `slices` are this rank's slices of
    its parameters, and `tensors` those of tensors from which they are made: known for a
    cut checkpoint only, and empty for others. `rebuild` makes another `empty`.
    """

    comm: Communicator
    location: Location
    empty: EmptyModel
    table: SliceTable
    shard: Shard
    slices: dict[str, Slice]
    tensors: dict[Tensor, Slice]
    trust_remote_code: bool
    rebuild: Callable[[], EmptyModel]

    @property
    def config(self) -> dict[str, Any]:
        """The model's config."""
        return self.empty.config

    @property
    def name(self) -> str:
        """What messages call the model."""
        return self.location.name

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's slices."""
        return self.empty.bytes_of(self.slices)

    @property
    def turn_bytes(self) -> int:
        """Bytes that the largest turn takes, besides, on any rank; 0 without turns."""
        sources = computed(self.empty.sources)
        if not sources:
            return 0
        of_ranks = [self.table.slices(rank) for rank in range(self.comm.size)]
        return max(
            bytes_of_turn(source, [slices[name] for slices in of_ranks])
            for name, source in sources.items()
        )

    def load_tokenizer(
        self, tokenizer_config: dict[str, Any] | None = None
    ) -> "TokenizerWrapper":
        """Load the model's tokenizer, with more arguments for it.

        Raises: UsageError if it does not load.
        """
        location = self.location
        with (
            self.comm.unlimited(),
            self.comm.agreement(),
            named(location.name, location.folder),
        ):
            return load_tokenizer(
                *(location.folder, location.name, tokenizer_config),
                *(self.config, self.trust_remote_code),
            )

    def load(
        self,
        *,
        fetch: Fetch = "all",
        spare: bool = False,
        agree_experts: bool = False,
        progress: bool = False,
        advance: Advance = ignore,
    ) -> nn.Module:
        """Fetch and read this rank's slices, and return the split model.

        Once only: afterwards `empty` holds the slices. Arguments are those of `load`;
        `advance` is told of bytes of `nbytes` as they are read.
        """
        with self.comm.unlimited():
            checkpoint = self._fetch(fetch, spare=spare, show=progress)
            model = self._read(checkpoint, agree_experts, advance, show=progress)
            if spare:
                deque(self.keeping_spare(), maxlen=0)
            return model

    def keeping_spare(self) -> Iterator[None]:
        """Get the slices of another host's ranks and keep them beside this rank's own.

        It is done in steps, one for each `next`, on all ranks alike, and needs no
        memory but a few times STEP_BYTES. The slices lie as their own rank keeps them,
        and count once they are there as a whole.

        Raises: UsageError on every rank if a disk is too small, or the hub is needed
            and does not give something.
        """
        of_ranks = kept_besides(self.comm.allgather_object(self.comm.host))
        mine = of_ranks[self.comm.rank]
        for turn in range(max(map(len, of_ranks))):
            shard, wanted = self.shard, dict[str, Slice]()
            if turn < len(mine):
                shard = Shard(shard.shares, mine[turn])
                wanted = self._wanted(mine[turn])
            yield from filling(
                *(self.comm, self.location, shard, wanted), round_bytes=STEP_BYTES
            )

    def _wanted(self, rank: int) -> dict[str, Slice]:
        """The slices of the checkpoint's tensors that a rank reads, by name."""
        tensors = self.tensors
        if rank != self.comm.rank and tensors:
            slices = self.table.slices(rank)
            tensors = needed(self.empty.sources, slices, rank, self.comm.size)
        there = self.location.checkpoint.tensors
        return {t.name: part for t, part in tensors.items() if t.name in there}

    def _fetch(self, fetch: Fetch, *, spare: bool, show: bool) -> Checkpoint:
        """Get what this machine lacks; return where all lies that the rank reads."""
        comm, location = self.comm, self.location
        wanted = self._wanted(comm.rank)
        later = 0
        if spare:
            of_ranks = kept_besides(comm.allgather_object(comm.host))
            others = [self._wanted(rank) for rank in of_ranks[comm.rank]]
            later = bytes_besides(location.checkpoint.tensors, wanted, others)
        fill(
            *(comm, location, self.shard, wanted),
            only_root=fetch == "root",
            show=show,
            later_bytes=later,
        )
        with comm.agreement(), named(location.name, location.folder):
            if not location.is_cut:
                return self.empty.checkpoint
            return self.empty.checkpoint.updated(location.reopened().checkpoint)

    def _read(
        self,
        checkpoint: Checkpoint,
        agree_experts: bool,
        advance: Advance,
        *,
        show: bool,
    ) -> nn.Module:
        """Read this rank's slices and make the model compute with them."""
        from mlxtp.layers.parallelize import parallelize

        empty, comm = self.empty, self.comm
        show = show and comm.rank == 0
        with progress_bar("Loading", self.nbytes, show=show) as bar:

            def read(size: int) -> None:
                bar.update(size)
                advance(size)

            with comm.agreement():
                read_slices(empty, checkpoint, self.slices, read)
                check_values(empty.model)
            compute_slices(empty, checkpoint, self.slices, comm, read)
        parallelize(empty.model, self.table, comm, agree_experts=agree_experts)
        return empty.model


def prepare(
    path_or_hf_repo: str | Path,
    comm: Communicator,
    *,
    shares: Sequence[int | Share] | Literal["auto"] | None = None,
    context: int | Literal["max"] | None = None,
    adapter_path: str | Path | None = None,
    model_config: dict[str, Any] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    beside: Prepared | None = None,
) -> Prepared:
    """Build the model, decide what is whose, and see whether it is there and fits.

    Arguments are those of `load`; a context of "max" is the model's own. `beside` is
    another model that has to fit in memory at the same time.

    Raises: UsageError as `load` does; no weight has been fetched or read.
    """
    with comm.unlimited():
        location = locate(path_or_hf_repo, comm, revision)
        rebuild = partial(
            build,
            location.folder,
            Path(adapter_path) if adapter_path is not None else None,
            checkpoint=location.checkpoint,
            name=location.name,
            model_config=model_config,
            trust_remote_code=trust_remote_code,
        )
        prepared = partial(
            _prepared,
            comm,
            location,
            rebuild,
            trust_remote_code=trust_remote_code,
            beside=beside,
        )
        if shares != "auto":
            return prepared(shares)
        if comm.size == 1:
            return prepared([1])
        from mlxtp.dryrun import chosen

        with named(location.name, location.folder):
            kept = chosen.kept_shares(comm, location)
        if kept is not None:
            try:
                result = prepared(kept)
            except MemoryLackingError as error:
                if location.repo is None:  # other shares are not there
                    raise
                if comm.rank == 0:
                    logger.warning(
                        f"--shares auto: {error}: others for this start than those in "
                        f"{CHOSEN} (remove it on all hosts to have them chosen anew)"
                    )
            else:
                chosen.keep(comm, location, kept)
                return result
        with named(location.name, location.folder):
            suited = chosen.suited_shares(comm, location, rebuild, context)
        result = prepared(suited)
        if kept is None:
            chosen.keep(comm, location, suited)
        return result


def _prepared(
    comm: Communicator,
    location: Location,
    rebuild: Callable[[], EmptyModel],
    shares: Sequence[int | Share] | None,
    *,
    trust_remote_code: bool,
    beside: Prepared | None,
) -> Prepared:
    """Do what `prepare` does, for shares that are known.

    Raises: UsageError as `load` does; MemoryLackingError if it does not fit.
    """
    with comm.agreement(), named(location.name, location.folder):
        rank_shares = _checked_shares(shares, comm)
        empty = rebuild()
        check_quantized_activations(empty.model)
        table = slice_table(empty.model, rank_shares)
        slices = table.slices(comm.rank)
        empty.settle(slices)
    of_ranks = comm.allgather_object(tensors_behind(empty.sources))
    with comm.agreement():
        compute_alike(empty.sources, of_ranks)
        tensors = (
            needed(empty.sources, slices, comm.rank, comm.size)
            if location.is_cut
            else {}
        )
    if table.remark and comm.rank == 0:
        logger.warning(table.remark)
    shard = Shard(rank_shares, comm.rank)
    prepared = Prepared(
        *(comm, location, empty, table, shard, slices, tensors),
        *(trust_remote_code, rebuild),
    )
    if location.repo is None:
        check_there(comm, location, prepared._wanted(comm.rank))
    both = [prepared] if beside is None else [beside, prepared]
    names = " and ".join(model.name for model in both)
    held = sum(model.nbytes for model in both)
    check_memory(comm, held, names, max(model.turn_bytes for model in both))
    return prepared


def _checked_shares(shares: Sequence[int | Share] | None, comm: Communicator) -> Shares:
    checked = Shares([1] * comm.size if shares is None else shares)
    if len(checked) != comm.size:
        raise ValueError(
            f"shares {checked}: wanted one positive whole number for each of "
            f"{comm.size} ranks"
        )
    return checked


def check_memory(
    comm: Communicator, bytes_of_rank: int, name: str, turn_bytes: int = 0
) -> None:
    """Compare what the ranks of each host will hold with what the host has.

    `bytes_of_rank` are this rank's, `name` is what an error calls the model. One rank
    at a time takes `turn_bytes` besides, the same on all.

    Raises: MemoryLackingError, with the numbers of the host that lacks most.
    """
    hosts: dict[str, int] = {}
    available: dict[str, int] = {}
    for host, wanted, free in comm.allgather_object(
        (comm.host, bytes_of_rank, memory.available_bytes(gpu_limit_bytes()))
    ):
        hosts[host] = hosts.get(host, turn_bytes) + wanted
        available[host] = free
    lacking = {host: hosts[host] - free for host, free in available.items()}
    host = max(lacking, key=lambda name: lacking[name])
    if lacking[host] > 0:
        raise MemoryLackingError(
            f"the slices of {name} for {host} take {hosts[host] / 1e9:.1f} GB, and "
            f"it has {available[host] / 1e9:.1f} GB free: use more hosts, give it a "
            "smaller share with --shares, or take a model with fewer bits"
        )
