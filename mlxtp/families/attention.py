"""Attention: query and KV heads, in separate projections or in a fused one.

One allreduce a block, after the output projection.
"""

from mlxtp.families.blocks import Block, Cut, Heads, along, column, norm, row

# Names of the number of query heads under a KV head.
_RATIO = ("repeats", "n_kv_groups", "num_key_value_groups", "n_q_per_kv", "n_group")

ATTENTION = Block(
    "attention",
    needs=("q_proj",),
    rule=Heads(by_query=True),
    cuts={
        "q_proj": column("q"),
        "k_proj": column("kv"),
        "v_proj": column("kv"),
        "gate_proj": column("q"),
        "g_proj": column("q"),
        "sinks": along("q"),
        "attention_sink_bias": along("q"),
        "o_proj": row("q"),
        "out_proj": row("q"),
        "dense": row("q"),
    },
    sizes=dict.fromkeys(_RATIO, "q/kv"),
)


def fused(qkv: str, out: str, layout: str = "q kv kv", **sizes: str) -> Block:
    """Attention with one matrix for queries, keys and values."""
    return ATTENTION.but(
        f"attention, {layout} in {qkv}",
        needs=(qkv, out),
        cuts={qkv: column(layout), out: row("q")},
        sizes=sizes,
    )


# Norms of queries and keys run over all heads: one more, small allreduce.
WIDE_NORMS = ATTENTION.but(
    "attention, norms over all heads",
    needs=("q_proj", "q_norm"),
    rule=Heads(),
    cuts={"q_norm": norm("q"), "k_norm": norm("kv")},
    joint=("q_norm", "k_norm"),
    adapt="norm_together",
)
# Each head has a norm of its own.
NORM_PER_HEAD = ATTENTION.but(
    "attention, a norm for each head",
    cuts={"q_norm": along("q"), "k_norm": along("kv")},
)
NORM_LISTS = ATTENTION.but(
    "attention, a norm for each head",
    rule=Heads(),
    cuts={
        "q_layernorm.norms": Cut("items", "q"),
        "k_layernorm.norms": Cut("items", "kv"),
    },
)
ONE_KV_HEAD = ATTENTION.but("attention, one KV head", rule=Heads(kv=1))
# Four outputs share a byte, and a norm stands before the output projection.
TERNARY = ATTENTION.but(
    "attention, ternary",
    needs=("q_proj", "attn_sub_norm"),
    rule=Heads(),
    cuts={
        **dict.fromkeys(("q_proj",), Cut("repack", "q")),
        **dict.fromkeys(("k_proj", "v_proj"), Cut("repack", "kv")),
        "attn_sub_norm": norm("q"),
    },
)
# Gives queries, keys and values apart.
FUSED_IN_PARTS = fused("qkv_proj", "out_proj").but(rule=Heads())
# Takes the keys and values of another layer.
OTHERS_KV = ATTENTION.but(
    "attention over another layer's keys and values",
    rule=Heads(kv_from="args.num_kv_heads"),
)
SHORT_NAMES = ATTENTION.but(
    needs=("c_q", "c_k", "c_v"),
    cuts={
        "c_q": column("q"),
        "c_k": column("kv"),
        "c_v": column("kv"),
        "c_proj": row("q"),
    },
    sizes={"hidden_size": "q"},
)
TALKIE = ATTENTION.but(
    needs=("attn_query",),
    cuts={
        "attn_query": column("q"),
        "attn_key": column("kv"),
        "attn_value": column("kv"),
        "attn_resid": row("q"),
        "head_gain.head_g": along("q"),
    },
)
# Query head h reads KV head h mod KV.
TILED = ATTENTION.but(
    "attention, query heads in turns under the KV heads",
    rule=Heads(tiled=True),
    sizes={"config.n_shared_head": "q/kv"},
)
# Blocks of keys are chosen by index heads, one a KV head.
INDEXED = ATTENTION.but(
    "attention over chosen blocks",
    cuts={"index_q_proj": column("kv")},
    sizes={"index_n_heads": "kv"},
    shared={"index_k_proj": "one key head for all index heads"},
)
EXAONE = ATTENTION.but(adapt="attention.any_width")
GEMMA2 = ATTENTION.but(adapt="mask_of_batches")
BAICHUAN = fused("W_pack", "o_proj").but(
    cuts={"conv_k": along("kv", 2), "conv_v": along("kv", 2)},
    adapt="any_packed_width",
)
PHI3_SMALL = fused("query_key_value", "dense", "(q kv kv)").but(
    rule=Heads(), adapt="mask_of_own_heads"
)
# Convolutions over keys and values in place of a softmax.
CONVOLVED = ATTENTION.but(
    "gated mixer of convolved keys and values",
    needs=("key_conv",),
    cuts={"key_conv": along("kv"), "value_conv": along("kv")},
    sizes={"kv_dim": "kv"},
)
# A gate for each query head, outside of the attention it belongs to.
LOOP_GATE = Block(
    "gate for each head",
    needs=("weight", "bias"),
    when="num_heads",
    rule=Heads(kv_from="args.num_key_value_heads", by_query=True),
    cuts={"weight": along("q"), "bias": along("q")},
)

# Keys and values are made from a latent that all heads share; so is the cache.
LATENT = Block(
    "multi-head latent attention",
    needs=("kv_a_proj_with_mqa",),
    rule=Heads(kv=()),
    cuts={
        "q_proj": column("q"),
        "q_b_proj": column("q"),
        "kv_b_proj": column("q"),
        "embed_q": along("q"),
        "unembed_out": along("q"),
        "g_proj": column("q"),
        "o_proj": row("q"),
        "dense": row("q"),
    },
    shared={
        "q_a_proj": "a latent of all heads",
        "kv_a_proj_with_mqa": "a latent of all heads",
        "indexer": "every rank chooses the same keys",
    },
)
# Heads come in groups, whose outputs go through a projection of each group.
GROUPED_OUTPUT = Block(
    "latent attention with grouped outputs",
    needs=("o_a_proj", "o_b_proj"),
    rule=Heads(queries=("o_groups",), kv=()),
    cuts={
        "q_b_proj": column("q"),
        "sinks": along("q"),
        "o_a_proj": along("q"),
        "o_b_proj": row("q"),
    },
    sizes={"num_heads": "q"},
    shared={
        "q_a_proj": "a latent of all heads",
        "kv_proj": "one KV head for all query heads",
        "compressor": "one KV head for all query heads",
        "indexer": "every rank chooses the same keys",
    },
    adapt="count_groups",
)
