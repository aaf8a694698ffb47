"""Which tests answer a developer in minutes, and which run under --all alone."""

from collections.abc import Iterable
from typing import Any

import pytest


def sweep(values: Iterable[Any], quick: Iterable[Any]) -> list[Any]:
    """The parameters of a test over all of `values`; those not in `quick` are slow."""
    values, quick = list(values), list(quick)
    assert all(v in values for v in quick), quick
    return [
        v if v in quick else pytest.param(v, marks=pytest.mark.slow) for v in values
    ]
