"""A second opinion: Llama as transformers computes it, with PyTorch.

Needs the extra `reference` of pyproject.toml; without it these tests are skipped.
"""

import mlx.core as mx
import numpy as np
import pytest
from kept import kept_model
from needs import missing
from reference import PROMPT, STEPS, as_numpy, greedy, on_rank_0

import mlxtp
from mlxtp import Communicator

if reason := missing("torch"):
    pytest.skip(reason, allow_module_level=True)
import torch


@pytest.mark.parametrize("name", ["llama-8-2-biases", "llama-14-2-rope", "qwen2-14-2"])
def test_equals_transformers(name: str, comm: Communicator) -> None:
    folder = kept_model(comm, name)

    def reference() -> tuple[np.ndarray, list[int]]:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        prompt = torch.tensor([PROMPT])
        with torch.no_grad():
            logits = model(prompt).logits.numpy()
            generated = model.generate(
                prompt, max_new_tokens=STEPS, do_sample=False, eos_token_id=None
            )
        return logits, generated[0, len(PROMPT) :].tolist()

    logits, expected = on_rank_0(comm, reference)
    model, _ = mlxtp.load(folder, comm)
    error = np.abs(as_numpy(model(mx.array([PROMPT]))) - logits).max()
    # Two libraries order and round the same float32 arithmetic in their own way.
    assert error <= 1e-4 * np.abs(logits).max()
    assert greedy(model) == expected
