"""Parameters that can only be computed whole: one rank computes each for all.

Each rank keeps a band of rows of the tensors behind such a parameter. In turn the ranks
gather the bands, let mlx-lm compute the parameter, hand its slices out, and keep
nothing of it. So no rank holds more of a model than its slices, beside what one turn
takes (`bytes_of_turn`) and what mlx-lm holds between the steps of its computation.
"""

from collections.abc import Iterable, Mapping, Sequence

import mlx.core as mx
import numpy as np

from mlxtp.checkpoint.headers import Checkpoint
from mlxtp.checkpoint.memory import allocate
from mlxtp.checkpoint.tensors import Tensor, bytes_of
from mlxtp.comm.communicator import Communicator
from mlxtp.model.sources import Computed, Source, bytes_in, computed_whole, cut_out
from mlxtp.partition.spans import Slice

# The longest message.
CHUNK_BYTES = 8 * 1024 * 1024


def computed(sources: Mapping[str, Source]) -> dict[str, Computed]:
    """The parameters that are computed whole, in the order of turns: of their names."""
    return {
        name: source
        for name, source in sorted(sources.items())
        if isinstance(source, Computed)
    }


def tensors_behind(sources: Mapping[str, Source]) -> dict[str, list[str]]:
    """Of what each parameter is computed that is computed whole, by names."""
    return {
        name: [tensor.name for tensor in source.tensors]
        for name, source in computed(sources).items()
    }


def compute_alike(
    sources: dict[str, Source], of_ranks: Sequence[Mapping[str, list[str]]]
) -> None:
    """Let what some rank has to compute whole be computed whole here, too.

    MLX makes other graphs on other devices, so a rank may follow what another cannot.
    `of_ranks` are the `tensors_behind` of every rank.

    Raises: ValueError if a rank would compute a parameter of other tensors.
    """
    for rank, of_rank in enumerate(of_ranks):
        for name, tensors in of_rank.items():
            source = sources[name] = computed_whole(sources[name])
            if [tensor.name for tensor in source.tensors] != tensors:
                raise ValueError(
                    f"{name} is made of other tensors here than on rank {rank}: "
                    "install the same build of MLX on every host"
                )


def bytes_of_turn(source: Computed, parts: Iterable[Slice]) -> int:
    """Bytes that computing a parameter for all takes, beside the rank's own slice.

    Its tensors, the parameter, and the largest of the slices, `parts`, under way.
    """
    tensors = {tensor: Slice(tensor.shape) for tensor in source.tensors}
    elements = Slice(source.shape).size + max(part.size for part in parts)
    return bytes_of(tensors) + elements * source.dtype.size


def compute_for_all(
    comm: Communicator, root: int, source: Computed, checkpoint: Checkpoint, part: Slice
) -> mx.array:
    """Let `root` compute a parameter of the ranks' bands, and give each its slice.

    `checkpoint` has this rank's bands, `part` is its slice.

    Communicates: the bytes of the bands to `root`, the bytes of the slices from it.

    Raises: UsageError on every rank if a file cannot be read, or mlx-lm refuses the
        tensors.
    """
    with comm.agreement():
        bands = [
            checkpoint.read(tensor, source.band(tensor, comm.rank, comm.size))
            for tensor in source.tensors
        ]
    gathered = {
        tensor.name: _gather(comm, root, source, tensor, band)
        for tensor, band in zip(source.tensors, bands, strict=True)
    }
    del bands
    array = None
    with comm.agreement():
        if comm.rank == root:
            array = _compute(source, gathered)
    del gathered
    return _scatter(comm, root, array, part, source.dtype)


def _compute(source: Computed, tensors: dict[str, mx.array]) -> mx.array:
    """Compute a parameter.

    Raises: ValueError for whatever mlx-lm raises, in one line.
    """
    try:
        array = source.compute(tensors)
        mx.eval(array)
    except Exception as error:  # all that mlx-lm may stumble over in tensors
        reason = str(error) if isinstance(error, ValueError) else repr(error)
        first, *others = tensors
        more = f" and {len(others)} more" if others else ""
        raise ValueError(
            f"mlx-lm cannot compute a parameter of {first}{more}: "
            + " ".join(reason.split())
        ) from error
    return array


def _gather(
    comm: Communicator, root: int, source: Computed, tensor: Tensor, band: mx.array
) -> mx.array:
    """Put the bands of a tensor together on `root`; others get their band back."""
    if not tensor.shape:
        return band
    is_root = comm.rank == root
    array, memory = allocate(tensor.shape, tensor.dtype) if is_root else (band, None)
    filled = 0
    for rank in range(comm.size):
        size = tensor.bytes_of(source.band(tensor, rank, comm.size))
        target = memory[filled : filled + size] if memory is not None else None
        _move(comm, rank, root, size, bytes_in(band), target)
        filled += size
    return array


def _scatter(
    comm: Communicator, root: int, array: mx.array | None, part: Slice, dtype: mx.Dtype
) -> mx.array:
    """Give each rank its `part` of the array that `root` has."""
    mine, memory = allocate(part.shape, dtype)
    for rank, wanted in enumerate(comm.allgather_object(part)):
        data = None if array is None else bytes_in(cut_out(array, wanted))
        _move(comm, root, rank, wanted.size * dtype.size, data, memory)
    return mine


def _move(
    comm: Communicator,
    source: int,
    target: int,
    size: int,
    data: np.ndarray | None,
    memory: np.ndarray | None,
) -> None:
    """Send `size` bytes from one rank's `data` into another's `memory`.

    Communicates: one exchange a chunk, in which one rank sends.
    """
    for start in range(0, size, CHUNK_BYTES):
        stop = min(start + CHUNK_BYTES, size)
        to = [np.empty(0, np.uint8)] * comm.size
        if comm.rank == source:
            assert data is not None
            to[target] = data[start:stop]
        sizes = [0] * comm.size
        if comm.rank == target:
            sizes[source] = stop - start
        received = comm.exchange(to, sizes)
        if comm.rank == target:
            assert memory is not None
            memory[start:stop] = received[source]
