"""A plan for people, as tables, and as JSON."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from mlxtp.cluster.units import gigabytes
from mlxtp.generation.pace import PAUSE_SECONDS
from mlxtp.plan.batches import Batch, batches
from mlxtp.plan.disk import Disk
from mlxtp.plan.drafts import Draft
from mlxtp.plan.fewer import fewer
from mlxtp.plan.hardware import MeasuredNetwork
from mlxtp.plan.planning import Plan
from mlxtp.plan.remedies import Remedy
from mlxtp.plan.timing import Time

# What a part of a modelled `Time` is called in tables.
PARTS = {
    "weights": "reading weights",
    "caches": "reading caches",
    "arithmetic": "multiplying",
    "operations": "starting operations",
    "crossings": "GPU to CPU and back",
    "allreduces": "allreduces",
    "gathers": "gathers",
    "messages": "messages",
}
# Where a draft is computed, as tables call it.
WHERE = {
    "ngram": "by n-grams",
    "one": "whole on one rank",
    "all": "whole on every rank",
    "split": "split over the ranks",
}
# What each rank owns, and what it needs, in GB.
COLUMNS = (
    *("rank", "host", "query heads", "KV heads", "MLP columns", "experts"),
    *("vocabulary rows", "weights", "KV cache", "working", "limit", "left"),
)


@dataclass(frozen=True)
class Side:
    """The modelled times of one way to run the model.

    `halves` is that of a prompt in two halves, None where there is nothing to hide.
    """

    token: Time
    prompt: Time
    halves: Time | None = None


def show(
    plan: Plan,
    remedies: Sequence[Remedy],
    console: Console,
    disks: Sequence[Disk] = (),
    drafts: Sequence[Draft] = (),
    acceptance: float = 0.0,
) -> None:
    """Print what each rank needs, whether that fits, and how fast it would be.

    What the hosts keep on their `disks`, and what `drafts` bring of which so many are
    accepted, is printed where it is given.
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
    line = fewer_are_faster(plan)
    if line:
        console.print(line, highlight=False, soft_wrap=True)
    if drafts:
        console.print()
        console.print(_drafts(drafts, acceptance))
        console.print(what_pays(plan, drafts), highlight=False, soft_wrap=True)
    if plan.setting.batch > 1:
        console.print()
        console.print(_batches(batches(plan)))


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
    tokens = [side.token for side in sides.values()]
    prompts = [side.prompt for side in sides.values()]
    table.add_row("decoding, tokens/s", *(_rate(token, plan, 1) for token in tokens))
    length = plan.setting.context
    rates = (_rate(prompt, plan, length) for prompt in prompts)
    table.add_row(f"prefill of {length}, tokens/s", *rates)
    halves = [side.halves for side in sides.values()]
    if any(halves):
        rates = (_rate(half, plan, length) if half else "" for half in halves)
        table.add_row("  read in two halves", *rates)
    table.add_section()
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


def _sides(plan: Plan) -> dict[str, Side]:
    """By name: the times of a token, and of a prompt as long as the context."""
    if len(plan.needs) == 1:
        return {"one host": Side(plan.decode, plan.prefill)}
    sides = {"this plan": Side(plan.decode, plan.prefill, plan.prefill_in_halves)}
    other = _recabled(plan)
    if other:
        halves = other.prefill_in_halves
        name = f"in a {other.setting.network.topology}"
        sides[name] = Side(other.decode, other.prefill, halves)
    sides["pipeline"] = Side(*plan.pipeline)
    one = "one host (does not fit)" if plan.one_fits is False else "one host"
    sides[one] = Side(plan.decode_on_one, plan.prefill_on_one)
    return sides


def _recabled(plan: Plan) -> Plan | None:
    """The plan on a mesh in place of a ring, or on a ring in place of a mesh.

    None where the two are the same, or the network was measured as it is.
    """
    network = plan.setting.network
    others = {"ring": "mesh", "mesh": "ring"}
    topology = others.get(network.topology)
    if not topology or network.ranks < 4 or isinstance(network, MeasuredNetwork):
        return None
    try:
        return replace(plan, setting=plan.setting.with_topology(topology))
    except ValueError:  # JACCL has no mesh of so many
        return None


def fewer_are_faster(plan: Plan) -> str:
    """Say in a line that fewer hosts would be faster than all, where it is so."""
    faster = fewer(plan)
    if faster is None:
        return ""
    first = "One host alone" if faster.ranks == 1 else f"The first {faster.ranks} alone"
    option = "" if plan.setting.is_listed else f" (--ranks {faster.ranks})"
    return (
        f"{first} would be faster than all {len(plan.needs)}: modelled "
        f"{rate(faster.tokens_per_second)} tokens/s in place of "
        f"{rate(plan.setting.batch / plan.decode.seconds)}{option}."
    )


def _drafts(drafts: Sequence[Draft], acceptance: float) -> Table:
    table = Table(
        title=f"Modelled with drafts, {acceptance:.0%} accepted if those before are"
    )
    table.add_column("drafted")
    for name in ("tokens a round", "tokens/s", "ms a round", "of it drafting"):
        table.add_column(name, justify="right")
    table.add_column("memory, GB")
    for draft in drafts:
        table.add_row(
            WHERE[draft.where],
            str(draft.tokens) if draft.tokens else "none pay",
            rate(draft.tokens_per_second),
            f"{1e3 * draft.round_seconds:.2f}",
            f"{1e3 * draft.drafting_seconds:.2f}",
            _memory_of_draft(draft),
        )
    return table


def _memory_of_draft(draft: Draft) -> str:
    most = max(draft.bytes_of_ranks)
    if not most:
        return "none"
    on = "each" if draft.rank is None else f"rank {draft.rank}"
    lacking = ": no room" if draft.fits is False else ""
    return f"{gigabytes(most, 2)} on {on}{lacking}"


def what_pays(plan: Plan, drafts: Sequence[Draft]) -> str:
    """Say in a line which way to draft is the fastest, and how many tokens pay."""
    best = drafts[0]
    if best.fits is False:
        return "There is no room for the draft model."
    if not best.tokens:
        return "No draft pays."
    gain = best.tokens_per_second * plan.decode.seconds / plan.setting.batch
    return (
        f"Fastest {WHERE[best.where]}, {best.tokens} tokens a round: {gain:.2f} x the "
        f"tokens a second of none ({best.options})."
    )


def _batches(rows: Sequence[Batch]) -> Table:
    table = Table(
        title="Modelled for requests at once",
        caption=f"A prompt may hold up all for {PAUSE_SECONDS:g} s before it is read "
        "in parts.",
    )
    names = ("requests", "tokens/s, all", "tokens/s, one", "ms between tokens")
    for name in (*names, "while a prompt is read in parts"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            str(row.requests),
            rate(row.tokens_per_second),
            rate(1 / row.gap_seconds),
            f"{1e3 * row.gap_seconds:.1f}",
            f"{1e3 * row.reading_gap_seconds:.1f}",
        )
    return table


def _rate(time: Time, plan: Plan, tokens: int) -> str:
    return rate(plan.setting.batch * tokens / time.seconds)


def rate(per_second: float) -> str:
    """Write a rate with three digits or more, and never as a power of ten."""
    return f"{per_second:,.0f}" if per_second >= 100 else f"{per_second:.3g}"


def _span(counts: tuple[int, int]) -> str:
    least, most = counts
    return str(most) if least == most else f"{least}-{most}"


def as_json(
    plan: Plan,
    remedies: Sequence[Remedy],
    disks: Sequence[Disk] = (),
    drafts: Sequence[Draft] = (),
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
                "decode_tokens_per_second": setting.batch / side.token.seconds,
                "prefill_tokens_per_second": setting.batch
                * setting.context
                / side.prompt.seconds,
                "seconds_a_token": asdict(side.token),
                "seconds_a_prompt": asdict(side.prompt),
                **(
                    {"seconds_a_prompt_in_halves": asdict(side.halves)}
                    if side.halves
                    else {}
                ),
            }
            for name, side in _sides(plan).items()
        },
        "modelled_fewer": asdict(faster) if (faster := fewer(plan)) else None,
        "modelled_drafts": [asdict(draft) for draft in drafts],
        "modelled_batches": [asdict(batch) for batch in batches(plan)],
    }
