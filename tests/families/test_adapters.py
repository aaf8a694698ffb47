"""Blocks name their adapters, and every name is bound to one that is used."""

import pytest

from mlxtp.families import TABLE, attention, mlp, recognition, recurrent, vocabulary
from mlxtp.families.blocks import Block
from mlxtp.layers.adapt.table import ADAPTERS
from mlxtp.layers.replace import BUILDERS

pytestmark = pytest.mark.once


def named() -> set[str]:
    """The names that blocks know adapters by, in the table or beside it."""
    rooms = (attention, mlp, recurrent, vocabulary, recognition)
    blocks = [b for room in rooms for b in vars(room).values() if isinstance(b, Block)]
    blocks += [block for family in TABLE.values() for block in family.blocks]
    return {block.adapt for block in blocks} - {""}


def test_every_name_is_bound_and_every_bound_name_used() -> None:
    assert named() == ADAPTERS.keys()


def test_every_style_has_its_builder() -> None:
    styles = {
        cut.style
        for family in TABLE.values()
        for block in family.blocks
        for cut in block.cuts.values()
    }
    assert styles == BUILDERS.keys()
