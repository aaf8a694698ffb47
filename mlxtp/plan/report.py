"""A plan for people, as tables, and as JSON."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from mlxtp.cluster.units import gigabytes
from mlxtp.plan.disk import Disk
from mlxtp.plan.planning import Plan
from mlxtp.plan.remedies import Remedy
from mlxtp.plan.timing import Time

# What a part of a modelled `Time` is called in tables.
PARTS = {
    "weights": "reading weights",
    "caches": "reading caches",
    "arithmetic": "multiplying",
    "operations": "starting operations",
    "evaluations": "waiting for the GPU",
    "allreduces": "allreduces",
    "gathers": "gathers",
    "messages": "messages",
}
# What each rank owns, and what it needs, in GB.
COLUMNS = (
    *("rank", "host", "query heads", "KV heads", "MLP columns", "experts"),
    *("vocabulary rows", "weights", "KV cache", "working", "limit", "left"),
)


def show(
    plan: Plan,
    remedies: Sequence[Remedy],
    console: Console,
    disks: Sequence[Disk] = (),
) -> None:
    """Print what each rank needs, whether that fits, and how fast it would be.

    What the hosts keep on their `disks` is printed where it is given.
    """
    setting = plan.setting
    console.print(
        f"{plan.model.name}, {len(plan.needs)} ranks, {setting.context} tokens of "
        f"context, batch {setting.batch}; GB are 10⁹ bytes",
        highlight=False,
    )
    console.print(_memory(plan))
    console.print(_verdict(plan), highlight=False, soft_wrap=True)
    for remedy in remedies:
        line = f"  {remedy.what} would do: {remedy.how}"
        console.print(line, highlight=False, soft_wrap=True)
    if disks:
        console.print()
        console.print(_disks(disks))
    console.print()
    console.print(_speed(plan))


def _memory(plan: Plan) -> Table:
    table = Table(title="What each rank needs, GB")
    for name in COLUMNS:
        justify: Literal["left", "right"] = "left" if name == "host" else "right"
        table.add_column(name.replace(" ", "\n"), justify=justify)
    rows = zip(plan.needs, plan.setting.machines, plan.left_bytes, strict=True)
    for need, machine, left in rows:
        owned = need.owned
        limit = machine.limit_bytes
        experts = f"{owned.experts} x {_span(owned.expert_columns)}"
        table.add_row(
            str(need.rank),
            machine.host,
            _span(owned.query_heads),
            _span(owned.kv_heads),
            _span(owned.columns),
            experts if owned.experts else "-",
            str(owned.vocabulary_rows),
            gigabytes(need.weights_bytes, 2),
            gigabytes(need.cache_bytes, 2),
            gigabytes(need.working_bytes, 2),
            "not known" if limit is None else gigabytes(limit, 2),
            "-" if left is None else gigabytes(left, 2),
            style="red" if left is not None and left < 0 else None,
        )
    return table


def _disks(disks: Sequence[Disk]) -> Table:
    table = Table(title="What each host keeps on disk with --spare, GB")
    table.add_column("host")
    for name in ("its slices", "those of the host before it", "together"):
        table.add_column(name, justify="right")
    for disk in disks:
        parts = disk.slices_bytes, disk.spare_bytes
        sizes = (gigabytes(size, 2) for size in (*parts, sum(parts)))
        table.add_row(disk.host, *sizes)
    return table


def _verdict(plan: Plan) -> str:
    shares = f"--shares {plan.shares}"
    if plan.fits is None:
        return f"Some hosts' limits are not known, nor whether it fits ({shares})."
    if plan.fits:
        return f"It fits ({shares})."
    lacking = gigabytes(plan.lacking_bytes, 2)
    return f"It does not fit ({shares}): the fullest host lacks {lacking} GB."


def _speed(plan: Plan) -> Table:
    sides = _sides(plan)
    table = Table(title="Modelled speed, and where the time goes")
    table.add_column("modelled")
    for name in sides:
        table.add_column(name, justify="right")
    tokens, prompts = zip(*sides.values(), strict=True)
    table.add_row("decoding, tokens/s", *(_rate(token, plan, 1) for token in tokens))
    length = plan.setting.context
    rates = (_rate(prompt, plan, length) for prompt in prompts)
    table.add_row(f"prefill of {length}, tokens/s", *rates, end_section=True)
    _parts(table, "ms a token", 1e3, tokens)
    table.add_section()
    _parts(table, "seconds a prompt", 1, prompts)
    return table


def _parts(table: Table, name: str, unit: float, times: Sequence[Time]) -> None:
    """Add a row for the whole, and one for each part that takes time."""
    table.add_row(name, *(f"{unit * time.seconds:.2f}" for time in times))
    for part, label in PARTS.items():
        seconds = [getattr(time, part) for time in times]
        if any(seconds):
            table.add_row(f"  {label}", *(f"{unit * each:.2f}" for each in seconds))


def _sides(plan: Plan) -> dict[str, tuple[Time, Time]]:
    """By name: the times of a token, and of a prompt as long as the context."""
    if len(plan.needs) == 1:
        return {"one host": (plan.decode, plan.prefill_on_one)}
    one = "one host (does not fit)" if plan.one_fits is False else "one host"
    return {
        "this plan": (plan.decode, plan.prefill),
        "pipeline": plan.pipeline,
        one: (plan.decode_on_one, plan.prefill_on_one),
    }


def _rate(time: Time, plan: Plan, tokens: int) -> str:
    return rate(plan.setting.batch * tokens / time.seconds)


def rate(per_second: float) -> str:
    """Write a rate with three digits or more, and never as a power of ten."""
    return f"{per_second:,.0f}" if per_second >= 100 else f"{per_second:.3g}"


def _span(counts: tuple[int, int]) -> str:
    least, most = counts
    return str(most) if least == most else f"{least}-{most}"


def as_json(
    plan: Plan, remedies: Sequence[Remedy], disks: Sequence[Disk] = ()
) -> dict[str, Any]:
    """Return all of it, in bytes and seconds; what is modelled is named so."""
    setting = plan.setting
    rows = zip(plan.needs, setting.machines, plan.left_bytes, strict=True)
    return {
        "model": plan.model.name,
        "context": setting.context,
        "batch": setting.batch,
        "shares": [asdict(share) for share in plan.shares],
        "fits": plan.fits,
        "ranks": [
            {
                "rank": need.rank,
                "host": machine.host,
                "chip": machine.chip,
                **asdict(need.owned),
                "weights_bytes": need.weights_bytes,
                "cache_bytes": need.cache_bytes,
                "working_bytes": need.working_bytes,
                "limit_bytes": machine.limit_bytes,
                "left_bytes": left,
            }
            for need, machine, left in rows
        ],
        **({"disks": [asdict(disk) for disk in disks]} if disks else {}),
        "remedies": [asdict(remedy) for remedy in remedies],
        "one_host_fits": plan.one_fits,
        "modelled": {
            name.partition(" (")[0]: {
                "decode_tokens_per_second": setting.batch / token.seconds,
                "prefill_tokens_per_second": setting.batch
                * setting.context
                / prompt.seconds,
                "seconds_a_token": asdict(token),
                "seconds_a_prompt": asdict(prompt),
            }
            for name, (token, prompt) in _sides(plan).items()
        },
    }
