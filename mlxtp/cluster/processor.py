"""What a host's processor is called, and which vector instructions it has."""

import platform
from dataclasses import dataclass
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")

# How the names of instructions begin that matrix products are made of.
VECTOR_INSTRUCTIONS = (
    *("avx", "fma", "f16c", "amx"),  # x86-64
    *("asimd", "sve", "sme", "bf16", "i8mm"),  # Arm
)


@dataclass(frozen=True)
class Processor:
    """A processor: its name, and its vector instructions in alphabetical order."""

    name: str
    instructions: tuple[str, ...]


def processor() -> Processor:
    """Ask Linux for this host's processor; elsewhere only its architecture is known."""
    try:
        return parse_cpuinfo(CPUINFO.read_text())
    except OSError:
        return parse_cpuinfo("")


def parse_cpuinfo(text: str) -> Processor:
    """Read the first processor of /proc/cpuinfo.

    Arm's processors have no name there. The board's is taken, as of a Raspberry Pi, or
    else the architecture and the number of the core's design.
    """
    fields: dict[str, str] = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    design = [platform.machine(), fields.get("CPU part", "")]
    flags = fields.get("flags") or fields.get("Features", "")
    return Processor(
        fields.get("model name")
        or fields.get("Model")
        or " ".join(filter(None, design)),
        tuple(sorted({f for f in flags.split() if f.startswith(VECTOR_INSTRUCTIONS)})),
    )
