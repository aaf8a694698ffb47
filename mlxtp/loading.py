"""`load`: from a checkpoint to a model of which each rank holds its slices."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer
from tqdm import tqdm

from mlxtp.checkpoint import cut
from mlxtp.checkpoint.cut import Origin, Shard, bytes_of, lacking
from mlxtp.checkpoint.memory import gpu_limit_bytes
from mlxtp.checkpoint.readahead import ReadAhead
from mlxtp.checkpoint.tensors import Tensor
from mlxtp.cluster import memory
from mlxtp.comm.communicator import Communicator
from mlxtp.comm.errors import UsageError
from mlxtp.fetch import hub
from mlxtp.fetch.fetch import fill
from mlxtp.fetch.hub import Repo
from mlxtp.layers.parallelize import parallelize
from mlxtp.model.skeleton import EmptyModel, build
from mlxtp.model.sources import needed, reads
from mlxtp.partition.shares import Share, Shares, as_shares
from mlxtp.partition.spans import Slice
from mlxtp.sharding.decide import slice_table
from mlxtp.sharding.table import SliceTable

logger = logging.getLogger(__name__)

# Who fetches from the hub.
Fetch = Literal["all", "root"]


def load(
    path_or_hf_repo: str | Path,
    comm: Communicator,
    *,
    shares: Sequence[int | Share] | None = None,
    adapter_path: str | Path | None = None,
    tokenizer_config: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
    fetch: Fetch = "all",
    progress: bool = False,
) -> tuple[nn.Module, TokenizerWrapper]:
    """Load a model and its tokenizer, split over the ranks of `comm`.

    Every rank calls it alike. It reads and keeps its own slices of the weights.
    The model is mlx-lm's and is called as such: `model(tokens, cache=cache)` with
    tokens (B, L) gives logits (B, L, V), the same bytes on every rank.

    Args:
        comm: the ranks to split it over.
        path_or_hf_repo: a folder, whole or cut by `mlxtp.shard`, or a name on the
            hub, of which each rank fetches its slices and keeps them.
        shares: one positive number a rank, in whose proportion the ranks get
            work and memory, or a `Share` for each. Default: equal.
        adapter_path: a folder with LoRA adapters or full weights of mlx-lm's
            tuner.
        tokenizer_config: more arguments for the tokenizer.
        trust_remote_code: run Python code that the checkpoint carries.
        fetch: "all" ranks fetch from the hub, or "root" for all: rank 0.
        progress: show a progress bar on rank 0.

    Raises: UsageError (a ValueError) on every rank, with one message, if what was
        given does not make a model or its slices do not fit in memory, before a
        weight is read.
    """
    with comm.unlimited():
        show = progress and comm.rank == 0
        opened = _open(
            path_or_hf_repo, comm, shares, adapter_path, trust_remote_code, fetch, show
        )
        with comm.agreement():
            tokenizer = _load_tokenizer(
                opened.folder, tokenizer_config, opened.empty.config, trust_remote_code
            )
        return _read(opened, comm, show=show), tokenizer


def load_model(
    path_or_hf_repo: str | Path,
    comm: Communicator,
    *,
    shares: Sequence[int | Share] | None = None,
    adapter_path: str | Path | None = None,
    trust_remote_code: bool = False,
    fetch: Fetch = "all",
    progress: bool = False,
) -> tuple[nn.Module, dict[str, Any]]:
    """Load a model without its tokenizer: the model, split, and its config.

    Arguments and errors are those of `load`.
    """
    with comm.unlimited():
        show = progress and comm.rank == 0
        opened = _open(
            path_or_hf_repo, comm, shares, adapter_path, trust_remote_code, fetch, show
        )
        model = _read(opened, comm, show=show)
        return model, opened.empty.config


@dataclass(frozen=True)
class _Opened:
    """A model that can be read: nothing that was given stands against it."""

    folder: Path
    empty: EmptyModel
    table: SliceTable


def _open(
    path_or_hf_repo: str | Path,
    comm: Communicator,
    shares: Sequence[int | Share] | None,
    adapter_path: str | Path | None,
    trust_remote_code: bool,
    fetch: Fetch,
    show: bool,
) -> _Opened:
    """Find and build a model, decide what is whose, see if it fits, and fetch it."""
    with comm.agreement():
        rank_shares = _checked_shares(shares, comm)
    folder, repo = locate(path_or_hf_repo, comm)
    adapter = Path(adapter_path) if adapter_path is not None else None

    def built() -> EmptyModel:
        return build(folder, adapter, trust_remote_code=trust_remote_code)

    with comm.agreement():
        empty = built()
        table = slice_table(empty.model, rank_shares)
    if table.remark and comm.rank == 0:
        logger.warning(table.remark)
    slices = table.slices(comm.rank)
    check_memory(comm, _bytes_of(empty, slices), folder)
    if cut.is_cut(folder):
        with comm.agreement():
            tensors = needed(empty.sources, slices)
            if repo is None:
                _check_here(tensors, folder)
        if repo is not None:
            at_hub = set(cut.open_cut(folder).values())
            wanted = {t.name: it for t, it in tensors.items() if t in at_hub}
            shard = Shard(rank_shares, comm.rank)
            fill(comm, repo, shard, wanted, only_root=fetch == "root", show=show)
            with comm.agreement():
                empty = built()
    return _Opened(folder, empty, table)


def locate(path_or_hf_repo: str | Path, comm: Communicator) -> tuple[Path, Repo | None]:
    """The folder of a model on this machine, and where its slices come from.

    From the hub only config, tokenizer and headers are there, unless the cache has
    all of it. Rank 0 asks the hub, and tells the others.
    """
    local = Path(path_or_hf_repo).expanduser()
    with comm.agreement():
        if local.exists() and not local.is_dir():
            raise ValueError(f"the model {local} is a file; give the folder it is in")
    hosts = comm.allgather_object((comm.host, local.is_dir()))
    if all(there for _, there in hosts):
        return local, None
    name = str(path_or_hf_repo)
    repo: Repo | None = None
    small: dict[str, bytes] = {}
    origin: Origin | None = None
    with comm.agreement():
        looks_local = name.startswith((".", "/", "~"))
        if looks_local or any(there for _, there in hosts):
            if not local.is_dir():
                raise ValueError(f"there is no model folder {local}")
        elif comm.rank == 0:
            repo, small = hub.small_files(name)
    repo = comm.bcast_object(repo)
    snapshot = hub.whole(repo)
    if all(comm.allgather_object(snapshot is not None)):
        assert snapshot is not None
        return snapshot, None
    folder = repo.folder()
    begun = comm.allgather_object(cut.is_cut(folder))
    if not all(begun):
        with comm.agreement():
            if comm.rank == 0:
                origin = hub.origin(repo, small)
        small, origin = comm.bcast_object((small, origin))
        with comm.agreement():
            if comm.rank == [host for host, _ in hosts].index(comm.host):
                cut.begin(folder, origin, small)
    return folder, repo


def _checked_shares(shares: Sequence[int | Share] | None, comm: Communicator) -> Shares:
    result = as_shares([1] * comm.size if shares is None else shares)
    if len(result) != comm.size:
        raise ValueError(
            f"shares {','.join(map(str, result))}: wanted one positive whole number "
            f"for each of {comm.size} ranks"
        )
    return result


def _check_here(slices: Mapping[Tensor, Slice], folder: Path) -> None:
    """Compare what a rank reads with what a cut checkpoint has."""
    if absent := bytes_of(lacking(slices)):
        held = ", ".join(shard.folder for shard in cut.shards(folder))
        raise ValueError(
            f"{absent / 1e9:.2f} of the {bytes_of(slices) / 1e9:.2f} GB that this rank "
            f"reads are not in {folder}, which holds {held or 'no slices'}: cut the "
            "checkpoint for these ranks and shares with python -m mlxtp.shard"
        )


def check_memory(comm: Communicator, bytes_of_rank: int, folder: Path) -> None:
    """Compare what the ranks of each host will hold with what the host has.

    Raises: UsageError, with the numbers of the host that lacks most.
    """
    hosts: dict[str, int] = {}
    available: dict[str, int] = {}
    for host, wanted, free in comm.allgather_object(
        (comm.host, bytes_of_rank, memory.available_bytes(gpu_limit_bytes()))
    ):
        hosts[host] = hosts.get(host, 0) + wanted
        available[host] = free
    lacking = {host: hosts[host] - free for host, free in available.items()}
    host = max(lacking, key=lambda name: lacking[name])
    if lacking[host] > 0:
        raise UsageError(
            f"the slices of {folder} for {host} take {hosts[host] / 1e9:.1f} GB, and "
            f"it has {available[host] / 1e9:.1f} GB free: use more hosts, give it a "
            "smaller share with --shares, or take a model with fewer bits"
        )


def _bytes_of(empty: EmptyModel, slices: dict[str, Slice]) -> int:
    return sum(
        part.size * empty.sources[name].dtype.size for name, part in slices.items()
    )


def _load_tokenizer(
    folder: Path,
    tokenizer_config: dict[str, Any] | None,
    config: dict[str, Any],
    trust_remote_code: bool,
) -> TokenizerWrapper:
    extra = {**(tokenizer_config or {}), "trust_remote_code": trust_remote_code}
    try:
        return load_tokenizer(folder, extra, eos_token_ids=config.get("eos_token_id"))
    except Exception as error:  # all that transformers may stumble over in files
        raise ValueError(
            f"the tokenizer in {folder} does not load: {error!r}"
        ) from error


def _read(opened: _Opened, comm: Communicator, *, show: bool) -> nn.Module:
    """Read this rank's slices and make the model compute with them."""
    with comm.agreement():
        read_slices(opened.empty, opened.table.slices(comm.rank), show=show)
    parallelize(opened.empty.model, opened.table, comm)
    return opened.empty.model


def read_slices(empty: EmptyModel, slices: dict[str, Slice], *, show: bool) -> None:
    """Put this rank's slices into the model, in the order of the files.

    Sources are let go of as they are read: some hold what they computed.
    """
    order = sorted(slices, key=lambda name: empty.sources[name].place())
    wanted = [it for name in order for it in reads(empty.sources[name], slices[name])]
    with (
        ReadAhead(wanted) as reader,
        tqdm(
            total=_bytes_of(empty, slices), unit="B", unit_scale=True, disable=not show,
            desc="Loading", leave=False,
        ) as bar,
    ):  # fmt: skip
        for name in order:
            array = empty.sources.pop(name).read(slices[name], reader)
            mx.eval(array)
            empty.model.update(tree_unflatten([(name, array)]))
            bar.update(array.nbytes)
