"""A tiny language model that ships with the package and tells short stories."""

from pathlib import Path

PATH: Path = Path(__file__).parent / "model"
