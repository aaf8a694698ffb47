"""Every test is a program valid at any number of ranks: pytest runs on all of them."""

import io
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from _pytest.config import Config
from _pytest.terminal import TerminalReporter

from mlxtp import Communicator

WORLD = Communicator.world()


@pytest.fixture(scope="session")
def comm() -> Communicator:
    return WORLD


@pytest.fixture(scope="session")
def shared_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that is the same on all ranks."""
    return WORLD.bcast_object(tmp_path_factory.mktemp("shared"))


@pytest.hookimpl(trylast=True)
def pytest_configure(config: Config) -> None:
    """Let rank 0 report; what another rank has to say is shown if it fails."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if WORLD.rank > 0 and isinstance(reporter, TerminalReporter):
        reporter._tw._file = io.StringIO()


def pytest_unconfigure(config: Config) -> None:
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    failed = reporter is not None and reporter.stats.keys() & {"failed", "error"}
    if WORLD.rank > 0 and failed:
        print(
            f"--- rank {WORLD.rank}\n{reporter._tw._file.getvalue()}", file=sys.stderr
        )


def pytest_collection_modifyitems(config: Config, items: list[pytest.Item]) -> None:
    others = [
        item
        for item in items
        for mark in item.iter_markers("ranks")
        if WORLD.size not in mark.args
    ]
    items[:] = [item for item in items if item not in others]
    config.hook.pytest_deselected(items=others)
    once = [item for item in items if item.get_closest_marker("once")]
    if WORLD.size > 1 and once:
        items[:] = [item for item in items if item not in once]
        config.hook.pytest_deselected(items=once)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Fail a test on all ranks that has failed on one."""
    failure = None
    try:
        return (yield)
    except BaseException as error:
        failure = error
        raise
    finally:
        failed = WORLD.allgather_object(failure is not None and not _is_skip(failure))
        if any(failed) and failure is None:
            pytest.fail(f"failed on ranks {[r for r, f in enumerate(failed) if f]}")


def _is_skip(failure: BaseException) -> bool:
    return isinstance(failure, pytest.skip.Exception)
