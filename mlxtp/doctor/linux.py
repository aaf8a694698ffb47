"""A Linux machine: what /proc, /sys and the command ip say."""

import json
import platform
from pathlib import Path

from mlxtp.doctor.facts import Facts, Interface, Route, output

NETWORK = Path("/sys/class/net")
FORWARDING = Path("/proc/sys/net/ipv4/ip_forward")


def facts() -> Facts:
    memory = meminfo(_text(Path("/proc/meminfo")))
    forwards = _text(FORWARDING)
    return Facts(
        system="Linux",
        chip=chip(_text(Path("/proc/cpuinfo"))),
        memory_bytes=memory.get("MemTotal", 0),
        available_bytes=memory.get("MemAvailable"),
        limit_set_mb=None,
        forwards=forwards.strip() == "1" if forwards else None,
        interfaces=interfaces(output(["ip", "-j", "address"]), NETWORK),
    )


def route(address: str) -> Route | None:
    return parse_route(output(["ip", "-j", "route", "get", address]))


def meminfo(text: str) -> dict[str, int]:
    """Bytes by name, of /proc/meminfo."""
    found = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if value.endswith(" kB"):
            found[name] = int(value.split()[0]) * 1024
    return found


def chip(cpuinfo: str) -> str:
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.machine()


def interfaces(addresses: str, network: Path) -> tuple[Interface, ...]:
    """From `ip -j address` and /sys/class/net."""
    found = []
    for it in json.loads(addresses or "[]"):
        if not it or "LOOPBACK" in it["flags"]:
            continue
        found.append(
            Interface(
                name=it["ifname"],
                kind=kind(network / it["ifname"]),
                up="UP" in it["flags"]
                and "LOWER_UP" in it["flags"]
                and it["operstate"] != "DOWN",
                mtu=it["mtu"],
                addresses=tuple(
                    address["local"]
                    for address in it["addr_info"]
                    if address["family"] == "inet"
                ),
                bits_per_second=speed(network / it["ifname"]),
            )
        )
    return tuple(found)


def kind(folder: Path) -> str:
    """Of the interface that a folder in /sys/class/net is about."""
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
    """Bits a second; None where nothing was negotiated."""
    if not (folder / "device").exists():
        return None  # software, which calls itself as fast as it likes
    text = _text(folder / "speed").strip()
    return int(text) * 1e6 if text.isdigit() else None


def parse_route(text: str) -> Route | None:
    """From `ip -j route get`."""
    ways = json.loads(text or "[]")
    if not ways or "dev" not in ways[0]:
        return None
    return Route(ways[0]["dev"], ways[0].get("gateway"))


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""
