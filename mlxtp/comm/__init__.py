"""Ranks: the communicator, its collectives and what carries them."""
