"""What a rank shows: whatever the encoding, and mistakes in one line."""

import io
import sys

import pytest

from mlxtp.comm import launcher
from mlxtp.comm.errors import UsageError

pytestmark = pytest.mark.once


def test_what_the_encoding_lacks_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, "ascii"))
    launcher.replace_unprintable()
    print("f\u00fcr \u2264 2 \udcff", flush=True)
    assert shown.getvalue() == b"f?r ? 2 ?\n"


def test_a_mistake_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for variable in (*launcher.RANKS, *launcher.SIZES):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(SystemExit) as ended:
        launcher.refuse("a.program", ValueError("first\r\n  second\n"))
    assert ended.value.code == 2
    assert capsys.readouterr() == ("", "a.program: error: first second\n")


def test_the_length_of_input_is_asked_for_under_mpirun_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without it the variable is that of another program."""
    for variable in launcher.SIZES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("MLXTP_INPUT_BYTES", "3")
    assert launcher.input_bytes() is None
    monkeypatch.setenv(launcher.SIZES[0], "2")
    assert launcher.input_bytes() == 3
    monkeypatch.setenv("MLXTP_INPUT_BYTES", "-3x")
    with pytest.raises(UsageError, match="MLXTP_INPUT_BYTES is '-3x': wanted a number"):
        launcher.input_bytes()
