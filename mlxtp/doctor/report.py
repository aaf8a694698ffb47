"""What rank 0 shows: the machines, the links between them, and what is wrong."""

from collections.abc import Sequence
from typing import TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlxtp.cluster.measured import Collective
from mlxtp.cluster.units import binary_size, gigabytes
from mlxtp.doctor.findings import Fault, Findings
from mlxtp.doctor.links import Ring

# Wide enough for the tables: what mpirun says of the terminal's width is not reliable.
WIDTH = 110


class Report:
    """Writes tables and faults to a file.

    Without colours: under mpirun, a pipe may look like a terminal.
    """

    def __init__(self, file: TextIO) -> None:
        """Write to `file`."""
        self._console = Console(
            file=file, width=WIDTH, no_color=True, highlight=False, force_terminal=False
        )

    def machines(self, findings: Findings) -> None:
        """Show a row for each rank's machine, versions, transports, what differs."""
        columns = [
            ("rank", "host", "chip"),
            ("memory GB", "free", "for a model", "disk GB"),
            ("GB/s", "GFLOPS", "clock s", "address"),
        ]
        table = Table(box=None, pad_edge=False)
        for name in (name for group in columns for name in group):
            is_text = name in ("host", "chip", "address")
            table.add_column(
                name,
                justify="left" if is_text else "right",
                no_wrap=True,
                overflow="ellipsis",
                max_width=30 if name == "chip" else None,
            )
        for machine, speed, ahead in zip(
            findings.machines, findings.speeds, findings.clocks, strict=True
        ):
            facts = machine.facts
            table.add_row(
                str(machine.rank),
                machine.host,
                machine.arithmetic.chip,
                gigabytes(facts.memory_bytes),
                gigabytes(facts.available_bytes),
                gigabytes(machine.limit_bytes) + (" set" if facts.limit_set_mb else ""),
                gigabytes(machine.disk_free_bytes, 0),
                f"{speed.bytes_per_second / 1e9:.2f}",
                f"{speed.flops / 1e9:.1f}",
                f"{ahead:+.3f}",
                machine.address,
            )
        self._console.print(table)
        self._line(f"Versions: {_versions(findings)}")
        self._line(f"Transports: {_transports(findings)}")
        if unlike := findings.unlike_machines():
            self._line(unlike)

    def links(self, findings: Findings, ring: Ring | None) -> None:
        """Show a row for each pair of ranks, and the figures of the ring."""
        if not findings.pairs:
            return
        table = Table(box=None, pad_edge=False)
        table.add_column("link", no_wrap=True)
        for name in "hops", "ms one way", "GB/s", "MTU":
            table.add_column(name, justify="right")
        table.add_column("from port")
        table.add_column("to port")
        for a, b in findings.pairs:
            link, path = findings.links.get((a, b)), findings.paths[a, b]
            here, there = findings.port(a, b), findings.port(b, a)
            rate = link and link.bytes_per_second
            mtus = {str(port.mtu) for port in (here, there) if port}
            table.add_row(
                f"{findings.machines[a].host} - {findings.machines[b].host}",
                "-" if path.stopped else str(path.hops),
                f"{1e3 * link.latency_seconds:.3f}" if link else "-",
                f"{rate / 1e9:.3f}" if rate else "-",
                " / ".join(sorted(mtus)),
                str(here or "-"),
                str(there or "-"),
            )
        self._line("")
        self._console.print(table)
        if ring:
            self._line(
                f"Around all ranks in order: {1e3 * ring.seconds:.3f} ms; all to the "
                f"next at once: {ring.bytes_per_second / 1e9:.3f} GB/s, the slowest"
            )

    def collectives(self, measured: Sequence[Collective], transport: str) -> None:
        """Show what each collective took for each size; `transport` is named below."""
        if not measured:
            return
        sizes = sorted({one.part_bytes for one in measured})
        table = Table(box=None, pad_edge=False)
        table.add_column("ms, parts of")
        for size in sizes:
            table.add_column(binary_size(size), justify="right")
        for name in dict.fromkeys(one.name for one in measured):
            row = {one.part_bytes: one.seconds for one in measured if one.name == name}
            table.add_row(name, *(f"{1e3 * row[size]:.3f}" for size in sizes))
        self._line("")
        self._console.print(table)
        self._line(transport)

    def tokens(self, seconds: Sequence[float]) -> None:
        """Show what a token took beside collectives, on all ranks."""
        self._line(
            "Computing a token of the model that ships, beside collectives: "
            f"{1e3 * min(seconds):.1f} to {1e3 * max(seconds):.1f} ms"
        )

    def faults(self, faults: Sequence[Fault]) -> None:
        """Show all faults, each with what fixes it."""
        for number, fault in enumerate(faults, 1):
            if number == 1:
                self._line("")
            self._line(f"{number}. {fault.where}: {fault.what}")
            self._line(f"   {fault.fix}")

    def end(self, faults: Sequence[Fault]) -> None:
        """Show the last line: how many faults there are."""
        self._line("")
        count = f"{len(faults)} fault{'s' * (len(faults) > 1)}"
        self._line(f"{count} to fix, see above." if faults else "All is well.")

    def note(self, text: str) -> None:
        """Show a line of text."""
        self._line(text)

    def _line(self, text: str) -> None:
        """Write a line and break it nowhere: people copy commands."""
        self._console.print(Text(text), soft_wrap=True)
        self._console.file.flush()


def _versions(findings: Findings) -> str:
    parts = []
    for name in findings.hosts[0].versions:
        versions = dict.fromkeys(machine.versions[name] for machine in findings.hosts)
        parts.append(f"{name} {' / '.join(versions)}")
    return ", ".join(parts)


def _transports(findings: Findings) -> str:
    """The transports that some host has, and which hosts lack them."""
    parts = []
    for name in findings.hosts[0].lacks:
        lacking = [m.host for m in findings.hosts if m.lacks[name] is not None]
        if not lacking:
            parts.append(name)
        elif len(lacking) < len(findings.hosts):
            parts.append(f"{name} (not on {', '.join(lacking)})")
    return ", ".join(parts)
