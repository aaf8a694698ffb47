"""Which tests answer a developer in minutes, and which run under --all alone."""

from collections.abc import Iterable
from typing import Any

import pytest


def sweep(
    values: Iterable[Any], quick: Iterable[Any], *marks: pytest.MarkDecorator
) -> list[Any]:
    """The parameters of a test over all of `values`; those not in `quick` are slow.

    These get `marks` too: a `ranks` mark runs them in some worlds alone.
    """
    values, quick = list(values), list(quick)
    assert all(v in values for v in quick), quick
    marks = (pytest.mark.slow, *marks)
    return [v if v in quick else pytest.param(v, marks=marks) for v in values]
