"""What mlxtp.plan models of a token's time, beside what mlxtp.generate takes.

In the lab (root on Linux): for each topology, hop and number of hosts doctor measures
the cluster, plan models a token of two models from that, and generate runs them. The
models are the one that ships, and one with random weights and a wider hidden vector.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import mlx.core as mx
from models import LLAMA_3_2_1B, make

from mlxtp.stories import PATH as STORIES

T = TypeVar("T")

ROOT = Path(__file__).parent.parent
LAB = ROOT / "launch" / "lab"
DOCTOR_SECONDS = 180
GENERATE_SECONDS = 180

# Weights of 19 MB, so that reading them counts, and parts of 4 KiB.
WIDE: dict[str, Any] = {
    **LLAMA_3_2_1B,
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 32,
    "vocab_size": 1024,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--topologies", nargs="*", default=["ring", "switch"])
    parser.add_argument("--hop-ms", nargs="*", type=float, default=[0.5, 1, 2])
    parser.add_argument("--hosts", nargs="*", type=int, default=[2, 3, 4, 5])
    parser.add_argument("--max-tokens", type=int, default=40)
    parser.add_argument("--turns", type=int, default=1, help="the median counts")
    parser.add_argument("--keep", type=Path, help="a folder for what doctor writes")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        models = {
            "shipped": STORIES,
            "wide": make(folder / "wide", WIDE, mx.bfloat16),
        }
        for topology in args.topologies:
            for hop_ms in args.hop_ms:
                for hosts in args.hosts:
                    rows += on_cluster(args, topology, hop_ms, hosts, models, folder)
    ratios = [row["ratio"] for row in rows]
    errors = [abs(ratio - 1) for ratio in ratios]
    print(
        f"\nmodelled / measured: median {median(ratios):.3f}, "
        f"{min(ratios):.3f} to {max(ratios):.3f}; "
        f"off by {100 * median(errors):.1f} % in the median"
    )
    print(json.dumps({"rows": rows, "median_error": median(errors)}))


def on_cluster(
    args: argparse.Namespace,
    topology: str,
    hop_ms: float,
    hosts: int,
    models: dict[str, Path],
    folder: Path,
) -> list[dict[str, Any]]:
    """Measure a cluster, and model and run each model on it."""
    hostfile = folder / f"studio{hosts}"
    names = [f"studio{number} slots=1\n" for number in range(1, hosts + 1)]
    hostfile.write_text("".join(names))
    measured = (args.keep or folder) / f"{topology}-{hop_ms:g}-{hosts}.json"
    lab("up", "--topology", topology, "--delay-ms", hop_ms, "--hosts", hosts)
    try:
        start = ["run", "mpirun", "-hostfile", hostfile, "python", "-m"]
        again(lambda: examine(start, measured))
        rows = []
        for name, model in models.items():
            modelled = model_of(model, measured, topology)
            runs = [
                again(lambda model=model: generated(start, model, args.max_tokens))
                for _ in range(args.turns)
            ]
            speeds = [run["generation_tokens_per_second"] for run in runs]
            row = {
                "topology": topology,
                "hop_ms": hop_ms,
                "hosts": hosts,
                "model": name,
                "modelled_ms": 1e3 * sum(modelled.values()),
                "measured_ms": median(1e3 / speed for speed in speeds),
                "in_collectives": median(run["collectives_share"] for run in runs),
                "parts_ms": {
                    part: 1e3 * time for part, time in modelled.items() if time
                },
            }
            row["ratio"] = row["modelled_ms"] / row["measured_ms"]
            print(
                f"{topology:6} {hop_ms:3g} ms {hosts} hosts {name:8} modelled "
                f"{row['modelled_ms']:7.2f} ms a token, measured "
                f"{row['measured_ms']:7.2f}: {row['ratio']:.2f}",
                flush=True,
            )
            rows.append(row)
        return rows
    finally:
        lab("down")


def again(job: Callable[[], T]) -> T:
    """Do a job of mpirun once more if it fails, as one does now and then."""
    try:
        return job()
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        print(f"once more, for: {error}", file=sys.stderr)
        return job()


def examine(start: list[Any], measured: Path) -> None:
    """Let doctor write `measured`, whether it finds faults or not."""
    measured.unlink(missing_ok=True)
    doctor = [*start, "mlxtp.doctor", "--dtype", "bfloat16", "--json", measured]
    said = run(*doctor, timeout=DOCTOR_SECONDS)
    if not measured.exists():
        raise RuntimeError(said.stdout + said.stderr)


def model_of(model: Path, measured: Path, topology: str) -> dict[str, float]:
    """Modelled seconds of a token, by what they go to."""
    options = ["--model", model, "--measured", measured, "--topology", topology]
    words = [sys.executable, "-m", "mlxtp.plan", *options, "--context", 256, "--json"]
    said = subprocess.run(
        [str(word) for word in words], cwd=ROOT, check=True, stdout=subprocess.PIPE
    )
    seconds: dict[str, float] = json.loads(said.stdout)["modelled"]["this plan"][
        "seconds_a_token"
    ]
    return seconds


def generated(start: list[Any], model: Path, max_tokens: int) -> dict[str, Any]:
    """What generate reports."""
    options = ["--max-tokens", max_tokens, "--temp", 0, "--json"]
    words = [*start, "mlxtp.generate", "--model", model, "--prompt", "a", *options]
    said = run(*words, timeout=GENERATE_SECONDS)
    if said.returncode != 0:
        raise RuntimeError(said.stdout + said.stderr)
    report: dict[str, Any] = json.loads(said.stdout.strip().splitlines()[-1])
    if report["generation_tokens"] < max_tokens // 2:
        raise RuntimeError(f"{model} ended after {report['generation_tokens']} tokens")
    return report


def lab(*words: Any) -> None:
    done = run(*words, timeout=60)
    if done.returncode != 0:
        raise RuntimeError(done.stdout + done.stderr)


def run(*words: Any, timeout: float) -> subprocess.CompletedProcess[str]:
    """Run launch/lab with this Python's programs first in PATH."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        [sys.executable, str(LAB), *map(str, words)],
        capture_output=True,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=timeout,
        env={**os.environ, "PATH": path},
    )


if __name__ == "__main__":
    main()
