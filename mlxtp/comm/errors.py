"""The errors that mlxtp raises for its callers."""

from mlxtp.cluster.verdict import Verdict


class MLXTPError(Exception):
    """Any error of mlxtp's own."""


class UsageError(MLXTPError, ValueError):
    """A mistake in what people gave us, raised on every rank with the same message."""


class MemoryLackingError(UsageError):
    """A host has less memory than what its ranks would hold."""


class RankLostError(MLXTPError, RuntimeError):
    """Another rank is lost, and no collective works any more: `verdict` says which.

    Raised by collectives, and by MLX where it evaluates one, if `Communicator.world`
    was told so with `on_loss`.
    """

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(verdict.sentence())
        self.verdict = verdict
