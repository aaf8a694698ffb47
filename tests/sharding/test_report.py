"""A slice table that is printed can be read, and says what the table says."""

import pytest
import zoo
from mlx_lm.utils import _get_classes
from reference import MODELS
from tiny import Tiny

from mlxtp.sharding.decide import slice_table
from mlxtp.sharding.table import SliceTable

pytestmark = pytest.mark.once

LLAMA = """\
block      matrix                             style    of  rank 0   bytes  rank 1   bytes
head       lm_head                            head    131  0:66    16.9kB  66:131  16.6kB
embedding  model.embed_tokens                 lookup  131  0:66    16.9kB  66:131  16.6kB
gated MLP  model.layers.0-1.mlp.gate_proj     column  112  0:56    28.7kB  56:112  28.7kB
gated MLP  model.layers.0-1.mlp.up_proj       column  112  0:56    28.7kB  56:112  28.7kB
gated MLP  model.layers.0-1.mlp.down_proj     row     112  0:56    28.7kB  56:112  28.7kB
attention  model.layers.0-1.self_attn.q_proj  column  128  0:64    32.8kB  64:128  32.8kB
attention  model.layers.0-1.self_attn.k_proj  column   32  0:16    8.19kB  16:32   8.19kB
attention  model.layers.0-1.self_attn.v_proj  column   32  0:16    8.19kB  16:32   8.19kB
attention  model.layers.0-1.self_attn.o_proj  row     128  0:64    32.8kB  64:128  32.8kB
           not cut, whole on every rank                            1.28kB          1.28kB
           all                                                      203kB           202kB
"""  # noqa: E501


def table_of(tiny: Tiny, ranks: int) -> SliceTable:
    model_class, args_class = _get_classes(tiny.full_config())
    return slice_table(
        model_class(args_class.from_dict(tiny.full_config())), [1] * ranks
    )


def test_a_line_for_matrices_that_are_alike() -> None:
    assert str(table_of(Tiny(), 2)) + "\n" == LLAMA


def test_numbers_of_layers_as_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three layers of a kind and one of another in turns."""
    config = {"num_hidden_layers": 12, "full_attention_interval": 4}
    monkeypatch.setitem(zoo.VARIANTS, "in-turns", ("qwen3_next", config))
    model, _ = zoo.build("in-turns")
    text = str(slice_table(model, [1] * 2))
    assert " model.layers.0-2,4-6,8-10.linear_attn.out_proj " in text
    assert " model.layers.3,7,11.self_attn.q_proj " in text


def test_a_part_of_many_spans_is_counted() -> None:
    text = str(slice_table(zoo.build("gpt2")[0], [1] * 3))
    assert "144 in 3 spans" in text and "120 in 3 spans" in text


@pytest.mark.parametrize("name", ["llama-8-2-biases", "affine-4-128", "bfloat16"])
def test_bytes_of_all_ranks(name: str) -> None:
    """What is cut once adds up, whatever the number of ranks."""
    whole = table_of(MODELS[name], 1).nbytes(0)
    for ranks in (2, 5):
        table = table_of(MODELS[name], ranks)
        for parameter, nbytes in whole.items():
            parts = [table.nbytes(rank)[parameter] for rank in range(ranks)]
            matrix = table.matrix_of(parameter)
            if matrix is None:
                assert parts == [nbytes] * ranks
            elif matrix.cut.layout in ("q", "v", "w") and matrix.cut.style != "row":
                assert sum(parts) == nbytes
