"""What a rank shows: whatever the encoding, and mistakes in one line."""

import io
import sys

import pytest

from mlxtp.comm import launcher

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
