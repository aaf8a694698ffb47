"""A real OpenSSH server on every host of the lab, and a client that knows them."""

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from five_hosts import HOSTS, LAB, good
from needs import program, skip_without

SSHD = program("sshd")
# Where it puts what it has to protect; Debian's service makes it, and is not started.
SEPARATION = Path("/run/sshd")

SERVER = """
Port 2222
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/{authorized}
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
LogLevel QUIET
"""
CLIENT = """
Host {names}
  HostName {host}
  HostKeyAlias {host}
  Port 2222
  IdentityFile {folder}/key
  IdentitiesOnly yes
  UserKnownHostsFile {folder}/known_hosts
  GlobalKnownHostsFile /dev/null
  StrictHostKeyChecking yes
"""


class Servers:
    """Keys and settings in a folder, and the servers that were started with them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in "key", "host_key":
            words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name]
            subprocess.run(words, check=True)
        (folder / "authorized").write_text((folder / "key.pub").read_text())
        (folder / "nobody").write_text("")
        key = (folder / "host_key.pub").read_text()
        known = "".join(f"{host} {key}" for host in HOSTS)
        (folder / "known_hosts").write_text(known)
        # Under its name in Bonjour, too, which nothing in the lab resolves.
        client = "".join(
            CLIENT.format(names=f"{host} {host}.local", host=host, folder=folder)
            for host in HOSTS
        )
        (folder / "client").write_text(client)
        for authorized in "authorized", "nobody":
            settings = SERVER.format(folder=folder, authorized=authorized)
            (folder / f"server-{authorized}").write_text(settings)
        self.ssh = f"ssh -F {folder}/client"
        self.running: list[subprocess.Popen[bytes]] = []

    def start(
        self, host: str, authorized: str = "authorized", own: Path | None = None
    ) -> None:
        """Serve on a host of the lab; at `own` it has a folder of its own."""
        line = f"exec {SSHD} -D -f {self.folder}/server-{authorized}"
        if own is not None:
            shutil.rmtree(self.own(host), ignore_errors=True)
            self.own(host).mkdir()
            line = f"mount --bind {self.own(host)} {own} && {line}"
        words = [sys.executable, LAB, "run", "--on", host, "unshare", "--mount"]
        self.running.append(subprocess.Popen([*map(str, words), "sh", "-c", line]))
        deadline = time.monotonic() + 10
        while not self.answers(host):
            assert time.monotonic() < deadline, f"no sshd on {host}"
            time.sleep(0.05)

    def own(self, host: str) -> Path:
        """Return the folder that only this host has, as this machine sees it."""
        return self.folder / host

    def answers(self, host: str) -> bool:
        """Return whether the host's server takes connections."""
        probe = f"import socket; socket.create_connection(('{host}', 2222), 1)"
        words = [sys.executable, LAB, "run", sys.executable, "-c", probe]
        done = subprocess.run(list(map(str, words)), capture_output=True)
        return done.returncode == 0

    def stop(self) -> None:
        """End all servers."""
        for server in self.running:
            server.terminate()
        for server in self.running:
            server.wait(timeout=10)
        self.running.clear()


@contextmanager
def servers(folder: Path) -> Iterator[Servers]:
    """Yield servers for the lab's hosts, of which none runs yet; skip without OpenSSH.

    The lab is brought up, as a ring at 1 ms a hop.
    """
    skip_without("sshd")
    made = not SEPARATION.exists()
    SEPARATION.mkdir(mode=0o755, exist_ok=True)
    good("up", "--delay-ms", "1")
    running = Servers(folder)
    try:
        yield running
    finally:
        running.stop()
        if made:
            SEPARATION.rmdir()


def lines(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """Return what was printed of each of the lab's hosts, in order."""
    pairs = (line.partition("  ") for line in done.stdout.splitlines())
    return {
        name: says.strip() for name, _, says in pairs if says and name[:6] == "studio"
    }
