"""Fixtures of the server's tests."""

from life import start  # noqa: F401
