"""`load`: from a checkpoint to a model of which each rank holds its slices."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils.tqdm import disable_progress_bars
from mlx.utils import tree_unflatten
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer
from tqdm import tqdm

from mlxtp import memory
from mlxtp.building import EmptyModel, build
from mlxtp.communicator import AgreedError, Communicator
from mlxtp.parallel import parallelize
from mlxtp.partition import Slice
from mlxtp.sharding import slice_table
from mlxtp.shards import SliceTable

logger = logging.getLogger(__name__)

# What of a repository on the hub makes a model; code in it runs only when trusted.
HUB_PATTERNS = ["*.json", "model*.safetensors", "*.model", "*.tiktoken"]
HUB_PATTERNS += ["*.txt", "*.jinja", "*.py"]


def load(
    path_or_hf_repo: str | Path,
    comm: Communicator,
    *,
    weights: Sequence[int] | None = None,
    adapter_path: str | Path | None = None,
    tokenizer_config: dict[str, Any] | None = None,
    trust_remote_code: bool = False,
    progress: bool = False,
) -> tuple[nn.Module, TokenizerWrapper]:
    """Load a model and its tokenizer, split over the ranks of `comm`.

    Every rank calls it alike. It reads and keeps its own slices of the weights.
    The model is mlx-lm's and is called as such: `model(tokens, cache=cache)` with
    tokens (B, L) gives logits (B, L, V), the same bytes on every rank.

    Args:
        comm: the ranks to split it over.
        path_or_hf_repo: a folder, or a name on the hub, whose files each host
            fetches once, whole.
        weights: one positive number a rank, in whose proportion the ranks get
            work and memory. Default: equal.
        adapter_path: a folder with LoRA adapters or full weights of mlx-lm's
            tuner.
        tokenizer_config: more arguments for the tokenizer.
        trust_remote_code: run Python code that the checkpoint carries.
        progress: show a progress bar on rank 0.

    Raises: AgreedError (a ValueError) on every rank, with one message, if what was
        given does not make a model or its slices do not fit in memory, before a
        weight is read.
    """
    with comm.unlimited():
        opened = _open(path_or_hf_repo, comm, weights, adapter_path, trust_remote_code)
        with comm.agreement():
            tokenizer = _load_tokenizer(
                opened.folder, tokenizer_config, opened.empty.config, trust_remote_code
            )
        return _read(opened, comm, show=progress and comm.rank == 0), tokenizer


def load_model(
    path_or_hf_repo: str | Path,
    comm: Communicator,
    *,
    weights: Sequence[int] | None = None,
    adapter_path: str | Path | None = None,
    trust_remote_code: bool = False,
    progress: bool = False,
) -> tuple[nn.Module, dict[str, Any]]:
    """Load a model without its tokenizer: the model, split, and its config.

    Arguments and errors are those of `load`.
    """
    with comm.unlimited():
        opened = _open(path_or_hf_repo, comm, weights, adapter_path, trust_remote_code)
        model = _read(opened, comm, show=progress and comm.rank == 0)
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
    weights: Sequence[int] | None,
    adapter_path: str | Path | None,
    trust_remote_code: bool,
) -> _Opened:
    """Find and build a model, decide what is whose, and see if it fits."""
    with comm.agreement():
        rank_weights = _checked_weights(weights, comm)
    folder = find(path_or_hf_repo, comm)
    with comm.agreement():
        adapter = Path(adapter_path) if adapter_path is not None else None
        empty = build(folder, adapter, trust_remote_code=trust_remote_code)
        table = slice_table(empty.model, rank_weights)
    if table.remark and comm.rank == 0:
        logger.warning(table.remark)
    check_memory(comm, _bytes_of(empty, table.slices(comm.rank)), folder)
    return _Opened(folder, empty, table)


def find(path_or_hf_repo: str | Path, comm: Communicator) -> Path:
    """The local folder of a model; from the hub, one rank of each host fetches it."""
    local = Path(path_or_hf_repo).expanduser()
    with comm.agreement():
        if local.exists() and not local.is_dir():
            raise ValueError(f"the model {local} is a file; give the folder it is in")
    hosts = comm.allgather_objects((comm.host, local.is_dir()))
    if all(there for _, there in hosts):
        return local
    with comm.agreement():
        looks_local = str(path_or_hf_repo).startswith((".", "/", "~"))
        if looks_local or any(there for _, there in hosts):
            if not local.is_dir():
                raise ValueError(f"there is no model folder {local}")
        elif comm.rank == [host for host, _ in hosts].index(comm.host):
            if comm.rank > 0:
                disable_progress_bars()
            _fetch(str(path_or_hf_repo))
    with comm.agreement():
        local = _fetch(str(path_or_hf_repo), local_files_only=True)
    return local


def _fetch(name: str, *, local_files_only: bool = False) -> Path:
    try:
        return Path(
            snapshot_download(
                name, allow_patterns=HUB_PATTERNS, local_files_only=local_files_only
            )
        )
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"there is no folder {name}, and the hub did not give it: {reason}"
        ) from error


def _checked_weights(weights: Sequence[int] | None, comm: Communicator) -> list[int]:
    if weights is None:
        return [1] * comm.size
    if len(weights) != comm.size or any(weight < 1 for weight in weights):
        raise ValueError(
            f"weights {','.join(map(str, weights))}: wanted one positive whole number "
            f"for each of {comm.size} ranks"
        )
    return list(weights)


def check_memory(comm: Communicator, bytes_of_rank: int, folder: Path) -> None:
    """Compare what the ranks of each host will hold with what the host has.

    Raises: AgreedError, with the numbers of the host that lacks most.
    """
    hosts: dict[str, int] = {}
    available: dict[str, int] = {}
    for host, wanted, free in comm.allgather_objects(
        (comm.host, bytes_of_rank, memory.available_bytes())
    ):
        hosts[host] = hosts.get(host, 0) + wanted
        if free is not None:
            available[host] = free
    lacking = {host: hosts[host] - free for host, free in available.items()}
    host = max(lacking, key=lambda name: lacking[name], default=None)
    if host is not None and lacking[host] > 0:
        raise AgreedError(
            f"the slices of {folder} for {host} take {hosts[host] / 1e9:.1f} GB, and "
            f"it has {available[host] / 1e9:.1f} GB free: use more hosts, give it a "
            "smaller share with --weights, or take a model with fewer bits"
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
    with tqdm(
        total=_bytes_of(empty, slices), unit="B", unit_scale=True, disable=not show,
        desc="Loading", leave=False,
    ) as bar:  # fmt: skip
        for name in order:
            array = empty.sources.pop(name).read(slices[name])
            mx.eval(array)
            empty.model.update(tree_unflatten([(name, array)]))
            bar.update(array.nbytes)
