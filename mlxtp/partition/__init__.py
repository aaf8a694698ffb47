"""Integers only: spans of an axis, attention heads, layouts of an axis in words."""
