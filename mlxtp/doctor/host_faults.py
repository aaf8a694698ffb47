"""What is wrong with hosts, whatever links join them."""

from collections import Counter
from collections.abc import Iterator
from statistics import median, mode

from mlxtp.cluster.units import gigabytes
from mlxtp.doctor.findings import Fault, Findings
from mlxtp.doctor.fixes import more_memory, sudo

# A rank is slow if it reads weights at less than this part of the median rate of ranks
# with the same chip.
SLOW_HOST = 0.5
# Less of a host's memory free, or less for a model than this part of the median.
FREE_SHARE = 0.5
# Clocks may differ by so much.
CLOCK_SECONDS = 2.0
# Less free disk is reported.
DISK_BYTES = 5e9


def versions(findings: Findings) -> Iterator[Fault]:
    """Yield the hosts whose software differs from that of most."""
    names = list(findings.hosts[0].versions)
    usual = {
        name: mode(machine.versions[name] for machine in findings.hosts)
        for name in names
    }
    for machine in findings.hosts:
        other = [name for name in names if machine.versions[name] != usual[name]]
        if not other:
            continue
        what = ", ".join(
            f"{name} {machine.versions[name]} (elsewhere {usual[name]})"
            for name in other
        )
        packages = [
            f"{name.lower().replace(' ', '')}=={usual[name]}"
            for name in other
            if name not in ("mlxtp", "Python")
        ]
        fixes = []
        if "Python" in other:
            fixes.append(f"install Python {usual['Python']}, rm -r .venv")
        if "mlxtp" in other:
            fixes.append("git pull")
        if packages and "Python" not in other:
            fixes.append(f"{machine.python} -m pip install {' '.join(packages)}")
        else:
            fixes.append("source launch/environment")
        yield Fault(machine.host, what, " && ".join(fixes))


def transports(findings: Findings) -> Iterator[Fault]:
    """Yield the hosts that lack the transport that was asked for."""
    for machine in findings.hosts:
        lack = machine.lacks.get(findings.transport)
        if lack is not None:
            what = f"--transport {findings.transport}: {lack}"
            yield Fault(machine.host, what, "follow that, or take --transport mpi")


def memory(findings: Findings) -> Iterator[Fault]:
    """Yield the hosts that have less memory than they need, or than most."""
    ranks = Counter(machine.host for machine in findings.machines)
    usual = median(machine.limit_bytes for machine in findings.hosts)
    least = min(machine.limit_bytes for machine in findings.hosts)
    for machine in findings.hosts:
        limit, free = machine.limit_bytes, machine.facts.available_bytes
        need = (findings.need_bytes or 0) * ranks[machine.host]
        if limit < need:
            what = f"{gigabytes(limit)} GB for a model, {gigabytes(need)} GB needed"
            yield Fault(machine.host, what, more_memory(machine, need))
        elif free < FREE_SHARE * machine.facts.memory_bytes:
            total = gigabytes(machine.facts.memory_bytes)
            what = f"{gigabytes(free)} of {total} GB of memory are free"
            top = "top -o mem" if machine.facts.system == "macOS" else "top -o %MEM"
            yield Fault(machine.host, what, f"close what takes it: {top}")
        elif limit < FREE_SHARE * usual:
            what = f"{gigabytes(limit)} GB for a model, elsewhere {gigabytes(usual)} GB"
            shares = (round(m.limit_bytes / least) for m in findings.machines)
            given = ",".join(map(str, shares))
            fix = f"give it a smaller share: --shares {given}"
            yield Fault(machine.host, what, fix)


def slow_hosts(findings: Findings) -> Iterator[Fault]:
    """Yield the hosts that compute slower than others with the same chip."""
    for rank, usual in slow_ranks(findings).items():
        rate = findings.speeds[rank].bytes_per_second / 1e9
        what = (
            f"reads weights at {rate:.1f} GB/s, others with its chip at "
            f"{usual / 1e9:.1f} GB/s"
        )
        yield Fault(findings.machines[rank].host, what, "see what else runs there: top")


def slow_ranks(findings: Findings) -> dict[int, float]:
    """Return the slow ranks, with the bytes a second of others with their chip."""
    slow = {}
    for machine, speed in zip(findings.machines, findings.speeds, strict=True):
        usual = median(
            other.bytes_per_second
            for peer, other in zip(findings.machines, findings.speeds, strict=True)
            if peer.arithmetic.chip == machine.arithmetic.chip
        )
        if speed.bytes_per_second < SLOW_HOST * usual:
            slow[machine.rank] = usual
    return slow


def clocks(findings: Findings) -> Iterator[Fault]:
    """Yield the hosts whose clocks differ from the others'."""
    usual = median(findings.clocks)
    for machine in findings.hosts:
        ahead = findings.clocks[machine.rank] - usual
        if abs(ahead) > CLOCK_SECONDS:
            where = "ahead of" if ahead > 0 else "behind"
            command = (
                "sntp -sS time.apple.com"
                if machine.facts.system == "macOS"
                else "timedatectl set-ntp true"
            )
            what = f"its clock is {abs(ahead):.0f} s {where} the others'"
            yield Fault(machine.host, what, f"{sudo(machine)}{command}")


def disks(findings: Findings) -> Iterator[Fault]:
    """Yield the hosts without room on the disk to keep what is fetched."""
    for machine in findings.hosts:
        needed = max(DISK_BYTES, findings.need_bytes or 0)
        if machine.disk_free_bytes < needed:
            what = f"{gigabytes(machine.disk_free_bytes)} GB of disk are free"
            yield Fault(machine.host, what, "make room: du -xhd 1 ~/.cache ~ | sort -h")
