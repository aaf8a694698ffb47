"""Which tests answer a developer in minutes, and which run under --all alone."""

from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def sweep(
    values: Iterable[Any], quick: Iterable[Any], worlds: Sequence[int] = ()
) -> list[Any]:
    """The parameters of a test over all of `values`; those not in `quick` are slow.

    And they run in `worlds` of so many ranks alone, where these are given.
    """
    values, quick = list(values), list(quick)
    assert all(v in values for v in quick), quick
    marks = [pytest.mark.slow, *([pytest.mark.ranks(*worlds)] if worlds else [])]
    return [v if v in quick else pytest.param(v, marks=marks) for v in values]
