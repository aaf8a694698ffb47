"""mlx-lm's model without weights, and what it computes of a checkpoint."""
