"""One language model on several machines: tensor parallelism for MLX over MPI.

Names are imported when they are first asked for: `import mlxtp` alone is quick, and
needs no package besides Python. Where MLX is installed without a backend, such a name
raises ImportError; a program of this package says that in a line, with status 2.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
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
    _check_backend()
    return getattr(import_module(f"mlxtp.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__


def _check_backend() -> None:
    """Raise ImportError if MLX is there without a backend.

    On Linux the package mlx has none; it is in another one, of the CPU or of CUDA.
    """
    if sys.platform != "linux" or find_spec("mlx") is None:
        return
    core = find_spec("mlx.core")
    if core is None or core.origin is None:
        return
    if not Path(core.origin).with_name("lib").joinpath("libmlx.so").exists():
        raise ImportError(
            "MLX has no backend here: pip install 'mlxtp[cpu]', or 'mlxtp[cuda12]' or "
            "'mlxtp[cuda13]' for a card of NVIDIA"
        )


# The name of a program while Python looks for it: of `python -m`, and the command.
if sys.argv and Path(sys.argv[0]).name in ("-m", "mlxtp"):
    try:
        _check_backend()
    except ImportError as error:
        print(f"mlxtp: error: {error}", file=sys.stderr)
        sys.exit(2)
