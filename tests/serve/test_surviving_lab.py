"""Hosts of the lab are lost while a server with a true model answers."""

import json
import sys

import pytest
from five_hosts import HOSTFILE, ROOT, good
from five_hosts import the_lab_can_be_built as the_lab_can_be_built

pytestmark = [pytest.mark.lab, pytest.mark.once, pytest.mark.slow]

SURVIVE = ROOT / "benchmarks" / "survive.py"


@pytest.fixture(scope="module", autouse=True)
def ring(the_lab_can_be_built: None) -> None:
    good("up", "--delay-ms", "1")


@pytest.mark.parametrize("part", ["1/2", "2/2"])
def test_every_answer_is_the_one_that_nobody_disturbed(part: str) -> None:
    """Whatever is lost, and whenever; and then all hosts take part again."""
    command = [sys.executable, SURVIVE, "--hostfile", HOSTFILE, "--each", part]
    said = good("run", *command, timeout=600)
    seen = json.loads(said.splitlines()[-1])
    assert seen["lost"] == 0 and seen["of these without a tie"] == 0, said
    assert seen["of these too many"] == 0, said
    assert seen["ended right"] > 12 and seen["status at the end"] == 0
