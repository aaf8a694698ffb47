"""The job of the server: `python -m mlxtp.serve.ranks`, started by `python -m mlxtp.serve`.

The whole program of a rank, from top to bottom. Every rank runs every line; rank 0
talks with the front besides, and decides what all of them do in each pass.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlxtp import loading
from mlxtp.cluster.job import JobError
from mlxtp.cluster.memory import host_memory
from mlxtp.cluster.processor import processor
from mlxtp.comm import launcher
from mlxtp.comm.communicator import Communicator
from mlxtp.comm.errors import UsageError
from mlxtp.comm.same_start import check_same_start
from mlxtp.generation.batching import reason_against_batches, trimmable_below
from mlxtp.generation.capacity import Capacity, measure
from mlxtp.generation.engine import Engine
from mlxtp.generation.grammar import Grammars
from mlxtp.generation.prefix_cache import PrefixIndex, PrefixStore
from mlxtp.generation.scheduler import Scheduler
from mlxtp.generation.step import Step
from mlxtp.job_options import Args, connection, connection_alone
from mlxtp.loading import Prepared
from mlxtp.serve import messages
from mlxtp.serve.messages import RankStats
from mlxtp.serve.options import parse_ranks
from mlxtp.serve.ranks.link import Link
from mlxtp.serve.ranks.service import Service
from mlxtp.serve.ranks.text import Text
from mlxtp.stories import PATH as STORIES


def main() -> None:
    """Connect the ranks, load the model, and serve until the front says to end."""
    try:
        args, comm = connect(sys.argv[1:])
        with comm.agreement():
            link = Link.of_environment() if comm.rank == 0 else None
        job = load(args, comm, link)
        serve(job, comm, link)
    except (UsageError, JobError) as error:
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
    comm = Communicator.world(**connection(args))
    check_same_start(comm, arguments)
    return args, comm


@dataclass
class Job:
    """What a rank serves with. `service` is rank 0's alone."""

    engine: Engine
    store: PrefixStore
    service: Service | None


def load(args: Args, comm: Communicator, link: Link | None) -> Job:
    """Load the model, see what memory there is for caches, and tell the front.

    Raises: UsageError for whatever was given wrong.
    """
    tell(link, messages.State("looks at the model"))
    prepared = loading.prepare(
        args.model or STORIES,
        comm,
        shares=args.shares,
        adapter_path=args.adapter_path,
        trust_remote_code=args.trust_remote_code,
    )
    tokenizer = prepared.load_tokenizer()
    done = 0

    def advance(size: int) -> None:
        nonlocal done
        done += size
        part = done / max(prepared.nbytes, 1)
        tell(link, messages.State("reads its slices", min(part, 1.0)))

    tell(link, messages.State("fetches what it lacks of the model"))
    model = prepared.load(
        fetch=args.fetch,
        agree_experts=args.agree_experts,
        progress=link is None,
        advance=advance,
    )
    rows = prepared.table.vocabulary_rows
    wanted = args.context or longest_context(prepared.config)
    capacity = measure(
        model,
        comm,
        kv_gb=args.kv_gb,
        context=wanted,
        prefill_step_size=args.prefill_step_size,
    )
    context = capacity.longest(wanted)
    against = reason_against_batches(model)
    if args.kv_bits is not None:
        against = "mlx-lm has no batches of quantized caches"
