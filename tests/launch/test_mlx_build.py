"""Which build of MLX a host gets, by what `nvidia-smi` and `uname` say there.

Nothing is installed: a stub stands for the environment's Python. What `nvidia-smi` says
is in its format, and was recorded on no host.
"""

import shutil
import subprocess
from pathlib import Path

import pytest
from five_hosts import ROOT
from launch_scripts import module

install = module("install")

pytestmark = pytest.mark.once

# Compute capability and driver of each card.
RTX_4090 = "8.9, 550.54.14\n"
ADA = "8.9, 550.127.05\n"  # newer than 550.54
BLACKWELL = "12.0, 580.65.06\n8.9, 580.65.06\n"
OLD_DRIVER = "8.9, 535.183.01\n"
OLD_CARD = "6.1, 580.65.06\n"
NO_DRIVER = (
    "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n"
)


class Host:
    """A host with the scripts, a stub of an environment, and commands of its own."""

    def __init__(self, folder: Path) -> None:
        self.root, self.bin = folder / "mlxtp", folder / "bin"
        for name in "launch/environment", "launch/mlx_build", "pyproject.toml":
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.root / name)
        self.log = folder / "log"
        self.command(
            self.root / ".venv" / "bin" / "python", f'echo "$@" | tee -a {self.log}'
        )
        self.system("Linux")
        self.card(None)

    def command(self, path: Path, script: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def system(self, name: str) -> None:
        self.command(self.bin / "uname", f"echo {name}")

    def card(self, answer: str | None) -> None:
        """Let `nvidia-smi` answer so; None is a host without it."""
        script = "exit 127" if answer is None else f"printf '%s' \"{answer}\""
        self.command(self.bin / "nvidia-smi", script)

    def run(self, script: str, stdin: str = "") -> str:
        done = subprocess.run(
            ["bash", "-c", f"export PATH={self.bin}:$PATH; {script}"],
            cwd=self.root,
            input=stdin,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def build(self) -> str:
        return self.run("sh launch/mlx_build").strip()

    def make_environment(self, extras: str = "") -> list[str]:
        """Make it; return what pip was started with. What is compiled comes last."""
        self.log.write_text("")
        self.run(f'source launch/environment "{extras}"')
        started = self.log.read_text().splitlines()
        if started:
            assert started.pop() == "-m mlxtp.comm.native"
        return [line.split("pip ")[1] for line in started]


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


@pytest.mark.parametrize(
    ("answer", "build"),
    [
        (None, "cpu"),
        (NO_DRIVER, "cpu"),
        (OLD_DRIVER, "cpu"),
        (OLD_CARD, "cpu"),
        (RTX_4090, "cuda12"),
        (ADA, "cuda12"),
        (BLACKWELL, "cuda13"),
    ],
)
def test_the_build_that_fits(answer: str | None, build: str, host: Host) -> None:
    host.card(answer)
    assert host.build() == build
    host.system("Darwin")
    assert host.build() == ""


def installs(done: list[str], extras: str) -> bool:
    return len(done) == 1 and done[0].endswith(f"--editable {extras}")


def test_the_environment_has_it_and_is_made_anew_for_another(host: Host) -> None:
    assert installs(host.make_environment("test"), f"{host.root}[test,cpu]")
    assert installs(host.make_environment("test,check"), f"{host.root}[test,check,cpu]")
    assert host.make_environment("test") == []
    host.card(RTX_4090)
    removed, *done = host.make_environment()
    assert removed.startswith("uninstall ")
    assert removed.endswith("mlx-cpu mlx-cuda-13")
    assert installs(done, f"{host.root}[cuda12]")
    host.card(None)
    removed, *done = host.make_environment("test")
    assert removed.endswith("mlx-cuda-12 mlx-cuda-13")
    assert installs(done, f"{host.root}[test,cpu]")


def test_a_host_without_a_compiler_has_its_environment(host: Host) -> None:
    stub = (
        f'echo "$@" >>{host.log}; case "$*" in *native*) echo no compiler; false; esac'
    )
    host.command(host.root / ".venv" / "bin" / "python", stub)
    assert installs(host.make_environment(), f"{host.root}[cpu]")
    assert host.make_environment() == []


def test_a_mac_has_one_build(host: Host) -> None:
    host.system("Darwin")
    assert installs(host.make_environment(), str(host.root))
    assert installs(host.make_environment("test"), f"{host.root}[test]")


def test_every_build_is_an_extra_of_the_project() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    for build in "cpu", "cuda12", "cuda13":
        assert f'{build} = ["mlx[{build}]' in text


def test_install_notices_a_build_that_does_not_fit(host: Host) -> None:
    """A host's versions are known where its environment is complete alone."""
    look = install.LOOK.replace(install.HERE, str(host.root))

    def is_complete() -> bool:
        _, _, versions = host.run(look, stdin="pyproject.toml\0").partition(
            f"{install.BETWEEN}\n"
        )
        return "freeze" in versions

    assert not is_complete()
    host.make_environment("test,check")
    assert is_complete()
    host.card(RTX_4090)
    assert not is_complete()
    host.make_environment()
    assert is_complete()
