"""How the reference shows our docstrings: `Shapes: x (B, L)` is a paragraph.

A griffe extension, named in mkdocs.yml. The sections of Google's style (`Args:` with
indented lines) are griffe's; ours are written on the line of their name.
"""

import re
from typing import Any

from griffe import Extension, Object

SECTION = re.compile(
    r"^(?P<name>Shapes|Communicates|Raises|Returns|Yields|Units|Source): +"
    r"(?P<text>\S.*(?:\n {2,}\S.*)*)",
    re.MULTILINE,
)


class Sections(Extension):
    """Set our sections as paragraphs, each with its name in bold."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring:
            obj.docstring.value = SECTION.sub(paragraph, obj.docstring.value)


def paragraph(section: re.Match[str]) -> str:
    """One section in Markdown, its lines joined."""
    text = " ".join(line.strip() for line in section["text"].splitlines())
    return f"\n**{section['name']}:** {text}\n"
