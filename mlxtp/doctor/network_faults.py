"""What is wrong between hosts."""

from collections import Counter
from collections.abc import Iterator
from statistics import median

from mlxtp.cluster.addresses import RING_ADDRESSES
from mlxtp.doctor.findings import Fault, Findings, Pair
from mlxtp.doctor.machine import Machine
from mlxtp.doctor.mends import mtu_command, ring_command, sudo

# A link is slow beside its peers: noise is less on a machine that is not idle.
SLOW = 2.0
SLOW_LATENCY_SECONDS = 0.0003
FEWEST_PEERS = 3


def addresses(found: Findings) -> Iterator[Fault]:
    """All hosts have an address of their own in the ring, or none has."""
    if not found.is_ring:
        return
    owners: dict[str, str] = {}
    for it in found.hosts:
        if it.address not in RING_ADDRESSES:
            what = (
                f"no address 10.89.0.K, which others have: its data go by {it.address}"
            )
            yield Fault(it.host, what, ring_command(found, it))
        elif it.address in owners:
            what = f"the address {it.address} is also that of {owners[it.address]}"
            undo = ring_command(found, it).replace("--apply", "--undo --apply")
            yield Fault(
                it.host, what, f"{undo}, then launch/cables with its own number"
            )
        owners.setdefault(it.address, it.host)


def forwarding(found: Findings) -> Iterator[Fault]:
    """Hosts between others pass their packets on."""
    between = Counter(
        rank for path in found.paths.values() for rank in path.ranks[1:-1]
    )
    for it in found.machines:
        if it.rank in between and it.facts.forwards is False:
            name = (
                "net.inet.ip.forwarding"
                if it.facts.system == "macOS"
                else "net.ipv4.ip_forward"
            )
            what = "IP forwarding is off: what others send through it is dropped"
            yield Fault(it.host, what, f"{sudo(it)}sysctl -w {name}=1")


def routes(found: Findings) -> Iterator[Fault]:
    """Every host has a way to every other."""
    for it in found.machines:
        missing = {
            b
            for (_, b), path in found.paths.items()
            if path.stopped == "no route" and path.ranks[-1] == it.rank
        }
        if missing:
            names = ", ".join(
                f"{found.machines[rank].address} ({found.machines[rank].host})"
                for rank in sorted(missing)
            )
            yield Fault(it.host, f"no route to {names}", ring_command(found, it))


def cables(found: Findings) -> Iterator[Fault]:
    """What stands between two neighbours carries something."""
    for a, b in _dead(found):
        near, far = found.machines[a], found.machines[b]
        down = [
            found.at(x, y)
            for x, y in ((a, b), (b, a))
            if (port := found.port(x, y)) and not port.up
        ]
        state = f" ({' and '.join(down)} is down)" if down else ""
        what = f"nothing passes between {found.at(a, b)} and {found.at(b, a)}{state}"
        route = found.routes[a].get(far.address)
        target = (route and route.gateway) or far.address
        look = f"on {near.host}: ping -c 3 {target}"
        mend = f"put the cable in again at both ends (else see the firewalls), {look}"
        yield Fault(f"{near.host} - {far.host}", what, mend)


def unreached(found: Findings) -> Iterator[Fault]:
    """Ranks reach each other; those that do not for a reason above are left out."""
    dead = set(_dead(found))
    closed = {it.rank for it in found.machines if it.facts.forwards is False}
    for a, b in found.pairs:
        there, back = found.paths[a, b], found.paths[b, a]
        explained = (
            there.stopped
            or back.stopped
            or dead & {*there.cables, *back.cables}
            or closed & {*there.ranks[1:-1], *back.ranks[1:-1]}
        )
        if (a, b) not in found.links and not explained:
            near, far = found.machines[a], found.machines[b]
            where = f"{near.host} - {far.host}"
            what = f"they do not reach each other at {near.address} and {far.address}"
            yield Fault(where, what, f"on {near.host}: ping -c 3 {far.address}")


def detours(found: Findings) -> Iterator[Fault]:
    """Data take the cables where there are cables, and never Wi-Fi."""
    for it in found.machines:
        others = {
            other.host: port
            for other in found.machines
            if other.host != it.host
            and (port := found.port(it.rank, other.rank))
            and (
                port.kind == "Wi-Fi"
                or found.paths[it.rank, other.rank].stopped == "astray"
                or (_has_cable(it) and not port.kind.startswith("Thunderbolt"))
            )
        }
        if others:
            ports = sorted({str(port) for port in others.values()})
            what = (
                f"data to {', '.join(others)} go by {', '.join(ports)}, not by a cable"
            )
            yield Fault(it.host, what, ring_command(found, it))


def slow_links(found: Findings) -> Iterator[Fault]:
    """No link is much slower than those of as many hops."""
    for pair, says in slow_pairs(found).items():
        yield _slow_link(found, pair, says)
    yield from _slow_ports(found)


def slow_pairs(found: Findings) -> dict[Pair, str]:
    """The links that are slow beside their peers, and how it shows.

    Of those that a slow cable is the reason for, the cable alone.
    """
    slow: dict[Pair, str] = {}
    by_hops: dict[int, list[Pair]] = {}
    for pair in found.links:
        if found.machines[pair[0]].host == found.machines[pair[1]].host:
            continue  # what joins ranks of a host is memory
        by_hops.setdefault(found.paths[pair].hops, []).append(pair)
    for _, pairs in sorted(by_hops.items()):
        if len(pairs) < FEWEST_PEERS:
            continue
        latency = median(found.links[pair].latency_seconds for pair in pairs)
        rate = median(found.links[pair].bytes_per_second or 0 for pair in pairs)
        for pair in pairs:
            link = found.links[pair]
            if slow.keys() & set(found.paths[pair].cables):
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


def packets(found: Findings) -> Iterator[Fault]:
    """Both ends of a cable take packets of the same size, and long messages pass."""
    for a, b in found.pairs:
        here, there = found.port(a, b), found.port(b, a)
        near, far = found.machines[a], found.machines[b]
        one_hop = found.paths[a, b].hops == found.paths[b, a].hops == 1
        link = found.links.get((a, b))
        if here and there and one_hop and here.mtu != there.mtu:
            it, port, mtu = min(
                (near, here, there.mtu),
                (far, there, here.mtu),
                key=lambda end: end[1].mtu,
            )
            what = (
                f"packets on {port} have {port.mtu} bytes (MTU), at the other end {mtu}"
            )
            yield Fault(it.host, what, mtu_command(it, port.name, mtu))
        elif link and link.bytes_per_second is None:
            what = "short messages pass, long ones do not (MTU?)"
            ping = f"on {near.host}: ping -c 3 -s 8000 {far.address}"
            yield Fault(f"{near.host} - {far.host}", what, ping)


def order(found: Findings) -> Iterator[Fault]:
    """Ranks that follow each other are neighbours in the ring."""
    if any(path.stopped for path in found.paths.values()) or len(found.hosts) < 4:
        return
    if all(path.hops == 1 for path in found.paths.values()):
        return
    size = len(found.machines)
    far = [r for r in range(size) if found.paths[r, (r + 1) % size].hops > 1]
    if far and len(found.hosts) == size:
        a, b = found.machines[far[0]].host, found.machines[(far[0] + 1) % size].host
        ring = sorted(found.hosts, key=lambda it: RING_ADDRESSES.index(it.address))
        names = ", ".join(it.host for it in ring)
        what = f"{a} and {b} follow each other, and no cable joins them"
        yield Fault("hostfile", what, f"write its lines in the ring's order: {names}")


def _dead(found: Findings) -> list[Pair]:
    """Neighbours, by their routes, that do not reach each other."""
    return [
        (a, b)
        for a, b in found.pairs
        if (a, b) not in found.links
        and not found.paths[a, b].stopped
        and not found.paths[b, a].stopped
        and found.paths[a, b].hops == 1
    ]


def _has_cable(machine: Machine) -> bool:
    return any(
        port.up and port.kind.startswith("Thunderbolt")
        for port in machine.facts.interfaces
    )


def _slow_ports(found: Findings) -> Iterator[Fault]:
    """Cables that have agreed on a lower rate than the others."""
    rates = {}
    for a, b in found.pairs:
        ends = [found.port(a, b), found.port(b, a)]
        known = [port.bits_per_second for port in ends if port and port.bits_per_second]
        if found.paths[a, b].hops == 1 and known:
            rates[a, b] = min(known)
    usual = median(rates.values()) if len(rates) >= FEWEST_PEERS else 0
    for pair, rate in rates.items():
        if rate < usual:
            says = f"runs at {rate / 1e9:g} Gb/s, its peers at {usual / 1e9:g} Gb/s"
            yield _slow_link(found, pair, says)


def _slow_link(found: Findings, pair: Pair, says: str) -> Fault:
    a, b = pair
    hosts = f"{found.machines[a].host} - {found.machines[b].host}"
    what = f"a slow link, {found.at(a, b)} to {found.at(b, a)}: {says}"
    return Fault(hosts, what, "put another cable there, or into another port")
