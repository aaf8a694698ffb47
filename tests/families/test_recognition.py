"""Types that the table does not know: recognised, and then right, or refused."""

import logging
from pathlib import Path

import mlx.core as mx
import pytest
import zoo
from every_type import PROMPT, REPRESENTATIVES, RUNNABLE, check_logits
from metal_kernels import use_plain_operations
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model
from pyramid import sweep
from reference import as_numpy, on_rank_0
from saved_types import saved

from mlxtp import Communicator
from mlxtp.families import TABLE
from mlxtp.loading import load_model as load_split

use_plain_operations()


@pytest.mark.ranks(3)
@pytest.mark.parametrize("model_type", sweep(RUNNABLE, REPRESENTATIVES))
def test_right_or_refused(
    model_type: str, comm: Communicator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlxtp.families.TABLE", {})
    folder = saved(model_type, comm)
    try:
        model, _ = load_split(folder, comm)
    except ValueError as error:
        assert "does not know the model type" in str(error)
        return
    whole = on_rank_0(comm, lambda: as_numpy(_prefilled(load_model(folder)[0])))
    check_logits(model_type, [_prefilled(model)], [whole])


def _prefilled(model):
    return model(mx.array([PROMPT]), cache=make_prompt_cache(model))


@pytest.mark.ranks(3)
def test_says_so_in_a_line(
    comm: Communicator,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("mlxtp.families.TABLE", {})
    folder = saved("qwen3_moe", comm)
    with caplog.at_level(logging.WARNING):
        load_split(folder, comm)
    said = [record.message for record in caplog.records]
    if comm.rank == 0:
        assert said == [
            "the model type 'qwen3_moe' is not in mlxtp's table; recognised from its "
            "modules: attention, embedding, experts, gated MLP. Compare its "
            "first tokens with mlx-lm's"
        ]
    else:
        assert not said


@pytest.mark.ranks(3)
def test_refusal_says_what_to_add_and_where(
    comm: Communicator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlxtp.families.TABLE", {})
    folder = saved("gpt2", comm)
    with pytest.raises(ValueError, match=r"c_attn.*Add a line for it to TABLE in"):
        load_split(folder, comm)


@pytest.mark.once
def test_the_table_knows_no_type_that_mlx_lm_has_not() -> None:
    assert not TABLE.keys() - zoo.model_types()


@pytest.mark.once
def test_a_package_that_is_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "olmo"}')
    mx.save_safetensors(str(tmp_path / "model.safetensors"), {"x": mx.zeros(1)})
    with pytest.raises(ValueError, match=r"'olmo': .*ai2-olmo"):
        load_split(tmp_path, Communicator())
