"""For each family of models, how each matrix is cut.

`TABLE` is the whole of it: mlx-lm's name of a model's module -> its family. A
new model of a known family needs a line there.
"""

from mlxtp.architectures.cuts import Architecture, Cut
from mlxtp.architectures.dense import DENSE

__all__ = ["TABLE", "Architecture", "Cut", "of"]

TABLE = {
    "llama": DENSE,
    "qwen2": DENSE,
    "qwen3": DENSE,
}


def of(model: object) -> Architecture:
    """The row of the table for an instance of a model of mlx-lm.

    Raises: ValueError, with the known names, if the table has no such row.
    """
    name = type(model).__module__.rpartition(".")[2]
    if name not in TABLE:
        raise ValueError(
            f"mlxtp cannot split the model type {name!r} yet; it can split "
            f"{', '.join(sorted(TABLE))} and what mlx-lm loads as one of them"
        )
    return TABLE[name]
