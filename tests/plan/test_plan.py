"""plan's bytes are those that ranks then hold, for every model type."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
import zoo
from every_type import REPRESENTATIVES
from metal_kernels import use_plain_operations
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import save_config, save_model
from models import LLAMA_3_2_1B
from pyramid import sweep
from reference import MODELS
from tiny import made_by_rank_0
from wide_models import WIDE

import mlxtp
from mlxtp import Communicator
from mlxtp.dryrun.passes import RehearsingCommunicator
from mlxtp.loading import load_model
from mlxtp.plan.__main__ import main
from mlxtp.plan.hardware import GIB, LINKS, Network, published
from mlxtp.plan.opening import of_config, opened
from mlxtp.plan.planning import Setting, plan
from mlxtp.plan.requirements import need, needs
from mlxtp.sharding.decide import slice_table
from mlxtp.stories import PATH as STORIES

use_plain_operations()

LLAMA_405B = WIDE["Llama 3.1 405B, 1 of 126 layers"][0] | {"num_hidden_layers": 126}

RUNNABLE = [t for t in zoo.model_types() if t not in zoo.UNAVAILABLE]
# The first rank and the last own most and least: one of them, in turns.
RANKS = [(0, 1), (1, 2), (0, 3), (4, 5), (0, 8)]
# Types whose caches differ: whole, sliding, latent, of states, of several kinds.
CACHES = [
    *("llama", "gemma3_text", "gpt_oss", "deepseek_v3", "mamba2", "qwen3_next"),
    *("recurrent_gemma", "jamba", "longcat_flash", "afm7"),
]


def made(model_type: str, folder: Path) -> Path:
    folder.mkdir(parents=True)
    model, config = zoo.build(model_type)
    save_model(folder, model)
    save_config(config, folder / "config.json")
    return folder


def held(model: nn.Module) -> int:
    return sum(array.nbytes for _, array in tree_flatten(model.parameters()))


@pytest.mark.once
@pytest.mark.parametrize(
    "model_type", sweep([*RUNNABLE, *zoo.VARIANTS], REPRESENTATIVES)
)
def test_bytes_are_those_that_a_rank_loads(
    model_type: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    folder = made(model_type, tmp_path / "model")
    with opened(str(folder)) as found:
        whole = found.build().model
        for rank, size in RANKS:
            # With it a process reads what that rank of such a world reads.
            alone = RehearsingCommunicator(rank, size)
            try:
                table = slice_table(whole, [1] * size)
            except ValueError:  # fewer heads, or columns, than ranks
                with pytest.raises(ValueError):
                    load_model(folder, alone)
                continue
            model, _ = load_model(folder, alone)
            planned = need(found, table, rank, context=9)
            assert planned.weights_bytes == held(model), (rank, size)


@pytest.mark.parametrize(
    "name", ["llama-8-2-biases", "affine-4-128", "qwen3-64-4-tied"]
)
def test_every_rank_of_mpirun_holds_what_was_planned(
    name: str, comm: Communicator, shared_path: Path
) -> None:
    folder = made_by_rank_0(MODELS[name], shared_path / f"plan-{name}", comm)
    model, _ = mlxtp.load(folder, comm)
    with opened(str(folder)) as found:
        planned = needs(found, [1] * comm.size, context=9)
    assert planned[comm.rank].weights_bytes == held(model)


@pytest.mark.once
@pytest.mark.parametrize("model_type", sweep(CACHES, CACHES[:6]))
def test_caches_are_as_long_as_planned(model_type: str, tmp_path: Path) -> None:
    """Longer than a step of 256 tokens, by pieces as mlx-lm reads them."""
    folder, context = made(model_type, tmp_path / "model"), 300
    model, _ = load_model(folder, Communicator())
    cache = make_prompt_cache(model)
    for tokens in context - 1, 1:
        model(mx.zeros((1, tokens), mx.int32), cache=cache)
        mx.eval([kept.state for kept in cache])
    with opened(str(folder)) as found:
        [planned] = needs(found, [1], context)
    for kept, of_plan in zip(cache, planned.rehearsed.caches, strict=True):
        assert kept.nbytes == of_plan.nbytes


@pytest.mark.once
def test_llama_405b_from_its_config() -> None:
    with of_config("405B", LLAMA_405B, 4) as found:
        all_ranks = needs(found, [1] * 5, context=8192)
    token = all_ranks[0].rehearsed.token
    assert sum(step.kind == "allreduce" for step in token) == 2 * 126 + 1
    assert sum(step.kind == "allgather" for step in token) == 1
    assert {s.part_bytes for s in token if s.kind == "allreduce"} == {32768}
    # 228 GB, of which a rank has a fifth; heads make it uneven.
    mean = sum(it.weights_bytes for it in all_ranks) / 5
    assert mean == pytest.approx(45.7e9, rel=0.002)
    # 516 kB a token at 16 bits: K and V of 8 heads of 128 in 126 layers.
    assert sum(it.cache_bytes for it in all_ranks) == 8192 * 516_096
    assert [it.owned.kv_heads for it in all_ranks] == [(k, k) for k in (2, 2, 2, 1, 1)]
    assert sum(it.owned.columns[0] for it in all_ranks) == 53248


@pytest.mark.once
def test_a_config_alone_is_what_its_checkpoint_is(tmp_path: Path) -> None:
    tiny = MODELS["affine-4-128"]
    folder = tmp_path / "model"
    folder.mkdir()
    tiny.save(folder)
    quantization = tiny.quantization or {}
    config = folder / "config.json"
    with opened(str(folder)) as found:
        of_headers = needs(found, [2, 1, 1], 20)
    size, bits = quantization["group_size"], quantization["bits"]
    content = json.loads(config.read_text()) | {"torch_dtype": "float32"}
    with of_config("alone", content, bits, size) as found:
        alone = needs(found, [2, 1, 1], 20)
    assert [it.weights_bytes for it in alone] == [it.weights_bytes for it in of_headers]


def setting(context: int = 8192, ranks: int = 5, memory_gb: float = 64) -> Setting:
    machines = [published(f"host {k}", "M2 Ultra", memory_gb) for k in range(ranks)]
    network = Network(ranks, LINKS["thunderbolt4"], "ring")
    return Setting(tuple(machines), network, context, 1)


@pytest.mark.once
def test_a_limit_is_three_quarters_of_the_memory() -> None:
    assert published("here", "M2 ultra", 64).limit_bytes == 48 * GIB
    with pytest.raises(ValueError, match="known are M1 Max"):
        published("here", "M9", 64)


@pytest.mark.once
def test_the_slowest_rank_decides() -> None:
    """A rank at half the speed makes all wait for what it reads."""
    with of_config("1B", LLAMA_3_2_1B, 4) as found:
        usual = plan(found, setting(ranks=2), [1, 1])
        fast, slow = usual.setting.machines[0], published("slow", "M2 Max", 64)
        mixed = usual.setting.with_machines([fast, slow])
        waits = plan(found, mixed, [1, 1])
    assert slow.bytes_per_second * 2 == fast.bytes_per_second
    assert waits.decode.weights == pytest.approx(2 * usual.decode.weights, rel=1e-3)
    assert waits.decode.allreduces == usual.decode.allreduces


@pytest.mark.once
@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--ranks", "99"], "start at most 16 ranks"),
        ([], "say on how many ranks"),
        (["--ranks", "0"], "wanted at least 1"),
        (["--ranks", "2", "--chip", "Z80"], "known are M1 Max"),
        (["--ranks", "2", "--chips", "M2 Max"], "gives 1 for 2 ranks"),
        (["--ranks", "2", "--memory", "64,64,64"], "gives 3 for 2 ranks"),
        (["--ranks", "2", "--shares", "1,2,3"], "3 shares to 2 ranks"),
        (["--ranks", "2", "--hop-us", "9"], "go together"),
        (["--ranks", "2", "--measured", "nowhere"], "not what mlxtp.doctor"),
        (["--ranks", "2", "--context", "0"], "--context is below 1"),
        (["--hostfile", "nowhere"], "nowhere"),
        (["--ranks", "2", "--plot", "no.such"], "--plot no.such"),
    ],
)
def test_a_mistake_is_one_message(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ["mlxtp.plan", "--model", str(STORIES), "--context", "256"]
    monkeypatch.setattr(sys, "argv", [*given, *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    assert ended.value.code == 2 and said.out == ""
    [line] = said.err.splitlines()
    assert line.startswith("mlxtp.plan: error: ") and message in line


@pytest.mark.once
def test_the_command_line(tmp_path: Path) -> None:
    """A table for people, JSON for programs, a picture."""
    picture = tmp_path / "plan.png"
    given = ["--model", "mlxtp/stories/model", "--hostfile", "hostfiles/studio5"]
    shown = command(*given, "--context", "256", "--plot", picture)
    assert shown.returncode == 0 and "It fits (--shares 1,1,1,1,1)" in shown.stdout
    assert "studio5" in shown.stdout and "Modelled speed" in shown.stdout
    assert picture.read_bytes()[1:4] == b"PNG"
    found = json.loads(command(*given, "--context", "256", "--json").stdout)
    assert found["fits"] and found["shares"] == [1] * 5
    assert [rank["words"] for rank in found["ranks"]] == [205, 205, 205, 205, 204]
    assert found["modelled"]["this plan"]["decode_tokens_per_second"] > 0


@pytest.mark.once
def test_without_weights_it_asks_for_bits(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(LLAMA_3_2_1B))
    for model in str(config), str(tmp_path):
        with pytest.raises(ValueError, match="--bits"), opened(model):
            pass
        with opened(model, 4) as found:
            assert found.config["quantization"]["bits"] == 4


def command(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mlxtp.plan", *map(str, words)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
