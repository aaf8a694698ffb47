"""`--shares auto`, the shares that suit, and `--context max`, the longest that fits."""

from dataclasses import replace

from mlxtp.dryrun.caches import CONTEXT_STEP
from mlxtp.dryrun.fitting import Fitting
from mlxtp.dryrun.requirements import WorldNeeds
from mlxtp.model.context import longest_context
from mlxtp.partition.shares import Shares
from mlxtp.plan.model import PlannedModel
from mlxtp.plan.planning import MOST_TOKENS, Plan, Setting, plan

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
    most = min(longest_context(model.config), MOST_TOKENS // setting.batch)
    if shares is None and len(setting.machines) > 1:
        usual = replace(setting, context=min(most, USUAL_CONTEXT))
        first = plan(model, usual, [1] * len(setting.machines))
        fitting = _fitting(first, usual)
        tokens = fitting.longest(most)
        shares = fitting.best(tokens or CONTEXT_STEP).shares
    shares = shares or Shares([1])
    context = _longest(model, setting, shares, most)
    return plan(model, replace(setting, context=context), shares)


def _longest(model: PlannedModel, setting: Setting, shares: Shares, most: int) -> int:
    """The longest context that fits these shares, from dry runs.

    What is left is about linear in the context: a dry run is made where a line through
    two others has nothing left.

    Raises: ValueError if there is none.
    """
    is_fused = all(machine.has_gpu for machine in setting.machines)
    needs = WorldNeeds(model.build, shares, setting.batch, is_fused=is_fused)

    def left(steps: int) -> int:
        of_ranks = setting.left_bytes(needs.at(min(most, steps * CONTEXT_STEP)))
        return min(left for left in of_ranks if left is not None)

    low, high = 1, -(-most // CONTEXT_STEP)
    left_low, left_high = left(low), left(high)
    if left_low < 0:
        raise ValueError(
            f"--context max: {model.name} does not fit with any context (--shares "
            f"{shares}): the fullest host lacks {-left_low / 1e9:.2f} GB"
        )
    if left_high >= 0:
        return most
    while high - low > 1:
        part = left_low / (left_low - left_high)
        steps = min(max(low + int((high - low) * part), low + 1), high - 1)
        left_steps = left(steps)
        if left_steps >= 0:
            low, left_low = steps, left_steps
        else:
            high, left_high = steps, left_steps
    return low * CONTEXT_STEP


def _fitting(first: Plan, setting: Setting) -> Fitting:
    """What estimates the shares of a model of which a plan is known."""
    token = first.decode
    others = token.seconds - token.weights - token.caches
    collectives = sum(bool(step.kind) for step in first.needs[0].dry_run.token)
    return Fitting(
        first.model.build,
        setting.machines,
        setting.context,
        setting.batch,
        is_fused=all(machine.has_gpu for machine in setting.machines),
        collective_seconds=others / collectives,
    )


def _fitted(fitting: Fitting, first: Plan, setting: Setting) -> Plan:
    """The plan of the shares that are estimated to be best, corrected where it lacks.

    An estimate does not know where matrices can be cut.
    """
    best = first
    for _ in range(CORRECTIONS):
        fit = fitting.best(setting.context)
        exact = plan(first.model, setting, fit.shares)
        best = min(best, exact, key=_order)
        if not best.lacking_bytes or fit.lacking_bytes:
            break
        fitting.reserve(_lacking_of_ranks(exact))
    return best


def _lacking_of_ranks(plan: Plan) -> list[float]:
    """What each rank's host lacks, divided by the ranks there."""
    names = [machine.host for machine in plan.setting.machines]
    return [
        max(0, -(left or 0)) / names.count(name)
        for name, left in zip(names, plan.left_bytes, strict=True)
    ]


def _order(plan: Plan) -> tuple[float, float]:
    return plan.lacking_bytes, plan.decode.seconds
