"""A model without its weights: from a checkpoint's headers, or from a config alone."""

import contextlib
import io
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import quantize_model

from mlxtp.checkpoint import cut, writing
from mlxtp.checkpoint.cut import Origin
from mlxtp.checkpoint.headers import Header, files_of, header_of
from mlxtp.checkpoint.tensors import Tensor, kind_of
from mlxtp.comm.communicator import Communicator
from mlxtp.fetch import hub
from mlxtp.fetch.location import locate, named
from mlxtp.model import skeleton
from mlxtp.model.skeleton import EmptyModel
from mlxtp.partition.spans import Slice

GROUP_SIZE = 64


@dataclass(frozen=True)
class PlannedModel:
    """A model that can be built again and again, once for each rank, say."""

    name: str
    config: dict[str, Any]
    folder: Path

    def build(self) -> EmptyModel:
        """Build it anew, without weights."""
        with named(self.name, self.folder):
            return skeleton.build(self.folder, name=self.name)

    def bits(self) -> int | None:
        """Return the bits of its quantization; None where the config names none."""
        quantization = self.config.get("quantization") or {}
        return quantization.get("bits") if isinstance(quantization, dict) else None


@contextmanager
def open_model(
    model: str,
    bits: int | None = None,
    group_size: int = GROUP_SIZE,
    option: str = "--bits",
) -> Iterator[PlannedModel]:
    """Open a folder, a name on the hub, or with `bits` a config alone.

    Without `bits` the headers of the checkpoint are read. With them it is the config's
    model as mlx-lm would quantize it; 16 bits are not quantized. `option` is
    the one that gives `bits`, for messages.

    Raises: ValueError that says what is wrong.
    """
    if bits is None:
        file = Path(model).expanduser()
        if file.is_file():
            raise ValueError(f"{model} is a config alone: say with how many {option}")
        if file.is_dir() and not files_of(file) and not cut.is_cut(file):
            raise ValueError(f"{model} has no weights: say with how many {option}")
        folder = locate(model, Communicator()).folder
        with named(model, folder):
            config = skeleton.read_json(folder / "config.json", needed=["model_type"])
        yield PlannedModel(model, config, folder)
        return
    with model_of_config(model, read_config(model), bits, group_size) as planned:
        yield planned


def read_config(model: str) -> dict[str, Any]:
    """Read the config of a file, a folder or a name on the hub.

    Raises: ValueError if there is none.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        return skeleton.read_json(path, needed=["model_type"])
    if model.startswith((".", "/", "~")) or path.suffix == ".json":
        raise ValueError(f"there is no {model}")
    repo, small = hub.small_files(model)
    folder = hub.snapshot(repo)
    if folder is None or "config.json" not in small:
        raise ValueError(f"{model} on the hub has no config.json")
    with named(model, folder):
        return skeleton.read_json(folder / "config.json", needed=["model_type"])


@contextmanager
def model_of_config(
    name: str, config: dict[str, Any], bits: int, group_size: int = GROUP_SIZE
) -> Iterator[PlannedModel]:
    """Open the model of a config with so many bits, as a checkpoint without slices.

    Raises: ValueError if mlx-lm cannot build or quantize it.
    """
    headers, config = _headers(config, bits, group_size)
    files = dict.fromkeys(headers.tensors, "model.safetensors")
    origin = Origin(name, None, {"model.safetensors": headers}, files)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        small = {"config.json": json.dumps(config).encode()}
        cut.begin(folder, origin, small)
        yield PlannedModel(name, config, folder)


def _headers(
    config: dict[str, Any], bits: int, group_size: int
) -> tuple[Header, dict[str, Any]]:
    """The header and config that mlx-lm would write; no array is evaluated."""
    config = {k: v for k, v in config.items() if not k.startswith("quantization")}
    try:
        model = skeleton.unloaded(config)
        dtype = str(config.get("torch_dtype") or config.get("dtype") or "bfloat16")
        model.set_dtype(getattr(mx, dtype.removeprefix("torch."), mx.bfloat16))
        if bits < 16:
            with contextlib.redirect_stdout(io.StringIO()):  # mlx-lm prints the bits
                model, config = quantize_model(model, config, group_size, bits)
            if not any(name.endswith(".scales") for name in _parameters(model)):
                raise ValueError(f"no matrix has rows of whole groups of {group_size}")
    except Exception as error:  # all that mlx-lm may stumble over in a config
        reason = str(error) if isinstance(error, ValueError) else repr(error)
        raise ValueError(
            f"mlx-lm cannot make a model of {bits} bits of the config: {reason}"
        ) from error
    tensors = {
        Tensor(name, kind_of(array.dtype), array.shape): Slice(array.shape)
        for name, array in _parameters(model).items()
    }
    beginning, _ = writing.layout(tensors)
    return header_of(Path("model.safetensors"), beginning), config


def _parameters(model: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))
