"""What a model needs on some machines, whether it fits, and how fast it would be.

The whole program, from top to bottom.

python -m mlxtp.plan --model MODEL --ranks 5 --chip "M2 Ultra" --memory 64
python -m mlxtp.plan --model MODEL --measured FILE
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import inf
from pathlib import Path
from typing import Literal

from rich.console import Console

from mlxtp import job_options
from mlxtp.cluster import hostfile
from mlxtp.cluster.measured import Measured
from mlxtp.comm import launcher
from mlxtp.generation.choices import NGRAM
from mlxtp.job_options import Args, Conflicts, Limits
from mlxtp.partition.shares import Shares
from mlxtp.plan import hardware
from mlxtp.plan.auto import auto, longest
from mlxtp.plan.calibration import measured_machines
from mlxtp.plan.disk import Disk, disks
from mlxtp.plan.drafts import ACCEPTANCE, Draft, drafts
from mlxtp.plan.hardware import LINKS, TOPOLOGIES, Link, Machine, Network
from mlxtp.plan.model import GROUP_SIZE, PlannedModel, open_model
from mlxtp.plan.planning import MOST_TOKENS, Setting, plan
from mlxtp.plan.plot import plot
from mlxtp.plan.remedies import remedies
from mlxtp.plan.report import as_json, show

DEFAULT_CHIP = "M2 Ultra"
DEFAULT_MEMORY_GB = 64.0
DEFAULT_LINK = "thunderbolt4"
CONTEXT = 8192
# No model has as many heads, and more ranks would be slow to refuse.
MOST_RANKS = 1024

# What an option may be, beside `job_options.LIMITS`.
LIMITS: Limits = {
    "draft_model": (
        "a config.json, a folder, a Hugging Face repo, or ngram",
        lambda name: bool(name.strip()),
    ),
    "ranks": (f"from 1 to {MOST_RANKS}", lambda n: 1 <= n <= MOST_RANKS),
    "group_size": job_options.LIMITS["kv_group_size"],
    "context": (
        f"from 1 to {MOST_TOKENS}, or max",
        lambda n: n == "max" or 1 <= n <= MOST_TOKENS,
    ),
    "batch": (f"from 1 to {MOST_TOKENS}", lambda n: 1 <= n <= MOST_TOKENS),
    "acceptance": ("from 0 to 1", lambda x: 0 <= x <= 1),
}

CONFLICTS: Conflicts = [
    (
        lambda args: args.chip is not None and args.chips is not None,
        "--chip and --chips: give one of them",
    ),
    (
        lambda args: (
            args.group_size is not None
            and args.bits is None
            and args.draft_bits is None
        ),
        "--group-size {args.group_size} goes with --bits or --draft-bits",
    ),
    (
        lambda args: args.draft_bits is not None and args.draft_model in (None, NGRAM),
        "--draft-bits {args.draft_bits} is for a draft model: give --draft-model a "
        "model, or leave --draft-bits out",
    ),
    (
        lambda args: args.acceptance is not None and args.draft_model is None,
        "--acceptance {args.acceptance:g} is for drafts: give --draft-model, or leave "
        "--acceptance out",
    ),
    (
        lambda args: args.context != "max" and args.context * args.batch > MOST_TOKENS,
        "--context {args.context} and --batch {args.batch} are too many tokens: "
        f"wanted at most {MOST_TOKENS} together",
    ),
]


def main() -> None:
    """Run the program; exit with status 2 for a mistake on the command line."""
    launcher.replace_unprintable()
    try:
        run(parse(sys.argv[1:]))
    except (ValueError, OSError, OverflowError) as error:
        launcher.refuse("mlxtp.plan", error)


def parse(arguments: Sequence[str]) -> Args:
    """Parse the command line, and check it against the rules above.

    Raises: UsageError, that says what was given and what was wanted.
    """
    args = launcher.parse(_parser(), arguments)
    job_options.check(args, {**job_options.LIMITS, **LIMITS}, CONFLICTS)
    if args.group_size is None:
        args.group_size = GROUP_SIZE
    if args.acceptance is None:
        args.acceptance = ACCEPTANCE
    return args


def run(args: Args) -> None:
    """Make the plan that the command line asks for, and print it.

    Raises: ValueError that says what was given wrong.
    """
    setting = setting_of(args)
    with (
        open_model(args.model, args.bits, args.group_size) as model,
        _draft_model(args) as draft_model,
    ):
        even = Shares([1] * len(setting.machines))
        if args.context == "max":
            chosen = None if args.shares == "auto" else args.shares or even
            result = longest(model, setting, chosen)
        elif args.shares == "auto":
            result = auto(model, setting)
        else:
            result = plan(model, setting, args.shares or even)
        offered = list(remedies(result))
        kept: list[Disk] = []
        if args.spare:
            hosts = [machine.host for machine in setting.machines]
            kept = disks(model, result.shares, hosts)
        drafted: list[Draft] = []
        if args.draft_model:
            drafted = drafts(result, draft_model, args.acceptance)
        if args.plot:
            plot(result, args.plot)
        if args.json:
            print(json.dumps(as_json(result, offered, kept, drafted)))
        else:
            console = Console(width=None if sys.stdout.isatty() else 120)
            show(result, offered, console, kept, drafted, args.acceptance)


@contextmanager
def _draft_model(args: Args) -> Iterator[PlannedModel | None]:
    """The draft model; None without one, and for n-grams."""
    if args.draft_model in (None, NGRAM):
        yield None
        return
    how = args.draft_bits, args.group_size, "--draft-bits"
    with open_model(args.draft_model, *how) as model:
        yield model


def setting_of(args: Args) -> Setting:
    """Read machines and links from the command line, or from what doctor measured.

    Raises: ValueError for options that contradict each other.
    """
    measured = Measured.read(args.measured) if args.measured else None
    hosts = _hosts(args, measured)
    chosen = measured.ranks_of(hosts) if measured else []
    if measured:
        machines = _measured_machines(args, measured, chosen)
    else:
        machines = _published_machines(args, hosts)
    if args.shares not in (None, "auto") and len(args.shares) != len(hosts):
        raise ValueError(
            f"--shares gives {len(args.shares)} shares to {len(hosts)} ranks"
        )
    context = CONTEXT if args.context == "max" else args.context
    network = _network(args, len(hosts), measured, chosen)
    lists = args.chips, args.hostfile, measured, args.shares not in (None, "auto")
    is_listed = any(lists) or len(args.memory or []) > 1
    return Setting(tuple(machines), network, context, args.batch, is_listed)


def _hosts(args: Args, measured: Measured | None) -> list[str]:
    """A name for each rank."""
    if args.hostfile:
        named = hostfile.by_rank(hostfile.read(args.hostfile))
    elif measured:
        named = [host.host for host in measured.hosts]
    else:
        named = []
    if args.ranks is None:
        ranks = len(named) or len(args.chips or []) or len(args.shares or [])
        if args.shares == "auto" and not (named or args.chips):
            ranks = 0
        if not ranks:
            raise ValueError("say on how many ranks: --ranks, --hostfile or --measured")
    else:
        ranks = args.ranks
    if ranks > MOST_RANKS:
        raise ValueError(f"{ranks} ranks are named: wanted at most {MOST_RANKS}")
    if named and ranks > len(named):
        raise ValueError(f"--ranks is {ranks}, and {len(named)} hosts are named")
    return named[:ranks] or [f"host {number}" for number in range(1, ranks + 1)]


def _measured_machines(
    args: Args, measured: Measured, chosen: list[int]
) -> list[Machine]:
    if args.chip or args.chips or args.memory or args.fast_synch:
        raise ValueError(
            "--measured says what machines there are, and how long they take: leave "
            "--chip, --chips, --memory and --fast-synch out"
        )
    return measured_machines([measured.hosts[rank] for rank in chosen])


def _published_machines(args: Args, hosts: list[str]) -> list[Machine]:
    crossing = hardware.CROSSING_SECONDS
    if args.fast_synch:
        crossing = hardware.FAST_CROSSING_SECONDS
    chips = args.chips or [args.chip or DEFAULT_CHIP] * len(hosts)
    sizes = args.memory or [DEFAULT_MEMORY_GB]
    sizes = sizes * len(hosts) if len(sizes) == 1 else sizes
    for option, given in ("--chips", chips), ("--memory", sizes):
        if len(given) != len(hosts):
            raise ValueError(f"{option} gives {len(given)} for {len(hosts)} ranks")
    return [
        hardware.published(host, chip, size, crossing)
        for host, chip, size in zip(hosts, chips, sizes, strict=True)
    ]


def _network(
    args: Args, ranks: int, measured: Measured | None, chosen: list[int]
) -> Network:
    own = args.hop_us is not None or args.gbps is not None
    if own and (args.hop_us is None or args.gbps is None):
        raise ValueError("--hop-us and --gbps go together")
    if own and not (0 <= args.hop_us < inf and 0 < args.gbps < inf):
        raise ValueError("--hop-us is at least 0 µs, and --gbps above 0 Gb/s")
    if sum((own, args.link is not None, measured is not None)) > 1:
        raise ValueError(
            "--link, --hop-us with --gbps, and --measured exclude each other"
        )
    if own:
        link = Link(args.hop_us / 1e6, args.gbps * 1e9 / 8, "ring")
        return Network(ranks, link, args.topology or "ring")
    if measured:
        return hardware.network_of(measured, chosen, args.topology or "ring")
    link = LINKS[args.link or DEFAULT_LINK]
    return Network(ranks, link, args.topology or link.topology)


def _context(text: str) -> int | Literal["max"]:
    try:
        return "max" if text == "max" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: wanted a number of tokens, or max"
        ) from None


def _sizes(text: str) -> list[float]:
    try:
        sizes = [float(part) for part in text.split(",")]
    except ValueError:
        sizes = [0.0]
    if not all(0 < size < 1e6 for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r}: wanted GB, such as 64 or 64,128")
    return sizes


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    result = job_options.Parser(
        prog="mlxtp.plan",
        description="Say what each rank needs to run a model, whether it fits, and "
        "how fast it would be. All of it is calculated: no weights, no MPI and none of "
        "the machines are needed.",
    )
    result.add_argument(
        "--model",
        required=True,
        help="a folder, a Hugging Face repo, or with --bits a config.json alone",
    )
    result.add_argument("--bits", type=int, choices=[2, 3, 4, 5, 6, 8, 16],
        help="plan the config's model quantized with so many bits")  # fmt: skip
    result.add_argument("--group-size", type=int,
        help="group size of --bits and --draft-bits: 32, 64 or 128. "
        f"Default: {GROUP_SIZE}")  # fmt: skip
    hosts = result.add_argument_group("machines")
    hosts.add_argument("--ranks", type=int, help="number of ranks")
    hosts.add_argument(
        "--hostfile", type=Path, help="Open MPI's hostfile: one rank for each slot"
    )
    hosts.add_argument("--chip", help=f"the chip of all. Default: {DEFAULT_CHIP}")
    hosts.add_argument(
        "--chips", type=_names, metavar="A,B,…", help="the chip of each rank's host"
    )
    hosts.add_argument(
        "--memory",
        type=_sizes,
        metavar="GB[,GB…]",
        help="memory of all hosts, or of each rank's host, in Apple's GB. "
        f"Default: {DEFAULT_MEMORY_GB:g}",
    )
    hosts.add_argument(
        "--measured",
        type=Path,
        metavar="FILE",
        help="machines and links as python -m mlxtp.doctor --json FILE measured them",
    )
    hosts.add_argument("--fast-synch", action="store_true",
        help="machines are set to MLX_METAL_FAST_SYNCH=1, which MLX advises against: "
        "from the GPU to the CPU and back in "
        f"{1e6 * hardware.FAST_CROSSING_SECONDS:g} µs in place of "
        f"{1e6 * hardware.CROSSING_SECONDS:g}")  # fmt: skip
    links = result.add_argument_group("links")
    links.add_argument(
        "--link",
        choices=LINKS,
        help="kind of link; rdma is what --transport jaccl goes over, the others are "
        f"TCP's. Default: {DEFAULT_LINK}",
    )
    links.add_argument("--hop-us", type=float, metavar="US",
        help="time of a hop, one way, in µs")  # fmt: skip
    links.add_argument("--gbps", type=float, metavar="GBPS",
        help="rate of a link, one way, in Gb/s")  # fmt: skip
    links.add_argument("--topology", choices=TOPOLOGIES,
        help="of the links. Default: switch for 10gbe, ring for others")  # fmt: skip
    use = result.add_argument_group("use")
    use.add_argument("--context", type=_context, default=CONTEXT, metavar="TOKENS",
        help="tokens in the caches, or max: the most that fit, up to the model's own; "
        "with --shares auto of the shares with which most fit, if a token takes at "
        f"most 5 %% longer than with the fastest. Default: {CONTEXT}")  # fmt: skip
    use.add_argument("--batch", type=int, default=1,
        help="sequences at once; what 1, 2, 4, … of them get is shown. "
        "Default: 1")  # fmt: skip
    use.add_argument("--draft-model", metavar="MODEL",
        help="plan with drafts of this model too, or of ngram, without a "
        "model")  # fmt: skip
    use.add_argument("--draft-bits", type=int, choices=[2, 3, 4, 5, 6, 8, 16],
        help="as --bits, of the draft model")  # fmt: skip
    use.add_argument("--acceptance", type=float, metavar="A",
        help="how probably a drafted token is accepted, if those before it are. "
        f"Default: {ACCEPTANCE}")  # fmt: skip
    use.add_argument("--shares", type=job_options.shares, metavar="SHARES",
        help="shares of the ranks, such as 2,1,1,1,1, or for each kind of layer, such "
        "as attention=2,1,1/mlp=1,1,2, with queries= in place of attention= to share "
        "out query heads one by one; or auto: of those that fit, the fastest. "
        "Default: equal")  # fmt: skip
    use.add_argument("--spare", action="store_true",
        help="say what the hosts keep on disk, with the slices of the host before "
        "each, as programs with --spare do")  # fmt: skip
    result.add_argument("--json", action="store_true", help="print one JSON object")
    result.add_argument("--plot", type=Path, metavar="FILE.png",
        help="draw each rank's memory and the time of a token")  # fmt: skip
    return result


if __name__ == "__main__":
    main()
