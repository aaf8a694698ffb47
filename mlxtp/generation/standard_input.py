"""A prompt from the command line or from standard input, the same on all ranks."""

import os
import select
import sys

from mlxtp.cluster.job import END_OF_INPUT
from mlxtp.comm import launcher
from mlxtp.comm.communicator import Communicator

# Under mpirun, where `END_OF_INPUT` does not come: seconds to wait for the first bytes,
# and for more behind the last.
FIRST_SECONDS = 10.0
MORE_SECONDS = 2.0


def read(prompt: str, comm: Communicator) -> str:
    r"""Give the prompt of `--prompt`: `-` stands for rank 0's standard input.

    On a command line \n and \t stand for a new line and a tab.

    Raises: UsageError if standard input is empty or no text.
    """
    if prompt != "-":
        return prompt.replace("\\n", "\n").replace("\\t", "\t")
    text = ""
    with comm.unlimited(), comm.agreement():
        if comm.rank == 0:
            text = _read_under_mpirun() if launcher.size() else sys.stdin.read()
            if not text.strip():
                raise ValueError("standard input is empty: wanted some text")
    return str(comm.bcast_object(text))


def _read_under_mpirun() -> str:
    """Read to the end of standard input, or until nothing has come for a while."""
    descriptor, data = sys.stdin.fileno(), b""
    while not data.endswith(END_OF_INPUT):
        patience = MORE_SECONDS if data else FIRST_SECONDS
        if not select.select([descriptor], [], [], patience)[0]:
            break
        if not (block := os.read(descriptor, 1 << 16)):
            break
        data += block
    return data.removesuffix(END_OF_INPUT).decode()
