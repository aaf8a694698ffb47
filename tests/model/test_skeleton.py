"""What mlx-lm says of a config and of tensors, in a line, alike in every form."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
import zoo
from mlx_lm.utils import load_model, quantize_model, save_config, save_model
from published import published
from reference import PROMPT, as_numpy, on_rank_0

from mlxtp import Communicator, loading
from mlxtp.comm.errors import UsageError
from mlxtp.model.skeleton import unloaded
from mlxtp.plan.model import open_model
from mlxtp.shard import shard


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """Fields of the language model at the top, as Qwen2-VL and others have them."""
    rest = dict(config)
    text = rest.pop("text_config")
    return {**text, **rest, "vision_config": {"depth": 2}}


def nested(config: dict[str, Any]) -> dict[str, Any]:
    """Fields of the language model in `text_config`, though the type has them above."""
    quantization = {k: v for k, v in config.items() if k.startswith("quantization")}
    text = {k: v for k, v in config.items() if k not in quantization}
    return {"model_type": config["model_type"], "text_config": text, **quantization}


# All types whose arguments mlx-lm finds at another place than it writes them to.
WRAPPED = {
    "kimi_k3": flat,
    "qwen2_vl": flat,
    "qwen3_5": flat,
    "qwen3_5_moe": flat,
    "qwen3_vl": flat,
    "deepseek_v41": nested,
    "muse_glimmer": nested,
}


def save(model_type: str, folder: Path) -> Any:
    model, config = zoo.build(model_type)
    if model_type.startswith("qwen"):
        model, config = quantize_model(model, config, 32, 4)
    folder.mkdir()
    save_model(folder, model)
    save_config(WRAPPED[model_type](config), folder / "config.json")
    return as_numpy(load_model(folder)[0](mx.array([PROMPT])))


@pytest.mark.parametrize(
    "model_type",
    # Ranks have nothing to do with it: one of them shows that.
    [
        pytest.param(t, marks=[] if t == "qwen3_5" else pytest.mark.once)
        for t in WRAPPED
    ],
)
def test_fields_at_another_place(
    model_type: str, comm: Communicator, shared_path: Path
) -> None:
    folder = shared_path / f"{model_type}-elsewhere"
    expected = on_rank_0(comm, lambda: save(model_type, folder))
    model, _ = loading.load_model(folder, comm)
    error = abs(as_numpy(model(mx.array([PROMPT]))) - expected).max()
    assert error <= 1e-4 * abs(expected).max()


@pytest.mark.once
@pytest.mark.parametrize("model_type", ["qwen3_5", "muse_glimmer"])
def test_fields_at_another_place_are_planned(model_type: str, tmp_path: Path) -> None:
    save(model_type, tmp_path / "m")
    for bits in (None, 4):
        with open_model(str(tmp_path / "m"), bits, 32) as planned:
            assert planned.build().sources


@pytest.mark.once
@pytest.mark.parametrize(
    ("model_type", "place"),
    [
        ("llama", ["hidden_size"]),
        ("qwen2_vl", ["text_config", "hidden_size"]),
        ("mistral3", ["text_config", "num_hidden_layers"]),
        ("kimi_linear", ["linear_attn_config", "kda_layers"]),
    ],
)
def test_what_a_config_lacks(model_type: str, place: list[str]) -> None:
    config = inner = zoo.tiny_config(model_type)
    *outer, key = place
    for name in outer:
        inner = inner[name]
    del inner[key]
    with pytest.raises(ValueError, match=f"^config.json lacks {key}$"):
        unloaded(config)


def test_of_many_fields_that_lack_five_are_named() -> None:
    with pytest.raises(ValueError, match=r"lacks (\w+, ){4}\w+ and \d+ more$"):
        unloaded({"model_type": "kimi_linear"})


def test_what_is_refused_is_refused_in_every_form(
    comm: Communicator, shared_path: Path
) -> None:
    """AWQ with indices of groups, and signs that are none: their values count."""
    awq, signs = (shared_path / name for name in ("indices", "signs"))

    def make() -> None:
        awq.mkdir()
        published("awq", awq)
        model, config = zoo.build("prism_hadamard_qwen35")
        save_model(signs, model)
        save_config(config, signs / "config.json")
        for folder, changed in ((awq, {"model.g_idx": mx.arange(64)}), (signs, {})):
            file = folder / "model.safetensors"
            tensors = dict(mx.load(str(file)))
            whole = tensors | changed
            if not changed:
                name = next(name for name in tensors if name.endswith(".signs"))
                whole |= {name: tensors[name] * 2}
            mx.eval(whole)
            mx.save_safetensors(str(file), whole, {"format": "mlx"})
            (folder / "model.safetensors.index.json").unlink(missing_ok=True)
        shard(signs, [1] * comm.size, signs.with_name("signs-cut"))

    on_rank_0(comm, make)
    if comm.rank == 0:
        with pytest.raises(ValueError, match="g_idx"):
            shard(awq, [1] * comm.size, awq.with_name("indices-cut"))
    with pytest.raises(UsageError, match=r"cannot build .*Found model\.g_idx"):
        loading.load_model(awq, comm)
    for form in (signs, signs.with_name("signs-cut")):
        with pytest.raises(UsageError, match=r"signs has other values than -1 and"):
            loading.load_model(form, comm)
