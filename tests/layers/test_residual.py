"""The residual stream is the same bytes on every rank, layer by layer."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.cache import make_prompt_cache
from pyramid import sweep
from ranks import mpirun
from tiny import Tiny, made_by_rank_0

import mlxtp
from mlxtp import Communicator
from mlxtp.generation.halves import read_in_halves

# The prompt in two pieces, then tokens one by one, none of them twice.
INPUTS = [[3, 14, 15, 92, 65], [35, 89, 79], [32], [38], [46], [26], [43]]
LAYERS = 3
PLAIN = {"num_hidden_layers": LAYERS}

MODELS = {
    "float32": Tiny(PLAIN),
    "float16": Tiny({**PLAIN, "model_type": "qwen3"}, dtype=mx.float16),
    "bfloat16": Tiny({**PLAIN, "tie_word_embeddings": True}, dtype=mx.bfloat16),
    "quantized": Tiny(
        PLAIN, dtype=mx.bfloat16, quantization={"bits": 4, "group_size": 32}
    ),
}


def residual_hashes(model: nn.Module) -> list[str]:
    """Of every input: its embedding, what each layer makes of it, and the logits."""
    hashes = []

    def record(x: mx.array) -> None:
        mx.eval(x)
        hashes.append(sha256(memoryview(mx.contiguous(x)).tobytes()).hexdigest())

    embedding, block = type(model.model.embed_tokens), type(model.layers[0])
    cache = make_prompt_cache(model)
    with recorded(embedding, record), recorded(block, record):
        for tokens in INPUTS:
            record(model(mx.array([tokens]), cache=cache))
    return hashes


@contextmanager
def recorded(layer: type, record) -> Iterator[None]:
    """Give `record` whatever layers of this class return."""
    call = layer.__call__

    def recording(self, *args, **kwargs):
        y = call(self, *args, **kwargs)
        record(y)
        return y

    layer.__call__ = recording
    try:
        yield
    finally:
        layer.__call__ = call


def check(name: str, comm: Communicator, folder: Path) -> None:
    """Compare the hashes of all ranks, which make `folder` if it is not there."""
    model, _ = mlxtp.load(made_by_rank_0(MODELS[name], folder / name, comm), comm)
    everyones = comm.allgather_object(residual_hashes(model))
    for rank, hashes in enumerate(everyones):
        assert len(hashes) == len(set(hashes)) == len(INPUTS) * (LAYERS + 2)
        differing = [i for i, mine in enumerate(everyones[0]) if hashes[i] != mine]
        assert not differing, f"rank {rank} differs from rank 0 at {differing}"
    check_halves(model)


def check_halves(model: nn.Module) -> None:
    """Compare a prompt in two halves with one that is read in two parts."""
    tokens = mx.array([[token for part in INPUTS for token in part]])
    half = (tokens.size + 1) // 2
    caches = make_prompt_cache(model), make_prompt_cache(model)
    read_in_halves(model, model, tokens, cache=caches[0])
    for part in (tokens[:, :half], tokens[:, half:]):
        mx.eval(model(part, cache=caches[1]))
    for one, other in zip(*caches, strict=True):
        for a, b in zip(one.state, other.state, strict=True):
            assert mx.array_equal(a, b)


@pytest.mark.usefixtures("each_mpi")
@pytest.mark.parametrize("name", MODELS)
def test_same_on_all_ranks(name: str, comm: Communicator, shared_path: Path) -> None:
    check(name, comm, shared_path / "residual")


@pytest.mark.once
@pytest.mark.parametrize(
    "world",
    sweep([{"transport": "ring"}, {"wire": "int8"}], [{"transport": "ring"}]),
    ids=lambda world: "-".join(world.values()),
)
def test_same_however_arrays_travel(world: dict[str, str], tmp_path: Path) -> None:
    program = f"""
from pathlib import Path
import mlxtp, test_residual
comm = mlxtp.Communicator.world(**{world})
for name in test_residual.MODELS:
    test_residual.check(name, comm, Path({str(tmp_path)!r}))
print("passed", flush=True)
"""
    ranks, command = 3, [sys.executable, "-c", program]
    path = os.pathsep.join(filter(None, sys.path))
    done = mpirun("-n", ranks, *command, timeout_seconds=90, PYTHONPATH=path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("passed\n") == ranks
