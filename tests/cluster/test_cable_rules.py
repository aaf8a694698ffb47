"""Routes in a ring with broken cables arrive; a host finds its ports and neighbours."""

import json
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlxtp.cluster import ring

pytestmark = pytest.mark.once


@st.composite
def broken_rings(draw: st.DrawFn) -> tuple[int, frozenset[int]]:
    """A number of hosts, and cables that are broken; those of lost hosts as well."""
    hosts = draw(st.integers(2, 9))
    cables = st.integers(1, 1 if hosts == 2 else hosts)
    return hosts, draw(st.frozensets(cables, max_size=4))


def joined(hosts: int, broken: frozenset[int]) -> dict[int, set[int]]:
    """Whom each host is joined to by unbroken cables, itself among them."""
    groups = {host: {host} for host in range(1, hosts + 1)}
    for cable in range(1, 2 if hosts == 2 else hosts + 1):
        if cable not in broken:
            group = groups[cable] | groups[cable % hosts + 1]
            for host in group:
                groups[host] = group
    return groups


@given(broken_rings())
def test_every_pair_that_is_joined_meets(case: tuple[int, frozenset[int]]) -> None:
    """Hop by hop, without a circle, and back by the same cables."""
    hosts, broken = case
    tables = {k: ring.routes(k, hosts, broken) for k in range(1, hosts + 1)}
    ends = {k: ring.ends(k, hosts) for k in tables}
    owner = {end.address: k for k in ends for end in ends[k].values()}

    def passed(source: int, target: int) -> list[int]:
        """The cables from a host to another, as each host on the way decides."""
        cables: list[int] = []
        while source != target:
            hop = tables[source][target]
            end = ends[source][hop.side]
            assert hop.gateway == end.neighbour
            source = owner[end.neighbour]
            cables.append(end.cable)
            assert len(cables) < hosts, "a circle"
        return cables

    for source, group in joined(hosts, broken).items():
        assert tables[source].keys() == group - {source}
        for target in tables[source]:
            cables = passed(source, target)
            assert broken.isdisjoint(cables)
            assert cables == passed(target, source)[::-1]


@pytest.mark.parametrize("hosts", [2, 3, 4, 5, 9])
def test_nothing_broken_is_the_shorter_way(hosts: int) -> None:
    for number in range(1, hosts + 1):
        for other, hop in ring.routes(number, hosts).items():
            right, left = (other - number) % hosts, (number - other) % hosts
            if right != left:
                assert hop.side == ("right" if right < left else "left")


def test_a_lost_host_is_two_broken_cables() -> None:
    """Of five in a ring host 3 is lost: host 2 reaches 4 through 1 and 5."""
    hops = ring.routes(2, 5, {2, 3})
    assert hops == {other: ring.Hop("10.88.1.1", "left") for other in (1, 4, 5)}
    assert ring.routes(3, 5, {2, 3}) == {}
    assert ring.routes(1, 2, {1}) == {}


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
"""


def entry(name: str, *addresses: str) -> dict[str, object]:
    """An interface as `ip -json address` prints it, in part."""
    inet6 = {"family": "inet6", "local": "fe80::1", "prefixlen": 64}
    info = [{"family": "inet", "local": address} for address in addresses]
    return {"ifname": name, "addr_info": [*info, inet6]}


@pytest.mark.parametrize("system", ["linux", "darwin"])
def test_interfaces_by_address(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [
        entry("lo", "127.0.0.1"),
        entry("en0", "192.168.1.20"),
        entry("en2", "10.89.0.3", "10.88.2.2"),
        entry("en3", "10.89.0.3", "10.88.3.1"),
    ]
    printed = {
        ("ip", "-json", "address"): json.dumps(entries),
        ("ifconfig",): IFCONFIG,
    }
    monkeypatch.setattr(ring.sys, "platform", system)
    monkeypatch.setattr(ring, "output", lambda *words: printed[words])
    found = ring.interfaces()
    del found["127.0.0.1"]
    assert found == {
        "192.168.1.20": "en0",
        "10.89.0.3": "en2",
        "10.88.2.2": "en2",
        "10.88.3.1": "en3",
    }
    ends = ring.ends(3, 5)
    assert found[ends["left"].address] == "en2"
    assert found[ends["right"].address] == "en3"


def test_no_command_tells_the_interfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "output", lambda *words: "")
    assert ring.interfaces() == {}


def end(address: str, neighbour: str) -> ring.End:
    return ring.End(1, address, neighbour)


def test_who_refuses_is_there() -> None:
    """So is who listens; not who has no such address of its own."""
    assert ring.refuses(end("127.0.0.1", "127.0.0.1"))
    assert not ring.refuses(end("192.0.2.1", "127.0.0.1"))


def test_who_listens_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(ring, "CLOSED_PORT", server.getsockname()[1])
        assert ring.refuses(end("127.0.0.1", "127.0.0.1"))


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
    monkeypatch.setattr(ring, "refuses", lambda end: False)
    assert ring.answering(3, 5) == {2: False, 3: False}
    for received, says in (0, False), (1, True):
        text = printed.format(received, 100 - 100 * received)
        # Only the neighbour on the left is asked with success.
        script = f"case $* in *10.88.2.2*10.88.2.1) cat <<'E'\n{text}E\nesac\n"
        ping.write_text(f"#!/bin/sh\n{script}")
        ping.chmod(0o755)
        assert ring.answering(3, 5) == {2: says, 3: False}
