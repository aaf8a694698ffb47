"""What ended a job: a sentence for people, and data for what started the job.

The rank that ends a job prints `Verdict.sentence()` on standard error. Where the
environment variable `VERDICT_VARIABLE` is "1" it writes one line more: `VERDICT_MARK`
and the verdict as JSON. What started the job sets the variable and reads the line.

There may be several lines: where a rank is lost, others may fail because of it. So a
verdict whose `why` is neither "failed" nor "raised" counts before one whose `why` is.
"""

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

VERDICT_VARIABLE = "MLXTP_VERDICT"
VERDICT_MARK = "mlxtp-verdict: "

Why = Literal[
    "died",  # its process is gone
    "silent",  # it did not answer for the time limit: stopped or cut off
    "left",  # it ended in order while others waited for it
    "late",  # it answers, but did not come to the collective within the limit
    "unreachable",  # the reporter does not hear it, though others do
    "undelivered",  # all ranks answer, but messages did not arrive within the limit
    "unconnected",  # the ranks did not all find each other within the limit
    "not started",  # MPI did not start on all ranks within the limit
    "not ended",  # the others did not end within the limit
    "failed",  # an exception that nothing caught
    "raised",  # a forward pass raised on some ranks only
]
# What gives way to other reasons, of which it may be a consequence; the first most.
_GIVE_WAY = ("failed", "raised")


@dataclass(frozen=True)
class RankOnHost:
    """A rank, and the host it runs on."""

    rank: int
    host: str

    def __str__(self) -> str:
        """Name both, as messages do."""
        return f"rank {self.rank} on {self.host}"


@dataclass(frozen=True)
class CollectiveCall:
    """A collective that a rank has called.

    `number` counts the rank's collectives from 1; it is None for one that stands in
    MLX's graph and is not known to have begun. `layer` is the path of the layer that
    called it, "" outside of layers. `waiting` says whether the rank was still in it.
    """

    name: str
    number: int | None
    layer: str
    waiting: bool

    def __str__(self) -> str:
        """Name the collective and its layer, as messages do."""
        of_layer = f" of {self.layer}" if self.layer else ""
        if self.number is None:
            return f"the graph with an {self.name}{of_layer}"
        return f"{self.name} {self.number}{of_layer}"


@dataclass(frozen=True)
class Verdict:
    """Why a job ended, and which ranks it lost by that.

    `lost` is empty where nobody can say which ranks they are. `reporter` is the rank
    that noticed, and `collective` the last one that it called. `limit_seconds` is
    the limit of time that was exceeded, if the reason is a limit. `error` is what was
    raised, in one line, if `why` is "raised".
    """

    why: Why
    lost: tuple[RankOnHost, ...]
    reporter: RankOnHost
    collective: CollectiveCall | None
    limit_seconds: float
    error: str = ""

    def sentence(self) -> str:
        """Say it to people, in one line."""
        lost = ", ".join(map(str, self.lost))
        within = f"within {self.limit_seconds:g} s"
        for_limit = f"for {self.limit_seconds:g} s"
        match self.why:
            case "failed":
                return f"mlxtp: {lost} failed: all ranks end"
            case "not ended":
                waited = f"waited {self.limit_seconds:g} s for the others to end"
                return f"mlxtp: {self.reporter} {waited}"
            case "not started":
                return (
                    f"mlxtp: MPI did not start on {self.reporter.host} {within}: "
                    "a rank has not come, or its host is not reached"
                )
            case "raised":
                what = f"{lost} raised {self.error}, where others did not"
            case "died":
                what = f"{lost} died"
            case "silent":
                what = f"{lost} did not answer {for_limit} (stopped or cut off)"
            case "left":
                what = f"{lost} left while others waited"
            case "late":
                what = f"{lost} did not come {within}"
            case "unreachable":
                what = f"{self.reporter} and {lost} do not hear each other (a cable?)"
            case "undelivered":
                what = f"messages did not arrive {within}, though all ranks answer"
            case "unconnected":
                what = f"the ranks did not all find each other {within}"
        return f"mlxtp: {what}{self._where()}: all ranks end"

    def _where(self) -> str:
        if self.collective is None:
            return ""
        state = "is in" if self.collective.waiting else "was last in"
        return f"; {self.reporter} {state} {self.collective}"

    def line(self) -> str:
        """Return the line that what started the job reads."""
        return VERDICT_MARK + self.to_json()

    def to_json(self) -> str:
        """Return the verdict as a JSON object without line breaks."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Verdict":
        """Read what `to_json` gave.

        Raises: ValueError if `text` is something else.
        """
        try:
            content: dict[str, Any] = json.loads(text)
            collective = content["collective"]
            verdict = cls(
                content["why"],
                tuple(RankOnHost(**rank) for rank in content["lost"]),
                RankOnHost(**content["reporter"]),
                None if collective is None else CollectiveCall(**collective),
                content["limit_seconds"],
                content["error"],
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a verdict: {text}") from error
        if verdict.why not in get_args(Why):
            raise ValueError(f"not a verdict: {text}")
        return verdict


def _weight(verdict: Verdict) -> int:
    """How much a verdict counts beside others of the same job."""
    why = verdict.why
    return _GIVE_WAY.index(why) if why in _GIVE_WAY else len(_GIVE_WAY)


class VerdictFilter:
    """Takes the line of the verdict out of what a job writes on standard error.

    Ranks write at once, so the line may begin behind what another rank has begun (a
    progress bar, say). The first `verdict` counts, but one of a rank that failed or
    raised gives way: it may have because another was lost.
    """

    MARK = VERDICT_MARK.encode()

    def __init__(self) -> None:
        self.verdict: Verdict | None = None
        self._kept = b""

    @property
    def is_final(self) -> bool:
        """Whether there is a verdict that no later one counts before."""
        return self.verdict is not None and _weight(self.verdict) == len(_GIVE_WAY)

    def feed(self, data: bytes) -> bytes:
        """Return what is to be shown of `data`; the beginning of a mark is kept."""
        self._kept += data
        shown = b""
        while (start := self._kept.find(self.MARK)) >= 0:
            end = self._kept.find(b"\n", start)
            if end < 0:
                break
            shown += self._kept[:start] + self._read(self._kept[start : end + 1])
            self._kept = self._kept[end + 1 :]
        else:
            start = len(self._kept) - self._begun()
        shown += self._kept[:start]
        self._kept = self._kept[start:]
        return shown

    def close(self) -> bytes:
        """Return what is left to be shown at the end of the stream."""
        kept, self._kept = self._kept, b""
        return self._read(kept)

    def _begun(self) -> int:
        """Return how many bytes at the end may be the beginning of a mark."""
        longest = min(len(self.MARK), len(self._kept))
        lengths = range(longest, 0, -1)
        return next((n for n in lengths if self._kept.endswith(self.MARK[:n])), 0)

    def _read(self, line: bytes) -> bytes:
        """Take the verdict from its line; return the line if it holds none."""
        if not line.startswith(self.MARK):
            return line
        try:
            verdict = Verdict.from_json(line.removeprefix(self.MARK).decode())
        except ValueError:
            return line
        if self.verdict is None or _weight(verdict) > _weight(self.verdict):
            self.verdict = verdict
        return b""
