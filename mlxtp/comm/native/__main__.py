"""Compile the collectives now, and print where they are or why there are none.

  python -m mlxtp.comm.native            compile them, if they are not in the cache
  python -m mlxtp.comm.native --flags    print the compiler's flags, for clang-tidy

The exit status is 1 where they cannot be compiled. Programs run even so, over
mpi-eager.
"""

import argparse
import shlex
import sys

from mlxtp.comm.native.build import BuildError, collectives, flags
from mlxtp.comm.native.loader import load


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
    try:
        if options.flags:
            print(shlex.join(flags(collectives())))
        else:
            print(load(say).__file__)
    except BuildError as error:
        say(f"collectives go over mpi-eager, which is slower: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
