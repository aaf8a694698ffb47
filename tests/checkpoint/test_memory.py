"""What a rank holds and reads while it loads, as benchmarks/load.py measures it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from needs import needs

pytestmark = [
    pytest.mark.once,
    needs("linux"),
]

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "load.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [["--layers", "2"], ["--layers", "4", "--bits", "4"]], ids=" ".join
)
def test_a_rank_holds_and_reads_its_slices(options: list[str], tmp_path: Path) -> None:
    """On checkpoints of 380 and 170 MB, with five ranks.

    A rank that held or read one whole embedding besides would exceed its limits.
    """
    command = [
        sys.executable,
        str(BENCHMARK),
        "--folder",
        str(tmp_path / "m"),
        "--turns",
        "0",
        "--vocabulary",
        "32768",
        *options,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sum(file.stat().st_size for file in (tmp_path / "m").glob("*")) > 170e6
    for rank in json.loads(done.stdout.splitlines()[-1])["ranks"]:
        # What holds slices, one block for columns, and the tokenizer's own.
        assert rank["peak_mb"] <= 1.2 * rank["slices_mb"] + 64
        # Beside the slices: headers, config, tokenizer, parts of a page twice.
        assert rank["read_mb"] <= 1.3 * rank["floor_mb"]
