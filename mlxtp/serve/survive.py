"""Generate one text, with ranks that may be lost: `mlxtp.generate --survive`.

The supervisor of the server, with one request and no clients: where ranks are lost, the
next ones go on with the text. Standard output has the whole text.
"""

import argparse
import asyncio
import secrets
import sys
import time

from mlxtp.cluster.job import JobError
from mlxtp.comm import launcher
from mlxtp.comm.errors import UsageError
from mlxtp.generation.settings import Settings
from mlxtp.generation.standard_input import text_of
from mlxtp.serve import options
from mlxtp.serve.front.ranks import Generation, Mistake, Ranks, Unavailable
from mlxtp.serve.hosts import check_first_host
from mlxtp.serve.log import say
from mlxtp.serve.messages import Start
from mlxtp.serve.supervisor import first_of, signals, supervised

# As `mlxtp.generate` counts repetitions, by mlx-lm's default.
REPETITION_CONTEXT = 20

# How long the end of the ranks may lag behind that of the request.
LAST_SECONDS = 1.0


def main() -> None:
    """Start the ranks, and print what they generate.

    The status is 0 when the text is whole, 2 for a mistake of the person who started
    it, else that of the last job.
    """
    try:
        args = options.parse_survive(sys.argv[1:])
        check_first_host(args.hostfile, None)
        try:
            text = text_of(args.prompt, args.prompt_file)
        except ValueError as error:
            raise UsageError(str(error)) from None
        status = asyncio.run(run(args, text))
    except (UsageError, JobError, Mistake) as error:
        launcher.refuse("mlxtp.generate", error)
    sys.exit(status)


async def run(args: argparse.Namespace, text: str) -> int:
    """Let jobs follow each other until the text is whole; return the exit status."""
    name = args.model or options.DEFAULT_NAME
    with signals() as (first, second):
        async with (
            Ranks() as ranks,
            supervised(args, None, ranks, name, second) as supervising,
        ):
            answering = asyncio.create_task(answered(args, ranks, text))
            try:
                await first_of(first, supervising, answering)
                if answering.done():
                    try:
                        is_whole = answering.result()
                    except Unavailable as error:
                        # It has ended, or waits for hosts for longer than it should.
                        await first_of(supervising, timeout_seconds=LAST_SECONDS)
                        if not supervising.done():
                            say(str(error))
                            return 1
                    else:
                        return 0 if is_whole else 1
                return supervising.result() if supervising.done() else 1
            finally:
                answering.cancel()
                await asyncio.wait([answering])


async def answered(args: argparse.Namespace, ranks: Ranks, text: str) -> bool:
    """Ask, and print the text as it comes; return whether all of it has come.

    The ranks that are left may have less room than there was.

    Raises: Mistake for a prompt or a setting that the model refuses; Unavailable where
        the ranks are lost and no others come.
    """
    await ranks.is_ready.wait()
    ready = ranks.ready
    assert ready is not None
    if ready.has_template:
        messages = [{"role": "user", "content": text}]
        if args.system_prompt is not None:
            messages.insert(0, {"role": "system", "content": args.system_prompt})
        encoded = await ranks.call("chat", messages=messages)
    elif args.system_prompt is not None:
        raise Mistake("--system-prompt needs a chat template: there is none")
    else:
        encoded = await ranks.call("text", text=text)
    room = ready.context - len(encoded["tokens"])
    most = room if args.max_tokens == -1 else min(args.max_tokens, room)
    given = {
        setting: value
        for option, setting in options.SAMPLING.items()
        if (value := getattr(args, option)) is not None
    }
    seed = secrets.randbits(63) if args.seed is None else args.seed
    given |= {"max_tokens": most, "seed": seed}
    settings = Settings(**given, repetition_context_size=REPETITION_CONTEXT)
    generation = ranks.start(Start(secrets.token_hex(12), encoded["tokens"], settings))
    finish = await show(args, generation)
    length = len(generation.tokens)
    if finish != "length" or length >= most:
        return True
    say(
        f"the text is cut behind {length:,} tokens: the ranks that are left have no "
        "room for more"
    )
    return False


async def show(args: argparse.Namespace, generation: Generation) -> str | None:
    """Print the text of a request as it comes, and figures at the end.

    Returns: the `finish` of its last event.
    """
    line = "" if args.quiet else f"{'=' * 10}\n"
    print(line, end="", flush=True)
    is_first, finish = True, None
    async for event in generation:
        for _, piece in event.pieces:
            # As mlx-lm's detokenizers have it, which know nothing of the prompt.
            shown = piece.removeprefix(" ") if is_first else piece
            print(shown, end="", flush=True)
            is_first = False
        finish = event.finish
    print(f"\n{line}", end="", flush=True)
    if not args.quiet:
        seconds, tokens = time.monotonic() - generation.begun, len(generation.tokens)
        print(
            f"Prompt: {len(generation.start.prompt)} tokens\n"
            f"Generation: {tokens} tokens, {tokens / seconds:.3f} tokens-per-sec with "
            "all pauses",
            flush=True,
        )
    return finish


if __name__ == "__main__":
    main()
