"""Lay the routes of this host in a ring of cables so that they avoid broken ones.

`python -m mlxtp.cluster.reroute K N --broken 2,3`, on host K of N; with `--broken ""`
they are laid as `launch/cables` lays them. Routes to hosts that no way reaches are
removed; addresses stay as they are. It takes root, or a sudo that asks for no password.
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

from mlxtp.cluster import ring
from mlxtp.cluster.addresses import RING_ADDRESSES
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
        laid: the routes to addresses of the ring, as they are.
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
    """Read the routes to hosts of the ring from what `ip -json route` prints."""
    return {
        entry["dst"]: Route(entry.get("gateway", ""), entry.get("dev", ""))
        for entry in json.loads(text or "[]")
        if entry.get("dst") in RING_ADDRESSES
    }


def read_netstat(text: str) -> dict[str, Route]:
    """Read the routes to hosts of the ring from what `netstat -rn` of macOS prints."""
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


def reroute(number: int, hosts: int, broken: Set[int]) -> Outcome:
    """Lay the routes of this host, number `number` of `hosts`, past broken cables."""
    system = MACOS if sys.platform == "darwin" else LINUX
    own = ring.host_address(number)
    interface_of = ring.interfaces()
    if own not in interface_of:
        return Outcome(
            "refused",
            f"this host has no address {own} on its cables: "
            f"`launch/cables {number} {hosts} --apply`, as root, gives it",
        )
    ends = ring.ends(number, hosts)
    wanted = {}
    for other, hop in ring.routes(number, hosts, broken).items():
        address = ends[hop.side].address
        if address not in interface_of:
            return Outcome("refused", f"no interface of this host has {address}")
        wanted[ring.host_address(other)] = Route(hop.gateway, interface_of[address])
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
            by_hand = f"sudo {program} {number} {hosts} --broken {_listed(broken)}"
            return Outcome("refused", f"{says}; by hand: {by_hand}")
    words = f"{len(wanted)} routes go "
    words += f"past {_listed(broken)}" if broken else "the shorter way round"
    if lost := [target for target in others if target not in wanted]:
        words += f"; no way leads to {', '.join(lost)}"
    return Outcome("changed" if commands else "as wanted", words)


def _listed(cables: Set[int]) -> str:
    return ",".join(map(str, sorted(cables))) or "''"


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
    parser.add_argument("hosts", metavar="N", type=int, help="hosts in the ring")
    parser.add_argument(
        "--broken",
        required=True,
        metavar="CABLES",
        help="such as 2,3: cable i joins hosts i and i + 1, cable N hosts N and 1",
    )
    args = parser.parse_args(arguments)
    if not 2 <= args.hosts <= ring.MOST_HOSTS:
        parser.error(f"a ring has 2 to {ring.MOST_HOSTS} hosts, not {args.hosts}")
    if not 1 <= args.number <= args.hosts:
        parser.error(f"K is one of 1 to {args.hosts}, not {args.number}")
    words = [word for word in args.broken.split(",") if word]
    cables = {str(cable) for cable in range(1, args.hosts + 1)}
    if not cables.issuperset(words):
        parser.error(f"--broken names cables 1 to {args.hosts}, not {args.broken}")
    args.broken = frozenset(map(int, words))
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """Lay the routes and print how it went."""
    args = parse(arguments)
    print(json.dumps(reroute(args.number, args.hosts, args.broken)._asdict()))


if __name__ == "__main__":
    main()
