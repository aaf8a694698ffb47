"""Every test is a program valid at any number of ranks: pytest runs on all of them."""

import faulthandler
import io
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from _pytest.config import Config
from _pytest.config.argparsing import Parser
from _pytest.terminal import TerminalReporter
from eager import over_eager
from needs import summary

from mlxtp import Communicator

# How long a test, or its set-up or its end, may take on a busy machine, and how long a
# rank may be silent or wait in one collective. The first fails the test alone, where
# Python can still act; the second ends the job. `faulthandler_timeout` comes last.
LIMIT_SECONDS = 300

WORLD = Communicator.world(timeout_seconds=LIMIT_SECONDS, on_loss="end")

# The file that launch/test looks for; runs that tests start are not meant.
ENDED = os.environ.pop("MLXTP_TESTS_ENDED", None)

# Where a whole file says so, its tests run in one process.
WHOLLY_ONCE = re.compile(
    r"^pytestmark = (\[[^]]*)?pytest\.mark\.once\b", flags=re.MULTILINE
)

# An example has no limit of its own: the machine may be busy.
if WORLD.size == 1:  # where tests of properties run
    from hypothesis import settings

    settings.register_profile("tests", deadline=None)
    settings.load_profile("tests")


@pytest.fixture(scope="session")
def comm() -> Communicator:
    """All ranks of this run."""
    return WORLD


# Under the bare name "mpi" pytest-mpi would take a test for one of its own.
@pytest.fixture(
    params=["mpi", "mpi-eager"] if WORLD.size > 1 else ["mpi"], ids="over {}".format
)
def each_mpi(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run a test twice, with the collectives of `mpi` and with those of `mpi-eager`."""
    with over_eager(WORLD) if request.param == "mpi-eager" else nullcontext():
        yield


@pytest.fixture(scope="session")
def shared_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that is the same on all ranks."""
    return WORLD.bcast_object(tmp_path_factory.mktemp("shared"))


def pytest_addoption(parser: Parser) -> None:
    """Offer --all and --passed."""
    parser.addoption("--all", action="store_true", help="run the slow tests as well")
    parser.addoption(
        "--passed",
        type=Path,
        metavar="FILE",
        help="leave out the tests that FILE names, and add those that pass",
    )


@pytest.hookimpl(trylast=True)
def pytest_configure(config: Config) -> None:
    """Let rank 0 report; what another rank has to say is shown if it fails."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if WORLD.rank > 0 and isinstance(reporter, TerminalReporter):
        reporter._tw._file = io.StringIO()
    if path := config.getoption("--passed"):
        config.pluginmanager.register(Passed(path), "passed")


def pytest_unconfigure(config: Config) -> None:
    """Show what a rank other than 0 has reported, where a test failed on it.

    And tell launch/test that it came so far: a test that ends the process, with status
    0 perhaps, would go unnoticed.
    """
    if ENDED and WORLD.rank == 0:
        Path(ENDED).touch()
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    failed = reporter is not None and reporter.stats.keys() & {"failed", "error"}
    if WORLD.rank > 0 and failed:
        print(
            f"--- rank {WORLD.rank}\n{reporter._tw._file.getvalue()}", file=sys.stderr
        )


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave files alone that have no test for several ranks: imports cost seconds."""
    if WORLD.size > 1 and collection_path.match("test_*.py"):
        return bool(WHOLLY_ONCE.search(collection_path.read_text())) or None
    return None


class Passed:
    """Leaves out what has passed on as many ranks, and writes down what passes.

    A line of the file is a number of ranks and the id of a test that has passed on each
    of them. A test that was skipped on one of them is not there.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self._before = {
            test
            for size, test in (line.split(" ", 1) for line in lines)
            if int(size) == WORLD.size
        }
        self._left_out = 0
        self._now: dict[str, bool] = {}

    def pytest_collection_modifyitems(
        self, config: Config, items: list[pytest.Item]
    ) -> None:
        """Leave out what has passed before."""
        left_out = [item for item in items if item.nodeid in self._before]
        items[:] = [item for item in items if item.nodeid not in self._before]
        config.hook.pytest_deselected(items=left_out)
        self._left_out = len(left_out)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note what passes, from its set-up to its end."""
        passed = self._now.get(report.nodeid, True) and report.passed
        self._now[report.nodeid] = passed

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Write down what has passed on all ranks, where the tests came to an end."""
        if (output := getattr(session.config, "workeroutput", None)) is not None:
            output["left_out"] = self._left_out  # the process that reports writes
            return
        if exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            return
        here = {test for test, passed in self._now.items() if passed}
        everywhere = set.intersection(*WORLD.allgather_object(here))
        if WORLD.rank == 0:
            with self._path.open("a") as file:
                file.writelines(f"{WORLD.size} {test}\n" for test in sorted(everywhere))

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Take over what a process beside others says: each has left out the same."""
        output = getattr(node, "workeroutput", {})
        self._left_out = output.get("left_out", self._left_out)

    def pytest_terminal_summary(self, terminalreporter: TerminalReporter) -> None:
        """Say how many were left out."""
        if self._left_out:
            terminalreporter.write_line(
                f"{self._left_out} tests were not run again: they have passed before."
            )


def pytest_collection_modifyitems(config: Config, items: list[pytest.Item]) -> None:
    """Leave out what is not for this number of ranks, and slow tests without --all."""

    def is_run(item: pytest.Item) -> bool:
        if item.get_closest_marker("slow") and not config.getoption("--all"):
            return False
        if item.get_closest_marker("once") and WORLD.size > 1:
            return False
        return all(WORLD.size in mark.args for mark in item.iter_markers("ranks"))

    left_out = [item for item in items if not is_run(item)]
    items[:] = [item for item in items if is_run(item)]
    config.hook.pytest_deselected(items=left_out)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: TerminalReporter) -> Iterator[None]:
    """Say last which tests this machine could not run, and what would bring them in."""
    yield
    reasons = [
        report.longrepr[2].removeprefix("Skipped: ")
        for report in terminalreporter.stats.get("skipped", [])
        if isinstance(report.longrepr, tuple)
    ]
    for line in summary(reasons):
        terminalreporter.write_line(line)


@contextmanager
def limited(item: pytest.Item) -> Iterator[None]:
    """Fail the test that is in the main thread after LIMIT_SECONDS, and go on.

    With several ranks the job ends: a rank that left a collective in the middle would
    be out of step with the others.
    """

    def fail(*_: Any) -> None:
        faulthandler.dump_traceback(file=sys.__stderr__)
        says = f"{item.nodeid} has not ended after {LIMIT_SECONDS} s"
        if WORLD.size > 1:
            os.write(2, f"rank {WORLD.rank}: {says}: all ranks end\n".encode())
            os._exit(1)
        pytest.fail(says)

    before = signal.signal(signal.SIGALRM, fail)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    """Limit the time of fixtures, and let a test begin on all ranks or on none."""
    failure = None
    try:
        with limited(item):
            return (yield)
    except BaseException as error:
        failure = error
        raise
    finally:
        begins = WORLD.allgather_object(failure is None)
        if failure is None and not all(begins):
            pytest.fail(
                f"not set up on ranks {[r for r, b in enumerate(begins) if not b]}"
            )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Iterator[None]:
    """Limit the time of what fixtures do at their end."""
    with limited(item):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Limit a test's time, and fail it on all ranks if it has failed on one."""
    failure = None
    try:
        with limited(item):
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
