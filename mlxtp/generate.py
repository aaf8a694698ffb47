"""Generate text on all ranks: `python -m mlxtp.generate`, or `--ranks N` with it.

The whole program of a rank, from top to bottom. Every rank runs every line; only
what people see is rank 0's. The program is run and never imported: `mlxtp.generate`
is the function of that name.
"""

import argparse
import copy
import json
import os
import secrets
import sys
import textwrap
import time
from dataclasses import dataclass
from typing import Any, TextIO

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

import mlxtp
from mlxtp import job_options, loading, options
from mlxtp.cluster import job
from mlxtp.comm import launcher
from mlxtp.comm.communicator import Communicator
from mlxtp.comm.errors import UsageError
from mlxtp.comm.same_start import check_same_start
from mlxtp.dryrun.chosen import CONTEXT
from mlxtp.dryrun.loops import try_options
from mlxtp.generation import draft_model, standard_input
from mlxtp.generation.choices import NGRAM
from mlxtp.generation.draft_model import PreparedDraft
from mlxtp.generation.prompt import check_tokens, encode, messages_of
from mlxtp.generation.prompt_cache import SavedPrompt
from mlxtp.generation.text import figures
from mlxtp.loading import Prepared
from mlxtp.stories import PATH as STORIES

# Supervises the ranks of a job that is to survive.
SURVIVING = (sys.executable, "-m", "mlxtp.serve.survive")


def main() -> None:
    """Parse the command line, connect the ranks, load the model, and generate.

    A mistake of the person who started it is one line from rank 0, and status 2.
    """
    words = options.with_texts(sys.argv[1:])
    if options.is_survival(words):
        others = [word for word in words if not options.is_survival([word])]
        os.execv(sys.executable, [*SURVIVING, *others])
    try:
        args, comm = connect(words)
        screen = reserve_stdout(comm)
        if args.verbose and comm.rank == 0:
            show(comm.describe(), screen)
        task = prepare(args, comm)
        if not (launcher.size() or args.quiet or args.json):
            print(f"mlxtp.generate: {job.ALONE}", file=sys.stderr)
        run(task, args, comm, screen)
    except (UsageError, job.JobError) as error:
        launcher.refuse("mlxtp.generate", error)


def connect(arguments: list[str]) -> tuple[argparse.Namespace, Communicator]:
    """Parse and check the command line, and connect the ranks.

    Raises: UsageError for a mistake in the options, or ranks that do not start alike.
    """
    try:
        args = options.parse(arguments)
    except UsageError:
        # What one rank alone refuses, one of another version say, the others wait for.
        connection = job_options.connection_alone(arguments)
        check_same_start(Communicator.world(**connection), arguments)
        raise
    job.start_if_asked(args, arguments, "mlxtp.generate", started=launcher.size())
    comm = Communicator.world(**job_options.connection(args))
    check_same_start(comm, arguments)
    return args, comm


def reserve_stdout(comm: Communicator) -> TextIO:
    """Keep standard output for what this program prints on rank 0: the file returned.

    What libraries print there (mlx-lm warns of large models) goes to rank 0's
    standard error.
    """
    launcher.replace_unprintable()
    screen = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 (None: it is closed)
    sys.stdout = sys.stderr if comm.rank == 0 else open(os.devnull, "w")  # noqa: SIM115
    return screen


@dataclass
class Task:
    """A loaded model, and what it is to generate from."""

    model: nn.Module
    tokenizer: TokenizerWrapper
    prompt: list[int]  # tokens (L,)
    options: dict[str, Any]  # of `mlxtp.stream_generate`


def prepare(args: argparse.Namespace, comm: Communicator) -> Task:
    """Read the prompt, check all that was given, and load the models.

    Raises: UsageError for whatever was given wrong, before a weight is read.
    """
    text = standard_input.read(args.prompt, args.prompt_file, comm)
    with comm.agreement():
        saved = open_prompt_cache(args)
    default = saved.model if saved else STORIES
    target = loading.prepare(
        args.model or default,
        comm,
        shares=args.shares,
        context=max(args.max_tokens, CONTEXT),
        adapter_path=args.adapter_path,
        trust_remote_code=args.trust_remote_code,
    )
    tokenizer = target.load_tokenizer(saved.tokenizer_config if saved else None)
    draft = None
    if args.draft_model:
        draft = draft_model.prepare(
            *(args.draft_model, args.draft, args.draft_rank, target, tokenizer),
            shares=args.shares,
            fetch=args.fetch,
        )

    with comm.unlimited(), comm.agreement():
        for token in args.extra_eos_token:
            tokenizer.add_eos_token(token)
        prompt = encode_prompt(text, args, tokenizer, target)
        check_options(args, target, draft, tokenizer, prompt, saved)

    show = not (args.quiet or args.json)
    how = {
        "fetch": args.fetch,
        "spare": args.spare,
        "agree_experts": args.agree_experts,
        "progress": show,
    }
    model = target.load(**how)
    drafts = draft.load(**how) if draft else None
    generation = generation_options(args, tokenizer, target.table.vocabulary_rows)
    generation |= dict(
        seed=shared_seed(args.seed, comm),
        prompt_cache=saved.shard(model, comm) if saved else None,
        draft_model=drafts,
    )
    return Task(model, tokenizer, prompt, generation)


def open_prompt_cache(args: argparse.Namespace) -> SavedPrompt | None:
    """Open the file of --prompt-cache-file, if one is given.

    Raises: ValueError if it is none, or does not fit the other options.
    """
    if not args.prompt_cache_file:
        return None
    saved = SavedPrompt.of_file(args.prompt_cache_file)
    saved.check_quantization(args.kv_bits, args.kv_group_size)
    if args.model not in (None, saved.model):
        raise ValueError(
            f"--model is {args.model}; the prompt cache is of {saved.model}"
        )
    return saved


def shared_seed(seed: int | None, comm: Communicator) -> int:
    """The seed of all ranks: `seed`, or what rank 0 chooses."""
    return int(comm.bcast_object(secrets.randbits(64) if seed is None else seed))


def encode_prompt(
    text: str, args: argparse.Namespace, tokenizer: TokenizerWrapper, target: Prepared
) -> list[int]:
    """Encode the prompt as the options ask for.

    Raises: ValueError if no prompt comes of them, or one that the model has no rows
        for. It says which change would help.
    """
    if args.use_default_chat_template and not tokenizer.has_chat_template:
        raise ValueError("--use-default-chat-template: the tokenizer has no template")

    def encoded(args: argparse.Namespace) -> list[int]:
        tokens = encode(
            messages_of(text, args.system_prompt),
            tokenizer,
            ignore_chat_template=args.ignore_chat_template,
            chat_template_config=args.chat_template_config,
            prefill=args.prefill_response,
            continues=bool(args.prompt_cache_file),
        )
        check_tokens(tokens, target.table.vocabulary_rows, tokenizer)
        return tokens

    try:
        return encoded(args)
    except ValueError as error:
        changes: dict[str, Any] = {"system_prompt": None, "prefill_response": None}
        changes |= {"chat_template_config": {}, "ignore_chat_template": True}
        helps = options.what_helps(args, changes, encoded)
        said = str(error).rstrip(".")
        raise ValueError(f"{target.name}: {said}{helps}") from error


def generation_options(
    args: argparse.Namespace, tokenizer: TokenizerWrapper, rows: int
) -> dict[str, Any]:
    """The options of `mlxtp.stream_generate` that the command line tells alone.

    `rows` is the number of tokens that the model knows.
    """
    never_excluded = [*tokenizer.encode("\n"), *tokenizer.eos_token_ids]
    return dict(
        max_tokens=args.max_tokens,
        sampler=make_sampler(
            args.temp,
            args.top_p,
            args.min_p,
            args.min_tokens_to_keep,
            top_k=args.top_k,
            xtc_probability=args.xtc_probability,
            xtc_threshold=args.xtc_threshold,
            xtc_special_tokens=[token for token in never_excluded if token < rows],
        ),
        logits_processors=make_logits_processors(
            repetition_penalty=args.repetition_penalty
        ),
        max_kv_size=args.max_kv_size,
        prefill_step_size=args.prefill_step_size,
        kv_bits=args.kv_bits,
        kv_group_size=args.kv_group_size,
        quantized_kv_start=args.quantized_kv_start,
        num_draft_tokens=args.num_draft_tokens,
    )


def check_options(
    args: argparse.Namespace,
    target: Prepared,
    draft: PreparedDraft | None,
    tokenizer: TokenizerWrapper,
    prompt: list[int],
    saved: SavedPrompt | None,
) -> None:
    """Generate a few tokens with these options and no weights.

    Raises: ValueError if that fails. It says which change would help.
    """
    rows = target.table.vocabulary_rows
    if saved:
        saved.check_layers(target.empty.model)

    def generated(args: argparse.Namespace) -> None:
        models = [target]
        drafts: dict[str, Any] = {}
        if draft and args.draft_model:
            drafts = {"draft_model": NGRAM}
            if draft.prepared:
                models.append(draft.prepared)
        caches = saved.caches if saved and args.prompt_cache_file else None
        try_options(
            mlxtp.stream_generate,
            [(model.empty.model, model.table) for model in models],
            tokenizer,
            generation_options(args, tokenizer, rows)
            | dict(seed=0, prompt_cache=copy.deepcopy(caches))
            | drafts,
            token=prompt[-1],
            length=len(prompt) + args.max_tokens,
        )

    try:
        generated(args)
    except Exception as error:  # most are mlx-lm's and MLX's, which name no errors
        unset = vars(options.defaults())
        changes = {name: unset[name] for name in options.OF_LOOPS}
        helps = options.what_helps(args, changes, generated)
        said = textwrap.shorten(f"{type(error).__name__}: {error}", 300).rstrip(".")
        these = " with these options" if helps else ""
        raise ValueError(
            f"{target.name} cannot generate{these}: {said}{helps}"
        ) from error


def show(text: str, screen: TextIO, end: str = "\n") -> None:
    """Print on standard output.

    Raises: UsageError if that takes no more: a full disk, or a reader that has gone.
    """
    try:
        print(text, end=end, flush=True, file=screen)
    except OSError as error:
        # What is left in the buffer would fail again when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), screen.fileno())
        raise UsageError(f"cannot write standard output: {error.strerror}") from None


def run(
    task: Task, args: argparse.Namespace, comm: Communicator, screen: TextIO
) -> None:
    """Generate; rank 0 shows the text as it is made, and figures behind it.

    Raises: RuntimeError if the ranks' tokens differ; UsageError as `show` does.
    """
    show_text = comm.rank == 0 and not args.json
    show_figures = show_text and not args.quiet
    if show_figures:
        show("=" * 10, screen)
    text, tokens, accepted = "", [], 0
    comm.traffic.reset()
    begin = time.perf_counter()
    for response in mlxtp.stream_generate(
        task.model, task.tokenizer, task.prompt, **task.options
    ):
        text += response.text
        tokens.append(response.token)
        accepted += response.from_draft
        if show_text:
            show(response.text, screen, end="")
    seconds = time.perf_counter() - begin
    if show_text:
        show("", screen)

    reports = comm.allgather_object(
        (tokens, mx.get_peak_memory() / 1e9, comm.traffic.seconds / seconds)
    )
    all_tokens, peaks_gb, collective_shares = zip(*reports, strict=True)
    for rank, others in enumerate(all_tokens):
        if others != tokens:
            raise RuntimeError(f"rank {rank} made other tokens than rank {comm.rank}")
    collectives_share = sum(collective_shares) / comm.size if comm.is_timed else None
    if show_figures:
        drafted = ""
        if task.options["draft_model"]:
            drafted = f"Drafts: {accepted} of these tokens were drafted\n"
        timed = (
            "in the graph, not timed"
            if collectives_share is None
            else f"{100 * collectives_share:.0f} % of the time, mean over ranks"
        )
        show(
            "=" * 10 + "\n"
            f"{figures(response)}\n"
            f"{drafted}"
            f"Peak memory: {max(peaks_gb):.3f} GB on the largest of {comm.size} ranks, "
            f"{min(peaks_gb):.3f} GB on the smallest\n"
            f"Collectives: {timed}",
            screen,
        )
    if comm.rank == 0 and args.json:
        report = {
            "text": text,
            "tokens": tokens,
            "finish_reason": response.finish_reason,
            "prompt_tokens": response.prompt_tokens,
            "prompt_tokens_per_second": response.prompt_tps,
            "generation_tokens": response.generation_tokens,
            "generation_tokens_per_second": response.generation_tps,
            "drafted_tokens": accepted,
            "peak_memory_gb": {"largest": max(peaks_gb), "smallest": min(peaks_gb)},
            "collectives_share": collectives_share,
            "world_size": comm.size,
        }
        show(json.dumps(report), screen)


if __name__ == "__main__":
    main()
elif __name__ != "__mp_main__":  # multiprocessing's name of it in a new process
    # As a submodule of `mlxtp` it would take the place of the function.
    raise ImportError(
        "mlxtp.generate is a program, started by python -m mlxtp.generate; the "
        "function is had by `from mlxtp import generate`"
    )
