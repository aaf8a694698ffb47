"""What `mlxtp.doctor` measures of a cluster: `mlxtp.plan --measured` reads it."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Host:
    """A rank's machine, measured while all ranks are at work.

    `limit_bytes` is what a model may take: on a Mac what the GPU may wire, on Linux
    what is available. `bytes_per_second` is the rate at which matrix-vector products
    read weights, `flops` that of matrix products, `token_seconds` what a token of the
    whole model that ships takes beside collectives, which the rank waits for.
    """

    rank: int
    host: str
    chip: str
    memory_bytes: int
    limit_bytes: int | None
    bytes_per_second: float
    flops: float
    token_seconds: float


@dataclass(frozen=True)
class Pair:
    """The link between two ranks: one way, and the rate of long messages."""

    ranks: tuple[int, int]
    latency_seconds: float
    bytes_per_second: float


@dataclass(frozen=True)
class Collective:
    """An allreduce or allgather of all ranks, array to array: the median.

    `part_bytes` is what a rank brings.
    """

    name: str
    part_bytes: int
    seconds: float


@dataclass(frozen=True)
class Measured:
    """A cluster, by rank."""

    hosts: tuple[Host, ...]
    pairs: tuple[Pair, ...]
    collectives: tuple[Collective, ...]

    def write(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, file: Path) -> "Measured":
        """Raises: ValueError, with the file, if it holds nothing of the kind."""
        try:
            content: dict[str, Any] = json.loads(file.read_text())
            return cls(
                tuple(Host(**it) for it in content["hosts"]),
                tuple(
                    Pair(**{**it, "ranks": tuple(it["ranks"])})
                    for it in content["pairs"]
                ),
                tuple(Collective(**it) for it in content["collectives"]),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{file} is not what mlxtp.doctor --json writes: {error!r}"
            ) from None
