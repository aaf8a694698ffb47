"""docs/studio5.md says what plan says."""

from pathlib import Path

import pytest
import studio5_page

PAGE = Path(__file__).parents[1] / "docs" / "studio5.md"


@pytest.mark.once
def test_the_page_is_made_by_plan() -> None:
    """All but the large models, which take longer."""
    found = PAGE.read_text().split("\n## ")
    wanted = studio5_page.page(studio5_page.MODELS[:2]).split("\n## ")
    hint = "make it anew: python benchmarks/studio5_page.py > docs/studio5.md"
    assert [text.strip() for text in found[:3]] == [t.strip() for t in wanted], hint
