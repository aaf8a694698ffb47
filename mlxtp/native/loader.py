"""Load what was compiled of the package, and compile it where that is to be done."""

from functools import cache
from importlib.metadata import version
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import mlx.core as mx

from mlxtp.native import build
from mlxtp.native.build import BuildError, Extension, Say


def load(extension: Extension, say: Say) -> ModuleType:
    """Return the module of an extension.

    `say` is given one line if it has to be compiled first, in 5 to 60 seconds.

    Raises: BuildError, a line that says why it cannot be had, and what to do.
    """
    path = build.build(extension, build.cache_folder(), say)
    return _load(path, extension.name)


@cache
def reading() -> ModuleType | None:
    """Return the module that reads checkpoints; None where it has not been compiled.

    It is not compiled for it: plain MLX and Python read the same, in more time.
    """
    try:
        extension = build.reading()
        path = build.built(extension, build.cache_folder())
        return _load(path, extension.name) if path else None
    except (BuildError, OSError):
        return None


@cache
def _load(path: Path, name: str) -> ModuleType:
    """Load a module once, and see that it takes MLX's arrays."""
    spec = spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    try:
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise BuildError(
            f"what was compiled does not load: {error}: rm -r {path.parent}"
        ) from None
    try:
        module.probe(mx.zeros(1))
    except TypeError:
        raise BuildError(
            f"MLX {version('mlx')} and nanobind {version('nanobind')} do not fit: "
            f"pip install '{build.NANOBIND}', or the one that this MLX was built with"
        ) from None
    return module
