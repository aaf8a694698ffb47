"""The words of the table: what can be said of a matrix and how it is cut."""

from dataclasses import dataclass
from typing import Literal

# column: the rank holds some of the outputs. row: some of the inputs; the output
# is partial until it is summed over ranks. lookup: an embedding, some of the rows.
Style = Literal["column", "row", "lookup"]

# What the cut axis is made of, which decides where it may be cut and who owns what.
Axis = Literal["query heads", "kv heads", "mlp width", "vocabulary"]


@dataclass(frozen=True)
class Cut:
    style: Style
    axis: Axis


@dataclass(frozen=True)
class Architecture:
    """A family of models: its matrices, by the end of their path in the model.

    Parameters of modules that `cuts` does not name are replicated. `num_heads`
    and `num_kv_heads` are what the attention module calls its head counts.
    """

    cuts: dict[str, Cut]
    num_heads: str = "n_heads"
    num_kv_heads: str = "n_kv_heads"

    def cut_of(self, path: str) -> Cut | None:
        """How the module at `path` is cut; None if it is replicated."""
        return next(
            (
                cut
                for end, cut in self.cuts.items()
                if path == end or path.endswith("." + end)
            ),
            None,
        )
