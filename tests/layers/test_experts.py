"""All ranks choose rank 0's experts, whatever their own arithmetic says."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import zoo
from every_type import RUNNABLE
from metal_kernels import use_plain_operations
from mlx.utils import tree_map_with_path
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP
from pyramid import sweep
from saved_types import saved

from mlxtp import Communicator
from mlxtp.layers.experts import routers
from mlxtp.layers.sums import outputs_unread
from mlxtp.loading import load_model as load_split

use_plain_operations()

PROMPT = mx.random.randint(0, zoo.VOCABULARY, (1, 256), key=mx.random.key(5))
# The last bit of bfloat16.
NOISE = 2**-8

MIXTURES = RUNNABLE


class Switched:
    """A communicator whose broadcasts can be left out; it counts them."""

    def __init__(self, comm: Communicator) -> None:
        self.comm, self.broadcasts, self.agrees = comm, 0, True

    def __getattr__(self, name: str) -> Any:
        return getattr(self.comm, name)

    def bcast(self, x: mx.array, root: int = 0, at: str = "") -> mx.array:
        self.broadcasts += 1
        return self.comm.bcast(x, root, at) if self.agrees else x


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """The indices of experts that layers were called with, in any order of slots."""
    indices: list[np.ndarray] = []
    for kind in SwitchGLU, SwitchMLP:

        def call(self: nn.Module, x: mx.array, which: mx.array, former: Any = kind.__call__) -> mx.array:
            indices.append(np.sort(np.array(which), axis=-1))
            return former(self, x, which)

        monkeypatch.setattr(kind, "__call__", call)
    return indices


@pytest.mark.parametrize("model_type", MIXTURES)
def test_one_choice(model_type: str, comm: Communicator, chosen: list[np.ndarray]) -> None:
    switched: Any = Switched(comm)
    model, _ = load_split(saved(model_type, comm), switched, agree_experts=True)
    if comm.rank == 1:
        add_noise_to_norms(model)

    def differing() -> int:
        chosen.clear()
        mx.eval(model(PROMPT, cache=make_prompt_cache(model)))
        everyones = comm.allgather_object(np.concatenate(chosen, axis=None) if chosen else np.zeros(0))
        return int(max((choice != everyones[0]).sum() for choice in everyones))

    layers = len(list(routers(dict(model.named_modules()), model.slice_table)))
    import time
    t=time.time()
    assert differing() == 0
    b = switched.broadcasts
    calls = len(chosen)
    switched.agrees = False
    d = differing()
    open(f"/tmp/unlike/res{comm.rank}", "a").write(f"{model_type} layers {layers} broadcasts {b} calls {calls} differ {d} of {sum(c.size for c in chosen)}\n")
    assert layers == calls


def add_noise_to_norms(model: nn.Module) -> None:
    key = mx.random.key(3)

    def noisy(path: str, weight: mx.array) -> mx.array:
        nonlocal key
        if "norm" not in path or weight.ndim > 1:
            return weight
        key, now = mx.random.split(key)
        sign = mx.random.randint(0, 2, weight.shape, key=now) * 2 - 1
        return (weight * (1 + NOISE * sign)).astype(weight.dtype)

    model.update(tree_map_with_path(noisy, model.parameters()))
