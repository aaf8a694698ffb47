"""A tiny checkpoint of any model type."""

from pathlib import Path

import zoo
from mlx_lm.utils import (
    quantize_model,
    save_config,
    save_model,
)


def saved(model_type: str, folder: Path, bits: int | None = None) -> Path:
    """The folder of a tiny model of a type."""
    folder = folder / ("types" if bits is None else "quantized") / model_type
    if not folder.exists():
        folder.mkdir(parents=True)
        model, config = zoo.build(model_type)
        if bits is not None:
            model, config = quantize_model(model, config, 64, bits)
        save_model(folder, model)
        save_config(config, folder / "config.json")
    return folder
