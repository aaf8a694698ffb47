"""A token or a position without a row gives NaN, on every number of ranks."""

import json
import warnings
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import zoo
from mlx_lm.models.cache import make_prompt_cache
from reference import as_numpy, on_rank_0
from saved_types import saved
from tiny import VOCABULARY, Tiny, made_by_rank_0

from mlxtp import Communicator
from mlxtp.loading import load_model

BEYOND = [VOCABULARY, VOCABULARY + 500_000_000, -1, -(2**31)]

TINY = {
    "untied": Tiny(),
    "tied": Tiny({"tie_word_embeddings": True}),
    "quantized": Tiny(
        {"tie_word_embeddings": True}, quantization={"bits": 4, "group_size": 32}
    ),
    "float16": Tiny(dtype=mx.float16),
    "lora": Tiny({"tie_word_embeddings": True}),
}
# Embeddings of another name, of n-grams, of each layer beside the model's own.
TYPES = ["mamba2", "longcat_flash_ngram", "gemma3n"]


def lora(folder: Path) -> Path:
    """An adapter of the embedding of a model in `TINY`."""
    folder.mkdir()
    key = mx.random.key(7)
    arrays = {
        f"model.embed_tokens.lora_{name}": mx.random.normal(shape, key=key)
        for name, shape in (("a", (VOCABULARY, 4)), ("b", (4, 64)))
    }
    mx.save_safetensors(str(folder / "adapters.safetensors"), arrays)
    parameters = {"rank": 4, "scale": 2.0, "dropout": 0.0}
    keys = {"keys": ["model.embed_tokens"]}
    config = {"num_layers": 2, "lora_parameters": parameters | keys}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def loaded(name: str, comm: Communicator, shared_path: Path) -> nn.Module:
    if name in TYPES:
        return load_model(saved(name, comm), comm)[0]
    folder = made_by_rank_0(TINY[name], shared_path / f"rows-{name}", comm)
    adapter: Any = None
    if name == "lora":
        adapter = on_rank_0(comm, lambda: lora(shared_path / "rows-adapter"))
    return load_model(folder, comm, adapter_path=adapter)[0]


@pytest.mark.parametrize("name", [*TINY, *TYPES])
def test_a_token_without_a_row_gives_nan(
    name: str, comm: Communicator, shared_path: Path
) -> None:
    model = loaded(name, comm, shared_path)
    rows = [[3, VOCABULARY - 1], *([5, token] for token in BEYOND)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits = as_numpy(model(mx.array(rows), cache=make_prompt_cache(model)))
    # The other row of the batch knows nothing of them.
    assert np.isfinite(logits[0]).all() and np.isnan(logits[1:, 1]).all()


def test_a_position_without_a_row_gives_nan(
    comm: Communicator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(zoo.VARIANTS, "gpt2-of-8", ("gpt2", {"n_positions": 8}))
    model, _ = load_model(saved("gpt2-of-8", comm), comm)
    cache = make_prompt_cache(model)
    assert np.isfinite(as_numpy(model(mx.array([[1] * 8]), cache=cache))).all()
    assert np.isnan(as_numpy(model(mx.array([[1]]), cache=cache))).all()
