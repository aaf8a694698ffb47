"""One language model on several machines: tensor parallelism for MLX over MPI.

Names are imported when they are first asked for: `import mlxtp` alone is quick, and
needs no package besides Python.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlxtp.comm.communicator import Communicator
    from mlxtp.comm.errors import MLXTPError, RankLostError, UsageError
    from mlxtp.generation.agreed import agreed
    from mlxtp.generation.stream import stream_generate
    from mlxtp.generation.text import batch_generate, generate
    from mlxtp.loading import load, load_model
    from mlxtp.sharding.table import SliceTable

__all__ = [
    "Communicator",
    "MLXTPError",
    "RankLostError",
    "SliceTable",
    "UsageError",
    "__version__",
    "agreed",
    "batch_generate",
    "generate",
    "load",
    "load_model",
    "stream_generate",
]

# Where each name is defined.
_HOMES = {
    "Communicator": "comm.communicator",
    "MLXTPError": "comm.errors",
    "RankLostError": "comm.errors",
    "SliceTable": "sharding.table",
    "UsageError": "comm.errors",
    "agreed": "generation.agreed",
    "batch_generate": "generation.text",
    "generate": "generation.text",
    "load": "loading",
    "load_model": "loading",
    "stream_generate": "generation.stream",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return import_module("importlib.metadata").version("mlxtp")
    if name not in _HOMES:
        raise AttributeError(f"module 'mlxtp' has no attribute {name!r}")
    return getattr(import_module(f"mlxtp.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
