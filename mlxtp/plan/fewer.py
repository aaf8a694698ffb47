"""Whether fewer machines would be faster than all: modelled."""

from dataclasses import dataclass

from mlxtp.plan import timing
from mlxtp.plan.hardware import Network
from mlxtp.plan.planning import Plan


@dataclass(frozen=True)
class Fewer:
    """The first hosts alone: `ranks` of them, and the rate at which they decode."""

    ranks: int
    tokens_per_second: float


def fewer(plan: Plan) -> Fewer | None:
    """Return the fastest of the first 1, 2, … ranks, if it is faster than all.

    With even shares, on links like these that join them alone; where they have room for
    the model, or nobody knows.
    """
    best, seconds = None, plan.decode.seconds
    for ranks in range(len(plan.needs) - 1, 0, -1):
        of_fewer = _seconds(plan, ranks, seconds)
        if of_fewer is not None and of_fewer < seconds:
            best, seconds = ranks, of_fewer
    return None if best is None else Fewer(best, plan.setting.batch / seconds)


def _seconds(plan: Plan, ranks: int, below: float) -> float | None:
    """A token's time on the first ranks; None where they lack room or are slower."""
    setting = plan.setting.with_machines(plan.setting.machines[:ranks])
    if ranks == 1:
        return None if plan.one_fits is False else plan.decode_on_one.seconds
    # What surely has no room, or is slower, takes no dry run.
    limits = {machine.host: machine.limit_bytes for machine in setting.machines}
    known = [limit for limit in limits.values() if limit is not None]
    if len(known) == len(limits) and sum(known) < plan.one.weights_bytes:
        return None
    slowest = min(machine.bytes_per_second for machine in setting.machines)
    one = plan.one.dry_run.token
    read = sum(step.read_bytes for step in one) / ranks / slowest
    if _waiting(plan, setting.network) + read >= below:
        return None
    needs = setting.needs(plan.model, [1] * ranks)
    if setting.fits(needs) is False:
        return None
    return timing.decode(needs, setting.machines, setting.network).seconds


def _waiting(plan: Plan, network: Network) -> float:
    """The seconds that a token spends in collectives and waits for them."""
    crossing = min(machine.crossing_seconds for machine in plan.setting.machines)
    return sum(
        crossing + network.seconds(step.kind, step.part_bytes, step.item_bytes)
        for step in plan.needs[0].dry_run.token
        if step.kind == "allreduce"
    )
