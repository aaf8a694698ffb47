"""The collectives in MLX's graph: sources in C++, and what starts them."""
