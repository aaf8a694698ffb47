"""A tiny checkpoint of any model type."""

from pathlib import Path

import zoo
from kept import kept
from mlx_lm.utils import (
    quantize_model,
    save_config,
    save_model,
)

from mlxtp import Communicator


def saved(
    model_type: str, comm: Communicator, bits: int | None = None, group_size: int = 32
) -> Path:
    """The folder of a tiny model of a type, for all ranks; nobody may change it."""

    def save(folder: Path) -> Path:
        model, config = zoo.build(model_type)
        if bits is not None:
            model, config = quantize_model(model, config, group_size, bits)
        save_model(folder, model)
        save_config(config, folder / "config.json")
        return folder

    packed = "" if bits is None else f"-{bits}-bits-{group_size}"
    return kept(comm, f"{model_type}{packed}", save)
