"""All ranks choose rank 0's experts, whatever their own arithmetic says."""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
import zoo
from every_type import RUNNABLE
from metal_kernels import use_plain_operations
from mlx_lm.models import dbrx
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP
from pyramid import sweep
from saved_types import saved

from mlxtp import Communicator
from mlxtp.families import TABLE
from mlxtp.families.mlp import ROUTER_NAMES
from mlxtp.layers.parallelize import parallelize
from mlxtp.layers.sums import outputs_unread
from mlxtp.loading import load_model as load_split
from mlxtp.partition.shares import Shares
from mlxtp.sharding.decide import slice_table

use_plain_operations()

PROMPT = mx.random.randint(0, zoo.VOCABULARY, (1, 48), key=mx.random.key(5))
# Of a norm's weights: so much that some experts change places in every type.
NOISE = 2**-4

Chosen = list[list[int]]


def has_router(model_type: str) -> bool:
    family = TABLE[model_type]
    names = {
        *family.shared,
        *(name for block in family.blocks for name in block.shared),
    }
    return not names.isdisjoint(ROUTER_NAMES)


# The tiny models of these have no experts.
WITHOUT = {
    *("gemma4_text", "lfm2", "lfm2-vl", "minicpm3", "mistral3", "qwen3_5", "youtu_llm"),
    "prism_hadamard_qwen35",
}
MIXTURES = [t for t in RUNNABLE if t in TABLE and has_router(t) and t not in WITHOUT]

# Routers that choose, one beside the experts, one that scores, one that does neither.
QUICK = ["deepseek_v3", "gemma4", "gpt_oss", "muse_spark"]


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Chosen:
    """The experts of each token, in each call of a layer of experts."""
    calls: Chosen = []

    def record(kind: type, indices: Any) -> None:
        former = kind.__call__

        def call(self: nn.Module, x: mx.array, *which: mx.array) -> mx.array:
            calls.append(indices(self, *which))
            return former(self, x, *which)

        monkeypatch.setattr(kind, "__call__", call)

    for kind in SwitchGLU, SwitchMLP:
        # The slots of a token have no order.
        record(kind, lambda _, which: mx.sort(which, axis=-1).flatten().tolist())
    # A list of experts, each called with a token that chose it.
    record(dbrx.MLP, lambda expert: [id(expert)])
    return calls


class OfRank0(Communicator):
    """A world of one whose broadcasts bring what an earlier call has broadcast.

    `root` holds that, by the layers' paths; while it is None, `sent` takes it down.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, mx.array] = {}
        self.root: dict[str, mx.array] | None = None

    def bcast(self, x: mx.array, root: int = 0, at: str = "") -> mx.array:
        if self.root is not None:
            return self.root.pop(at)
        assert at not in self.sent
        self.sent[at] = x
        return x


@pytest.mark.once
@pytest.mark.parametrize("model_type", sweep(MIXTURES, QUICK))
def test_every_type_takes_the_choice_of_rank_0(model_type: str, chosen: Chosen) -> None:
    comm = OfRank0()
    model, _ = zoo.build(model_type)
    table = slice_table(model, Shares([1]))
    parallelize(model, table, comm, agree_experts=True)
    of_rank_0, sent = choices(model, chosen), comm.sent
    assert len(sent) == (2 if model_type == "dbrx" else len(of_rank_0)) > 0
    add_noise_to_norms(model)
    comm.sent = {}
    assert choices(model, chosen) != of_rank_0, "the noise changes no choice"
    comm.root = sent.copy()
    assert choices(model, chosen) == of_rank_0
    assert not comm.root


def choices(model: nn.Module, chosen: Chosen) -> Chosen:
    """Read a prompt, and return the choices of experts that were made."""
    chosen.clear()
    mx.eval(model(PROMPT, cache=make_prompt_cache(model)))
    return chosen.copy()


def add_noise_to_norms(model: nn.Module) -> None:
    """Change the weights of all norms, each by `NOISE` of it up or down."""
    key = mx.random.key(3)
    for module in model.modules():
        if "Norm" in type(module).__name__ and "weight" in module:
            key, now = mx.random.split(key)
            signs = mx.random.randint(0, 2, module.weight.shape, key=now) * 2 - 1
            noisy = module.weight * (1 + NOISE * signs)
            module.weight = noisy.astype(module.weight.dtype)


@pytest.mark.once
def test_nothing_is_agreed_on_for_what_nobody_reads() -> None:
    comm = OfRank0()
    model, _ = zoo.build("gpt_oss")
    table = slice_table(model, Shares([1]))
    parallelize(model, table, comm, agree_experts=True)
    with outputs_unread():
        model(PROMPT, cache=make_prompt_cache(model))
    assert list(comm.sent) == ["model.layers.0.mlp.router"]


@pytest.mark.parametrize("model_type", QUICK)
def test_over_ranks(model_type: str, comm: Communicator, chosen: Chosen) -> None:
    """All ranks choose alike, though one computes otherwise; and what that costs."""
    folder = saved(model_type, comm)
    model, _ = load_split(folder, comm, agree_experts=True)
    if comm.rank == comm.size - 1:
        add_noise_to_norms(model)
    mine = choices(model, chosen)
    assert all(others == mine for others in comm.allgather_object(mine))
    # A token makes one collective more in each layer of experts, and no other.
    cache = make_prompt_cache(model)
    comm.traffic.reset()
    mx.eval(model(PROMPT[:, :1], cache=cache))
    made = len(model.slice_table.collectives()) + len(mine)
    assert comm.traffic.calls == (made if comm.size > 1 else 0)
