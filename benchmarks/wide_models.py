"""Checkpoints with random 4-bit weights and the real widths of large models."""

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes, quantize_model, save_config

FILE_BYTES = 1 << 30

# From the published configs, with a layer of each kind: config and quantization.
WIDE: dict[str, tuple[dict[str, Any], str]] = {
    "Llama 3.1 405B, 1 of 126 layers": (
        {
            "model_type": "llama",
            "hidden_size": 16384,
            "intermediate_size": 53248,
            "num_hidden_layers": 1,
            "num_attention_heads": 128,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "tie_word_embeddings": False,
            "max_position_embeddings": 131072,
        },
        "affine",
    ),
    "Qwen3-235B-A22B, 2 of 94 layers": (
        {
            "model_type": "qwen3_moe",
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "moe_intermediate_size": 1536,
            "num_hidden_layers": 2,
            "num_attention_heads": 64,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
            "vocab_size": 151936,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "tie_word_embeddings": False,
            "max_position_embeddings": 40960,
        },
        "affine",
    ),
    "DeepSeek-V3, a dense and a mixed of 61 layers": (
        {
            "model_type": "deepseek_v3",
            "hidden_size": 7168,
            "intermediate_size": 18432,
            "moe_intermediate_size": 2048,
            "num_hidden_layers": 2,
            "first_k_dense_replace": 1,
            "moe_layer_freq": 1,
            "num_attention_heads": 128,
            "num_key_value_heads": 128,
            "kv_lora_rank": 512,
            "q_lora_rank": 1536,
            "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 128,
            "v_head_dim": 128,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "n_group": 8,
            "topk_group": 4,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "vocab_size": 129280,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "max_position_embeddings": 4096,
        },
        "affine",
    ),
    "gpt-oss-120b, 2 of 36 layers": (
        {
            "model_type": "gpt_oss",
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_hidden_layers": 2,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "num_local_experts": 128,
            "num_experts_per_tok": 4,
            "sliding_window": 128,
            "layer_types": ["sliding_attention", "full_attention"],
            "vocab_size": 201088,
            "rope_theta": 150000,
        },
        "mxfp4",
    ),
}


def make_quantized(folder: Path, config: dict[str, Any], mode: str) -> Path:
    """Save a model of which no matrix was ever there in 16 bits.

    `mode` is MLX's mode of quantization: affine is in groups of 64, mxfp4 of 32.
    """
    folder.mkdir(parents=True)
    model_class, args_class = _get_classes(config)
    mx.random.seed(0)
    model = model_class(args_class.from_dict(config))
    model.set_dtype(mx.bfloat16)
    group_size = 64 if mode == "affine" else 32
    model, config = quantize_model(model, config, group_size, 4, mode)
    files: dict[str, str] = {}
    for number, tensors in enumerate(_in_files(_random_parameters(model))):
        file = f"model-{number}.safetensors"
        mx.save_safetensors(str(folder / file), tensors, metadata={"format": "mlx"})
        files |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save_config(config, folder / "config.json")
    return folder


def _in_files(tensors: Iterable[tuple[str, mx.array]]) -> Iterator[dict[str, mx.array]]:
    """The tensors of a file each, evaluated by whoever saves them."""
    file: dict[str, mx.array] = {}
    for name, tensor in tensors:
        size = sum(array.nbytes for array in file.values())
        if file and size + tensor.nbytes > FILE_BYTES:
            yield file
            file = {}
        file[name] = tensor
    yield file


def _random_parameters(model: nn.Module) -> Iterator[tuple[str, mx.array]]:
    """Parameters that keep activations near 1; vectors stay as mlx-lm sets them."""
    modules = dict(model.named_modules())
    for name, array in tree_flatten(model.parameters()):
        path, _, leaf = name.rpartition(".")
        module = modules.get(path, model)
        if "scales" in module and leaf in ("weight", "scales", "biases"):
            yield name, _quantized(leaf, array, module)
        elif array.ndim > 1:
            random = mx.random.normal(array.shape) / math.sqrt(array.shape[-1])
            yield name, random.astype(array.dtype)
        else:
            yield name, array


def _quantized(leaf: str, like: mx.array, module: nn.Module) -> mx.array:
    """A part of a quantized matrix whose rows have a norm of about 1."""
    if leaf == "weight":
        halves = (*like.shape[:-1], 2 * like.shape[-1])
        return mx.random.randint(0, 1 << 16, halves, mx.uint16).view(mx.uint32)
    inputs = module.scales.shape[-1] * module.group_size
    deviation = 1 / math.sqrt(inputs)
    if module.mode == "mxfp4":  # a power of two; the 16 numbers deviate by 2.9
        return mx.full(like.shape, 127 + round(math.log2(deviation / 2.9)), like.dtype)
    step = deviation * math.sqrt(12) / 16
    return mx.full(like.shape, step if leaf == "scales" else -7.5 * step, like.dtype)
