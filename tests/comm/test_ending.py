"""What SIGTERM does to a process with a heartbeat, and to its children."""

import os
import select
import signal
import subprocess
import sys

import pytest

from mlxtp.comm.ending import wake_on_sigterm

pytestmark = pytest.mark.once

FORKED = """
import os, select, signal, time
from mlxtp.comm.ending import wake_on_sigterm
awake, wake = wake_on_sigterm()
ready, tell = os.pipe()
child = os.fork()
if child == 0:
    os.write(tell, b".")
    time.sleep(20)
    os._exit(1)
os.read(ready, 1)
os.kill(child, signal.SIGTERM)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == -signal.SIGTERM, status
assert not select.select([awake], [], [], 0.2)[0], "the parent was told to end"
os.kill(os.getpid(), signal.SIGTERM)
assert select.select([awake], [], [], 5)[0], "the parent was not told to end"
"""


def test_nothing_comes_where_somebody_handles_sigterm() -> None:
    """A socket at its end would keep the heartbeat's thread awake for ever."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        awake, _wake = wake_on_sigterm()
        assert not select.select([awake], [], [], 0.1)[0]
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_is_ended_itself() -> None:
    subprocess.run([sys.executable, "-c", FORKED], check=True, timeout=30)
