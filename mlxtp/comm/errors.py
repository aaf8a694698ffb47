"""The errors that mlxtp raises for its callers."""


class MLXTPError(Exception):
    """Any error of mlxtp's own."""


class UsageError(MLXTPError, ValueError):
    """A mistake in what people gave us, raised on every rank with the same message."""


class RankLostError(MLXTPError, RuntimeError):
    """Another rank died, stopped answering or was cut off."""
