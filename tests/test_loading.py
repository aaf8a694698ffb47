"""What `load` holds, and what it says of what it cannot load."""

import gc
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from reference import MODELS, greedy, on_rank_0, quantized
from safetensors import safe_open
from tiny import Tiny, edit_config, made_by_rank_0

import mlxtp
from mlxtp import Communicator
from mlxtp.checkpoint.memory import gpu_limit_bytes
from mlxtp.cluster import memory
from mlxtp.model.reading import read_slices
from mlxtp.model.skeleton import build
from mlxtp.sharding.decide import slice_table


def test_several_files_with_and_without_an_index(
    comm: Communicator, shared_path: Path
) -> None:
    folder = made_by_rank_0(Tiny(), shared_path / "several", comm)
    expected = on_rank_0(comm, lambda: greedy(mlx_lm.load(str(folder))[0]))
    if comm.rank == 0:
        _split_file(folder)
    comm.barrier()
    assert greedy(mlxtp.load(folder, comm)[0]) == expected
    comm.barrier()
    if comm.rank == 0:
        (folder / "model.safetensors.index.json").unlink()
    comm.barrier()
    assert greedy(mlxtp.load(folder, comm)[0]) == expected


@pytest.mark.once
def test_reading_collects_no_garbage(comm: Communicator, tmp_path: Path) -> None:
    """It would go through the objects of all imports. Afterwards all is as it was."""
    folder = made_by_rank_0(Tiny(), tmp_path / "tiny", comm)
    empty = build(folder)
    slices = slice_table(empty.model, [1]).slices(0)
    meanwhile = []
    read_slices(
        *(empty, empty.checkpoint, slices), lambda _: meanwhile.append(gc.isenabled())
    )
    assert len(meanwhile) == len(slices) and not any(meanwhile)
    assert gc.isenabled()
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError):
        read_slices(empty, empty.checkpoint, slices)
    assert gc.isenabled()


def _split_file(folder: Path) -> None:
    """Three files and an index, as Hugging Face publishes large models."""
    tensors = mx.load(str(folder / "model.safetensors"))
    names = sorted(tensors)
    weight_map = {}
    for number in range(3):
        file = f"model-{number + 1:05}-of-00003.safetensors"
        mine = {name: tensors[name] for name in names[number::3]}
        mx.save_safetensors(str(folder / file), mine, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(mine, file)
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


# What a person may get wrong -> what has to be said of it.
def _cut_short(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _break_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:8] + b"!" + file.read_bytes()[9:])


def _rewrite(folder: Path, change: Callable[[dict[str, mx.array]], None]) -> None:
    tensors = dict(mx.load(str(folder / "model.safetensors")))
    change(tensors)
    mx.eval(tensors)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)


DOWN = "model.layers.1.mlp.down_proj.weight"
MISTAKES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "there is no model folder"),
    "no config": (lambda d: (d / "config.json").unlink(), "there is no config.json in"),
    "no JSON": (lambda d: (d / "config.json").write_text("{"), "is no JSON"),
    "no object": (lambda d: (d / "config.json").write_text("[]"), "no JSON object"),
    "no type": (
        lambda d: (d / "config.json").write_text('{"hidden_size": 3}'),
        "config.json lacks model_type",
    ),
    "lacks keys": (
        lambda d: (d / "config.json").write_text('{"model_type": "llama"}'),
        "config.json lacks hidden_size, num_hidden_layers",
    ),
    "unknown type": (lambda d: edit_config(d, model_type="x"), "x not supported"),
    "type not split": (
        lambda d: edit_config(d, model_type="mamba"),
        "mlx-lm cannot build the model in",
    ),
    "wrong kind": (
        lambda d: edit_config(d, hidden_size="many"),
        "mlx-lm cannot build the model in",
    ),
    "carries code": (
        lambda d: edit_config(d, model_file="model.py"),
        "requires importing and running",
    ),
    "no weights": (
        lambda d: (d / "model.safetensors").rename(d / "weights"),
        r"no model\*\.safetensors in .*, and its index names model.* fetch the check",
    ),
    "cut short": (_cut_short, "is no whole safetensors file"),
    "broken header": (_break_header, "is no whole safetensors file"),
    "wrong shape": (
        lambda d: _rewrite(d, lambda t: t.update({DOWN: t[DOWN][:, 1:]})),
        rf"{re.escape(DOWN)} in .* \(64, 111\); the model's is \(64, 112\)",
    ),
    "missing": (
        lambda d: (_rewrite(d, lambda t: t.pop(DOWN)), _no_index(d)),
        f"lacks {re.escape(DOWN)}",
    ),
    "missing from its file": (
        lambda d: _rewrite(d, lambda t: t.pop(DOWN)),
        rf"lacks {re.escape(DOWN)}$",  # fetching the file again would not help
    ),
    "unexpected": (
        lambda d: (
            _rewrite(d, lambda t: t.update({"model.extra": t[DOWN]})),
            (d / "model.safetensors.index.json").unlink(),
        ),
        r"has model\.extra, which the model does not have",
    ),
    "no tokenizer": (
        lambda d: [file.unlink() for file in d.glob("tokenizer*")],
        "the tokenizer in .* does not load",
    ),
}


def _no_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").unlink()


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_get_one_message(
    mistake: str, comm: Communicator, shared_path: Path
) -> None:
    make, message = MISTAKES[mistake]
    folder = made_by_rank_0(Tiny(), shared_path / mistake.replace(" ", "-"), comm)
    if comm.rank == 0:
        make(folder)
    comm.barrier()
    with pytest.raises(ValueError, match=message):
        mlxtp.load(folder, comm)


def test_code_in_a_checkpoint_runs_only_when_trusted(
    comm: Communicator, shared_path: Path
) -> None:
    folder = made_by_rank_0(Tiny(), shared_path / "code", comm)
    trace = folder / "ran"
    if comm.rank == 0:
        (folder / "model.py").write_text(f"open({str(trace)!r}, 'w')")
        edit_config(folder, model_file="model.py")
    comm.barrier()
    with pytest.raises(ValueError, match="trust"):
        mlxtp.load(folder, comm)
    with pytest.raises(ValueError, match="an architecture of its own"):
        mlxtp.load(folder, comm, trust_remote_code=True)
    assert not trace.exists()


@pytest.mark.parametrize("shares", [[], [1, 0], [0] * 5, [-1]])
def test_shares_must_fit_the_world(
    shares: list[int], comm: Communicator, shared_path: Path
) -> None:
    folder = made_by_rank_0(Tiny(), shared_path / "shares", comm)
    with pytest.raises(ValueError, match="wanted one positive whole number"):
        mlxtp.load(folder, comm, shares=shares)


def test_too_little_memory_is_said_before_reading(
    comm: Communicator, shared_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made_by_rank_0(Tiny(), shared_path / "memory", comm)
    monkeypatch.setattr(memory, "available_bytes", lambda gpu_limit: 200_000)
    monkeypatch.setattr("mlxtp.checkpoint.tensors.StoredTensor.plan", None)
    with pytest.raises(ValueError, match=r"take 0\.\d GB, and it has 0\.0 GB free"):
        mlxtp.load(folder, comm)


def test_what_replaces_the_config(comm: Communicator, shared_path: Path) -> None:
    """As mlx-lm's `model_config` and `return_config` do."""
    folder = made_by_rank_0(Tiny(), shared_path / "replaced", comm)
    other = {"num_hidden_layers": 2, "rope_theta": 3.0, "rms_norm_eps": 0.5}

    def theirs() -> list[int]:
        return greedy(mlx_lm.load(str(folder), model_config=other)[0])

    expected = on_rank_0(comm, theirs)
    model, tokenizer, config = mlxtp.load(
        folder, comm, model_config=other, return_config=True
    )
    assert greedy(model) == expected != greedy(mlxtp.load(folder, comm)[0])
    assert tokenizer.decode(tokenizer.encode("a")) is not None
    assert other.items() <= config.items()
    model, config = mlxtp.load_model(folder, comm, model_config=other)
    assert greedy(model) == expected
    assert other.items() <= config.items()


@pytest.mark.once
def test_importing_it_imports_no_transformers() -> None:
    program = "import sys, mlxtp.loading; print('transformers' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


def test_available_memory_is_plausible() -> None:
    host = memory.host_memory()
    assert 10**8 < host.available_bytes <= host.total_bytes < 10**14
    assert memory.available_bytes(5) == 5  # where a GPU's limit decides
    assert 10**8 < memory.available_bytes(gpu_limit_bytes()) < 10**14


@pytest.mark.parametrize("base", ["llama-8-2-biases", "affine-4-64", "affine-tied"])
def test_lora(base: str, comm: Communicator, shared_path: Path) -> None:
    folder = made_by_rank_0(MODELS[base], shared_path / base, comm)
    adapter = shared_path / f"{base}-lora"
    keys = ["self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj"]
    keys += ["mlp.down_proj", "model.embed_tokens", "lm_head"]
    parameters = {"rank": 4, "scale": 8.0, "dropout": 0.0, "keys": keys}

    def make() -> list[int]:
        adapter.mkdir(exist_ok=True)
        model, _ = mlx_lm.load(str(folder))
        linear_to_lora_layers(model, 1, parameters)
        lora = {
            name: 0.3 * mx.random.normal(p.shape, key=mx.random.key(len(name)))
            for name, p in tree_flatten(model.parameters())
            if "lora" in name
        }
        assert any("embed" in name for name in lora)
        mx.save_safetensors(str(adapter / "adapters.safetensors"), lora)
        (adapter / "adapter_config.json").write_text(
            json.dumps({"num_layers": 1, "lora_parameters": parameters})
        )
        return greedy(mlx_lm.load(str(folder), adapter_path=str(adapter))[0])

    expected = on_rank_0(comm, make)
    plain = on_rank_0(comm, lambda: greedy(mlx_lm.load(str(folder))[0]))
    model, _ = mlxtp.load(folder, comm, adapter_path=adapter)
    assert greedy(model) == expected != plain


def test_full_weights_as_an_adapter(comm: Communicator, shared_path: Path) -> None:
    folder = made_by_rank_0(Tiny(), shared_path / "full-base", comm)
    other = made_by_rank_0(Tiny(seed=1), shared_path / "full-other", comm)
    if comm.rank == 0:
        tensors = mx.load(str(other / "model.safetensors"))
        mlp = {name: x for name, x in tensors.items() if "mlp" in name}
        mx.save_safetensors(str(other / "adapters.safetensors"), mlp)
        (other / "adapter_config.json").write_text('{"fine_tune_type": "full"}')
    comm.barrier()
    expected = on_rank_0(
        comm, lambda: greedy(mlx_lm.load(str(folder), adapter_path=str(other))[0])
    )
    assert greedy(mlxtp.load(folder, comm, adapter_path=other)[0]) == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "there is no adapter_config.json in"),
        ({"fine_tune_type": "dora"}, "describes no adapter"),
        ({"num_layers": 1}, "describes no adapter"),
        ({"fine_tune_type": "full"}, r"adapters\.safetensors is not there"),
    ],
)
def test_mistakes_in_adapters(
    config: object, message: str, comm: Communicator, shared_path: Path
) -> None:
    folder = made_by_rank_0(Tiny(), shared_path / "base", comm)
    adapter = shared_path / "broken-adapter"
    if comm.rank == 0:
        shutil.rmtree(adapter, ignore_errors=True)
        adapter.mkdir()
        if config is not None:
            (adapter / "adapter_config.json").write_text(json.dumps(config))
    comm.barrier()
    with pytest.raises(ValueError, match=message):
        mlxtp.load(folder, comm, adapter_path=adapter)


def test_parameters_are_read_as_they_lie(comm: Communicator, shared_path: Path) -> None:
    """To the bit, also where a rank's heads end inside a quantization group."""
    folder = made_by_rank_0(quantized(3, 128), shared_path / "affine-3-128", comm)
    empty = build(folder)
    table = slice_table(empty.model, [1] * comm.size)
    model, _ = mlxtp.load(folder, comm)
    held = dict(tree_flatten(model.parameters()))
    name = "model.layers.0.self_attn.o_proj.scales"
    part = table.slices(comm.rank)[name]
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        whole = file.get_tensor(name)
    columns = part.spans.indices
    mine = held["model.layers.0.self_attn.o_proj.linear.scales"]
    assert np.array_equal(np.array(mine), whole[:, columns])
