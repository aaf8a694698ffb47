"""Tiny models with random weights, in folders as mlx-lm writes them."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path
from mlx_lm.utils import _get_classes, quantize_model, save_config, save_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlxtp import Communicator

VOCABULARY = 131  # no multiple of anything


@dataclass(frozen=True)
class Tiny:
    """A tiny model: what it overrides in the config, its dtype, its quantization."""

    config: dict[str, Any] = field(default_factory=dict)
    dtype: mx.Dtype = mx.float32
    quantization: dict[str, Any] | None = None
    per_layer: Callable[[str, nn.Module], bool | dict[str, Any]] | None = None
    seed: int = 0

    def full_config(self) -> dict[str, Any]:
        """What its config.json has."""
        return {
            "model_type": "llama",
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "intermediate_size": 112,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "rms_norm_eps": 1e-5,
            "vocab_size": VOCABULARY,
            "tie_word_embeddings": False,
            "max_position_embeddings": 512,
            "rope_theta": 10000.0,
            "eos_token_id": VOCABULARY - 1,
            **self.config,
        }

    def save(self, folder: Path) -> None:
        """Write config, weights and tokenizer to a folder that is there."""
        config = self.full_config()
        model_class, args_class = _get_classes(config)
        model = model_class(args_class.from_dict(config))
        key = mx.random.key(self.seed)

        def spread(path: str, old: mx.array) -> mx.array:
            # Wide enough that greedy tokens differ from step to step.
            nonlocal key
            key, now = mx.random.split(key)
            noise = mx.random.normal(old.shape, key=now)
            if old.ndim == 1:
                return (0.2 * noise + ("norm" in path)).astype(self.dtype)
            scale = 0.2 if "embed" in path else 2.5 * old.shape[-1] ** -0.5
            return (scale * noise).astype(self.dtype)

        model.update(tree_map_with_path(spread, model.parameters()))
        if self.quantization is not None:
            model, config = quantize_model(
                model,
                config,
                self.quantization["group_size"],
                self.quantization["bits"],
                self.quantization.get("mode", "affine"),
                quant_predicate=self.per_layer,
            )
        save_model(folder, model)
        save_config(config, folder / "config.json")
        save_tokenizer(folder)


def save_tokenizer(folder: Path) -> None:
    """One character a token; the last of the vocabulary ends a text."""
    vocabulary = {chr(33 + i): i for i in range(94)}
    vocabulary |= {f"<{i}>": i for i in range(len(vocabulary), VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="!"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=f"<{VOCABULARY - 1}>"
    ).save_pretrained(folder)


def made_by_rank_0(tiny: Tiny, folder: Path, comm: Communicator) -> Path:
    """Save `tiny` in `folder` once, for all ranks."""
    with comm.agreement():
        if comm.rank == 0 and not (folder / "config.json").exists():
            folder.mkdir(parents=True)
            tiny.save(folder)
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    """Change entries of the config.json in a folder."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
