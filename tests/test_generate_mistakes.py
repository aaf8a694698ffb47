"""Mistakes in the options of `mlxtp.generate`: one line from rank 0, and status 2.

The ranks of the tests run the program themselves; that mpirun ends with that status
is in test_generate.py.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
from program import run
from reference import MODELS, on_rank_0
from tiny import Tiny, made_by_rank_0

from mlxtp import Communicator

MISTAKES: dict[str, tuple[list[str], str]] = {
    "no such folder": (["--model", "./nowhere"], "there is no model folder ./nowhere"),
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
    "no name": (["--model", ""], "--model is '': wanted a folder or a Hugging Face"),
    "nobody's home": (["--model", "~nobody_here/x"], "no model folder ~nobody_here/x"),
    "bytes that are no text": (["--prompt", "\udcff"], "wanted some text in UTF-8"),
    "two lines": (["--model", "./a\nb"], "there is no model folder ./a b"),
    "two prompts": (["--prompt", "a", "--prompt-file", "b"], "give one of them"),
    "no file": (["--prompt-file", "./x"], "--prompt-file: there is no file ./x"),
    "a folder as prompt": (["--prompt-file", "/"], "/ is no regular file"),
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


def empty(folder: Path) -> None:
    """Leave it as it is."""


def write(**files: str) -> Callable[[Path], None]:
    """Fill a folder with files, whose names have `__` for a dot."""

    def fill(folder: Path) -> None:
        for name, content in files.items():
            (folder / name.replace("__", ".")).write_text(content)

    return fill


def saved(*removed: str, **changed: str) -> Callable[[Path], None]:
    """Save a tiny model without some files, and with others in their place."""

    def fill(folder: Path) -> None:
        Tiny().save(folder)
        for name in removed:
            (folder / name).unlink()
        write(**changed)(folder)

    return fill


# What a folder holds, and what is said of it: {} stands for its path.
FOLDERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty": (empty, "no model*.safetensors in {}"),
    "no config": (saved("config.json"), "there is no config.json in {}"),
    "a list": (saved(config__json="[1]"), "{}/config.json holds no JSON object"),
    "no JSON": (saved(config__json="{"), "{}/config.json is no JSON"),
    "no type": (saved(config__json="{}"), "{}/config.json lacks model_type"),
    "a broken tokenizer": (
        saved(tokenizer__json="{}"),
        "the tokenizer in {} does not load: ",
    ),
    "GGUF": (
        write(a__gguf="GGUF"),
        "{} holds weights of GGUF; mlxtp reads safetensors",
    ),
    "PyTorch": (write(pytorch_model__bin=""), "{} holds weights of PyTorch; mlxtp"),
    "an adapter": (write(adapter_config__json="{}"), "{} is an adapter: --model wants"),
}
ADAPTERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "nothing": (empty, "there is no adapter_config.json in {}"),
    "a model": (
        saved(),
        "{} is a model and no adapter: there is no adapter_config.json in it",
    ),
    "PEFT": (
        write(adapter_config__json='{"peft_type": "LORA"}', adapter_model__bin=""),
        "{} is an adapter of PEFT, and mlxtp reads those of mlx_lm.lora: merge it",
    ),
    "no weights": (
        write(adapter_config__json='{"fine_tune_type": "full"}'),
        "{}/adapters.safetensors is not there",
    ),
    "no layers": (
        write(adapter_config__json="{}", adapters__safetensors=""),
        "{}/adapter_config.json describes no adapter of this model: KeyError",
    ),
}


@pytest.mark.parametrize("option", ["--model", "--adapter-path"])
def test_folders_that_are_something_else(
    option: str, comm: Communicator, shared_path: Path
) -> None:
    """Named as they were given, in one line; nothing of others is shown."""
    for case, (fill, message) in (FOLDERS if option == "--model" else ADAPTERS).items():
        folder = shared_path / f"{option} {case}"

        def make(folder: Path = folder, fill: Callable[[Path], None] = fill) -> None:
            folder.mkdir()
            fill(folder)

        on_rank_0(comm, make)
        done = run("mlxtp.generate", [option, str(folder), "--quiet"], comm)
        assert done.statuses == [2] * comm.size, case
        assert done.stdouts == [""] * comm.size
        said = f"mlxtp.generate: error: {message.format(folder)}"
        assert done.stderrs[0].startswith(said), done.stderrs[0]
        assert done.stderrs[0].count("\n") == 1, done.stderrs[0]
        assert done.stderrs[1:] == [""] * (comm.size - 1)


def test_help_is_shown_once(comm: Communicator) -> None:
    done = run("mlxtp.generate", ["--help"], comm)
    assert done.statuses == [0] * comm.size
    assert [text.count("usage: ") for text in done.stdouts] == [
        1,
        *[0] * (comm.size - 1),
    ]
    assert done.stderrs == [""] * comm.size
