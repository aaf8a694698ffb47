"""Whether ranks compute alike is the same answer on all of them."""

import platform
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from ranks import mpirun

from mlxtp import Communicator
from mlxtp.comm import arithmetic
from mlxtp.comm.arithmetic import Arithmetic, machines_differ, this_arithmetic


def test_alike(comm: Communicator) -> None:
    assert not comm.machines_differ
    assert not machines_differ(comm)


@pytest.mark.parametrize(
    "change",
    [
        {"chip": "Apple M2 Ultra"},
        {"instructions": ("avx2",)},
        {"system": "Linux aarch64"},
        {"backend": "CUDA"},
        {"mlx_version": "0.0.1"},
        {"build": "mlx-cuda-13 0.0.1"},
    ],
)
def test_one_rank_differs(
    change: dict[str, Any], comm: Communicator, monkeypatch: pytest.MonkeyPatch
) -> None:
    if comm.rank == comm.size - 1:
        other = replace(this_arithmetic(), **change)
        monkeypatch.setattr(arithmetic, "this_arithmetic", lambda: other)
    assert machines_differ(comm) == (comm.size > 1)


@pytest.mark.once
def test_a_communicator_knows() -> None:
    """It asks when the ranks meet. Over MLX's backends rank 0's arrays come as well."""
    program = """
from dataclasses import replace
import mlx.core as mx
from mlxtp.comm import arithmetic, launcher
from mlxtp.comm.communicator import Communicator
mine = arithmetic.this_arithmetic()
if launcher.rank() == 1:
    arithmetic.this_arithmetic = lambda: replace(mine, backend="Metal")
comm = Communicator.world("ring", heartbeat=False)
assert comm.machines_differ
for dtype in mx.uint32, mx.bfloat16, mx.uint8:
    for root in range(2):
        x = mx.full((2, 3), 5 + comm.rank, dtype)
        y = comm.bcast(x, root)
        assert y.dtype == dtype and y.tolist() == [[5 + root] * 3] * 2, y
assert comm.traffic.calls == 6
"""
    done = mpirun("-n", 2, sys.executable, "-c", program, timeout_seconds=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.once
@pytest.mark.parametrize(
    ("device", "is_metal", "name", "backend"),
    [
        ("cpu", False, "", "CPU"),
        ("gpu", True, "Apple M3 Ultra", "Metal"),
        ("gpu", False, "NVIDIA GeForce RTX 4090", "CUDA"),
    ],
)
def test_the_device_that_mlx_computes_on(
    device: str,
    is_metal: bool,
    name: str,
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = FakeMLX(device, is_metal, {"device_name": name, "architecture": "a"})
    monkeypatch.setattr(arithmetic, "mx", fake)
    here = this_arithmetic()
    assert here.backend == backend
    assert here.chip == (name or arithmetic.processor().name)
    assert bool(here.instructions) == (backend == "CPU")
    assert backend in str(here) and here.chip in str(here)


class FakeMLX:
    """What is asked of MLX, on a device that this machine does not have."""

    def __init__(self, device: str, is_metal: bool, info: dict[str, Any]) -> None:
        self.DeviceType = type("DeviceType", (), {"cpu": "cpu", "gpu": "gpu"})
        self.default_device = answer(type("Device", (), {"type": device}))
        self.device_info = answer(info)
        self.metal = type("metal", (), {"is_available": staticmethod(answer(is_metal))})


def answer(value: Any) -> Callable[[], Any]:
    return lambda: value


@pytest.mark.once
def test_builds_and_systems_that_differ_in_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """CUDA 12 and 13, and two versions of macOS; the text shows which."""
    installed = {"mlx": "1"}

    def version(package: str) -> str:
        if package not in installed:
            raise arithmetic.PackageNotFoundError(package)
        return installed[package]

    monkeypatch.setattr(arithmetic, "version", version)
    from_source = this_arithmetic()
    assert from_source.build == "" and str(from_source).endswith(")")
    texts = [str(from_source)]
    for build in "mlx-cuda-12", "mlx-cuda-13":
        installed[build] = "1"
        texts.append(str(this_arithmetic()))
        assert texts[-1].endswith(f", {build} 1)")
        del installed[build]
    for macos in "15.6", "26.1":
        monkeypatch.setattr(platform, "mac_ver", lambda macos=macos: (macos, (), ""))
        assert this_arithmetic().system.startswith(f"macOS {macos} ")
        texts.append(str(this_arithmetic()))
    assert len(set(texts)) == 5


def test_it_is_a_value() -> None:
    """Two runs on one machine tell the same, so that ranks on it are alike."""
    assert this_arithmetic() == this_arithmetic()
    assert isinstance(hash(this_arithmetic()), int)
    assert isinstance(this_arithmetic(), Arithmetic)
