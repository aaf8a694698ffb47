"""The scripts in launch/, as modules and as programs."""

import subprocess
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from types import ModuleType

from five_hosts import ROOT


def module(name: str) -> ModuleType:
    """Import a script of launch/."""
    path = str(ROOT / "launch" / name)
    spec = spec_from_loader(name, SourceFileLoader(name, path))
    assert spec is not None and spec.loader is not None
    imported = module_from_spec(spec)
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    spec.loader.exec_module(imported)
    sys.dont_write_bytecode = before
    return imported


def script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a script of launch/."""
    words = [sys.executable, str(ROOT / "launch" / name), *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, timeout=60, cwd=ROOT)
