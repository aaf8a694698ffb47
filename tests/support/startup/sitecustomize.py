"""Processes of one test run read the sources of transformers once.

Python imports this when it starts: launch/test puts the folder into PYTHONPATH. When
transformers is imported it reads all of its 3,000 sources twice, to know which names
each defines. That is more than half of what `import mlx_lm` takes, and hundreds of
processes start. What it makes of a folder is kept for the run.
"""

import os
import pickle
import sys
from collections.abc import Callable, Sequence
from hashlib import sha256
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

SCANNER = "transformers.utils.import_utils"


class KeepsScans(MetaPathFinder):
    """Finds the module that reads the sources, and changes it once it is loaded."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Leave all other modules to the other finders."""
        if name != SCANNER:
            return None
        spec = PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def load_and_change(module: ModuleType) -> None:
            load(module)
            if scan := getattr(module, "define_import_structure", None):
                module.define_import_structure = self._kept(scan)

        spec.loader.exec_module = load_and_change  # type: ignore[method-assign]
        return spec

    def _kept(self, scan: Callable[..., Any]) -> Callable[..., Any]:
        def kept(*where: object, **prefix: object) -> Any:
            key = sha256(repr((where, prefix)).encode()).hexdigest()
            file = self._folder / f"transformers-{key}.pickle"
            if not file.exists():
                part = file.with_suffix(f".{os.getpid()}")
                part.write_bytes(pickle.dumps(scan(*where, **prefix)))
                part.rename(file)
            return pickle.loads(file.read_bytes())

        return kept


if folder := os.environ.get("MLXTP_TESTS_KEPT"):
    sys.meta_path.insert(0, KeepsScans(Path(folder)))
