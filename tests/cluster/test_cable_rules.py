"""Routes over any cables arrive; a host finds its ports and neighbours."""

import json
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxtp.cluster import cables
from mlxtp.cluster.cables import Cable
from mlxtp.comm.transports import openmpi

pytestmark = pytest.mark.once

Some = tuple[int, frozenset[Cable]]


@st.composite
def some_cables(draw: st.DrawFn) -> Some:
    """A number of hosts, and what is left of a ring or a mesh; or any cables."""
    hosts = draw(st.integers(2, 9))
    all_cables = draw(st.sampled_from([cables.ring(hosts), cables.mesh(hosts)]))
    broken = draw(st.frozensets(st.sampled_from(sorted(all_cables)), max_size=12))
    lost = draw(st.integers(0, hosts))
    left = all_cables - broken
    return hosts, frozenset(cable for cable in left if lost not in cable)


def joined(hosts: int, there: frozenset[Cable]) -> dict[int, set[int]]:
    """Whom each host is joined to by cables, itself among them."""
    groups = {host: {host} for host in range(1, hosts + 1)}
    for a, b in there:
        group = groups[a] | groups[b]
        for host in group:
            groups[host] = group
    return groups


def passed(source: int, target: int, tables: dict[int, dict[int, int]]) -> list[Cable]:
    """The cables from a host to another, as each host on the way decides."""
    way: list[Cable] = []
    while source != target:
        after = tables[source][target]
        way.append(cables.between(source, after))
        source = after
        assert len(way) < len(tables), "a circle"
    return way


@given(some_cables())
def test_every_pair_that_is_joined_meets(case: Some) -> None:
    """Hop by hop, without a circle, and back by the same cables."""
    hosts, there = case
    tables = {k: cables.routes(k, there) for k in range(1, hosts + 1)}
    for source, group in joined(hosts, there).items():
        assert tables[source].keys() == group - {source}
        for target in tables[source]:
            way = passed(source, target, tables)
            assert there.issuperset(way)
            assert way == passed(target, source, tables)[::-1]
            if cables.between(source, target) in there:
                assert len(way) == 1


def hops(there: frozenset[Cable]) -> dict[Cable, int]:
    """How many cables are between each two hosts that have one."""
    here = sorted({host for cable in there for host in cable})
    tables = {host: cables.routes(host, there) for host in here}
    return {Cable(a, b): len(passed(a, b, tables)) for a in here for b in here if a < b}


@pytest.mark.parametrize("hosts", range(3, 9))
def test_a_mesh_without_any_cable_or_host(hosts: int) -> None:
    """The two go through one other host; without a host nobody takes another way."""
    whole = cables.mesh(hosts)
    assert hops(whole) == dict.fromkeys(whole, 1)
    for cable in whole:
        assert hops(whole - {cable}) == dict.fromkeys(whole, 1) | {cable: 2}
    for host in range(1, hosts + 1):
        left = frozenset(cable for cable in whole if host not in cable)
        assert hops(left) == dict.fromkeys(left, 1)


@pytest.mark.parametrize("hosts", [2, 3, 4, 5, 8, 9])
def test_a_ring_takes_the_shorter_way(hosts: int) -> None:
    """Between opposite hosts, to the right of the lower number."""
    for number in range(1, hosts + 1):
        for other, neighbour in cables.routes(number, cables.ring(hosts)).items():
            right, left = (other - number) % hosts, (number - other) % hosts
            step = 1 if (right, number) < (left, other) else -1
            assert neighbour == (number - 1 + step) % hosts + 1


def test_a_host_that_is_lost() -> None:
    """Of five in a ring host 3 is lost: host 2 reaches 4 through 1 and 5."""
    left = cables.ring(5) - {Cable(2, 3), Cable(3, 4)}
    assert cables.routes(2, left) == {1: 1, 4: 1, 5: 1}
    assert cables.routes(3, left) == {}
    assert cables.routes(1, set()) == {}


@pytest.mark.parametrize("hosts", [2, 3, 4, 5, 8, 9, cables.MOST_HOSTS])
def test_each_cable_is_a_network_of_its_own(hosts: int) -> None:
    """A cable's ends agree on it; to the next host they are 10.88.K.1 and 10.88.K.2."""
    networks = set()
    for a, b in cables.mesh(hosts):
        near, far = cables.end(a, b), cables.end(b, a)
        assert (near.address, near.neighbour) == (far.neighbour, far.address)
        network = {address.rpartition(".")[0] for address in near}
        last = sorted(int(address.rpartition(".")[2]) for address in near)
        assert len(network) == 1 and last[0] % 4 == 1 and last[1] == last[0] + 1 < 255
        networks.add((*network, last[0]))
    assert len(networks) == len(cables.mesh(hosts))
    for number in range(1, hosts):
        ends = (f"10.88.{number}.1", f"10.88.{number}.2")
        assert cables.end(number, number + 1) == ends


def test_some_hosts_of_a_mesh_find_their_cables() -> None:
    """A job of the first four of five finds what was laid for five."""
    for number in range(1, 5):
        ends = {k: cables.end(number, k) for k in range(1, 6) if k != number}
        known = [end.address for end in ends.values()]
        assert cables.laid(number, 5, known) == ends
        del ends[5]
        assert cables.laid(number, 4, known) == ends


def test_topologies_as_they_are_written() -> None:
    assert cables.parse("ring", 5) == cables.parse("1-2,2-3,3-4,4-5,1-5", 5)
    assert cables.parse("", 5) == frozenset()
    some = frozenset({Cable(1, 4), Cable(2, 3)})
    assert cables.named(some, 5) == "1-4,2-3" and cables.parse("1-4,2-3", 5) == some
    for topology in "ring", "mesh":
        assert cables.named(cables.parse(topology, 4), 4) == topology
    for wrong in "1-6", "2-1", "1-1", "ring,1-2":
        with pytest.raises(ValueError, match="wanted ring, mesh, or cables between"):
            cables.parse(wrong, 5)


IFCONFIG = """\
lo0: flags=8049<UP,LOOPBACK,RUNNING,MULTICAST> mtu 16384
\tinet 127.0.0.1 netmask 0xff000000
\tinet6 ::1 prefixlen 128
en0: flags=8863<UP,BROADCAST,SMART,RUNNING,SIMPLEX,MULTICAST> mtu 1500
\tinet 192.168.1.20 netmask 0xffffff00 broadcast 192.168.1.255
\tstatus: active
en2: flags=8863<UP,BROADCAST,SMART,RUNNING,SIMPLEX,MULTICAST> mtu 1500
\tinet 10.89.0.3 netmask 0xffffffff broadcast 10.89.0.3
\tinet 10.88.2.2 netmask 0xfffffffc broadcast 10.88.2.3
en3: flags=8863<UP,BROADCAST,SMART,RUNNING,SIMPLEX,MULTICAST> mtu 1500
\tinet 10.89.0.3 netmask 0xffffffff broadcast 10.89.0.3
\tinet 10.88.3.1 netmask 0xfffffffc broadcast 10.88.3.3
en4: flags=8822<BROADCAST,SMART,SIMPLEX,MULTICAST> mtu 1500
\tinet 10.88.3.5 netmask 0xfffffffc broadcast 10.88.3.7
"""


def entry(name: str, *addresses: str) -> dict[str, object]:
    """An interface as `ip -json address` prints it, in part."""
    inet6 = {"family": "inet6", "local": "fe80::1", "prefixlen": 64}
    info = [{"family": "inet", "local": address} for address in addresses]
    flags = ["BROADCAST", "LOWER_UP"] if name == "en4" else ["BROADCAST", "UP"]
    return {"ifname": name, "flags": flags, "addr_info": [*info, inet6]}


@pytest.mark.parametrize("system", ["linux", "darwin"])
def test_interfaces_by_address(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [
        entry("lo", "127.0.0.1"),
        entry("en0", "192.168.1.20"),
        entry("en2", "10.89.0.3", "10.88.2.2"),
        entry("en3", "10.89.0.3", "10.88.3.1"),
        entry("en4", "10.88.3.5"),
    ]
    printed = {
        ("ip", "-json", "address"): json.dumps(entries),
        ("ifconfig",): IFCONFIG,
    }
    monkeypatch.setattr(cables.sys, "platform", system)
    monkeypatch.setattr(cables, "output", lambda *words: printed[words])
    found = cables.interfaces()
    del found["127.0.0.1"]
    assert found == {
        "192.168.1.20": "en0",
        "10.89.0.3": "en2",
        "10.88.2.2": "en2",
        "10.88.3.1": "en3",
        "10.88.3.5": "en4",
    }
    assert "10.88.3.5" not in cables.interfaces(up=True)
    assert cables.interfaces(up=True)["10.89.0.3"] == "en2"
    assert cables.addresses()["en3"] == ["10.89.0.3", "10.88.3.1"]
    ends = cables.laid(3, 5, found)
    assert {other: found[end.address] for other, end in ends.items()} == {
        2: "en2",
        4: "en3",
        5: "en4",
    }
    assert ends[2].neighbour == "10.88.2.1" and ends[4].neighbour == "10.88.3.2"


def test_open_mpi_takes_a_port_that_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those with the host's address; the person's own choice stays."""
    entries = [entry("en4", "10.89.0.3"), entry("en2", "10.89.0.3", "10.88.2.2")]
    monkeypatch.setattr(cables.sys, "platform", "linux")
    monkeypatch.setattr(cables, "output", lambda *words: json.dumps(entries))
    monkeypatch.setattr(openmpi, "ring_address", lambda: "10.89.0.3")
    monkeypatch.setattr(openmpi.os, "environ", {})
    openmpi.set_defaults()
    assert openmpi.os.environ["OMPI_MCA_btl_tcp_if_include"] == "en2"
    openmpi.os.environ["OMPI_MCA_btl_tcp_if_include"] = "en0"
    openmpi.set_defaults()
    assert openmpi.os.environ["OMPI_MCA_btl_tcp_if_include"] == "en0"


def test_no_command_tells_the_interfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cables, "output", lambda *words: "")
    assert cables.interfaces() == {}


def end(address: str, neighbour: str) -> cables.End:
    return cables.End(address, neighbour)


def test_who_refuses_is_there() -> None:
    """So is who listens; not who has no such address of its own."""
    assert cables.refuses(end("127.0.0.1", "127.0.0.1"))
    assert not cables.refuses(end("192.0.2.1", "127.0.0.1"))


def test_who_listens_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(cables, "CLOSED_PORT", server.getsockname()[1])
        assert cables.refuses(end("127.0.0.1", "127.0.0.1"))


LINUX_PING = """\
PING 127.0.0.1 (127.0.0.1) from 127.0.0.1 : 56(84) bytes of data.
64 bytes from 127.0.0.1: icmp_seq=1 ttl=64 time=0.025 ms

--- 127.0.0.1 ping statistics ---
1 packets transmitted, {} received, {}% packet loss, time 0ms
"""
MACOS_PING = """\
PING 127.0.0.1 (127.0.0.1) from 127.0.0.1: 56 data bytes
64 bytes from 127.0.0.1: icmp_seq=0 ttl=64 time=0.061 ms

--- 127.0.0.1 ping statistics ---
1 packets transmitted, {} packets received, {}% packet loss
"""


@pytest.mark.parametrize("printed", [LINUX_PING, MACOS_PING], ids=["linux", "macos"])
def test_who_drops_connections_may_echo(
    printed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A neighbour whose firewall drops connections is there if `ping` says so."""
    ping = tmp_path / "ping"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(cables, "refuses", lambda end: False)
    # Host 3 of 5 in a mesh of which the cable to host 5 has not been set up.
    own = dict.fromkeys(["10.88.2.2", "10.88.3.1", "10.88.1.6"], "en2")
    monkeypatch.setattr(cables, "interfaces", lambda: own)
    assert cables.answering(3, 5) == {1: False, 2: False, 4: False}
    for received, says in (0, False), (1, True):
        text = printed.format(received, 100 - 100 * received)
        # Only host 2 is asked with success.
        script = f"case $* in *10.88.2.2*10.88.2.1) cat <<'E'\n{text}E\nesac\n"
        ping.write_text(f"#!/bin/sh\n{script}")
        ping.chmod(0o755)
        assert cables.answering(3, 5) == {1: False, 2: says, 4: False}
