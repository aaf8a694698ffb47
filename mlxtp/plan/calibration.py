"""The machines that doctor has measured, as plan wants them."""

from collections.abc import Sequence

from mlxtp.cluster.measured import Host
from mlxtp.plan.hardware import OPERATION_SECONDS, Machine
from mlxtp.plan.opening import opened
from mlxtp.plan.requirements import needs
from mlxtp.plan.timing import kernels
from mlxtp.stories import PATH as STORIES

CONTEXT = 64


def of_measured(hosts: Sequence[Host]) -> list[Machine]:
    """What doctor saw.

    Of the token that it timed the weights are taken off. What is left is operations on
    a CPU; on a GPU it is the waits for it, beside the starts of kernels.
    """
    with opened(str(STORIES)) as model:
        [need] = needs(model, [1], CONTEXT)
    token = need.rehearsed.token
    read_bytes = sum(step.read_bytes for step in token)
    operations = sum(step.operations for step in token)
    started = OPERATION_SECONDS * sum(kernels(step) for step in token)
    evaluations = sum(bool(step.kind) for step in token)
    found = []
    for host in hosts:
        has_gpu = host.chip.startswith("Apple")
        beside = host.token_seconds - read_bytes / host.bytes_per_second
        found.append(
            Machine(
                host.host,
                host.chip,
                host.memory_bytes,
                host.limit_bytes,
                host.bytes_per_second,
                host.flops,
                OPERATION_SECONDS if has_gpu else max(0.0, beside) / operations,
                max(0.0, beside - started) / evaluations if has_gpu else 0.0,
                has_gpu,
            )
        )
    return found
