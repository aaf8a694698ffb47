"""A Mac: what its commands print.

Tried on text in their format alone, not on hardware.
"""

import json
import re

from mlxtp.cluster.commands import output
from mlxtp.cluster.memory import host_memory
from mlxtp.cluster.ports import hardware_ports as named_ports
from mlxtp.doctor.facts import Facts, Interface, Route

SETTINGS = ("iogpu.wired_limit_mb", "net.inet.ip.forwarding")


def facts() -> Facts:
    """Ask the system for all facts of this machine."""
    settings = sysctl(output("sysctl", *SETTINGS))
    memory = host_memory()
    limit = settings.get("iogpu.wired_limit_mb", "")
    return Facts(
        system="macOS",
        memory_bytes=memory.total_bytes,
        available_bytes=memory.available_bytes,
        limit_set_mb=int(limit) if limit.isdigit() else None,
        forwards=forwarding(settings),
        interfaces=interfaces(
            output("ifconfig"),
            output("networksetup", "-listallhardwareports"),
            output("system_profiler", "SPThunderboltDataType", "-json"),
        ),
    )


def route(address: str) -> Route | None:
    """Return how packets to `address` leave this machine; None without a route."""
    return parse_route(output("route", "-n", "get", address))


def sysctl(text: str) -> dict[str, str]:
    """Read settings by name, as `sysctl NAME…` prints them."""
    pairs = (line.partition(": ") for line in text.splitlines())
    return {name: value.strip() for name, colon, value in pairs if colon}


def forwarding(settings: dict[str, str]) -> bool | None:
    """Say whether packets of others are passed on; None where it is not known."""
    value = settings.get("net.inet.ip.forwarding")
    return None if value is None else value == "1"


def interfaces(
    ifconfig: str, hardware_ports: str, thunderbolt: str
) -> tuple[Interface, ...]:
    """Read the interfaces, without loopback.

    Args:
        ifconfig: what `ifconfig` prints.
        hardware_ports: what `networksetup -listallhardwareports` prints.
        thunderbolt: what `system_profiler SPThunderboltDataType -json` prints.
    """
    kinds = {name: port for port, name in named_ports(hardware_ports).items()}
    cables = cable_rates(thunderbolt)
    result = []
    for block in re.split(r"^(?=\S)", ifconfig, flags=re.M):
        head = re.match(r"(\S+): flags=\w+<([^>]*)>.*?mtu (\d+)", block)
        if head is None or "LOOPBACK" in head[2].split(","):
            continue
        status = re.search(r"^\s+status: (.+)$", block, re.M)
        media = re.search(r"^\s+media: (.+)$", block, re.M)
        kind = kinds.get(head[1], "")
        result.append(
            Interface(
                name=head[1],
                kind=kind,
                up="UP" in head[2].split(",")
                and (status is None or status[1].strip() == "active"),
                mtu=int(head[3]),
                addresses=tuple(re.findall(r"^\s+inet (\S+)", block, re.M)),
                bits_per_second=cables.get(kind)
                or media_rate(media[1] if media else ""),
            )
        )
    return tuple(result)


def cable_rates(thunderbolt: str) -> dict[str, float]:
    """Return the bits a second of ports with a cable in, by the port's name."""
    rates = {}
    for bus in json.loads(thunderbolt or "{}").get("SPThunderboltDataType", []):
        port = bus.get("receptacle_1_tag", {})
        rate = re.search(r"([\d.]+) Gb/s", port.get("current_speed_key", ""))
        if rate and bus.get("_items"):
            name = f"Thunderbolt {port.get('receptacle_id_key')}"
            rates[name] = float(rate[1]) * 1e9
    return rates


def media_rate(media: str) -> float | None:
    """Read the bits a second of a medium such as `autoselect (10Gbase-T …)`."""
    rate = re.search(r"\(([\d.]+)(G?)base", media, re.IGNORECASE)
    return float(rate[1]) * (1e9 if rate[2] else 1e6) if rate else None


def parse_route(text: str) -> Route | None:
    """Read what `route -n get` prints; None if it names no interface."""
    pairs = (line.strip().partition(": ") for line in text.splitlines())
    fields = {name: value.strip() for name, colon, value in pairs if colon}
    if "interface" not in fields:
        return None
    gateway = fields.get("gateway", "")
    is_host = re.fullmatch(r"[\d.]+", gateway) is not None
    return Route(fields["interface"], gateway if is_host else None)
