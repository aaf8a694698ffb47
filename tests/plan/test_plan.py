"""What plan says of models and machines, and of mistakes on its command line."""

import json
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest
from hub_client import Client
from hub_server import Hub
from models import LLAMA_3_2_1B
from reference import MODELS
from rich.console import Console
from tiny import Tiny
from wide_models import WIDE

from mlxtp import Communicator
from mlxtp.cluster.units import GIB
from mlxtp.dryrun.requirements import needs
from mlxtp.partition.shares import Share
from mlxtp.plan.__main__ import main
from mlxtp.plan.disk import disks
from mlxtp.plan.hardware import LINKS, Network, published
from mlxtp.plan.model import model_of_config, open_model
from mlxtp.plan.planning import Setting, plan
from mlxtp.plan.report import as_json, show
from mlxtp.stories import PATH as STORIES

LLAMA_405B = WIDE["Llama 3.1 405B, 1 of 126 layers"][0] | {"num_hidden_layers": 126}


@pytest.mark.once
def test_llama_405b_from_its_config() -> None:
    with model_of_config("405B", LLAMA_405B, 4) as model:
        all_ranks = needs(model.build, [1] * 5, context=8192)
    token = all_ranks[0].dry_run.token
    assert sum(step.kind == "allreduce" for step in token) == 2 * 126 + 1
    assert sum(step.kind == "allgather" for step in token) == 1
    assert {s.part_bytes for s in token if s.kind == "allreduce"} == {32768}
    # 228 GB, of which a rank has a fifth; heads make it uneven.
    mean = sum(need.weights_bytes for need in all_ranks) / 5
    assert mean == pytest.approx(45.7e9, rel=0.002)
    # 516 kB a token at 16 bits: K and V of 8 heads of 128 in 126 layers.
    assert sum(need.cache_bytes for need in all_ranks) == 8192 * 516_096
    assert [need.owned.kv_heads for need in all_ranks] == [
        (k, k) for k in (2, 2, 2, 1, 1)
    ]
    assert sum(need.owned.columns[0] for need in all_ranks) == 53248


@pytest.mark.once
def test_a_config_alone_is_what_its_checkpoint_is(tmp_path: Path) -> None:
    tiny = MODELS["affine-4-128"]
    folder = tmp_path / "model"
    folder.mkdir()
    tiny.save(folder)
    quantization = tiny.quantization or {}
    config = folder / "config.json"
    with open_model(str(folder)) as model:
        of_headers = needs(model.build, [2, 1, 1], 20)
    size, bits = quantization["group_size"], quantization["bits"]
    content = json.loads(config.read_text()) | {"torch_dtype": "float32"}
    with model_of_config("alone", content, bits, size) as model:
        alone = needs(model.build, [2, 1, 1], 20)
    for need, wanted in zip(alone, of_headers, strict=True):
        assert need.weights_bytes == wanted.weights_bytes


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
    with model_of_config("1B", LLAMA_3_2_1B, 4) as model:
        usual = plan(model, setting(ranks=2), [1, 1])
        fast, slow = usual.setting.machines[0], published("slow", "M2 Max", 64)
        mixed = usual.setting.with_machines([fast, slow])
        waits = plan(model, mixed, [1, 1])
    assert slow.bytes_per_second * 2 == fast.bytes_per_second
    assert waits.decode.weights == pytest.approx(2 * usual.decode.weights, rel=1e-3)
    assert waits.decode.allreduces == usual.decode.allreduces


@pytest.mark.once
def test_the_parts_of_a_share_are_planned_and_shown() -> None:
    """Half of attention, a third of the MLP and a quarter of the vocabulary."""
    shares = [Share(1, 1, 1), Share(1, 2, 3)]
    with open_model(str(STORIES)) as model:
        result = plan(model, setting(context=64, ranks=2), shares)
    first, second = (need.owned for need in result.needs)
    assert first.kv_heads == second.kv_heads
    total = first.columns[0] + second.columns[0]
    assert first.columns[0] == pytest.approx(total / 3, abs=32)
    rows = first.vocabulary_rows + second.vocabulary_rows
    assert first.vocabulary_rows == rows // 4
    printed = StringIO()
    show(result, [], Console(file=printed, width=120))
    shown = "It fits (--shares attention=1,1/mlp=1,2/vocabulary=1,3)"
    assert shown in printed.getvalue()
    assert as_json(result, [])["shares"][1]["vocabulary"] == 3


@pytest.mark.once
def test_what_spare_slices_cost_on_disk(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What all ranks have is on a host once; hosts of two ranks keep two more."""
    with open_model(str(STORIES)) as model:
        apart = disks(model, [1, 1, 1], ["a", "b", "c"])
        two = disks(model, [1, 1, 1, 1], ["a", "a", "b", "b"])
        [alone] = disks(model, [1, 1], ["a", "a"])
    assert alone.spare_bytes == 0
    for disk, before in zip(apart, [apart[-1], *apart], strict=False):
        assert 0.9 * before.slices_bytes < disk.spare_bytes < before.slices_bytes
    assert two[0].spare_bytes > 0.9 * two[1].slices_bytes
    argv = ["plan", "--model", str(STORIES), "--context", "64", "--ranks", "3"]
    monkeypatch.setattr(sys, "argv", [*argv, "--spare"])
    main()
    assert "What each host keeps on disk with --spare, GB" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*argv, "--spare", "--json"])
    main()
    told = json.loads(capsys.readouterr().out)["disks"]
    assert [disk["spare_bytes"] for disk in told] == [d.spare_bytes for d in apart]


@pytest.mark.once
@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--ranks", "99"], "start at most 16 ranks"),
        ([], "say on how many ranks"),
        (["--ranks", "0"], "--ranks is 0: wanted from 1 to 1024"),
        (["--ranks", "1000000"], "--ranks is 1000000: wanted from 1 to 1024"),
        (["--ranks", "two"], "argument --ranks: invalid int value: 'two'"),
        (["--ranks", "2", "--model", " "], "--model is ' ': wanted a folder or a"),
        (["--ranks", "2", "--draft-model", ""], "--draft-model is '': wanted a"),
        (["--ranks", "2", "--chip", "Z80"], "known are M1 Max"),
        (["--ranks", "2", "--chips", "M2 Max"], "gives 1 for 2 ranks"),
        (["--ranks", "2", "--memory", "64,64,64"], "gives 3 for 2 ranks"),
        (["--ranks", "2", "--shares", "1,2,3"], "3 shares to 2 ranks"),
        (["--ranks", "2", "--hop-us", "9"], "go together"),
        (["--ranks", "2", "--hop-us", "-300", "--gbps", "9"], "--hop-us is at least 0"),
        (["--ranks", "2", "--hop-us", "nan", "--gbps", "9"], "--hop-us is at least 0"),
        (["--ranks", "2", "--hop-us", "9", "--gbps", "inf"], "--gbps above 0 Gb/s"),
        (["--ranks", "2", "--measured", "nowhere"], "not what mlxtp.doctor"),
        (["--ranks", "2", "--context", "x"], "'x': wanted a number of tokens, or max"),
        (["--ranks", "2", "--context", "0"], "--context is 0: wanted from 1 to"),
        (["--ranks", "2", "--context", "9999999999"], "wanted from 1 to 134217728"),
        (["--ranks", "2", "--batch", "1000000000"], "wanted from 1 to 134217728"),
        (["--ranks", "2", "--batch", "1000000"], "at most 134217728 together"),
        (
            ["--ranks", "2", "--context", "max", "--batch", "134217728"],
            "does not fit with any context",
        ),
        (
            ["--ranks", "2", "--draft-model", "ngram", "--acceptance", "2"],
            "--acceptance is 2.0: wanted from 0 to 1",
        ),
        (["--ranks", "2", "--acceptance", "0.5"], "--acceptance 0.5 is for drafts"),
        (["--ranks", "2", "--draft-bits", "4"], "--draft-bits 4 is for a draft model"),
        (
            ["--ranks", "2", "--draft-bits", "4", "--draft-model", "ngram"],
            "--draft-bits 4 is for a draft model",
        ),
        (["--ranks", "2", "--group-size", "32"], "--group-size 32 goes with --bits"),
        (
            ["--ranks", "2", "--bits", "4", "--group-size", "48"],
            "--group-size is 48: wanted 32, 64 or 128",
        ),
        (
            ["--chip", "M2 Max", "--chips", "M2 Max,M2 Max"],
            "--chip and --chips: give one of them",
        ),
        (
            ["--ranks", "9", "--link", "rdma", "--topology", "mesh"],
            "no mesh of 9 ranks",
        ),
        (["--hostfile", "nowhere"], "nowhere"),
        (["--ranks", "2", "--memory", "0.01", "--context", "max"], "with any context"),
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
@pytest.mark.parametrize("bits", [[], ["--bits", "4"]])
def test_a_mistake_in_a_model_of_the_hub_names_it_as_given(
    bits: list[str],
    comm: Communicator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Not by its folder in a cache."""
    (tmp_path / "model").mkdir()
    Tiny().save(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{}")
    given = ["mlxtp.plan", "--model", "org/model", "--ranks", "2", *bits]
    monkeypatch.setattr(sys, "argv", given)
    with Hub({"org/model": tmp_path / "model"}) as server:
        Client(comm, monkeypatch).use(server.url, tmp_path)
        with pytest.raises(SystemExit):
            main()
    assert capsys.readouterr().err == (
        "mlxtp.plan: error: org/model/config.json lacks model_type\n"
    )


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
    assert found["fits"]
    even = {"attention": 1, "mlp": 1, "vocabulary": 1, "by_query": False}
    assert found["shares"] == [even] * 5
    rows = [rank["vocabulary_rows"] for rank in found["ranks"]]
    assert rows == [205, 205, 205, 205, 204]
    assert found["modelled"]["this plan"]["decode_tokens_per_second"] > 0


@pytest.mark.once
def test_without_weights_it_asks_for_bits(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(LLAMA_3_2_1B))
    for model in str(config), str(tmp_path):
        with pytest.raises(ValueError, match="--bits"), open_model(model):
            pass
        with open_model(model, 4) as planned:
            assert planned.config["quantization"]["bits"] == 4


@pytest.mark.once
def test_of_a_draft_it_asks_for_its_own_bits(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = tmp_path / "1b.json"
    config.write_text(json.dumps(LLAMA_3_2_1B))
    given = ["plan", "--model", str(STORIES), "--ranks", "2"]
    monkeypatch.setattr(sys, "argv", [*given, "--draft-model", str(config)])
    with pytest.raises(SystemExit):
        main()
    said = capsys.readouterr().err
    assert said.endswith("is a config alone: say with how many --draft-bits\n")


@pytest.mark.once
def test_bits_that_quantize_nothing_are_refused() -> None:
    """Groups of 64, and no matrix with a row of 64."""
    config = LLAMA_3_2_1B | {
        **{"hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 1},
        **{"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 24},
    }
    with model_of_config("32", config, 4, 32):
        pass
    match = "no matrix has rows of whole groups of 64"
    with pytest.raises(ValueError, match=match), model_of_config("64", config, 4):
        pass


@pytest.mark.once
def test_no_ranks_are_offered_that_a_list_contradicts(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One host alone is faster; where memory is too little, more hosts would do."""
    hosts = tmp_path / "two"
    hosts.write_text("a\nb\n")
    lacking = ["--memory", "0.038", "--context", "16384"]

    def said(*words: str) -> str:
        given = ["plan", "--model", str(STORIES), "--context", "64", *words]
        monkeypatch.setattr(sys, "argv", given)
        main()
        return capsys.readouterr().out

    assert " (--ranks 1).\n" in said("--ranks", "2")
    more = "one more host like the last would do: "
    assert f"{more}--ranks 3\n" in said("--ranks", "2", *lacking)
    assert f"{more}3 ranks\n" in said("--hostfile", str(hosts), *lacking)
    for listed in (
        ["--chips", "M4 Max,M4 Max"],
        ["--ranks", "2", "--memory", "64,64"],
        ["--hostfile", str(hosts)],
        ["--shares", "2,1"],
    ):
        shown = said(*listed)
        assert "One host alone would be faster than all 2: " in shown
        assert "--ranks" not in shown


def command(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mlxtp.plan", *map(str, words)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
