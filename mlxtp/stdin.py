"""Standard input under mpirun, which never tells where it ends.

mpirun of Open MPI 5.0.11 hands rank 0 the bytes and keeps the end of file to
itself (https://github.com/openpmix/openpmix/pull/4024).
"""

import os
import select
import sys

# A byte that ends the input where it has none of its own: ASCII's end of
# transmission, which launch/generate sends behind what it passes on.
END = b"\x04"
# Without it: seconds to wait for the first bytes, and for more behind the last.
FIRST_SECONDS = 10.0
MORE_SECONDS = 2.0


def read() -> str:
    """Read standard input to its end, or until nothing more has come for a while.

    Raises: ValueError if it is not UTF-8.
    """
    descriptor, data = sys.stdin.fileno(), b""
    while not data.endswith(END):
        patience = MORE_SECONDS if data else FIRST_SECONDS
        if not select.select([descriptor], [], [], patience)[0]:
            break
        if not (block := os.read(descriptor, 1 << 16)):
            break
        data += block
    return data.removesuffix(END).decode()
