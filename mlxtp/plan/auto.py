"""`--shares auto`, the shares that suit, and `--context max`, the longest that fits."""

from dataclasses import replace

from mlxtp.dryrun.fitting import CONTEXT_STEP, Fitting
from mlxtp.model.context import longest_context
from mlxtp.partition.shares import Shares
from mlxtp.plan.model import PlannedModel
from mlxtp.plan.planning import Plan, Setting, plan

# How often an estimate is corrected by what is exact.
CORRECTIONS = 3
# About this context caches are estimated when the longest is looked for.
USUAL_CONTEXT = 32768


def auto(model: PlannedModel, setting: Setting) -> Plan:
    """Return the plan whose shares fit and take the least time for a token.

    Of two plans that do not fit, the one that lacks less memory is better; of two that
    fit, the faster one; of two that are equally fast, the one that leaves more memory.

    Raises: ValueError if the model cannot be split over so many ranks.
    """
    first = plan(model, setting, [1] * len(setting.machines))
    if len(setting.machines) == 1:
        return first
    return min(first, _fitted(_fitting(first, setting), first, setting), key=_order)


def longest(model: PlannedModel, setting: Setting, shares: Shares | None) -> Plan:
    """Return the plan with the longest context that fits, up to the model's own.

    With `shares` of None they are chosen, so that a token takes at most
    `fitting.MOST_SLOWER` of what the fastest shares would take.

    Raises: ValueError if no context fits, or a limit is not known.
    """
    if None in [machine.limit_bytes for machine in setting.machines]:
        raise ValueError("--context max: some hosts' limits of memory are not known")
    most = longest_context(model.config)
    if shares is None and len(setting.machines) > 1:
        usual = replace(setting, context=min(most, USUAL_CONTEXT))
        first = plan(model, usual, [1] * len(setting.machines))
        fitting = _fitting(first, usual)
        found = fitting.longest(most)
        shares = fitting.best(found or CONTEXT_STEP).shares
    shares = shares or Shares([1])
    return _longest(model, setting, shares, most)


def _longest(model: PlannedModel, setting: Setting, shares: Shares, most: int) -> Plan:
    """The plan with the longest context that fits these shares, from dry runs.

    What is left is about linear in the context: each dry run is made where a line
    through two others has nothing left.
    """
    last = -(-most // CONTEXT_STEP)

    def planned(steps: int) -> Plan:
        context = min(most, steps * CONTEXT_STEP)
        return plan(model, replace(setting, context=context), shares)

    def left(plan: Plan) -> int:
        return min(left for left in plan.left_bytes if left is not None)

    low, best = 1, planned(1)
    if not best.fits:
        raise ValueError(
            f"--context max: {model.name} does not fit with any context (--shares "
            f"{shares}): the fullest host lacks {best.lacking_bytes / 1e9:.2f} GB"
        )
    high, beyond = last, planned(last)
    if beyond.fits:
        return beyond
    while high - low > 1:
        room = left(best) / (left(best) - left(beyond))
        steps = min(max(low + int((high - low) * room), low + 1), high - 1)
        tried = planned(steps)
        if tried.fits:
            low, best = steps, tried
        else:
            high, beyond = steps, tried
    return best


def _fitting(first: Plan, setting: Setting) -> Fitting:
    """What estimates the shares of a model of which a plan is known."""
    reading = first.decode.weights + first.decode.caches
    return Fitting(
        first.model.build,
        setting.machines,
        setting.context,
        setting.batch,
        is_fused=all(machine.has_gpu for machine in setting.machines),
        other_seconds=first.decode.seconds - reading,
    )


def _fitted(fitting: Fitting, first: Plan, setting: Setting) -> Plan:
    """The plan of the shares that are estimated to be best, corrected where it lacks.

    An estimate does not know where matrices can be cut.
    """
    best = first
    for _ in range(CORRECTIONS):
        fit = fitting.best(setting.context)
        best = min(best, plan(first.model, setting, fit.shares), key=_order)
        if not best.lacking_bytes or fit.lacking_bytes:
            break
        fitting.reserve(best.lacking_bytes)
    return best


def _order(plan: Plan) -> tuple[float, float]:
    return plan.lacking_bytes, plan.decode.seconds
