"""A Mac: what its tools print. Not tried on hardware, only on text in their format."""

import json
import re

from mlxtp.comm.transports import rdma
from mlxtp.doctor.facts import Facts, Interface, Route, output

SETTINGS = (
    "hw.memsize",
    "machdep.cpu.brand_string",
    "iogpu.wired_limit_mb",
    "net.inet.ip.forwarding",
)


def facts() -> Facts:
    settings = sysctl(output(["sysctl", *SETTINGS]))
    limit = settings.get("iogpu.wired_limit_mb", "")
    return Facts(
        system="macOS",
        chip=settings.get("machdep.cpu.brand_string", ""),
        memory_bytes=int(settings.get("hw.memsize", "0")),
        available_bytes=available(output(["vm_stat"])),
        limit_set_mb=int(limit) if limit.isdigit() else None,
        forwards=forwarding(settings),
        interfaces=interfaces(
            output(["ifconfig"]),
            output(["networksetup", "-listallhardwareports"]),
            output(["system_profiler", "SPThunderboltDataType", "-json"]),
        ),
    )


def route(address: str) -> Route | None:
    return parse_route(output(["route", "-n", "get", address]))


def sysctl(text: str) -> dict[str, str]:
    """Settings by name, as `sysctl NAME…` prints them."""
    pairs = (line.partition(": ") for line in text.splitlines())
    return {name: value.strip() for name, colon, value in pairs if colon}


def forwarding(settings: dict[str, str]) -> bool | None:
    value = settings.get("net.inet.ip.forwarding")
    return None if value is None else value == "1"


def available(vm_stat: str) -> int | None:
    """Bytes that programs can get: free pages, and those the system gives up."""
    page = re.search(r"page size of (\d+) bytes", vm_stat)
    if page is None:
        return None
    pages = {
        name: int(count)
        for name, count in re.findall(r'^"?([^":\n]+)"?: +(\d+)\.', vm_stat, re.M)
    }
    names = "Pages free", "Pages speculative", "Pages inactive"
    return int(page[1]) * sum(pages.get(name, 0) for name in names)


def interfaces(
    ifconfig: str, hardware_ports: str, thunderbolt: str
) -> tuple[Interface, ...]:
    """From `ifconfig`, `networksetup` and `system_profiler`."""
    kinds = {name: port for port, name in rdma.interfaces(hardware_ports).items()}
    cables = cable_rates(thunderbolt)
    found = []
    for block in re.split(r"^(?=\S)", ifconfig, flags=re.M):
        head = re.match(r"(\S+): flags=\w+<([^>]*)>.*?mtu (\d+)", block)
        if head is None or "LOOPBACK" in head[2].split(","):
            continue
        status = re.search(r"^\s+status: (.+)$", block, re.M)
        media = re.search(r"^\s+media: (.+)$", block, re.M)
        kind = kinds.get(head[1], "")
        found.append(
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
    return tuple(found)


def cable_rates(thunderbolt: str) -> dict[str, float]:
    """Bits a second of the ports that a cable is in, by the port's name."""
    found = {}
    for bus in json.loads(thunderbolt or "{}").get("SPThunderboltDataType", []):
        port = bus.get("receptacle_1_tag", {})
        rate = re.search(r"([\d.]+) Gb/s", port.get("current_speed_key", ""))
        if rate and bus.get("_items"):
            name = f"Thunderbolt {port.get('receptacle_id_key')}"
            found[name] = float(rate[1]) * 1e9
    return found


def media_rate(media: str) -> float | None:
    """Bits a second of an Ethernet's medium, such as `autoselect (10Gbase-T …)`."""
    rate = re.search(r"\(([\d.]+)(G?)base", media, re.IGNORECASE)
    return float(rate[1]) * (1e9 if rate[2] else 1e6) if rate else None


def parse_route(text: str) -> Route | None:
    """From `route -n get`."""
    pairs = (line.strip().partition(": ") for line in text.splitlines())
    found = {name: value.strip() for name, colon, value in pairs if colon}
    if "interface" not in found:
        return None
    gateway = found.get("gateway", "")
    is_host = re.fullmatch(r"[\d.]+", gateway) is not None
    return Route(found["interface"], gateway if is_host else None)
