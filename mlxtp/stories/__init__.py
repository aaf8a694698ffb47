"""Tiny language models that ship with the package: one tells short stories.

The other, of the same tokens, drafts for it.
"""

from pathlib import Path

PATH: Path = Path(__file__).parent / "model"
DRAFT_PATH: Path = Path(__file__).parent / "draft"

# What command lines call the draft.
DRAFT_NAME = "stories-draft"
