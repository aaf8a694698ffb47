"""State spaces, linear attention and short convolutions.

One allreduce a block, after the output projection. The states that a rank caches are
those of its heads or channels.
"""

from mlxtp.families.blocks import Block, Heads, Width, along, column, norm, row

_STATES = "q:head_dim kv:ssm_state_size kv:ssm_state_size"

MAMBA2 = Block(
    "state space (Mamba 2)",
    needs=("in_proj", "conv1d", "dt_bias"),
    rule=Heads(("num_heads",), ("n_groups",), shared_groups=True, states=True),
    cuts={
        "in_proj": column(f"q:head_dim {_STATES} q:1"),
        "conv1d": along(_STATES),
        "dt_bias": along("q"),
        "A_log": along("q"),
        "D": along("q"),
        "norm": norm("q"),
        "out_proj": row("q"),
    },
    sizes={"intermediate_size": "q", "conv_dim": _STATES, "heads_per_group": "q/kv"},
)
MAMBA2_GROUP_NORM = MAMBA2.but(
    cuts={"norm": norm("q", groups="n_groups")},
)
# What decides the steps is projected from all channels: one more allreduce.
MAMBA = Block(
    "selective state space (Mamba)",
    needs=("in_proj", "x_proj", "dt_proj"),
    rule=Width("out_proj", share="attention"),
    cuts={
        "in_proj": column("w w"),
        "conv1d": along("w"),
        "x_proj": row("w", inner=True),
        "dt_proj": column("w"),
        "A_log": along("w"),
        "D": along("w"),
        "out_proj": row("w"),
    },
)
MAMBA_BY_STEPS = MAMBA.but(adapt="project_at_once")
MAMBA_HEADS = Block(
    "selective state space with heads",
    needs=("in_proj", "bcdt_proj"),
    rule=Heads(queries=("num_heads",), kv=(), states=True),
    cuts={
        "in_proj": column("q"),
        "conv1d": along("q"),
        "bcdt_proj": row("q", inner=True),
        "dt_proj": column("q"),
        "dt_bias": along("q"),
        "A_log": along("q"),
        "D": along("q"),
        "out_proj": row("q"),
    },
    sizes={"intermediate_size": "q"},
)

_DELTA_HEADS = Heads(("num_v_heads",), ("num_k_heads",), states=True)
_KKV = "kv:head_k_dim kv:head_k_dim q:head_v_dim"
DELTA = Block(
    "gated delta net",
    needs=("in_proj_qkvz",),
    rule=_DELTA_HEADS,
    cuts={
        "in_proj_qkvz": column(
            "(kv:head_k_dim kv:head_k_dim q:head_v_dim q:head_v_dim)"
        ),
        "in_proj_ba": column("(q q)"),
        "conv1d": along(_KKV),
        "dt_bias": along("q"),
        "A_log": along("q"),
        "out_proj": row("q"),
    },
    sizes={"key_dim": "kv", "value_dim": "q", "conv_dim": _KKV},
)
DELTA_APART = DELTA.but(
    needs=("in_proj_qkv", "in_proj_z"),
    cuts={
        "in_proj_qkv": column(_KKV),
        "in_proj_z": column("q"),
        "in_proj_b": column("q"),
        "in_proj_a": column("q"),
    },
)
DELTA_SEPARATE = Block(
    "gated delta net, separate projections",
    needs=("q_conv1d", "a_proj"),
    rule=_DELTA_HEADS,
    cuts={
        **dict.fromkeys(("q_proj", "k_proj"), column("kv")),
        **dict.fromkeys(("v_proj", "a_proj", "b_proj", "g_proj"), column("q")),
        **dict.fromkeys(("q_conv1d", "k_conv1d"), along("kv")),
        **dict.fromkeys(("v_conv1d", "A_log", "dt_bias"), along("q")),
        "o_proj": row("q"),
    },
    sizes={"key_dim": "kv", "value_dim": "q"},
)
_LOW_RANK = "a low-rank step that all heads share"
KIMI_DELTA = Block(
    "Kimi delta attention",
    needs=("f_b_proj",),
    rule=Heads(queries=("num_heads",), kv=(), states=True),
    cuts={
        **dict.fromkeys(("q_proj", "k_proj", "v_proj"), column("q")),
        **dict.fromkeys(("f_b_proj", "b_proj", "g_proj", "g_b_proj"), column("q")),
        **dict.fromkeys(("q_conv.conv", "k_conv.conv", "v_conv.conv"), along("q")),
        "A_log": along("q", 2),
        "dt_bias": along("q"),
        "o_proj": row("q"),
    },
    sizes={"projection_dim": "q"},
    shared={"f_a_proj": _LOW_RANK, "g_a_proj": _LOW_RANK},
)
KIMI_DELTA_FUSED = KIMI_DELTA.but(
    needs=("f_b_proj", "qkv_conv"),
    cuts={
        "qkv_proj": column("q q q"),
        "qkv_conv.conv": along("q q q"),
        "A_log": along("q"),
    },
    adapt="step_uncompiled",
)
KIMI_DELTA_FULL = KIMI_DELTA.but(
    needs=("f_proj", "q_conv1d"),
    cuts={
        "f_proj": column("q"),
        **dict.fromkeys(("q_conv1d", "k_conv1d", "v_conv1d", "A_log"), along("q")),
    },
    sizes={"projection_size": "q"},
)
DECAYING = Block(
    "linear attention with decay",
    needs=("query_key_value", "g_norm"),
    rule=Heads(states=True),
    cuts={
        "query_key_value": column("q kv kv"),
        "g_proj": column("q"),
        "g_norm": norm("q", groups="g_norm.groups"),
        "_slope": along("q"),
        "dense": row("q"),
    },
)
GATED_RECURRENCE = Block(
    "gated linear recurrence",
    needs=("rg_lru",),
    rule=Heads(queries=("num_heads",), kv=(), states=True),
    cuts={
        "linear_x": column("q"),
        "linear_y": column("q"),
        "conv_1d": along("q"),
        **dict.fromkeys(
            (
                "rg_lru.recurrent_param",
                "rg_lru.input_gate_weight",
                "rg_lru.input_gate_bias",
                "rg_lru.recurrent_gate_weight",
                "rg_lru.recurrent_gate_bias",
            ),
            along("q"),
        ),
        "linear_out": row("q"),
    },
    sizes={"rg_lru.num_heads": "q", "rg_lru.width": "q"},
)
SHORT_CONVOLUTION = Block(
    "short convolution",
    needs=("in_proj", "conv", "out_proj"),
    rule=Width("out_proj", share="attention"),
    cuts={"in_proj": column("w w w"), "conv": along("w"), "out_proj": row("w")},
    sizes={"args.hidden_size": "w"},
)
TIME_MIXING = Block(
    "time mixing (RWKV)",
    needs=("r_proj", "r_k"),
    rule=Heads(queries=("num_heads",), kv=(), states=True),
    cuts={
        **dict.fromkeys(("r_proj", "k_proj", "v_proj"), column("q")),
        **dict.fromkeys(("k_k", "k_a", "r_k", "g_norm"), along("q")),
        **dict.fromkeys(
            ("w_lora.lora.2", "a_lora.lora.2", "v_lora.lora.2", "g_lora.lora.2"),
            column("q"),
        ),
        # A cache of the channel mixing stands behind it.
        "o_proj": row("q", inner=True),
    },
    shared={
        **dict.fromkeys(("w_lora", "a_lora", "v_lora", "g_lora"), _LOW_RANK),
    },
    adapt="recurrent.any_width",
)
CHANNEL_MIXING = Block(
    "channel mixing (RWKV)",
    needs=("key", "value", "x_k"),
    rule=Width("value"),
    cuts={"key": column("w"), "value": row("w")},
)
