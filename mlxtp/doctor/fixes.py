"""The commands that fix what is wrong, as they are typed on the host."""

from mlxtp.cluster import cables
from mlxtp.doctor.findings import Findings
from mlxtp.doctor.machine import Machine


def cables_command(findings: Findings, machine: Machine) -> str:
    """Return the command that gives a host its addresses and routes on the cables.

    Hosts on the cables that take no part in the job count as well.
    """
    number = findings.number(machine)
    used = {
        cables.between(here, other)
        for host in findings.hosts
        for here in [findings.number(host)]
        for other in cables.laid(here, cables.MOST_HOSTS, host.addresses)
    }
    hosts = max([*findings.numbers.values(), *(cable.high for cable in used)])
    port_of = {
        a: port.name for port in machine.facts.interfaces for a in port.addresses
    }
    leads = [
        f"{other}={port_of[end.address]}"
        for other, end in cables.laid(number, hosts, port_of).items()
    ]
    words = ["./launch/cables", str(number), str(hosts)]
    if used not in (set(), cables.ring(hosts)):
        words.append(f"--topology {cables.named(used, hosts)}")
    if len(leads) == len(cables.neighbours(number, used or cables.ring(hosts))):
        words.append(f"--ports {','.join(leads)}")
    return f"{sudo(machine)}{' '.join([*words, '--apply'])}"


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
