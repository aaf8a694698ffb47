"""A model's forward passes without weights, put into the graph, never evaluated."""
