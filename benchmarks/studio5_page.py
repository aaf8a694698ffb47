"""docs/studio5.md, from plan: `python benchmarks/studio5_page.py > docs/studio5.md`."""

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from models import LLAMA_3_2_1B
from wide_models import WIDE

from mlxtp.cluster.units import GIB
from mlxtp.plan import hardware
from mlxtp.plan.batches import batches
from mlxtp.plan.drafts import ACCEPTANCE, drafts
from mlxtp.plan.hardware import LINKS, Network, published
from mlxtp.plan.model import PlannedModel, model_of_config
from mlxtp.plan.planning import Plan, Setting, plan
from mlxtp.plan.remedies import remedies
from mlxtp.plan.report import PARTS, fewer_are_faster, rate
from mlxtp.plan.timing import Time

RANKS = 5
MEMORY_GB = 64
CONTEXT = 8192
# Sold with 64 GB, but for the M3 Ultra, which begins at 96.
CHIPS = ["M1 Max", "M1 Ultra", "M2 Max", "M2 Ultra", "M4 Max", "M3 Ultra"]
# Columns of the table of chips: title, link, topology.
CABLES = [
    ("10 Gb Ethernet", "10gbe", "switch"),
    ("Thunderbolt 4, ring", "thunderbolt4", "ring"),
    ("mesh", "thunderbolt4", "mesh"),
    ("RDMA, ring", "rdma", "ring"),
    ("mesh", "rdma", "mesh"),
]
WITH_RDMA = ["M4 Max", "M3 Ultra"]  # which have Thunderbolt 5
# Microseconds of a hop over TCP: what has been reported, and half of it.
HOPS_US = (300, 150)
# The chips of which cables, drafts and waits are compared.
COMPARED = ["M2 Ultra", "M4 Max"]
REQUESTS = 8

LLAMA_405B = WIDE["Llama 3.1 405B, 1 of 126 layers"][0] | {"num_hidden_layers": 126}
LLAMA_70B = LLAMA_405B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
# Name, config, bits, and whether the first one drafts for it.
MODELS = [
    ("Llama 3.2 1B", LLAMA_3_2_1B, 16, False),
    ("Llama 3.2 1B", LLAMA_3_2_1B, 4, False),
    ("Llama 3.3 70B", LLAMA_70B, 4, True),
    ("Llama 3.1 405B", LLAMA_405B, 4, True),
]
DRAFT_BITS = 4

HEAD = """# Five Mac Studios

What five Mac Studios with 64 GB would run, and how fast, as `mlxtp.plan` says. **Every
time and speed on this page is modelled**: arithmetic on published figures, whose
sources are in `mlxtp/plan/hardware.py`. Nothing here was measured on a Mac. The bytes
of weights and caches are exact; working memory is estimated.

The page is made by `python benchmarks/studio5_page.py > docs/studio5.md`. One figure is

    python -m mlxtp.plan --model config.json --bits 4 --ranks 5 \\
        --chip "M2 Ultra" --memory 64 --context {context} --link thunderbolt4

with the model's published config, another chip, another link. Quantization is affine,
in groups of 64; caches have 16 bits; prefill is a prompt of {context} tokens.

Assumed for all: MLX reads weights at {bandwidth:.0f} % of the memory's bandwidth, and
multiplies at {flops:.0f} % of the GPU's arithmetic, a few tokens at {few:.0f} %. Each
collective takes data from the GPU to the CPU and back: {wait:.0f} µs, or {fast:.0f} µs
with `MLX_METAL_FAST_SYNCH=1` ([mlx 4438][4438]), which MLX's documentation advises
against and which has wedged GPUs ([mlx 3142][3142]). A hop takes {tcp:.0f} µs over TCP:
round trips of 0.38 to 0.95 ms have been reported for Thunderbolt (exo 2063 and
[2295][2295]). It takes {rdma:.0f} µs over RDMA, which needs Thunderbolt 5: of these
chips the M4 Max and the M3 Ultra have it. RDMA is `--transport jaccl`, where an
allreduce is one exchange in a mesh and N - 1 steps in a ring. The M3 Ultra is not sold
with 64 GB, it begins at 96; it stands here as if it were.

In a *pipeline* each host has a fifth of the layers, and they compute one after the
other. *One host* holds the whole model, if it fits. The GPU may wire three quarters of
the memory: {limit:.2f} GB of the 64 GB, which are 64 GiB.

Of drafted tokens {acceptance:.0f} % are *assumed* to be accepted, each if those before
it are. The draft model is Llama 3.2 1B in {draft_bits} bits; as many tokens are drafted
as pay most. A prompt *in halves* is read in two halves that take turns: one computes
while the sums of the other travel.

[4438]: https://github.com/ml-explore/mlx/issues/4438
[3142]: https://github.com/ml-explore/mlx/issues/3142
[2295]: https://github.com/exo-explore/exo/issues/2295
"""


def page(models: list[tuple[str, dict[str, Any], int, bool]] = MODELS) -> str:
    return "\n".join([_head(), *(_of(*model) for model in models)])


def _head() -> str:
    return HEAD.format(
        context=CONTEXT,
        bandwidth=100 * hardware.BANDWIDTH_SHARE,
        flops=100 * hardware.FLOPS_SHARE,
        few=100 * hardware.FLOPS_SHARE * hardware.FEW_TOKENS_SHARE,
        wait=1e6 * hardware.CROSSING_SECONDS,
        fast=1e6 * hardware.FAST_CROSSING_SECONDS,
        tcp=1e6 * hardware.TCP_HOP_SECONDS,
        rdma=1e6 * LINKS["rdma"].hop_seconds,
        limit=hardware.WIRED_SHARE * MEMORY_GB * GIB / 1e9,
        acceptance=100 * ACCEPTANCE,
        draft_bits=DRAFT_BITS,
    )


def _of(name: str, config: dict[str, Any], bits: int, has_draft: bool) -> str:
    with ExitStack() as stack:
        model = stack.enter_context(model_of_config(name, config, bits))
        draft = None
        if has_draft:
            small = model_of_config("Llama 3.2 1B", LLAMA_3_2_1B, DRAFT_BITS)
            draft = stack.enter_context(small)
        first = plan(model, _setting("M2 Ultra", "thunderbolt4"), [1] * RANKS)
        lines = [f"## {name}, {bits} bits\n", *_memory(first)]
        lines += ["", *_speeds(first), "", *_fewer(first), ""]
        lines += [*_cables(first, draft), "", *_where(first), ""]
        lines += _requests(model, first)
    return "\n".join(lines) + "\n"


def _setting(
    chip: str,
    link: str,
    topology: str = "",
    hop_us: float = 0.0,
    *,
    batch: int = 1,
    is_fast: bool = False,
) -> Setting:
    names = [f"studio{number}" for number in range(1, RANKS + 1)]
    crossing = hardware.CROSSING_SECONDS
    if is_fast:
        crossing = hardware.FAST_CROSSING_SECONDS
    machines = tuple(published(host, chip, MEMORY_GB, crossing) for host in names)
    kind = LINKS[link]
    if hop_us:
        kind = replace(kind, hop_seconds=hop_us / 1e6)
    network = Network(RANKS, kind, topology or kind.topology)
    return Setting(machines, network, CONTEXT, batch)


def _table(title: str, head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [title + "\n", f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def _memory(result: Plan) -> list[str]:
    lines = [
        "| rank | query heads | KV heads | MLP columns | vocabulary rows | weights, GB "
        "| KV cache, GB | working, GB | left of the limit, GB |",
        "|" + "---|" * 9,
    ]
    for need, left in zip(result.needs, result.left_bytes, strict=True):
        owned = need.owned
        assert left is not None
        cells = [
            need.rank,
            owned.query_heads[1],
            owned.kv_heads[1],
            owned.columns[1],
            owned.vocabulary_rows,
            f"{need.weights_bytes / 1e9:.2f}",
            f"{need.cache_bytes / 1e9:.3f}",
            f"{need.working_bytes / 1e9:.2f}",
            f"{left / 1e9:.2f}",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return [*lines, "", _verdict(result)]


def _verdict(result: Plan) -> str:
    one = "It fits on one host too." if result.one_fits else "It does not fit on one."
    if result.fits:
        return f"It fits on five. {one}"
    offered = "; ".join(f"{each.what} ({each.how})" for each in remedies(result))
    return f"It does not fit on five. What would do: {offered}. {one}"


def _speeds(first: Plan) -> list[str]:
    rows = []
    for chip in CHIPS:
        cells = [chip]
        for _, link, topology in CABLES:
            has_link = link != "rdma" or chip in WITH_RDMA
            result = replace(first, setting=_setting(chip, link, topology))
            times = result.decode, result.prefill
            cells.append(_both(*times) if has_link else "-")
        result = replace(first, setting=_setting(chip, "thunderbolt4"))
        one = _both(result.decode_on_one, result.prefill_on_one)
        cells += [_both(*result.pipeline), one if result.one_fits else "does not fit"]
        rows.append(cells)
    head = ["chip", *(title for title, _, _ in CABLES), "pipeline", "one host"]
    return _table("**Modelled** tokens a second, decoding / prefill:", head, rows)


def _fewer(first: Plan) -> list[str]:
    """Whether all five are faster than fewer."""
    lines = []
    for chip in COMPARED:
        for _, link, topology in CABLES[1:]:
            if link == "rdma" and chip not in WITH_RDMA:
                continue
            result = replace(first, setting=_setting(chip, link, topology))
            line = fewer_are_faster(result) or "All five are the fastest."
            name = "RDMA" if link == "rdma" else "Thunderbolt 4"
            lines.append(f"- {chip}, {name}, {topology}: {line}")
    return lines


def _cables(first: Plan, draft: PlannedModel | None) -> list[str]:
    """Ring and mesh side by side, without and with drafts, whole and in halves."""
    settings = {
        f"{chip}, {topology}, {hop_us} µs": _setting(
            chip, "thunderbolt4", topology, hop_us
        )
        for chip in COMPARED
        for hop_us in HOPS_US
        for topology in ("ring", "mesh")
    }
    settings["M2 Ultra, mesh, 300 µs, fast synch"] = _setting(
        "M2 Ultra", "thunderbolt4", "mesh", is_fast=True
    )
    settings["M4 Max, mesh, RDMA"] = _setting("M4 Max", "rdma", "mesh")
    rows = []
    for name, setting in settings.items():
        result = replace(first, setting=setting)
        cells = [name, rate(1 / result.decode.seconds)]
        for small in [draft, None] if draft else [None]:
            best = drafts(result, small, ACCEPTANCE)[0]
            how = f"{best.where}, {best.tokens}" if small else str(best.tokens)
            cells.append(f"{rate(best.tokens_per_second)} ({how})")
        cells.append(rate(CONTEXT / result.prefill.seconds))
        cells.append(rate(CONTEXT / result.prefill_in_halves.seconds))
        rows.append(cells)
    with_model = ["draft model (where, tokens)"] if draft else []
    head = ["cables, a hop", "no draft", *with_model, "n-grams (tokens)"]
    return _table(
        "**Modelled** tokens a second, ring and mesh, with drafts and in halves:",
        [*head, "prefill", "prefill in halves"],
        rows,
    )


def _requests(model: PlannedModel, first: Plan) -> list[str]:
    """What requests at once get of the server."""
    setting = _setting("M2 Ultra", "thunderbolt4", batch=REQUESTS)
    needs = tuple(setting.needs(model, first.shares))
    result = replace(first, setting=setting, needs=needs)
    lacking = "" if result.fits else f" ({REQUESTS} with full caches do not fit)"
    rows = [
        [
            str(row.requests),
            rate(row.tokens_per_second),
            rate(1 / row.gap_seconds),
            f"{1e3 * row.gap_seconds:.0f}",
            f"{1e3 * row.reading_gap_seconds:.0f}",
        ]
        for row in batches(result)
    ]
    head = ["requests", "tokens/s, all", "tokens/s, one", "ms between tokens"]
    return _table(
        f"Requests at once, M2 Ultra, ring, **modelled**{lacking}:",
        [*head, "while a prompt is read in parts"],
        rows,
    )


def _both(token: Time, prompt: Time) -> str:
    return f"{rate(1 / token.seconds)} / {rate(CONTEXT / prompt.seconds)}"


def _where(first: Plan) -> list[str]:
    sides = {
        f"{chip}, {link}": replace(first, setting=_setting(chip, link)).decode
        for chip, link in (
            ("M2 Ultra", "10gbe"),
            ("M2 Ultra", "thunderbolt4"),
            ("M4 Max", "rdma"),
        )
    }
    lines = [
        "Where the time of a token goes, **modelled** ms:\n",
        f"| | {' | '.join(sides)} |",
        "|" + "---|" * (1 + len(sides)),
    ]
    for part, label in PARTS.items():
        times = [1e3 * getattr(time, part) for time in sides.values()]
        if any(times):
            lines.append(f"| {label} | {' | '.join(f'{t:.2f}' for t in times)} |")
    totals = " | ".join(f"{1e3 * time.seconds:.2f}" for time in sides.values())
    return [*lines, f"| together | {totals} |"]


if __name__ == "__main__":
    print(page(), end="")
