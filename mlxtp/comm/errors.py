"""The errors that mlxtp raises for its callers."""

from mlxtp.cluster.verdict import Verdict


class MLXTPError(Exception):
    """Any error of mlxtp's own."""


class UsageError(MLXTPError, ValueError):
    """A mistake in what people gave us, raised on every rank with the same message."""


class RankLostError(MLXTPError, RuntimeError):
    """Another rank died, stopped answering or was cut off: `verdict` says which.

    Nothing raises it yet: the thread of the heartbeat ends the process, because the
    main thread may wait inside MPI or MLX, where no exception reaches it.
    """

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(verdict.sentence())
        self.verdict = verdict
