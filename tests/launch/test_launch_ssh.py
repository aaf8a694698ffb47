"""launch/hosts, memory, cables and run with true ssh, on the hosts of the lab."""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from five_hosts import HOSTFILE, HOSTS, LAB, ROOT, good, in_namespaces, lab
from five_hosts import the_lab_can_be_built as the_lab_can_be_built
from ssh_hosts import Servers, lines, servers

from mlxtp.cluster import hostfile

pytestmark = [pytest.mark.lab, pytest.mark.once]

# What each host starts of these is in this folder, as on a cluster.
OWN = ROOT / ".venv" / "bin"

# Says by Bonjour that this host offers ssh, until it is ended.
BONJOUR = """
import socket, time
from zeroconf import ServiceInfo, Zeroconf
host, kind = socket.gethostname(), "_ssh._tcp.local."
info = ServiceInfo(kind, f"{host}.{kind}", port=22, server=f"{host}.local.",
                   parsed_addresses=[f"10.90.0.{host[-1]}"])
Zeroconf(interfaces=[f"10.90.0.{host[-1]}"]).register_service(info)
print("registered", flush=True)
time.sleep(100)
"""


@pytest.fixture(scope="module", autouse=True)
def ring(the_lab_can_be_built):
    good("up", "--delay-ms", "1")


@pytest.fixture(scope="module")
def ssh(ring, tmp_path_factory):
    with servers(tmp_path_factory.mktemp("ssh")) as running:
        for host in HOSTS[1:]:
            running.start(host)
        yield running


def launch(ssh: Servers, name: str, *arguments: object, **env: str):
    words = [sys.executable, str(ROOT / "launch" / name), "--ssh", ssh.ssh]
    return lab("run", *words, *map(str, arguments), **env)


def test_who_lets_us_in(ssh):
    done = launch(ssh, "hosts", *HOSTS)
    assert done.returncode == 0, done.stdout + done.stderr
    user = subprocess.run(["id", "-un"], capture_output=True, text=True).stdout.strip()
    says = lines(done)
    assert list(says) == HOSTS
    assert says["studio1"].startswith("this machine: Linux")
    assert all(says[host].startswith(f"lets {user} in: Linux") for host in HOSTS[1:])


def test_who_does_not(ssh, tmp_path):
    """A host of each kind, and the hostfile is written all the same."""
    broken = Servers(tmp_path)
    (tmp_path / "known_hosts").write_text("")
    target = tmp_path / "written"
    unknown = launch(broken, "hosts", "studio2")
    assert unknown.returncode == 1
    assert "Host key verification failed" in lines(unknown)["studio2"]
    assert "its host key is not known here" in unknown.stdout

    key = ssh.folder / "host_key.pub"
    (tmp_path / "known_hosts").write_text(f"studio2 {key.read_text()}")
    words = ["studio2", "studio9", "--write", target]
    done = launch(broken, "hosts", *words)
    assert done.returncode == 1
    assert "Permission denied" in lines(done)["studio2"]
    assert "    ssh-copy-id studio2 " in done.stdout
    assert "Could not resolve hostname studio9" in lines(done)["studio9"]
    assert list(hostfile.read(target)) == ["studio2", "studio9"]


def test_found_by_bonjour_and_written(ssh, tmp_path):
    where = ["studio3", "studio1", "studio2"]
    command = [sys.executable, LAB, "run", "--on"]
    offers = [
        subprocess.Popen(
            [*map(str, command), host, sys.executable, "-c", BONJOUR],
            stdout=subprocess.PIPE,
            text=True,
        )
        for host in where
    ]
    try:
        for process in offers:
            assert process.stdout.readline() == "registered\n"
        target = tmp_path / "found"
        done = launch(ssh, "hosts", "--write", target)
    finally:
        for process in offers:
            process.kill()
            process.communicate()
    assert done.returncode == 0, done.stdout + done.stderr
    names = ["studio1.local", "studio2.local", "studio3.local"]
    assert list(lines(done)) == names
    assert list(hostfile.read(target)) == names


def test_memory_of_hosts_that_are_no_macs(ssh):
    done = launch(ssh, "memory", HOSTFILE)
    assert done.returncode == 0
    assert set(lines(done).values()) == {"no Mac: the GPU has no such limit"}
    done = launch(ssh, "memory", HOSTFILE, 50, "--apply")
    assert done.returncode == 1 and len(lines(done)) == 5
    assert "FAILED: no Mac" in done.stdout


@pytest.fixture
def environment():
    if not (OWN / "mpirun").exists():
        pytest.skip("RUN NOT TESTED: it needs .venv: source launch/environment test")


def routes(host):
    words = ["ip", "-n", host, "-json", "route"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    known = json.loads(done.stdout)
    return [route for route in known if route["dst"].startswith("10.89")]


@pytest.mark.slow
def test_a_ring_is_undone_and_made_over_a_hostfile(ssh, environment):
    before = {host: routes(host) for host in HOSTS}
    assert all(len(known) == 4 for known in before.values())
    shown = launch(ssh, "cables", HOSTFILE, "--undo")
    assert shown.returncode == 0 and "# on studio5\n" in shown.stdout
    assert shown.stdout.count("ip route del 10.89.0.") == 20
    assert {host: routes(host) for host in HOSTS} == before
    done = launch(ssh, "cables", HOSTFILE, "--undo", "--apply")
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(lines(done).values()) == {"undone"}
    assert [routes(host) for host in HOSTS] == [[]] * 5
    for host in HOSTS:  # as on a Mac, where ports are on while a cable is in
        for port in "tb0", "tb1":
            good("run", "--on", host, "ip", "link", "set", port, "up")
    done = launch(ssh, "cables", HOSTFILE, "--apply")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\nCables: a ring.\n" in done.stdout
    assert lines(done) == {host: f"has 10.89.0.{host[-1]}" for host in HOSTS}
    assert "launch/cables" in done.stdout and "--undo --apply" in done.stdout
    assert {host: routes(host) for host in HOSTS} == before


# Programs that end at once are lost sight of by mpirun 5.0.11, now and then.
SAYS = "sleep 0.5; echo $(hostname) $(pwd) $HF_HOME $OMPI_MCA_btl_tcp_if_include"


def test_a_command_runs_on_every_host(ssh, environment):
    done = launch(ssh, "run", HOSTFILE, "--", "sh", "-c", SAYS, HF_HOME="/a b")
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [
        f"{host} {ROOT} /a b 10.89.0.0/24" for host in HOSTS
    ]
    (line,) = (said for said in done.stderr.splitlines() if "bin/mpirun" in said)
    typed = shlex.split(line)
    assert typed[0] == f"{OWN}/mpirun" and typed[-3:] == ["sh", "-c", SAYS]
    assert f"{ssh.ssh} -o BatchMode=yes -o ConnectTimeout=5" in typed


def test_the_status_is_that_of_the_command(ssh, environment):
    done = launch(ssh, "run", HOSTFILE, "sh", "-c", "sleep 0.5; exit 3")
    assert done.returncode == 3


@pytest.mark.slow
def test_the_main_job_over_ssh(ssh, environment):
    job = ["python", "-m", "mlxtp.generate", "--max-tokens", "8", "--verbose"]
    done = launch(ssh, "run", HOSTFILE, "--", *job)
    assert done.returncode == 0, done.stderr
    assert "5 ranks over MPI, in MLX's graph" in done.stdout
    assert "Generation: 8 tokens" in done.stdout


@pytest.mark.slow
def test_ending_it_ends_the_ranks(ssh, environment):
    def ranks():
        pids = []
        for pid in in_namespaces():
            path = Path(f"/proc/{pid}/cmdline")
            if path.exists() and "sleep\x001234" in path.read_text():
                pids.append(pid)
        return pids

    words = [sys.executable, LAB, "run", ROOT / "launch" / "run", "--ssh", ssh.ssh]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    job = subprocess.Popen(
        [*map(str, words), str(HOSTFILE), "sleep", "1234"],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PATH": path},
        cwd=ROOT,
    )
    deadline = time.monotonic() + 15
    while len(ranks()) < 5:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    job.terminate()
    job.wait(timeout=15)
    while ranks():
        assert time.monotonic() < deadline + 15
        time.sleep(0.1)


def test_this_machine_alone(environment):
    """Without any ssh, from the lab's first host."""
    good("up", "--delay-ms", "1")
    command = ["-n", "2", "hostfiles/localhost", "sh", "-c", "sleep 0.5; hostname"]
    assert good("run", "launch/run", *command) == "studio1\nstudio1\n"
