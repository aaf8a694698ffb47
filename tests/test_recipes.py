"""Checkpoints as Hugging Face publishes them, of which a rank reads its slices."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import zoo
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model, save_config

from mlxtp.building import build
from mlxtp.loading import read_slices
from mlxtp.recipes import Computed
from mlxtp.sharding import slice_table
from mlxtp.tensors import Tensor

pytestmark = pytest.mark.once

Tensors = dict[str, mx.array]
RANKS = 3


def experts_apart(tensors: Tensors) -> Tensors:
    """(E, out, in) as a tensor for each expert."""
    apart = {}
    for name, tensor in tensors.items():
        if ".switch_mlp." not in name:
            apart[name] = tensor
            continue
        for number, expert in enumerate(tensor):
            apart[name.replace(".switch_mlp.", f".experts.{number}.")] = expert
    return apart


def gates_and_ups_together(tensors: Tensors) -> Tensors:
    """Llama 4: (E, in, gate and up out) and (E, in, out)."""
    together = {}
    for name, tensor in tensors.items():
        stem = name.rpartition(".experts.")[0] + ".experts."
        if ".experts." not in name or ".gate_proj." in name:
            if ".experts." not in name:
                together[name] = tensor
        elif ".up_proj." in name:
            gate = tensors[name.replace(".up_proj.", ".gate_proj.")]
            both = mx.concatenate([gate, tensor], axis=1)
            together[f"{stem}gate_up_proj"] = both.swapaxes(1, 2)
        else:
            together[f"{stem}down_proj"] = tensor.swapaxes(1, 2)
    return together


def transposed(tensors: Tensors) -> Tensors:
    """GPT-2: (in, out), and names without the model's."""
    return {
        name.removeprefix("model."): t.T if ".c_" in name and t.ndim == 2 else t
        for name, t in tensors.items()
    }


def convolutions_turned(tensors: Tensors) -> Tensors:
    return {
        name: t.moveaxis(2, 1) if "conv1d.weight" in name else t
        for name, t in tensors.items()
    }


def around_one(tensors: Tensors) -> Tensors:
    """Qwen3-Next: norms hold what is added to one, and what the others do, too."""
    ends = ("layernorm.weight", "model.norm.weight", "q_norm.weight", "k_norm.weight")
    tensors = experts_apart(convolutions_turned(tensors))
    return {name: t - 1 if name.endswith(ends) else t for name, t in tensors.items()}


def fp8(tensors: Tensors) -> Tensors:
    """DeepSeek V3: bytes, a scale for 128 by 128 of them, keys and values as one."""
    whole = {}
    for name, tensor in experts_apart(tensors).items():
        if ".embed_q." in name:
            values = tensors[name.replace("embed_q", "unembed_out")]
            both = mx.concatenate([tensor.swapaxes(1, 2), values], axis=1)
            name, tensor = name.replace("embed_q", "kv_b_proj"), both.flatten(0, 1)
        if ".unembed_out." in name:
            continue
        if tensor.ndim != 2 or "embed" in name or "head" in name or ".gate." in name:
            whole[name] = tensor
            continue
        blocks = [-(-size // 128) for size in tensor.shape]
        scales = 0.5 + mx.random.uniform(shape=blocks, key=mx.random.key(1))
        whole[name] = mx.to_fp8(tensor)
        whole[f"{name}_scale_inv"] = scales
    return whole


def mxfp4(tensors: Tensors) -> Tensors:
    """gpt-oss: gates and ups in turns, in blocks of 16 bytes with a scale each."""
    made = {}
    for name, tensor in tensors.items():
        if ".experts." not in name or ".gate_proj." in name:
            if ".experts." not in name:
                made[name] = tensor
            continue
        stem, leaf = name.rsplit(".", 1)
        if ".up_proj" in name:
            gate = tensors[name.replace(".up_proj.", ".gate_proj.")]
            tensor = mx.stack([gate, tensor], axis=2).flatten(1, 2)
            stem = stem.replace("up_proj", "gate_up_proj")
        if leaf == "weight":
            packed, scales = mx.quantize(tensor, 32, 4, mode="mxfp4")
            blocks = packed.view(mx.uint8)
            made[f"{stem}_blocks"] = blocks.reshape(*blocks.shape[:-1], -1, 16)
            made[f"{stem}_scales"] = scales
        else:
            made[f"{stem}_bias"] = tensor
    return made


CASES: dict[str, tuple[str, Callable[[Tensors], Tensors], dict[str, Any]]] = {
    "stacked": ("qwen3_moe", experts_apart, {}),
    "split": ("llama4", gates_and_ups_together, {}),
    "transposed": ("gpt2", transposed, {}),
    "turned": ("mamba2", convolutions_turned, {}),
    "added": ("qwen3_next", around_one, {}),
    "fp8": ("deepseek_v3", fp8, {}),
    "mxfp4": ("gpt_oss", mxfp4, {"quantization_config": {"quant_method": "mxfp4"}}),
}


def published(case: str, folder: Path) -> Path:
    """A tiny checkpoint in the published form."""
    model_type, invert, more = CASES[case]
    model, config = zoo.build(model_type)
    tensors = invert(dict(tree_flatten(model.parameters())))
    tensors = {name: mx.contiguous(tensor) for name, tensor in tensors.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    save_config(config | more, folder / "config.json")
    return folder


@pytest.mark.parametrize("case", CASES)
def test_slices_are_those_of_the_whole(case: str, tmp_path: Path) -> None:
    folder = published(case, tmp_path)
    whole = dict(tree_flatten(load_model(folder)[0].parameters()))
    empty = build(folder)
    table = slice_table(empty.model, [1] * RANKS)
    assert not [n for n, s in empty.sources.items() if isinstance(s, Computed)]
    for rank in range(RANKS):
        for name, part in table.slices(rank).items():
            wanted = whole[name]
            if part.axis is not None:
                own = [i for start, stop in part.spans for i in range(start, stop)]
                wanted = mx.take(wanted, mx.array(own), part.axis)
            got = empty.sources[name].read(part)
            assert got.dtype == wanted.dtype
            assert mx.array_equal(got, wanted, equal_nan=True), name


@pytest.mark.parametrize("case", CASES)
def test_reads_own_bytes(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what is cut about a third, as far as the rows are longer than a page."""
    folder = published(case, tmp_path)
    empty = build(folder)
    table = slice_table(empty.model, [1] * RANKS)
    monkeypatch.setattr("mlxtp.rows.PAGE_BYTES", 1)
    read = 0
    preadv = os.preadv

    def counted(fd: int, buffers: list[Any], offset: int) -> int:
        nonlocal read
        count = preadv(fd, buffers, offset)
        read += count
        return count

    monkeypatch.setattr(os, "preadv", counted)
    for name, part in table.slices(0).items():
        matrix = table.matrix_of(name)
        if matrix is None:
            continue
        before = read
        made = empty.sources[name].read(part)
        share = part.size / np.prod(part.full_shape)
        source = sum(t.size for t in _bytes_behind(empty.sources[name]))
        # What a block of FP8 has in common with others is read by all of them.
        slack = 1.3 if case != "fp8" else 2.5
        assert read - before <= slack * share * source + 128, (name, made.shape)


def test_what_is_computed_whole_is_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a graph, one parameter at a time is there besides what is held."""
    folder = published("stacked", tmp_path)
    monkeypatch.setattr("mlxtp.recipes.OPERATIONS", {})
    empty = build(folder)
    largest = max(a.nbytes for _, a in tree_flatten(empty.model.parameters()))
    slices = slice_table(empty.model, [1] * RANKS).slices(0)
    assert any(isinstance(source, Computed) for source in empty.sources.values())
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    read_slices(empty, slices, show=False)
    held = sum(array.nbytes for _, array in tree_flatten(empty.model.parameters()))
    # The tensors that a parameter is made of, and the parameter before it is cut.
    assert mx.get_peak_memory() - before <= held + 2 * largest


def _bytes_behind(source: Any) -> list[np.ndarray]:
    """As many bytes as the tensors that a parameter is made of have."""
    if isinstance(source, Tensor):
        return [np.empty(int(np.prod(source.shape)) * source.dtype.size, np.uint8)]
    if isinstance(source, mx.array):
        return []
    return [b for inner in source.inputs for b in _bytes_behind(inner)]
