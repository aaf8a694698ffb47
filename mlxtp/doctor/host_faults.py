"""What is wrong with hosts, whatever joins them."""

from collections import Counter
from collections.abc import Iterator
from statistics import median

from mlxtp.doctor.findings import Fault, Findings
from mlxtp.doctor.mends import more_memory, sudo

# Ranks that read weights so much slower than those with the same chip.
SLOW_HOST = 0.5

FREE_SHARE = 0.5
CLOCK_SECONDS = 2.0
DISK_BYTES = 5e9


def versions(found: Findings) -> Iterator[Fault]:
    """All hosts have the same software."""
    names = list(found.hosts[0].versions)
    usual = {
        name: Counter(it.versions[name] for it in found.hosts).most_common(1)[0][0]
        for name in names
    }
    for it in found.hosts:
        other = [name for name in names if it.versions[name] != usual[name]]
        if not other:
            continue
        what = ", ".join(
            f"{name} {it.versions[name]} (elsewhere {usual[name]})" for name in other
        )
        packages = [
            f"{name.lower().replace(' ', '')}=={usual[name]}"
            for name in other
            if name not in ("mlxtp", "Python")
        ]
        mends = []
        if "Python" in other:
            mends.append(f"install Python {usual['Python']}, rm -r .venv")
        if "mlxtp" in other:
            mends.append("git pull")
        if packages and "Python" not in other:
            mends.append(f"{it.python} -m pip install {' '.join(packages)}")
        else:
            mends.append("source launch/environment")
        yield Fault(it.host, what, " && ".join(mends))


def transports(found: Findings) -> Iterator[Fault]:
    """The transport that was asked for is there."""
    for it in found.hosts:
        lack = it.lacks.get(found.transport)
        if lack is not None:
            what = f"--transport {found.transport}: {lack}"
            yield Fault(it.host, what, "follow that, or take --transport mpi")


def memory(found: Findings) -> Iterator[Fault]:
    """Every host has room for its share."""
    ranks = Counter(it.host for it in found.machines)
    limits = [it.limit_bytes or 0 for it in found.hosts]
    usual = median(limits)
    for it, limit in zip(found.hosts, limits, strict=True):
        need = (found.need_bytes or 0) * ranks[it.host]
        free = it.facts.available_bytes
        if limit and limit < need:
            what = f"{_gb(limit)} GB for a model, {_gb(need)} GB needed"
            yield Fault(it.host, what, more_memory(it, need))
        elif free is not None and free < FREE_SHARE * it.facts.memory_bytes:
            what = f"{_gb(free)} of {_gb(it.facts.memory_bytes)} GB of memory are free"
            top = "top -o mem" if it.facts.system == "macOS" else "top -o %MEM"
            yield Fault(it.host, what, f"close what takes it: {top}")
        elif limit and limit < FREE_SHARE * usual:
            what = f"{_gb(limit)} GB for a model, elsewhere {_gb(usual)} GB"
            least = min(filter(None, limits))
            shares = (round((m.limit_bytes or least) / least) for m in found.machines)
            given = ",".join(map(str, shares))
            yield Fault(it.host, what, f"give it a smaller share: --shares {given}")


def slow_hosts(found: Findings) -> Iterator[Fault]:
    """Hosts with the same chip compute alike."""
    for rank, usual in slow_ranks(found).items():
        rate = found.speeds[rank].bytes_per_second / 1e9
        what = (
            f"reads weights at {rate:.1f} GB/s, others with its chip at "
            f"{usual / 1e9:.1f} GB/s"
        )
        yield Fault(found.machines[rank].host, what, "see what else runs there: top")


def slow_ranks(found: Findings) -> dict[int, float]:
    """Ranks that read weights slowly, and at which rate those like them do."""
    slow = {}
    for it, speed in zip(found.machines, found.speeds, strict=True):
        usual = median(
            other.bytes_per_second
            for machine, other in zip(found.machines, found.speeds, strict=True)
            if machine.facts.chip == it.facts.chip
        )
        if speed.bytes_per_second < SLOW_HOST * usual:
            slow[it.rank] = usual
    return slow


def clocks(found: Findings) -> Iterator[Fault]:
    """Clocks agree, so that logs and certificates do."""
    usual = median(found.clocks)
    for it in found.hosts:
        ahead = found.clocks[it.rank] - usual
        if abs(ahead) > CLOCK_SECONDS:
            where = "ahead of" if ahead > 0 else "behind"
            command = (
                "sntp -sS time.apple.com"
                if it.facts.system == "macOS"
                else "timedatectl set-ntp true"
            )
            what = f"its clock is {abs(ahead):.0f} s {where} the others'"
            yield Fault(it.host, what, f"{sudo(it)}{command}")


def disks(found: Findings) -> Iterator[Fault]:
    """There is room on the disk to keep what is fetched."""
    for it in found.hosts:
        wanted = max(DISK_BYTES, found.need_bytes or 0)
        if it.disk_free_bytes < wanted:
            what = f"{_gb(it.disk_free_bytes)} GB of disk are free"
            yield Fault(it.host, what, "make room: du -xhd 1 ~/.cache ~ | sort -h")


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:.1f}"
