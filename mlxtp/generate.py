"""The main job: `python -m mlxtp.generate`, under `mpirun` or with `--ranks N`.

The whole program of a rank, from top to bottom. Every rank runs every line; only
what people see is rank 0's.
"""

import argparse
import json
import os
import secrets
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, TextIO

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

import mlxtp
from mlxtp import options
from mlxtp.cluster import job as cluster_job
from mlxtp.comm import launcher
from mlxtp.comm.communicator import Communicator
from mlxtp.comm.errors import UsageError
from mlxtp.generation import prompt
from mlxtp.generation.prompt_cache import SavedPrompt
from mlxtp.stories import PATH as STORIES


def main() -> None:
    try:
        cluster_job.start_if_asked(
            sys.argv[1:],
            "mlxtp.generate",
            started=launcher.size(),
            mark_input=options.reads_input(sys.argv[1:]),
        )
        comm = Communicator.world(**options.of_world(sys.argv[1:]))
        check_same_start(comm)
        args = options.parse(sys.argv[1:])
        if not (launcher.size() or args.quiet or args.json):
            print(f"mlxtp.generate: {cluster_job.ALONE}", file=sys.stderr)
        screen = only_ours(comm)
        if args.verbose and comm.rank == 0:
            print(comm.describe(), file=screen)
        job = prepare(args, comm)
    except (UsageError, cluster_job.JobError) as error:
        if launcher.rank() == 0:
            print(f"mlxtp.generate: error: {error}", file=sys.stderr)
        launcher.leave(2)
    run(job, args, comm, screen)


def only_ours(comm: Communicator) -> TextIO:
    """Keep standard output for what this program prints, on rank 0.

    What libraries print there (mlx-lm warns of large models) goes to rank 0's
    standard error.
    """
    screen = sys.stdout
    sys.stdout = sys.stderr if comm.rank == 0 else open(os.devnull, "w")  # noqa: SIM115
    return screen


def check_same_start(comm: Communicator) -> None:
    """Compare what the ranks were started with.

    Raises: UsageError, with the first rank that differs from rank 0, and in what.
    """
    mine = {
        "arguments": " ".join(sys.argv[1:]),
        "version of mlxtp": mlxtp.__version__,
        "version of mlx": version("mlx"),
        "version of mlx-lm": version("mlx-lm"),
    }
    starts = comm.allgather_object((comm.host, mine))
    first_host, first = starts[0]
    for rank, (host, start) in enumerate(starts):
        for what, value in start.items():
            if value != first[what]:
                raise UsageError(
                    f"the ranks do not start alike: {what} {first[what]!r} on rank 0 "
                    f"({first_host}), {value!r} on rank {rank} ({host})"
                )


@dataclass
class Job:
    """All that generating takes."""

    model: nn.Module
    tokenizer: TokenizerWrapper
    prompt: list[int]
    options: dict[str, Any]  # of `mlxtp.stream_generate`


def prepare(args: argparse.Namespace, comm: Communicator) -> Job:
    """From options to a loaded model and a prompt.

    Raises: UsageError for whatever was given wrong.
    """
    args.prompt = prompt.read(args.prompt, comm)
    with comm.agreement():
        options.check(args)
        saved = None
        if args.prompt_cache_file:
            saved = SavedPrompt.of_file(args.prompt_cache_file)
            saved.check_quantization(args.kv_bits, args.kv_group_size)
            if args.model not in (None, saved.model):
                raise ValueError(
                    f"--model is {args.model}; the prompt cache is of {saved.model}"
                )
    mx.random.seed(
        comm.bcast_object(secrets.randbits(64) if args.seed is None else args.seed)
    )
    show = not (args.quiet or args.json)
    name = args.model or (saved.model if saved else STORIES)
    model, tokenizer = mlxtp.load(
        name,
        comm,
        shares=args.shares,
        adapter_path=args.adapter_path,
        tokenizer_config=saved.tokenizer_config if saved else None,
        trust_remote_code=args.trust_remote_code,
        fetch=args.fetch,
        progress=show,
    )
    draft_model = None
    if args.draft_model:
        draft_model, draft_tokenizer = mlxtp.load(
            args.draft_model,
            comm,
            shares=args.shares,
            fetch=args.fetch,
            progress=show,
        )
    kv_dims = cached_dims(model) if args.kv_bits else set()
    with comm.agreement():
        if draft_model and draft_tokenizer.vocab_size != tokenizer.vocab_size:
            raise ValueError(
                f"--draft-model knows {draft_tokenizer.vocab_size} tokens, the model "
                f"{tokenizer.vocab_size}: they do not fit together"
            )
        for token in args.extra_eos_token:
            tokenizer.add_eos_token(token)
        check_caches(args, model, kv_dims)
        tokens = prompt.encode(args, tokenizer, continues=saved is not None)
    caches = saved.shard(model, comm) if saved else None
    return Job(
        model,
        tokenizer,
        tokens,
        dict(
            max_tokens=args.max_tokens,
            sampler=make_sampler(
                args.temp,
                args.top_p,
                args.min_p,
                args.min_tokens_to_keep,
                top_k=args.top_k,
                xtc_probability=args.xtc_probability,
                xtc_threshold=args.xtc_threshold,
                xtc_special_tokens=[*tokenizer.encode("\n"), *tokenizer.eos_token_ids],
            ),
            logits_processors=make_logits_processors(
                repetition_penalty=args.repetition_penalty
            ),
            max_kv_size=args.max_kv_size,
            prefill_step_size=args.prefill_step_size,
            prompt_cache=caches,
            kv_bits=args.kv_bits,
            kv_group_size=args.kv_group_size,
            quantized_kv_start=args.quantized_kv_start,
            draft_model=draft_model,
            num_draft_tokens=args.num_draft_tokens,
        ),
    )


def check_caches(args: argparse.Namespace, model: nn.Module, kv_dims: set[int]) -> None:
    """Raise ValueError if the model's caches cannot be what the options ask for."""
    caches = make_prompt_cache(model)
    slides = any(isinstance(cache, RotatingKVCache) for cache in caches)
    if args.kv_bits and slides:
        raise ValueError("--kv-bits: mlx-lm does not quantize sliding windows")
    if args.draft_model and slides:
        raise ValueError("--draft-model: a sliding window cannot take drafts back")
    for dims in sorted(kv_dims):
        if dims % args.kv_group_size:
            raise ValueError(
                f"--kv-group-size is {args.kv_group_size}: it does not divide the "
                f"model's heads of {dims}; without --kv-bits nothing is quantized"
            )


def cached_dims(model: nn.Module) -> set[int]:
    """The widths of the keys and values that the model caches, by trying it."""
    caches = make_prompt_cache(model)
    mx.eval(model(mx.zeros((1, 1), mx.int32), cache=caches))
    kept = [cache for cache in caches if hasattr(cache, "to_quantized")]
    arrays = [x for _, x in tree_flatten([cache.state for cache in kept])]
    return {x.shape[-1] for x in arrays if isinstance(x, mx.array) and x.ndim == 4}


def run(job: Job, args: argparse.Namespace, comm: Communicator, screen: TextIO) -> None:
    """Generate; rank 0 shows the text as it is made and what it took."""
    to_screen = comm.rank == 0 and not args.json
    figures = to_screen and not args.quiet
    if figures:
        print("=" * 10, file=screen)
    text, tokens = "", []
    comm.traffic.reset()
    begin = time.perf_counter()
    for response in mlxtp.stream_generate(
        job.model, job.tokenizer, job.prompt, **job.options
    ):
        text += response.text
        tokens.append(response.token)
        if to_screen:
            print(response.text, end="", flush=True, file=screen)
    seconds = time.perf_counter() - begin
    if to_screen:
        print(file=screen)
    reports = comm.allgather_object(
        (tokens, mx.get_peak_memory() / 1e9, comm.traffic.seconds / seconds)
    )
    all_tokens, peaks_gb, collective_shares = zip(*reports, strict=True)
    for rank, others in enumerate(all_tokens):
        if others != tokens:
            raise RuntimeError(f"rank {rank} made other tokens than rank {comm.rank}")
    share = sum(collective_shares) / comm.size
    timed = f"{100 * share:.0f} % of the time, mean over ranks"
    if figures:
        print(
            "=" * 10 + "\n"
            f"Prompt: {response.prompt_tokens} tokens, "
            f"{response.prompt_tps:.3f} tokens-per-sec\n"
            f"Generation: {response.generation_tokens} tokens, "
            f"{response.generation_tps:.3f} tokens-per-sec\n"
            f"Peak memory: {max(peaks_gb):.3f} GB on the largest of {comm.size} ranks, "
            f"{min(peaks_gb):.3f} GB on the smallest\n"
            f"Collectives: {timed if comm.is_eager else 'in the graph, not timed'}",
            file=screen,
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
            "peak_memory_gb": {"largest": max(peaks_gb), "smallest": min(peaks_gb)},
            "collectives_share": share if comm.is_eager else None,
            "world_size": comm.size,
        }
        print(json.dumps(report), file=screen)


if __name__ == "__main__":
    main()
