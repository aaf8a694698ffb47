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
from mlx.utils import tree_flatten
from mlx_lm.utils import quantize_model

from mlxtp.checkpoint import cut
from mlxtp.checkpoint.cut import Origin
from mlxtp.checkpoint.headers import WEIGHTS, Header
from mlxtp.checkpoint.tensors import DTYPES, StoredTensor
from mlxtp.comm.communicator import Communicator
from mlxtp.fetch import hub
from mlxtp.fetch.location import locate
from mlxtp.model import skeleton
from mlxtp.model.skeleton import EmptyModel

# In the words of safetensors; FP8 comes as bytes.
KINDS = {dtype: kind for kind, dtype in DTYPES.items() if kind != "F8_E4M3"}
GROUP_SIZE = 64


@dataclass(frozen=True)
class Opened:
    """A model that can be built again and again: for each rank, say."""

    name: str
    config: dict[str, Any]
    folder: Path

    def build(self) -> EmptyModel:
        return skeleton.build(self.folder)

    def bits(self) -> int | None:
        """Of its quantization, as the config says."""
        found = self.config.get("quantization") or {}
        return found.get("bits") if isinstance(found, dict) else None


@contextmanager
def opened(
    model: str, bits: int | None = None, group_size: int = GROUP_SIZE
) -> Iterator[Opened]:
    """Open a folder, a name on the hub, or with `bits` a config alone.

    Of a checkpoint the headers are read. With `bits` it is the config's model as
    mlx-lm would quantize it; 16 bits are not quantized.

    Raises: ValueError with what is wrong.
    """
    if bits is None:
        file = Path(model).expanduser()
        if file.is_file():
            raise ValueError(f"{model} is a config alone: say with how many --bits")
        if file.is_dir() and not any(file.glob(WEIGHTS)) and not cut.is_cut(file):
            raise ValueError(f"{model} has no weights: say with how many --bits")
        folder = locate(model, Communicator()).folder
        config = skeleton.read_json(folder / "config.json", needed=["model_type"])
        yield Opened(model, config, folder)
        return
    with of_config(model, config_of(model), bits, group_size) as found:
        yield found


def config_of(model: str) -> dict[str, Any]:
    """The config of a file, a folder or a name on the hub."""
    path = Path(model).expanduser()
    if path.is_dir():
        path = path / "config.json"
    if path.is_file():
        return skeleton.read_json(path, needed=["model_type"])
    if model.startswith((".", "/", "~")) or path.suffix == ".json":
        raise ValueError(f"there is no {model}")
    _, small = hub.small_files(model)
    if "config.json" not in small:
        raise ValueError(f"{model} on the hub has no config.json")
    return dict(json.loads(small["config.json"]))


@contextmanager
def of_config(
    name: str, config: dict[str, Any], bits: int, group_size: int = GROUP_SIZE
) -> Iterator[Opened]:
    """The model of a config with so many bits, as a checkpoint that is nowhere.

    Raises: ValueError if mlx-lm cannot build or quantize it.
    """
    headers, config = _headers(config, bits, group_size)
    origin = Origin(name, None, {"model.safetensors": headers})
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        small = {"config.json": json.dumps(config).encode()}
        cut.begin(folder, origin, small)
        yield Opened(name, config, folder)


def _headers(
    config: dict[str, Any], bits: int, group_size: int
) -> tuple[Header, dict[str, Any]]:
    """What mlx-lm would write of the config's model; no array is evaluated."""
    config = {k: v for k, v in config.items() if not k.startswith("quantization")}
    try:
        model = skeleton.unloaded(config)
        dtype = str(config.get("torch_dtype") or config.get("dtype") or "bfloat16")
        model.set_dtype(getattr(mx, dtype.removeprefix("torch."), mx.bfloat16))
        if bits < 16:
            with contextlib.redirect_stdout(io.StringIO()):  # it tells the bits
                model, config = quantize_model(model, config, group_size, bits)
    except Exception as error:  # all that mlx-lm may stumble over in a config
        reason = str(error) if isinstance(error, ValueError) else repr(error)
        raise ValueError(
            f"mlx-lm cannot make a model of {bits} bits of the config: {reason}"
        ) from error
    tensors, offset = {}, 0
    for name, array in tree_flatten(model.parameters()):
        where = Path("model.safetensors")
        kind = KINDS[array.dtype]
        tensors[name] = StoredTensor.whole(name, kind, array.shape, where, offset)
        offset += array.nbytes
    return Header({"format": "mlx"}, tensors), config
