"""Checkpoints in the forms that people publish."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import zoo
from mlx.utils import tree_flatten
from mlx_lm.utils import save_config

Tensors = dict[str, mx.array]


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


def as_converted(tensors: Tensors) -> Tensors:
    return tensors


def keys_and_values_together(tensors: Tensors) -> Tensors:
    """DeepSeek as it was converted before mlx-lm split kv_b_proj, in 4 bits."""
    made = {}
    for name, tensor in tensors.items():
        if ".embed_q." in name:
            values = tensors[name.replace("embed_q", "unembed_out")]
            both = mx.concatenate([tensor.swapaxes(1, 2), values], axis=1)
            stem = name.replace("embed_q.weight", "kv_b_proj")
            packed = mx.quantize(both.flatten(0, 1), 32, 4)
            leaves = ("weight", "scales", "biases")
            made |= {
                f"{stem}.{leaf}": x for leaf, x in zip(leaves, packed, strict=True)
            }
        elif ".unembed_out." not in name:
            made[name] = tensor
    return made


def awq(tensors: Tensors) -> Tensors:
    """(in, out / 8): eight outputs in an integer, and so the zeros of each group."""
    made = {}
    for name, tensor in tensors.items():
        if not name.endswith("_proj.weight"):
            made[name] = tensor
            continue
        stem, (outputs, inputs) = name.removesuffix(".weight"), tensor.shape
        for leaf, rows in (("qweight", inputs), ("qzeros", inputs // 32)):
            key = mx.random.key(len(made))
            bits = mx.random.randint(0, 2**31 - 1, (rows, outputs // 8), key=key)
            made[f"{stem}.{leaf}"] = bits
        scales = 0.01 + 0.01 * mx.random.uniform(shape=(inputs // 32, outputs))
        made[f"{stem}.scales"] = scales.astype(mx.float16)
    return made


def gptq(tensors: Tensors) -> Tensors:
    """As AWQ, symmetric: without zeros."""
    return {n: t for n, t in awq(tensors).items() if not n.endswith(".qzeros")}


def quantization(method: str) -> dict[str, Any]:
    given = {"quant_method": method, "bits": 4, "group_size": 32}
    return {"quantization_config": given}


CASES: dict[str, tuple[str, Callable[[Tensors], Tensors], dict[str, Any]]] = {
    "stacked": ("qwen3_moe", experts_apart, {}),
    "split": ("llama4", gates_and_ups_together, {}),
    "transposed": ("gpt2", transposed, {}),
    "turned": ("mamba2", convolutions_turned, {}),
    "added": ("qwen3_next", around_one, {}),
    "fp8": ("deepseek_v3", fp8, {}),
    "mxfp4": ("gpt_oss", mxfp4, {"quantization_config": {"quant_method": "mxfp4"}}),
    "awq": ("llama", awq, quantization("awq")),
    "gptq": ("qwen2", gptq, quantization("gptq")),
    "kv_b": (
        "glm4_moe_lite",
        keys_and_values_together,
        {"quantization": {"group_size": 32, "bits": 4}},
    ),
    "normed": ("baichuan_m1", as_converted, {}),
    "norm_head": ("bailing_moe", as_converted, {"norm_head": True}),
    "reshaped": ("rwkv7", as_converted, {}),
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
