"""Embeddings and heads, cut by rows, and what is common to whole layers.

One allreduce for the embedding of a token, one allgather of its logits.
"""

from mlxtp.families.blocks import HEAD, LOOKUP, Block, VocabularyRows, along


def embedding(*names: str) -> Block:
    """Embeddings; where there are several their outputs are added."""
    return Block(
        "embedding",
        needs=names,
        rule=VocabularyRows(),
        cuts=dict.fromkeys(names, LOOKUP),
        joint=names if len(names) > 1 else (),
    )


def head(name: str) -> Block:
    """The projection to the logits."""
    return Block("head", needs=(name,), rule=VocabularyRows(), cuts={name: HEAD})


VOCABULARY = (embedding("embed_tokens"), head("lm_head"))

# A tied head is written as a product with the embedding's weight.
TIED_BY_WEIGHT = Block(
    "tied head",
    needs=("model.embed_tokens",),
    adapt="head_of_embedding",
)
# The head is a bare matrix, and what comes behind it scales all logits alike.
BARE_HEAD = Block(
    "head",
    needs=("lm_head", "lm_head_gain"),
    rule=VocabularyRows(),
    cuts={"lm_head": along("v")},
    adapt="gather_before_gain",
)
# Embeddings of several neighbouring tokens are projected and added up.
NGRAMS = Block(
    "embedding of n-grams",
    needs=("word_embeddings", "embedders", "post_projs"),
    rule=VocabularyRows(),
    cuts={"word_embeddings": LOOKUP, "embedders.*": LOOKUP},
    shared={"post_projs": "projections of parts that only their sum makes whole"},
    sums="output",
)


def parallel(*children: str, when: str = "") -> Block:
    """A layer whose two blocks start from the same input and are added."""
    return Block(
        f"{' and '.join(children)} in parallel",
        needs=children,
        joint=children,
        when=when,
    )
