"""For each family of models, how each matrix is cut.

`families.TABLE` is the whole of it: mlx-lm's name of a model type -> its family, which
is made of the blocks of `attention`, `mlp`, `recurrent` and `vocabulary`. A new model
of a known family needs a line there.
"""

import mlx.nn as nn

from mlxtp.families.blocks import Block, Cut, Family
from mlxtp.families.recognition import recognise
from mlxtp.families.table import TABLE

__all__ = ["TABLE", "Block", "Cut", "Family", "name_of", "of"]


def name_of(model: nn.Module) -> str:
    """mlx-lm's name of the type of a model."""
    return type(model).__module__.rpartition(".")[2]


def of(model: nn.Module) -> tuple[Family, str]:
    """The family of a model of mlx-lm, and what there is to say of it.

    A type that the table does not know is recognised from its modules.

    Raises: ValueError, with what to add and where, if it cannot be.
    """
    name = name_of(model)
    if name in TABLE:
        return TABLE[name], ""
    return recognise(model, name)
