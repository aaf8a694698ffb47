"""What a model needs on some machines, whether it fits, and how fast it would be.

python -m mlxtp.plan --model MODEL --ranks 5 --chip "M2 Ultra" --memory 64
python -m mlxtp.plan --model MODEL --measured FILE
"""

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console

from mlxtp import options
from mlxtp.cluster import hostfile
from mlxtp.cluster.measured import Measured
from mlxtp.plan import hardware
from mlxtp.plan.auto import auto
from mlxtp.plan.calibration import of_measured
from mlxtp.plan.hardware import LINKS, TOPOLOGIES, Link, Machine, Network
from mlxtp.plan.opening import GROUP_SIZE, opened
from mlxtp.plan.planning import Setting, plan
from mlxtp.plan.plot import plot
from mlxtp.plan.remedies import remedies
from mlxtp.plan.report import as_json, show

DEFAULT_CHIP = "M2 Ultra"
DEFAULT_MEMORY_GB = 64.0
DEFAULT_LINK = "thunderbolt4"


def main() -> None:
    args = _parser().parse_args()
    try:
        run(args)
    except (ValueError, OSError) as error:
        print(f"mlxtp.plan: error: {error}", file=sys.stderr)
        sys.exit(2)


def run(args: argparse.Namespace) -> None:
    """From the command line to a plan, shown.

    Raises: ValueError with what was given wrong.
    """
    setting = setting_of(args)
    with opened(args.model, args.bits, args.group_size) as model:
        if args.shares == "auto":
            found = auto(model, setting)
        else:
            even = [1] * len(setting.machines)
            found = plan(model, setting, args.shares or even)
        would_do = list(remedies(found))
        if args.plot:
            plot(found, args.plot)
        if args.json:
            print(json.dumps(as_json(found, would_do)))
        else:
            show(found, would_do, Console(width=None if sys.stdout.isatty() else 120))


def setting_of(args: argparse.Namespace) -> Setting:
    """The machines and their links, as they are given or were measured."""
    for name in ("context", "batch", "group_size"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is below 1")
    measured = Measured.read(args.measured) if args.measured else None
    hosts = _hosts(args, measured)
    machines = _machines(args, hosts, measured)
    if args.shares not in (None, "auto") and len(args.shares) != len(hosts):
        raise ValueError(
            f"--shares gives {len(args.shares)} shares to {len(hosts)} ranks"
        )
    return Setting(
        tuple(machines), _network(args, len(hosts), measured), args.context, args.batch
    )


def _hosts(args: argparse.Namespace, measured: Measured | None) -> list[str]:
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
    if ranks < 1:
        raise ValueError(f"--ranks is {ranks}: wanted at least 1")
    if named and ranks > len(named):
        raise ValueError(f"--ranks is {ranks}, and {len(named)} hosts are named")
    return named[:ranks] or [f"host {number}" for number in range(1, ranks + 1)]


def _machines(
    args: argparse.Namespace, hosts: list[str], measured: Measured | None
) -> list[Machine]:
    if measured:
        if args.chip or args.chips:
            raise ValueError("--measured says what chips there are: leave --chip out")
        if len(measured.hosts) < len(hosts):
            raise ValueError(
                f"{args.measured} measures {len(measured.hosts)} ranks, wanted are "
                f"{len(hosts)}"
            )
        return of_measured(measured.hosts[: len(hosts)])
    chips = args.chips or [args.chip or DEFAULT_CHIP] * len(hosts)
    sizes = args.memory or [DEFAULT_MEMORY_GB]
    sizes = sizes * len(hosts) if len(sizes) == 1 else sizes
    for option, given in ("--chips", chips), ("--memory", sizes):
        if len(given) != len(hosts):
            raise ValueError(f"{option} gives {len(given)} for {len(hosts)} ranks")
    return [
        hardware.published(host, chip, size)
        for host, chip, size in zip(hosts, chips, sizes, strict=True)
    ]


def _network(
    args: argparse.Namespace, ranks: int, measured: Measured | None
) -> Network:
    own = args.hop_us is not None or args.gbps is not None
    if own and (args.hop_us is None or args.gbps is None or args.gbps <= 0):
        raise ValueError("--hop-us and --gbps go together, in µs and above 0 Gb/s")
    if sum((own, args.link is not None, measured is not None)) > 1:
        raise ValueError("--link, --hop-us with --gbps, and --measured exclude others")
    if own:
        link = Link(args.hop_us / 1e6, args.gbps * 1e9 / 8, "ring")
        return Network(ranks, link, args.topology or "ring")
    if measured:
        return hardware.network_of(measured, ranks, args.topology or "ring")
    link = LINKS[args.link or DEFAULT_LINK]
    return Network(ranks, link, args.topology or link.topology)


def _shares(text: str) -> str | list[int]:
    return text if text == "auto" else options.shares(text)


def _sizes(text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = [0.0]
    if not all(0 < size < 1e6 for size in found):
        raise argparse.ArgumentTypeError(f"{text!r}: wanted GB, such as 64 or 64,128")
    return found


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="mlxtp.plan",
        description="Say what each rank needs to run a model, whether it fits, and "
        "how fast it would be: modelled, without weights, MPI or the machines.",
    )
    result.add_argument(
        "--model",
        required=True,
        help="a folder, a Hugging Face repo, or with --bits a config.json alone",
    )
    result.add_argument("--bits", type=int, choices=[2, 3, 4, 5, 6, 8, 16],
        help="quantize the config's model with so many bits")  # fmt: skip
    result.add_argument("--group-size", type=int, default=GROUP_SIZE,
        help=f"of --bits. Default: {GROUP_SIZE}")  # fmt: skip
    hosts = result.add_argument_group("machines")
    hosts.add_argument("--ranks", type=int, help="how many")
    hosts.add_argument("--hostfile", type=Path, help="Open MPI's: as many as its slots")
    hosts.add_argument("--chip", help=f"of all. Default: {DEFAULT_CHIP}")
    hosts.add_argument("--chips", type=_names, metavar="A,B,…", help="of each")
    hosts.add_argument(
        "--memory",
        type=_sizes,
        metavar="GB[,GB…]",
        help=f"of all or each, in Apple's GB. Default: {DEFAULT_MEMORY_GB:g}",
    )
    hosts.add_argument(
        "--measured",
        type=Path,
        metavar="FILE",
        help="machines and links as python -m mlxtp.doctor --json FILE found them",
    )
    links = result.add_argument_group("links")
    links.add_argument("--link", choices=LINKS, help=f"Default: {DEFAULT_LINK}")
    links.add_argument("--hop-us", type=float, metavar="US", help="a hop, one way")
    links.add_argument("--gbps", type=float, metavar="GBPS", help="a link, one way")
    links.add_argument("--topology", choices=TOPOLOGIES,
        help="Default: switch for 10gbe, ring for others")  # fmt: skip
    use = result.add_argument_group("use")
    use.add_argument("--context", type=int, default=8192,
        help="tokens in the caches. Default: 8192")  # fmt: skip
    use.add_argument("--batch", type=int, default=1, help="sequences. Default: 1")
    use.add_argument("--shares", type=_shares,
        help="shares of the ranks, such as 2,1,1,1,1, or auto: the fastest that fit. "
        "Default: equal")  # fmt: skip
    result.add_argument("--json", action="store_true", help="print one JSON object")
    result.add_argument("--plot", type=Path, metavar="FILE.png",
        help="draw memory of each rank and the time of a token")  # fmt: skip
    return result


if __name__ == "__main__":
    main()
