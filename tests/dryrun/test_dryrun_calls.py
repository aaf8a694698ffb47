"""What a call of a layer reads and computes, as a dry run counts it."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.switch_layers import SwitchLinear

from mlxtp.dryrun.calls import Call, record_calls

pytestmark = pytest.mark.once


def recorded(layer: nn.Module, *inputs: mx.array) -> Call:
    """The call of a model that consists of one layer."""
    calls: list[Call] = []
    model = nn.Module()
    model.layer = layer
    record_calls(model, calls)
    model.layer(*inputs)
    [call] = calls
    return call


def test_a_linear_layer_reads_its_weight_once() -> None:
    call = recorded(nn.Linear(16, 32, bias=False), mx.zeros((1, 5, 16)))
    assert call.path == "layer"
    assert (call.read_bytes, call.flops) == (4 * 16 * 32, 2 * 16 * 32 * 5)
    assert call.output_bytes == 4 * 5 * 32


def test_an_embedding_reads_a_row_for_each_token() -> None:
    call = recorded(nn.Embedding(1000, 8), mx.zeros((1, 3), mx.int32))
    assert (call.read_bytes, call.flops) == (4 * 8 * 3, 0)


def test_experts_read_as_many_as_are_chosen() -> None:
    """Of eight experts a token chooses two; two tokens meet in some of them."""
    experts = SwitchLinear(16, 32, 8, bias=False)
    one_expert = 4 * 16 * 32
    alone = recorded(experts, mx.zeros((1, 1, 1, 1, 16)), mx.zeros((1, 1, 2), mx.int32))
    assert alone.read_bytes == pytest.approx(2 * one_expert)
    assert alone.flops == pytest.approx(2 * 16 * 32 * 2)
    both = recorded(
        SwitchLinear(16, 32, 8, bias=False),
        mx.zeros((1, 2, 1, 1, 16)),
        mx.zeros((1, 2, 2), mx.int32),
    )
    assert both.read_bytes == pytest.approx((8 - 8 * 0.75**2) * one_expert)
