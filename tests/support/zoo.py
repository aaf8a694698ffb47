"""A tiny config for every model type of mlx-lm.

Each shows every kind of layer of its type, with what is optional switched on
where splitting has to mind it. The vocabulary is a prime, so that nothing
divides it; the widths are multiples of 32, so that everything can be quantized
in groups of 32.
"""

import ast
import copy
import dataclasses
import importlib
import pkgutil
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models
from mlx.utils import tree_map_with_path
from mlx_lm.models import phi3small
from mlx_lm.utils import _get_classes

VOCABULARY = 131
HIDDEN = 64
# Where the heads together are as wide as the hidden vector: heads of 8 columns, so that
# ranks share out groups of 32 about evenly.
WIDE = 128
HEADS = 16
KV_HEADS = 8
HEAD = 16
MLP = 320
EXPERTS = 6
PER_TOKEN = 2
EXPERT = 160
WINDOW = 8
GEAR = ["full_attention", "sliding_attention", "conv_mixer"]

# Set wherever a type has the field.
FIELDS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "n_embd": HIDDEN,
    "d_model": HIDDEN,
    "model_dim": HIDDEN,
    "hidden_dim": HIDDEN,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "n_layers": 2,
    "n_layer": 2,
    "num_attention_heads": HEADS,
    "num_heads": HEADS,
    "n_heads": HEADS,
    "n_head": HEADS,
    "num_key_value_heads": KV_HEADS,
    "num_kv_heads": KV_HEADS,
    "n_kv_heads": KV_HEADS,
    "head_dim": HEAD,
    "intermediate_size": MLP,
    "ffn_hidden_size": MLP,
    "max_position_embeddings": 512,
    "n_positions": 512,
    "sliding_window": WINDOW,
    "sliding_window_pattern": 2,
    "attention_bias": True,
    "mlp_bias": True,
    "qkv_bias": True,
    "use_qkv_bias": True,
    "attention_out_bias": True,
    "projectors_bias": True,
    "use_bias": True,
    "bias": True,
    "no_bias": False,
    "layer_norm_bias": True,
    "use_qk_norm": True,
    "qk_norm": True,
    "qk_layernorm": True,
    "rope_theta": 10000.0,
    "layer_types": ["sliding_attention", "full_attention"],
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
    # mixture of experts: a dense layer, then one with experts
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "moe_num_experts": EXPERTS,
    "num_experts_per_tok": PER_TOKEN,
    "num_experts_per_token": PER_TOKEN,
    "moe_topk": PER_TOKEN,
    "moe_intermediate_size": EXPERT,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "shared_intermediate_size": EXPERT,
    "shared_expert_intermediate_size": EXPERT,
    "moe_shared_expert_intermediate_size": EXPERT,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.5,
    "moe_router_enable_expert_bias": True,
    "use_expert_bias": True,
    "top_k_experts": PER_TOKEN,
    "n_group": 2,
    "num_expert_group": 2,
    "topk_group": 1,
    # multi-head latent attention, and the indexer of its sparse kind
    "q_lora_rank": 64,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "index_n_heads": 4,
    "index_head_dim": 32,
    "index_topk": 6,
    # linear attention
    "linear_num_value_heads": 16,
    "linear_num_key_heads": 8,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 2,
    "layer_group_size": 2,
    "group_norm_size": 4,
    # state space
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_n_heads": HEADS,
    "mamba_num_heads": HEADS,
    "mamba_d_head": 16,
    "mamba_head_dim": 16,
    "mamba_n_groups": 4,
    "mamba_proj_bias": True,
    "mamba_conv_bias": True,
    "mamba_rms_norm": True,
    "ssm_state_size": 16,
    "state_size": 16,
    "conv_kernel": 4,
    "n_groups": 4,
    "conv_L_cache": 3,
}

# Set only where a type has the field without a default.
REQUIRED: dict[str, Any] = {
    "rms_norm_eps": 1e-5,
    "norm_eps": 1e-5,
    "layer_norm_eps": 1e-5,
    "layer_norm_epsilon": 1e-5,
    "layernorm_epsilon": 1e-5,
    "rope_local_base_freq": 1000.0,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "rope_scaling": None,
    "partial_rotary_factor": 0.5,
    "mlp_only_layers": [0],
    "decoder_sparse_step": 1,
    "moe_layer_freq": 1,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "use_conv_bias": True,
    "conv_bias": True,
    "post_norm": True,
    "logits_scaling": 2.0,
    "attention_multiplier": 0.25,
    "embedding_multiplier": 4.0,
    "residual_multiplier": 0.5,
    "scale_depth": 1.4,
    "scale_emb": 4,
    "dim_model_base": 64,
}

ROPE = {"rope_theta": 10000.0, "rope_type": "default"}
ROPE_BY_KIND = {
    "sliding_attention": ROPE | {"rope_theta": 1000.0},
    "full_attention": ROPE,
}
YARN = {
    "type": "yarn",
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "beta_fast": 32,
    "beta_slow": 1,
}
# The queries are scaled by where they are: steeply here, within a few tokens.
LLAMA_4_ROPE = YARN | {
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 8,
    "llama_4_scaling_beta": 0.1,
}
KDA = {"num_heads": HEADS, "head_dim": 32, "short_conv_kernel_size": 4}
PACKED = [
    "model.embed_tokens",
    *(f"model.layers.0.linear_attn.{name}" for name in ("in_proj_qkv", "in_proj_z")),
    "model.layers.0.linear_attn.out_proj",
    *(f"model.layers.1.self_attn.{name}_proj" for name in "qkvo"),
    *(
        f"model.layers.{layer}.mlp.{name}_proj"
        for layer in range(2)
        for name in ("gate", "up", "down")
    ),
    "lm_head",
]
LONGCAT = {
    "expert_ffn_hidden_size": EXPERT,
    "moe_topk": 3,
    "zero_expert_type": "identity",
    "zero_expert_num": 2,
    "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True,
    "router_bias": True,
}

# What a type needs beyond these, or instead of them. A wrapper's are its text's.
OVERRIDES: dict[str, dict[str, Any]] = {
    # its inner norm is as wide as the hidden vector
    "bitnet": {"head_dim": HIDDEN // HEADS},
    "afm7": {
        "num_layers": 3,
        "num_kv_reuse_layers": 1,
        "hidden_dim_scale_factor": MLP / HIDDEN,
    },
    "baichuan_m1": {
        "sliding_window_layers": [0],
        "conv_window": 2,
        "num_swa_attention_heads": 8,
        "num_swa_key_value_heads": 4,
    },
    "cohere2": {"head_dim": HIDDEN // HEADS},
    "dbrx": {
        "ffn_config": {
            "ffn_hidden_size": EXPERT,
            "moe_num_experts": EXPERTS,
            "moe_top_k": PER_TOKEN,
        },
        "attn_config": {
            "kv_n_heads": KV_HEADS,
            "clip_qkv": 2.0,
            "rope_theta": 10000.0,
        },
    },
    "deepseek_v2": {
        "topk_method": "group_limited_greedy",
        "rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0.7},
    },
    # only the window; a source of everything; a second index; all taken over
    "deepseek_v41": {
        "num_hidden_layers": 4,
        "head_dim": 32,
        "o_groups": 8,
        "o_lora_rank": 32,
        "compress_ratios": [0, 2, 2, 2],
        "kv_source_layer_ids": [1],
        "index_source_layer_ids": [1, 2],
        "candidate_source_layer_id": 1,
        "candidate_topk_blocks": 2,
        "candidate_block_size": 2,
        "index_topk": 3,
    },
    "ernie4_5_moe": {
        "moe_layer_start_index": 1,
        "moe_k": PER_TOKEN,
        "moe_num_shared_experts": 1,
    },
    "exaone": {"head_dim": HIDDEN // HEADS},
    "exaone4": {"sliding_window_pattern": "LG"},
    "exaone_moe": {"is_moe_layer": [False, True]},
    "falcon_h1": {"mamba_d_ssm": 256, "lm_head_multiplier": 1.0},
    # as the small models: inputs of each layer, keys and values taken over
    "gemma3n": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 32,
        "altup_num_inputs": 2,
        "altup_coef_clip": 120.0,
        "altup_correct_scale": True,
        "altup_active_idx": 0,
        "laurel_rank": 32,
    },
    # as the large models: experts, and keys that are the values too
    "gemma4": {
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0,
        "num_global_key_value_heads": 4,
        "attention_k_eq_v": True,
        "enable_moe_block": True,
        "num_experts": EXPERTS,
    },
    # as the small models: inputs of each layer, keys and values taken over
    "gemma4_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 32,
        "global_head_dim": 32,
        "num_experts": None,
    },
    "gpt2": {"n_embd": WIDE, "n_ctx": 512, "num_key_value_heads": None},
    "gpt_bigcode": {"n_inner": MLP, "num_key_value_heads": None},
    "gpt_neox": {
        "hidden_size": WIDE,
        "rotary_emb_base": 10000,
        "rotary_pct": 0.5,
        "num_key_value_heads": None,
    },
    "gpt_oss": {"intermediate_size": EXPERT},
    "gptj": {"n_embd": WIDE, "rotary_dim": 4},
    # mlx-lm quantizes some layers of these in groups of 64 whatever it is told
    "granite": {"intermediate_size": 640},
    "granitemoe": {"intermediate_size": 320},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hunyuan": {
        "num_shared_expert": 1,
        "use_mixed_mlp_moe": True,
        "use_cla": True,
        "cla_share_factor": 2,
        "rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 1000.0},
    },
    "iquestloopcoder": {"loop_window_size": WINDOW},
    "jamba": {
        "attn_layer_offset": 1,
        "attn_layer_period": 2,
        "expert_layer_offset": 1,
        "expert_layer_period": 2,
        "mamba_expand": 2,
        "mamba_dt_rank": 32,
    },
    "kimi_k3": {
        "num_hidden_layers": 4,
        "linear_attn_config": KDA | {"kda_layers": [1, 3], "full_attn_layers": [2, 4]},
        "activation_situ_beta": 4.0,
        "activation_situ_linear_beta": 25.0,
        "attn_res_block_size": 2,
        "mla_use_output_gate": True,
        "routed_expert_hidden_size": 64,
        "latent_moe_use_norm": True,
    },
    "kimi_linear": {
        "linear_attn_config": KDA | {"kda_layers": [1], "full_attn_layers": [2]},
        "model_max_length": 512,
    },
    "laguna": {
        "num_attention_heads_per_layer": [16, 24],
        "moe_router_logit_softcapping": 5.0,
    },
    "lfm2": {
        "layer_types": ["conv", "full_attention"],
        "block_dim": HIDDEN,
        "block_ff_dim": MLP,
        "block_multiple_of": 32,
        "block_ffn_dim_multiplier": 1.0,
        "block_auto_adjust_ff_dim": False,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lille-130m": {"n_embd": WIDE, "block_size": 512},
    # three layers in chunks to one over everything
    "llama4": {
        "num_hidden_layers": 4,
        "num_experts_per_tok": 1,
        "intermediate_size": EXPERT,
        "intermediate_size_mlp": MLP,
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": WINDOW,
        "attn_temperature_tuning": 4,
        "floor_scale": 16,
    },
    "llama4_text": {
        "intermediate_size_mlp": MLP,
        "no_rope_layers": [1, 0],
        "tie_word_embeddings": True,
    },
    "longcat_flash": LONGCAT | {"attention_method": "MLA"},
    "longcat_flash_ngram": LONGCAT
    | {"ngram_vocab_size_ratio": 3, "emb_neighbor_num": 3, "emb_split_num": 2},
    "mamba": {
        "intermediate_size": 256,
        "time_step_rank": 32,
        "use_bcdt_rms": True,
    },
    "mamba2": {
        "intermediate_size": 256,
        "time_step_limit": [0.0, 100.0],
        "time_step_rank": 32,
    },
    "mellum": {"rope_parameters": ROPE_BY_KIND},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [0, 1],
        "moe_layer_freq": [0, 1],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": True,
        "sliding_window_size": WINDOW,
        "swa_rope_theta": 1000.0,
        "swa_num_attention_heads": HEADS,
        "swa_num_key_value_heads": 4,
        "swa_head_dim": HEAD,
        "swa_v_head_dim": 32,
        "attention_value_scale": 0.7,
    },
    # mlx-lm cannot load it tied
    "minicpm": {"tie_word_embeddings": False},
    "minicpm3": {
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [2.0, 2.2, 2.4, 2.6],
            "original_max_position_embeddings": 512,
        },
    },
    "minimax": {"intermediate_size": EXPERT, "rotary_dim": 8},
    "minimax_m3_vl": {
        "intermediate_size": EXPERT,
        "dense_intermediate_size": MLP,
        "mlp_layer_types": ["dense", "sparse"],
        "layer_types": ["full_attention", "sparse_attention"],
        "index_n_heads": KV_HEADS,
        "index_block_size": 4,
        "index_topk_blocks": 2,
    },
    "ministral3": {"rope_parameters": LLAMA_4_ROPE},
    "mistral4": {"rope_parameters": LLAMA_4_ROPE},
    "mixtral": {"intermediate_size": EXPERT},
    # mlx-lm quantizes the experts alone, of neither the first nor the last layer
    "muse_spark": {
        "num_hidden_layers": 3,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "layer_rope_theta": [10000.0, 0, 10000.0],
        "post_norm_eps": 1e-8,
        "output_multiplier": 0.2,
        "moe_hidden_size": 64,
        "num_shared_experts": 0,
    },
    "nanbeige": {"num_loops": 2},
    "nemotron": {"hidden_act": "relu2"},
    # attention of either group size, replaced and left out; the same for the MLP
    "nemotron-nas": {
        "hidden_size": WIDE,
        "num_hidden_layers": 4,
        "block_configs": [
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 2.6}},
            {
                "attention": {"replace_with_linear": True},
                "ffn": {"replace_with_linear": True},
            },
            {"attention": {"no_op": True}, "ffn": {"ffn_mult": 5.2}},
            {"attention": {"n_heads_in_group": 4}, "ffn": {"no_op": True}},
        ],
    },
    "nemotron_h": {
        "num_hidden_layers": 4,
        "hybrid_override_pattern": ["M", "*", "E", "-"],
        "moe_latent_size": 64,
    },
    "olmo": {
        "d_model": HIDDEN,
        "n_layers": 2,
        "mlp_hidden_size": 2 * MLP,
        "n_heads": HEADS,
        "vocab_size": VOCABULARY,
        "embedding_size": VOCABULARY,
    },
    "olmo_hybrid": {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_allow_neg_eigval": True,
    },
    "olmoe": {"intermediate_size": EXPERT},
    "openelm": {
        "num_transformer_layers": 2,
        "num_query_heads": [HEADS, 24],
        "num_kv_heads": [KV_HEADS, KV_HEADS],
        "ffn_multipliers": [1.0, MLP / HIDDEN],
        "ffn_dim_divisor": 32,
        "share_input_output_layers": False,
    },
    "phi": {"partial_rotary_factor": 0.5},
    # a sparse layer keeps blocks of 32 at least, another set for each head
    "phi3small": {
        "dense_attention_every_n_layers": 2,
        "ff_intermediate_size": MLP,
        "gegelu_limit": 20.0,
        "blocksparse_block_size": 32,
        "blocksparse_num_local_blocks": 1,
        "blocksparse_vert_stride": 2,
    },
    "phimoe": {"intermediate_size": EXPERT},
    "phixtral": {"model_dim": WIDE, "num_vocab": VOCABULARY, "rotary_dim": 4},
    "plamo": {"n_shared_head": 2},
    "plamo2": {"hidden_size_per_head": HEAD, "attention_window_size": WINDOW},
    "plamo3": {"window_size": WINDOW},
    # packed in groups of 128 and turned in blocks of 512, the smallest there are
    "prism_hadamard_qwen35": {
        "schema_version": 1,
        "tensor_namespace": "mlx-lm-text",
        "gdn_activation_layout": "grouped",
        "quantization": {"bits": 2, "group_size": 128, "mode": "affine"},
        "modules": [
            {
                "path": path,
                "embedding": path == "model.embed_tokens",
                "dtype": "float16",
                "block": 512,
            }
            for path in PACKED
        ],
        "hidden_size": 512,
        "intermediate_size": 2560,
        "head_dim": 64,
        "linear_value_head_dim": 64,
        "linear_key_head_dim": 64,
        "attention_bias": False,
        "tie_word_embeddings": False,
    },
    "qwen": {"kv_channels": HIDDEN // HEADS, "intermediate_size": 2 * MLP},
    "qwen3_5": {"num_experts": 0},
    "qwen3_5_moe": {"num_experts": EXPERTS},
    # mlx-lm cannot load it tied
    "qwen3_vl_moe": {"tie_word_embeddings": False},
    "recurrent_gemma": {
        "block_types": ["recurrent", "attention"],
        "conv1d_width": 4,
        "intermediate_size": 2 * MLP,
        "logits_soft_cap": 30.0,
        "attention_window_size": WINDOW,
        "num_key_value_heads": 1,
    },
    "rwkv7": {
        "head_dim": HIDDEN // HEADS,
        "a_low_rank_dim": 64,
        "v_low_rank_dim": 64,
        "gate_low_rank_dim": 64,
        "decay_low_rank_dim": 64,
    },
    "smollm3": {"no_rope_layer_interval": 2},
    "spark2_5": {"rope_parameters": ROPE_BY_KIND},
    "step3p5": {
        "num_attention_groups": KV_HEADS,
        "layer_types": ["full_attention", "sliding_attention"],
        "attention_other_setting": {
            "num_attention_heads": 24,
            "num_attention_groups": KV_HEADS,
        },
        "partial_rotary_factors": [0.5, 1.0],
        "moe_top_k": PER_TOKEN,
        "share_expert_dim": EXPERT,
        "moe_layers_enum": "1",
        "swiglu_limits": [0.0, 2.0],
        "swiglu_limits_shared": [0.0, 2.0],
    },
    "gear": {"num_hidden_layers": 3, "layer_types": GEAR},
}

# Other kinds of a type: its name, and what they have beside its config.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "stablelm-parallel": ("stablelm", {"use_parallel_residual": True}),
    "gpt_neox-in-turn": ("gpt_neox", {"use_parallel_residual": False}),
    "mamba2-one-group": ("mamba2", {"n_groups": 1}),
    "nemotron_h-one-group": ("nemotron_h", {"n_groups": 1}),
    "falcon_h1-no-norm": ("falcon_h1", {"mamba_rms_norm": False}),
    "llama-two-kv-heads": ("llama", {"num_key_value_heads": 2}),
    "olmo2-two-kv-heads": ("olmo2", {"num_key_value_heads": 2}),
    "internlm2-two-kv-heads": ("internlm2", {"num_key_value_heads": 2}),
    "qwen3_next-two-key-heads": ("qwen3_next", {"linear_num_key_heads": 2}),
    "deepseek_v3-plain-queries": ("deepseek_v3", {"q_lora_rank": None}),
}

# The module whose text model a wrapper wraps, where it shows only in the code.
TEXT_OF: dict[str, str] = {
    "mistral3": "ministral3",
    "qwen3_5_moe": "qwen3_5",
    "prism_hadamard_qwen35": "qwen3_5",
}

# What cannot be run, and why.
UNAVAILABLE: dict[str, str] = {
    "olmo": "needs the package hf_olmo, without which its import ends the process; "
    "with it a prompt fails: its attention adds the mask, which is a word",
}

# What mlx-lm itself cannot run once it has quantized it, and why.
QUANTIZED_FAILS: dict[str, str] = {
    "bitnet": "is packed as it is",
    "afm7": "the to_quantized of its fused linear layers takes no mode",
    "llama4_text": "its tied head multiplies with the weight of the embedding itself",
    "prism_hadamard_qwen35": "is packed as it is, and takes no other quantization",
}

# What mlx-lm cannot adapt, and why.
ADAPTER_FAILS: dict[tuple[str, str], str] = {
    ("bitnet", "lora"): "its linear layers are none of MLX's",
    ("bitnet", "dora"): "its linear layers are none of MLX's",
}

# What mlx-lm cannot save the caches of, and why.
UNSAVED: dict[str, str] = {
    "deepseek_v41": "its cache is a class of its own, which no file can name",
}

# What mlx-lm cannot batch, and ranks can: the mask lacks an axis.
BATCHED_HERE = ["gemma2"]

# What nobody can batch: what is said, and why.
UNBATCHED: dict[str, str] = {
    "deepseek_v41": "does not yet support batching",  # a cache of its own
    "gpt_bigcode": "Only length-1 arrays",  # positions are those of one prompt
    "llama4": "does not yet support batching",  # a cache in chunks
    "nemotron-nas": "has no attribute 'shape'",  # layers without a cache
    "phi3small": "cannot be broadcast",  # blocks are chosen by places of one prompt
}

# What computes partly in 16 bits or fewer whatever the dtype of its weights.
BFLOAT16: dict[str, str] = {
    "deepseek_v41": "keys are rounded to fp8, compressed ones and indices to fp4",
    "muse_spark": "what goes into attention, and the last hidden state, are bfloat16",
    "prism_hadamard_qwen35": "the embedding is float16",
}

# Where mlx-lm does not agree with itself, and why.
NOTES: dict[str, str] = {
    "baichuan_m1": "loading brings the rows of an unquantized head to norm 1",
    "gemma3n": "without a cache the layers that take over keys and values make "
    "their own",
    "phi3small": "a sparse layer adds its boolean mask to the scores, so that a "
    "prefill sees what comes after",
    "plamo3": "the mask of its sliding layers is one wider than their cache",
}


def _hide_few_tokens() -> None:
    """Let phi3small have no more tokens than the others: it hides some up to 100351."""
    init = phi3small.Model.__init__

    def hiding_few(self: nn.Module, args: phi3small.ModelArgs) -> None:
        init(self, args)
        self._dummy_tokenizer_ids = mx.array([args.vocab_size - 3, args.vocab_size - 1])

    phi3small.Model.__init__ = hiding_few


_hide_few_tokens()


@cache
def model_types() -> list[str]:
    """Every module of mlx_lm.models that has a Model and its ModelArgs."""
    return sorted(
        name
        for _, name, _ in pkgutil.iter_modules(mlx_lm.models.__path__)
        if {"Model", "ModelArgs"} <= _names(name)
    )


def _names(module: str) -> set[str]:
    """The classes of a module and what it imports, without importing it."""
    source = Path(mlx_lm.models.__path__[0], f"{module}.py").read_text("utf-8")
    names = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def tiny_config(model_type: str) -> dict[str, Any]:
    """The config of a tiny model of this type, as its config.json has it."""
    overrides = copy.deepcopy(OVERRIDES.get(model_type, {}))
    try:
        module = importlib.import_module(f"mlx_lm.models.{model_type}")
    except (ImportError, SystemExit):
        if model_type not in UNAVAILABLE:
            raise
        return {"model_type": model_type, **overrides}
    fields = _fields(module.ModelArgs)
    if "text_config" not in fields:
        return _values(model_type, module.ModelArgs)
    config = {"model_type": model_type}
    for name in fields:
        if name in FIELDS:
            config[name] = FIELDS[name]
        elif name in overrides:
            config[name] = overrides.pop(name)
    text_type, text_args = _text(model_type)
    text = _values(text_type, text_args) | overrides
    return config | {"text_config": text}


def _fields(args_class: type) -> dict[str, dataclasses.Field]:
    return {field.name: field for field in dataclasses.fields(args_class)}


def _text(model_type: str) -> tuple[str, type]:
    """The model type of what a wrapper wraps, and the class of its arguments."""
    source = TEXT_OF.get(model_type, model_type)
    module = importlib.import_module(f"mlx_lm.models.{source}")
    for name in ("TextArgs", "TextModelArgs", "TextConfig"):
        if hasattr(module, name):
            return source, getattr(module, name)
    if source != model_type:
        return source, module.ModelArgs
    for other in vars(module).values():
        name = getattr(other, "__name__", "")
        if name.startswith("mlx_lm.models.") and hasattr(other, "ModelArgs"):
            return name.removeprefix("mlx_lm.models."), other.ModelArgs
    raise LookupError(f"what {model_type} wraps: name it in TEXT_OF")


def _values(model_type: str, args_class: type) -> dict[str, Any]:
    """A value for each field that is named above or has no default."""
    overrides = OVERRIDES.get(model_type, {})
    config: dict[str, Any] = {"model_type": model_type}
    for name, field in _fields(args_class).items():
        if name == "model_type" or name in overrides:
            continue
        if name == "tie_word_embeddings":
            config[name] = len(model_type) % 3 == 0
        elif name in FIELDS:
            config[name] = FIELDS[name]
        elif (
            field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
        ):
            if name not in REQUIRED:
                raise LookupError(
                    f"{model_type} needs {name}: name it in REQUIRED or OVERRIDES"
                )
            config[name] = REQUIRED[name]
    return copy.deepcopy(config | overrides)


def random_weights(model: nn.Module, seed: int = 0) -> None:
    """Give a model weights that make it say something, of its own dtypes."""
    key = mx.random.key(seed)

    def spread(path: str, old: mx.array) -> mx.array:
        nonlocal key
        key, now = mx.random.split(key)
        if old.dtype == mx.uint8 or old.dtype == mx.uint32:
            top = 2 ** (8 * old.dtype.size) - 1
            return mx.random.randint(0, top, old.shape, mx.uint32, now).astype(
                old.dtype
            )
        if not mx.issubdtype(old.dtype, mx.floating):
            return old
        noise = mx.random.normal(old.shape, key=now)
        if path.endswith("signs"):
            new = mx.where(noise > 0, 1.0, -1.0)
        elif path.endswith(".scales"):  # of a layer that is packed as it is
            new = 0.05 + 0.01 * noise
        elif path.endswith(".biases"):
            new = -0.075 + 0.01 * noise
        elif "A_log" in path:
            new = mx.log(1 + 15 * mx.random.uniform(shape=old.shape, key=now))
        elif "dt_bias" in path:
            new = noise - 1
        elif old.ndim <= 1 or "norm" in path:
            new = mx.round(old.mean()) + 0.2 * noise
        elif "embed" in path or "wte" in path:
            new = 0.5 * noise
        else:
            new = 1.5 * noise / old.shape[-1] ** 0.5
        return new.astype(old.dtype)

    model.update(tree_map_with_path(spread, model.parameters()))
    mx.eval(model.parameters())


def build(name: str, seed: int = 0) -> tuple[nn.Module, dict[str, Any]]:
    """A whole tiny model of a type or a variant with random weights, and its config."""
    model_type, more = VARIANTS.get(name, (name, {}))
    config = tiny_config(model_type) | more
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    random_weights(model, seed)
    model.eval()
    return model, config
