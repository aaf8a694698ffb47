"""Sums made in one for two places, and forward passes changed, for each call alone."""

import inspect
from collections.abc import Callable
from threading import Thread
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlxtp import Communicator
from mlxtp.layers.forward import change_forward, twin
from mlxtp.layers.sums import JointSum, SumOverRanks, outputs_unread

pytestmark = pytest.mark.once

PLACES = ("a", "b")


class Doubling(Communicator):
    """Two ranks that have the same."""

    def __init__(self) -> None:
        super().__init__()
        self.paths: list[str] = []

    def allreduce(self, x: mx.array, at: str = "") -> mx.array:
        self.paths.append(at)
        return 2 * x


class Around(nn.Module):
    """Calls places in the order in which they are given."""

    def __call__(self, x: mx.array, calls: list[Callable[..., Any]]) -> mx.array:
        return sum((call(x) for call in calls), x)


@pytest.fixture
def comm() -> Doubling:
    return Doubling()


def joined(comm: Communicator) -> tuple[Around, list[SumOverRanks]]:
    around, joint = Around(), JointSum(comm, PLACES)
    change_forward(around, joint)
    return around, [SumOverRanks(comm, path, joint=joint) for path in PLACES]


def test_one_sum_for_both_in_any_order(comm: Doubling) -> None:
    around, (a, b) = joined(comm)
    x = mx.ones(3)
    for calls in [a, b], [b, a]:
        assert around(x, calls).tolist() == [5, 5, 5]
    assert comm.paths == ["b", "a"]


@pytest.mark.parametrize(
    ("order", "message"),
    [([0], "only a came"), ([0, 0], "a came twice"), ([1, 0, 1], "b came twice")],
)
def test_a_wrong_order_gives_no_numbers(
    comm: Doubling, order: list[int], message: str
) -> None:
    around, places = joined(comm)
    with pytest.raises(AssertionError, match=message):
        around(mx.ones(3), [places[i] for i in order])
    # It leaves nothing behind.
    assert around(mx.ones(3), places).tolist() == [5, 5, 5]


def test_a_place_is_not_called_alone(comm: Doubling) -> None:
    _, (a, _) = joined(comm)
    with pytest.raises(AssertionError, match="outside of the module"):
        a(mx.ones(3))


def test_a_call_that_was_left_is_forgotten(comm: Doubling) -> None:
    around, (a, b) = joined(comm)

    def stop(x: mx.array) -> mx.array:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        around(mx.ones(3), [a, stop])
    assert around(mx.ones(3), [a, b]).tolist() == [5, 5, 5]


def test_a_call_between_the_places_has_its_own_sum(comm: Doubling) -> None:
    """In another thread, and in this one."""
    around, (a, b) = joined(comm)
    results = []

    def other() -> None:
        results.append(around(mx.full(3, 10.0), [a, b]).tolist())

    def in_a_thread(x: mx.array) -> mx.array:
        thread = Thread(target=other)
        thread.start()
        thread.join()
        other()
        return mx.zeros_like(x)

    assert around(mx.ones(3), [a, in_a_thread, b]).tolist() == [5, 5, 5]
    assert results == [[50, 50, 50]] * 2


def test_silent_only_where_no_cache_depends_on_it(comm: Doubling) -> None:
    inner = SumOverRanks(comm, "inner")
    last = SumOverRanks(comm, "last", feeds_caches=False)
    with outputs_unread():
        assert (inner(mx.array(1)).item(), last(mx.array(1)).item()) == (2, 1)
    assert (inner(mx.array(1)).item(), last(mx.array(1)).item()) == (2, 2)


def test_a_changed_module_stays_what_it_was() -> None:
    linear, other = nn.Linear(2, 3), nn.Linear(2, 3)
    x = mx.ones((1, 2))
    whole = linear(x).tolist()
    parameters = [name for name, _ in nn.utils.tree_flatten(linear.parameters())]
    signature = inspect.signature(linear.__call__)
    for _ in range(2):  # one change upon another
        change_forward(linear, lambda former, module, x: 2 * former(module, x))
    assert linear(x).tolist() == (4 * mx.array(whole)).tolist()
    assert isinstance(linear, nn.Linear) and type(other) is nn.Linear
    assert [n for n, _ in nn.utils.tree_flatten(linear.parameters())] == parameters
    assert inspect.signature(linear.__call__) == signature


def test_a_twin_leaves_the_module_alone() -> None:
    block = nn.Sequential(nn.Linear(2, 2))
    block.scale, block.weight = 3, mx.ones(2)
    keys = set(block)
    other = twin(block, weight=mx.zeros(2), layers=[nn.Identity()])
    assert other.scale == 3 and other(mx.ones(2)).tolist() == [1, 1]
    other.scale, other.more = 4, mx.ones(1)
    assert set(block) == keys and block.scale == 3
    assert block.weight.tolist() == [1, 1] and isinstance(block.layers[0], nn.Linear)
