"""launch/cables: every pair of hosts meets by the shorter route; undo undoes all."""

import json
import os
import subprocess
import sys
from collections import deque
from dataclasses import asdict, replace
from pathlib import Path

import cabling
import pytest

from mlxtp.cluster import cables
from mlxtp.cluster.cables import Cable
from mlxtp.cluster.ports import Port, Ports

CABLES = Path(__file__).parents[2] / "launch" / "cables"
HOSTS = [2, 3, 4, 5, 6, 8, 9]
# A mesh of five without two cables, of which one is of host 1.
PART = cables.mesh(5) - {Cable(1, 4), Cable(2, 3)}
CASES = [("ring", hosts, cables.ring(hosts)) for hosts in HOSTS]
CASES += [("mesh", hosts, cables.mesh(hosts)) for hosts in (4, 5, 6)]
CASES += [("part", 5, PART)]

pytestmark = pytest.mark.once

each_system = pytest.mark.parametrize("system", ["linux", "macos"])
each_case = pytest.mark.parametrize(
    ("hosts", "there"),
    [(hosts, there) for _, hosts, there in CASES],
    ids=[f"{name}-{hosts}" for name, hosts, _ in CASES],
)


def host(number, hosts, there, before=None):
    """A host whose port to host K is pK."""
    ports = {k: f"p{k}" for k in cables.neighbours(number, there)}
    return cabling.Host(number, hosts, there, ports, before or {})


def commands(number, hosts, system, there, before=None):
    steps = cabling.SYSTEMS[system](host(number, hosts, there, before))
    return cabling.script(steps, [])


class Machine:
    """What a host's commands leave behind: addresses per interface, and routes."""

    def __init__(self, lines):
        self.addresses, self.routes, self.forwards = {}, {}, False
        self.run(lines)

    def run(self, lines):
        for line in lines:
            self.act(line.removesuffix(" 2>/dev/null || true").split())

    def act(self, words):
        match words:
            case ["sysctl", "-w", setting]:
                self.forwards = setting.endswith("=1")
            case ["ip", "address", "replace", address, "dev", interface]:
                self.add(interface, address.split("/")[0])
            case ["ip", "address", "del", address, "dev", interface]:
                self.addresses[interface].remove(address.split("/")[0])
            case ["ip", "route", "del", other]:
                del self.routes[other.split("/")[0]]
            case ["ip", "route", "replace", other, "via", *route]:
                gateway, _, interface, _, source = route
                self.routes[other.split("/")[0]] = interface, gateway, source
            case ["ifconfig", interface, "inet", address, "-alias"]:
                self.addresses[interface].remove(address)
            case ["ifconfig", interface, "inet", address, "netmask", _, *alias]:
                assert alias or self.addresses.get(interface, [])[:1] in ([], [address])
                self.add(interface, address)
            case ["route", "-n", "delete", "-host", other, *_]:
                self.routes.pop(other, None)
            case ["route", "-n", "add", "-host", other, gateway, "-ifp", port, *source]:
                self.routes[other] = port, gateway, source[1]
            case ["ip", "link", "set", _, "up" | "down"]:
                pass
            case ["ifconfig", _, "up"] | ["ifconfig", "bridge0", _, _, *_]:
                pass
            case _:
                raise AssertionError(words)

    def add(self, interface, address):
        own = self.addresses.setdefault(interface, [])
        if address not in own:
            own.append(address)


def shortest(source, target, there):
    """The fewest cables between two hosts."""
    queue, seen = deque([(source, 0)]), {source}
    while queue:
        here, hops = queue.popleft()
        if here == target:
            return hops
        for after in cables.neighbours(here, there):
            if after not in seen:
                seen.add(after)
                queue.append((after, hops + 1))
    raise AssertionError


@each_system
@each_case
def test_every_pair_meets_the_shorter_route_forth_and_back(hosts, there, system):
    machines = {
        k: Machine(commands(k, hosts, system, there)) for k in range(1, hosts + 1)
    }

    def path(source, target):
        here, passed = source, []
        while here != target:
            machine = machines[here]
            assert here == source or machine.forwards
            interface, gateway, sender = machine.routes[f"10.89.0.{target}"]
            assert sender == f"10.89.0.{here}"
            assert sender == machine.addresses[interface][0]
            after = int(interface[1:])
            passed.append(cables.between(here, after))
            assert gateway in machines[after].addresses[f"p{here}"]
            here = after
        return passed

    for a in machines:
        for b in machines:
            assert len(path(a, b)) == shortest(a, b, there)
            assert path(a, b) == path(b, a)[::-1]


@each_system
@each_case
def test_the_ends_of_a_cable_share_a_network_of_their_own(hosts, there, system):
    ends = {}
    for k in range(1, hosts + 1):
        machine = Machine(commands(k, hosts, system, there))
        for interface, addresses in machine.addresses.items():
            own, address = addresses
            assert own == f"10.89.0.{k}" and address.startswith("10.88.")
            network, _, last = address.rpartition(".")
            end = cables.between(k, int(interface[1:]))
            ends.setdefault((network, int(last) // 4), []).append(end)
    assert sorted(ends.values()) == [[cable, cable] for cable in sorted(there)]
    if there == cables.ring(hosts):
        assert {network for network, _ in ends} == {
            f"10.88.{k}" for k in range(1, hosts)
        }


@each_system
@each_case
def test_undo_undoes_everything(hosts, there, system):
    for k in range(1, hosts + 1):
        machine = Machine(commands(k, hosts, system, there))
        undone = cabling.UNDONE[system](machine.addresses, machine.routes)
        machine.run(cabling.script(undone, []))
        assert machine.routes == {} and not machine.forwards
        assert not any(machine.addresses.values())


@each_system
def test_a_cable_that_was_put_elsewhere_leaves_no_address(system):
    """A mesh whose ports are changed round, and one that becomes a ring."""
    machine = Machine(commands(2, 5, system, cables.mesh(5)))
    moved = host(2, 5, cables.mesh(5), machine.addresses)
    moved = moved._replace(ports={1: "p3", 3: "p1", 4: "p4", 5: "p5"})
    machine.run(cabling.script(cabling.SYSTEMS[system](moved), []))
    assert machine.addresses["p1"] == ["10.89.0.2", "10.88.2.1"]
    assert machine.addresses["p3"] == ["10.89.0.2", "10.88.1.2"]
    machine.run(commands(2, 5, system, cables.ring(5), machine.addresses))
    left = {port: own for port, own in machine.addresses.items() if own}
    assert left == {
        "p1": ["10.89.0.2", "10.88.1.2"],
        "p3": ["10.89.0.2", "10.88.2.1"],
    }


@each_system
def test_what_is_not_ours_stays(system):
    """So does a network that has our cables' addresses, such as Podman's or a LAN."""
    others = {"en0": ["192.168.1.2"], "podman0": ["10.88.0.1"], "eth0": ["10.88.1.1"]}
    before = others | {"p2": ["169.254.1.1", "10.89.0.1", "10.88.9.1"]}
    lines = commands(1, 3, system, cables.ring(3), before)
    gone = {
        "linux": "ip address del 10.88.9.1/30 dev p2 2>/dev/null || true",
        "macos": "ifconfig p2 inet 10.88.9.1 -alias 2>/dev/null || true",
    }
    assert [c for c in lines if " del " in c or c.count("-alias")] == [gone[system]]
    undone = cabling.script(cabling.UNDONE[system](others, []), [])
    assert len(undone) == 1 and "forward" in undone[0]


def test_only_a_port_that_is_up_for_cables_is_switched_off(tmp_path, monkeypatch):
    """A Thunderbolt port, and a tunnel of the lab."""
    monkeypatch.setattr("mlxtp.cluster.ports.NETWORK", tmp_path)
    for name, driver in ("tb0", "thunderbolt-net"), ("eth0", "ixgbe"):
        (tmp_path / "drivers" / driver).mkdir(parents=True)
        (tmp_path / name / "device").mkdir(parents=True)
        link = tmp_path / name / "device" / "driver"
        link.symlink_to(tmp_path / "drivers" / driver)
    (tmp_path / "tun0").mkdir()
    (tmp_path / "tun0" / "tun_flags").touch()
    there = {name: ["10.89.0.1"] for name in ("tb0", "eth0", "tun0")}
    lines = cabling.script(cabling.undone_linux(there, []), [])
    assert [line.split()[3:5] for line in lines if " link " in line] == [
        ["tb0", "down"],
        ["tun0", "down"],
    ]


@each_system
def test_routes_that_lead_nowhere_are_removed(system):
    """As to a host whose cables are gone; the host's own is none of them."""
    ring = host(1, 5, cables.ring(5))
    machine = Machine(commands(1, 5, system, cables.ring(5)))
    left = host(1, 5, cables.ring(5) - {Cable(2, 3), Cable(3, 4)}, machine.addresses)
    left = left._replace(laid=[ring.address, *machine.routes])
    assert left.lost == ["10.89.0.3"]
    machine.run(cabling.script(cabling.SYSTEMS[system](left), []))
    assert machine.routes.keys() == {"10.89.0.2", "10.89.0.4", "10.89.0.5"}


def test_macos_takes_ports_out_of_the_bridge_and_gives_them_back():
    lines = commands(1, 5, "macos", cables.ring(5))
    assert [line for line in lines if "bridge0" in line] == [
        "ifconfig bridge0 deletem p2 2>/dev/null || true",
        "ifconfig bridge0 deletem p5 2>/dev/null || true",
    ]
    undone = cabling.undone_macos(Machine(lines).addresses, [])
    assert [line for line in cabling.script(undone, []) if "bridge0" in line] == [
        "ifconfig bridge0 addm p2 2>/dev/null || true",
        "ifconfig bridge0 addm p5 2>/dev/null || true",
    ]


def test_the_commands_of_one_host_on_linux():
    assert commands(1, 3, "linux", cables.ring(3)) == [
        "sysctl -w net.ipv4.ip_forward=1",
        "ip link set p2 up",
        "ip address replace 10.89.0.1/32 dev p2",
        "ip address replace 10.88.1.1/30 dev p2",
        "ip link set p3 up",
        "ip address replace 10.89.0.1/32 dev p3",
        "ip address replace 10.88.1.5/30 dev p3",
        "ip route replace 10.89.0.2/32 via 10.88.1.2 dev p2 src 10.89.0.1",
        "ip route replace 10.89.0.3/32 via 10.88.1.6 dev p3 src 10.89.0.1",
    ]


@pytest.mark.parametrize("hosts", HOSTS)
def test_ports_in_order_meet(hosts):
    """A cable joins the ports that both hosts use for each other; a ring the first."""
    for a, b in cables.mesh(hosts):
        assert b in cabling.in_order(a, hosts) and a in cabling.in_order(b, hosts)
    for number in range(1, hosts + 1):
        order = cabling.in_order(number, hosts)
        assert sorted([number, *order]) == list(range(1, hosts + 1))
        assert set(order[:2]) == {*cables.neighbours(number, cables.ring(hosts))}
    usual = cabling.usual_ports(2, 5, cables.mesh(5), "macos")
    assert usual == {1: "en2", 3: "en3", 4: "en4", 5: "en5"}
    ring = cabling.usual_ports(1, 5, cables.ring(5), "linux")
    assert ring == {5: "thunderbolt0", 2: "thunderbolt1"}


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["6", "5"], "of 5 hosts K is one of 1 to 5, not 6"),
        (["0", "5"], "of 5 hosts K is one of 1 to 5, not 0"),
        (["1", "1"], "cables join 2 to 65 hosts, not 1"),
        (["one", "5"], "invalid int value: 'one'"),
        (["1", "2", "3"], "where is a hostfile, or K N, two numbers"),
        (["nowhere"], "no hostfile nowhere: No such file or directory"),
        (["hostfiles/studio5", "--ports", "2=en2"], "--ports and --os go with K N"),
        (["hostfiles/studio5", "--os", "macos"], "--ports and --os go with K N"),
        (["4", "5", "--topology", "1-2,2-3"], "none of the cables leads to host 4"),
        (["1", "5", "--topology", ",", "--apply"], "none of the cables leads to host"),
        (["1", "5", "--topology", "star"], "wanted ring, mesh, or cables between"),
        (["1", "5", "--ports", "3=en2"], "wanted one for each of 5=thunderbolt0,2="),
        (["1", "5", "--ports", "2=en2"], "--ports: none leads to host 5"),
        (["1", "5", "--ports", "2=en2,5=en2"], "--ports: 5=en2 names a host or an int"),
        (["1", "5", "--ports", "2=en2,2=en3,5=en4"], "--ports: 2=en3 names a host or"),
        (["1", "5", "--apply", "--ports", "2=lo,5=no9"], "no interface no9 here"),
    ],
)
def test_wrong_input_gets_one_line(arguments, says):
    words = [sys.executable, CABLES, *arguments]
    if arguments[0].isdecimal():
        words += ["--os", "linux"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=CABLES.parents[1])
    assert done.returncode != 0
    assert says in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may do it")
def test_applying_needs_root():
    done = subprocess.run(
        [sys.executable, CABLES, "1", "2", "--apply", "--ports", "2=lo"],
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and "needs root" in done.stderr


def macs(names, *joined, count=4):
    """Macs by number, with cables between ports such as "a1-b3"."""
    peers = {}
    for cable in joined:
        one, other = cable.split("-")
        peers[one], peers[other] = other, one
    seen = {}
    for number, name in enumerate(names, 1):
        ports = [
            Port(
                f"Thunderbolt {k}",
                f"en{k + 1}",
                (f"{name}{k}",),
                (peers[f"{name}{k}"],) if f"{name}{k}" in peers else (),
            )
            for k in range(1, count + 1)
        ]
        seen[number] = Ports("macos", tuple(ports), {"en0": [f"192.168.1.{number}"]})
    return seen


RING = ("a2-b1", "b2-c1", "c2-a1")


def test_cables_are_found_as_they_are():
    there = cabling.joined_ports(macs("abc", "a4-b2", "b1-c3"))
    ends = {cable: [end.port.name[-1] for end in ends] for cable, ends in there.items()}
    assert ends == {Cable(1, 2): ["4", "2"], Cable(2, 3): ["1", "3"]}
    # A second cable between two hosts is spare.
    there = cabling.joined_ports(macs("ab", "a1-b1", "a2-b2"))
    assert [ends[0].port.name for ends in there.values()] == ["Thunderbolt 1"]
    assert cabling.joined_ports(macs("ab")) == {}


def test_one_end_that_hears_is_enough_and_a_switch_is_no_cable():
    seen = macs("abc")
    first = seen[1].ports[0]
    heard = Port(first.name, first.interface, first.own, ("b1",))
    seen[1] = Ports("macos", (heard, *seen[1].ports[1:]), {})
    assert list(cabling.joined_ports(seen)) == [Cable(1, 2)]
    heard = Port(first.name, first.interface, first.own, ("b1", "c1"))
    seen[1] = Ports("macos", (heard, *seen[1].ports[1:]), {})
    assert cabling.joined_ports(seen) == {}


def with_addresses(hosts, number, interface, other):
    """Hosts of which one has the addresses of a cable at an interface."""
    own = cables.host_address(number), cables.end(number, other).address
    seen = hosts[number]
    known = seen.addresses | {interface: [*own]}
    return hosts | {number: replace(seen, addresses=known)}


def test_a_cable_that_is_silent_is_there_while_both_ends_have_its_addresses():
    """Not where one has them alone, or a port hears of another cable."""
    hosts = with_addresses(macs("abc", "a2-b1"), 2, "en3", 3)
    assert list(cabling.joined_ports(hosts)) == [Cable(1, 2)]
    both = with_addresses(hosts, 3, "en2", 2)
    silent = cabling.joined_ports(both)[Cable(2, 3)]
    assert [place.port.interface for place in silent] == ["en3", "en2"]
    moved = with_addresses(macs("abc", "a2-b2"), 2, "en3", 3)
    moved = with_addresses(moved, 3, "en2", 2)
    assert list(cabling.joined_ports(moved)) == [Cable(1, 2)]


def test_where_cables_go_that_are_missing():
    """Into the ports in their order, where these are free; no two into one."""
    hosts = macs("abcde")
    missing = cabling.lacking(hosts, 5, {}, cables.mesh(5))
    ends = [
        (number, port.name)
        for cable, ports in missing.items()
        for number, port in zip(cable, ports, strict=True)
    ]
    assert len(set(ends)) == 20
    assert [p.name[-1] for p in missing[Cable(1, 2)]] == ["2", "1"]
    assert [p.name[-1] for p in missing[Cable(1, 3)]] == ["3", "4"]
    assert [p.name[-1] for p in missing[Cable(1, 5)]] == ["1", "2"]
    hosts = macs("abc", "a2-b3")  # to be the other way round
    there = cabling.joined_ports(hosts)
    missing = cabling.lacking(hosts, 3, there, cables.ring(3))
    assert {c: [p.name[-1] for p in ports] for c, ports in missing.items()} == {
        Cable(1, 3): ["1", "2"],
        Cable(2, 3): ["2", "1"],
    }
    # The last host has not answered: ports are still those for five.
    missing = cabling.lacking(macs("abcd"), 5, {}, {Cable(1, 2), Cable(1, 4)})
    assert [p.name[-1] for p in missing[Cable(1, 2)]] == ["2", "1"]
    assert [p.name[-1] for p in missing[Cable(1, 4)]] == ["4", "3"]
    missing = cabling.lacking(macs("abc", count=1), 3, {}, cables.ring(3))
    assert [port for ports in missing.values() for port in ports].count(None) == 3


def test_the_order_of_a_ring():
    assert cabling.circle(cables.ring(5), 5) == [1, 2, 3, 4, 5]
    other = cables.parse("1-3,2-3,2-4,1-4", 4)
    assert cabling.circle(other, 4) == [1, 3, 2, 4]
    for none in ("1-2,2-3,3-4", "1-2,2-3,1-3", "1-2,2-3,3-4,1-4,1-3", ""):
        assert cabling.circle(cables.parse(none, 4), 4) == []


# Stands for ssh: what hosts say of their ports, and the commands that they are given.
SSH = """\
#!/bin/sh
while [ "$1" = -o ]; do shift 2; done
echo "$1: $2" >>"{0}/given"
case $2 in
    *mlxtp.cluster.ports*) [ "$1" != away ] && cat "{0}/$1" ;;
    *--apply*) [ "$1" != deaf ] || {{ echo "it does not" >&2; exit 1; }} ;;
esac
"""


@pytest.fixture
def cluster(tmp_path):
    """Runs launch/cables over hosts that are files."""

    def run(names, seen, *options):
        for name, ports in zip(names, seen.values(), strict=True):
            (tmp_path / name).write_text(json.dumps(asdict(ports)))
        ssh, hostfile = tmp_path / "ssh", tmp_path / "hosts"
        ssh.write_text(SSH.format(tmp_path))
        ssh.chmod(0o755)
        hostfile.write_text("".join(f"{name} slots=1\n" for name in names))
        words = [sys.executable, CABLES, hostfile, "--ssh", ssh, *options]
        done = subprocess.run(words, capture_output=True, text=True)
        assert done.stderr == ""
        given = (tmp_path / "given").read_text()
        (tmp_path / "given").unlink()
        return done.returncode, done.stdout, given

    return run


def test_a_hostfile_takes_what_each_of_its_hosts_needs(cluster):
    """Cables as they are; nothing is done on any host."""
    status, said, given = cluster(["one", "two", "six"], macs("abc", *RING))
    assert status == 0 and given.count(": exec sh -c ") == 3
    assert "one  Thunderbolt 1 (en2), Thunderbolt 2 (en3)," in said
    assert "one Thunderbolt 2 (en3) - two Thunderbolt 1 (en2)\n" in said
    assert "Cables: a ring.\n" in said and "Nothing was changed" in said
    shown, name = {}, None
    for line in said.splitlines():
        if line.startswith("# on "):
            name = line.removeprefix("# on ")
            shown[name] = []
        elif name and not line.startswith("#"):
            shown[name].append(line.removeprefix("sudo "))
    ports = {1: {2: "en3", 3: "en2"}, 2: {1: "en2", 3: "en3"}, 3: {1: "en3", 2: "en2"}}
    assert shown == {
        name: cabling.script(
            cabling.macos(cabling.Host(k, 3, cables.ring(3), ports[k])), []
        )
        for k, name in enumerate(["one", "two", "six"], 1)
    }


def test_a_hostfile_is_applied(cluster):
    """With the ports that were found; a host that fails stops no other."""
    status, said, given = cluster(
        ["one", "two", "deaf"], macs("abc", *RING), "--apply", "--topology=ring"
    )
    assert status == 1
    assert "one   has 10.89.0.1\n" in said and "deaf  FAILED: it does not\n" in said
    assert "--undo --apply" in said
    own = "launch/cables 1 3 --topology=ring --ports=2=en3,3=en2 --apply"
    assert own in given and "launch/cables 2 3" in given


def test_no_cable_is_taken_from_hosts_while_one_does_not_answer(cluster):
    """Unless --topology names cables without it."""
    names, seen = ["one", "two", "away"], macs("abc", *RING)
    for options in (), ("--topology=ring",):
        status, said, given = cluster(names, seen, "--apply", *options)
        assert status == 1 and "launch/cables" not in given
        assert "Nothing was changed: away did not answer" in said
    status, said, given = cluster(names, seen, "--apply", "--topology=1-2")
    assert "launch/cables 1 3 --topology=1-2 --ports=2=en3 --apply" in given


def test_a_mesh_that_is_not_whole(cluster):
    """What is missing is said; what is there is used."""
    joined = "a2-b1", "b2-c1", "c2-d1", "a1-d2", "b3-d3"
    seen = macs("abcd", *joined)
    status, said, _ = cluster("wxyz", seen, "--topology=mesh")
    assert status == 0
    assert (
        "MISSING: a cable from w Thunderbolt 3 (en4) to y Thunderbolt 3 (en4)\n"
    ) in said
    assert "1-2,1-4,2-3,2-4,3-4, 5 of the 6 of a mesh" in said
    mac = "route -n add -host 10.89.0.3 10.88.1.2 -ifp en3 -ifa 10.89.0.1"
    assert mac in said.partition("# on x")[0]
    # Nobody wants more of a ring: the cable across is left alone.
    status, said, _ = cluster("wxyz", seen, "--topology=ring")
    assert status == 0 and "MISSING" not in said and "Cables: a ring." in said
    assert "en4" not in said.partition("# on x")[0].partition("# on w")[2]


def test_no_cables_yet(cluster):
    """All of a mesh, if there are ports for it; else of a ring."""
    status, said, _ = cluster("vwxyz", macs("abcde"))
    assert status == 1 and said.count("MISSING: a cable") == 10
    assert said.endswith("There is no cable to set up.\n")
    status, said, _ = cluster("vwxyz", macs("abcde", count=2))
    assert said.count("MISSING: a cable") == 5 and "no port is free" not in said


def test_hosts_that_no_way_reaches_and_a_ring_in_another_order(cluster):
    status, said, _ = cluster("wxyz", macs("abcd", "a2-b1"))
    assert status == 1 and "No way leads from w to y, z.\n" in said
    assert "# on y" not in said
    joined = "a2-c1", "c2-b1", "b2-d1", "d2-a1"
    status, said, _ = cluster("wxyz", macs("abcd", *joined))
    assert status == 0 and "write its lines as w, y, x, z, then again" in said
