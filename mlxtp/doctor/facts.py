"""What a system says of its machine, as data: the same for macOS and Linux."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Interface:
    """A network interface.

    `kind` is "Thunderbolt 1", "Wi-Fi", "Ethernet" or the like. `up` says that it is in
    use and, as far as that can be known, that a cable is in. `mtu` are bytes.
    `bits_per_second` is the rate that the hardware has negotiated.
    """

    name: str
    kind: str
    up: bool
    mtu: int
    addresses: tuple[str, ...]
    bits_per_second: float | None = None

    def __str__(self) -> str:
        """Write the name, and the kind where it is known."""
        return f"{self.name} ({self.kind})" if self.kind else self.name


@dataclass(frozen=True)
class Route:
    """How packets to an address leave a machine.

    Without a gateway the address is at the other end of the link.
    """

    interface: str
    gateway: str | None


@dataclass(frozen=True)
class Facts:
    """What a system says of its machine.

    `system` is "macOS" or "Linux". `limit_set_mb` is what iogpu.wired_limit_mb was set
    to, in MiB; 0 where it was not set, None on Linux. `forwards` says whether packets
    between other hosts are passed on; None where it is not known.
    """

    system: str
    memory_bytes: int
    available_bytes: int
    limit_set_mb: int | None
    forwards: bool | None
    interfaces: tuple[Interface, ...]
