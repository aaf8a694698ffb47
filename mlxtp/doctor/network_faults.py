"""What is wrong with the links between hosts."""

from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from statistics import median

from mlxtp.cluster.addresses import RING_ADDRESSES
from mlxtp.doctor.findings import Fault, Findings, Pair
from mlxtp.doctor.fixes import cables_command, mtu_command, sudo
from mlxtp.doctor.machine import Machine

# A link is slow if its rate is below that of its peers by this factor, or its latency
# above theirs by the factor and the seconds: noise on a busy machine stays below.
SLOW = 2.0
SLOW_LATENCY_SECONDS = 0.0003
# Fewer links do not tell which of them is the slow one.
FEWEST_PEERS = 3


def addresses(findings: Findings) -> Iterator[Fault]:
    """Yield the hosts without an address of their own on the cables."""
    if not findings.on_cables:
        return
    owners: dict[str, str] = {}
    for machine in findings.hosts:
        address = machine.address
        if address not in RING_ADDRESSES:
            what = f"no address 10.89.0.K, which others have: its data go by {address}"
            yield Fault(machine.host, what, cables_command(findings, machine))
        elif address in owners:
            what = f"the address {address} is also that of {owners[address]}"
            undo = cables_command(findings, machine).replace(
                "--apply", "--undo --apply"
            )
            fix = f"{undo}, then launch/cables with its own number"
            yield Fault(machine.host, what, fix)
        owners.setdefault(address, machine.host)


def forwarding(findings: Findings) -> Iterator[Fault]:
    """Yield the hosts that others' packets pass and that do not forward them."""
    between = Counter(
        rank for path in findings.paths.values() for rank in path.ranks[1:-1]
    )
    for machine in findings.machines:
        if machine.rank in between and machine.facts.forwards is False:
            name = (
                "net.inet.ip.forwarding"
                if machine.facts.system == "macOS"
                else "net.ipv4.ip_forward"
            )
            what = "IP forwarding is off: what others send through it is dropped"
            yield Fault(machine.host, what, f"{sudo(machine)}sysctl -w {name}=1")


def routes(findings: Findings) -> Iterator[Fault]:
    """Yield the hosts without a route to another."""
    for machine in findings.machines:
        missing = {
            b
            for (_, b), path in findings.paths.items()
            if path.stopped == "no route" and path.ranks[-1] == machine.rank
        }
        if missing:
            names = ", ".join(
                f"{findings.machines[rank].address} ({findings.machines[rank].host})"
                for rank in sorted(missing)
            )
            yield Fault(
                machine.host, f"no route to {names}", cables_command(findings, machine)
            )


def cables(findings: Findings) -> Iterator[Fault]:
    """Yield the pairs of neighbours between which nothing passes."""
    for a, b in _dead(findings):
        near, far = findings.machines[a], findings.machines[b]
        down = [
            findings.at(x, y)
            for x, y in ((a, b), (b, a))
            if (port := findings.port(x, y)) and not port.up
        ]
        state = f" ({' and '.join(down)} is down)" if down else ""
        what = (
            f"nothing passes between {findings.at(a, b)} and {findings.at(b, a)}{state}"
        )
        route = findings.routes[a].get(far.address)
        target = (route and route.gateway) or far.address
        look = f"on {near.host}: ping -c 3 {target}"
        fix = f"put the cable in again at both ends (else see the firewalls), {look}"
        yield Fault(f"{near.host} - {far.host}", what, fix)


def unreached(findings: Findings) -> Iterator[Fault]:
    """Yield the pairs that do not reach each other, without a reason given before.

    Reasons are a missing route, a cable without traffic, a host that does not forward.
    """
    dead = set(_dead(findings))
    closed = {
        machine.rank for machine in findings.machines if machine.facts.forwards is False
    }
    for a, b in findings.pairs:
        there, back = findings.paths[a, b], findings.paths[b, a]
        explained = (
            there.stopped
            or back.stopped
            or dead & {*there.cables, *back.cables}
            or closed & {*there.ranks[1:-1], *back.ranks[1:-1]}
        )
        if (a, b) not in findings.links and not explained:
            near, far = findings.machines[a], findings.machines[b]
            where = f"{near.host} - {far.host}"
            what = f"they do not reach each other at {near.address} and {far.address}"
            yield Fault(where, what, f"on {near.host}: ping -c 3 {far.address}")


def detours(findings: Findings) -> Iterator[Fault]:
    """Yield the hosts whose data go over Wi-Fi, or past the cables that they have."""
    for machine in findings.machines:
        others = {
            other.host: port
            for other in findings.machines
            if other.host != machine.host
            and (port := findings.port(machine.rank, other.rank))
            and (
                port.kind == "Wi-Fi"
                or findings.paths[machine.rank, other.rank].stopped == "astray"
                or (_has_cable(machine) and not port.kind.startswith("Thunderbolt"))
            )
        }
        if others:
            ports = sorted({str(port) for port in others.values()})
            what = (
                f"data to {', '.join(others)} go by {', '.join(ports)}, not by a cable"
            )
            yield Fault(machine.host, what, cables_command(findings, machine))


def slow_links(findings: Findings) -> Iterator[Fault]:
    """Yield the links that are much slower than those of as many hops."""
    for pair, says in slow_pairs(findings).items():
        yield _slow_link(findings, pair, says)
    yield from _slow_ports(findings)


def slow_pairs(findings: Findings) -> dict[Pair, str]:
    """Return the links that are slower than their peers, and the figures.

    Where a slow cable is the reason for others, the cable alone.
    """
    slow: dict[Pair, str] = {}
    by_hops: dict[int, list[Pair]] = {}
    for pair in findings.links:
        if findings.machines[pair[0]].host == findings.machines[pair[1]].host:
            continue  # memory joins ranks of one host
        by_hops.setdefault(findings.paths[pair].hops, []).append(pair)
    for _, pairs in sorted(by_hops.items()):
        if len(pairs) < FEWEST_PEERS:
            continue
        latency = median(findings.links[pair].latency_seconds for pair in pairs)
        rate = median(findings.links[pair].bytes_per_second or 0 for pair in pairs)
        for pair in pairs:
            link = findings.links[pair]
            if slow.keys() & set(findings.paths[pair].cables):
                continue
            says = []
            if link.latency_seconds > SLOW * latency + SLOW_LATENCY_SECONDS:
                ours, theirs = 1e3 * link.latency_seconds, 1e3 * latency
                says.append(f"{ours:.2f} ms one way, its peers {theirs:.2f} ms")
            if link.bytes_per_second and link.bytes_per_second < rate / SLOW:
                ours, theirs = link.bytes_per_second, rate
                says.append(f"{ours / 1e9:.3f} GB/s, its peers {theirs / 1e9:.3f} GB/s")
            if says:
                slow[pair] = "; ".join(says)
    return slow


def packets(findings: Findings) -> Iterator[Fault]:
    """Yield cables with ends of other MTUs, and links that drop long messages."""
    for a, b in findings.pairs:
        here, there = findings.port(a, b), findings.port(b, a)
        near, far = findings.machines[a], findings.machines[b]
        one_hop = findings.paths[a, b].hops == findings.paths[b, a].hops == 1
        link = findings.links.get((a, b))
        if here and there and one_hop and here.mtu != there.mtu:
            end, port, mtu = min(
                (near, here, there.mtu),
                (far, there, here.mtu),
                key=lambda side: side[1].mtu,
            )
            what = (
                f"packets on {port} have {port.mtu} bytes (MTU), at the other end {mtu}"
            )
            yield Fault(end.host, what, mtu_command(end, port.name, mtu))
        elif link and link.bytes_per_second is None:
            what = "short messages pass, long ones do not (MTU?)"
            ping = f"on {near.host}: ping -c 3 -s 8000 {far.address}"
            yield Fault(f"{near.host} - {far.host}", what, ping)


def lacking(findings: Findings) -> Iterator[Fault]:
    """Yield the pairs whose data go past their cable, and those without one in a mesh.

    More cables than hosts are meant to be a mesh.
    """
    is_mesh = len(findings.cables) > len(findings.hosts)
    for a, b in combinations([host.rank for host in findings.hosts], 2):
        path, has_cable = findings.paths[a, b], (a, b) in findings.cables
        if path.stopped or path.hops == 1 or not (has_cable or is_mesh):
            continue
        near, far = findings.machines[a].host, findings.machines[b].host
        through = ", ".join(findings.machines[rank].host for rank in path.ranks[1:-1])
        what = f"their data go through {through}: "
        if has_cable:
            what += "the routes were laid past the cable that joins them"
            fix = "put it in again at both ends"
        else:
            what += "no cable joins them, as others are joined in a mesh"
            fix = "put one in"
        fix += ", then launch/cables HOSTFILE --apply"
        yield Fault(f"{near} - {far}", what, fix)


def order(findings: Findings) -> Iterator[Fault]:
    """Yield the hostfile, if successive ranks are no neighbours in a ring of cables."""
    if any(path.stopped for path in findings.paths.values()) or len(findings.hosts) < 4:
        return
    size = len(findings.machines)
    far = [r for r in range(size) if findings.paths[r, (r + 1) % size].hops > 1]
    circle = _circle(findings)
    if far and circle and len(findings.hosts) == size:
        a, b = (
            findings.machines[far[0]].host,
            findings.machines[(far[0] + 1) % size].host,
        )
        names = ", ".join(findings.machines[rank].host for rank in circle)
        what = f"{a} and {b} follow each other, and no cable joins them"
        yield Fault("hostfile", what, f"write its lines in the ring's order: {names}")


def _circle(findings: Findings) -> list[int]:
    """All ranks in the order of a ring of cables; empty if they are in none."""
    size = len(findings.machines)
    near: dict[int, list[int]] = {rank: [] for rank in range(size)}
    for (a, b), path in findings.paths.items():
        if path.hops == 1:
            near[a].append(b)
    if any(len(others) != 2 for others in near.values()):
        return []
    circle = [0]
    while after := [rank for rank in near[circle[-1]] if rank not in circle]:
        circle.append(min(after))
    return circle if len(circle) == size else []


def _dead(findings: Findings) -> list[Pair]:
    """Pairs that are neighbours by their routes and do not reach each other."""
    return [
        (a, b)
        for a, b in findings.pairs
        if (a, b) not in findings.links
        and not findings.paths[a, b].stopped
        and not findings.paths[b, a].stopped
        and findings.paths[a, b].hops == 1
    ]


def _has_cable(machine: Machine) -> bool:
    return any(
        port.up and port.kind.startswith("Thunderbolt")
        for port in machine.facts.interfaces
    )


def _slow_ports(findings: Findings) -> Iterator[Fault]:
    """Cables that have agreed on a lower rate than the others."""
    rates = {}
    for a, b in findings.pairs:
        ends = [findings.port(a, b), findings.port(b, a)]
        known = [port.bits_per_second for port in ends if port and port.bits_per_second]
        if findings.paths[a, b].hops == 1 and known:
            rates[a, b] = min(known)
    usual = median(rates.values()) if len(rates) >= FEWEST_PEERS else 0
    for pair, rate in rates.items():
        if rate < usual:
            says = f"runs at {rate / 1e9:g} Gb/s, its peers at {usual / 1e9:g} Gb/s"
            yield _slow_link(findings, pair, says)


def _slow_link(findings: Findings, pair: Pair, says: str) -> Fault:
    a, b = pair
    hosts = f"{findings.machines[a].host} - {findings.machines[b].host}"
    what = f"a slow link, {findings.at(a, b)} to {findings.at(b, a)}: {says}"
    return Fault(hosts, what, "put another cable there, or into another port")
