"""launch/memory: what Macs say of their memory, on text as sysctl prints it."""

import pytest
from launch_scripts import module, script
from over_ssh import HostError

memory = module("memory")

pytestmark = pytest.mark.once

# In the format of `uname -s`, `sysctl NAME ...` and memory's own line; made up for a
# Mac of 64 GiB, not recorded on one.
AS_BOUGHT = """Darwin
hw.memsize: 68719476736
iogpu.wired_limit_mb: 0
granted: 51539607552
"""
RAISED = """Darwin
hw.memsize: 68719476736
iogpu.wired_limit_mb: 57344
granted: 60129542144
"""
NOT_INSTALLED = "Darwin\nhw.memsize: 68719476736\niogpu.wired_limit_mb: 0\n"
OLD = "Darwin\nhw.memsize: 17179869184\n"


@pytest.mark.parametrize(
    "printed, says",
    [
        (
            AS_BOUGHT,
            "68.7 GB of memory, limit left to macOS, the GPU may wire 51.5 GB",
        ),
        (
            RAISED,
            "68.7 GB of memory, limit 60.1 GB (iogpu.wired_limit_mb 57344), "
            "the GPU may wire 60.1 GB",
        ),
        (NOT_INSTALLED, "68.7 GB of memory, limit left to macOS"),
        (AS_BOUGHT.replace("51539607552", "None"), "68.7 GB of memory, limit left to"),
        (OLD, "17.2 GB of memory, no iogpu.wired_limit_mb"),
        ("Linux\n", "no Mac: the GPU has no such limit"),
    ],
)
def test_what_is_shown(printed, says):
    assert memory.describe(memory.parse(printed)).startswith(says)


def test_the_command_counts_in_macos_megabytes():
    known = memory.parse(AS_BOUGHT)
    # 58e9 / 2**20 = 55313.1: not more than was asked for.
    assert memory.command(known, 58) == "sysctl iogpu.wired_limit_mb=55313"
    assert memory.command(known, 0) == "sysctl iogpu.wired_limit_mb=0"


@pytest.mark.parametrize(
    "printed, gigabytes, says",
    [
        (AS_BOUGHT, 64.8, "of 68.7 GB at most 64.7 can be wired"),
        (OLD, 10, "no iogpu.wired_limit_mb"),
        ("Linux\n", 10, "no Mac"),
    ],
)
def test_a_limit_that_cannot_be(printed, gigabytes, says):
    with pytest.raises(HostError, match=says):
        memory.command(memory.parse(printed), gigabytes)


MAC = """#!/bin/sh
case "$(basename "$0") $*" in
"uname -s") echo Darwin ;;
"sysctl hw.memsize iogpu.wired_limit_mb")
    echo "hw.memsize: 68719476736"
    echo "iogpu.wired_limit_mb: $(cat FOLDER/limit)" ;;
"sysctl iogpu.wired_limit_mb="*)
    echo "iogpu.wired_limit_mb: $(cat FOLDER/limit) -> ${1#*=}"
    echo "${1#*=}" >FOLDER/limit ;;
*) exit 1 ;;
esac
"""


@pytest.fixture
def mac(tmp_path, monkeypatch):
    """This machine, with the tools of a Mac; the file in which it keeps its limit."""
    for name in "uname", "sysctl":
        (tmp_path / name).write_text(MAC.replace("FOLDER", str(tmp_path)))
        (tmp_path / name).chmod(0o755)
    for name, does in ("id", "echo 0"), ("sudo", "exit 1"):
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    (tmp_path / "limit").write_text("0\n")
    return tmp_path / "limit"


def test_it_is_shown_then_set_then_given_back(mac):
    shown = script("memory", "hostfiles/localhost", 58)
    assert "to do: sudo sysctl iogpu.wired_limit_mb=55313" in shown.stdout
    assert "Nothing was changed" in shown.stdout and mac.read_text() == "0\n"
    done = script("memory", "hostfiles/localhost", 58, "--apply")
    assert done.returncode == 0, done.stderr
    assert "done: 68.7 GB of memory, limit 58.0 GB" in done.stdout
    assert "launch/memory hostfiles/localhost 0 --apply" in done.stdout
    assert mac.read_text() == "55313\n"
    assert "limit 58.0 GB" in script("memory", "hostfiles/localhost").stdout
    back = script("memory", "hostfiles/localhost", 0, "--apply")
    assert "limit left to macOS" in back.stdout and mac.read_text() == "0\n"


def test_more_than_there_is_changes_nothing(mac):
    done = script("memory", "hostfiles/localhost", 90, "--apply")
    assert done.returncode == 1 and "at most 64.7 can be wired" in done.stdout
    assert mac.read_text() == "0\n"


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["58000"], "GB is 0 or from 1 to 2048, not 58000"),
        (["-3"], "GB is 0 or from 1 to 2048, not -3"),
        (["lots"], "invalid float value: 'lots'"),
        (["--apply"], "how many?"),
    ],
)
def test_wrong_input_gets_one_line(arguments, says):
    done = script("memory", "hostfiles/localhost", *arguments)
    assert done.returncode == 2
    assert says in done.stderr and done.stderr.count("\n") == 1
