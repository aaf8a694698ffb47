"""The command line of the server, of the front and of its ranks. No MLX.

The rules stand first: what an option may be, and what does not go together. The front
checks the whole line, and hands on to the ranks what is theirs: both ends parse those
options with `_add_options_of_ranks`.
"""

import argparse
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from mlxtp import job_options
from mlxtp.cluster import job
from mlxtp.comm import launcher
from mlxtp.comm.errors import UsageError
from mlxtp.job_options import KEY_VARIABLE, Args, Conflicts, Limits, flag
from mlxtp.serve.front.config import Config

# How clients call the model that comes with mlxtp.
DEFAULT_NAME = "stories"

# The longest that a rank of a service may not be heard.
SILENCE_SECONDS = 10.0

# What an option of the server's own may be; None is always allowed.
LIMITS: Limits = {
    "host": ("a name or an address of this machine", lambda host: bool(host.strip())),
    "port": ("from 0 to 65535, 0 for any that is free", lambda n: 0 <= n < 2**16),
    "max_concurrency": ("at least 1", lambda n: n >= 1),
    "max_queue": ("at least 0", lambda n: n >= 0),
    "context": ("at least 1", lambda n: n >= 1),
    "kv_gb": ("above 0", lambda x: 0 < x < float("inf")),
    "prefix_cache_gb": ("at least 0", lambda x: 0 <= x < float("inf")),
    "prefix_cache_dir": ("a folder", lambda name: bool(name.strip())),
    "drain_seconds": ("at least 0", lambda x: 0 <= x < float("inf")),
    "give_up_seconds": ("at least 0", lambda x: 0 <= x < float("inf")),
    "presence_penalty": ("from -2 to 2", lambda x: -2 <= x <= 2),
    "frequency_penalty": ("from -2 to 2", lambda x: -2 <= x <= 2),
    "served_model_name": (
        "names in UTF-8",
        lambda names: all(job_options.is_utf8(name) and name.strip() for name in names),
    ),
}

CONFLICTS: Conflicts = [
    (
        lambda args: args.api_key is not None and args.api_key_file is not None,
        "--api-key and --api-key-file: give one of them",
    ),
    (
        lambda args: args.journal_dir is not None and args.no_journal,
        "--journal-dir and --no-journal: give one of them",
    ),
    (
        lambda args: args.prefix_cache_dir is not None and args.prefix_cache_gb == 0,
        "--prefix-cache-dir keeps what --prefix-cache-gb 0 turns off: leave one out",
    ),
]

# Sampling options, and what `Settings` calls them.
SAMPLING = {
    "max_tokens": "max_tokens",
    "temp": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "xtc_probability": "xtc_probability",
    "xtc_threshold": "xtc_threshold",
    "repetition_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
}


def parse(arguments: Sequence[str]) -> Args:
    """Parse and check the command line of the front.

    Raises: UsageError, that says what was given and what was wanted; JobError under
        mpirun.
    """
    if launcher.size():
        raise job.JobError(
            "it starts mpirun itself: start it without mpirun, with --ranks N or "
            "--hostfile HOSTFILE"
        )
    return _checked(_parser(), arguments, [*CONFLICTS, *job_options.CONFLICTS])


def parse_ranks(arguments: Sequence[str]) -> Args:
    """Parse and check the command line of the ranks, which `ranks_arguments` makes.

    Raises: UsageError, as `parse` does.
    """
    return _checked(_ranks_parser(), arguments, job_options.CONFLICTS)


def parse_survive(arguments: Sequence[str]) -> Args:
    """Parse and check the command line of `mlxtp.generate --survive`.

    Raises: UsageError, as `parse` does; JobError under mpirun.
    """
    if launcher.size():
        raise job.JobError(
            "--survive starts mpirun itself: start it without mpirun, with --ranks N "
            "or --hostfile HOSTFILE"
        )
    args = _checked(_survive_parser(), arguments, job_options.CONFLICTS)
    if args.prompt is None:
        args.prompt = job_options.PROMPT
    return args


def ranks_arguments(args: Args) -> list[str]:
    """Return the command line of the ranks: what `args` have other than the default."""
    words = []
    for name, default in vars(_ranks_parser().parse_args([])).items():
        value = getattr(args, name)
        if value == default:
            continue
        if value is True:
            words.append(flag(name))
        elif isinstance(value, dict):
            words.append(f"{flag(name)}={json.dumps(value)}")
        elif isinstance(value, list):
            words.append(f"{flag(name)}={','.join(map(str, value))}")
        else:
            words.append(f"{flag(name)}={value}")
    return words


def config(args: Args, port: int) -> Config:
    """Return what the front is told; `port` is the one that it listens on.

    Raises: UsageError for a file of keys that cannot be read, or a key that is none.
    """
    given = {SAMPLING[name]: getattr(args, name) for name in SAMPLING}
    defaults = {name: value for name, value in given.items() if value is not None}
    if args.max_tokens == -1:
        defaults["max_tokens"] = None  # to the end of the context
    return Config(
        model_names=tuple(args.served_model_name or [args.model or DEFAULT_NAME]),
        host=args.host,
        port=port,
        api_keys=_api_keys(args),
        max_concurrency=args.max_concurrency,
        max_queue=args.max_queue,
        allowed_origins=tuple(args.allowed_origins),
        defaults=defaults,
        log_prompts=args.log_prompts,
        drain_seconds=args.drain_seconds,
    )


def _checked(
    parser: argparse.ArgumentParser, arguments: Sequence[str], conflicts: Conflicts
) -> Args:
    args = launcher.parse(parser, arguments)
    job_options.check(args, {**LIMITS, **job_options.LIMITS}, conflicts)
    return args


def _api_keys(args: Args) -> tuple[str, ...]:
    """Return the keys that let clients in, from where they are given.

    The variable is taken out of the environment, of which mpirun passes a part on to
    all hosts. Messages name no key.
    """
    variable = os.environ.pop(KEY_VARIABLE, None)
    if args.api_key_file is not None:
        source, keys = f"--api-key-file {args.api_key_file}", _lines(args.api_key_file)
    elif args.api_key is not None:
        source, keys = "--api-key", [args.api_key]
    elif variable is not None:
        source, keys = KEY_VARIABLE, [variable]
    else:
        return ()
    # A key travels in a header of HTTP.
    if not keys or not all(re.fullmatch("[!-~]+", key) for key in keys):
        raise UsageError(f"{source}: wanted a key of ASCII letters, digits and signs")
    return tuple(keys)


def _lines(file: str) -> list[str]:
    """Return the lines of a file of keys, without empty ones."""
    try:
        text = Path(file).read_text(errors="replace")
    except OSError as error:
        raise UsageError(f"--api-key-file {file}: {error.strerror}") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def _origins(text: str) -> list[str]:
    """Origins of web pages, as the command line gives them: https://a.org,..."""
    origins = [part.strip().rstrip("/").lower() for part in text.split(",")]
    if not all(re.fullmatch(r"\*|[a-z][a-z0-9+.-]*://[^/\s]+", one) for one in origins):
        wanted = "origins such as https://chat.example.org, or *"
        raise argparse.ArgumentTypeError(f"{text!r}: wanted {wanted}")
    return origins


def _parser() -> argparse.ArgumentParser:
    result = job_options.Parser(
        prog="mlxtp.serve",
        usage="python -m mlxtp.serve [--ranks N] [--hostfile HOSTFILE] [OPTION ...]",
        description="Serve one language model on all ranks, with OpenAI's and "
        "Anthropic's interfaces. It starts mpirun itself, on the host that comes first "
        "in the hostfile.",
    )
    job.add_options(result)
    _add_options_of_clients(result)
    _add_survival(result)
    _add_sampling(
        result,
        "What a request gets that leaves it open. Default: what the model's "
        "generation_config.json says, or else OpenAI's default.",
    )
    _add_options_of_ranks(result)
    return result


def _survive_parser() -> argparse.ArgumentParser:
    result = job_options.Parser(
        prog="mlxtp.generate --survive",
        usage="python -m mlxtp.generate --survive --hostfile HOSTFILE [OPTION ...]",
        description="Generate one text; where ranks are lost, go on with those that "
        "are left.",
    )
    result.add_argument(
        "--prompt", "-p", help="- for standard input. Default: Once upon a time."
    )
    result.add_argument(
        "--prompt-file", metavar="FILE", help="Take the prompt from this file"
    )
    result.add_argument("--system-prompt", help="Needs a chat template")
    result.add_argument("--seed", type=int, help="Default: one by chance")
    result.add_argument("--quiet", action="store_true", help="Print the text alone")
    job.add_options(result)
    _add_survival(result, rejoin="never")
    _add_sampling(result, "Default: the likeliest token, 100 of them.")
    _add_options_of_ranks(result)
    result.set_defaults(max_tokens=100, temp=0.0, max_concurrency=1)
    return result


def _ranks_parser() -> argparse.ArgumentParser:
    result = job_options.Parser(
        prog="mlxtp.serve.ranks",
        usage="python -m mlxtp.serve.ranks [OPTION ...]",
        description="What python -m mlxtp.serve starts on every rank.",
    )
    _add_options_of_ranks(result)
    return result


def _add_options_of_clients(parser: argparse.ArgumentParser) -> None:
    """Add who may ask, and under which address."""
    clients = parser.add_argument_group("clients")
    clients.add_argument(
        "--host",
        default="127.0.0.1",
        help="Listen on this address; 0.0.0.0 for all of this machine. Default: "
        "127.0.0.1, for programs on this machine alone.",
    )
    clients.add_argument(
        "--port", type=int, default=8080, help="Listen on this port. Default: 8080."
    )
    clients.add_argument(
        "--api-key",
        metavar="KEY",
        help="Let in who gives this key. Others on this machine can read a command "
        "line: better give a file.",
    )
    clients.add_argument(
        "--api-key-file",
        metavar="FILE",
        help="Let in who gives one of the keys of this file, a line each. Default: the "
        f"key in the environment's {KEY_VARIABLE}, or everybody.",
    )
    clients.add_argument(
        "--served-model-name",
        nargs="+",
        metavar="NAME",
        help="How clients call the model; answers carry the first name. Default: what "
        "--model says.",
    )
    clients.add_argument(
        "--allowed-origins",
        type=_origins,
        action="extend",
        default=[],
        metavar="ORIGIN,...",
        help="Let pages of these origins ask, such as https://chat.example.org; * for "
        "all. Default: the server's own page alone.",
    )
    clients.add_argument(
        "--max-queue",
        type=int,
        default=256,
        metavar="N",
        help="So many requests may wait; more are told to come again. Default: 256.",
    )
    clients.add_argument(
        "--drain-seconds",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="At the end, the longest that requests under way may take. Default: 30.",
    )
    clients.add_argument(
        "--journal-dir",
        metavar="DIR",
        help="Keep requests under way that have an Idempotency-Key here, so that they "
        "go on after a restart. Default: a folder of this user's, for this system.",
    )
    clients.add_argument(
        "--no-journal", action="store_true", help="Keep no requests on disk"
    )
    clients.add_argument(
        "--log-prompts",
        action="store_true",
        help="Write prompts and answers to the log",
    )


def _add_survival(parser: argparse.ArgumentParser, rejoin: str = "quiet") -> None:
    """Add what is done when hosts are lost."""
    lost = parser.add_argument_group("hosts that are lost")
    lost.add_argument(
        "--give-up-seconds",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="Where hosts are lost and the model does not fit on the others, the "
        "longest that requests wait for them. Default: 600.",
    )
    lost.add_argument(
        "--rejoin",
        choices=["quiet", "now", "never"],
        default=rejoin,
        help="When a lost host is back, take it in when no request is under way, at "
        f"once, or not before the next loss. Default: {rejoin}.",
    )


def _add_sampling(parser: argparse.ArgumentParser, description: str) -> None:
    """Add how tokens are drawn."""
    sampling = parser.add_argument_group("sampling", description)
    for name in SAMPLING:
        kind: type = int if name in ("max_tokens", "top_k") else float
        sampling.add_argument(flag(name), type=kind, metavar="X")


def _add_options_of_ranks(parser: argparse.ArgumentParser) -> None:
    """Add what the ranks are told."""
    job_options.add_options(parser, silence_seconds=SILENCE_SECONDS)
    job_options.add_draft_options(parser)
    # For jobs that follow another: they go on with the same weights.
    parser.add_argument("--revision", help=argparse.SUPPRESS)
    parser.add_argument(
        "--ignore-chat-template",
        action="store_true",
        help="Write chats plainly, as for a model without a template",
    )
    parser.add_argument(
        "--chat-template-config",
        "--chat-template-args",
        type=job_options.json_object,
        default={},
        metavar="JSON",
        help="Arguments for the chat template, as a JSON object",
    )
    requests = parser.add_argument_group("requests and their caches")
    requests.add_argument(
        "--max-concurrency",
        type=int,
        default=32,
        metavar="N",
        help="The most requests at once. Default: 32.",
    )
    requests.add_argument(
        "--context",
        type=int,
        metavar="TOKENS",
        help="The most tokens of a request, prompt and answer. Default: the model's.",
    )
    requests.add_argument(
        "--kv-gb",
        type=float,
        metavar="GB",
        help="The most memory that caches take on a rank. Default: what is left beside "
        "the weights.",
    )
    requests.add_argument(
        "--prefill-step-size",
        type=int,
        default=512,
        metavar="TOKENS",
        help="The most tokens of a prompt that are read between two steps of the "
        "others. Default: 512.",
    )
    requests.add_argument(
        "--prefix-cache-gb",
        type=float,
        metavar="GB",
        help="The most memory on a rank that keeps what requests have computed, for "
        "those that begin alike; 0 keeps nothing. Default: a part of the caches'.",
    )
    requests.add_argument(
        "--prefix-cache-dir",
        metavar="DIR",
        help="Keep that in this folder of each host as well, over restarts",
    )
    requests.add_argument(
        "--kv-bits", type=int, help="Bits of quantized KV caches. Default: unquantized."
    )
    requests.add_argument(
        "--kv-group-size",
        type=int,
        default=64,
        help="Group size of quantized KV caches. Default: 64.",
    )
    requests.add_argument(
        "--quantized-kv-start",
        type=int,
        default=0,
        metavar="TOKENS",
        help="With --kv-bits, caches are quantized from this length on. Default: 0.",
    )
