"""The pages name every room, and what they link to is there."""

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[1]
ROOMS = sorted(path.parent.name for path in ROOT.glob("mlxtp/*/__init__.py"))
# Pages that `mkdocs build --strict` does not read.
OUTSIDE = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/README.md"]


@pytest.mark.parametrize("room", ROOMS)
def test_room_has_its_place(room):
    """In README's tree, in the table of the design, and in the reference."""
    tree = (ROOT / "README.md").read_text().partition("## The tree")[2]
    assert len(re.findall(rf"^  {room}/ ", tree, re.MULTILINE)) == 1
    assert f"| `{room}/` |" in (ROOT / "docs/design.md").read_text()
    page = ROOT / "docs/reference" / f"{room}.md"
    assert f"::: mlxtp.{room}\n" in page.read_text()
    assert f"reference/{room}.md\n" in (ROOT / "mkdocs.yml").read_text()


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("page", OUTSIDE)
def test_links(page):
    """Files that a page links to exist."""
    links = re.findall(r"\]\(([^)#\s]+)", (ROOT / page).read_text())
    files = [link for link in links if "://" not in link]
    absent = [
        file for file in files if not (ROOT / page).parent.joinpath(file).exists()
    ]
    assert not absent
