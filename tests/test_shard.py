"""A checkpoint cut for several ranks: loaded, verified, joined, and misused."""

import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import mlx_lm
import published
import pytest
from hub_client import Client
from hub_server import Hub
from pyramid import sweep
from reference import greedy, on_rank_0
from safetensors import safe_open
from tiny import Tiny, made_by_rank_0

import mlxtp
from mlxtp import Communicator
from mlxtp.checkpoint import writing
from mlxtp.checkpoint.cut import (
    MANIFEST,
    Origin,
    begin,
    keep_shares,
    manifest_of,
    rank_folders,
    stamp,
    write_json,
    write_text,
)
from mlxtp.checkpoint.verify import drop_damaged
from mlxtp.cluster.measured import Host
from mlxtp.comm.errors import UsageError
from mlxtp.dryrun import chosen
from mlxtp.model.skeleton import build
from mlxtp.model.sources import uncuttable
from mlxtp.partition.shares import Shares
from mlxtp.shard import main, report, shard
from mlxtp.sharding.decide import slice_table

once = pytest.mark.once
Q4 = {"group_size": 32, "bits": 4}


def cut_by_rank_0(folder: Path, shares: list[int], comm: Communicator) -> Path:
    output = folder.with_name(f"{folder.name}-cut")
    if comm.rank == 0:
        shard(folder, shares, output)
    comm.barrier()
    return output


def test_load_reads_what_was_cut(comm: Communicator, shared_path: Path) -> None:
    """Quantized, with heads that do not divide, and for ranks with other shares."""
    tiny = Tiny(
        {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3},
        quantization=Q4,
    )
    folder = made_by_rank_0(tiny, shared_path / "to-cut", comm)
    expected = on_rank_0(comm, lambda: greedy(mlx_lm.load(str(folder))[0]))
    for shares in ([1] * comm.size, [2] + [1] * (comm.size - 1)):
        output = cut_by_rank_0(folder, shares, comm)
        model, _ = mlxtp.load(output, comm, shares=shares)
        assert greedy(model) == expected
        comm.barrier()
        if comm.rank == 0:
            shutil.rmtree(output)
        comm.barrier()


def test_a_rank_needs_its_own_folder_alone(
    comm: Communicator, shared_path: Path, tmp_path: Path
) -> None:
    folder = made_by_rank_0(Tiny(), shared_path / "own", comm)
    expected = on_rank_0(comm, lambda: greedy(mlx_lm.load(str(folder))[0]))
    output = cut_by_rank_0(folder, [1] * comm.size, comm)
    mine = tmp_path / "mine"
    others = [f"rank-{r}-of-*" for r in range(comm.size) if r != comm.rank]
    shutil.copytree(output, mine, ignore=shutil.ignore_patterns(*others))
    model, _ = mlxtp.load(mine, comm)
    assert greedy(model) == expected
    comm.barrier()
    others = [f"rank-{r}-of-*" for r in range(comm.size)]
    empty = tmp_path / "none"
    shutil.copytree(output, empty, ignore=shutil.ignore_patterns(*others))
    last = empty if comm.rank == comm.size - 1 else mine
    lost = f"rank-{comm.size - 1}-of-{comm.size}" if comm.size > 1 else "slices of it"
    said = rf"GB of .* are on the disk of no host, none has {lost}: start the host"
    with pytest.raises(UsageError, match=said):
        mlxtp.load(last, comm)


def test_auto_takes_the_shares_that_were_cut(
    comm: Communicator, shared_path: Path, tmp_path: Path
) -> None:
    """Cut for hosts that doctor measured, the first of which reads twice as fast."""
    folder = made_by_rank_0(Tiny(), shared_path / "for-auto", comm)
    expected = on_rank_0(comm, lambda: greedy(mlx_lm.load(str(folder))[0]))
    hosts = [
        Host(rank, f"host {rank}", "chip", False, 8 << 30, 8 << 30, rate, 1e9, 0.1)
        for rank, rate in enumerate([2e9, *[1e9] * (comm.size - 1)])
    ]
    output = folder.with_name("for-auto-cut")
    if comm.rank == 0:
        shares = shard(folder, "auto", output, hosts=hosts, context=64)
        assert comm.size == 1 or shares[0].mlp > 1.5 * shares[1].mlp
        assert shard(folder, [1] * comm.size, output) == Shares([1] * comm.size)
    comm.barrier()
    mine = tmp_path / "mine"
    others = [f"rank-{r}-of-*" for r in range(comm.size) if r != comm.rank]
    shutil.copytree(output, mine, ignore=shutil.ignore_patterns(*others))
    model, _ = mlxtp.load(mine, comm, shares="auto")
    assert greedy(model) == expected
    columns = model.slice_table.matrices["model.layers.0.mlp.down_proj"].spans
    assert comm.size == 1 or columns[0].length > 1.5 * columns[1].length
    # Shares that were kept, and of which there are no slices, do not count.
    machines = [list(one) for one in comm.allgather_object(chosen._machine())]
    keep_shares(mine, machines, Shares(range(1, comm.size + 1)))
    again, _ = mlxtp.load(mine, comm, shares="auto")
    assert again.slice_table.matrices == model.slice_table.matrices


@once
def test_two_jobs_may_write_a_file_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another one writes shares, say, before the first has put its own in place."""
    file, rename = tmp_path / "shares.json", Path.rename

    def rename_behind_another(self: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "rename", rename)
        monkeypatch.setattr(os, "getpid", lambda: -1)
        write_json(file, {"by": "another"})
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", rename_behind_another)
    write_json(file, {"by": "the first"})
    assert json.loads(file.read_text()) == {"by": "the first"}
    assert list(tmp_path.iterdir()) == [file]


def test_some_hosts_have_all_and_others_a_cut(
    comm: Communicator, shared_path: Path
) -> None:
    folder = made_by_rank_0(Tiny(), shared_path / "mixed", comm)
    expected = on_rank_0(comm, lambda: greedy(mlx_lm.load(str(folder))[0]))
    output = cut_by_rank_0(folder, [1] * comm.size, comm)
    model, _ = mlxtp.load(folder if comm.rank else output, comm)
    assert greedy(model) == expected


@once
@pytest.mark.parametrize("case", sweep(published.CASES, ["split", "fp8"]))
def test_published_checkpoints_are_cut(case: str, tmp_path: Path) -> None:
    """Of what mlx-lm computes of tensors, each rank has what that takes."""
    folder = published.published(case, tmp_path)
    output, ranks = tmp_path / "cut", 3
    shard(folder, [1] * ranks, output)
    whole = build(folder)
    table = slice_table(whole.model, [1] * ranks)
    computed = uncuttable(whole.sources, table.slices(0))  # of all ranks' bands
    for rank in range(ranks):
        mine = tmp_path / f"rank-{rank}"
        others = [f"rank-{r}-of-3" for r in range(ranks) if r != rank]
        shutil.copytree(output, mine, ignore=shutil.ignore_patterns("rest", *others))
        cut = build(mine)
        for name, part in table.slices(rank).items():
            if name in computed:
                continue
            expected = whole.sources[name].read(part, whole.checkpoint.read)
            read = cut.sources[name].read(part, cut.checkpoint.read)
            assert mx.array_equal(read, expected, equal_nan=True), name


@once
def test_join_gives_back_every_tensor(tmp_path: Path) -> None:
    """Also those of which no rank reads anything, and those without elements."""
    folder = tmp_path / "model"
    folder.mkdir()
    Tiny(quantization=Q4, dtype=mx.bfloat16).save(folder)
    add_tensors(folder)
    output = tmp_path / "cut"
    shard(folder, [1] * 5, output)
    shard(folder, [1] * 3, output)
    assert report(output)
    for gone in ("rank-4-of-5", "rank-0-of-3"):
        shutil.rmtree(output / gone)
    joined = tmp_path / "joined"
    writing.join(output, joined)
    assert equal_tensors(folder, joined)
    for file in folder.glob("*.json"):
        assert (joined / file.name).read_bytes() == file.read_bytes()


def add_tensors(folder: Path) -> None:
    """Rotary frequencies, which mlx-lm leaves out."""
    file = folder / "model.safetensors"
    tensors = dict(mx.load(str(file)))
    for layer in range(2):
        name = f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
        tensors[name] = mx.arange(8.0)
    mx.eval(tensors)
    mx.save_safetensors(str(file), tensors, metadata={"format": "mlx"})
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)


def equal_tensors(one: Path, other: Path) -> bool:
    """Whether two checkpoints have the same files with the same bytes in them."""
    files = sorted(file.name for file in one.glob("*.safetensors"))
    assert files == sorted(file.name for file in other.glob("*.safetensors"))
    for file in files:
        with (
            safe_open(one / file, framework="mlx") as a,
            safe_open(other / file, framework="mlx") as b,
        ):
            assert a.metadata() == b.metadata()
            assert sorted(a.keys()) == sorted(b.keys())
            for name in a.keys():  # noqa: SIM118
                x, y = (opened.get_tensor(name) for opened in (a, b))
                assert x.dtype == y.dtype and x.shape == y.shape, name
                assert mx.array_equal(x.view(mx.uint8), y.view(mx.uint8)), name
    return True


@pytest.fixture
def cut(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    Tiny().save(folder)
    shard(folder, [1, 1], tmp_path / "cut")
    return tmp_path / "cut"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mlxtp.shard", "--quiet", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@once
def test_the_command_line(cut: Path, tmp_path: Path) -> None:
    model, output = tmp_path / "model", tmp_path / "again"
    done = run("--model", model, "--shares", "2,1,1", "--output", output, "--spare")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "host 0: rank-0-of-2-1-1 and rank-2-of-2-1-1",
        "host 1: rank-1-of-2-1-1 and rank-0-of-2-1-1",
        "host 2: rank-2-of-2-1-1 and rank-1-of-2-1-1",
    ]
    assert {part.name for part in output.glob("rank-*")} == {
        f"rank-{rank}-of-2-1-1" for rank in range(3)
    }
    said = run("--verify", output)
    assert said.returncode == 0
    assert "together they are the whole checkpoint\nevery hash is right" in said.stdout
    assert run("--join", output, "--output", tmp_path / "joined").returncode == 0
    assert equal_tensors(model, tmp_path / "joined")
    (output / "rank-1-of-2-1-1" / "manifest.json").unlink()
    assert " bytes of the checkpoint are not here" in run("--verify", output).stdout


@once
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--model model --output new", "--model goes with --ranks, at least 1"),
        ("--model model --ranks 0 --output new", "--ranks, at least 1"),
        ("--model model --ranks two --output new", "invalid int value: 'two'"),
        ("--model= --ranks 2 --output new", "--model is '': wanted a folder or a"),
        ("--model model --ranks 2", "--output goes with --model and --join"),
        ("--verify cut --output new", "--output goes with"),
        ("--verify cut --ranks 2", "go with --model"),
        ("--verify cut --spare", "go with --model"),
        ("--verify model", "model is no cut checkpoint"),
        ("--join model --output new", "model is no cut checkpoint"),
        ("--join cut --output model", "model is not empty"),
        ("--model cut --ranks 2 --output new", "is cut already: join it first"),
        ("--model ./none --ranks 2 --output new", "there is no model folder"),
        ("--model model --ranks 2 --output model", "is not empty, and no cut"),
        ("--model other --ranks 2 --output cut", "holds slices of another checkpoint"),
        ("--model model --ranks 99 --output new", "99"),
    ],
)
def test_mistakes(
    arguments: str,
    said: str,
    cut: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "other").mkdir()
    Tiny({"hidden_size": 32}).save(tmp_path / "other")
    names = {"model", "cut", "other", "new"}
    words = [str(tmp_path / w) if w in names else w for w in arguments.split()]
    monkeypatch.setattr(sys, "argv", ["shard", "--quiet", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("mlxtp.shard: error: ") and said in line
    assert len(list(cut.glob("*/manifest.json"))) == 2
    assert not (tmp_path / "new" / "checkpoint.json").exists()


@once
def test_of_the_hub_nothing_is_downloaded_that_cannot_be_cut(
    tmp_path: Path,
    comm: Communicator,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The message is one line by the user's name; --quiet shows no bars at all."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    Tiny().save(whole)
    shutil.copytree(whole, broken)
    tensors = dict(mx.load(str(whole / "model.safetensors")))
    del tensors["model.norm.weight"]
    mx.save_safetensors(str(broken / "model.safetensors"), tensors)
    wanted = ["--shares", "2,1", "--output", str(tmp_path / "cut")]
    with Hub({"org/whole": whole, "org/broken": broken}) as server:
        Client(comm, monkeypatch).use(server.url, tmp_path)
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["shard", "--model", "org/broken", *wanted])
        with pytest.raises(SystemExit):
            main()
        assert capfd.readouterr().err == (
            "mlxtp.shard: error: the checkpoint in org/broken lacks model.norm.weight\n"
        )
        assert not list(tmp_path.glob("hub/**/*.safetensors"))
        words = ["shard", "--quiet", "--model", "org/whole", *wanted]
        monkeypatch.setattr(sys, "argv", words)
        main()
    assert capfd.readouterr() == ("", "") and report(tmp_path / "cut")


@once
def test_what_has_changed_is_found(
    cut: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = cut / "rank-1-of-2" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    assert not report(cut)
    said = capsys.readouterr().out
    assert "has changed since it was written" in said
    assert "1 slices are damaged" in said
    file.write_bytes(content[:-100])
    with pytest.raises(ValueError, match="is no whole safetensors file"):
        report(cut)
    file.unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors is not there"):
        mlxtp.load(cut, Communicator())


@once
def test_a_sound_file_with_another_time_is_hashed_once(tmp_path: Path) -> None:
    """A copy has other times; its hashes are compared, and its new time is kept."""
    Tiny().save(tmp_path / "model")
    shard(tmp_path / "model", [1, 1], tmp_path / "cut")
    [part, _] = rank_folders(tmp_path / "cut")
    file = part / "model.safetensors"
    os.utime(file, (0, 0))
    drop_damaged(tmp_path / "cut")
    [entry] = manifest_of(part)["files"].values()
    assert entry["stamp"] == stamp(file)


@once
def test_what_is_written_at_once_outlives_a_power_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it is on the disk before it has its name, and the name after that."""
    file, on_disk = tmp_path / MANIFEST, []

    def fsync(descriptor: int) -> None:
        status = os.fstat(descriptor)
        is_folder = stat.S_ISDIR(status.st_mode)
        on_disk.append((is_folder or status.st_size, file.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    write_text(file, "a" * 100)
    assert on_disk == [(100, False), (True, True)]
    on_disk.clear()
    begin(tmp_path / "cut", Origin("a model", None, {}, {}), {"config.json": b"{}"})
    assert len(on_disk) == 4 and on_disk[0][0] == len("{}")
    shutil.rmtree(tmp_path / "cut")

    def refuse(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    write_text(file, "b")
    assert file.read_text() == "b" and list(tmp_path.iterdir()) == [file]


@once
def test_killed_while_it_cuts(tmp_path: Path) -> None:
    """What was written to the end stays, the rest counts for nothing; then again."""
    folder, output = tmp_path / "model", tmp_path / "cut"
    folder.mkdir()
    Tiny({"num_hidden_layers": 24, "intermediate_size": 1024}).save(folder)
    command = [sys.executable, "-m", "mlxtp.shard", "--model", folder]
    command += ["--ranks", "8", "--output", output, "--quiet"]
    job = subprocess.Popen([str(word) for word in command])
    while not list(output.glob("rank-*.partial")) and job.poll() is None:
        time.sleep(0.001)
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    assert len(list(output.glob("*/manifest.json"))) < 8
    if list(output.glob("rank-*-of-8")):
        assert report(output)
    shard(folder, [1] * 8, output)
    assert report(output)
    assert not list(output.glob("*.partial"))
    writing.join(output, tmp_path / "joined")
    assert equal_tensors(folder, tmp_path / "joined")


@once
def test_a_rank_has_the_bytes_of_its_slices(tmp_path: Path) -> None:
    folder, output = tmp_path / "model", tmp_path / "cut"
    folder.mkdir()
    Tiny(quantization=Q4).save(folder)
    shard(folder, [1] * 5, output)
    empty = build(folder)
    table = slice_table(empty.model, [1] * 5)
    for rank in range(5):
        slices = table.slices(rank)
        file = output / f"rank-{rank}-of-5" / "model.safetensors"
        with open(file, "rb") as opened:
            header = 8 + int.from_bytes(opened.read(8), "little")
        assert file.stat().st_size - header == empty.bytes_of(slices)
