"""What /proc/cpuinfo says, on machines that the tests do not run on."""

import platform

import pytest

from mlxtp.cluster.processor import parse_cpuinfo

pytestmark = pytest.mark.once

EPYC = """\
processor	: 0
vendor_id	: AuthenticAMD
model		: 1
model name	: AMD EPYC
flags		: fpu sse2 fma f16c avx2 avx

processor	: 1
model name	: AMD EPYC
flags		: fpu sse2 fma f16c avx2 avx
"""
RASPBERRY_PI = """\
processor	: 0
BogoMIPS	: 108.00
Features	: fp asimd evtstrm aes crc32 asimdhp asimddp
CPU implementer	: 0x41
CPU architecture: 8
CPU part	: 0xd0b

Revision	: c04170
Serial		: 0
Model		: Raspberry Pi 5 Model B Rev 1.0
"""
ARM_SERVER = """\
processor	: 0
Features	: fp asimd sve i8mm bf16 atomics
CPU implementer	: 0x41
CPU part	: 0xd40
"""


@pytest.mark.parametrize(
    ("cpuinfo", "name", "instructions"),
    [
        (EPYC, "AMD EPYC", ("avx", "avx2", "f16c", "fma")),
        (
            RASPBERRY_PI,
            "Raspberry Pi 5 Model B Rev 1.0",
            ("asimd", "asimddp", "asimdhp"),
        ),
        (
            ARM_SERVER,
            f"{platform.machine()} 0xd40",
            ("asimd", "bf16", "i8mm", "sve"),
        ),
        ("", platform.machine(), ()),
    ],
)
def test_processor(cpuinfo: str, name: str, instructions: tuple[str, ...]) -> None:
    processor = parse_cpuinfo(cpuinfo)
    assert (processor.name, processor.instructions) == (name, instructions)
