"""The slice table says what is whose, and the model holds just that."""

from pathlib import Path

import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes
from reference import MODELS
from tiny import Tiny, made_by_rank_0

import mlxtp
from mlxtp import Communicator
from mlxtp.model.skeleton import build
from mlxtp.partition.shares import Share
from mlxtp.sharding.decide import slice_table


def nbytes_held(model: nn.Module) -> int:
    return sum(p.nbytes for _, p in tree_flatten(model.parameters()))


@pytest.mark.parametrize(
    "name", ["llama-8-2-biases", "affine-4-128", "qwen3-64-4-tied"]
)
def test_the_table_says_what_is_held(
    name: str, comm: Communicator, shared_path: Path
) -> None:
    folder = made_by_rank_0(MODELS[name], shared_path / name, comm)
    empty = build(folder)
    slices = slice_table(empty.model, [1] * comm.size).slices(comm.rank)
    model, _ = mlxtp.load(folder, comm)
    expected = sum(
        part.size * empty.sources[path].dtype.size for path, part in slices.items()
    )
    assert nbytes_held(model) == expected
    assert sum(model.slice_table.nbytes(comm.rank).values()) == expected


def test_slices_of_all_ranks_make_the_whole() -> None:
    """Any world can be asked about, whatever the world that asks."""
    tiny = MODELS["llama-14-2-rope"]
    for ranks in (1, 2, 3, 5, 8, 14):
        model = _unsaved(tiny)
        table = slice_table(model, [1] * ranks)
        for name, shape in table.parameters.items():
            parts = [table.slices(rank)[name] for rank in range(ranks)]
            if parts[0].axis is None:
                assert {part.shape for part in parts} == {shape}
                continue
            indices = [i for p in parts for i in p.spans.indices]
            if "k_proj" in name or "v_proj" in name:  # ranks may share KV heads
                assert set(indices) == set(range(shape[parts[0].axis]))
            else:
                assert sorted(indices) == list(range(shape[parts[0].axis]))


def _unsaved(tiny: Tiny) -> nn.Module:
    model_class, args_class = _get_classes(tiny.full_config())
    return model_class(args_class.from_dict(tiny.full_config()))


def test_every_cut_follows_the_shares() -> None:
    shares = [4, 2, 1, 1]
    model = _unsaved(Tiny({"num_attention_heads": 64, "intermediate_size": 800}))
    for path, matrix in slice_table(model, shares).matrices.items():
        if matrix.cut.layout == "kv":  # two, which four ranks share
            continue
        held = [spans.length / matrix.features for spans in matrix.spans]
        assert held == pytest.approx([w / 8 for w in shares], abs=0.06), path


def test_the_parts_of_a_share_count_each_for_its_layers() -> None:
    shares = [Share(2, 1, 1), Share(1, 2, 1), Share(1, 1, 2)]
    model = _unsaved(
        Tiny({"num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": 128})
    )
    table = slice_table(model, shares)
    held = {
        path.rpartition(".")[2]: [spans.length for spans in matrix.spans]
        for path, matrix in table.matrices.items()
    }
    most = {name: lengths.index(max(lengths)) for name, lengths in held.items()}
    assert most["o_proj"] == 0 and most["down_proj"] == 1 and most["lm_head"] == 2
