"""The command line of `mlxtp.generate`: mlx-lm's options, and a few of ours.

The rules stand first: what an option may be, and what does not go together.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from textwrap import shorten
from typing import Any, NoReturn

from mlx_lm.generate import setup_arg_parser

from mlxtp import job_options
from mlxtp.cluster import job
from mlxtp.comm import launcher
from mlxtp.comm.errors import UsageError
from mlxtp.job_options import PROMPT, Args, Conflicts, Limits, flag, is_utf8

# Options of mlx-lm that a split model does not take, and why.
REFUSED = {
    "image": "mlxtp splits language models: it takes no images",
    "quantize_activations": "set quantize_activations in the model's config",
}

# With this option the ranks are supervised, by another program (`serve/survive`).
SURVIVE = "--survive"

# Options whose text may begin with a dash.
TEXTS = ("--prompt", "-p", "--system-prompt", "--prefill-response")

# What an option of this program's own may be.
LIMITS: Limits = {
    "prefill_response": ("text in UTF-8", lambda text: is_utf8(text)),
    "min_tokens_to_keep": ("at least 1", lambda n: n >= 1),
    "max_kv_size": ("above 4: the first 4 tokens are kept", lambda n: n > 4),
}

CONFLICTS: Conflicts = [
    (
        lambda args: args.prompt == "-" and _input_has_no_end(),
        "--prompt -: under mpirun standard input has no end; give --prompt-file FILE, "
        "or start with --ranks N in place of mpirun",
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


def is_survival(words: Sequence[str]) -> bool:
    """Whether the words of a command line have --survive, or a beginning of it."""
    return any(SURVIVE.startswith(word) and word.startswith("--su") for word in words)


def check(args: Args) -> None:
    """Check what the options hold against the rules above.

    Raises: UsageError, for the first rule that is broken.
    """
    for name, reason in REFUSED.items():
        if getattr(args, name):
            raise UsageError(f"{flag(name)}: {reason}")
    job_options.check(
        args,
        {**LIMITS, **job_options.LIMITS},
        [*CONFLICTS, *job_options.CONFLICTS],
    )


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
            helps.append(f"leave out {flag(name)} {shorten(str(was), 80)}")
        else:
            helps.append(f"give {flag(name)}")
    return f": {' or '.join(helps)}" if helps else ""


def _input_has_no_end() -> bool:
    return launcher.size() > 0 and launcher.input_bytes() is None


class _Parser(job_options.Parser):
    """Says of a lost word what mpirun does with it."""

    def error(self, message: str) -> NoReturn:
        if launcher.size() and message.endswith("--prompt/-p: expected one argument"):
            message += (
                " (mpirun keeps the word ':' for itself: give --prompt-file FILE)"
            )
        super().error(message)


def _parser() -> argparse.ArgumentParser:
    result = _Parser(
        prog="mlxtp.generate",
        usage="python -m mlxtp.generate [--ranks N] [--hostfile HOSTFILE] [OPTION ...]",
        description="Generate text from one language model on all ranks.",
        parents=[setup_arg_parser()],
        conflict_handler="resolve",
    )
    result.add_argument("--repetition-penalty", type=float, help="Repetition penalty")
    result.add_argument(
        "--chat-template-config",
        type=job_options.json_object,
        default={},
        help="Arguments for the chat template, as a JSON object",
    )
    result.add_argument(
        "--prompt-file",
        metavar="FILE",
        help="Take the prompt from this file, on the host of rank 0",
    )
    job.add_options(result)
    result.add_argument(
        SURVIVE,
        action="store_true",
        help="Where ranks are lost, go on with those that are left; --survive --help "
        "says more",
    )
    job_options.add_options(result)
    job_options.add_draft_options(result)
    output = result.add_argument_group("output")
    output.add_argument(
        "--verbose",
        action="store_true",
        help="Print how arrays travel, and what was measured to choose it "
        "(mlx-lm's --verbose False is --quiet)",
    )
    output.add_argument("--quiet", action="store_true", help="Print the text alone")
    output.add_argument(
        "--json",
        action="store_true",
        help="Print one JSON object: text, tokens, figures",
    )
    result.set_defaults(prompt=None)
    return result
