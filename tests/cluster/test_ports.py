"""mlxtp.cluster.ports: which ports a host has, and what they hear."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
from recorded import HARDWARE_PORTS, PROFILE

from mlxtp.cluster import ports
from mlxtp.cluster.ports import ECHO_REPLY, Port, Ports, Thunderbolt
from mlxtp.cluster.reroute import MACOS, Route

pytestmark = pytest.mark.once

# In the format of macOS: en2 is used, en3 is still in the bridge.
IFCONFIG = """\
lo0: flags=8049<UP,LOOPBACK,RUNNING,MULTICAST> mtu 16384
\tinet 127.0.0.1 netmask 0xff000000
\tinet6 fe80::1%lo0 prefixlen 64 scopeid 0x1
en2: flags=8863<UP,BROADCAST,SMART,RUNNING,SIMPLEX,MULTICAST> mtu 1500
\tether 36:aa:bb:cc:00:01
\tinet6 fe80::4c1:a2ff:fe00:1%en2 prefixlen 64 secured scopeid 0x9
\tinet 10.89.0.1 netmask 0xffffffff
\tinet 10.88.1.1 netmask 0xfffffffc broadcast 10.88.1.3
\tstatus: active
en3: flags=8963<UP,BROADCAST,SMART,RUNNING,PROMISC,SIMPLEX,MULTICAST> mtu 1500
\tether 36:aa:bb:cc:00:02
\tstatus: active
"""


def test_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    """Displays are no hosts; what answers an echo is heard as well."""
    assert ports.thunderbolt(PROFILE, HARDWARE_PORTS) == [
        Thunderbolt("Thunderbolt 1", "en2", "A-1", "B-1"),
        Thunderbolt("Thunderbolt 2", "en3", "A-2", None),
        Thunderbolt("Thunderbolt 3", "en4", "A-3", None),
        Thunderbolt("Thunderbolt 4", "en5", "A-4", "C-1"),
    ]
    printed = {
        "system_profiler": PROFILE,
        "networksetup": HARDWARE_PORTS,
        "ifconfig": IFCONFIG,
    }
    own, other = "fe80::4c1:a2ff:fe00:1", "fe80::9"
    answers = {"en2": {own, other}, "en5": set()}
    monkeypatch.setattr(ports.sys, "platform", "darwin")
    monkeypatch.setattr(ports, "output", lambda *words: printed[words[0]])
    monkeypatch.setattr(ports, "addresses", lambda: {"en2": ["10.89.0.1"]})
    monkeypatch.setattr(ports, "echoes", lambda interfaces: answers)
    laid = MACOS._replace(laid=lambda: {"10.89.0.2": Route("10.88.1.2", "en2")})
    monkeypatch.setattr(ports, "this_system", lambda: laid)
    seen = ports.own_ports()
    assert seen.laid == ("10.89.0.2",)
    assert Ports.read(json.dumps(asdict(seen))) == seen
    assert seen.system == "macos" and seen.addresses == {"en2": ["10.89.0.1"]}
    assert seen.ports[0] == Port("Thunderbolt 1", "en2", ("A-1", own), ("B-1", other))
    assert seen.ports[3] == Port("Thunderbolt 4", "en5", ("A-4",), ("C-1",))


def entry(name: str, *addresses: str, flags: tuple[str, ...] = ("UP",)) -> object:
    """An interface as `ip -json address` prints it, in part."""
    info = [
        {"family": "inet6" if ":" in address else "inet", "local": address}
        for address in addresses
    ]
    return {"ifname": name, "flags": flags, "addr_info": info}


def test_a_linux_machine(tmp_path: Path) -> None:
    """What is hardware, or a tunnel, and has no address of another network."""
    others = "eth0/device", "eth1/device", "eth2/device", "eth3/device"
    for folder in *others, "tb10/tun_flags", "tb9/tun_flags", "tb1/device":
        (tmp_path / folder).mkdir(parents=True)
    text = json.dumps(
        [
            entry("lo", "127.0.0.1", flags=("LOOPBACK", "UP")),
            entry("eth0", "192.168.1.5", "fe80::5"),
            entry("tb10", "10.89.0.1", "10.88.1.1", "fe80::a"),
            entry("eth1", "fe80::6", "2001:db8::1"),
            entry("eth2", "10.89.0.1", "10.88.1.5", "2001:db8::2"),
            entry("eth3", "10.88.40.7", "fe80::7"),
            entry("tb9", "169.254.3.4", "fe80::b"),
            entry("tb1"),
            entry("docker0", "fe80::c"),
            {},
        ]
    )
    assert ports.linux_ports(text, tmp_path) == [
        Port("tb1", "tb1", (), ()),
        Port("tb9", "tb9", ("fe80::b",), ()),
        Port("tb10", "tb10", ("fe80::a",), ()),
    ]
    assert ports.linux_ports("", tmp_path) == []


def test_who_answers_an_echo(monkeypatch: pytest.MonkeyPatch) -> None:
    """By interface; requests, and answers to others, are passed over."""
    monkeypatch.setattr(ports, "ROUND_SECONDS", 0.02)
    monkeypatch.setattr(ports.socket, "if_nametoindex", {"x": 7, "y": 8}.__getitem__)
    monkeypatch.setattr(ports.socket, "if_indextoname", {7: "x", 9: "z"}.__getitem__)

    class Asked:
        def __init__(self) -> None:
            self.sent: list[tuple[bytes, tuple[object, ...]]] = []
            self.waiting: list[tuple[bytes, tuple[object, ...]]] = []

        def __enter__(self) -> "Asked":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def sendto(self, request: bytes, place: tuple[object, ...]) -> None:
            self.sent.append((request, place))
            if place[3] == 8:
                raise OSError("it is switched off")
            answer = bytes([ECHO_REPLY]) + request[1:]
            self.waiting += [
                (request, ("fe80::1%x", 0, 0, 7)),
                (answer[:-1] + b"?", ("fe80::2%x", 0, 0, 7)),
                (answer, ("fe80::3%x", 0, 0, 7)),
                (answer, ("fe80::4", 0, 0, 7)),
                (answer, ("fe80::5%z", 0, 0, 9)),
            ]

        def settimeout(self, seconds: float) -> None:
            assert 0 < seconds <= 0.02

        def recvfrom(self, most: int) -> tuple[bytes, tuple[object, ...]]:
            if not self.waiting:
                raise TimeoutError
            return self.waiting.pop(0)

    asked = Asked()
    monkeypatch.setattr(ports, "echo_socket", lambda: asked)
    assert ports.echoes(["x", "y"]) == {"x": {"fe80::3", "fe80::4"}, "y": set()}
    assert {place for _, place in asked.sent} == {("ff02::1", 0, 0, k) for k in (7, 8)}


def test_what_is_printed_is_read() -> None:
    """On this machine, as a program, with the standard library alone."""
    command = [sys.executable, "-S", "-m", "mlxtp.cluster.ports"]
    root = Path(ports.__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0 and done.stderr == ""
    seen = Ports.read(f"a greeting\n{done.stdout}")
    assert "127.0.0.1" in {a for own in seen.addresses.values() for a in own}
    for wrong in "", "{}", "[]", "no JSON":
        with pytest.raises(ValueError):
            Ports.read(wrong)
