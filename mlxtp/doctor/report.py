"""What rank 0 shows: the machines, the links between them, and what is wrong."""

from collections.abc import Sequence
from typing import TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlxtp.cluster.measured import Collective
from mlxtp.doctor.findings import Fault, Findings
from mlxtp.doctor.links import Ring

# Wide enough for the table, whatever mpirun makes of the terminal.
WIDTH = 110


class Report:
    """Writes to `file`, without colours: mpirun passes on whatever looks like a
    terminal."""

    def __init__(self, file: TextIO) -> None:
        self._console = Console(
            file=file, width=WIDTH, no_color=True, highlight=False, force_terminal=False
        )

    def machines(self, found: Findings) -> None:
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
        for it, speed, ahead in zip(
            found.machines, found.speeds, found.clocks, strict=True
        ):
            table.add_row(
                str(it.rank),
                it.host,
                it.facts.chip,
                _gb(it.facts.memory_bytes),
                _gb(it.facts.available_bytes),
                _gb(it.limit_bytes) + (" set" if it.facts.limit_set_mb else ""),
                f"{it.disk_free_bytes / 1e9:.0f}",
                f"{speed.bytes_per_second / 1e9:.2f}",
                f"{speed.flops / 1e9:.1f}",
                f"{ahead:+.3f}",
                it.address,
            )
        self._console.print(table)
        self._line(f"Versions: {_versions(found)}")
        self._line(f"Transports: {_transports(found)}")

    def links(self, found: Findings, ring: Ring | None) -> None:
        if not found.pairs:
            return
        table = Table(box=None, pad_edge=False)
        table.add_column("link", no_wrap=True)
        for name in "hops", "ms one way", "GB/s", "MTU":
            table.add_column(name, justify="right")
        table.add_column("from port")
        table.add_column("to port")
        for a, b in found.pairs:
            link, path = found.links.get((a, b)), found.paths[a, b]
            here, there = found.port(a, b), found.port(b, a)
            rate = link and link.bytes_per_second
            mtus = {str(port.mtu) for port in (here, there) if port}
            table.add_row(
                f"{found.machines[a].host} - {found.machines[b].host}",
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

    def collectives(self, measured: Sequence[Collective], how: str) -> None:
        if not measured:
            return
        sizes = sorted({it.part_bytes for it in measured})
        table = Table(box=None, pad_edge=False)
        table.add_column("ms, parts of")
        for size in sizes:
            table.add_column(_size(size), justify="right")
        for name in dict.fromkeys(it.name for it in measured):
            row = {it.part_bytes: it.seconds for it in measured if it.name == name}
            table.add_row(name, *(f"{1e3 * row[size]:.3f}" for size in sizes))
        self._line("")
        self._console.print(table)
        self._line(how.splitlines()[0])

    def tokens(self, seconds: Sequence[float]) -> None:
        self._line(
            "Computing a token of the model that ships, beside collectives: "
            f"{1e3 * min(seconds):.1f} to {1e3 * max(seconds):.1f} ms"
        )

    def faults(self, found: Sequence[Fault]) -> None:
        for number, fault in enumerate(found, 1):
            if number == 1:
                self._line("")
            self._line(f"{number}. {fault.where}: {fault.what}")
            self._line(f"   {fault.mend}")

    def end(self, found: Sequence[Fault]) -> None:
        self._line("")
        things = f"{len(found)} thing{'s' * (len(found) > 1)}"
        self._line(f"{things} to mend, see above." if found else "All is well.")

    def note(self, words: str) -> None:
        self._line(words)

    def _line(self, words: str) -> None:
        """As it is: commands are copied, so no line is broken."""
        self._console.print(Text(words), soft_wrap=True)
        self._console.file.flush()


def _versions(found: Findings) -> str:
    words = []
    for name in found.hosts[0].versions:
        versions = dict.fromkeys(it.versions[name] for it in found.hosts)
        words.append(f"{name} {' / '.join(versions)}")
    return ", ".join(words)


def _transports(found: Findings) -> str:
    words = []
    for name in found.hosts[0].lacks:
        lacking = [it.host for it in found.hosts if it.lacks[name] is not None]
        if not lacking:
            words.append(name)
        elif len(lacking) < len(found.hosts):
            words.append(f"{name} (not on {', '.join(lacking)})")
    return ", ".join(words)


def _gb(nbytes: int | None) -> str:
    return "-" if nbytes is None else f"{nbytes / 1e9:.1f}"


def _size(nbytes: int) -> str:
    kib = nbytes / 1024
    if kib < 1:
        return f"{nbytes} B"
    return f"{kib:g} KiB" if kib < 1024 else f"{kib / 1024:g} MiB"
