"""What a forward pass raises, it raises on all ranks; then the model goes on."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from kept import kept_model
from reference import as_numpy

from mlxtp import Communicator
from mlxtp.layers.forward import change_forward
from mlxtp.loading import load_model

TOKENS = [[3, 14, 15]]


def test_all_ranks_raise_and_go_on(
    comm: Communicator, monkeypatch: pytest.MonkeyPatch
) -> None:
    agreed: list[type[BaseException]] = []
    raising_together = Communicator.raising_together

    @contextmanager
    def spied(self: Communicator) -> Iterator[None]:
        try:
            with raising_together(self):
                yield
        except ValueError as error:
            agreed.append(type(error))
            raise

    monkeypatch.setattr(Communicator, "raising_together", spied)
    model, _ = load_model(kept_model(comm, "llama-8-8"), comm)
    expected = as_numpy(model(mx.array(TOKENS)))
    wrong = True

    def raise_once(former: Any, mlp: Any, x: mx.array) -> mx.array:
        if wrong:
            raise ValueError(f"not on rank {comm.rank}")
        return former(mlp, x)

    # After an allreduce, and again: each exception is agreed on by itself.
    change_forward(model.model.layers[1].mlp, raise_once)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"not on rank {comm.rank}"):
            model(mx.array(TOKENS))
    # One rank has nobody to agree with.
    assert agreed == ([ValueError] * 2 if comm.size > 1 else [])
    wrong = False
    np.testing.assert_array_equal(as_numpy(model(mx.array(TOKENS))), expected)


def test_a_dry_run_raises_on_a_rank_alone(comm: Communicator) -> None:
    """It sends nothing, so nobody is waited for."""
    with comm.dry_run(), pytest.raises(ValueError, match="alone"):
        if comm.rank == 0:
            with comm.raising_together():
                raise ValueError("alone")
        raise ValueError("alone")
