"""The programs of docs/examples say on all ranks what mlx-lm says on one."""

import math
import runpy
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from reference import as_numpy, on_rank_0

from mlxtp import Communicator
from mlxtp.stories import PATH

pytestmark = pytest.mark.ranks(1, 3)

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"
TEXT = "One day a girl named Mia went to the park. The dog was happy. " * 9
# bfloat16 weights: a sum in another order rounds otherwise.
TOLERANCE = 2e-2


class Example:
    """An example that has run on the ranks of the tests, and what it printed."""

    def __init__(self, comm: Communicator, capsys: Any, monkeypatch: Any) -> None:
        self._comm, self._capsys, self._monkeypatch = comm, capsys, monkeypatch

    def __call__(self, name: str, *arguments: object) -> dict[str, Any]:
        """Its variables at the end; `printed` is rank 0's lines."""
        words = [f"{name}.py", *map(str, arguments)]
        self._monkeypatch.setattr(sys, "argv", words)
        self._monkeypatch.setattr(Communicator, "world", lambda: self._comm)
        self._capsys.readouterr()
        variables = runpy.run_path(str(EXAMPLES / words[0]), run_name="__main__")
        printed = self._capsys.readouterr().out
        assert bool(printed) == (self._comm.rank == 0)
        return {**variables, "printed": self._comm.bcast_object(printed).splitlines()}


@pytest.fixture
def run(
    comm: Communicator,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Example:
    return Example(comm, capsys, monkeypatch)


def alone(compute: Any) -> Any:
    """What mlx-lm's model and tokenizer make in one process."""
    return compute(*mlx_lm.load(str(PATH)))


def test_logits(run: Example, comm: Communicator) -> None:
    def expected(model: nn.Module, tokenizer: Any) -> np.ndarray:
        return as_numpy(model(mx.array([tokenizer.encode("The dog")])))

    whole = on_rank_0(comm, lambda: alone(expected))
    variables = run("logits", "--text", "The dog")
    error = np.abs(as_numpy(variables["logits"]) - whole).max()
    assert error <= TOLERANCE * np.abs(whole).max()
    best = variables["tokenizer"].decode([int(whole[0, -1].argmax())])
    assert len(variables["printed"]) == 5
    assert variables["printed"][0].endswith(f"%  {best!r}")


def test_perplexity(run: Example, comm: Communicator, shared_path: Path) -> None:
    file = shared_path / "text"

    def expected(model: nn.Module, tokenizer: Any) -> tuple[float, int]:
        file.write_text(TEXT)
        tokens = tokenizer.encode(TEXT)
        losses = []
        for start in range(0, len(tokens) - 1, 64):
            window = tokens[start : start + 65]
            logits = as_numpy(model(mx.array([window[:-1]])))[0].astype(np.float64)
            sums = np.log(np.exp(logits).sum(axis=-1))
            losses += [*(sums - logits[np.arange(len(sums)), window[1:]])]
        return math.exp(np.mean(losses)), len(losses)

    perplexity, count = on_rank_0(comm, lambda: alone(expected))
    assert count > 100 and count % 64, "several windows, the last one shorter"
    variables = run("perplexity", file, "--length", "64")
    assert variables["perplexity"] == pytest.approx(perplexity, rel=TOLERANCE)
    assert variables["printed"] == [
        f"perplexity {variables['perplexity']:.4f} over {count} tokens"
    ]


def test_hidden_states(run: Example, comm: Communicator) -> None:
    def expected(model: nn.Module, tokenizer: Any) -> list[np.ndarray]:
        states = []

        class Recorded:
            """A layer of which the output is written down."""

            def __init__(self, layer: nn.Module) -> None:
                self.layer = layer

            def __getattr__(self, name: str) -> Any:
                return getattr(self.layer, name)

            def __call__(self, x: mx.array, *args: Any, **options: Any) -> mx.array:
                states.append(self.layer(x, *args, **options))
                return states[-1]

        model.model.layers = [Recorded(layer) for layer in model.layers]
        model(mx.array([tokenizer.encode("The dog was happy.")]))
        return [as_numpy(state) for state in states]

    whole = on_rank_0(comm, lambda: alone(expected))
    variables = run("hidden_states", "--text", "The dog was happy.")
    for state, wanted in zip(variables["states"][1:], whole, strict=True):
        error = np.abs(as_numpy(state) - wanted).max()
        assert error <= TOLERANCE * np.abs(wanted).max()
    assert len(variables["printed"]) == 1 + len(whole)


def test_batch(run: Example, comm: Communicator) -> None:
    prompts = ["The dog", "One day a girl named Mia"]

    def expected(model: nn.Module, tokenizer: Any) -> list[list[int]]:
        encoded = [tokenizer.encode(prompt) for prompt in prompts]
        return mlx_lm.batch_generate(
            model, tokenizer, encoded, max_tokens=12, return_token_ids=True
        ).token_ids

    tokens = on_rank_0(comm, lambda: alone(expected))
    variables = run("batch", "--max-tokens", "12", *prompts)
    assert variables["response"].token_ids == tokens
    assert variables["printed"][0].startswith("The dog|")


def test_allreduce(run: Example, comm: Communicator) -> None:
    variables = run("allreduce", "--calls", "2")
    assert all(median > 0 for median in variables["medians"].values())
    assert sum(line.endswith("GB/s") for line in variables["printed"]) == 4
