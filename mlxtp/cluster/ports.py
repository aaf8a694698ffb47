"""Which ports of this host are there for cables, and what each of them leads to.

`python -m mlxtp.cluster.ports` prints it as one line of JSON: the fields of `Ports`.
Ports are told apart by names that both ends of a cable know. On macOS that is the
domain that Thunderbolt gives to every port, which `system_profiler` prints for a port
and for what is at the other end, as MLX's `mlx.distributed_config` reads it: nothing is
sent, and a port may still be in a bridge. Besides, on both systems, it is the
link-local address of IPv6: all hosts on a link are asked for an echo. Nothing is
changed, except that `--up` switches on Linux's Thunderbolt ports, as root.

On macOS tried on text in the format of its commands alone. Only the standard library is
used.
"""

import argparse
import json
import os
import re
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path
from typing import Any

from mlxtp.cluster.addresses import CABLE_NETWORK, RING_NETWORK
from mlxtp.cluster.cables import addresses
from mlxtp.cluster.commands import output
from mlxtp.cluster.reroute import this_system

NETWORK = Path("/sys/class/net")

# A port that has an address outside of these is in use for something else. So is one
# with an address of the cables alone: ours have the host's as well.
CABLES, RING = ip_network(CABLE_NETWORK), ip_network(RING_NETWORK)
OURS = [CABLES, RING, ip_network("169.254.0.0/16"), ip_network("fe80::/10")]

# All hosts on a link, and the two messages of ICMPv6.
ALL_HOSTS = "ff02::1"
ECHO_REQUEST, ECHO_REPLY = 128, 129
# The echo is asked for so often, and answers are waited for so long.
ROUNDS = 2
ROUND_SECONDS = 0.4

# How long the link-local address of a port takes that has just been switched on.
UP_SECONDS = 2.0


@dataclass(frozen=True)
class Port:
    """A port: its name for people, its interface, its own names and those it hears."""

    name: str
    interface: str
    own: tuple[str, ...]
    heard: tuple[str, ...]


@dataclass(frozen=True)
class Ports:
    """The ports of a host in their order.

    `system` is "macos" or "linux", `addresses` are those of each interface, of IPv4,
    `laid` the addresses of hosts on the cables that routes lead to.
    """

    system: str
    ports: tuple[Port, ...]
    addresses: dict[str, list[str]]
    laid: tuple[str, ...] = ()

    @classmethod
    def read(cls, text: str) -> "Ports":
        """Read what this module prints.

        Raises: ValueError if it is none of it.
        """
        try:
            content: dict[str, Any] = json.loads(text.splitlines()[-1])
            ports = tuple(
                Port(one["name"], one["interface"], (*one["own"],), (*one["heard"],))
                for one in content["ports"]
            )
            laid = tuple(content["laid"])
            return cls(content["system"], ports, content["addresses"], laid)
        except (IndexError, KeyError, TypeError) as error:
            raise ValueError(f"{text[-200:]!r}") from error


@dataclass(frozen=True)
class Thunderbolt:
    """A Thunderbolt port of a Mac: its name, its interface, its domain and the peer's.

    `peer` is None where no host is at the other end.
    """

    name: str
    interface: str
    domain: str
    peer: str | None


def hardware_ports(text: str) -> dict[str, str]:
    """Return the interface of each port, from `networksetup -listallhardwareports`."""
    interface_of = {}
    name = ""
    for line in text.splitlines():
        key, _, value = line.partition(": ")
        if key == "Hardware Port":
            name = value.strip()
        elif key == "Device":
            interface_of[name] = value.strip()
    return interface_of


def thunderbolt(profile: str, hardware: str) -> list[Thunderbolt]:
    """Return a Mac's Thunderbolt ports in the order of their numbers.

    Args:
        profile: what `system_profiler SPThunderboltDataType -json` prints.
        hardware: what `networksetup -listallhardwareports` prints.
    """
    interface_of = hardware_ports(hardware)
    ports = []
    for bus in json.loads(profile or "{}").get("SPThunderboltDataType", []):
        number = bus.get("receptacle_1_tag", {}).get("receptacle_id_key", "")
        name = f"Thunderbolt {number}"
        if name not in interface_of or "domain_uuid_key" not in bus:
            continue
        # Displays and disks have no domain of their own.
        peers = [item.get("domain_uuid_key") for item in bus.get("_items", [])]
        peer = next(filter(None, peers), None)
        ports.append(
            Thunderbolt(name, interface_of[name], bus["domain_uuid_key"], peer)
        )
    return sorted(ports, key=lambda port: (len(port.name), port.name))


def macos_ports(profile: str, hardware: str, ifconfig: str) -> list[Port]:
    """Return a Mac's Thunderbolt ports, from what its commands print."""
    local = link_local(ifconfig)
    return [
        Port(
            port.name,
            port.interface,
            (port.domain, *local.get(port.interface, ())),
            (port.peer,) if port.peer else (),
        )
        for port in thunderbolt(profile, hardware)
    ]


def link_local(ifconfig: str) -> dict[str, list[str]]:
    """Return the link-local addresses of each interface, from `ifconfig` of macOS."""
    result: dict[str, list[str]] = {}
    for block in re.split(r"^(?=\S)", ifconfig, flags=re.M):
        name = block.partition(":")[0]
        result[name] = re.findall(r"^\s+inet6 (fe80:[\da-f:]+)", block, re.M)
    return result


def linux_ports(text: str, folders: Path) -> list[Port]:
    """Return a Linux machine's ports that may have a cable to another host.

    These are hardware and tunnels, as far as no network has given them an address.

    Args:
        text: what `ip -json address` prints.
        folders: /sys/class/net.
    """
    ports = []
    for entry in json.loads(text or "[]"):
        if not entry or "LOOPBACK" in entry["flags"]:
            continue
        folder = folders / entry["ifname"]
        if not ((folder / "device").exists() or (folder / "tun_flags").exists()):
            continue
        own = [each["local"] for each in entry["addr_info"]]
        if is_free([ip_address(address) for address in own]):
            local = [address for address in own if address.startswith("fe80:")]
            ports.append(Port(entry["ifname"], entry["ifname"], tuple(local), ()))
    return sorted(ports, key=lambda port: (len(port.name), port.name))


def is_free(own: Sequence[IPv4Address | IPv6Address]) -> bool:
    """Return whether an interface with these addresses is in no other network."""
    on_cable, on_ring = (any(a in network for a in own) for network in (CABLES, RING))
    known = all(any(address in network for network in OURS) for address in own)
    return known and (on_ring or not on_cable)


def echoes(interfaces: Sequence[str]) -> dict[str, set[str]]:
    """Return the link-local addresses that answer at each interface.

    The interface's own address may be among them. Empty where the system lets us ask
    nobody.
    """
    answers: dict[str, set[str]] = {name: set() for name in interfaces}
    token = os.urandom(8)
    request = struct.pack("!BBHHH", ECHO_REQUEST, 0, 0, 0, 1) + token
    with echo_socket() as asked:
        for _ in range(ROUNDS):
            for name in interfaces:
                with suppress(OSError):  # it is switched off
                    index = socket.if_nametoindex(name)
                    asked.sendto(request, (ALL_HOSTS, 0, 0, index))
            until = time.monotonic() + ROUND_SECONDS
            while (rest := until - time.monotonic()) > 0:
                asked.settimeout(rest)
                try:
                    message, (address, _, _, index) = asked.recvfrom(1500)
                except OSError:  # the time is over
                    break
                if message[0] == ECHO_REPLY and message.endswith(token):
                    with suppress(KeyError, OSError):
                        at = answers[socket.if_indextoname(index)]
                        at.add(address.partition("%")[0])
    return answers


def echo_socket() -> socket.socket:
    """Return a socket for ICMPv6: one that is root's, or one for everybody."""
    kind = socket.SOCK_RAW if os.geteuid() == 0 else socket.SOCK_DGRAM
    return socket.socket(socket.AF_INET6, kind, socket.IPPROTO_ICMPV6)


def is_thunderbolt(name: str) -> bool:
    """Return whether an interface of Linux is a Thunderbolt port."""
    return "thunderbolt" in (NETWORK / name / "device" / "driver").resolve().name


def is_switched(name: str) -> bool:
    """Return whether an interface of Linux is up for cables alone.

    That holds for Thunderbolt ports, and for the tunnels of `launch/lab`.
    """
    return is_thunderbolt(name) or (NETWORK / name / "tun_flags").exists()


def switch_on(ports: Iterable[str]) -> None:
    """Switch on those Thunderbolt ports of a Linux machine that are off."""
    off = [
        name
        for name in ports
        if is_thunderbolt(name)
        and (NETWORK / name / "operstate").read_text().strip() == "down"
    ]
    for name in off:
        subprocess.run(["ip", "link", "set", name, "up"], capture_output=True)
    if off:
        time.sleep(UP_SECONDS)


def own_ports(up: bool = False) -> Ports:
    """Ask this host for its ports, and what each of them hears."""
    if sys.platform == "darwin":
        system = "macos"
        ports = macos_ports(
            output("system_profiler", "SPThunderboltDataType", "-json"),
            output("networksetup", "-listallhardwareports"),
            output("ifconfig"),
        )
    else:
        system = "linux"
        if up:
            switch_on(p.name for p in linux_ports(ip_addresses(), NETWORK))
        ports = linux_ports(ip_addresses(), NETWORK)
    heard: dict[str, set[str]] = {}
    with suppress(OSError):  # no IPv6, or not for this user
        heard = echoes([port.interface for port in ports])
    listening = (
        Port(port.name, port.interface, port.own, (*port.heard, *sorted(answers)))
        for port in ports
        for answers in [heard.get(port.interface, set()) - {*port.own}]
    )
    laid = tuple(this_system().laid())
    return Ports(system, tuple(listening), addresses(), laid)


def ip_addresses() -> str:
    """Return what `ip -json address` prints."""
    return output("ip", "-json", "address")


def main() -> None:
    """Print the ports of this host."""
    parser = argparse.ArgumentParser(prog="mlxtp.cluster.ports", description=__doc__)
    parser.add_argument("--up", action="store_true", help="switch ports on, as root")
    print(json.dumps(asdict(own_ports(parser.parse_args().up))))


if __name__ == "__main__":
    main()
