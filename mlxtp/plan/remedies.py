"""What would make a plan fit that does not: each remedy has been calculated."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from mlxtp.cluster.units import GIB
from mlxtp.dryrun.caches import CONTEXT_STEP
from mlxtp.plan.auto import auto
from mlxtp.plan.model import GROUP_SIZE, model_of_config
from mlxtp.plan.planning import Plan, Setting

# Memory that macOS and other programs keep.
SYSTEM_BYTES = 6 * GIB
FEWER_BITS = (8, 6, 5, 4, 3, 2)
MOST_HOSTS = 32


@dataclass(frozen=True)
class Remedy:
    """A change that makes a plan fit: what it is, and the option or command for it."""

    what: str
    how: str


def remedies(plan: Plan) -> Iterator[Remedy]:
    """Yield what would make `plan` fit, the simplest first; nothing where it fits."""
    if plan.fits is not False:
        return
    yield from _other_shares(plan)
    yield from _higher_limit(plan)
    yield from _less_context(plan)
    yield from _fewer_bits(plan)
    yield from _more_hosts(plan)


def _other_shares(plan: Plan) -> Iterator[Remedy]:
    if auto(plan.model, plan.setting).fits:
        yield Remedy("shares that suit the hosts", "--shares auto")


def _higher_limit(plan: Plan) -> Iterator[Remedy]:
    needed: dict[str, int] = {}
    room: dict[str, int] = {}
    rows = zip(plan.setting.machines, plan.left_bytes, strict=True)
    for machine, left in rows:
        if left is None or left >= 0:
            continue
        assert machine.limit_bytes is not None
        needed[machine.host] = machine.limit_bytes - left
        room[machine.host] = machine.memory_bytes - SYSTEM_BYTES
        if not machine.has_gpu or needed[machine.host] > room[machine.host]:
            return
    if max(needed.values()) <= min(room.values()):  # one command for all
        needed = dict.fromkeys(needed, max(needed.values()))
    hosts: dict[int, list[str]] = {}
    for host, size in needed.items():
        hosts.setdefault(math.ceil(size / GIB) * 1024, []).append(host)
    commands = (
        f"sudo sysctl iogpu.wired_limit_mb={megabytes} on {', '.join(those)}"
        for megabytes, those in hosts.items()
    )
    yield Remedy(
        "a raised limit of the GPU", f"{'; '.join(commands)} (until the next start)"
    )


def _less_context(plan: Plan) -> Iterator[Remedy]:
    least, most = 1, -(-plan.setting.context // CONTEXT_STEP)
    if most == 1 or not _fits(plan, replace(plan.setting, context=CONTEXT_STEP)):
        return
    while most - least > 1:
        middle = (least + most) // 2
        if _fits(plan, replace(plan.setting, context=middle * CONTEXT_STEP)):
            least = middle
        else:
            most = middle
    tokens = least * CONTEXT_STEP
    yield Remedy(f"a context of {tokens} tokens", f"--context {tokens}")


def _fewer_bits(plan: Plan) -> Iterator[Remedy]:
    now = plan.model.bits() or 16
    for bits in FEWER_BITS:
        if bits >= now:
            continue
        try:
            with model_of_config(plan.model.name, plan.model.config, bits) as fewer:
                needs = plan.setting.needs(fewer, plan.shares)
        except ValueError:  # a width that no group divides
            continue
        if plan.setting.fits(needs):
            how = f"a checkpoint quantized so; here --bits {bits} shows it"
            yield Remedy(f"{bits} bits in groups of {GROUP_SIZE}", how)
            return


def _more_hosts(plan: Plan) -> Iterator[Remedy]:
    machines = list(plan.setting.machines)
    shares = list(plan.shares)
    while len(machines) < MOST_HOSTS:
        number = len(machines) + 1
        machines.append(replace(machines[-1], host=f"host {number}"))
        shares.append(shares[-1])
        try:
            setting = plan.setting.with_machines(machines)
            needs = setting.needs(plan.model, shares)
        except ValueError:  # fewer heads than ranks, or too many for JACCL's mesh
            return
        if setting.fits(needs):
            added = len(machines) - len(plan.shares)
            hosts = "one more host" if added == 1 else f"{added} more hosts"
            ranks = f"{len(machines)} ranks"
            how = ranks if plan.setting.is_listed else f"--ranks {len(machines)}"
            yield Remedy(f"{hosts} like the last", how)
            return


def _fits(plan: Plan, setting: Setting) -> bool:
    return setting.fits(setting.needs(plan.model, plan.shares)) is not False
