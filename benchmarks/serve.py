"""The server: tokens a second of many clients, and how they wait for each other.

A model with random weights, in float32, of eight layers, 512 wide, unless --layers and
--hidden say otherwise. What is measured:

  (nothing)  clients at once, beside mlx-lm's own server over MPI
  --stream   one client, beside `mlxtp.stream_generate` on as many ranks
  --links    eight clients beside one, where the links decide: in the lab
  --gaps     the gaps between others' tokens while a long prompt is read, and how late
             the first token of that prompt comes
  --drafts   clients of the model that ships, with drafts (--draft-model) and without:
             in the lab
  --soak     for some minutes 64 clients, of which some hang up, stall or send rubbish:
             whether every answer is the one that its request gets alone, whether
             memory is flat, and what is left running

Sides take turns, each turn a server of its own. Clients stream completions, greedily.
"""

import argparse
import asyncio
import itertools
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from decode import SMALL, spread
from ranks import HOSTFILE, measured, print_on_rank_0
from serving import (
    Answer,
    Server,
    client,
    in_float32,
    load,
    make_model,
    prompt,
    served,
    stream,
)
from soak import processes, soak

# How many tokens others have got before the long prompt comes.
WARM_TOKENS = 30


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    modes = parser.add_mutually_exclusive_group()
    for name in MODES:
        modes.add_argument(f"--{name}", dest="mode", action="store_const", const=name)
    parser.set_defaults(mode="clients")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--hostfile", type=Path)
    parser.add_argument("--folder", type=Path, help="keep the checkpoint here")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512, help="a multiple of 64")
    parser.add_argument("--number", type=int, nargs="+", help="of clients; 1 4 8 16")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--long-tokens", type=int, default=2000, help="--gaps")
    parser.add_argument(
        "--draft-model", default="stories-draft", help="--drafts: what drafts"
    )
    parser.add_argument("--num-draft-tokens", default="auto", help="--drafts")
    parser.add_argument("--others", type=int, default=4, help="--gaps: who wait")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=5.0, help="--soak")
    parser.add_argument("--idle-seconds", type=float, default=60.0, help="--soak")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print_on_rank_0(stream_on_ranks(args))
        return
    with tempfile.TemporaryDirectory() as temporary:
        args.folder = args.folder or Path(temporary) / "model"
        if args.mode == "drafts":  # answers are compared, in float32
            args.folder = in_float32(args.folder)
            print(json.dumps(drafts_mode(args)))
            return
        changes = {
            "num_hidden_layers": args.layers,
            "hidden_size": args.hidden,
            "intermediate_size": 4 * args.hidden,
            "head_dim": args.hidden // SMALL["num_attention_heads"],
        }
        make_model(args.folder, {**SMALL, **changes})
        print(json.dumps(MODES[args.mode](args)))


def turns(args: argparse.Namespace, turn: Callable[[int], Any]) -> list[Any]:
    """Take all turns; each has numbers of prompts of its own."""
    return [turn(1000 * number) for number in range(args.turns)]


def speeds(
    server: Server, args: argparse.Namespace, number: int
) -> dict[int, tuple[float, int]]:
    """Tokens a second of each number of clients at once, and how many failed."""
    result = {}
    for clients in args.number:
        texts = [prompt(number + i, args.prompt_tokens) for i in range(clients)]
        number += clients
        rate, _, failed = asyncio.run(load(server.url, texts, args.max_tokens))
        result[clients] = rate, failed
    return result


def clients_mode(args: argparse.Namespace) -> dict[str, Any]:
    """Clients at once, beside mlx-lm's server."""
    args.number = args.number or [1, 4, 8, 16]

    def turn(number: int) -> dict[str, dict[int, tuple[float, int]]]:
        result = {}
        for side in ("mlxtp", "mlx-lm"):
            with served(side, args) as server:
                result[side] = speeds(server, args, number)
        return result

    all_turns = turns(args, turn)
    print(f"{heading(args)}, tokens a second of all clients, and requests that failed")
    print(f"{'clients':>7}{'mlxtp':>28}{'mlx-lm':>28}{'mlxtp / mlx-lm':>22}")
    result: dict[str, Any] = {"mode": "clients", "ranks": args.ranks}
    for clients in args.number:
        cells = []
        for side in ("mlxtp", "mlx-lm"):
            rates = [turn[side][clients][0] for turn in all_turns]
            failed = sum(turn[side][clients][1] for turn in all_turns)
            cells.append(f"{spread(rates)} {failed}")
        ratios = [
            turn["mlxtp"][clients][0] / max(turn["mlx-lm"][clients][0], 1e-9)
            for turn in all_turns
        ]
        print(f"{clients:7}{cells[0]:>28}{cells[1]:>28}{spread(ratios):>22}")
        result[f"{clients}, mlxtp / mlx-lm"] = median(ratios)
    return result


def stream_mode(args: argparse.Namespace) -> dict[str, Any]:
    """One client, beside `mlxtp.stream_generate`."""

    def turn(number: int) -> tuple[float, float]:
        text = prompt(number, args.prompt_tokens)
        with served("mlxtp", args) as server:
            _, [answer], _ = asyncio.run(load(server.url, [text], args.max_tokens))
        options = ["--side", text, "--folder", args.folder]
        options += ["--max-tokens", args.max_tokens]
        hostfile = args.hostfile or HOSTFILE
        loop = measured(args.ranks, __file__, *options, hostfile=hostfile)
        return answer.tokens_per_second, loop["tokens_per_second"]

    rates, loops = zip(*turns(args, turn), strict=True)
    ratios = [rate / loop for rate, loop in zip(rates, loops, strict=True)]
    print(f"{heading(args)}, tokens a second behind the first")
    print(f"server, one client  {spread(rates)}")
    print(f"stream_generate     {spread(loops)}")
    print(f"the ratio           {spread(ratios)}")
    return {"mode": "stream", "ranks": args.ranks, "ratio": median(ratios)}


def stream_on_ranks(args: argparse.Namespace) -> dict[str, float]:
    """`stream_generate`, run by every rank; `args.side` is the prompt."""
    import mlxtp

    model, tokenizer = mlxtp.load(args.folder, mlxtp.Communicator.world())
    list(mlxtp.stream_generate(model, tokenizer, prompt(-1, 8), max_tokens=4))
    times = [
        time.perf_counter()
        for _ in mlxtp.stream_generate(
            model, tokenizer, args.side, max_tokens=args.max_tokens
        )
    ]
    return {"tokens_per_second": (len(times) - 1) / (times[-1] - times[0])}


def links_mode(args: argparse.Namespace) -> dict[str, Any]:
    """Many clients beside one, on one server."""
    args.number = args.number or [1, 8]

    def turn(number: int) -> dict[int, tuple[float, int]]:
        with served("mlxtp", args) as server:
            return speeds(server, args, number)

    all_turns = turns(args, turn)
    print(f"{heading(args)}, tokens a second of all clients, and beside one client's")
    result: dict[str, Any] = {"mode": "links", "ranks": args.ranks}
    first = args.number[0]
    for clients in args.number:
        rates = [turn[clients][0] for turn in all_turns]
        ratios = [turn[clients][0] / turn[first][0] for turn in all_turns]
        failed = sum(turn[clients][1] for turn in all_turns)
        print(f"{clients:7}{spread(rates):>28}{spread(ratios):>22}  {failed} failed")
        result[f"{clients} / {first}"] = median(ratios)
    return result


def story(number: int) -> str:
    """The beginning of a story; another number gives another one."""
    who = ("girl", "boy", "cat", "dog", "bird", "bear", "frog", "fish")[number % 8]
    name = ("Mia", "Tom", "Lily", "Ben", "Sue")[number // 8 % 5]
    where = ("by the sea", "in a big house", "near the park")[number // 40 % 3]
    return f"Once upon a time there was a {who} named {name}, who lived {where}. One"


def drafts_mode(args: argparse.Namespace) -> dict[str, Any]:
    """With drafts and without, beside each other; answers have to be the same."""
    args.number = args.number or [1, 8]
    with_drafts = ["--draft-model", args.draft_model]
    with_drafts += ["--num-draft-tokens", args.num_draft_tokens]
    sides = {"plain": [], "drafts": with_drafts}
    rates: dict[tuple[str, int], list[float]] = defaultdict(list)
    for turn in range(args.turns):
        texts: dict[str, list[str]] = {}
        for side, args.options in sides.items():
            texts[side], number = [], 1 + 9 * turn
            with served("mlxtp", args) as server:
                for clients in args.number:
                    prompts = [story(number + i) for i in range(clients)]
                    number += clients
                    # What is measured first is what drafts cost.
                    for _ in range(2):
                        rate, answers, failed = asyncio.run(
                            load(server.url, prompts, args.max_tokens)
                        )
                    assert not failed
                    rates[side, clients].append(rate)
                    texts[side] += [answer.text for answer in answers]
        assert texts["plain"] == texts["drafts"], "drafts have changed an answer"
    print(
        f"the model that ships, {args.ranks} ranks, drafts of {args.draft_model}: "
        f"tokens a second of all clients; medians of {args.turns} turns (min-max)"
    )
    print(f"{'clients':>7}{'without':>28}{'with drafts':>28}{'with / without':>22}")
    result: dict[str, Any] = {"mode": "drafts", "ranks": args.ranks}
    for clients in args.number:
        plain, drafted = (rates[side, clients] for side in sides)
        ratios = [a / b for a, b in zip(drafted, plain, strict=True)]
        cells = f"{spread(plain):>28}{spread(drafted):>28}{spread(ratios):>22}"
        print(f"{clients:7}{cells}")
        result[f"{clients}, with / without"] = median(ratios)
    return result


def gaps_mode(args: argparse.Namespace) -> dict[str, Any]:
    """How others wait while a long prompt is read, and how that one waits for them."""

    def turn(number: int) -> tuple[float, float]:
        with served("mlxtp", args) as server:
            return asyncio.run(gaps(server.url, args, number))

    ratios, lateness = zip(*turns(args, turn), strict=True)
    print(
        f"{heading(args)}, {args.others} clients decode while a prompt of "
        f"{args.long_tokens} tokens is read"
    )
    print(f"95th percentile of the gaps meanwhile / median before  {spread(ratios)}")
    print(f"its time to first token / that of one alone            {spread(lateness)}")
    return {
        "mode": "gaps",
        "ranks": args.ranks,
        "gaps": median(ratios),
        "first token": median(lateness),
    }


async def gaps(url: str, args: argparse.Namespace, number: int) -> tuple[float, float]:
    """One turn: the ratio of the gaps, and that of the times to first token."""
    numbers = itertools.count(number)
    async with client(url) as http:
        alone = await stream(http, prompt(next(numbers), args.long_tokens), 2)
        others = [Answer(0.0) for _ in range(args.others)]
        decoding = [
            asyncio.create_task(
                stream(
                    http,
                    prompt(next(numbers), args.prompt_tokens),
                    args.long_tokens,
                    other,
                )
            )
            for other in others
        ]
        while min(len(other.times) for other in others) < WARM_TOKENS:
            await asyncio.sleep(0.05)
        begun = time.perf_counter()
        beside = await stream(http, prompt(next(numbers), args.long_tokens), 2)
        last = beside.times[0]
        while min(other.times[-1] for other in others) < last:
            await asyncio.sleep(0.05)
        for task in decoding:
            assert not task.done(), "the others' answers end too early"
            task.cancel()
        await asyncio.gather(*decoding, return_exceptions=True)
    before, meanwhile = [], []
    for other in others:
        # The first tokens came while prompts of the others were read.
        for start, stop in itertools.pairwise(other.times[WARM_TOKENS // 3 :]):
            if stop <= begun:
                before.append(stop - start)
            elif start < last:
                meanwhile.append(stop - start)
    ratio = float(np.percentile(meanwhile, 95)) / median(before)
    return ratio, beside.first_seconds / alone.first_seconds


def soak_mode(args: argparse.Namespace) -> dict[str, Any]:
    """Many clients, some of them bad ones, for some minutes."""
    clients = args.number[0] if args.number else 64
    with served("mlxtp", args) as server:
        result = soak(server, clients, 60 * args.minutes, args.idle_seconds)
        started = processes(server)
    result["status at the end"] = server.process.returncode
    result["processes left"] = sum(process.is_running() for process in started)
    for name, value in result.items():
        print(f"{name:40} {value}")
    return {"mode": "soak", "ranks": args.ranks, **result}


def heading(args: argparse.Namespace) -> str:
    return (
        f"{args.layers} layers, {args.ranks} ranks, prompts of {args.prompt_tokens} "
        f"tokens, {args.max_tokens} generated; medians of {args.turns} turns (min-max)"
    )


MODES: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "clients": clients_mode,
    "stream": stream_mode,
    "links": links_mode,
    "drafts": drafts_mode,
    "gaps": gaps_mode,
    "soak": soak_mode,
}


if __name__ == "__main__":
    main()
