"""The table: mlx-lm's model types and the blocks that they are made of."""

from mlxtp.families import attention, mlp, recurrent
from mlxtp.families.attention import ATTENTION, LATENT, fused
from mlxtp.families.blocks import Block, Family, along
from mlxtp.families.mlp import EXPERTS, GATE_AND_UP, GATED, SWITCH, UP_DOWN
from mlxtp.families.vocabulary import (
    BARE_HEAD,
    NGRAMS,
    TIED_BY_WEIGHT,
    VOCABULARY,
    embedding,
    head,
    parallel,
)

_PER_LAYER = "a small projection of each layer's own embedding"
_POSITIONS = (embedding("wte", "wpe"), head("lm_head"))


def family(*blocks: Block, loops: bool = False, **shared: str) -> Family:
    """A family with `embed_tokens` and `lm_head`."""
    return Family((*blocks, *VOCABULARY), shared, loops)


def other(*blocks: Block) -> Family:
    """A family with other names for its embedding and its head."""
    return Family(blocks)


DENSE = family(ATTENTION, GATED)
MIXTURE = family(ATTENTION, SWITCH, GATED)
LATENT_MIXTURE = family(LATENT, SWITCH, GATED)
DELTA_MIXTURE = family(recurrent.DELTA_APART, ATTENTION, SWITCH, GATED)
WIDE_NORMS = family(attention.WIDE_NORMS, GATED)
SHORT_CONVOLUTIONS = family(
    ATTENTION, recurrent.SHORT_CONVOLUTION, SWITCH, GATED, mlp.W123
)
GEMMA4 = Family(
    (
        ATTENTION,
        mlp.experts("switch_glu"),
        GATED,
        *VOCABULARY,
        embedding("embed_tokens_per_layer"),
    ),
    shared={
        "router": mlp.ROUTERS["router"],
        "per_layer_model_projection": _PER_LAYER,
        "per_layer_input_gate": _PER_LAYER,
        "per_layer_projection": _PER_LAYER,
    },
)

TABLE: dict[str, Family] = {
    "Klear": family(ATTENTION, EXPERTS, GATED),
    "afm7": other(
        attention.FUSED_IN_PARTS,
        attention.OTHERS_KV,
        GATED,
        embedding("embedding"),
    ),
    "afmoe": family(ATTENTION, EXPERTS, GATED),
    "apertus": family(ATTENTION, UP_DOWN),
    "baichuan_m1": family(attention.BAICHUAN, GATED),
    "bailing_hybrid": Family(
        (
            LATENT,
            recurrent.DECAYING,
            SWITCH,
            GATED,
            embedding("word_embeddings"),
            head("lm_head"),
        )
    ),
    "bailing_moe": other(
        fused("query_key_value", "dense"),
        SWITCH,
        GATED,
        embedding("word_embeddings"),
        head("lm_head"),
    ),
    "bailing_moe_linear": other(
        recurrent.DECAYING,
        fused("query_key_value", "dense"),
        SWITCH,
        GATED,
        embedding("word_embeddings"),
        head("lm_head"),
    ),
    "bailing_moe_v3": other(
        LATENT,
        recurrent.KIMI_DELTA_FULL,
        SWITCH,
        GATED,
        embedding("word_embeddings"),
        head("lm_head"),
    ),
    "bitnet": family(attention.TERNARY, mlp.TERNARY),
    "cohere": family(attention.NORM_PER_HEAD, GATED, parallel("self_attn", "mlp")),
    "cohere2": family(ATTENTION, GATED, parallel("self_attn", "mlp")),
    "dbrx": other(
        fused("Wqkv", "out_proj", d_model="q"),
        mlp.experts("experts", "router"),
        mlp.mlp(("w1", "v1"), "w2"),
        embedding("wte"),
        head("lm_head"),
    ),
    "deepseek": MIXTURE,
    "deepseek_v2": LATENT_MIXTURE,
    "deepseek_v3": LATENT_MIXTURE,
    "deepseek_v32": LATENT_MIXTURE,
    "deepseek_v41": family(
        attention.GROUPED_OUTPUT,
        EXPERTS,
        GATED,
        attn_hc="mixes whole hidden vectors",
        ffn_hc="mixes whole hidden vectors",
    ),
    "dots1": family(ATTENTION, EXPERTS, GATED),
    "ernie4_5": DENSE,
    "ernie4_5_moe": MIXTURE,
    "exaone": other(
        attention.EXAONE,
        mlp.mlp(("c_fc_0", "c_fc_1"), "c_proj"),
        embedding("wte"),
        head("lm_head"),
    ),
    "exaone4": DENSE,
    "exaone_moe": MIXTURE,
    "falcon_h1": family(
        recurrent.MAMBA2, ATTENTION, GATED, parallel("mamba", "self_attn")
    ),
    "gear": family(attention.CONVOLVED, ATTENTION, GATED),
    "gemma": DENSE,
    "gemma2": family(attention.GEMMA2, GATED),
    "gemma3": DENSE,
    "gemma3_text": DENSE,
    "gemma3n": Family(
        (
            ATTENTION,
            mlp.SPARSE,
            GATED,
            embedding("embed_tokens"),
            embedding("embed_tokens_per_layer"),
        ),
        shared={
            "altup": "mixes whole hidden vectors",
            "altup_projections": "of whole hidden vectors, once a token",
            "altup_unembed_projections": "of whole hidden vectors, once a token",
            "laurel": "a low-rank step on the whole hidden vector",
            "per_layer_model_projection": _PER_LAYER,
            "per_layer_input_gate": _PER_LAYER,
            "per_layer_projection": _PER_LAYER,
        },
    ),
    "gemma4": GEMMA4,
    "gemma4_text": GEMMA4,
    "glm": family(ATTENTION, GATE_AND_UP),
    "glm4": family(ATTENTION, GATE_AND_UP),
    "glm4_moe": MIXTURE,
    "glm4_moe_lite": LATENT_MIXTURE,
    "glm_moe_dsa": LATENT_MIXTURE,
    "gpt2": other(fused("c_attn", "c_proj"), mlp.C_FC, *_POSITIONS),
    "gpt_bigcode": other(
        fused("c_attn", "c_proj", dim="q", kv_dim="kv"), mlp.C_FC, *_POSITIONS
    ),
    "gpt_neox": other(
        fused("query_key_value", "dense", "q"),
        mlp.mlp(("dense_h_to_4h",), "dense_4h_to_h"),
        parallel("attention", "mlp", when="use_parallel_residual"),
        embedding("embed_in"),
        head("embed_out"),
    ),
    "gpt_oss": family(ATTENTION, EXPERTS, GATED),
    "gptj": other(
        ATTENTION,
        mlp.mlp(("fc_in",), "fc_out"),
        parallel("attn", "mlp"),
        embedding("wte"),
        head("lm_head"),
    ),
    "granite": DENSE,
    "granitemoe": MIXTURE,
    "granitemoehybrid": family(
        recurrent.MAMBA2,
        ATTENTION,
        SWITCH,
        GATED,
        mlp.mlp(("input_linear",), "output_linear", "w w"),
        parallel("block_sparse_moe", "shared_mlp"),
    ),
    "helium": DENSE,
    "hunyuan": MIXTURE,
    "hunyuan_v1_dense": DENSE,
    "internlm2": other(
        fused("wqkv", "wo", "(q kv kv)"),
        mlp.W123,
        embedding("tok_embeddings"),
        head("output"),
    ),
    "internlm3": DENSE,
    "iquestloopcoder": family(ATTENTION, GATED, attention.LOOP_GATE, loops=True),
    "jamba": family(recurrent.MAMBA, ATTENTION, SWITCH, GATED),
    "kimi_k25": LATENT_MIXTURE,
    "kimi_k3": family(
        LATENT,
        recurrent.KIMI_DELTA_FUSED,
        mlp.NORMED_LATENT,
        GATED,
        self_attention_res_proj="one number of the whole hidden vector",
        mlp_res_proj="one number of the whole hidden vector",
        output_attn_res_proj="one number of the whole hidden vector",
    ),
    "kimi_linear": family(LATENT, recurrent.KIMI_DELTA, SWITCH, GATED),
    "kimi_vl": LATENT_MIXTURE,
    "laguna": MIXTURE,
    "lfm2": SHORT_CONVOLUTIONS,
    "lfm2-vl": SHORT_CONVOLUTIONS,
    "lfm2_moe": SHORT_CONVOLUTIONS,
    "lille-130m": other(
        fused("qkv_proj", "out_proj"), GATED, embedding("tok_embeddings")
    ),
    "llama": DENSE,
    "llama4": family(ATTENTION, EXPERTS, GATED),
    "llama4_text": other(
        ATTENTION, GATED, embedding("embed_tokens"), head("output"), TIED_BY_WEIGHT
    ),
    "longcat_flash": family(LATENT, mlp.ZERO_EXPERTS, GATED, loops=True),
    "longcat_flash_ngram": Family(
        (LATENT, mlp.ZERO_EXPERTS, GATED, NGRAMS, head("lm_head")), loops=True
    ),
    "mamba": other(recurrent.MAMBA_BY_STEPS, embedding("embeddings"), head("lm_head")),
    "mamba2": other(recurrent.MAMBA2, embedding("embeddings"), head("lm_head")),
    "mellum": MIXTURE,
    "mimo": DENSE,
    "mimo_v2_flash": MIXTURE,
    "minicpm": family(ATTENTION, GATED, TIED_BY_WEIGHT),
    "minicpm3": LATENT_MIXTURE,
    "minimax": family(attention.WIDE_NORMS, SWITCH, GATED),
    "minimax_m3_vl": family(
        attention.INDEXED.but(needs=("index_q_proj",)), ATTENTION, SWITCH, GATED
    ),
    "ministral3": DENSE,
    "mistral3": family(LATENT, ATTENTION, SWITCH, GATED),
    "mistral4": LATENT_MIXTURE,
    "mixtral": MIXTURE,
    "muse_glimmer": DENSE,
    "muse_spark": family(
        fused("qkvg_proj", "o_proj", "q kv kv q"),
        mlp.NORMED_EACH,
        gate=mlp.ROUTERS["gate"],
        pre_expert_proj="a latent of all experts",
        post_expert_proj="a latent of all experts",
        vision_tower="images are not taken",
        vision_adapter="images are not taken",
        vision_projection="images are not taken",
    ),
    "nanbeige": family(ATTENTION, GATED, loops=True),
    "nanochat": other(
        attention.SHORT_NAMES, mlp.C_FC, embedding("wte"), head("lm_head")
    ),
    "nemotron": family(ATTENTION, UP_DOWN),
    "nemotron-nas": family(ATTENTION, GATED, mlp.LINEAR),
    "nemotron_h": other(
        recurrent.MAMBA2_GROUP_NORM,
        ATTENTION,
        mlp.LATENT_SWITCH,
        mlp.FC12,
        UP_DOWN,
        embedding("embeddings"),
        head("lm_head"),
    ),
    "olmo": Family(
        (
            fused("att_proj", "attn_out"),
            mlp.mlp(("ff_proj",), "ff_out", "w w"),
            embedding("wte"),
            head("ff_out"),
        )
    ),
    "olmo2": WIDE_NORMS,
    "olmo3": WIDE_NORMS,
    "olmo_hybrid": family(recurrent.DELTA_SEPARATE, attention.WIDE_NORMS, GATED),
    "olmoe": family(attention.WIDE_NORMS, SWITCH, GATED),
    "openelm": other(
        fused("qkv_proj", "out_proj"),
        mlp.mlp(("proj_1",), "proj_2", "w w"),
        embedding("token_embeddings"),
        head("lm_head"),
    ),
    "phi": family(ATTENTION, mlp.FC12, parallel("self_attn", "mlp")),
    "phi3": family(fused("qkv_proj", "o_proj"), GATE_AND_UP),
    "phi3small": family(attention.PHI3_SMALL, UP_DOWN),
    "phimoe": MIXTURE,
    "phixtral": other(
        fused("Wqkv", "out_proj"),
        SWITCH,
        mlp.FC12,
        parallel("mixer", "moe"),
        embedding("wte"),
        head("linear"),
    ),
    "pixtral": DENSE,
    "plamo": family(attention.TILED, GATED, parallel("self_attn", "mlp")),
    "plamo2": family(
        recurrent.MAMBA_HEADS,
        fused(
            "qkv_proj", "o_proj", q_proj_dim="q", k_proj_dim="kv", v_proj_dim="kv"
        ).but(cuts={"q_weight": along("q"), "k_weight": along("kv")}),
        GATE_AND_UP,
    ),
    "plamo3": family(
        fused("qkv_proj", "o_proj", q_proj_dim="q", k_proj_dim="kv", v_proj_dim="kv"),
        GATE_AND_UP,
    ),
    "prism_hadamard_qwen35": DELTA_MIXTURE,
    "qwen": other(
        fused("c_attn", "c_proj"),
        mlp.mlp(("w1", "w2"), "c_proj"),
        embedding("wte"),
        head("lm_head"),
    ),
    "qwen2": DENSE,
    "qwen2_moe": MIXTURE,
    "qwen2_vl": DENSE,
    "qwen3": DENSE,
    "qwen3_5": DELTA_MIXTURE,
    "qwen3_5_moe": DELTA_MIXTURE,
    "qwen3_moe": MIXTURE,
    "qwen3_next": family(recurrent.DELTA, ATTENTION, SWITCH, GATED),
    "qwen3_vl": DENSE,
    "qwen3_vl_moe": MIXTURE,
    "recurrent_gemma": family(recurrent.GATED_RECURRENCE, attention.ONE_KV_HEAD, GATED),
    "rwkv7": other(
        recurrent.TIME_MIXING,
        recurrent.CHANNEL_MIXING,
        embedding("embeddings"),
        head("lm_head"),
    ),
    "seed_oss": family(ATTENTION, GATED, TIED_BY_WEIGHT),
    "smollm3": DENSE,
    "solar_open": MIXTURE,
    "spark2_5": other(
        fused("q_k_v_proj", "out_proj", q_size="q", kv_size="kv"),
        GATED,
        embedding("embedding"),
        head("lm_head"),
    ),
    "stablelm": family(
        attention.NORM_LISTS,
        GATED,
        parallel("self_attn", "mlp", when="use_parallel_residual"),
    ),
    "starcoder2": family(ATTENTION, mlp.C_FC),
    "step3p5": MIXTURE,
    "talkie": other(
        attention.TALKIE,
        mlp.mlp(("mlp_gate", "mlp_linear"), "mlp_resid"),
        BARE_HEAD,
        embedding("embed"),
    ),
    "telechat3": DENSE,
    "youtu_llm": LATENT_MIXTURE,
}
