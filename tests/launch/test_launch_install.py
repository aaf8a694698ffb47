"""launch/install: the same files and environment at the same path, over true ssh.

The lab's hosts share a file system, so each has a mount of its own where the checkout
is to be. The environment in it is a stub: making a true one takes minutes.
"""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from five_hosts import HOSTS, NEEDS, ROOT, lab
from five_hosts import the_lab_can_be_built as the_lab_can_be_built
from launch_scripts import module
from needs import needs
from ssh_hosts import Servers, lines, servers

install = module("install")

pytestmark = [pytest.mark.lab, pytest.mark.once, needs(*NEEDS, "sshd")]

# Makes a .venv of one file of versions, with a python that can print and change them.
# It fails where its host's name says so, and counts how often it was asked.
ENVIRONMENT = """
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
echo "asked$*" >>"$root/asked"
[ -z "$*" ] || return 1
if [ "$(hostname)" = studio4 ]; then
    echo "no room for numpy" >&2
    echo "The installation failed, for the reason that pip gives." >&2
    return 1
fi
if ! [ -x "$root/.venv/bin/python" ]; then
    mkdir -p "$root/.venv/bin"
    if [ -s "$PIP_CONSTRAINT" ]; then
        cp "$PIP_CONSTRAINT" "$root/.venv/versions"
    else
        printf "mlx==0.32.9\\nnumpy==2.3.9\\n" >"$root/.venv/versions"
    fi
    cp "$root/python" "$root/.venv/bin/python"
fi
echo " $(cksum <"$root/pyproject.toml") $root" >>"$root/.venv/.installed"
PATH=$root/.venv/bin:$PATH
"""
PYTHON = """#!/bin/sh
versions=$(dirname "$0")/../versions
case "$*" in
*freeze*) cat "$versions" ;;
*install*)
    for last; do :; done
    grep -v "^${last%%==*}==" "$versions" >"$versions.new"
    echo "$last" >>"$versions.new"
    mv "$versions.new" "$versions" ;;
*native*)
    [ "$(hostname)" = studio3 ] || exit 0
    echo "compiling" >&2
    echo "no compiler: apt install g++" >&2
    exit 1 ;;
esac
"""
OURS = "mlx==0.32.4\nnumpy==2.3.1\n"

# What launch/install is made of.
NEEDED = [
    "launch/install",
    "launch/over_ssh.py",
    "mlxtp/__init__.py",
    "mlxtp/cluster/__init__.py",
    "mlxtp/cluster/addresses.py",
    "mlxtp/cluster/hostfile.py",
    "mlxtp/cluster/job.py",
    "mlxtp/cluster/remote.py",
    "mlxtp/cluster/verdict.py",
]


@pytest.fixture(scope="module")
def ssh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    with servers(tmp_path_factory.mktemp("ssh")) as running:
        yield running


class Cluster:
    """A checkout in a folder that every host has of its own, and install on it."""

    def __init__(self, folder: Path, ssh: Servers) -> None:
        self.top, self.ssh = folder / "top", ssh
        self.root = self.top / "mlxtp"
        for name in "launch", "library", "mlxtp/cluster":
            (self.root / name).mkdir(parents=True)
        for name in NEEDED:
            shutil.copy(ROOT / name, self.root / name)
        (self.root / "launch" / "environment").write_text(ENVIRONMENT)
        (self.root / "pyproject.toml").write_text("[project]\n")
        (self.root / "library" / "a file.py").write_text("a = 1\n")
        (self.root / "python").write_text(PYTHON)
        (self.root / "python").chmod(0o755)
        self.hostfile = folder / "hosts"
        self.hostfile.write_text("studio1\nstudio2\nstudio3\n")

    def serve(self, *hosts: str) -> None:
        for host in hosts:
            self.ssh.start(host, own=self.top)

    def prepare(self) -> None:
        """This machine's environment, as the versions that all are to have."""
        bin_ = self.root / ".venv" / "bin"
        bin_.mkdir(parents=True)
        shutil.copy(self.root / "python", bin_)
        (self.root / ".venv" / "versions").write_text(OURS)
        line = f' $(cksum <pyproject.toml) {self.root}" >.venv/.installed'
        subprocess.run(f'echo "{line}', shell=True, cwd=self.root, check=True)

    def install(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        words = [str(self.root / "launch" / "install"), str(self.hostfile)]
        return lab("run", *words, "--ssh", self.ssh.ssh, *arguments)

    def of(self, host: str) -> Path:
        """The checkout as that host has it."""
        return self.ssh.own(host) / "mlxtp"

    def contents(self, host: str) -> dict[str, str]:
        top = self.of(host)
        files = [path for path in top.rglob("*") if path.is_file()]
        return {str(path.relative_to(top)): path.read_text() for path in files}


@pytest.fixture
def unpacked(tmp_path: Path, ssh: Servers) -> Iterator[Cluster]:
    yield Cluster(tmp_path, ssh)
    ssh.stop()


@pytest.fixture
def cluster(unpacked: Cluster) -> Cluster:
    unpacked.prepare()
    return unpacked


# With the environment, pyproject.toml, the library's file and python.
NEW = f"copy {len(NEEDED) + 4} files, make the environment"


def test_it_is_shown_then_done_then_nothing_is_left_to_do(cluster: Cluster) -> None:
    cluster.serve("studio2", "studio3")
    shown = cluster.install()
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert lines(shown) == {
        "studio1": "as here: nothing to do",
        "studio2": f"to do: {NEW}",
        "studio3": f"to do: {NEW}",
    }
    assert "Nothing was changed" in shown.stdout
    assert not cluster.of("studio2").exists()

    done = cluster.install("--apply")
    assert done.returncode == 0, done.stdout + done.stderr
    assert lines(done)["studio2"] == f"done: {NEW}"
    assert lines(done)["studio3"] == f"done: {NEW}; no compiler: apt install g++"
    undo = f"To undo it, on studio2, studio3: rm -r {cluster.root}"
    assert undo in done.stdout.splitlines()
    for host in "studio2", "studio3":
        there = cluster.contents(host)
        for name in install.files_under(cluster.root):
            assert there[name] == (cluster.root / name).read_text()
        assert there[".venv/versions"] == OURS
        assert there["asked"] == "asked\n"
    python = cluster.of("studio2") / "python"
    assert python.stat().st_mode & 0o111 == 0o111

    before = cluster.contents("studio2")
    again = cluster.install("--apply")
    assert again.returncode == 0
    assert set(lines(again).values()) == {"as here: nothing to do"}
    assert "undo" not in again.stdout
    assert cluster.contents("studio2") == before


@pytest.mark.slow
def test_what_is_made_here_first_is_what_all_get(unpacked: Cluster) -> None:
    unpacked.serve("studio2", "studio3")
    assert lines(unpacked.install())["studio1"] == "to do: make the environment"
    done = unpacked.install("--apply")
    assert done.returncode == 0, done.stdout + done.stderr
    assert lines(done)["studio1"] == "done: make the environment"
    ours = (unpacked.root / ".venv" / "versions").read_text()
    assert ours == "mlx==0.32.9\nnumpy==2.3.9\n"
    for host in "studio2", "studio3":
        assert (unpacked.of(host) / ".venv" / "versions").read_text() == ours
    assert set(lines(unpacked.install()).values()) == {"as here: nothing to do"}


def test_a_host_that_fails_does_not_stop_the_others(cluster: Cluster) -> None:
    cluster.hostfile.write_text("\n".join(HOSTS))
    cluster.serve("studio3", "studio4")
    cluster.ssh.start("studio2", own=cluster.top, authorized="nobody")
    done = cluster.install("--apply")
    assert done.returncode == 1
    says = lines(done)
    assert "Permission denied" in says["studio2"]
    assert says["studio3"].startswith(f"done: {NEW}")
    assert says["studio4"].startswith("FAILED: The installation failed")
    assert "  | no room for numpy" in done.stdout
    assert "Connection refused" in says["studio5"]


@pytest.mark.slow
def test_only_what_differs_is_brought_over(cluster: Cluster) -> None:
    cluster.hostfile.write_text("studio1\nstudio2\n")
    cluster.serve("studio2")
    assert cluster.install("--apply").returncode == 0
    there = cluster.of("studio2")
    same = (there / "pyproject.toml").stat().st_mtime_ns, there / "pyproject.toml"
    (there / "notes").write_text("of studio2 alone")
    (cluster.root / "library" / "a file.py").write_text("a = 2\n")
    (there / ".venv" / "versions").write_text("mlx==0.32.4\nnumpy==2.2.0\nown==1\n")
    todo = "copy library/a file.py, numpy 2.2.0 -> 2.3.1"
    assert lines(cluster.install())["studio2"] == f"to do: {todo}"
    done = cluster.install("--apply")
    assert lines(done)["studio2"] == f"done: {todo}", done.stdout
    left = cluster.contents("studio2")
    assert left["library/a file.py"] == "a = 2\n"
    assert left["notes"] == "of studio2 alone"
    assert same[1].stat().st_mtime_ns == same[0]
    versions = set(left[".venv/versions"].split())
    assert versions == {"mlx==0.32.4", "numpy==2.3.1", "own==1"}


@pytest.mark.slow
def test_a_folder_of_something_else_is_left_alone(cluster: Cluster) -> None:
    cluster.hostfile.write_text("studio1\nstudio2\n")
    cluster.serve("studio2")
    cluster.of("studio2").mkdir()
    (cluster.of("studio2") / "thesis").write_text("my life")
    done = cluster.install("--apply")
    assert done.returncode == 1
    assert "no checkout of mlxtp: move it out of the way" in lines(done)["studio2"]
    assert cluster.contents("studio2") == {"thesis": "my life"}
