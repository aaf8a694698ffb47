"""Load the compiled collectives, after compiling them where that is to be done."""

from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import mlx.core as mx

from mlxtp.comm.native import build
from mlxtp.comm.native.build import BuildError


def load(say: Callable[[str], None]) -> ModuleType:
    """Return the module of the compiled collectives.

    `say` is given one line if they have to be compiled first, in 5 to 60 seconds.

    Raises: BuildError, a line that says why it cannot be had, and what to do.
    """
    extension = build.collectives()
    return _load(build.build(extension, build.cache_folder(), say))


@cache
def _load(path: Path) -> ModuleType:
    """Load a module once, and see that it takes MLX's arrays."""
    spec = spec_from_file_location(build.NAME, path)
    assert spec is not None and spec.loader is not None
    try:
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise BuildError(
            f"the compiled collectives do not load: {error}: rm -r {path.parent}"
        ) from None
    try:
        module.probe(mx.zeros(1))
    except TypeError:
        raise BuildError(
            f"MLX {version('mlx')} and nanobind {version('nanobind')} do not fit: "
            f"pip install '{build.NANOBIND}', or the one that this MLX was built with"
        ) from None
    return module
