"""MLPs and mixtures of experts, cut along the width of each.

One allreduce a block: after the down projection, or after the experts, routed and
shared, have been added. Experts are cut as an MLP is: every rank has a part of each.
"""

from mlxtp.families.blocks import Block, Width, column, norm, row

_ROUTER = "every rank chooses the same experts"
# Modules that score the experts or choose them.
ROUTER_NAMES = ("gate", "router")
ROUTERS = dict.fromkeys(
    (*ROUTER_NAMES, "shared_expert_gate", "coefficient", "expert_bias"), _ROUTER
)


def mlp(up: tuple[str, ...], down: str, layout: str = "w") -> Block:
    """An MLP with these names of its matrices; `layout` is of those going up."""
    return Block(
        "MLP" if len(up) == 1 and layout == "w" else "gated MLP",
        needs=(*up, down),
        rule=Width(down),
        cuts={**dict.fromkeys(up, column(layout)), down: row("w")},
    )


GATED = mlp(("gate_proj", "up_proj"), "down_proj")
UP_DOWN = mlp(("up_proj",), "down_proj")
GATE_AND_UP = mlp(("gate_up_proj",), "down_proj", "w w")
W123 = mlp(("w1", "w3"), "w2")
FC12 = mlp(("fc1",), "fc2")
C_FC = mlp(("c_fc",), "c_proj")
# Four outputs share a byte: a rank gets the same columns of each quarter.
TERNARY = GATED.but(
    "gated MLP, ternary",
    needs=("gate_proj", "up_proj", "ffn_sub_norm"),
    rule=Width("down_proj", parts=4),
    cuts={"ffn_sub_norm": norm("w w w w"), "down_proj": row("w w w w")},
)
# Needs the mean and deviation of all columns before it goes on.
SPARSE = GATED.but(
    "gated MLP of the largest",
    more=2,
    when="activation_sparsity",
    adapt="largest_of_all",
)


def experts(*needs: str) -> Block:
    """A mixture of experts whose output is a sum of linear parts."""
    return Block("experts", needs=needs, sums="output", shared=ROUTERS)


SWITCH = experts("switch_mlp")
EXPERTS = experts("experts")
LATENT_SWITCH = SWITCH.but(
    "experts in a latent space",
    shared={
        "fc1_latent_proj": "a latent of all experts",
        "fc2_latent_proj": "a latent of all experts",
    },
    adapt="latent_bias_once",
)
# A norm stands between the experts' sum and the rest.
NORMED_LATENT = SWITCH.but(
    "experts in a latent space with a norm",
    sums="inside",
    shared={
        "routed_expert_down_proj": "a latent of all experts",
        "routed_expert_up_proj": "a latent of all experts",
    },
    adapt="sum_before_norm",
)
# Some of the experts pass the input on.
ZERO_EXPERTS = SWITCH.but(
    "experts, some of which do nothing", sums="inside", adapt="sum_of_some"
)
# Each expert's output goes through a norm: as many vectors as experts are summed.
NORMED_EACH = GATED.but(
    "experts with a norm for each",
    needs=("gate_proj", "post_expert_norm"),
    sums="output",
    times="top_k",
)
# A matrix in place of an attention or an MLP.
LINEAR = Block(
    "matrix in place of a block",
    needs=("linear",),
    rule=Width("linear"),
    cuts={"linear": row("w")},
    adapt="take_own_inputs",
)
