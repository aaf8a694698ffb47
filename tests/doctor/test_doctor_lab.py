"""mlxtp.doctor finds what is wrong with five hosts, and nothing else."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from five_hosts import HOSTFILE, HOSTS, good, lab
from five_hosts import the_lab_can_be_built as the_lab_can_be_built
from ranks import mpirun

from mlxtp.cluster.measured import Measured

pytestmark = [pytest.mark.lab, pytest.mark.once]

# Gives studio5 another mlx-lm, and studio4 little free memory.
OTHERS = """
case $(hostname) in
studio5) export PYTHONPATH=$1 ;;
studio4) mount --bind "$2" /proc/meminfo || exit 3 ;;
esac
shift 2
exec "$@"
"""

# What psutil reads of /proc/meminfo.
MEMINFO = """\
MemTotal: 64000000 kB
MemFree: 7000000 kB
MemAvailable: 8000000 kB
Buffers: 0 kB
Cached: 0 kB
Shmem: 0 kB
Active: 0 kB
Inactive: 0 kB
"""

Faults = dict[str, tuple[str, str]]


def doctor(*options: object, before: tuple[object, ...] = ()) -> tuple[int, str]:
    module = [*before, sys.executable, "-m", "mlxtp.doctor", *options]
    mpirun = ["run", "mpirun", "-hostfile", HOSTFILE, *module]
    done = lab(*map(str, mpirun), timeout=100)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout


def shown_faults(printed: str) -> list[tuple[str, str, str]]:
    """Where, what, and what fixes it, of each fault in the order of the report."""
    lines = printed.splitlines()
    faults = []
    for line, below in pairwise(lines):
        number, _, text = line.partition(". ")
        if number.isdigit() and below.startswith("   "):
            where, _, what = text.partition(": ")
            faults.append((where, what, below.strip()))
    return faults


@pytest.fixture(scope="module", autouse=True)
def ring(the_lab_can_be_built: None) -> None:
    good("up", "--delay-ms", "1")


@pytest.fixture(scope="module")
def healthy(ring: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    file = tmp_path_factory.mktemp("doctor") / "measured.json"
    status, printed = doctor("--json", file)
    assert status == 0, printed
    return printed, file


def test_all_is_well(healthy: tuple[str, Path]) -> None:
    printed, _ = healthy
    assert "Computing a token of the model that ships" in printed
    assert "All is well." in printed and shown_faults(printed) == []
    for host in HOSTS:
        assert host in printed


def test_what_was_measured_is_read_back(healthy: tuple[str, Path]) -> None:
    measured = Measured.read(healthy[1])
    assert [host.host for host in measured.hosts] == HOSTS
    assert all(host.bytes_per_second > 0 < host.flops for host in measured.hosts)
    assert all(0 < host.token_seconds < 1 for host in measured.hosts)
    assert len(measured.pairs) == 10
    for pair in measured.pairs:
        a, b = pair.ranks
        hops = min(b - a, 5 - b + a)
        # The lab holds a hop to 0.1 ms where nothing else runs; the machine may.
        assert hops * 0.9e-3 < pair.latency_seconds < hops * 1e-3 + 1e-3
        assert pair.bytes_per_second > 1e6
    for name in "allreduce", "allgather":
        curve = [it for it in measured.collectives if it.name == name]
        assert [it.part_bytes for it in curve] == [4**n for n in range(4, 11)]
        # Two hops of 1 ms, and not longer than a wholly busy machine makes of them.
        assert all(0.0015 < it.seconds < 0.5 for it in curve)


@pytest.fixture(scope="module")
def broken(healthy: None, tmp_path_factory: pytest.TempPathFactory) -> Faults:
    """A cut cable, another version and little memory at once."""
    folder = tmp_path_factory.mktemp("others")
    metadata = folder / "mlx_lm-0.1.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: mlx-lm\nVersion: 0.1\n")
    meminfo = folder / "meminfo"
    meminfo.write_text(MEMINFO)
    good("cut", "studio2", "studio3")
    try:
        others = ("sh", "-c", OTHERS, "sh", folder, meminfo)
        status, printed = doctor("--json", folder / "none.json", before=others)
    finally:
        good("mend")
    assert status == 1 and not (folder / "none.json").exists()
    faults = shown_faults(printed)
    assert [where for where, *_ in faults] == [
        "studio2 - studio3",
        "studio5",
        "studio4",
    ]
    return {where: (what, fix) for where, what, fix in faults}


@pytest.mark.slow
def test_a_cut_cable(broken: Faults) -> None:
    what, fix = broken["studio2 - studio3"]
    assert "nothing passes between studio2 tb1" in what and "studio3 tb0" in what
    assert "on studio2: ping -c 3 10.88.2.2" in fix


@pytest.mark.slow
def test_another_version(broken: Faults) -> None:
    what, fix = broken["studio5"]
    assert "mlx-lm 0.1 (elsewhere " in what
    assert "-m pip install mlx-lm==" in fix


@pytest.mark.slow
def test_too_little_memory(broken: Faults) -> None:
    what, fix = broken["studio4"]
    assert what == "8.2 of 65.5 GB of memory are free"
    assert "top" in fix


@pytest.fixture(scope="module")
def misled(broken: Faults) -> Faults:
    """A missing route and forwarding off at once; then mended as it says."""
    on_host("studio2", "ip route del 10.89.0.4")
    on_host("studio5", "sysctl -w net.ipv4.ip_forward=0")
    status, printed = doctor()
    assert status == 1
    faults = shown_faults(printed)
    assert [where for where, *_ in faults] == ["studio5", "studio2"], printed
    for where, _, fix in faults:
        on_host(where, fix)
    return {where: (what, fix) for where, what, fix in faults}


@pytest.mark.slow
def test_forwarding_off(misled: Faults) -> None:
    assert "IP forwarding is off" in misled["studio5"][0]


@pytest.mark.slow
def test_a_missing_route(misled: Faults) -> None:
    what, fix = misled["studio2"]
    assert what == "no route to 10.89.0.4 (studio4)"
    assert fix == "./launch/cables 2 5 --ports 1=tb0,3=tb1 --apply"


@pytest.fixture(scope="module")
def slowed(misled: Faults) -> Faults:
    """What lets data pass, slowly; what was mended before is found no more."""
    on_host("studio2", "ip route replace 10.89.0.4 via 10.90.0.4 dev eth0")
    on_host("studio3", "ip link set dev tb1 mtu 9000")
    good("slow", "studio1", "studio5", "--delay-ms", "6")
    status, printed = doctor()
    assert status == 1 and "allreduce" in printed
    faults = shown_faults(printed)
    wheres = [where for where, *_ in faults]
    assert wheres == ["studio2", "studio1 - studio5", "studio3"], printed
    return {where: (what, fix) for where, what, fix in faults}


@pytest.mark.slow
def test_a_way_past_the_cables(slowed: Faults) -> None:
    what, fix = slowed["studio2"]
    assert what == "data to studio4 go by eth0 (Ethernet), not by a cable"
    assert fix == "./launch/cables 2 5 --ports 1=tb0,3=tb1 --apply"


@pytest.mark.slow
def test_a_slow_link(slowed: Faults) -> None:
    what, _ = slowed["studio1 - studio5"]
    assert "a slow link, studio1 tb0" in what and " ms one way, its peers 1." in what


@pytest.mark.slow
def test_packets_of_other_sizes(slowed: Faults) -> None:
    what, fix = slowed["studio3"]
    assert "have 9000 bytes (MTU), at the other end 65000" in what
    assert fix == "ip link set dev tb1 mtu 65000"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--need-gb", "much"], "'much': wanted a number above 0"),
        (["--transport", "pigeon"], "invalid choice: 'pigeon'"),
        (["--json", "/nowhere/at/all.json"], "there is no folder /nowhere/at"),
    ],
)
def test_mistakes_on_the_command_line(options: list[str], says: str) -> None:
    command = ["-n", 2, sys.executable, "-m", "mlxtp.doctor", *options]
    done = mpirun(*command, timeout_seconds=60)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count(says) == 1, done.stderr
    assert "usage:" not in done.stderr


@pytest.mark.slow
def test_alone(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mlxtp.doctor", "--json", tmp_path / "one.json"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == (0 if "All is well." in done.stdout else 1)
    measured = Measured.read(tmp_path / "one.json")
    assert len(measured.hosts) == 1 and measured.pairs == measured.collectives == ()


def on_host(host: str, line: str) -> None:
    good("run", "--on", host, "sh", "-c", line)
