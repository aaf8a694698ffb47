"""What command lines share: options of the model and between ranks, parsing, checks.

The rules stand first: what an option may be, and what does not go together. Nothing
here imports MLX or mlx-lm, so the front of a server checks its command line with it.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NoReturn

from mlxtp.comm.choices import (
    ALLREDUCES,
    BACKENDS,
    TIMEOUT_SECONDS,
    TRANSPORTS,
    WIRES,
)
from mlxtp.comm.errors import UsageError
from mlxtp.generation.choices import DRAFT_LENGTH, NGRAM
from mlxtp.partition.shares import Shares

Args = argparse.Namespace

# Holds a server's key where no option gives one, for the server and for its client.
KEY_VARIABLE = "MLXTP_API_KEY"

AUTO = "auto"

# The prompt of programs that generate one text, where none is given.
PROMPT = "Once upon a time"

# What an option may be, in words and as a test; None is always allowed.
Limits = Mapping[str, tuple[str, Callable[[Any], bool]]]
# Options that do not go together: which, and what is said of them.
Conflicts = Iterable[tuple[Callable[[Args], bool], str]]

LIMITS: Limits = {
    "prompt": ("some text in UTF-8", lambda text: is_utf8(text) and text.strip()),
    "system_prompt": ("text in UTF-8", lambda text: is_utf8(text)),
    "seed": ("from 0 to 2^64 - 1", lambda n: 0 <= n < 2**64),
    "model": ("a folder or a Hugging Face repo", lambda name: bool(name.strip())),
    "max_tokens": ("at least 1, or -1 for no limit", lambda n: n >= 1 or n == -1),
    "temp": ("at least 0", lambda x: 0 <= x < float("inf")),
    "top_p": ("from 0 to 1", lambda x: 0 <= x <= 1),
    "min_p": ("from 0 to 1", lambda x: 0 <= x <= 1),
    "top_k": ("at least 0", lambda n: n >= 0),
    "xtc_probability": ("from 0 to 1", lambda x: 0 <= x <= 1),
    "xtc_threshold": ("from 0 to 0.5", lambda x: 0 <= x <= 0.5),
    "repetition_penalty": ("above 0", lambda x: 0 < x < float("inf")),
    "prefill_step_size": ("at least 1", lambda n: n >= 1),
    "kv_bits": ("2, 3, 4, 5, 6 or 8", lambda n: n in (2, 3, 4, 5, 6, 8)),
    "kv_group_size": ("32, 64 or 128", lambda n: n in (32, 64, 128)),
    "quantized_kv_start": ("at least 0", lambda n: n >= 0),
    "timeout": ("above 0", lambda x: 0 < x < float("inf")),
    "silence_timeout": ("above 0", lambda x: 0 < x < float("inf")),
    "draft_model": (
        "a folder, a Hugging Face repo, ngram or stories-draft",
        lambda name: bool(name.strip()),
    ),
    "draft_rank": ("the number of a rank", lambda n: n >= 0),
    "num_draft_tokens": DRAFT_LENGTH,
}

CONFLICTS: Conflicts = [
    (
        lambda args: (
            getattr(args, "prompt", None) is not None and args.prompt_file is not None
        ),
        "--prompt and --prompt-file: give one of them",
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
        lambda args: (
            getattr(args, "draft_rank", None) is not None
            and args.draft not in (AUTO, "one")
        ),
        "--draft-rank {args.draft_rank} is for a draft on one rank, and --draft is "
        "{args.draft}: leave one of them out",
    ),
    (
        lambda args: (
            getattr(args, "draft_model", None) in (None, NGRAM)
            and getattr(args, "draft_rank", None) is not None
        ),
        "--draft-rank {args.draft_rank} says where a draft model is: give "
        "--draft-model a model, or leave --draft-rank out",
    ),
    (
        lambda args: (
            getattr(args, "draft_model", None) in (None, NGRAM)
            and getattr(args, "draft", AUTO) != AUTO
        ),
        "--draft {args.draft} says where a draft model is: give --draft-model a model, "
        "or leave --draft out",
    ),
]


class Parser(argparse.ArgumentParser):
    """A parser that raises a mistake instead of printing it and ending."""

    def error(self, message: str) -> NoReturn:
        """Raise UsageError with the message."""
        raise UsageError(message)

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        # Before Python 3.13 argparse drops the word "--", also where it is the value.
        if arg_strings == ["--"] and action.nargs is None:
            value = self._get_value(action, "--")
            self._check_value(action, value)
            return value
        return super()._get_values(action, arg_strings)


def add_options(
    parser: argparse.ArgumentParser, *, silence_seconds: float | None = None
) -> None:
    """Add all options of the model and of the ranks to a parser.

    `silence_seconds` is the default of --silence-timeout; None is that of --timeout.
    """
    parser.add_argument(
        "--model",
        help="A folder or a Hugging Face repo. Default: the small model that comes "
        "with mlxtp.",
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="Run code that comes with the model's tokenizer",
    )
    parser.add_argument(
        "--adapter-path", metavar="FOLDER", help="A LoRA or DoRA adapter of the model"
    )
    work = parser.add_argument_group("what each rank does")
    work.add_argument(
        "--shares",
        type=shares,
        metavar="SHARES",
        help="Shares of the ranks in the work: whole numbers such as 2,1,1,1,1, or for "
        "each kind of layer, such as attention=2,1,1/mlp=1,1,2/vocabulary=1,1,1, with "
        "queries= in place of attention= to share out query heads one by one. auto: "
        "what fits and is fastest; it is chosen once and kept with the slices. "
        "Default: equal.",
    )
    work.add_argument(
        "--fetch",
        choices=["all", "root"],
        default="all",
        help="Who fetches a model from the hub: all ranks, or root, rank 0, which "
        "passes the others their slices. Default: all.",
    )
    work.add_argument(
        "--spare",
        action="store_true",
        help="Keep on each host's disk the slices of the host before it as well, so "
        "that the others have all of the model when one is lost.",
    )
    work.add_argument(
        "--agree-experts",
        action="store_true",
        help="Let all ranks take rank 0's choice of experts, at the price of a "
        "collective in each layer that has them: for machines whose chips differ.",
    )
    _add_connection(parser, silence_seconds)


def add_draft_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of drafts to a parser."""
    drafts = parser.add_argument_group("drafts")
    drafts.add_argument(
        "--draft-model",
        metavar="MODEL",
        help="What drafts tokens for the model to accept: a smaller model of the same "
        "tokens; stories-draft, which comes with mlxtp; or ngram, which looks for what "
        "followed the last tokens before.",
    )
    drafts.add_argument(
        "--draft",
        choices=[AUTO, "one", "all", "split"],
        default=AUTO,
        help="Where a draft model is: whole on one rank, whole on all, or split over "
        "them. Default: auto, on one or on all, whichever is quicker.",
    )
    drafts.add_argument(
        "--draft-rank",
        type=int,
        metavar="RANK",
        help="Which rank has the draft model. Default: 0, or where rank 0 lacks the "
        "memory the one that has most left.",
    )
    drafts.add_argument(
        "--num-draft-tokens",
        type=_auto_or_number,
        default=AUTO,
        metavar="N",
        help="How many tokens are drafted for a pass. Default: auto, as many as pay.",
    )


def _auto_or_number(text: str) -> int | str:
    """Parse the word auto, or a number."""
    try:
        return text if text == AUTO else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: wanted auto, or a number"
        ) from None


def check(args: Args, limits: Limits, conflicts: Conflicts) -> None:
    """Compare the options that there are with `limits`, then with `conflicts`.

    Raises: UsageError, for the first rule that is broken.
    """
    for name, (wanted, is_allowed) in limits.items():
        value = getattr(args, name, None)
        if value is not None and not is_allowed(value):
            raise UsageError(f"{flag(name)} is {value!r}: wanted {wanted}")
    for is_given, message in conflicts:
        if is_given(args):
            raise UsageError(message.format(args=args))


def connection(args: Args) -> dict[str, Any]:
    """The arguments of `Communicator.world`."""
    return {
        "transport": args.transport,
        "allreduce": args.allreduce,
        "wire": args.wire,
        "timeout_seconds": args.timeout,
        "silence_seconds": args.silence_timeout,
        "on_loss": "end",
    }


def connection_alone(arguments: list[str]) -> dict[str, Any]:
    """The same of a command line that is refused; nothing where it is wrong there.

    So a rank that alone refuses its command line connects as the others do.
    """
    parser = Parser(add_help=False)
    _add_connection(parser)
    try:
        args, _ = parser.parse_known_args(arguments)
        check(args, LIMITS, ())
    except UsageError:
        return {}
    return connection(args)


def shares(text: str) -> Shares | Literal["auto"]:
    """Shares of the ranks, as the command line gives them: 2,1,1,1,1, or auto."""
    if text == "auto":
        return "auto"
    try:
        return Shares.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r}: wanted whole numbers above 0, one for each rank, such as "
            "2,1,1,1,1, or attention=2,1,1/mlp=1,1,2, or auto"
            + (f" ({error})" if "=" in text else "")
        ) from None


def json_object(text: str) -> dict[str, Any]:
    """A JSON object, as the command line gives it."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r}: wanted a JSON object")
    return value


def is_utf8(text: str) -> bool:
    """Whether a word of the command line is; other bytes come as surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def flag(name: str) -> str:
    """Return how an option is written: "top_p" is --top-p."""
    return "--" + name.replace("_", "-")


def _add_connection(
    parser: argparse.ArgumentParser, silence_seconds: float | None = None
) -> None:
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
        choices=ALLREDUCES,
        default="auto",
        metavar="NAME",
        help="Over --transport mpi and mpi-eager, the algorithm of an allreduce: ring "
        "or direct, or one of them with -one-shot or -two-shot behind. Default: auto, "
        "the one that a short measurement finds the fastest for each size.",
    )
    ranks.add_argument(
        "--wire",
        choices=WIRES,
        default="plain",
        help="Over --transport mpi and mpi-eager, int8 sends activations with 8 bits: "
        "an experiment for slow links, and not exact. Default: plain.",
    )
    ranks.add_argument(
        "--timeout",
        type=float,
        default=TIMEOUT_SECONDS,
        metavar="SECONDS",
        help="End the job when a collective waits for so long; the time to load does "
        f"not count. Default: {TIMEOUT_SECONDS:g}.",
    )
    limit = "that of --timeout" if silence_seconds is None else f"{silence_seconds:g}"
    ranks.add_argument(
        "--silence-timeout",
        type=float,
        default=silence_seconds,
        metavar="SECONDS",
        help="End the job when a rank is not heard for so long; one that computes or "
        f"loads is heard all the while. Default: {limit}.",
    )
