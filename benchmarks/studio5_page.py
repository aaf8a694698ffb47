"""docs/studio5.md, from plan: `python benchmarks/studio5_page.py > docs/studio5.md`."""

from dataclasses import replace
from typing import Any

from models import LLAMA_3_2_1B
from wide_models import WIDE

from mlxtp.cluster.units import GIB
from mlxtp.plan import hardware
from mlxtp.plan.hardware import LINKS, Network, published
from mlxtp.plan.model import model_of_config
from mlxtp.plan.planning import Plan, Setting, plan
from mlxtp.plan.remedies import remedies
from mlxtp.plan.report import PARTS, rate
from mlxtp.plan.timing import Time

RANKS = 5
MEMORY_GB = 64
CONTEXT = 8192
# Sold with 64 GB, but for the M3 Ultra, which begins at 96.
CHIPS = ["M1 Max", "M1 Ultra", "M2 Max", "M2 Ultra", "M4 Max", "M3 Ultra"]
LINKS_OF = ["10gbe", "thunderbolt4", "rdma"]
WITH_RDMA = ["M4 Max", "M3 Ultra"]  # which have Thunderbolt 5

LLAMA_405B = WIDE["Llama 3.1 405B, 1 of 126 layers"][0] | {"num_hidden_layers": 126}
LLAMA_70B = LLAMA_405B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
MODELS = [
    ("Llama 3.2 1B", LLAMA_3_2_1B, 16),
    ("Llama 3.2 1B", LLAMA_3_2_1B, 4),
    ("Llama 3.3 70B", LLAMA_70B, 4),
    ("Llama 3.1 405B", LLAMA_405B, 4),
]

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

Assumed for all: MLX reads weights at {bandwidth:.0f} % of the memory's bandwidth,
and multiplies at {flops:.0f} % of the GPU's arithmetic; before each collective the CPU
waits {wait:.0f} µs for the GPU; a hop takes {tcp:.0f} µs over TCP (Ethernet through a
switch, Thunderbolt in a ring) and {rdma:.0f} µs over RDMA (in a ring). RDMA needs
Thunderbolt 5: of these chips the M4 Max and the M3 Ultra. The M3 Ultra is not sold with
64 GB, it begins at 96; it stands here as if it were.

In a *pipeline* each host has a fifth of the layers, and they compute one after the
other. *One host* holds the whole model, if it fits. The GPU may wire three quarters of
the memory: {limit:.2f} GB of the 64 GB, which are 64 GiB.
"""


def page(models: list[tuple[str, dict[str, Any], int]] = MODELS) -> str:
    return "\n".join([_head(), *(_of(*model) for model in models)])


def _head() -> str:
    return HEAD.format(
        context=CONTEXT,
        bandwidth=100 * hardware.BANDWIDTH_SHARE,
        flops=100 * hardware.FLOPS_SHARE,
        wait=1e6 * hardware.EVALUATION_SECONDS,
        tcp=1e6 * LINKS["thunderbolt4"].hop_seconds,
        rdma=1e6 * LINKS["rdma"].hop_seconds,
        limit=hardware.WIRED_SHARE * MEMORY_GB * GIB / 1e9,
    )


def _of(name: str, config: dict[str, Any], bits: int) -> str:
    with model_of_config(name, config, bits) as model:
        first = plan(model, _setting("M2 Ultra", "thunderbolt4"), [1] * RANKS)
        lines = [f"## {name}, {bits} bits\n", *_memory(first)]
        lines += ["", *_speeds(first), "", *_where(first)]
    return "\n".join(lines) + "\n"


def _setting(chip: str, link: str) -> Setting:
    names = [f"studio{number}" for number in range(1, RANKS + 1)]
    machines = tuple(published(host, chip, MEMORY_GB) for host in names)
    network = Network(RANKS, LINKS[link], LINKS[link].topology)
    return Setting(machines, network, CONTEXT, 1)


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
    lines = [
        "**Modelled** tokens a second, decoding / prefill:\n",
        "| chip | 10 Gb Ethernet | Thunderbolt 4 | RDMA | pipeline | one host |",
        "|" + "---|" * 6,
    ]
    for chip in CHIPS:
        cells = []
        for link in LINKS_OF:
            has_link = link != "rdma" or chip in WITH_RDMA
            result = replace(first, setting=_setting(chip, link))
            times = result.decode, result.prefill
            cells.append(_both(*times) if has_link else "-")
        result = replace(first, setting=_setting(chip, "thunderbolt4"))
        cells.append(_both(*result.pipeline))
        one = _both(result.decode_on_one, result.prefill_on_one)
        cells.append(one if result.one_fits else "does not fit")
        lines.append(f"| {chip} | {' | '.join(cells)} |")
    return lines


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
