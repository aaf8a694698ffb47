"""What a person chooses for drafts: names, without MLX."""

# The name of drafts that need no model.
NGRAM = "ngram"
