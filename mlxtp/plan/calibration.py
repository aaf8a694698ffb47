"""The hosts that doctor has measured, as the machines that plan calculates with."""

from collections.abc import Sequence

from mlxtp.cluster.measured import Host
from mlxtp.dryrun.requirements import needs
from mlxtp.plan.hardware import OPERATION_SECONDS, Machine
from mlxtp.plan.model import open_model
from mlxtp.plan.timing import kernels
from mlxtp.stories import PATH as STORIES

CONTEXT = 64


def measured_machines(hosts: Sequence[Host]) -> list[Machine]:
    """Turn what doctor measured into machines.

    The time of reading weights is subtracted from that of doctor's token. What is left
    is, on a CPU, the time of MLX's operations; on a GPU, the crossings to the CPU for
    each collective, beside the starts of kernels.
    """
    with open_model(str(STORIES)) as model:
        [need] = needs(model.build, [1], CONTEXT)
    token = need.dry_run.token
    read_bytes = sum(step.read_bytes for step in token)
    operations = sum(step.operations for step in token)
    started = OPERATION_SECONDS * sum(kernels(step) for step in token)
    crossings = sum(bool(step.kind) for step in token)
    machines = []
    for host in hosts:
        rest = host.token_seconds - read_bytes / host.bytes_per_second
        machines.append(
            Machine(
                host.host,
                host.chip,
                host.memory_bytes,
                host.limit_bytes,
                host.bytes_per_second,
                host.flops,
                OPERATION_SECONDS if host.has_gpu else max(0.0, rest) / operations,
                max(0.0, rest - started) / crossings if host.has_gpu else 0.0,
                host.has_gpu,
            )
        )
    return machines
