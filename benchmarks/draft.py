"""Tokens a second with drafts, beside those without.

The model that ships, in float32, and its draft. Where cables decide:

    launch/lab up --delay-ms 5
    launch/lab run python benchmarks/draft.py --hostfile hostfiles/studio5
    launch/lab down

and on shared memory, where drafts are to be left out when they do not pay:

    python benchmarks/draft.py

A job loads once and takes turns: each text with every draft, one behind another. Three
texts: a story, told greedily; one that repeats itself, two sentences over and over; and
one that does not, whose tokens are drawn. The small model repeats nothing by itself: in
the second a processor of logits lets nothing but the sentences be drawn, for all alike.
"""

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

from ranks import HOSTFILE, measured, print_on_rank_0

SENTENCES = (
    "Mia went to the market and found a red apple, two pears and an old lamp. "
    "She gave the lamp to the king, who said that it was his. "
)
# Text -> its prompt, and the temperature at which it is drawn.
TEXTS: dict[str, tuple[str, float]] = {
    "story": ("Once upon a time", 0.0),
    "repeats": (SENTENCES, 0.0),
    "does not": ("One day", 1.0),
}
SEED = 7
DRAFTS = ("none", "stories-draft", "ngram")
WARM_TOKENS = 8

Turn = dict[str, dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=5)
    parser.add_argument("--hostfile", type=Path, default=HOSTFILE)
    parser.add_argument("--max-tokens", type=int, default=200)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--texts", nargs="+", choices=TEXTS, default=list(TEXTS))
    parser.add_argument("--drafts", nargs="+", choices=DRAFTS[1:], default=DRAFTS[1:])
    parser.add_argument("--draft", default="auto", help="one, all, split or auto")
    parser.add_argument("--num-draft-tokens", default="auto")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        print_on_rank_0(measure(args))
        return
    options = ["--rank", "--max-tokens", args.max_tokens, "--turns", args.turns]
    options += ["--texts", *args.texts, "--drafts", *args.drafts]
    options += ["--draft", args.draft, "--num-draft-tokens", args.num_draft_tokens]
    report(args, measured(args.ranks, __file__, *options, hostfile=args.hostfile))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All turns, run by every rank."""
    import mlx.core as mx
    from mlx_lm.sample_utils import make_sampler

    import mlxtp
    from mlxtp import loading
    from mlxtp.generation import draft_model
    from mlxtp.stories import PATH

    comm = mlxtp.Communicator.world()
    target = loading.prepare(PATH, comm)
    tokenizer = target.load_tokenizer()
    prepared = {
        name: draft_model.prepare(name, args.draft, None, target, tokenizer)
        for name in args.drafts
    }
    model = target.load()
    model.set_dtype(mx.float32)
    tokenizer.eos_token_ids = set()
    drafts: dict[str, Any] = {"none": None}
    drafts |= {name: draft.load() for name, draft in prepared.items()}
    number = args.num_draft_tokens
    options: dict[str, Any] = {
        "num_draft_tokens": number if number == "auto" else int(number),
        "seed": SEED,
    }

    repeated = tokenizer.encode(SENTENCES)

    def repeat(tokens: mx.array, logits: mx.array) -> mx.array:
        """Let only the token be drawn that the sentences go on with."""
        token = repeated[len(tokens) % len(repeated)]
        return mx.where(mx.arange(logits.shape[-1]) == token, logits, -mx.inf)

    def run(text: str, draft: str, tokens: int) -> dict[str, Any]:
        prompt, temperature = TEXTS[text]
        processors = {"logits_processors": [repeat]} if text == "repeats" else {}
        responses = list(
            mlxtp.stream_generate(
                *(model, tokenizer, prompt),
                sampler=make_sampler(temperature),
                max_tokens=tokens,
                draft_model=drafts[draft],
                **processors,
                **options,
            )
        )
        return {
            "tokens_per_second": responses[-1].generation_tps,
            "tokens": [said.token for said in responses],
            "drafted": sum(said.from_draft for said in responses),
        }

    for draft in drafts:
        run(args.texts[0], draft, WARM_TOKENS)
    turns = [
        {
            text: {draft: run(text, draft, args.max_tokens) for draft in drafts}
            for text in args.texts
        }
        for _ in range(args.turns)
    ]
    where = {
        name: "no model"
        if not prepared[name].places
        else ("all" if drafts[name].root is None else f"rank {drafts[name].root}")
        for name in args.drafts
    }
    return {"turns": turns, "where": where}


def report(args: argparse.Namespace, measured: dict[str, Any]) -> None:
    turns: list[dict[str, Turn]] = measured["turns"]
    print(
        f"{args.ranks} ranks, {args.max_tokens} tokens, medians of {args.turns} turns "
        f"(min-max), tokens a second; drafts: {measured['where']}"
    )
    result: dict[str, Any] = {"where": measured["where"]}
    for text in args.texts:
        for draft in ("none", *args.drafts):
            sides = [turn[text][draft] for turn in turns]
            plain = [turn[text]["none"] for turn in turns]
            speeds = [side["tokens_per_second"] for side in sides]
            ratios = [
                a["tokens_per_second"] / b["tokens_per_second"]
                for a, b in zip(sides, plain, strict=True)
            ]
            same = all(side["tokens"] == plain[0]["tokens"] for side in sides)
            print(
                f"{text:10} {draft:14} {spread(speeds):>24}  x none "
                f"{spread(ratios):>18}, {sides[0]['drafted']} of "
                f"{len(sides[0]['tokens'])} drafted, "
                f"{'the same' if same else 'OTHER'} tokens"
            )
            result[f"{text}, {draft} / none"] = median(ratios)
            result[f"{text}, {draft}, same tokens"] = same
    print(json.dumps(result))


def spread(values: list[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


if __name__ == "__main__":
    main()
