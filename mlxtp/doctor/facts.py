"""What the tools of a system say of a machine, as data: the same of both systems."""

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Interface:
    """A network interface; its rate as the hardware has negotiated it."""

    name: str
    kind: str  # "Thunderbolt 1", "Wi-Fi", "Ethernet", …
    up: bool  # and something is plugged in, as far as that can be told
    mtu: int
    addresses: tuple[str, ...]
    bits_per_second: float | None = None

    def __str__(self) -> str:
        return f"{self.name} ({self.kind})" if self.kind else self.name


@dataclass(frozen=True)
class Route:
    """The way that packets to an address leave by."""

    interface: str
    gateway: str | None  # None: the address is at the other end


@dataclass(frozen=True)
class Facts:
    """What the tools of a system say of a machine."""

    system: str  # "macOS" or "Linux", as commands differ
    chip: str
    memory_bytes: int
    available_bytes: int | None
    limit_set_mb: int | None  # what `iogpu.wired_limit_mb` was set to; 0: nothing
    forwards: bool | None  # packets between other hosts
    interfaces: tuple[Interface, ...]


def output(command: Sequence[str]) -> str:
    """What a command prints; nothing where it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout
