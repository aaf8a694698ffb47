"""A plan as a picture: memory of each rank, and where the time of a token goes."""

from pathlib import Path

from mlxtp.plan.planning import Plan
from mlxtp.plan.report import PARTS


def plot(plan: Plan, file: Path) -> None:
    """Draw `plan` into `file`, in the format that its ending names.

    Raises: ValueError without matplotlib, or if it does not know the format.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError(
            "--plot needs matplotlib: pip install 'matplotlib>=3.8,<4'"
        ) from None
    figure = Figure(figsize=(10, 4), layout="constrained")
    memory, time = figure.subplots(1, 2)
    ranks = [str(need.rank) for need in plan.needs]
    bottom = [0.0] * len(ranks)
    for name in ("weights", "cache", "working"):
        gb = [getattr(need, f"{name}_bytes") / 1e9 for need in plan.needs]
        memory.bar(ranks, gb, bottom=bottom, label=name)
        bottom = [below + more for below, more in zip(bottom, gb, strict=True)]
    for position, machine in enumerate(plan.setting.machines):
        if machine.limit_bytes is not None:
            gb_limit = machine.limit_bytes / 1e9
            memory.hlines(gb_limit, position - 0.45, position + 0.45, colors="black")
    memory.set(xlabel="rank", ylabel="GB (line: the GPU's limit)", title="memory")
    memory.legend()
    times = {"this plan": plan.decode}
    if len(ranks) > 1:
        times["pipeline"] = plan.pipeline[0]
    left = [0.0] * len(times)
    for part, label in PARTS.items():
        ms = [1e3 * getattr(each, part) for each in times.values()]
        if any(ms):
            time.barh(list(times), ms, left=left, label=label)
            left = [before + more for before, more in zip(left, ms, strict=True)]
    time.set(xlabel="ms a token, modelled", title="time of a token, modelled")
    time.legend()
    try:
        figure.savefig(file)
    except (ValueError, OSError) as error:
        raise ValueError(f"--plot {file}: {error}") from None
