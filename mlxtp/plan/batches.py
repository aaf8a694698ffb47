"""What requests at once get from the server: modelled."""

from dataclasses import dataclass

from mlxtp.generation.pace import LEAST_PART
from mlxtp.plan.planning import Plan


@dataclass(frozen=True)
class Batch:
    """So many requests that decode at once, with full caches: modelled.

    `gap_seconds` lie between two tokens of a request, `reading_gap_seconds` while the
    server reads the prompt of another one in parts beside.
    """

    requests: int
    gap_seconds: float
    reading_gap_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Of all requests together."""
        return self.requests / self.gap_seconds


def batches(plan: Plan) -> list[Batch]:
    """Return 1, 2, 4, … requests up to the plan's batch; nothing for a batch of 1.

    A part of a prompt takes what a token takes, and its tokens as much of a pass as the
    scheduler gives them.
    """
    most = plan.setting.batch
    if most == 1:
        return []
    counts = [1]
    while counts[-1] < most:
        counts.append(min(2 * counts[-1], most))
    gaps = [plan.decode_pass(part=count / most).seconds for count in counts]
    return [
        Batch(count, gap, (1 + LEAST_PART) * gap + gaps[0])
        for count, gap in zip(counts, gaps, strict=True)
    ]
