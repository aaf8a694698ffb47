"""The job of the server, `python -m mlxtp.serve.ranks`, which `mlxtp.serve` starts.

The whole program of a rank, from top to bottom. Every rank runs every line; rank 0
talks with the front besides, and decides what all of them do in each pass.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper

import mlxtp
from mlxtp import loading
from mlxtp.checkpoint.memory import gpu_limit_bytes
from mlxtp.checkpoint.progress import Advance
from mlxtp.cluster.job import JobError
from mlxtp.cluster.memory import available_bytes, host_memory
from mlxtp.cluster.processor import processor
from mlxtp.comm import launcher
from mlxtp.comm.communicator import Communicator
from mlxtp.comm.errors import UsageError
from mlxtp.comm.same_start import check_same_start
from mlxtp.dryrun.loops import try_options
from mlxtp.fetch.spare import Spare
from mlxtp.generation import draft_model
from mlxtp.generation.batching import can_draft_in_batches, reason_against_batches
from mlxtp.generation.capacity import Capacity, measure
from mlxtp.generation.draft_lengths import PLACES, DraftLengths
from mlxtp.generation.draft_model import PreparedDraft
from mlxtp.generation.drafts import Drafts, ModelDrafts
from mlxtp.generation.engine import Engine
from mlxtp.generation.grammar import Grammars
from mlxtp.generation.prefix_cache import PrefixIndex, PrefixStore, trimmable_below
from mlxtp.generation.prefix_files import PrefixFiles, identity
from mlxtp.generation.scheduler import Scheduler
from mlxtp.job_options import AUTO, Args, connection, connection_alone
from mlxtp.loading import Prepared
from mlxtp.model.context import LONGEST_CONTEXT, longest_context
from mlxtp.serve import messages
from mlxtp.serve.options import parse_ranks
from mlxtp.serve.ranks.link import Link
from mlxtp.serve.ranks.service import Service
from mlxtp.serve.ranks.text import Template, Text
from mlxtp.stories import PATH as STORIES

# What generation_config.json may say of sampling, from and to.
SAMPLING = {
    "temperature": (0, 100),
    "top_p": (0, 1),
    "top_k": (0, 1 << 30),
    "min_p": (0, 1),
    "repetition_penalty": (0.01, 100),
}

# Arguments of chat templates that turn reasoning on, off, up or down.
REASONING = ("enable_thinking", "reasoning_effort")

# The time limit of a collective is meant for parts of prompts of so many tokens.
USUAL_PART = 512

# Where logits of a prompt are wanted, those of so many tokens are there at once.
LOGITS_PART = 32

# The part of a host's free memory that MLX may keep for arrays to come, on all ranks:
# half of what `capacity.measure` leaves.
BUFFERS_PART = 0.05

# The part of the memory for caches that the prefix cache may take, where nothing is
# said: it gives way when requests need it.
PREFIX_PART = 0.5


def main() -> None:
    """Meet the front, connect the ranks, load the model, and serve until the end."""
    link: Link | None = None
    try:
        # First, so that the front sees rank 0 go from here on.
        early = Link.of_environment() if launcher.rank() == 0 else None
        args, comm = connect(sys.argv[1:])
        link = early  # what is wrong now is the model's, or the memory's
        serve(load(args, comm, link), comm)
    except (UsageError, JobError) as error:
        tell(link, messages.Refused(str(error)))
        launcher.refuse("mlxtp.serve", error)


def connect(arguments: list[str]) -> tuple[Args, Communicator]:
    """Parse the command line, and connect the ranks.

    Raises: UsageError for a mistake in the options, or ranks that do not start alike.
    """
    try:
        args = parse_ranks(arguments)
    except UsageError:
        # What one rank alone refuses, one of another version say, the others wait for.
        check_same_start(Communicator.world(**connection_alone(arguments)), arguments)
        raise
    how = connection(args)
    # A rank that reads a longer part comes to its collectives later; none starts later.
    how["start_seconds"] = how["timeout_seconds"]
    how["timeout_seconds"] *= max(1.0, args.prefill_step_size / USUAL_PART)
    comm = Communicator.world(**how)
    check_same_start(comm, arguments)
    return args, comm


@dataclass
class Job:
    """What a rank serves with; `service` is rank 0's alone."""

    engine: Engine
    store: PrefixStore
    spare: Spare
    service: Service | None


def load(args: Args, comm: Communicator, link: Link | None) -> Job:
    """Load the model, see what memory there is for caches, and tell the front.

    Raises: UsageError for whatever was given wrong.
    """
    tell(link, messages.State("the ranks look at the model"))
    prepared = loading.prepare(
        args.model or STORIES,
        comm,
        shares=args.shares,
        context=args.context or "max",
        adapter_path=args.adapter_path,
        revision=args.revision,
        trust_remote_code=args.trust_remote_code,
    )
    tokenizer = prepared.load_tokenizer()
    template = Template(tokenizer, ignore=args.ignore_chat_template)
    with comm.agreement():
        template.check(args.chat_template_config, "--chat-template-config")
    if args.kv_bits is not None:
        check_quantized_caches(args, prepared, tokenizer)
    defaults = sampling_defaults(prepared.location.folder)
    draft = prepare_draft(args, prepared, tokenizer)
    how = {
        "fetch": args.fetch,
        "agree_experts": args.agree_experts,
        "progress": sys.stderr.isatty(),
    }
    model = prepared.load(**how, advance=progress(link, prepared.nbytes))
    drafts = None if draft is None else draft.load(**how)
    tell(link, messages.State("the ranks see what memory is left for caches"))
    with comm.unlimited():
        capacity = measure(
            model,
            comm,
            prepared.rebuild,
            kv_gb=args.kv_gb,
            part=args.prefill_step_size,
            rows=max(args.max_concurrency, LOGITS_PART, PLACES if drafts else 0),
            kv_bits=args.kv_bits,
            kv_group_size=args.kv_group_size,
            quantized_kv_start=args.quantized_kv_start,
            draft=getattr(drafts, "model", None),
        )
        against = reason_against_batches(model)
        in_batches = against is None and can_draft_in_batches(model)
    free = available_bytes(gpu_limit_bytes())
    mx.set_cache_limit(round(BUFFERS_PART * free / comm.size))
    if args.kv_bits is not None:
        against = "mlx-lm has no batches of quantized caches"
    rows = prepared.table.vocabulary_rows
    context = capacity.longest(args.context or longest_context(prepared.config))
    prefixes = PrefixIndex(capacity.bytes_of, prefix_bytes(args, capacity))
    store = PrefixStore(prefix_files(args, prepared, model, comm))
    with comm.unlimited():
        store.restore(comm, prefixes if comm.rank == 0 else None)
    spare = Spare(comm, prepared.keeping_spare() if args.spare else None)
    ends = frozenset(tokenizer.eos_token_ids)
    grammars = Grammars(tokenizer, rows)
    engine = Engine(
        model,
        store,
        grammars,
        rows,
        drafts=drafts,
        chunk=args.prefill_step_size,
        ends=ends,
        never_excluded=[x for x in (*tokenizer.encode("\n"), *ends) if x < rows],
        kv_bits=args.kv_bits,
        kv_group_size=args.kv_group_size,
        quantized_kv_start=args.quantized_kv_start,
    )
    of_ranks = comm.allgather_object(rank_facts(prepared, comm, capacity))
    if link is None:
        return Job(engine, store, spare, None)
    text = link.callee = Text(
        tokenizer,
        rows,
        context=context,
        template=template,
        template_arguments=args.chat_template_config,
        grammars=grammars,
    )
    scheduler = Scheduler(
        capacity,
        prefixes,
        concurrency=1 if against else args.max_concurrency,
        part=args.prefill_step_size,
        logits_part=LOGITS_PART,
        trimmable_below=trimmable_below(make_prompt_cache(model)),
        draft_lengths=draft_lengths(args, in_batches) if drafts else None,
        context=context,
    )
    link.send(
        messages.Ready(
            model=prepared.name,
            context=context,
            vocabulary=rows,
            defaults=defaults,
            ranks=of_ranks,
            has_template=template.is_there,
            has_tools=template.has_tools,
            has_reasoning=template.has_reasoning,
            is_batched=against is None,
            notes=[
                *text.notes,
                *notes(against, context, prepared.config),
                *notes_of_drafts(args, comm, drafts, in_batches or against is not None),
            ],
            links=comm.describe(),
            reasoning_arguments=[x for x in REASONING if template.reads(x)],
            commit=prepared.location.commit,
        )
    )
    service = Service(
        *(link, text, scheduler, prefixes, store, spare),
        context=context,
        ends=ends,
        rows=rows,
    )
    return Job(engine, store, spare, service)


def serve(job: Job, comm: Communicator) -> None:
    """Make the passes that rank 0 decides, until it says to end.

    Communicates: an announcement of rank 0 for each pass, and what passes do.
    """
    is_idle = True
    while True:
        step = job.service.decide() if job.service else None
        step = comm.announce(step, is_idle=is_idle)
        if step.is_end:
            return
        is_idle = step.is_idle
        if is_idle:
            mx.clear_cache()
        elif step.writes:
            with comm.unlimited():  # disks may be slow, and not alike
                job.store.write_one()
                comm.barrier()
        elif step.spares:
            job.spare.step()
        else:
            result = job.engine.run(step)
            if job.service:
                job.service.report(result)
        if step.counts:
            counts = comm.allgather_object(rank_counts(comm))
            if job.service:
                job.service.tell_counts(counts)


def prepare_draft(
    args: Args, prepared: Prepared, tokenizer: TokenizerWrapper
) -> PreparedDraft | None:
    """Find what --draft-model says, before a weight is read; None for no drafts.

    Raises: UsageError if it does not fit the model or the memory.
    """
    if args.draft_model is None:
        return None
    # A job that follows the loss of a host has fewer ranks.
    rank = args.draft_rank if has_draft_rank(args, prepared.comm) else None
    return draft_model.prepare(
        *(args.draft_model, args.draft, rank, prepared, tokenizer),
        shares=args.shares,
        fetch=args.fetch,
    )


def has_draft_rank(args: Args, comm: Communicator) -> bool:
    """Whether the rank that is to draft is there."""
    return args.draft_rank is not None and args.draft_rank < comm.size


def draft_lengths(args: Args, in_batches: bool) -> DraftLengths:
    """Make what decides how many tokens are drafted."""
    count = args.num_draft_tokens
    return DraftLengths(None if count == AUTO else count, in_batches=in_batches)


def notes_of_drafts(
    args: Args, comm: Communicator, drafts: Drafts | None, in_batches: bool
) -> list[str]:
    """Return what people are to know of the drafts, a line each."""
    if drafts is None:
        return []
    where = "without a model"
    if isinstance(drafts, ModelDrafts):
        where = "on all ranks" if drafts.root is None else f"on rank {drafts.root}"
        where = "split over the ranks" if args.draft == "split" else where
    lines = [f"drafts of {args.draft_model}, {where}"]
    if args.draft_rank is not None and not has_draft_rank(args, comm):
        lines.append(f"--draft-rank {args.draft_rank}: there are {comm.size} ranks")
    if not in_batches:
        lines.append(
            "a request drafts while no other one decodes: caches of several cannot be "
            "taken back one by one"
        )
    return lines


def check_quantized_caches(
    args: Args, prepared: Prepared, tokenizer: TokenizerWrapper
) -> None:
    """Generate a few tokens with quantized caches and no weights.

    Raises: UsageError if mlx-lm cannot quantize the caches of this model.
    """
    options = {
        "kv_bits": args.kv_bits,
        "kv_group_size": args.kv_group_size,
        "max_tokens": 2,
    }
    models = [(prepared.empty.model, prepared.table)]
    with prepared.comm.agreement():
        try:
            try_options(
                mlxtp.stream_generate, models, tokenizer, options, token=1, length=8
            )
        except Exception as error:  # mlx-lm and MLX name no errors for it
            said = shorten(f"{type(error).__name__}: {error}", 300)
            raise ValueError(
                f"--kv-bits {args.kv_bits} in groups of {args.kv_group_size}: "
                f"{prepared.name} cannot generate: {said}"
            ) from error


def tell(link: Link | None, message: messages.Message) -> None:
    """Tell the front something, on rank 0."""
    if link is not None:
        link.send(message)


def progress(link: Link | None, nbytes: int) -> Advance:
    """Make what tells the front how much of rank 0's slices has been read."""
    done = 0

    def advance(size: int) -> None:
        nonlocal done
        before, done = done, done + size
        # A hundred messages are enough.
        if 100 * before // max(nbytes, 1) != 100 * done // max(nbytes, 1):
            part = min(done / max(nbytes, 1), 1.0)
            tell(link, messages.State("the ranks read their slices", part))

    return advance


def sampling_defaults(folder: Path) -> dict[str, Any]:
    """Return what generation_config.json says of sampling, in `Settings`' names.

    A file that is none says nothing, as in transformers.
    """
    try:
        content = json.loads((folder / "generation_config.json").read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict):
        return {}
    given = {
        name: content[name]
        for name, (least, most) in SAMPLING.items()
        if isinstance(content.get(name), int | float) and least <= content[name] <= most
    }
    if content.get("do_sample") is False:
        given["temperature"] = 0.0
    return given


def prefix_bytes(args: Args, capacity: Capacity) -> int:
    """Return the most bytes of the prefix cache, on the fullest rank."""
    if args.prefix_cache_gb is not None:
        return round(args.prefix_cache_gb * 1e9)
    return round(PREFIX_PART * min(rank.limit_bytes for rank in capacity.ranks))


def prefix_files(
    args: Args, prepared: Prepared, model: nn.Module, comm: Communicator
) -> PrefixFiles | None:
    """Open this rank's folder of --prefix-cache-dir, and remove what nobody uses there.

    Raises: UsageError if it cannot be made.
    """
    if args.prefix_cache_dir is None:
        return None
    options = {
        "kv_bits": args.kv_bits,
        "kv_group_size": args.kv_group_size,
        "quantized_kv_start": args.quantized_kv_start,
    }
    with comm.unlimited(), comm.agreement():
        name = identity(model, comm.rank, prepared.config, options)
        files = PrefixFiles(Path(args.prefix_cache_dir), name)
    files.remove_unused()
    return files


def notes(against: str | None, context: int, config: Mapping[str, Any]) -> list[str]:
    """Return what people are to know of the model, a line each."""
    lines = []
    if against is not None:
        lines.append(f"requests run one after the other: {against}")
    made_for = longest_context(config)
    if context < made_for < LONGEST_CONTEXT:
        lines.append(
            f"a request has room for {context:,} tokens; the model was made for "
            f"{made_for:,}"
        )
    return lines


def rank_facts(
    prepared: Prepared, comm: Communicator, capacity: Capacity
) -> messages.Rank:
    """Return what /cluster says of this rank.

    Communicates: one allgather of objects.
    """
    device = mx.device_info().get("device_name")
    return messages.Rank(
        rank=comm.rank,
        host=comm.host,
        share=prepared.nbytes / max(sum(comm.allgather_object(prepared.nbytes)), 1),
        chip=str(device) if mx.default_device() == mx.gpu else processor().name,
        weights_bytes=prepared.nbytes,
        cache_limit_bytes=capacity.ranks[comm.rank].limit_bytes,
        memory_bytes=host_memory().total_bytes,
    )


def rank_counts(comm: Communicator) -> messages.RankStats:
    """Return what this rank has counted since the start."""
    return messages.RankStats(
        rank=comm.rank,
        collective_seconds=comm.traffic.seconds,
        sent_bytes=comm.traffic.bytes,
        memory_bytes=mx.get_active_memory() + mx.get_cache_memory(),
        peak_memory_bytes=mx.get_peak_memory(),
    )


if __name__ == "__main__":
    main()
