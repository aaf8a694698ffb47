"""quantize_activations in a config: groups of inputs are quantized whole."""

from pathlib import Path
from typing import Any, NoReturn

import mlx.core as mx
import numpy as np
import pytest
from kept import kept
from mlx_lm.utils import load_model
from reference import TOLERANCE, as_numpy
from tiny import Tiny, edit_config

from mlxtp import Communicator, UsageError
from mlxtp.loading import load_model as load_split
from mlxtp.model.skeleton import build
from mlxtp.sharding.decide import slice_table

TOKENS = [[3, 14, 15, 92, 65]]
# Heads of 12 end inside groups of 16; 21 groups of columns are cut in whole groups.
MODEL = Tiny(
    {
        "model_type": "qwen3",
        "head_dim": 12,
        "num_key_value_heads": 4,
        "intermediate_size": 336,
    },
    quantization={"group_size": 16, "bits": 4, "mode": "nvfp4"},
    per_layer=lambda path, module: "embed" not in path,
)


def qqmm(
    x: mx.array,
    w: mx.array,
    scales: mx.array,
    group_size: int,
    bits: int,
    mode: str,
) -> mx.array:
    """What MLX's qqmm means, which runs on GPUs alone."""
    rows = x.reshape(-1, x.shape[-1])
    padded = mx.pad(rows, ((0, -len(rows) % 32), (0, 0)))  # the CPU asks for that
    packed = mx.quantize(padded, group_size, bits, mode)
    rounded = mx.dequantize(*packed, None, group_size, bits, mode)[: len(rows)]
    wide = mx.dequantize(w, scales, None, group_size, bits, mode)
    return rounded.reshape(x.shape).astype(mx.float32) @ wide.astype(mx.float32).T


@pytest.fixture
def folder_and_logits(
    comm: Communicator, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, np.ndarray]:
    monkeypatch.setattr(mx, "qqmm", qqmm)

    def save(folder: Path) -> Any:
        MODEL.save(folder)
        edit_config(folder, quantize_activations=True)
        return folder, as_numpy(load_model(folder)[0](mx.array(TOKENS)))

    return kept(comm, "quantized-activations", save)


def test_groups_are_quantized_whole(
    comm: Communicator, folder_and_logits: tuple[Path, np.ndarray]
) -> None:
    folder, expected = folder_and_logits
    model, _ = load_split(folder, comm)
    gathered = {m.path for m in model.slice_table.matrices.values() if m.gathers_inputs}
    o_proj = {f"model.layers.{layer}.self_attn.o_proj" for layer in range(2)}
    assert gathered == (o_proj if comm.size > 2 else set())
    error = np.abs(as_numpy(model(mx.array(TOKENS))) - expected).max()
    assert error <= TOLERANCE[mx.float32] * np.abs(expected).max()


def test_fewer_groups_than_ranks(folder_and_logits: tuple[Path, np.ndarray]) -> None:
    """Six groups of inputs, of which eight ranks with a head each have parts."""
    model = build(folder_and_logits[0]).model
    with pytest.raises(ValueError, match="o_proj quantizes its inputs in 6 groups"):
        slice_table(model, [1] * 8)


def test_a_device_that_cannot(
    comm: Communicator,
    folder_and_logits: tuple[Path, np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def cannot(*_: Any, **__: Any) -> NoReturn:
        raise RuntimeError("[QQMatmul] NYI for the general case")

    folder, _ = folder_and_logits
    monkeypatch.setattr(mx, "qqmm", cannot)
    says = r"quantize_activations, as in \S+, .* set it to false there"
    with pytest.raises(UsageError, match=says):
        load_split(folder, comm)
