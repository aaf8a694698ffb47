"""Integers only: spans of an axis, shares, attention heads, layouts of an axis."""
