"""Model types that the table does not know, recognised from their modules.

Only shapes that can be cut in one way are: separate projections of queries, keys and
values, latent attention, usual MLPs and experts. What a fused projection holds in
which order does not show.
"""

from collections.abc import Iterable, Iterator

import mlx.core as mx
import mlx.nn as nn

from mlxtp.architectures.attention import ATTENTION, LATENT, NORM_PER_HEAD, WIDE_NORMS
from mlxtp.architectures.cuts import Block, Family, child
from mlxtp.architectures.mlp import (
    EXPERTS,
    FC12,
    GATE_AND_UP,
    GATED,
    ROUTERS,
    SWITCH,
    UP_DOWN,
    W123,
)
from mlxtp.architectures.vocabulary import embedding, head

NAMES_OF_EMBEDDINGS = ("embed_tokens", "tok_embeddings", "word_embeddings", "wte")
NAMES_OF_HEADS = ("lm_head", "output")


def recognise(model: nn.Module, name: str) -> tuple[Family, str]:
    """Put a family together for a model, if all that it holds is of a known shape.

    Returns: the family, and a line that says what was recognised.

    Raises: ValueError, with what to add and where, if there is more to it.
    """
    modules = dict(model.named_modules())
    attention = _attention(modules.values())
    blocks: tuple[Block, ...] = (LATENT, attention, SWITCH, EXPERTS)
    blocks += (GATED, GATE_AND_UP, UP_DOWN, W123, FC12)
    blocks += tuple(embedding(n) for n in NAMES_OF_EMBEDDINGS)
    blocks += tuple(head(n) for n in NAMES_OF_HEADS)
    family = Family(blocks, shared=ROUTERS)
    unknown = sorted(set(_unknown(modules, family)))
    if unknown:
        more = f" and {len(unknown) - 4} more" if len(unknown) > 4 else ""
        raise ValueError(
            f"mlxtp does not know the model type {name!r}, and it is not like one that "
            f"it knows: {', '.join(unknown[:4])}{more}. Add a line for it to TABLE in "
            "mlxtp/architectures/families.py, with the blocks that it is made of; "
            "where one is missing, describe it in attention.py, mlp.py or recurrent.py "
            "beside it"
        )
    found = dict.fromkeys(
        block.name for block in blocks for m in modules.values() if block.fits(m)
    )
    return family, (
        f"the model type {name!r} is not in mlxtp's table; recognised from its "
        f"modules: {', '.join(found)}"
    )


def _attention(modules: Iterable[nn.Module]) -> Block:
    """Attention, by the norms that it has."""
    for module in modules:
        weight = child(module, "q_norm.weight")
        if weight is None or not ATTENTION.fits(module):
            continue
        if weight.ndim == 2:
            return NORM_PER_HEAD
        if weight.size == child(module, "q_proj").weight.shape[0]:
            return WIDE_NORMS
    return ATTENTION


def _unknown(modules: dict[str, nn.Module], family: Family) -> Iterator[str]:
    """What of the model no block accounts for."""
    for path, module in modules.items():
        above = path.rpartition(".")[0]
        names = path.split(".")
        if set(family.shared) & set(names) or _is_norm(module):
            continue
        own = [b for b in family.blocks if b.fits(module)]
        known = {name for block in own for name in (*block.cuts, *block.shared)}
        arrays = [k for k, v in module.items() if isinstance(v, mx.array)]
        parent = modules.get(above, module)
        listed = any(
            names[-1] in block.cuts or names[-1] in block.shared
            for block in family.blocks
            if block.fits(parent)
        )
        if arrays and not listed and not set(arrays) <= known:
            yield path or ", ".join(arrays)


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__
