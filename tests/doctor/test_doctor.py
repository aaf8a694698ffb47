"""What tools print is read, and faults are told from reports: no cluster needed.

Outputs are in the format that macOS prints; they were not recorded on a cluster.
"""

import io
import json
import queue
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import cabling
import mlx.core as mx
import pytest
from recorded import HARDWARE_PORTS

from mlxtp.cluster import cables
from mlxtp.cluster.cables import Cable
from mlxtp.cluster.memory import HostMemory
from mlxtp.comm.arithmetic import Arithmetic
from mlxtp.comm.communicator import Communicator
from mlxtp.comm.line import Line, LostError
from mlxtp.doctor import linux, macos
from mlxtp.doctor.__main__ import main
from mlxtp.doctor.computing import token_seconds
from mlxtp.doctor.facts import Facts, Interface, Route
from mlxtp.doctor.faults import faults
from mlxtp.doctor.findings import Findings
from mlxtp.doctor.fixes import cables_command
from mlxtp.doctor.links import Link, Ring, Sockets
from mlxtp.doctor.machine import Machine
from mlxtp.doctor.paths import follow
from mlxtp.doctor.report import Report
from mlxtp.doctor.speed import DTYPES, Speed, measure

pytestmark = pytest.mark.once

SYSCTL = """\
iogpu.wired_limit_mb: 57344
net.inet.ip.forwarding: 1
"""
IFCONFIG = """\
lo0: flags=8049<UP,LOOPBACK,RUNNING,MULTICAST> mtu 16384
	options=1203<RXCSUM,TXCSUM,TXSTATUS,SW_TIMESTAMP>
	inet 127.0.0.1 netmask 0xff000000
	inet6 ::1 prefixlen 128
gif0: flags=8010<POINTOPOINT,MULTICAST> mtu 1280
en0: flags=8863<UP,BROADCAST,SMART,RUNNING,SIMPLEX,MULTICAST> mtu 1500
	options=567<RXCSUM,TXCSUM,VLAN_MTU,TSO4,TSO6,AV,CHANNEL_IO>
	ether 1c:1d:d3:00:00:01
	inet6 fe80::1%en0 prefixlen 64 secured scopeid 0x4
	inet 192.168.1.21 netmask 0xffffff00 broadcast 192.168.1.255
	nd6 options=201<PERFORMNUD,DAD>
	media: autoselect (10Gbase-T <full-duplex,flow-control>)
	status: active
en3: flags=8863<UP,BROADCAST,SMART,RUNNING,SIMPLEX,MULTICAST> mtu 1500
	options=460<TSO4,TSO6,CHANNEL_IO>
	ether 36:5c:11:00:00:04
	inet 10.89.0.1 netmask 0xffffffff
	inet 10.88.1.1 netmask 0xfffffffc broadcast 10.88.1.3
	media: autoselect <full-duplex>
	status: active
en4: flags=8863<UP,BROADCAST,SMART,RUNNING,SIMPLEX,MULTICAST> mtu 1500
	media: autoselect <full-duplex>
	status: inactive
"""
THUNDERBOLT = json.dumps(
    {
        "SPThunderboltDataType": [
            {
                "_items": [{"_name": "Mac Studio", "domain_uuid_key": "B"}],
                "domain_uuid_key": "A",
                "receptacle_1_tag": {
                    "current_speed_key": "Up to 40 Gb/s",
                    "receptacle_id_key": "2",
                    "receptacle_status_key": "receptacle_connected",
                },
            },
            {
                "domain_uuid_key": "C",
                "receptacle_1_tag": {
                    "current_speed_key": "Up to 40 Gb/s",
                    "receptacle_id_key": "3",
                    "receptacle_status_key": "receptacle_no_devices_connected",
                },
            },
        ]
    }
)
ROUTE = """\
   route to: 10.89.0.3
destination: 10.89.0.3
    gateway: 10.88.1.2
  interface: en3
      flags: <UP,GATEWAY,HOST,DONE,STATIC>
 recvpipe  sendpipe  ssthresh  rtt,msec    rttvar  hopcount      mtu     expire
       0         0         0         0         0         0      1500         0
"""


def test_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    printed = {
        "sysctl": SYSCTL,
        "ifconfig": IFCONFIG,
        "networksetup": HARDWARE_PORTS,
        "system_profiler": THUNDERBOLT,
        "route": ROUTE,
    }
    monkeypatch.setattr(macos, "output", lambda *command: printed[command[0]])
    memory = HostMemory(64 * 2**30, 2_000_000 * 16384)
    monkeypatch.setattr(macos, "host_memory", lambda: memory)
    ports = {port.name: port for port in macos.facts().interfaces}
    assert macos.facts() == Facts(
        system="macOS",
        memory_bytes=64 * 2**30,
        available_bytes=2_000_000 * 16384,
        limit_set_mb=57344,
        forwards=True,
        interfaces=tuple(ports.values()),
    )
    assert set(ports) == {"gif0", "en0", "en3", "en4"} and not ports["gif0"].up
    assert ports["en0"].bits_per_second == 10e9
    assert ports["en3"] == Interface(
        "en3", "Thunderbolt 2", True, 1500, ("10.89.0.1", "10.88.1.1"), 40e9
    )
    assert not ports["en4"].up and ports["en4"].bits_per_second is None
    assert macos.route("10.89.0.3") == Route("en3", "10.88.1.2")


def test_tools_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for system in macos, linux:
        monkeypatch.setattr(system, "output", lambda *command: "")
        assert system.facts().interfaces == ()
        assert system.route("10.89.0.3") is None


def test_routes_of_a_mac() -> None:
    direct = ROUTE.replace("gateway: 10.88.1.2", "gateway: 1c:1d:d3:0:0:2")
    assert macos.parse_route(direct) == Route("en3", None)
    default = ROUTE.replace("10.88.1.2", "192.168.1.1").replace("en3", "en0")
    assert macos.parse_route(default) == Route("en0", "192.168.1.1")
    assert macos.parse_route("route: writing to routing socket: not in table") is None


@pytest.mark.parametrize(
    ("media", "rate"),
    [
        ("autoselect (1000baseT <full-duplex>)", 1e9),
        ("autoselect (2500Base-T <full-duplex>)", 2.5e9),
        ("autoselect (10Gbase-T <full-duplex,flow-control>)", 10e9),
        ("autoselect", None),
        ("", None),
    ],
)
def test_media_of_an_ethernet(media: str, rate: float | None) -> None:
    assert macos.media_rate(media) == rate


def test_a_linux_machine(tmp_path: Path) -> None:
    for name, file in (
        ("wlan0", "wireless/status"),
        ("tb0", "tun_flags"),
        ("br0", "bridge/id"),
        ("eth0", "device/id"),
    ):
        path = tmp_path / name / file
        path.parent.mkdir(parents=True)
        path.write_text("")
    (tmp_path / "eth0" / "type").write_text("1\n")
    (tmp_path / "eth0" / "speed").write_text("10000\n")
    driver = tmp_path / "drivers" / "thunderbolt-net"
    driver.mkdir(parents=True)
    (tmp_path / "thunderbolt0" / "device").mkdir(parents=True)
    (tmp_path / "thunderbolt0" / "device" / "driver").symlink_to(driver)
    kinds = {name: linux.kind(tmp_path / name) for name in ("wlan0", "tb0", "br0")}
    assert kinds == {"wlan0": "Wi-Fi", "tb0": "tunnel", "br0": "bridge"}
    assert linux.kind(tmp_path / "thunderbolt0") == "Thunderbolt"
    printed = [
        {
            "ifname": name,
            "flags": ["UP", *flags],
            "mtu": 1500,
            "operstate": "UP",
            "addr_info": [{"family": "inet", "local": "10.0.0.1"}],
        }
        for name, flags in (("lo", ["LOOPBACK"]), ("eth0", ["LOWER_UP"]))
    ]
    [port] = linux.interfaces(json.dumps([*printed, {}]), tmp_path)
    assert port == Interface("eth0", "Ethernet", True, 1500, ("10.0.0.1",), 10e9)
    via = '[{"dst":"10.89.0.5","gateway":"10.88.3.2","dev":"tb1","flags":[]}]'
    assert linux.parse_route(via) == Route("tb1", "10.88.3.2")
    assert linux.parse_route('[{"dst":"10.0.0.2","dev":"eth0"}]') == Route("eth0", None)


def macs(size: int = 5, used: frozenset[Cable] | None = None) -> Findings:
    """Macs in which all is well, with these cables, or in a ring.

    They lead from en2 to the host before, from en3 to the next, and so on.
    """
    machines, routes = [], []
    used = cables.ring(size) if used is None else used
    for rank in range(size):
        leads = cabling.usual_ports(rank + 1, size, used, "macos")
        host = cabling.Host(rank + 1, size, used, leads)
        ports = tuple(
            Interface(
                name,
                f"Thunderbolt {name[2:]}",
                True,
                1500,
                (host.address, address),
                40e9,
            )
            for name, address in host.ends.items()
        )
        wifi = Interface("en1", "Wi-Fi", True, 1500, (f"192.168.1.{rank}",))
        facts = Facts("macOS", 64 * 10**9, 60 * 10**9, 0, True, (*ports, wifi))
        versions = {"mlxtp": "1", "mlx": "2", "Open MPI": "5.0.11", "Python": "3.12"}
        machines.append(
            Machine(
                rank,
                f"studio{rank + 1}",
                host.address,
                ".venv/bin/python",
                False,
                versions,
                48 * 10**9,
                10**12,
                {"mpi": None, "jaccl": None},
                facts,
                Arithmetic("Apple M2", (), "macOS arm64", "Metal", "2"),
            )
        )
        ways = host.routes.items()
        routes.append({to: Route(port, hop) for to, (hop, port) in ways})
    findings = Findings(
        machines, routes, [0.0] * size, {}, [Speed(4e11, 2e13)] * size, "mpi"
    )
    links = {
        pair: Link(1e-4 * findings.paths[pair].hops, 4e9) for pair in findings.pairs
    }
    return replace(findings, links=links)


Change = Callable[[Findings], Findings]


def host(rank: int, **facts: object) -> Change:
    """Other facts of one host."""
    return machine(rank, lambda it: replace(it, facts=replace(it.facts, **facts)))  # type: ignore[arg-type]


def machine(rank: int, change: Callable[[Machine], Machine]) -> Change:
    def changed(findings: Findings) -> Findings:
        machines = list(findings.machines)
        machines[rank] = change(machines[rank])
        return replace(findings, machines=machines)

    return changed


def port(rank: int, name: str, **changes: object) -> Change:
    """Another interface of one host."""

    def changed(it: Machine) -> Machine:
        ports = tuple(
            replace(port, **changes) if port.name == name else port  # type: ignore[arg-type]
            for port in it.facts.interfaces
        )
        return replace(it, facts=replace(it.facts, interfaces=ports))

    return machine(rank, changed)


def link(*pair: int, **changes: object) -> Change:
    """Another link, and those of two hops that go over it."""

    def changed(findings: Findings) -> Findings:
        links = {
            it: replace(link, **changes) if pair in findings.paths[it].cables else link  # type: ignore[arg-type]
            for it, link in findings.links.items()
        }
        return replace(findings, links=links)

    return changed


def without(*pairs: tuple[int, int]) -> Change:
    return lambda findings: replace(
        findings, links={p: it for p, it in findings.links.items() if p not in pairs}
    )


def route(rank: int, to: int, way: Route | None) -> Change:
    def changed(findings: Findings) -> Findings:
        routes = [dict(ways) for ways in findings.routes]
        routes[rank][f"10.89.0.{to + 1}"] = way
        return replace(findings, routes=routes)

    return changed


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 8])
def test_all_is_well(size: int) -> None:
    assert faults(macs(max(size, 2)) if size > 1 else alone()) == []


def alone() -> Findings:
    findings = macs(2)
    return replace(
        findings,
        machines=findings.machines[:1],
        routes=[{}],
        clocks=[0.0],
        links={},
        speeds=findings.speeds[:1],
    )


RING_2 = "sudo ./launch/cables 2 5 --ports 1=en2,3=en3 --apply"


@pytest.mark.parametrize(
    ("change", "where", "what", "mend"),
    [
        (
            without((1, 2), (0, 2), (1, 3)),
            "studio2 - studio3",
            "nothing passes between studio2 en3 (Thunderbolt 3) and studio3 en2",
            "ping -c 3 10.88.2.2",
        ),
        (
            host(1, forwards=False),
            "studio2",
            "forwarding is off",
            "sudo sysctl -w net.inet.ip.forwarding=1",
        ),
        (route(1, 3, None), "studio2", "no route to 10.89.0.4 (studio4)", RING_2),
        (
            route(1, 2, Route("en1", "192.168.1.254")),
            "studio2",
            "data to studio3 go by en1 (Wi-Fi)",
            RING_2,
        ),
        (
            without((1, 3)),
            "studio2 - studio4",
            "do not reach each other at 10.89.0.2 and 10.89.0.4",
            "on studio2: ping -c 3 10.89.0.4",
        ),
        (
            machine(2, lambda it: replace(it, versions=it.versions | {"mlx": "1"})),
            "studio3",
            "mlx 1 (elsewhere 2)",
            ".venv/bin/python -m pip install mlx==2",
        ),
        (
            machine(2, lambda it: replace(it, versions=it.versions | {"mlxtp": "0"})),
            "studio3",
            "mlxtp 0 (elsewhere 1)",
            "git pull && source launch/environment",
        ),
        (
            lambda findings: replace(findings, need_bytes=50e9),
            "studio1",
            "48.0 GB for a model, 50.0 GB needed",
            "sudo sysctl iogpu.wired_limit_mb=48708",
        ),
        (
            machine(4, lambda it: replace(it, limit_bytes=16 * 10**9)),
            "studio5",
            "16.0 GB for a model, elsewhere 48.0 GB",
            "--shares 3,3,3,3,1",
        ),
        (host(3, available_bytes=8 * 10**9), "studio4", "8.0 of 64.0 GB", "top -o mem"),
        (
            link(3, 4, latency_seconds=9e-4),
            "studio4 - studio5",
            "a slow link, studio4 en3 (Thunderbolt 3) to studio5 en2",
            "another cable",
        ),
        (
            link(3, 4, bytes_per_second=1e9),
            "studio4 - studio5",
            "1.000 GB/s, its peers 4.000 GB/s",
            "another cable",
        ),
        (
            port(3, "en3", bits_per_second=20e9),
            "studio4 - studio5",
            "runs at 20 Gb/s, its peers at 40 Gb/s",
            "another cable",
        ),
        (
            port(1, "en3", mtu=9000),
            "studio3",
            "en2 (Thunderbolt 2) have 1500 bytes (MTU), at the other end 9000",
            "sudo networksetup -setMTU en2 9000",
        ),
        (
            link(1, 2, bytes_per_second=None),
            "studio2 - studio3",
            "short messages pass, long ones do not",
            "ping -c 3 -s 8000 10.89.0.3",
        ),
        (
            lambda findings: replace(findings, clocks=[0, 0, 100.0, 0, 0]),
            "studio3",
            "its clock is 100 s ahead of the others'",
            "sudo sntp -sS time.apple.com",
        ),
        (
            machine(1, lambda it: replace(it, disk_free_bytes=10**9)),
            "studio2",
            "1.0 GB of disk are free",
            "make room",
        ),
        (
            lambda findings: replace(
                findings, speeds=[*findings.speeds[:4], Speed(1e11, 2e13)]
            ),
            "studio5",
            "reads weights at 100.0 GB/s, others with its chip at 400.0 GB/s",
            "top",
        ),
        (
            lambda findings: replace(
                machine(3, lambda it: replace(it, lacks={"jaccl": "RDMA"}))(findings),
                transport="jaccl",
            ),
            "studio4",
            "--transport jaccl: RDMA",
            "--transport mpi",
        ),
        (
            machine(1, lambda it: replace(it, address="192.168.1.1")),
            "studio2",
            "no address 10.89.0.K",
            RING_2,
        ),
    ],
)
def test_a_fault(change: Change, where: str, what: str, mend: str) -> None:
    findings = faults(change(macs()))
    assert where in [fault.where for fault in findings]
    fault = next(fault for fault in findings if fault.where == where)
    assert what in fault.what and mend in fault.fix


CARD = "NVIDIA GeForce RTX 4090"
CUDA = Arithmetic(CARD, (), "Linux x86_64", "CUDA", "2")


def other_arithmetic(rank: int, arithmetic: Arithmetic) -> Change:
    return machine(rank, lambda one: replace(one, arithmetic=arithmetic))


def test_unlike_machines_are_named_and_no_fault() -> None:
    assert macs().unlike_machines() == ""
    unlike = other_arithmetic(3, CUDA)(macs())
    said = unlike.unlike_machines()
    macs_said = "studio1 studio2 studio3 studio5 with Apple M2 (macOS arm64, MLX 2 on"
    assert f"{macs_said} Metal); studio4 with {CARD} (Linux x86_64, MLX 2 on" in said
    assert "the sampled token is rank 0's" in said and "--agree-experts" in said
    assert faults(unlike) == []
    shown = io.StringIO()
    Report(shown).machines(unlike)
    assert f"{said}\n" in shown.getvalue() and CARD in shown.getvalue().splitlines()[4]


def test_processors_that_differ_in_instructions_alone() -> None:
    older, newer = (
        Arithmetic("Xeon", ("avx", *more), "Linux x86_64", "CPU", "2")
        for more in ((), ("avx2", "avx512f"))
    )
    findings = other_arithmetic(0, older)(other_arithmetic(1, newer)(macs(2)))
    assert (
        "studio1 with Xeon (Linux x86_64, MLX 2 on CPU);" in findings.unlike_machines()
    )
    assert "on CPU) avx2 avx512f. So" in findings.unlike_machines()


def test_a_card_that_others_fill() -> None:
    """Its memory is what is free on it: the host's is no help."""
    full = machine(1, lambda one: replace(one, limit_bytes=2 * 10**9, arithmetic=CUDA))
    [fault] = faults(replace(full(macs()), need_bytes=20e9))
    assert (fault.where, fault.what) == (
        "studio2",
        "2.0 GB for a model, 20.0 GB needed",
    )
    assert fault.fix.startswith("close what takes the card's: nvidia-smi")


def test_one_fault_is_said_once() -> None:
    """A cable, route or switch that others depend on stands alone."""
    for change in (
        without((1, 2), (0, 2), (1, 3)),
        link(3, 4, latency_seconds=9e-4),
        link(3, 4, bytes_per_second=1e9),
        lambda findings: without((0, 2))(host(1, forwards=False)(findings)),
        lambda findings: without((1, 3))(route(1, 3, None)(findings)),
        port(3, "en3", bits_per_second=20e9),
    ):
        assert len(faults(change(macs()))) == 1


def test_a_cable_that_is_out_is_told_from_its_port() -> None:
    findings = without((1, 2), (0, 2), (1, 3))(port(2, "en2", up=False)(macs()))
    assert "(studio3 en2 (Thunderbolt 2) is down)" in faults(findings)[0].what


def test_ranks_in_another_order_than_cables() -> None:
    findings = macs()
    order = [0, 2, 1, 3, 4]
    swapped = replace(
        findings,
        machines=[replace(findings.machines[o], rank=r) for r, o in enumerate(order)],
        routes=[findings.routes[o] for o in order],
    )
    [fault] = faults(replace(swapped, links=findings.links))
    assert fault.where == "hostfile" and "studio1 and studio3" in fault.what
    assert "studio1, studio2, studio3, studio4, studio5" in fault.fix


@pytest.mark.parametrize("size", [4, 5, 6])
def test_a_mesh(size: int) -> None:
    """All are one hop away; what is wrong with one cable is said of it alone."""
    well = macs(size, cables.mesh(size))
    assert faults(well) == []
    assert {path.hops for path in well.paths.values()} == {1}
    [fault] = faults(link(1, 3, latency_seconds=9e-4)(well))
    assert fault.where == "studio2 - studio4" and "a slow link" in fault.what
    [fault] = faults(without((1, 3))(well))
    assert "nothing passes between studio2 en4" in fault.what
    [fault] = faults(route(1, 3, None)(well))
    ports = ",".join(f"{k}=en{max(k, 2)}" for k in range(1, size + 1) if k != 2)
    words = f"sudo ./launch/cables 2 {size} --topology mesh --ports {ports} --apply"
    assert fault.fix == words


def test_some_hosts_of_a_mesh() -> None:
    """A job of hosts 2 to 4 of five: their cables, and those to others, are there."""
    mesh = macs(5, cables.mesh(5))
    some = replace(
        mesh,
        machines=[replace(mesh.machines[k], rank=k - 1) for k in (1, 2, 3)],
        routes=mesh.routes[1:4],
        links={},
    )
    assert some.cables == {(0, 1), (0, 2), (1, 2)}
    command = cables_command(some, some.machines[0])
    topology = cables.listed(cables.mesh(5) - {Cable(1, 5)})
    words = f"2 5 --topology {topology} --ports 1=en2,3=en3,4=en4,5=en5 --apply"
    assert command == f"sudo ./launch/cables {words}"
    without_address = machine(1, lambda it: replace(it, address="192.168.1.3"))(some)
    numbers = without_address.numbers
    assert numbers == {"studio2": 2, "studio3": 1, "studio4": 4}


def test_a_mesh_that_lacks_a_cable() -> None:
    """The pair is named, and through whom its data go."""
    lacks = macs(5, cables.mesh(5) - {Cable(2, 4)})
    [fault] = faults(lacks)
    assert fault.where == "studio2 - studio4" and "through studio3" in fault.what
    assert "no cable joins them" in fault.what and "put one in" in fault.fix
    # What does not forward for them is the reason then, and one of ours mends it.
    wrong = faults(route(1, 3, None)(host(2, forwards=False)(lacks)))
    assert {fault.where for fault in wrong} == {"studio3", "studio2"}
    topology = cables.named(cables.mesh(5) - {Cable(2, 4)}, 5)
    assert f"--topology {topology} --ports 1=en2,3=en3,5=en4" in wrong[1].fix


def test_routes_past_a_cable() -> None:
    """As they are laid where it did not answer, in a mesh and in a ring."""
    mesh = macs(5, cables.mesh(5))
    there, back = Route("en3", "10.88.2.2"), Route("en2", "10.88.3.1")
    [fault] = faults(route(3, 1, back)(route(1, 3, there)(mesh)))
    assert fault.where == "studio2 - studio4" and "through studio3" in fault.what
    assert "past the cable" in fault.what and "put it in again" in fault.fix
    left = macs(4, cables.ring(4) - {Cable(1, 2)})
    [fault] = faults(replace(macs(4), routes=left.routes))
    assert fault.where == "studio1 - studio2"
    assert "through studio4, studio3" in fault.what


def test_paths_are_followed() -> None:
    findings = macs()
    assert findings.paths[0, 2].ranks == (0, 1, 2) and findings.paths[0, 3].hops == 2
    circle = route(1, 2, Route("en2", "10.88.1.1"))(findings)
    path = follow(circle.machines, circle.routes, 0, 2)
    assert path.stopped == "astray"


def lines(size: int, timeout_seconds: float = 5.0) -> list[Line]:
    """The ends of lines between ranks that are threads."""
    published: queue.Queue[str] = queue.Queue()
    ends: dict[int, Line] = {}

    def publish(text: str) -> None:
        for _ in range(size - 1):
            published.put(text)

    def begin(rank: int) -> None:
        ends[rank] = Line(
            rank,
            size,
            addresses=["10.89.0.77", "127.0.0.1"],
            publish=publish,
            lookup=lambda seconds: published.get(timeout=seconds),
            timeout_seconds=timeout_seconds,
        )

    together(size, begin)
    return [ends[rank] for rank in range(size)]


def together(size: int, work: Callable[[int], None]) -> None:
    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


def test_a_line_and_what_is_measured_over_loopback() -> None:
    ends = lines(3)
    seen: dict[int, tuple[list[str], list[float], dict, Ring | None]] = {}

    def work(rank: int) -> None:
        line = ends[rank]
        texts = line.allgather_object(f"of {rank}")
        clocks = line.clocks()
        sockets = Sockets(line, "127.0.0.1")
        seen[rank] = texts, clocks, sockets.measure([(0, 1), (1, 2)]), sockets.ring()
        sockets.close()

    together(3, work)
    texts, clocks, links, around = seen[0]
    assert texts == ["of 0", "of 1", "of 2"]
    assert max(map(abs, clocks)) < 0.1  # one clock, read by threads that take turns
    assert set(links) == {(0, 1), (1, 2)} and around is not None
    assert all(link.bytes_per_second > 1e6 for link in links.values())
    assert seen[1] == seen[0] and seen[2] == seen[0]


def test_a_rank_that_does_not_call_is_named() -> None:
    with pytest.raises(LostError, match="rank 1, rank 2 of 3 did not call rank 0"):
        Line(
            0,
            3,
            addresses=["127.0.0.1"],
            publish=lambda text: None,
            lookup=lambda seconds: "",
            timeout_seconds=0.3,
        )


def test_a_rank_that_ends_or_is_silent_is_named() -> None:
    ends = lines(3, timeout_seconds=0.5)
    with pytest.raises(LostError, match=r"rank 1 on \S+ did not answer for 0.5 s"):
        ends[0].barrier()
    ends[1].close()
    with pytest.raises(LostError, match=r"rank 1 on \S+ has ended"):
        ends[0].barrier()


@pytest.mark.parametrize("dtype", DTYPES)
def test_speeds(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlxtp.doctor.speed.SECONDS", 0.0)
    speed = measure(dtype, lambda: None)
    # From a slow core to a GPU that nobody has yet.
    assert 1e7 < speed.bytes_per_second < 1e13
    assert 1e7 < speed.flops < 1e15


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--need-gb", "much"], "--need-gb: 'much': wanted a number above 0"),
        (["--transport", "pigeon"], "invalid choice: 'pigeon'"),
        (["--ranks", "two"], "invalid int value: 'two'"),
    ],
)
def test_a_mistake_in_the_options_is_one_line(
    words: list[str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["doctor", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    [line] = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert line.startswith("mlxtp.doctor: error: ") and says in line


class Slow(Communicator):
    """A world of one rank whose collectives take their time."""

    def allreduce(self, x: mx.array, at: str = "") -> mx.array:
        time.sleep(0.1)
        return x


def test_a_token_is_timed_without_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlxtp.doctor.computing.TOKENS", 3)
    [seconds] = token_seconds(Slow())
    assert 1e-5 < seconds < 0.5  # ten collectives take 1 s
