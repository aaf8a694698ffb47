"""The command line of `mlxtp.chat`."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlxtp.comm.errors import UsageError
from mlxtp.job_options import KEY_VARIABLE, Limits, Parser, check, flag

# What an option may be, in words and as a test; None is always allowed.
LIMITS: Limits = {
    "temp": ("at least 0", lambda x: 0 <= x < float("inf")),
    "top_p": ("above 0, at most 1", lambda x: 0 < x <= 1),
    "max_tokens": ("at least 1", lambda n: n >= 1),
    "seed": ("from 0 to 2^63 - 1", lambda n: 0 <= n < 2**63),
}


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parse and check the command line.

    Returns: the options, and the arguments for the server that is started where no
        --url names one.

    Raises: UsageError, that says what was given and what was wanted.
    """
    args, others = _parser().parse_known_args(arguments)
    if args.url is not None and others:
        raise UsageError(
            f"{others[0]}: there is no such option beside --url; without it a server "
            "is started, and takes the options of mlxtp.serve"
        )
    if args.url is None:
        for name in ("model", "api_key", "api_key_file"):
            if getattr(args, name) is not None:
                others += [flag(name), str(getattr(args, name))]
    if args.api_key_file is not None:
        args.api_key = _key_in(args.api_key_file)
    elif args.api_key is None:
        args.api_key = os.environ.get(KEY_VARIABLE)
    check(args, LIMITS, ())
    key = args.api_key or ""
    if not (key.isascii() and key.isprintable()):  # it is not to be printed
        raise UsageError("--api-key: wanted printable ASCII")
    return args, others


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What each request says of how to answer, in OpenAI's words."""
    given = {
        "temperature": args.temp,
        "top_p": args.top_p,
        "max_tokens": args.max_tokens,
        "seed": args.seed,
    }
    return {name: value for name, value in given.items() if value is not None}


def _key_in(file: Path) -> str:
    """Read the first line of a file."""
    try:
        lines = file.read_text("utf-8", "replace").split()
    except OSError as error:
        raise UsageError(f"--api-key-file: {file}: {error.strerror}") from None
    if not lines:
        raise UsageError(f"--api-key-file: {file} is empty")
    return lines[0]


def _parser() -> argparse.ArgumentParser:
    result = Parser(
        prog="mlxtp.chat",
        usage="python -m mlxtp.chat [--url URL | --model MODEL --ranks N ...] "
        "[OPTION ...]",
        description="Talk with a model in the terminal: with a server that runs, or "
        "with one that is started here, and ended at the end. Other options are those "
        "of mlxtp.serve, for the latter. Where standard input is no terminal, each of "
        "its lines is a turn.",
        allow_abbrev=False,
    )
    result.add_argument(
        "--url",
        help="A server with OpenAI's interface that runs, such as http://127.0.0.1:8080",
    )
    result.add_argument(
        "--model",
        help="Its name on the server of --url; else what the server that is started "
        "is to load: a folder or a Hugging Face repo",
    )
    key = result.add_mutually_exclusive_group()
    key.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"The server's key. Default: what {KEY_VARIABLE} holds",
    )
    key.add_argument("--api-key-file", type=Path, metavar="FILE", help="A file with it")
    result.add_argument("--system", metavar="TEXT", help="What the model is to be told")
    result.add_argument("--temp", type=float, help="The temperature")
    result.add_argument("--top-p", type=float, help="Of nucleus sampling")
    result.add_argument("--max-tokens", type=int, help="The most tokens of an answer")
    result.add_argument("--seed", type=int, help="The seed of each answer")
    return result
