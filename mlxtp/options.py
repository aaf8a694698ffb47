"""The options of `mlxtp.generate`: mlx-lm's, with its meanings, and a few of ours."""

import argparse
import contextlib
import io
import json
from collections.abc import Callable
from typing import Any

from mlx_lm.generate import setup_arg_parser

from mlxtp.cluster import job
from mlxtp.comm import launcher
from mlxtp.comm.allreduce import ALGORITHMS
from mlxtp.comm.communicator import TIMEOUT_SECONDS
from mlxtp.comm.transports import TRANSPORTS

# Options of mlx-lm that a split model does not take.
REFUSED = {
    "image": "mlxtp splits language models: it takes no images",
    "quantize_activations": "mlxtp does not quantize activations",
}

# What an option may be, in words and as a test; None is always allowed.
LIMITS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "prompt": ("some text", lambda value: bool(value.strip())),
    "max_tokens": ("at least 1, or -1 for no limit", lambda n: n >= 1 or n == -1),
    "temp": ("at least 0", lambda x: 0 <= x < float("inf")),
    "top_p": ("from 0 to 1", lambda x: 0 <= x <= 1),
    "min_p": ("from 0 to 1", lambda x: 0 <= x <= 1),
    "top_k": ("at least 0", lambda n: n >= 0),
    "min_tokens_to_keep": ("at least 1", lambda n: n >= 1),
    "xtc_probability": ("from 0 to 1", lambda x: 0 <= x <= 1),
    "xtc_threshold": ("from 0 to 0.5", lambda x: 0 <= x <= 0.5),
    "repetition_penalty": ("above 0", lambda x: 0 < x < float("inf")),
    "seed": ("from 0 to 2^64 - 1", lambda n: 0 <= n < 2**64),
    "max_kv_size": ("above 4: the first 4 tokens are kept", lambda n: n > 4),
    "prefill_step_size": ("at least 1", lambda n: n >= 1),
    "kv_bits": ("2, 3, 4, 5, 6 or 8", lambda n: n in (2, 3, 4, 5, 6, 8)),
    "kv_group_size": ("32, 64 or 128", lambda n: n in (32, 64, 128)),
    "quantized_kv_start": ("at least 0", lambda n: n >= 0),
    "timeout": ("above 0", lambda x: 0 < x < float("inf")),
    "num_draft_tokens": ("at least 1", lambda n: n >= 1),
}


def _world_parser() -> argparse.ArgumentParser:
    """Of the options that the ranks need to find each other."""
    result = argparse.ArgumentParser(add_help=False)
    ours = result.add_argument_group("how the ranks talk")
    ours.add_argument(
        "--transport",
        choices=TRANSPORTS,
        default="mpi",
        help="mpi4py (mpi), or one of MLX's backends. Default: mpi",
    )
    ours.add_argument(
        "--allreduce",
        choices=["auto", "ring", "direct", *ALGORITHMS],
        default="auto",
        metavar="NAME",
        help="Over --transport mpi, the algorithm of an allreduce: ring or direct, or "
        "one of them with -one-shot or -two-shot behind. Default: auto, whichever a "
        "short measurement finds the fastest for each size.",
    )
    ours.add_argument(
        "--wire",
        choices=["plain", "int8"],
        default="plain",
        help="Over --transport mpi, int8 sends activations with 8 bits: an experiment "
        "for slow links, and not exact. Default: plain.",
    )
    ours.add_argument(
        "--timeout",
        type=float,
        default=TIMEOUT_SECONDS,
        metavar="SECONDS",
        help="End the job when a rank is silent or a collective waits for so long; "
        f"the time to load does not count. Default: {TIMEOUT_SECONDS:g}.",
    )
    return result


def of_world(arguments: list[str]) -> dict[str, Any]:
    """The arguments of `Communicator.world`; its defaults where they are mistaken.

    `parse` then says what is wrong, when there are ranks to say it once.
    """
    nowhere = io.StringIO()
    try:
        with contextlib.redirect_stderr(nowhere):
            args, _ = _world_parser().parse_known_args(arguments)
        _check_values(args)
    except (SystemExit, ValueError):
        return {}
    return {
        "transport": args.transport,
        "allreduce": args.allreduce,
        "wire": args.wire,
        "timeout_seconds": args.timeout,
    }


def reads_input(arguments: list[str]) -> bool:
    """Return whether the prompt comes from standard input."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("--prompt", "-p")
    try:
        return parser.parse_known_args(arguments)[0].prompt == "-"
    except argparse.ArgumentError:
        return False  # `parse` says what is wrong, when there are ranks to say it once


def _parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="mlxtp.generate",
        usage="python -m mlxtp.generate [--ranks N] [--hostfile HOSTFILE] [OPTION ...]",
        description="Generate text from one language model on all ranks.",
        parents=[setup_arg_parser(), _world_parser()],
        conflict_handler="resolve",
    )
    result.add_argument(
        "--model",
        help="A folder or a Hugging Face repo. Default: the small model that comes "
        "with mlxtp.",
    )
    result.add_argument("--repetition-penalty", type=float, help="Repetition penalty")
    result.add_argument(
        "--chat-template-config",
        type=_json_object,
        default={},
        help="Arguments for the chat template, as a JSON object",
    )
    job.add_options(result)
    ours = result.add_argument_group("mlxtp")
    ours.add_argument(
        "--shares",
        type=shares,
        help="Shares of the ranks in the work, whole numbers such as 2,1,1,1,1. "
        "Default: equal.",
    )
    ours.add_argument(
        "--fetch",
        choices=["all", "root"],
        default="all",
        help="Who fetches a model from the hub: all ranks, or root, rank 0, which "
        "passes the others their slices. Default: all.",
    )
    ours.add_argument(
        "--verbose",
        action="store_true",
        help="Print how arrays travel, and what was measured to choose it "
        "(mlx-lm's --verbose False is --quiet)",
    )
    ours.add_argument("--quiet", action="store_true", help="Print the text alone")
    ours.add_argument(
        "--json",
        action="store_true",
        help="Print one JSON object: text, tokens, figures",
    )
    result.set_defaults(prompt="Once upon a time")
    return result


def shares(text: str) -> list[int]:
    """Shares of the ranks, as the command line gives them."""
    found = [int(part) if part.strip().isdigit() else 0 for part in text.split(",")]
    if min(found) < 1:
        wanted = "whole numbers above 0, one for each rank, such as 2,1,1,1,1"
        raise argparse.ArgumentTypeError(f"{text!r}: wanted {wanted}")
    return found


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r}: wanted a JSON object")
    return value


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line, as `launcher.parse` does."""
    return launcher.parse(_parser(), arguments)


def check(args: argparse.Namespace) -> None:
    """Check what the options hold, without looking at a file.

    Raises: ValueError that says what was given and what was wanted.
    """
    for name, reason in REFUSED.items():
        if getattr(args, name):
            raise ValueError(f"{_flag(name)}: {reason}")
    _check_values(args)
    if args.transport != "mpi" and (args.allreduce, args.wire) != ("auto", "plain"):
        raise ValueError(
            f"--transport {args.transport}: MLX's backend chooses the way itself; "
            "--allreduce and --wire go with --transport mpi"
        )
    if args.max_kv_size is not None and args.kv_bits is not None:
        raise ValueError("--kv-bits: mlx-lm does not quantize what --max-kv-size makes")
    if args.draft_model and args.prompt_cache_file:
        raise ValueError(
            "--prompt-cache-file holds no cache of the --draft-model: give one of them"
        )


def _check_values(args: argparse.Namespace) -> None:
    for name, (wanted, allowed) in LIMITS.items():
        value = getattr(args, name, None)
        if value is not None and not allowed(value):
            raise ValueError(f"{_flag(name)} is {value!r}: wanted {wanted}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
