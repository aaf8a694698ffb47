"""Mistakes in the options of `mlxtp.generate`: one line from rank 0, and status 2.

The ranks of the tests run the program themselves; that mpirun ends with that status
is in test_generate.py.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zoo
from kept import kept
from mlx_lm.utils import load_tokenizer, save_config, save_model
from program import run
from reference import MODELS, heads, on_rank_0
from tiny import Tiny, save_tokenizer

from mlxtp import Communicator, loading
from mlxtp.shard import shard

TURNS = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
# Models that the options name, by what makes them special.
TINY = {
    "LLAMA": MODELS["llama-8-4-tied"],
    "SLIDING": MODELS["llama-sliding"],
    "WIDE-HEADS": Tiny(heads(8, 2, model_type="qwen3", head_dim=32)),
    "FEW-ROWS": Tiny({"vocab_size": 100, "eos_token_id": 99}),
}
TYPES = {
    "STATES": ("mamba2", {"hidden_size": 128}),  # as transformers wants it
    "LATENTS": ("deepseek_v3", {"kv_lora_rank": 64, "qk_rope_head_dim": 32}),
}
TEMPLATES = {
    "NO-SYSTEM": "{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('no system role here') }}{% endif %}" + TURNS,
    "RAISING": "{{ raise_exception('no user query') }}",
    "UNDEFINED": "{{ strftime_soon('%d') }}" + TURNS,
    "UNENDED": "{% if messages %}" + TURNS,
    "DIVIDING": "{{ 1 // 0 }}" + TURNS,
    "FIXED-TEXT": "{{ bos_token }}fixed text",
    "NO-PREFILL": "[user]{{ messages[0]['content'] }}",
}

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
    "kv groups": (["--kv-bits", "8"], "size 64. However the provided matrix has"),
    "other kv groups": (
        ["--model", "WIDE-HEADS", "--kv-bits", "8"],
        "leave out --kv-bits 8",
    ),
    "no quantized rotation": (
        [
            "--model",
            "WIDE-HEADS",
            "--kv-bits",
            "8",
            "--kv-group-size",
            "32",
            "--max-kv-size",
            "64",
        ],
        "Quantization NYI: leave out --max-kv-size 64 or leave out --kv-bits 8",
    ),
    "a draft on a rank that is none": (
        ["--draft-model", "stories-draft", "--draft-rank", "64"],
        "--draft-rank 64: wanted 0 to ",
    ),
    "a draft on one rank and on all": (
        ["--draft-model", "ngram", "--draft", "all", "--draft-rank", "0"],
        "--draft-rank 0 is for a draft on one rank, and --draft is all: leave one",
    ),
    "a rank for no draft model": (
        ["--draft-model", "ngram", "--draft-rank", "9"],
        "--draft-rank 9 says where a draft model is: give --draft-model a model",
    ),
    "a place for no draft model": (
        ["--draft", "split"],
        "--draft split says where a draft model is: give --draft-model a model",
    ),
    "as many drafts as nobody makes": (
        ["--num-draft-tokens", "many"],
        "'many': wanted auto, or a number",
    ),
    "a draft that is not there": (
        ["--draft-model", "./nowhere"],
        "there is no model folder ./nowhere",
    ),
    "a draft of other tokens": (
        ["--draft-model", "LLAMA"],
        "--draft-model knows 131 tokens, the model 1024: they do not fit together",
    ),
    "a draft with fewer rows": (
        ["--model", "LLAMA", "--draft-model", "FEW-ROWS"],
        "FEW-ROWS has an embedding of 100 rows, the model's tokens are 131",
    ),
    "a split draft with fewer rows": (
        ["--model", "LLAMA", "--draft-model", "FEW-ROWS", "--draft", "split"],
        "FEW-ROWS has an embedding of 100 rows, the model's tokens are 131",
    ),
    "quantized latents": (
        ["--model", "LATENTS", "--kv-bits", "4", "--kv-group-size", "32"],
        "leave out --kv-bits 4",
    ),
    "all of the vocabulary": (
        ["--model", "LLAMA", "--temp", "1", "--top-k", "131"],
        "but is 131: leave out --top-k 131",
    ),
    "all of it, of a cut model": (
        ["--model", "CUT", "--temp", "1", "--top-k", "131"],
        "but is 131: leave out --top-k 131",
    ),
    "more than the vocabulary": (
        [
            "--model",
            "LLAMA",
            "--temp",
            "1",
            "--min-p",
            ".1",
            "--min-tokens-to-keep",
            "132",
        ],
        "leave out --min-tokens-to-keep 132",
    ),
    "a token without a row": (
        ["--model", "NEW-TOKEN", "--prompt", "Hi<|new|>x"],
        "token 131 of the prompt ('<|new|>') is none of the model's",
    ),
    "a system prompt that the template refuses": (
        ["--model", "NO-SYSTEM", "--system-prompt", "x\ny"],
        "TemplateError: no system role here: leave out --system-prompt x y",
    ),
    "a template that raises": (
        ["--model", "RAISING"],
        "TemplateError: no user query: give --ignore-chat-template",
    ),
    "an undefined function": (
        ["--model", "UNDEFINED"],
        "UndefinedError: 'strftime_soon' is undefined: give --ignore-chat-template",
    ),
    "no template by its syntax": (["--model", "UNENDED"], "raises TemplateSyntaxError"),
    "a template that divides": (["--model", "DIVIDING"], "raises ZeroDivisionError"),
    "a template without the prompt": (
        ["--model", "FIXED-TEXT"],
        "the chat template leaves the prompt out: give --ignore-chat-template",
    ),
    "a template without the prefill": (
        ["--model", "NO-PREFILL", "--prefill-response", "y"],
        "leave out --prefill-response y",
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
    "an option in short for the prompt": (
        ["--prompt", "--max-tok", "--max-tokens", "2"],
        "--prompt/-p: expected one argument",
    ),
    "what the config says": (
        ["--quantize-activations"],
        "--quantize-activations: set quantize_activations in the model's config",
    ),
    "two prompts": (["--prompt", "a", "--prompt-file", "b"], "give one of them"),
    "no file": (["--prompt-file", "./x"], "--prompt-file: there is no file ./x"),
    "a folder as prompt": (["--prompt-file", "/"], "/ is no regular file"),
    "no cache": (["--prompt-cache-file", "x"], "x is no prompt cache of"),
}


def made(name: str, comm: Communicator) -> Path:
    """The folder of one of the models, for all ranks."""

    def make(folder: Path) -> Path:
        if name in TYPES:
            save_type(*TYPES[name], folder)
        elif name == "CUT":
            shard(made("LLAMA", Communicator()), [1] * comm.size, folder)
        else:
            TINY.get(name, Tiny()).save(folder)
        if name in TEMPLATES:
            file = folder / "tokenizer_config.json"
            config = json.loads(file.read_text())
            file.write_text(json.dumps({**config, "chat_template": TEMPLATES[name]}))
        if name == "NEW-TOKEN":
            tokenizer = load_tokenizer(folder)._tokenizer
            tokenizer.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
            tokenizer.save_pretrained(folder)
        return folder

    ranks = f"-{comm.size}" if name == "CUT" else ""
    return kept(comm, f"mistaken-{name}{ranks}", make)


def save_type(model_type: str, changes: dict[str, Any], folder: Path) -> None:
    """Save a tiny model of a type, with other entries in its config."""
    config = zoo.tiny_config(model_type) | changes
    model_class, args_class = zoo._get_classes(config)
    model = model_class(args_class.from_dict(config))
    save_model(folder, model)
    save_config(config, folder / "config.json")
    save_tokenizer(folder)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(
    mistake: str, comm: Communicator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing has been fetched or read when they are said."""

    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("the mistake was not seen before")

    monkeypatch.setattr(loading.Prepared, "load", load)
    arguments, message = MISTAKES[mistake]
    models = {"CUT", "NEW-TOKEN", *TINY, *TYPES, *TEMPLATES}
    arguments = [
        str(made(word, comm)) if word in models else word for word in arguments
    ]
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
    "empty": (empty, "there is no model*.safetensors in {}"),
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
