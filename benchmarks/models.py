"""Checkpoints with random weights and the shapes of known models."""

from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.utils import _get_classes, quantize_model, save_config, save_model
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

# Meta's published config; the benchmarks say how many of its 16 layers they keep.
LLAMA_3_2_1B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "max_position_embeddings": 131072,
}

# Qwen's published config of the 30B mixture, 48 layers; its vocabulary is cut short.
QWEN3_30B_A3B: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "vocab_size": 8192,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "max_position_embeddings": 40960,
}


def take_experts_apart(folder: Path) -> None:
    """Make of stacked experts a tensor each, as Hugging Face publishes them."""
    file = folder / "model.safetensors"
    tensors = mx.load(str(file))
    if not any(".switch_mlp." in name for name in tensors):
        return
    apart = {}
    for name, tensor in tensors.items():
        if ".switch_mlp." not in name:
            apart[name] = tensor
            continue
        for number in range(tensor.shape[0]):
            expert = name.replace(".switch_mlp.", f".experts.{number}.")
            apart[expert] = tensor[number]
    new = file.with_suffix(".new.safetensors")
    mx.save_safetensors(str(new), apart, metadata={"format": "mlx"})
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    new.rename(file)


def make(
    folder: Path,
    config: dict[str, Any],
    dtype: mx.Dtype,
    bits: int | None = None,
    group_size: int = 64,
) -> Path:
    """Save a model of `config` with random weights, unless it is there already."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    model_class, args_class = _get_classes(config)
    mx.random.seed(0)
    model = model_class(args_class.from_dict(config))
    model.set_dtype(dtype)
    if bits is not None:
        model, config = quantize_model(model, config, group_size, bits)
    save_model(folder, model, donate_model=True)
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="b").save_pretrained(
        folder
    )
    save_config(config, folder / "config.json")
    return folder
