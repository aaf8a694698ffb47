"""Ranks compute in mlx-lm's dtypes, also where those of a checkpoint are mixed."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
import zoo
from every_type import RUNNABLE
from kept import kept
from metal_kernels import use_plain_operations
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model, save_config
from pyramid import sweep
from reference import TOLERANCE, as_numpy

from mlxtp import Communicator
from mlxtp.dryrun.passes import DryRunCommunicator
from mlxtp.layers.parallelize import parallelize
from mlxtp.loading import load_model as load_split
from mlxtp.model.skeleton import unloaded
from mlxtp.sharding.decide import slice_table
from mlxtp.sharding.table import SliceTable

use_plain_operations()

# Types with norms over ranks, of each kind, and others.
QUICK = ["llama", "olmo2", "mamba2", "bitnet", "falcon_h1", "bailing_hybrid", "kimi_k3"]


def empty(name: str) -> tuple[nn.Module, SliceTable]:
    """A model of a type or a variant, never evaluated, and its table for one rank."""
    model_type, more = zoo.VARIANTS.get(name, (name, {}))
    model = unloaded(zoo.tiny_config(model_type) | more)
    model.eval()
    return model, slice_table(model, [1])


def style_of(table: SliceTable, name: str) -> str:
    matrix = table.matrix_of(name)
    return matrix.cut.style if matrix else "whole"


def dtypes(name: str, wide: str, rank: int | None = None, size: int = 1) -> Any:
    """The dtypes of logits and caches of two calls, of mlx-lm or of a rank.

    Parameters are bfloat16, and float32 those of one axis that are cut by `wide`.
    """
    model, table = empty(name)
    if rank is not None:
        table = slice_table(model, [1] * size)
    whole = dict(tree_flatten(model.parameters()))
    arrays = []
    for parameter, part in table.slices(rank or 0).items():
        array = whole[parameter]
        dtype = array.dtype
        if mx.issubdtype(dtype, mx.floating):
            is_wide = array.ndim == 1 and style_of(table, parameter) == wide
            dtype = mx.float32 if is_wide else mx.bfloat16
        arrays.append((parameter, mx.zeros(part.shape, dtype)))
    model.update(tree_unflatten(arrays))
    if rank is not None:
        parallelize(model, table, DryRunCommunicator(rank, size))
    caches = make_prompt_cache(model)
    made = []
    for tokens in [[1, 2, 3]], [[4]]:
        try:
            logits = model(mx.array(tokens), cache=caches)
        except (ValueError, AssertionError) as error:  # mixed where mlx-lm takes none
            return str(error)
        made.append([logits.dtype, *(a.dtype for c in caches for a in cached(c))])
    return made


def cached(cache: Any) -> list[mx.array]:
    """The arrays of a cache."""
    if hasattr(cache, "caches"):
        return [array for inner in cache.caches for array in cached(inner)]
    return [x for _, x in tree_flatten(vars(cache)) if isinstance(x, mx.array)]


@pytest.mark.once
@pytest.mark.parametrize("name", sweep([*RUNNABLE, *zoo.VARIANTS], QUICK))
def test_mixed_dtypes(name: str) -> None:
    model, table = empty(name)
    styles = {
        style_of(table, parameter)
        for parameter, array in tree_flatten(model.parameters())
        if array.ndim == 1
    }
    for wide in styles - {"whole"}:
        expected = dtypes(name, wide)
        assert dtypes(name, wide, rank=1, size=3) == expected, wide
        if wide == "norm":
            assert dtypes(name, wide, rank=0) == expected, "one rank"


@pytest.mark.parametrize("model_type", ["olmo2", "bailing_hybrid"])
def test_wide_norms_in_bfloat16(model_type: str, comm: Communicator) -> None:
    """What a rank says is as near as in float32: nothing was rounded to bfloat16."""

    def save(folder: Path) -> Any:
        model, config = zoo.build(model_type)
        table = slice_table(model, [1])
        tensors = {
            name: array.astype(
                mx.float32 if style_of(table, name) == "norm" else mx.bfloat16
            )
            for name, array in tree_flatten(model.parameters())
        }
        mx.save_safetensors(str(folder / "model.safetensors"), tensors)
        save_config(config, folder / "config.json")
        logits = load_model(folder)[0](mx.array([[3, 14, 15, 92]]))
        return folder, as_numpy(logits), str(logits.dtype)

    folder, expected, dtype = kept(comm, f"{model_type}-wide-norms", save)
    logits = load_split(folder, comm)[0](mx.array([[3, 14, 15, 92]]))
    assert str(logits.dtype) == dtype
    error = abs(as_numpy(logits) - expected).max() / abs(expected).max()
    assert error < TOLERANCE[mx.float32], error
