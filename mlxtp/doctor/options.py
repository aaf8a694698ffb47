"""The command line of `mlxtp.doctor`."""

import argparse
from pathlib import Path

from mlxtp import job_options
from mlxtp.cluster import job
from mlxtp.comm import launcher
from mlxtp.comm.choices import TIMEOUT_SECONDS, TRANSPORTS
from mlxtp.doctor.speed import DTYPES


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line, the same on all ranks, as `launcher.parse` does.

    Raises: UsageError, that says what was given and what was wanted.
    """
    return launcher.parse(_parser(), arguments)


def _parser() -> argparse.ArgumentParser:
    result = job_options.Parser(
        prog="mlxtp.doctor",
        usage="python -m mlxtp.doctor [--ranks N] [--hostfile HOSTFILE] [OPTION ...]",
        description="Examine the machines of a cluster and the links between them: say "
        "what is wrong and what fixes it. The exit status is 0 where all is well, 1 "
        "where something is wrong, 2 for a mistake on the command line.",
    )
    job.add_options(result)
    result.add_argument(
        "--transport",
        choices=TRANSPORTS,
        default="mpi",
        help="The transport that collectives are measured over, as of mlxtp.generate. "
        "Default: mpi",
    )
    result.add_argument(
        "--dtype",
        choices=DTYPES,
        default="bfloat16",
        help="The type of the weights of the model to run: matrix products are "
        "measured with it. Default: bfloat16",
    )
    result.add_argument(
        "--need-gb",
        type=_positive,
        metavar="GB",
        help="Memory that a rank needs, as mlxtp.plan says: hosts with less are named",
    )
    result.add_argument(
        "--timeout",
        type=_positive,
        default=TIMEOUT_SECONDS,
        metavar="SECONDS",
        help=f"End when a rank is silent for so long. Default: {TIMEOUT_SECONDS:g}",
    )
    result.add_argument(
        "--json",
        type=_file,
        metavar="FILE",
        help="Write what was measured, on rank 0's host, for mlxtp.plan --measured",
    )
    return result


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: wanted a number above 0")
    return value


def _file(text: str) -> Path:
    return Path(text).expanduser()
