"""launch/cables: every pair of hosts meets by the shorter route; undo undoes all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cables_script import cables

CABLES = Path(__file__).parents[2] / "launch" / "cables"
HOSTS = [2, 3, 4, 5, 6, 8, 9]

pytestmark = pytest.mark.once


def commands(host, hosts, system, undo=False):
    steps = cables.SYSTEMS[system](cables.Host(host, hosts, "L", "R"))
    return cables.script(steps, undo, [])


class Machine:
    """What a host's commands leave behind: addresses per interface, and routes."""

    def __init__(self, lines):
        self.addresses, self.routes, self.forwards = {"L": [], "R": []}, {}, False
        for line in lines:
            self.run(line.split())

    def run(self, words):
        match words:
            case ["sysctl", "-w", setting]:
                self.forwards = setting.endswith("=1")
            case ["ip", "address", "replace", address, "dev", interface]:
                self.addresses[interface].append(address.split("/")[0])
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
                assert alias or not self.addresses[interface]
                self.addresses[interface].append(address)
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


@pytest.mark.parametrize("system", ["linux", "macos"])
@pytest.mark.parametrize("hosts", HOSTS)
def test_every_pair_meets_the_shorter_route_forth_and_back(hosts, system):
    machines = {k: Machine(commands(k, hosts, system)) for k in range(1, hosts + 1)}

    def path(source, target):
        here, passed = source, []
        while here != target:
            machine = machines[here]
            assert here == source or machine.forwards
            interface, gateway, sender = machine.routes[f"10.89.0.{target}"]
            assert sender == f"10.89.0.{here}"
            assert sender == machine.addresses[interface][0]
            passed.append(here if interface == "R" else here - 1 or hosts)
            here = here % hosts + 1 if interface == "R" else here - 1 or hosts
            arrives = machines[here].addresses["L" if interface == "R" else "R"]
            assert gateway in arrives
        return passed

    for a in machines:
        for b in machines:
            short = min((a - b) % hosts, (b - a) % hosts)
            assert len(path(a, b)) == short
            assert path(a, b) == path(b, a)[::-1]


@pytest.mark.parametrize("system", ["linux", "macos"])
@pytest.mark.parametrize("hosts", HOSTS)
def test_the_ends_of_a_cable_share_a_network_of_their_own(hosts, system):
    ends = {}
    for k in range(1, hosts + 1):
        for interface, addresses in Machine(
            commands(k, hosts, system)
        ).addresses.items():
            for address in addresses[1:]:
                assert address.startswith("10.88.")
                ends.setdefault(address.rpartition(".")[0], []).append((k, interface))
    count = 1 if hosts == 2 else hosts
    expected = {
        f"10.88.{i}": {(i, "R"), (i % hosts + 1, "L")} for i in range(1, count + 1)
    }
    assert {network: set(who) for network, who in ends.items()} == expected


@pytest.mark.parametrize("system", ["linux", "macos"])
@pytest.mark.parametrize("hosts", HOSTS)
def test_undo_undoes_everything(hosts, system):
    for k in range(1, hosts + 1):
        machine = Machine(commands(k, hosts, system))
        for line in commands(k, hosts, system, undo=True):
            machine.run(line.split())
        assert machine.routes == {} and not machine.forwards
        assert machine.addresses == {"L": [], "R": []}


def test_macos_takes_ports_out_of_the_bridge_and_gives_them_back():
    assert [line for line in commands(1, 5, "macos") if "bridge0" in line] == [
        "ifconfig bridge0 deletem L 2>/dev/null || true",
        "ifconfig bridge0 deletem R 2>/dev/null || true",
    ]
    assert [
        line for line in commands(1, 5, "macos", undo=True) if "bridge0" in line
    ] == [
        "ifconfig bridge0 addm R",
        "ifconfig bridge0 addm L",
    ]


def test_the_commands_of_one_host_on_linux():
    assert commands(1, 3, "linux") == [
        "sysctl -w net.ipv4.ip_forward=1",
        "ip link set L up",
        "ip address replace 10.89.0.1/32 dev L",
        "ip address replace 10.88.3.2/30 dev L",
        "ip link set R up",
        "ip address replace 10.89.0.1/32 dev R",
        "ip address replace 10.88.1.1/30 dev R",
        "ip route replace 10.89.0.2/32 via 10.88.1.2 dev R src 10.89.0.1",
        "ip route replace 10.89.0.3/32 via 10.88.3.1 dev L src 10.89.0.1",
    ]


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["6", "5"], "of 5 hosts K is one of 1 to 5, not 6"),
        (["0", "5"], "of 5 hosts K is one of 1 to 5, not 0"),
        (["1", "1"], "a ring has 2 to 254 hosts, not 1"),
        (["one", "5"], "invalid int value: 'one'"),
        (["1", "2", "3"], "where is K N, two numbers, or a hostfile"),
        (["nowhere"], "no hostfile nowhere: No such file or directory"),
        (["1", "5", "--apply", "--left", "nowhere9"], "no interface nowhere9 here"),
    ],
)
def test_wrong_input_gets_one_line(arguments, says):
    done = subprocess.run(
        [sys.executable, CABLES, *arguments], capture_output=True, text=True
    )
    assert done.returncode != 0
    assert says in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may do it")
def test_applying_needs_root():
    done = subprocess.run(
        [sys.executable, CABLES, "1", "2", "--apply", "--right", "lo"],
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and "needs root" in done.stderr


def test_a_hostfile_takes_what_each_of_its_hosts_needs(tmp_path):
    hostfile = tmp_path / "hosts"
    hostfile.write_text("c slots=1\na slots=1\nb slots=1\n")
    words = [sys.executable, CABLES, hostfile, "--os", "macos", "--left=L", "--right=R"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    shown, name = {}, None
    for line in done.stdout.splitlines():
        if line.startswith("# on "):
            name = line.removeprefix("# on ")
            shown[name] = []
        elif not line.startswith("#"):
            shown[name].append(line.removeprefix("sudo "))
    expected = {name: commands(k, 3, "macos") for k, name in enumerate("cab", 1)}
    assert shown == expected
