"""The commands that fix what is wrong, as they are typed on the host."""

from mlxtp.cluster.addresses import RING_ADDRESSES
from mlxtp.doctor.findings import Findings
from mlxtp.doctor.machine import Machine


def ring_command(findings: Findings, machine: Machine) -> str:
    """Return the command that gives a host its addresses and routes in the ring."""
    hosts = [each.host for each in findings.hosts]
    number = hosts.index(machine.host) + 1
    if machine.address in RING_ADDRESSES:
        number = RING_ADDRESSES.index(machine.address) + 1
    ends = {"left": f"10.88.{number - 1 or len(hosts)}.2", "right": f"10.88.{number}.1"}
    ports = "".join(
        f" --{side} {port.name}"
        for side, address in ends.items()
        for port in machine.facts.interfaces
        if address in port.addresses
    )
    return f"{sudo(machine)}./launch/cables {number} {len(hosts)}{ports} --apply"


def mtu_command(machine: Machine, interface: str, mtu: int) -> str:
    """Return the command that lets an interface send packets of `mtu` bytes."""
    if machine.facts.system == "macOS":
        return f"{sudo(machine)}networksetup -setMTU {interface} {mtu}"
    return f"{sudo(machine)}ip link set dev {interface} mtu {mtu}"


def sudo(machine: Machine) -> str:
    """Return what goes before a command that needs root."""
    return "" if machine.is_root else "sudo "


def more_memory(machine: Machine, need: float) -> str:
    """Return what lets a host hold `need` bytes of a model."""
    smaller = "give it a smaller share: --shares"
    if machine.arithmetic.backend == "CUDA":
        return f"close what takes the card's: nvidia-smi; or {smaller}"
    if machine.facts.system == "macOS" and need < 0.9 * machine.facts.memory_bytes:
        return f"{sudo(machine)}sysctl iogpu.wired_limit_mb={need / 2**20 + 1024:.0f}"
    if machine.facts.system == "Linux" and need < 0.9 * machine.facts.memory_bytes:
        return f"close what takes it: top -o %MEM; or {smaller}"
    return smaller
