"""docs/models.md says what the table says."""

from pathlib import Path

import models_page
import pytest

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


@pytest.mark.slow
@pytest.mark.once
def test_the_page_is_made_from_the_table() -> None:
    wanted = models_page.page()
    assert PAGE.read_text() == wanted, (
        "make it anew: python tests/support/models_page.py > docs/models.md"
    )
