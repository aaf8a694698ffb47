"""From what a person gave as a prompt to tokens."""

import argparse
import os
import select
import sys

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlxtp.cluster.job import END_OF_INPUT
from mlxtp.comm import launcher
from mlxtp.comm.communicator import Communicator

# Under mpirun, where `END_OF_INPUT` does not come: seconds to wait for the first bytes,
# and for more behind the last.
FIRST_SECONDS = 10.0
MORE_SECONDS = 2.0


def read(given: str, comm: Communicator) -> str:
    """The prompt that is `given`; `-` stands for standard input.

    Raises: UsageError if standard input is no text.
    """
    if given != "-":
        return given.replace("\\n", "\n").replace("\\t", "\t")
    text = ""
    with comm.unlimited(), comm.agreement():
        if comm.rank == 0:
            text = _read_under_mpirun() if launcher.size() else sys.stdin.read()
    return str(comm.bcast_object(text))


def _read_under_mpirun() -> str:
    """Standard input to its end, or until nothing more has come for a while."""
    descriptor, data = sys.stdin.fileno(), b""
    while not data.endswith(END_OF_INPUT):
        patience = MORE_SECONDS if data else FIRST_SECONDS
        if not select.select([descriptor], [], [], patience)[0]:
            break
        if not (block := os.read(descriptor, 1 << 16)):
            break
        data += block
    return data.removesuffix(END_OF_INPUT).decode()


def encode(
    args: argparse.Namespace, tokenizer: TokenizerWrapper, *, continues: bool
) -> list[int]:
    """The prompt as tokens, in the chat template as mlx-lm puts it there.

    What `continues` a saved prompt is the end of the conversation alone.

    Raises: ValueError if no tokens come of it.
    """
    if args.use_default_chat_template and not tokenizer.has_chat_template:
        raise ValueError("--use-default-chat-template: the tokenizer has no template")
    text = args.prompt
    templated = tokenizer.has_chat_template and not args.ignore_chat_template
    if templated:
        prefill = args.prefill_response

        def rendered(user: str) -> str:
            messages = [{"role": "user", "content": user}]
            if args.system_prompt is not None:
                messages.insert(0, {"role": "system", "content": args.system_prompt})
            if prefill is not None:
                messages.append({"role": "assistant", "content": prefill})
            return tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                continue_final_message=prefill is not None,
                add_generation_prompt=prefill is None,
                **args.chat_template_config,
            )

        text = rendered(text)
        if continues:
            text = text[rendered("<query>").index("<query>") :]
    elif args.system_prompt is not None or args.prefill_response is not None:
        raise ValueError(
            "--system-prompt and --prefill-response need a chat template: the "
            "tokenizer has none, or --ignore-chat-template is given"
        )
    tokens = tokenizer.encode(text, add_special_tokens=not templated)
    if not tokens:
        raise ValueError(f"the tokenizer makes no token of the prompt {args.prompt!r}")
    return tokens
