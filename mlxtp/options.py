"""The command line of `mlxtp.generate`: mlx-lm's options, and a few of ours.

The rules stand first: what an option may be, and what does not go together.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from textwrap import shorten
from typing import Any, NoReturn

from mlx_lm.generate import setup_arg_parser

from mlxtp.cluster import job
from mlxtp.comm import launcher
from mlxtp.comm.allreduce import CHOICES
from mlxtp.comm.communicator import TIMEOUT_SECONDS
from mlxtp.comm.errors import UsageError
from mlxtp.comm.transports import BACKENDS, TRANSPORTS

Args = argparse.Namespace

# Options of mlx-lm that a split model does not take, and why.
REFUSED = {
    "image": "mlxtp splits language models: it takes no images",
    "quantize_activations": "set quantize_activations in the model's config",
}

# The prompt where none is given.
PROMPT = "Once upon a time"

# Options whose text may begin with a dash.
TEXTS = ("--prompt", "-p", "--system-prompt", "--prefill-response")

# What an option may be, in words and as a test; None is always allowed.
LIMITS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "prompt": ("some text in UTF-8", lambda text: _is_utf8(text) and text.strip()),
    "system_prompt": ("text in UTF-8", lambda text: _is_utf8(text)),
    "prefill_response": ("text in UTF-8", lambda text: _is_utf8(text)),
    "model": ("a folder or a Hugging Face repo", lambda name: bool(name.strip())),
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

# Options that do not go together: which, and what is said of them.
CONFLICTS: list[tuple[Callable[[Args], bool], str]] = [
    (
        lambda args: args.prompt is not None and args.prompt_file is not None,
        "--prompt and --prompt-file: give one of them",
    ),
    (
        lambda args: args.prompt == "-" and _input_has_no_end(),
        "--prompt -: under mpirun standard input has no end; give --prompt-file FILE, "
        "or start with --ranks N in place of mpirun",
    ),
    (
        lambda args: (
            args.transport in BACKENDS
            and (args.allreduce, args.wire) != ("auto", "plain")
        ),
        "--transport {args.transport}: MLX's backend chooses the algorithm itself; "
        "--allreduce and --wire go with --transport mpi and mpi-eager",
    ),
    (
        lambda args: args.draft_model and args.prompt_cache_file,
        "--prompt-cache-file holds no cache of the --draft-model: give one of them",
    ),
]


# Options that mlx-lm's loops take. What does not go together among them, or with a
# model, mlx-lm says in a dry run.
OF_LOOPS = (
    *("max_tokens", "top_p", "min_p", "top_k", "min_tokens_to_keep"),
    *("xtc_probability", "xtc_threshold", "repetition_penalty"),
    *("max_kv_size", "kv_bits", "kv_group_size", "prompt_cache_file"),
    *("draft_model", "num_draft_tokens"),
)


def parse(arguments: list[str]) -> Args:
    """Parse and check the command line: every rank alike, before ranks connect.

    For --help rank 0 prints, and all ranks end.

    Raises: UsageError, that says what was given and what was wanted. No file has
        been looked at.
    """
    args = launcher.parse(_parser(), arguments)
    check(args)
    if args.prompt is None:
        args.prompt = PROMPT
    return args


def with_texts(arguments: Sequence[str]) -> list[str]:
    """Make an option of `TEXTS` and a text that begins with a dash one word.

    argparse takes such a text for an option, and so does whoever looks for options of
    its own in a command line. The name of an option, or its beginning, stays one.
    """
    names = _parser()._option_string_actions
    words: list[str] = []
    for word in arguments:
        begins_with_dash = word.startswith("-") and word != "-"
        start = word.partition("=")[0]
        is_option = start != "--" and any(name.startswith(start) for name in names)
        if begins_with_dash and not is_option and words and words[-1] in TEXTS:
            words[-1] += f"={word}"
        else:
            words.append(word)
    return words


def connection(args: Args) -> dict[str, Any]:
    """The arguments of `Communicator.world`."""
    return {
        "transport": args.transport,
        "allreduce": args.allreduce,
        "wire": args.wire,
        "timeout_seconds": args.timeout,
    }


def connection_alone(arguments: list[str]) -> dict[str, Any]:
    """The same of a command line that is refused; nothing where it is wrong there.

    So a rank that alone refuses its command line connects as the others do.
    """
    parser = _Parser(add_help=False)
    _add_connection(parser)
    try:
        args, _ = parser.parse_known_args(arguments)
        _check_limits(args)
    except UsageError:
        return {}
    return connection(args)


def check(args: Args) -> None:
    """Check what the options hold against the rules above.

    Raises: UsageError, for the first rule that is broken.
    """
    for name, reason in REFUSED.items():
        if getattr(args, name):
            raise UsageError(f"{_flag(name)}: {reason}")
    _check_limits(args)
    for is_given, message in CONFLICTS:
        if is_given(args):
            raise UsageError(message.format(args=args))


def defaults() -> Args:
    """The options of a command line that gives none."""
    return parse([])


def what_helps(
    args: Args, changes: Mapping[str, Any], attempt: Callable[[Args], Any]
) -> str:
    """Say which single change of the options lets `attempt` pass; "" if none does.

    `changes` are options, and what they are to be instead.
    """
    unset, helps = vars(defaults()), []
    for name, value in changes.items():
        was = getattr(args, name)
        if value == was:
            continue
        try:
            attempt(Args(**{**vars(args), name: value}))
        except Exception:  # whatever it is: the change does not help
            continue
        if value == unset[name]:
            helps.append(f"leave out {_flag(name)} {shorten(str(was), 80)}")
        else:
            helps.append(f"give {_flag(name)}")
    return f": {' or '.join(helps)}" if helps else ""


def _check_limits(args: Args) -> None:
    """Compare the values of the options that there are with `LIMITS`."""
    for name, (wanted, is_allowed) in LIMITS.items():
        value = getattr(args, name, None)
        if value is not None and not is_allowed(value):
            raise UsageError(f"{_flag(name)} is {value!r}: wanted {wanted}")


def _is_utf8(text: str) -> bool:
    """Whether a word of the command line is; other bytes come as surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _input_has_no_end() -> bool:
    return launcher.size() > 0 and launcher.input_bytes() is None


def shares(text: str) -> list[int]:
    """Shares of the ranks, as the command line gives them: 2,1,1,1,1."""
    numbers = [int(part) if part.strip().isdigit() else 0 for part in text.split(",")]
    if min(numbers) < 1:
        wanted = "whole numbers above 0, one for each rank, such as 2,1,1,1,1"
        raise argparse.ArgumentTypeError(f"{text!r}: wanted {wanted}")
    return numbers


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r}: wanted a JSON object")
    return value


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


class _Parser(argparse.ArgumentParser):
    """A parser that raises a mistake instead of printing it and ending."""

    def error(self, message: str) -> NoReturn:
        if launcher.size() and message.endswith("--prompt/-p: expected one argument"):
            message += (
                " (mpirun keeps the word ':' for itself: give --prompt-file FILE)"
            )
        raise UsageError(message)

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        # Before Python 3.13 argparse drops the word "--", also where it is the value.
        if arg_strings == ["--"] and action.nargs is None:
            value = self._get_value(action, "--")
            self._check_value(action, value)
            return value
        return super()._get_values(action, arg_strings)


def _parser() -> argparse.ArgumentParser:
    result = _Parser(
        prog="mlxtp.generate",
        usage="python -m mlxtp.generate [--ranks N] [--hostfile HOSTFILE] [OPTION ...]",
        description="Generate text from one language model on all ranks.",
        parents=[setup_arg_parser()],
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
    result.add_argument(
        "--prompt-file",
        metavar="FILE",
        help="Take the prompt from this file, on the host of rank 0",
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
        "--agree-experts",
        action="store_true",
        help="Let all ranks take rank 0's choice of experts, at the price of a "
        "collective in each layer that has them: for machines whose chips differ.",
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
    _add_connection(result)
    result.set_defaults(prompt=None)
    return result


def _add_connection(parser: argparse.ArgumentParser) -> None:
    """Add the options by which ranks connect."""
    ranks = parser.add_argument_group("between the ranks")
    ranks.add_argument(
        "--transport",
        choices=TRANSPORTS,
        default="mpi",
        help="How arrays travel. "
        + "; ".join(f"{name}: {how}" for name, how in TRANSPORTS.items())
        + ". Default: mpi.",
    )
    ranks.add_argument(
        "--allreduce",
        choices=CHOICES,
        default="auto",
        metavar="NAME",
        help="Over --transport mpi and mpi-eager, the algorithm of an allreduce: ring "
        "or direct, or one of them with -one-shot or -two-shot behind. Default: auto, "
        "the one that a short measurement finds the fastest for each size.",
    )
    ranks.add_argument(
        "--wire",
        choices=["plain", "int8"],
        default="plain",
        help="Over --transport mpi and mpi-eager, int8 sends activations with 8 bits: "
        "an experiment for slow links, and not exact. Default: plain.",
    )
    ranks.add_argument(
        "--timeout",
        type=float,
        default=TIMEOUT_SECONDS,
        metavar="SECONDS",
        help="End the job when a rank is silent or a collective waits for so long; "
        f"the time to load does not count. Default: {TIMEOUT_SECONDS:g}.",
    )
