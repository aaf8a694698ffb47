"""What the GPU has for models, as MLX tells it on machines that are not these."""

from typing import Any

import mlx.core as mx
import pytest

from mlxtp.checkpoint.memory import gpu_limit_bytes

pytestmark = pytest.mark.once

# The keys are those of MLX 0.32's device_info for each of its backends.
METAL = {
    "device_name": "Apple M3 Ultra",
    "architecture": "applegpu_g15d",
    "max_buffer_length": 86 * 10**9,
    "max_recommended_working_set_size": 51 * 10**9,
    "memory_size": 64 * 2**30,
    "resource_limit": 499000,
}
CUDA = {
    "device_name": "NVIDIA GeForce RTX 4090",
    "uuid": "GPU-0",
    "architecture": "sm_89",
    "pci_bus_id": "0000:01:00.0",
    "compute_capability_major": 8,
    "compute_capability_minor": 9,
    "free_memory": 22 * 10**9,
    "total_memory": 24 * 10**9,
}
CPU = {"device_name": "AMD EPYC", "architecture": "x86_64"}


@pytest.mark.parametrize(
    ("info", "limit"), [(METAL, 51 * 10**9), (CUDA, 22 * 10**9), (CPU, None)]
)
def test_limit(
    info: dict[str, Any], limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mx, "device_info", lambda: info)
    assert gpu_limit_bytes() == limit
