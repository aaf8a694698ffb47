"""A rank's slices, read or computed, and put into the model."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
from mlx.utils import tree_unflatten

from mlxtp.checkpoint.headers import Checkpoint
from mlxtp.checkpoint.progress import Advance, ignore
from mlxtp.checkpoint.readahead import ReadAhead
from mlxtp.checkpoint.tensors import Tensor
from mlxtp.comm.communicator import Communicator
from mlxtp.model.skeleton import EmptyModel
from mlxtp.model.sources import Computed
from mlxtp.model.turns import compute_for_all, computed
from mlxtp.partition.spans import Slice


def read_slices(
    empty: EmptyModel,
    checkpoint: Checkpoint,
    slices: dict[str, Slice],
    advance: Advance = ignore,
) -> None:
    """Put the slices that this rank reads into the model, in the order of the files.

    What has to be computed whole is left to `compute_slices`.

    Raises: OSError if a file cannot be read.
    """
    reads = {
        name: list(source.reads(slices[name]))
        for name, source in empty.sources.items()
        if not isinstance(source, Computed)
    }

    def position(name: str) -> tuple[str, int]:
        return min(
            (checkpoint.position(tensor) for tensor, _ in reads[name]), default=("", 0)
        )

    order = sorted(reads, key=position)
    wanted = [tensor_and_part for name in order for tensor_and_part in reads[name]]
    kept = {source for source in empty.sources.values() if isinstance(source, Tensor)}
    arrays: list[tuple[str, mx.array]] = []
    with _no_collection(), ReadAhead(checkpoint, wanted, kept) as reader:
        for name in order:
            array = empty.sources[name].read(slices[name], reader.read)
            arrays.append((name, array))
            advance(array.nbytes)
    empty.model.update(tree_unflatten(arrays))


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python from looking for garbage: once through all that was imported takes as
    long as reading 200 MB, and reading leaves none.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def compute_slices(
    empty: EmptyModel,
    checkpoint: Checkpoint,
    slices: dict[str, Slice],
    comm: Communicator,
    advance: Advance = ignore,
) -> None:
    """Put the slices of what has to be computed whole into the model.

    The ranks take turns with the parameters, in the order of their names.

    Communicates: what `compute_for_all` does, for each parameter.
    Raises: UsageError as `compute_for_all`.
    """
    for number, (name, source) in enumerate(computed(empty.sources).items()):
        root = number % comm.size
        array = compute_for_all(comm, root, source, checkpoint, slices[name])
        empty.model.update(tree_unflatten([(name, array)]))
        advance(array.nbytes)
