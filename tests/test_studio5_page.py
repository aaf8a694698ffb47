"""docs/studio5.md says what plan says."""

from pathlib import Path

import pytest
import studio5_page

PAGE = Path(__file__).parents[1] / "docs" / "studio5.md"


@pytest.mark.once
def test_the_page_is_made_by_plan() -> None:
    assert PAGE.read_text() == studio5_page.page(), (
        "make it anew: python benchmarks/studio5_page.py > docs/studio5.md"
    )
