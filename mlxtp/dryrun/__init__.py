"""A model's forward pass and loops without weights.

It tells the shapes of caches and what a rank needs of memory. Nothing is evaluated or
sent. The models are handed in.
"""
