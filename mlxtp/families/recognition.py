"""Model types that the table does not know, recognised from their modules.

Only shapes that can be cut in one way are: separate projections of queries, keys and
values, latent attention, usual MLPs and experts. What a fused projection holds in
which order does not show, nor what a forward pass does besides: nothing is recognised
whose code has signs of that.
"""

import inspect
import re
from collections.abc import Iterable, Iterator

import mlx.core as mx
import mlx.nn as nn

from mlxtp.families.attention import ATTENTION, LATENT, NORM_PER_HEAD, WIDE_NORMS
from mlxtp.families.blocks import Block, Family, blocks_of, child
from mlxtp.families.mlp import (
    EXPERTS,
    FC12,
    GATE_AND_UP,
    GATED,
    ROUTERS,
    SWITCH,
    UP_DOWN,
    W123,
)
from mlxtp.families.vocabulary import embedding, head

# Heads under KV heads in turns, experts that do nothing, a product with the weight of
# the embedding, all heads taken to be as wide as the hidden vector.
SIGNS = re.compile(
    r"tile\(|zero_expert|embed\w*\.weight|reshape\([^()]*\b(D|hidden_size)\b"
)

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
    # That the last layer's output reaches no cache cannot be seen: it may.
    family = Family(blocks, shared=ROUTERS, loops=True)
    unknown = sorted(set(_unknown(modules, family)))
    if unknown:
        more = f" and {len(unknown) - 4} more" if len(unknown) > 4 else ""
        raise ValueError(
            f"mlxtp does not know the model type {name!r}, and it is not like one that "
            f"it knows: {', '.join(unknown[:4])}{more}. Add a line for it to TABLE in "
            "mlxtp/families/table.py, with the blocks that it is made of; "
            "where one is missing, describe it in attention.py, mlp.py or recurrent.py "
            "beside it"
        )
    names = dict.fromkeys(
        block.name for m in modules.values() for block in blocks_of(m, family)
    )
    return family, (
        f"the model type {name!r} is not in mlxtp's table; recognised from its "
        f"modules: {', '.join(sorted(names))}. Compare its first tokens with mlx-lm's"
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
        if set(family.shared) & set(names):
            continue
        if _is_norm(module):
            if above not in modules or _is_wide(module, modules[above], family):
                yield path
            continue
        own = list(blocks_of(module, family))
        if (own or not path) and _is_its_own(module):
            yield f"{path} ({type(module).__name__} computes in a way of its own)"
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


def _is_its_own(module: nn.Module) -> bool:
    """Whether a module's forward pass shows signs, or is somewhere else."""
    call = type(module).__call__
    return not inspect.isfunction(call) or bool(SIGNS.search(inspect.getsource(call)))


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__


def _is_wide(norm: nn.Module, around: nn.Module, family: Family) -> bool:
    """Whether a norm within a block runs over more than one head, and is not cut."""
    name = next((k for k, v in around.items() if v is norm), "")
    own = [b for b in family.blocks if b.rule is not None and b.fits(around)]
    cut_children = {
        child_name: cut for block in own for child_name, cut in block.cuts.items()
    }
    rows = [child(around, n) for n, cut in cut_children.items() if cut.style == "row"]
    widths = {row.weight.shape[-1] for row in rows if row is not None}
    weight = child(norm, "weight")
    return name not in cut_children and weight is not None and weight.size in widths
