"""Arrows between rooms go down only, as `docs/design.md` says.

A room is a folder of `mlxtp/` or a module beside them. It may import from rooms on
lower floors alone; an import within a function counts too.
"""

import grimp
import pytest

pytestmark = pytest.mark.once

# Rooms on one floor do not know each other. Command lines stand below the programs that
# share them, and what starts them by name above.
FLOORS: list[set[str]] = [
    {"partition", "cluster", "native", "stories"},
    {"comm", "families", "checkpoint"},
    {"sharding", "model", "fetch"},
    {"layers"},
    {"dryrun"},
    {"loading"},
    {"generation"},
    {"job_options"},
    {"options"},
    {"generate", "chat", "shard", "serve", "plan", "doctor"},
    {"__main__"},
]
FLOOR_OF = {name: number for number, names in enumerate(FLOORS) for name in names}

GRAPH = grimp.build_graph("mlxtp")


def room(module: str) -> str:
    """The room of a module; the package itself, lazy, is none."""
    return module.split(".")[1] if "." in module else ""


def arrows() -> set[tuple[str, str]]:
    """Every (importer, imported) of two modules in different rooms."""
    return {
        (importer, imported)
        for importer in GRAPH.modules
        for imported in GRAPH.find_modules_directly_imported_by(importer)
        if room(importer) and room(imported) and room(importer) != room(imported)
    }


def test_every_room_has_its_floor() -> None:
    rooms = {room(module) for module in GRAPH.modules} - {""}
    assert rooms <= FLOOR_OF.keys(), rooms - FLOOR_OF.keys()


def test_arrows_go_down() -> None:
    wrong = sorted(
        f"{importer} -> {imported}"
        for importer, imported in arrows()
        if FLOOR_OF[room(imported)] >= FLOOR_OF[room(importer)]
    )
    assert not wrong, "\n".join(wrong)


def test_families_are_data() -> None:
    """They import `partition` alone."""
    imported = {room(b) for a, b in arrows() if room(a) == "families"}
    assert imported == {"partition"}
