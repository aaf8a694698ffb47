"""The small model that comes with mlxtp, and what it was trained from."""

from pathlib import Path

PATH = Path(__file__).parent / "model"
