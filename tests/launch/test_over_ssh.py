"""launch/over_ssh.py: wrong hostfiles, what is here, many hosts at once, and root."""

import os
import socket
import subprocess
import sys
import time

import pytest
from five_hosts import ROOT
from launch_scripts import script
from needs import needs
from over_ssh import HostError, on_each, run_as_root, run_on

from mlxtp.cluster.addresses import is_here

pytestmark = pytest.mark.once

# Of a network that is for documentation, where nobody is.
ELSEWHERE = "198.51.100.1"


@pytest.mark.parametrize("name", ["install", "memory", "run", "cables"])
def test_a_wrong_hostfile_is_one_line_and_status_2(name, tmp_path):
    bad = tmp_path / "bad"
    bad.write_text("one two three\n")
    more = ["true"] if name == "run" else []
    for given, says in (bad, "line 1"), (tmp_path / "none", "no hostfile"):
        done = script(name, given, *more)
        assert done.returncode == 2 and done.stdout == ""
        assert says in done.stderr and done.stderr.count("\n") == 1


def test_what_is_here(monkeypatch):
    assert is_here("localhost") and is_here("127.0.0.1")
    assert is_here(socket.gethostname())
    assert not is_here(ELSEWHERE)

    def nobody(*_, **__):
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", nobody)
    assert not is_here("known-to-ssh-alone")


@pytest.mark.parametrize("name", ["cables", "hosts", "install", "lab", "memory", "run"])
def test_nothing_has_to_be_installed(name):
    words = [sys.executable, "-E", "-S", ROOT / "launch" / name, "--help"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("usage: launch/"), done


def test_an_older_python_is_told_which():
    older = "import sys; sys.version_info = (3, 9); sys.path[:0] = ['launch']"
    words = [sys.executable, "-c", f"{older}; import over_ssh"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "needs Python 3.11 or newer: source launch/environment" in done.stderr


def test_a_failing_host_stops_no_other_and_all_go_at_once(capsys):
    def act(host):
        time.sleep(0.3)
        if host == "b":
            raise HostError("one\n\ntwo\nthree \n")
        return f"well, {host}"

    start = time.monotonic()
    assert not on_each(["a", "b", "longer"], act, most_lines=2)
    assert time.monotonic() - start < 0.8  # in turn they take 0.9
    assert capsys.readouterr().out.splitlines() == [
        "a       well, a",
        "b       FAILED: three",
        "  | two",
        "longer  well, longer",
    ]
    assert on_each(["a"], act)


def test_a_command_here_takes_no_ssh():
    assert run_on("localhost", 'cat; echo "it\'s"', ["false"], given=b"given ") == (
        "given it's\n"
    )
    with pytest.raises(HostError, match="no way"):
        run_on("localhost", "echo hm >&2; echo no way >&2; exit 3", ["false"])
    with pytest.raises(HostError, match="it ended with status 3"):
        run_on("localhost", "exit 3", [])


def test_a_host_elsewhere_is_asked_by_what_is_taken_for_ssh(tmp_path):
    agent = tmp_path / "agent"
    agent.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    agent.chmod(0o755)
    said = run_on(ELSEWHERE, "echo 'x y'", [str(agent), "-F", "f"]).splitlines()
    assert said[:4] == ["-F", "f", "-o", "BatchMode=yes"]
    assert said[-2] == ELSEWHERE
    # A login shell of any kind gives the script to sh, as it is.
    assert said[-1].startswith("exec sh -c ")
    shell = os.popen(said[-1])
    assert shell.read() == "x y\n" and shell.close() is None
    with pytest.raises(HostError, match="none-such: No such file"):
        run_on(ELSEWHERE, "true", ["/none-such"])


SUDO = """#!/bin/sh
# Lets in whoever gives the word, or anybody if a file says so.
echo "sudo $*" >>FOLDER/log
case "$1" in
-n) shift; [ -e FOLDER/free ] || { echo "sudo: a password is required" >&2; exit 1; } ;;
-S) shift 3; read -r word; [ "$word" = sesame ] || { echo "sorry" >&2; exit 1; } ;;
esac
exec "$@"
"""


@pytest.fixture
def somebody(tmp_path, monkeypatch):
    """A machine on which this is no root, and sudo may be had."""
    for name, text in ("sudo", SUDO), ("id", "#!/bin/sh\necho 501\n"):
        (tmp_path / name).write_text(text.replace("FOLDER", str(tmp_path)))
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path


def test_sudo_where_it_asks_for_nothing(somebody):
    (somebody / "free").touch()
    assert run_as_root("localhost", "echo done it", ["ssh"], None) == "done it\n"


def test_sudo_that_asks_is_a_failure_that_says_what_to_do(somebody):
    with pytest.raises(HostError, match="add --ask-password"):
        run_as_root("localhost", "touch done", ["ssh"], None)
    assert not (somebody / "done").exists()


def test_sudo_gets_the_password_and_nobody_sees_it(somebody):
    said = run_as_root("localhost", "echo done it", ["ssh"], b"sesame\n")
    assert said == "done it\n"
    assert "sesame" not in (somebody / "log").read_text()
    with pytest.raises(HostError, match="sorry"):
        run_as_root("localhost", "echo done it", ["ssh"], b"wrong\n")


@needs("root")
def test_root_takes_no_sudo(monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert run_as_root("localhost", "id -u", ["ssh"], None) == "0\n"
