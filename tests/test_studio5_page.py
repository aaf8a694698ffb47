"""docs/studio5.md says what plan says, and so does the worked token."""

import re
from pathlib import Path

import pytest
import studio5_page

from mlxtp.plan.report import PARTS

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "studio5.md"


@pytest.mark.once
def test_the_page_is_made_by_plan() -> None:
    """All but the large models, which take longer."""
    found = PAGE.read_text().split("\n## ")
    wanted = studio5_page.page(studio5_page.MODELS[:2]).split("\n## ")
    hint = "make it anew: python benchmarks/studio5_page.py > docs/studio5.md"
    assert [text.strip() for text in found[:3]] == [t.strip() for t in wanted], hint


@pytest.mark.once
def test_the_worked_token_is_that_of_the_page() -> None:
    """What docs/communication.md adds up, by its last column."""
    page = (DOCS / "communication.md").read_text().partition("## Worked")[2]
    terms = re.findall(r"^\| ([^|]+) \|.*\| ([\d.]+) \|$", page, re.MULTILINE)
    columns = PAGE.read_text().partition("## Llama 3.1 405B")[2]
    where = columns.partition("Where the time of a token goes")[2]
    rows = [line.strip("| ").split(" | ") for line in where.splitlines()]
    known = {row[0]: row[2] for row in rows if row[0] in [*PARTS.values(), "together"]}
    assert terms and dict(terms) == known
