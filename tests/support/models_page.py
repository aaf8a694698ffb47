"""docs/models.md, made from the table.

    python tests/support/models_page.py > docs/models.md

What is read off the table is read off a tiny model of each type (`zoo`).
"""

import re
from collections import Counter
from collections.abc import Iterable
from importlib.metadata import version

import zoo
from every_type import EVEN_WORLDS
from mlx_lm.utils import MODEL_REMAPPING

from mlxtp.families import TABLE, Block
from mlxtp.families.blocks import Heads
from mlxtp.layers.adapt.table import ADAPTERS
from mlxtp.sharding.decide import slice_table
from mlxtp.sharding.table import SliceTable

RANKS = 3
HEAD = """# Models

Every model type of mlx-lm {version}, and how it is split. This page is made from the
table in `mlxtp/families/` by `python tests/support/models_page.py`, and a test keeps
it true.

## How to read it
A model is made of blocks; the second half of this page says what each is. The
collectives are those of one token and one layer, on three ranks, without those of the
embedding (an allreduce) and of the head (a gather of the logits); where kinds of layers
differ, all their numbers stand there. mlx-lm quantizes the types that say so: affine
with 2 to 8 bits, mxfp4, nvfp4, mxfp8, other bits for each layer.

Each type is tested with a tiny model of random weights: its logits, its greedy tokens,
and that no rank holds more than 1.3 times an even share of what is cut, in float32 on
1, 3 and 5 ranks and in 4 bits on 5; one type of each kind of block on {worlds} ranks,
and its logits and tokens on 7. On three ranks come uneven shares, adapters (LoRA,
DoRA), drafts, prompts that mlx-lm saved, batches, and that layers which no cache
depends on may stay silent during prefill
(`tests/families/test_every_type.py`, `tests/test_with_every_type.py`). No published
checkpoint was at hand. Query heads that are shared out one by one are tested for each
kind of attention.

Prompts of unequal length are read in batches (`tests/generation/test_batch.py`), except
by these types, which mlx-lm cannot batch either and which raise on every rank:
{unbatched}.

Long prompts are read in two halves where that is faster, one of which computes while
the sums of the other travel (`mlxtp/generation/halves.py`). The caches are, to the
bit, those of a prompt that is read in two parts, and the second half sends nothing that
waits for a later collective of the first: both are tried with every type
(`tests/generation/test_halves.py`), and there is none for which it does not hold. With
`--max-kv-size` a part that does not fit the window is read whole: mlx-lm's mask hides
the first tokens, which such a window keeps, from all but the first token of a pass.

mlx-lm loads as others: {aliases}.

Read is whatever mlx-lm reads: what it writes itself, older conversions (such as those
with an unsplit `kv_b_proj`, plain or quantized), the published forms that it converts
while it loads, AWQ and GPTQ with and without zeros; the language model's fields at the
top of config.json or inside it, as mlx-lm takes them. All of it from a folder, cut
ahead of time, or by name from the hub. What mlx-lm refuses is refused in its words: AWQ
and GPTQ with indices of groups (`g_idx`), for instance, a quantized `kv_b_proj` of
bailing_moe_v3, any of kimi_vl.

A type that is not in the table is recognised from its modules where these can be cut in
one way only, and a line says so; else a message says what to add and where.

## Experts on unlike machines
Every rank computes the router, from a hidden state that is the same but for what its
own norms made of it. Where chips or builds of MLX differ, some ranks choose another of
two experts that are nearly tied, and the sum over ranks mixes parts of both.
`--agree-experts` (`agree_experts=True` in `mlxtp.load`) takes rank 0's choice, with one
collective more in each layer that has experts; a model without experts is as it was.
Routers that choose experts and weigh them give rank 0's choice. Of those that only
score (Klear, afmoe, dbrx, ernie4_5_moe, gpt_oss, hunyuan, jamba, kimi_k3, llama4,
minimax, mixtral, olmoe, phimoe, qwen3_moe and others like them) every rank gets rank
0's scores and chooses from the same bytes; muse_spark's block gets rank 0's input.
There a softmax or a sigmoid may still part two experts whose scores are tied to the
last bit of float32. Other choices stay each rank's own: which keys an index of
deepseek_v32, deepseek_v41, glm_moe_dsa or minimax_m3_vl lets attention see. A head then
sees what its rank has chosen, and no parts are mixed.
"""
NOTES = """
## Blocks
What is cut, by the names of modules, as far as a model has them. The terms say what
lies on the axis that is cut: `q` query heads, `kv` KV heads or groups of a state space,
`w` columns of an MLP, `v` rows of the vocabulary. Terms in parentheses come once for
every KV head. After a colon stands how many features a unit has, where terms differ in
that.
"""
COLUMNS = "| type | blocks | collectives a layer | quantized |"


def page() -> str:
    """The whole page."""
    lines = ["## Types", "", COLUMNS, "|---|---|---|---|"]
    blocks: dict[str, list[Block]] = {}
    for name in zoo.model_types():
        if name in zoo.UNAVAILABLE:
            used = TABLE[name].blocks
            made, quantized = "", f"not run: {zoo.UNAVAILABLE[name]}"
        else:
            model, _ = zoo.build(name)
            table = slice_table(model, [1] * RANKS)
            used = tuple(
                block
                for block in TABLE[name].blocks
                if any(shards.block == block for shards in table.blocks)
            )
            made = _collectives(table)
            fails = zoo.QUANTIZED_FAILS.get(name)
            quantized = f"no: {fails}" if fails else "yes"
        for block in used:
            if block not in blocks.setdefault(block.name, []):
                blocks[block.name].append(block)
        lines.append(f"| {name} | {_names(used)} | {made} | {quantized} |")
    lines += ["", "## Shared beside the blocks", "", *sorted(set(_shared()))]
    lines.append(NOTES.rstrip())
    for name in sorted(blocks):
        contents = dict.fromkeys(line for b in blocks[name] for line in _block(b))
        lines += ["", f"### {name}", "", *contents]
    head = HEAD.format(
        version=version("mlx-lm"),
        unbatched=", ".join(zoo.UNBATCHED),
        worlds=", ".join(map(str, EVEN_WORLDS)),
        aliases=", ".join(f"{a} as {b}" for a, b in sorted(MODEL_REMAPPING.items())),
    )
    return "\n".join([head, *lines]) + "\n"


def _names(blocks: Iterable[Block]) -> str:
    names = (b.name for b in blocks if b.name not in ("embedding", "head"))
    return "; ".join(dict.fromkeys(names))


def _collectives(table: SliceTable) -> str:
    """How many each kind of layer has."""
    counts: Counter[str] = Counter()
    for made in table.collectives():
        layer = re.match(r".*?\b(?:layers|blocks|h|kv_reuse_layers)\.\d+", made.path)
        if layer:
            counts[layer.group()] += 1
    kinds = sorted(set(counts.values()))
    return " or ".join(map(str, kinds))


def _shared() -> Iterable[str]:
    for name in zoo.model_types():
        for module, why in TABLE[name].shared.items():
            users = [t for t in zoo.model_types() if TABLE[t].shared.get(module) == why]
            yield f"- `{module}` ({', '.join(users)}): {why}"


def _block(block: Block) -> Iterable[str]:
    by_cut: dict[str, list[str]] = {}
    for name, cut in block.cuts.items():
        where = f", axis {cut.axis}" if cut.style == "along" and cut.axis else ""
        inner = ", summed inside of the block" if cut.inner else ""
        by_cut.setdefault(f"{cut.style} `{cut.layout}`{where}{inner}", []).append(name)
    for cut_name, names in by_cut.items():
        yield f"- {cut_name}: {', '.join(f'`{n}`' for n in names)}"
    for module, why in block.shared.items():
        yield f"- whole on every rank: `{module}`, {why}"
    if isinstance(block.rule, Heads) and block.rule.by_query:
        yield "- query heads one by one, where `--shares queries=` asks for it"
    if block.sums != "rows":
        yield "- one sum for the whole block"
    if block.joint:
        yield f"- one sum for {' and '.join(f'`{c}`' for c in block.joint)}"
    if block.more:
        yield "- one more, small allreduce"
    if block.adapt:
        yield f"- {(ADAPTERS[block.adapt].__doc__ or '').strip().splitlines()[0]}"


if __name__ == "__main__":
    print(page(), end="")
