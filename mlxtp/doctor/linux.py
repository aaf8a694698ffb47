"""A Linux machine: what /proc, /sys and the command `ip` say."""

import json
from pathlib import Path

from mlxtp.cluster.commands import output
from mlxtp.cluster.memory import host_memory
from mlxtp.doctor.facts import Facts, Interface, Route

NETWORK = Path("/sys/class/net")
FORWARDING = Path("/proc/sys/net/ipv4/ip_forward")


def facts() -> Facts:
    """Ask the system for all facts of this machine."""
    memory = host_memory()
    forwards = _text(FORWARDING)
    return Facts(
        system="Linux",
        memory_bytes=memory.total_bytes,
        available_bytes=memory.available_bytes,
        limit_set_mb=None,
        forwards=forwards.strip() == "1" if forwards else None,
        interfaces=interfaces(output("ip", "-j", "address"), NETWORK),
    )


def route(address: str) -> Route | None:
    """Return how packets to `address` leave this machine; None without a route."""
    return parse_route(output("ip", "-j", "route", "get", address))


def interfaces(addresses: str, network: Path) -> tuple[Interface, ...]:
    """Read the interfaces, without loopback.

    Args:
        addresses: what `ip -j address` prints.
        network: /sys/class/net.
    """
    result = []
    for entry in json.loads(addresses or "[]"):
        if not entry or "LOOPBACK" in entry["flags"]:
            continue
        result.append(
            Interface(
                name=entry["ifname"],
                kind=kind(network / entry["ifname"]),
                up="UP" in entry["flags"]
                and "LOWER_UP" in entry["flags"]
                and entry["operstate"] != "DOWN",
                mtu=entry["mtu"],
                addresses=tuple(
                    address["local"]
                    for address in entry["addr_info"]
                    if address["family"] == "inet"
                ),
                bits_per_second=speed(network / entry["ifname"]),
            )
        )
    return tuple(result)


def kind(folder: Path) -> str:
    """Return the kind of the interface that a folder in /sys/class/net describes."""
    if (folder / "wireless").exists() or (folder / "phy80211").exists():
        return "Wi-Fi"
    driver = (folder / "device" / "driver").resolve().name
    if "thunderbolt" in driver:
        return "Thunderbolt"
    if (folder / "tun_flags").exists():
        return "tunnel"
    if (folder / "bridge").exists():
        return "bridge"
    return "Ethernet" if _text(folder / "type").strip() == "1" else ""


def speed(folder: Path) -> float | None:
    """Return its bits a second; None where nothing was negotiated."""
    if not (folder / "device").exists():
        return None  # software, which reports any rate
    text = _text(folder / "speed").strip()
    return int(text) * 1e6 if text.isdigit() else None


def parse_route(text: str) -> Route | None:
    """Read what `ip -j route get` prints; None if it names no interface."""
    routes = json.loads(text or "[]")
    if not routes or "dev" not in routes[0]:
        return None
    return Route(routes[0]["dev"], routes[0].get("gateway"))


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
