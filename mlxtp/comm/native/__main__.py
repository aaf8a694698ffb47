"""Compile the package's C++ now, and print where it is or why there is none.

  python -m mlxtp.comm.native            compile what is not in the cache
  python -m mlxtp.comm.native --flags    print the compiler's flags, for clang-tidy

It is the collectives in MLX's graph, and the reading of checkpoints. The exit status is
1 where one of them cannot be compiled. Programs run even so: over mpi-eager, and load
more slowly.
"""

import argparse
import shlex
import sys

from mlxtp.native.build import BuildError, collectives, flags, reading
from mlxtp.native.loader import load

LACKING = {
    collectives: "collectives go over mpi-eager, which is slower",
    reading: "checkpoints are read without C++, which is slower",
}


def say(words: str) -> None:
    """Tell people what is done, apart from the result."""
    print(words, file=sys.stderr, flush=True)


def main() -> int:
    """Do what the command line asks for; return the exit status."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m mlxtp.comm.native", None, __doc__, formatter_class=layout
    )
    parser.add_argument("--flags", action="store_true", help="print the flags")
    options = parser.parse_args()
    lacking = []
    for extension, consequence in LACKING.items():
        try:
            if options.flags:
                print(shlex.join(flags(extension())))
                break
            print(load(extension(), say).__file__)
        except BuildError as error:
            lacking.append(f"{consequence}: {error}")
    # What the second lacks, the first does, too.
    if lacking:
        say(lacking[0])
    return 1 if lacking else 0


if __name__ == "__main__":
    sys.exit(main())
