"""`mlxtp.generate` gives mlx-lm's text, and shows it on rank 0 alone."""

from pathlib import Path

import mlx_lm
import pytest
from reference import MODELS, on_rank_0
from tiny import made_by_rank_0

import mlxtp
from mlxtp import Communicator

PROMPT = "abcdef"


@pytest.mark.parametrize("max_tokens", [1, 12])
def test_equals_mlx_lm(
    max_tokens: int,
    comm: Communicator,
    shared_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = made_by_rank_0(MODELS["llama-8-8"], shared_path / "llama-8-8", comm)
    options = {"max_tokens": max_tokens, "prefill_step_size": 2}
    expected = on_rank_0(
        comm, lambda: mlx_lm.generate(*mlx_lm.load(str(folder)), PROMPT, **options)
    )
    model, tokenizer = mlxtp.load(folder, comm)
    assert mlxtp.generate(model, tokenizer, PROMPT, **options) == expected
    assert not capsys.readouterr().out
    mlxtp.generate(model, tokenizer, PROMPT, verbose=True, **options)
    shown = capsys.readouterr().out
    if comm.rank > 0:
        assert not shown
        return
    assert shown.startswith(expected + "\nPrompt: 6 tokens, ")
    assert f"Generation: {max_tokens} tokens, " in shown
    assert "Peak memory: " in shown
