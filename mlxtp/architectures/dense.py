"""Separate q, k, v and o projections and a gated MLP, as in Llama.

Two allreduces a layer, one after attention and one after the MLP, one for the
embedding, and a gather of the logits.
"""

from mlxtp.architectures.cuts import Architecture, Cut

DENSE = Architecture(
    cuts={
        "self_attn.q_proj": Cut("column", "query heads"),
        "self_attn.k_proj": Cut("column", "kv heads"),
        "self_attn.v_proj": Cut("column", "kv heads"),
        "self_attn.o_proj": Cut("row", "query heads"),
        "mlp.gate_proj": Cut("column", "mlp width"),
        "mlp.up_proj": Cut("column", "mlp width"),
        "mlp.down_proj": Cut("row", "mlp width"),
        "embed_tokens": Cut("lookup", "vocabulary"),
        "lm_head": Cut("column", "vocabulary"),
    }
)
