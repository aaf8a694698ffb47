"""launch/hosts, install and run: what they decide before any host is asked."""

import os
import shlex
import subprocess
from pathlib import Path

import over_ssh
import pytest
from five_hosts import ROOT
from launch_scripts import module, script
from zeroconf import ServiceInfo, Zeroconf

from mlxtp.cluster import hostfile, job

hosts = module("hosts")
install = module("install")
run = module("run")

pytestmark = pytest.mark.once

ELSEWHERE = "198.51.100.1"  # of a network for documentation


def test_who_offers_ssh_by_bonjour_is_found():
    service = ServiceInfo(
        hosts.SERVICE,
        f"Studio 9.{hosts.SERVICE}",
        parsed_addresses=["127.0.0.1"],
        port=22,
        server="studio9.local.",
    )
    bonjour = Zeroconf(interfaces=["127.0.0.1"])
    try:
        bonjour.register_service(service)
        assert hosts.offered(hosts.SECONDS, ["127.0.0.1"]) == ["studio9.local"]
    finally:
        bonjour.close()


def test_this_machine_comes_first_then_numbers_count(monkeypatch):
    monkeypatch.setattr(hosts, "is_here", lambda host: host == "studio3.local")
    names = {f"studio{k}.local" for k in (10, 2, 3, 1)} | {"mini.local"}
    assert hosts.in_order(names) == [
        *("studio3.local", "mini.local", "studio1.local"),
        *("studio2.local", "studio10.local"),
    ]


def test_what_is_written_is_a_hostfile():
    names = ["studio2.local", "studio1.local"]
    text = hosts.hostfile(names)
    assert hostfile.parse(text, "it") == dict.fromkeys(names, 1)
    assert "studio2.local slots=1\nstudio1.local slots=1\n" in text
    assert text.startswith("# ") and max(map(len, text.splitlines())) <= 88


@pytest.mark.parametrize(
    "said, says",
    [
        ("a@s: Permission denied (publickey,password).", "ssh-copy-id s"),
        ("No ED25519 host key\nHost key verification failed.", "ssh s    # once"),
        (
            "@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\n"
            "Host key verification failed.",
            "ssh-keygen -R s",
        ),
        ("ssh: connect to host s port 22: Connection refused", "Remote Login"),
        ("ssh: connect to host s port 22: Operation timed out", "wake it"),
        ("ssh: connect to host s port 22: No route to host", "wake it"),
        ("ssh: Could not resolve hostname s: nodename nor", "nobody knows that name"),
        ("kex_exchange_identification: read: reset", "see what ssh -v s says"),
    ],
)
def test_each_of_sshs_refusals_has_a_remedy(said, says):
    assert says in hosts.remedy("s", over_ssh.HostError(said))


def test_a_hostfile_that_is_there_stays(tmp_path):
    target = tmp_path / "mine"
    target.write_text("mine")
    done = script("hosts", "localhost", "--write", target)
    assert done.returncode == 2 and "--force" in done.stderr
    assert target.read_text() == "mine"
    done = script("hosts", "localhost", "--write", target, "--force")
    assert done.returncode == 0 and done.stdout.startswith("localhost  this machine: ")
    assert hostfile.read(target) == {"localhost": 1}


def test_without_zeroconf_the_names_are_to_be_given(monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "zeroconf", None)
    with pytest.raises(SystemExit) as ended:
        hosts.main([])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1
    assert "source launch/environment cluster, or name the hosts" in said


def test_what_is_no_name():
    done = script("hosts", "--", "-oProxyCommand=reboot")
    assert done.returncode == 2 and "is no name of a host" in done.stderr


def words(monkeypatch, *arguments, names=("localhost",), cables=False, **env):
    """What launch/run would type, as root does not."""
    monkeypatch.setattr(os, "environ", env)
    monkeypatch.setattr(os, "geteuid", lambda: 501)
    monkeypatch.setattr(job, "ring_address", lambda: "10.89.0.1" if cables else None)
    typed = []
    monkeypatch.setattr(os, "execv", lambda _, words: typed.extend(words))
    monkeypatch.setattr(hostfile, "read", lambda _: dict.fromkeys(names, 1))
    run.main([*arguments[:-1], "hostfiles/localhost", *arguments[-1].split()])
    return shlex.join(typed).replace(str(ROOT), "ROOT")


HERE = (
    "ROOT/.venv/bin/mpirun --prefix ROOT/.venv -hostfile hostfiles/localhost "
    "--map-by slot:oversubscribe --bind-to none"
)


def test_on_this_machine_alone(monkeypatch):
    line = words(monkeypatch, "-- python -m mlxtp.generate --seed 1", cables=True)
    assert line == f"{HERE} ROOT/.venv/bin/python -m mlxtp.generate --seed 1"
    line = words(monkeypatch, "-n", "3", "hostname -s")
    assert line == HERE.replace("--map", "-n 3 --map") + " hostname -s"


def test_on_other_machines_ssh_asks_for_nothing(monkeypatch):
    agent = "-o BatchMode=yes -o ConnectTimeout=5'"
    line = words(monkeypatch, "true", names=[ELSEWHERE])
    assert line == f"{HERE} --prtemca plm_ssh_agent 'ssh {agent} true"
    line = words(monkeypatch, "--ssh", "ssh -F f", "true", names=[ELSEWHERE])
    assert f"--prtemca plm_ssh_agent 'ssh -F f {agent} true" in line


def test_the_cables_are_named_where_they_are(monkeypatch):
    network = "--mca btl_tcp_if_include 10.89.0.0/24 true"
    assert network in words(monkeypatch, "true", names=[ELSEWHERE], cables=True)
    env = {"OMPI_MCA_btl_tcp_if_include": "en0", "PRTE_MCA_plm_ssh_agent": "other"}
    line = words(monkeypatch, "true", names=[ELSEWHERE], cables=True, **env)
    assert line == f"{HERE} true"


def test_a_prompt_from_standard_input_goes_along(monkeypatch):
    monkeypatch.setattr(job, "_keep_input", lambda: 7)
    line = words(monkeypatch, "-- python -m mlxtp.generate --prompt -")
    program = "ROOT/.venv/bin/python -m mlxtp.generate --prompt -"
    assert line == f"{HERE} -x MLXTP_INPUT_BYTES {program}"
    assert os.environ["MLXTP_INPUT_BYTES"] == "7"


def test_what_concerns_a_rank_goes_along_and_no_value_is_shown(monkeypatch):
    env = {"HF_TOKEN": "secret", "HOME": "/x", "MLX_METAL_FAST_SYNCH": "1"}
    line = words(monkeypatch, "true", **env)
    assert line == f"{HERE} -x HF_TOKEN -x MLX_METAL_FAST_SYNCH true"


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["hostfiles/localhost"], "run what?"),
        (["hostfiles/localhost", "--"], "run what?"),
        (
            ["-n", "0", "hostfiles/localhost", "true"],
            "the number of ranks is 0: wanted 1 or more",
        ),
    ],
)
def test_wrong_input_gets_one_line(arguments, says):
    done = script("run", *arguments)
    assert done.returncode == 2
    assert says in done.stderr and done.stderr.count("\n") == 1


def test_the_files_are_those_that_git_knows() -> None:
    git = ["git", "-C", str(ROOT), "ls-files"]
    done = subprocess.run(git, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip("this is no checkout of git")
    names = install.files_under(ROOT)
    assert {name for name in done.stdout.splitlines() if (ROOT / name).exists()} == {
        *names
    }
    assert "launch/environment" in names and "mlxtp/generate.py" in names


def test_without_git_what_is_hidden_stays_here(tmp_path: Path) -> None:
    for name in ".venv/x", "mlxtp/__pycache__/y", "mlxtp/a.py", "b", ".git/z":
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert install.files_under(tmp_path) == ["b", "mlxtp/a.py"]
