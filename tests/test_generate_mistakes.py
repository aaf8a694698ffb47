"""Mistakes in the options of `mlxtp.generate`: one line from rank 0, and status 2.

The ranks of the tests run the program themselves; that mpirun ends with that status
is in test_generate.py.
"""

from pathlib import Path

import pytest
from program import run
from reference import MODELS
from tiny import made_by_rank_0

from mlxtp import Communicator

MISTAKES: dict[str, tuple[list[str], str]] = {
    "no such folder": (["--model", "./nowhere"], "there is no model folder nowhere"),
    "a file": (["--model", __file__], "is a file; give the folder it is in"),
    "no number": (["--max-tokens", "many"], "invalid int value: 'many'"),
    "out of range": (["--temp", "-1"], "--temp is -1.0: wanted at least 0"),
    "empty prompt": (["--prompt", ""], "--prompt is '': wanted some text"),
    "shares that are none": (["--shares", "1,x"], "'1,x': wanted whole numbers"),
    "no object": (["--chat-template-config", "[1]"], "'[1]': wanted a JSON object"),
    "images": (["--image", "cat.png"], "--image: mlxtp splits language models"),
    "no template": (["--system-prompt", "Be kind"], "need a chat template"),
    "kv groups": (["--kv-bits", "8"], "it does not divide the model's heads of 12"),
    "cache and draft": (
        ["--prompt-cache-file", "x", "--draft-model", "y"],
        "holds no cache of the --draft-model",
    ),
    "no quantized rotation": (
        ["--kv-bits", "8", "--max-kv-size", "64"],
        "mlx-lm does not quantize what --max-kv-size makes",
    ),
    "drafts in a window": (
        ["--model", "SLIDING", "--draft-model", "SLIDING"],
        "--draft-model: a sliding window cannot take drafts back",
    ),
    "no such transport": (["--transport", "pigeon"], "invalid choice: 'pigeon'"),
    "no such algorithm": (["--allreduce", "two-shot"], "invalid choice: 'two-shot'"),
    "no time at all": (["--timeout", "0"], "--timeout is 0.0: wanted above 0"),
    "MLX has its own algorithm": (
        ["--transport", "ring", "--allreduce", "ring"],
        "--allreduce and --wire go with --transport mpi",
    ),
    "no cache": (["--prompt-cache-file", "x"], "x is no prompt cache of"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(mistake: str, comm: Communicator, shared_path: Path) -> None:
    arguments, message = MISTAKES[mistake]
    if "SLIDING" in arguments:
        folder = made_by_rank_0(
            MODELS["llama-sliding"], shared_path / "llama-sliding", comm
        )
        arguments = [str(folder) if word == "SLIDING" else word for word in arguments]
    done = run("mlxtp.generate", arguments, comm)
    assert done.statuses == [2] * comm.size
    assert done.stdouts == [""] * comm.size
    assert done.stderrs[0].count("error:") == 1
    assert message in done.stderrs[0].splitlines()[-1]
    assert done.stderrs[1:] == [""] * (comm.size - 1)


def test_help_is_shown_once(comm: Communicator) -> None:
    done = run("mlxtp.generate", ["--help"], comm)
    assert done.statuses == [0] * comm.size
    assert [text.count("usage: ") for text in done.stdouts] == [
        1,
        *[0] * (comm.size - 1),
    ]
    assert done.stderrs == [""] * comm.size
