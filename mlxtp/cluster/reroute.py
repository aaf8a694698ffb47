"""Lay the routes of this host over the cables that carry something.

`python -m mlxtp.cluster.reroute K N --topology 1-2,4-5,1-5`, on host K of N: of a ring
of five without host 3. With all cables, such as `ring`, routes are laid as
`launch/cables` lays them. Routes to hosts that no way reaches are removed; addresses
stay as they are. It takes root, or a sudo that asks for no password.
One line of JSON says how it went: `routes` is "as wanted", "changed" or "refused",
`words` says more. Only the standard library is used.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence, Set
from typing import NamedTuple

from mlxtp.cluster import cables
from mlxtp.cluster.addresses import RING_ADDRESSES
from mlxtp.cluster.cables import Cable
from mlxtp.cluster.commands import output


class Route(NamedTuple):
    """How packets to another host leave this one."""

    gateway: str
    interface: str


class System(NamedTuple):
    """What a system's commands for routes are.

    Args:
        lay: the command for the route to another host's address, from this one's.
        remove: the command that removes the route to an address.
        clear: `remove` goes before `lay`.
        laid: the routes to addresses of hosts on the cables, as they are.
    """

    lay: Callable[[str, Route, str], list[str]]
    remove: Callable[[str], list[str]]
    clear: bool
    laid: Callable[[], dict[str, Route]]


def lay_linux(other: str, route: Route, source: str) -> list[str]:
    """Return the command of iproute2 that lays a route, also in place of another."""
    place = [f"{other}/32", "via", route.gateway, "dev", route.interface]
    return ["ip", "route", "replace", *place, "src", source]


def remove_linux(other: str) -> list[str]:
    """Return the command of iproute2 that removes the route to an address."""
    return ["ip", "route", "del", f"{other}/32"]


def lay_macos(other: str, route: Route, source: str) -> list[str]:
    """Return the command of macOS that lays a route where there is none."""
    place = ["-host", other, route.gateway, "-ifp", route.interface, "-ifa", source]
    return ["route", "-n", "add", *place]


def remove_macos(other: str) -> list[str]:
    """Return the command of macOS that removes the route to an address."""
    return ["route", "-n", "delete", "-host", other]


def read_ip_route(text: str) -> dict[str, Route]:
    """Read the routes to hosts on the cables from what `ip -json route` prints."""
    return {
        entry["dst"]: Route(entry.get("gateway", ""), entry.get("dev", ""))
        for entry in json.loads(text or "[]")
        if entry.get("dst") in RING_ADDRESSES
    }


def read_netstat(text: str) -> dict[str, Route]:
    """Read the routes to hosts on the cables from `netstat -rn` of macOS."""
    result = {}
    for line in text.splitlines():
        destination, gateway, _, interface, *_ = [*line.split(), *[""] * 4]
        destination = destination.removesuffix("/32")
        if destination in RING_ADDRESSES and re.fullmatch(r"[\d.]+", gateway):
            result[destination] = Route(gateway, interface)
    return result


LINUX = System(
    lay_linux,
    remove_linux,
    False,
    lambda: read_ip_route(output("ip", "-json", "route")),
)
MACOS = System(
    lay_macos,
    remove_macos,
    True,
    lambda: read_netstat(output("netstat", "-rn", "-f", "inet")),
)


class Outcome(NamedTuple):
    """Whether the routes are "as wanted", "changed" or "refused", and more in words."""

    routes: str
    words: str


def this_system() -> System:
    """Return the commands of the system that this host runs."""
    return MACOS if sys.platform == "darwin" else LINUX


def reroute(number: int, hosts: int, carrying: Set[Cable]) -> Outcome:
    """Lay the routes of this host, host `number` of `hosts`, over `carrying`."""
    system = this_system()
    own = cables.host_address(number)
    interface_of = cables.interfaces()
    if own not in interface_of:
        return Outcome(
            "refused",
            f"this host has no address {own} on its cables: launch/cables gives it",
        )
    wanted = {}
    through = cables.routes(number, carrying)
    for other, neighbour in through.items():
        address, gateway = cables.end(number, neighbour)
        if address not in interface_of:
            return Outcome("refused", f"no interface of this host has {address}")
        wanted[cables.host_address(other)] = Route(gateway, interface_of[address])
    laid = system.laid()
    others = RING_ADDRESSES[:hosts]
    others.remove(own)
    commands = []
    for target in others:
        if wanted.get(target) == laid.get(target):
            continue
        if target in laid and (system.clear or target not in wanted):
            commands.append(system.remove(target))
        if target in wanted:
            commands.append(system.lay(target, wanted[target], own))
    for command in commands:
        if says := _run_as_root(command):
            program = f"{shlex.quote(sys.executable)} -m mlxtp.cluster.reroute"
            topology = cables.named(carrying, hosts)
            by_hand = f"sudo {program} {number} {hosts} --topology={topology}"
            return Outcome("refused", f"{says}; by hand: {by_hand}")
    direct = sum(other == neighbour for other, neighbour in through.items())
    words = f"{len(wanted)} routes, {direct} of them to neighbours"
    if lost := [target for target in others if target not in wanted]:
        words += f"; no way leads to {', '.join(lost)}"
    return Outcome("changed" if commands else "as wanted", words)


def _run_as_root(command: list[str]) -> str | None:
    """Run a command as root, by sudo where needed; return what went wrong."""
    words = command if os.geteuid() == 0 else ["sudo", "-n", *command]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode == 0:
        return None
    said = (done.stderr or done.stdout).strip() or f"status {done.returncode}"
    return f"`{shlex.join(words)}` failed: {said}"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse and check the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m mlxtp.cluster.reroute", description=__doc__
    )
    parser.add_argument("number", metavar="K", type=int, help="this host, 1 to N")
    parser.add_argument("hosts", metavar="N", type=int, help="hosts on the cables")
    parser.add_argument(
        "--topology",
        required=True,
        metavar="CABLES",
        help="those that carry something: ring, mesh, or some such as 1-2,2-3, between "
        "hosts 1 and 2, ...",
    )
    args = parser.parse_args(arguments)
    if not 2 <= args.hosts <= cables.MOST_HOSTS:
        parser.error(f"cables join 2 to {cables.MOST_HOSTS} hosts, not {args.hosts}")
    if not 1 <= args.number <= args.hosts:
        parser.error(f"K is one of 1 to {args.hosts}, not {args.number}")
    try:
        args.topology = cables.parse(args.topology, args.hosts)
    except ValueError as error:
        parser.error(f"--topology: {error}")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """Lay the routes and print how it went."""
    args = parse(arguments)
    outcome = reroute(args.number, args.hosts, args.topology)
    print(json.dumps(outcome._asdict()))


if __name__ == "__main__":
    main()
