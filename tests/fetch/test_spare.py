"""One of five hosts is lost, and the hub is off: the others have all of the model."""

import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx_lm
import numpy as np
import pytest
from hub_client import Client, serve
from huggingface_hub import constants
from kept import kept
from parts import parted
from reference import greedy
from tiny import Tiny

from mlxtp import Communicator
from mlxtp.checkpoint import verify
from mlxtp.checkpoint.tensors import Piece, StoredTensor, Tensor
from mlxtp.comm.errors import UsageError
from mlxtp.fetch import fetch, hub
from mlxtp.fetch.schedule import plan
from mlxtp.fetch.spare import Spare, bytes_besides, kept_besides
from mlxtp.loading import load_model, prepare
from mlxtp.model.skeleton import build
from mlxtp.model.sources import needed
from mlxtp.partition.spans import Slice
from mlxtp.shard import shard
from mlxtp.sharding.decide import slice_table

NAME = "org/model"
# Neither five nor four divides heads, columns, groups or the vocabulary.
UNEVEN = Tiny(
    {"hidden_size": 224, "intermediate_size": 352, "num_attention_heads": 14,
     "num_key_value_heads": 7, "head_dim": 32},
    quantization={"group_size": 32, "bits": 4},
)  # fmt: skip

once = pytest.mark.once
five = pytest.mark.ranks(5)
slow = pytest.mark.slow


@once
def test_each_host_keeps_what_the_one_before_it_has() -> None:
    assert kept_besides(["a"]) == [[]]
    assert kept_besides(["a", "a"]) == [[], []]
    assert kept_besides(list("abcde")) == [[4], [0], [1], [2], [3]]
    # Ranks of one host share what they keep, and never keep their own host's.
    assert kept_besides(list("aabbb")) == [[2, 4], [3], [0], [1], []]
    assert kept_besides(list("abab")) == [[1], [0], [3], [2]]


def wants(folder: Path, ranks: int) -> list[dict[Tensor, Slice]]:
    """The slices of the checkpoint's tensors that each rank reads."""
    empty = build(folder)
    table = slice_table(empty.model, [1] * ranks)
    empty.settle(table.slices(0))
    return [
        needed(empty.sources, table.slices(rank), rank, ranks) for rank in range(ranks)
    ]


@once
def test_any_host_may_be_lost(tmp_path: Path) -> None:
    """Each of five, by the schedule: nothing from the hub, no byte moved twice."""
    UNEVEN.save(tmp_path)
    of_five, of_four = wants(tmp_path, 5), wants(tmp_path, 4)
    besides = kept_besides(list("abcde"))
    for lost in range(5):
        hosts = [host for host in range(5) if host != lost]
        for has_spare in (True, False):
            held: list[dict[str, StoredTensor]] = []
            for host in hosts:
                slices = [of_five[host]]
                slices += [of_five[rank] for rank in besides[host] if has_spare]
                held.append(
                    {
                        tensor.name: StoredTensor(
                            tensor,
                            tuple(Piece(Path(), 0, s[tensor]) for s in slices),
                        )
                        for tensor in of_five[host]
                    }
                )
            demands = []
            for tensor in of_four[0]:
                lacks = [
                    held[rank][tensor.name].missing(of_four[rank][tensor])
                    for rank in range(4)
                ]
                if any(lacks):
                    has = [[p.part for p in h[tensor.name].pieces] for h in held]
                    demands.append(fetch._demand(held[0][tensor.name], lacks, has))
            moves = plan(demands)
            assert any(move.from_hub for move in moves) != has_spare
            by_name = {demand.name: demand for demand in demands}
            lacked = sum(
                d.rows * spans.length * d.item_bytes
                for d in demands
                for spans in d.lacks
            )
            moved = sum(
                m.rows.length * spans.length * by_name[m.name].item_bytes
                for m in moves
                for _, spans in m.targets
            )
            assert lacked and moved == lacked


@pytest.fixture(scope="module")
def model(comm: Communicator) -> Path:
    def save(folder: Path) -> Path:
        UNEVEN.save(folder)
        return folder

    return kept(comm, "spared", save)


@pytest.fixture(scope="module")
def expected(comm: Communicator, model: Path) -> list[int]:
    return kept(comm, "greedy-spared", lambda _: greedy(mlx_lm.load(str(model))[0]))


class Hosts:
    """Five hosts, each with a rank and a disk of its own, of which some make a job."""

    def __init__(self, comm: Communicator, disks: Path, url: str = "") -> None:
        self.comm, self.disks, self.url = comm, disks, url

    def job(
        self, without: int | None, run: Callable[[Communicator, Client], Any]
    ) -> list[Any]:
        """What each host gets by `run`, for the ranks of a smaller world; None there
        where the host is lost."""
        mine = None
        world = parted(int(self.comm.rank == without))
        if self.comm.rank != without:
            with pytest.MonkeyPatch.context() as patch:
                client = Client(world, patch)
                client.use(self.url, self.disks / f"host-{self.comm.rank}")
                patch.setattr(world, "host", f"host-{self.comm.rank}")
                mine = run(world, client)
        return self.comm.allgather_object(mine)


def counted(world: Communicator, patch: pytest.MonkeyPatch) -> list[int]:
    """Bytes that this rank sends to others, from now on."""
    sent = [0]
    exchange = world.exchange

    def counting(to: list[np.ndarray], sizes: list[int]) -> list[Any]:
        sent[0] += sum(part.size for part in to) - to[world.rank].size
        return exchange(to, sizes)

    patch.setattr(world, "exchange", counting)
    return sent


def lacked_bytes(
    wanted: Mapping[Tensor, Slice], has: list[Mapping[Tensor, Slice]]
) -> int:
    total = 0
    for tensor, part in wanted.items():
        pieces = tuple(Piece(Path(), 0, slices[tensor]) for slices in has)
        if missing := StoredTensor(tensor, pieces).missing(part):
            total += tensor.bytes_of(missing)
    return total


def go_on(
    hosts: Hosts,
    model: Path,
    name: str,
    lost: int,
    expected: list[int],
    hub_is: str = "offline",
) -> None:
    """Load on the four that are left, without the hub, and see what it costs."""

    def run(world: Communicator, client: Client) -> tuple[list[int], int, int, int]:
        client.use("http://127.0.0.1:1", hosts.disks / f"host-{hosts.comm.rank}")
        client.patch.setattr(constants, "HF_HUB_OFFLINE", hub_is == "offline")
        client.patch.setattr(hub, "PATIENCE_SECONDS", 0)
        sleep = time.sleep  # huggingface-hub waits between its attempts
        client.patch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))
        client.patch.setattr(world, "host", f"host-{hosts.comm.rank}")
        of_five, of_four = wants(model, 5), wants(model, 4)
        [before] = kept_besides(list("abcde"))[hosts.comm.rank]
        mine = [of_five[hosts.comm.rank], of_five[before]]
        lacked = lacked_bytes(of_four[world.rank], mine)
        asked, sent = client.count(), counted(world, client.patch)
        split, _ = load_model(name, world)
        return greedy(split), asked[0], sent[0], lacked

    of_hosts = [result for result in hosts.job(lost, run) if result is not None]
    assert all(tokens == expected for tokens, *_ in of_hosts)
    assert not any(asked for _, asked, *_ in of_hosts)
    lacked = sum(lacked for *_, lacked in of_hosts)
    assert 0 < sum(sent for *_, sent, _ in of_hosts) <= 1.1 * lacked


@five
@pytest.mark.parametrize(
    ("lost", "hub_is"), [(0, "silent"), pytest.param(3, "offline", marks=slow)]
)
def test_by_name(
    lost: int,
    hub_is: str,
    comm: Communicator,
    model: Path,
    expected: list[int],
    shared_path: Path,
) -> None:
    """Also the host that alone had asked the hub for the commit."""
    disks = shared_path / f"by-name-{lost}"
    with serve(comm, {NAME: model}) as (_, url):
        hosts = Hosts(comm, disks, url)

        def keep(world: Communicator, client: Client) -> tuple[int, int]:
            whole = (model / "model.safetensors").stat().st_size
            asked = client.count()
            load_model(NAME, world, spare=True)
            return asked[0], whole

        of_hosts = hosts.job(None, keep)
    assert sum(asked for asked, _ in of_hosts) < 1.1 * of_hosts[0][1]  # once
    if comm.rank == lost:
        shutil.rmtree(disks / f"host-{lost}")
    comm.barrier()
    go_on(hosts, model, NAME, lost, expected, hub_is)
    if comm.rank != lost:
        [folder] = (disks / f"host-{comm.rank}").glob("**/checkpoint.json")
        assert not verify.verify(folder.parent)
        before = (comm.rank - 1) % 5
        parts = {part.name for part in folder.parent.glob("rank-*")}
        mine = comm.rank - (comm.rank > lost)
        own = {f"rank-{comm.rank}-of-5", f"rank-{before}-of-5"}
        more = parts - {name for name in parts if name.endswith(".lock")} - own
        assert own <= parts and more <= {f"rank-{mine}-of-4"}  # if it lacked something


@five
@slow
def test_what_is_lost_is_said_in_one_line(
    comm: Communicator, model: Path, shared_path: Path
) -> None:
    """Without --spare: what is missing, where it was and what to do."""
    with serve(comm, {NAME: model}) as (_, url):
        hosts = Hosts(comm, shared_path / "lost", url)
        hosts.job(None, lambda world, _: load_model(NAME, world) and None)

    def refused(world: Communicator, client: Client) -> str:
        client.patch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(UsageError) as error:
            load_model(NAME, world)
        return str(error.value)

    said = {message for message in hosts.job(1, refused) if message}
    assert said == {
        f"0.00 GB of {NAME} are on the disk of no host, none has rank-1-of-5, and the "
        "hub is not asked: HF_HUB_OFFLINE is set: start the host that had it again, or "
        "let the hub be asked (with --spare, a host's slices are on another too)"
    }


@five
@pytest.mark.parametrize(
    "hosts_have",
    ["their cuts", pytest.param("a cut, and one has all", marks=slow)],
)
def test_folders(
    hosts_have: str,
    comm: Communicator,
    model: Path,
    expected: list[int],
    shared_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Cut for five: what four ranks lack comes from folders on other hosts."""
    disks = shared_path / hosts_have
    mine = disks / f"host-{comm.rank}" / "model"
    all_of_it = hosts_have != "their cuts"
    if all_of_it and comm.rank == 2:
        shutil.copytree(model, mine)
    else:
        shard(model, [1] * 5, mine)
        for rank in set(range(5)) - {comm.rank}:
            shutil.rmtree(mine / f"rank-{rank}-of-5")
    monkeypatch.chdir(mine.parent)
    hosts = Hosts(comm, disks)
    if not all_of_it:
        hosts.job(None, lambda world, _: load_model("model", world, spare=True) and 0)
        go_on(hosts, model, "model", 4, expected)
        return
    tokens = hosts.job(4, lambda world, _: greedy(load_model("model", world)[0]))
    assert tokens == [expected] * 4 + [None]
    if comm.rank == 2:  # who has all writes nothing
        there = {file.name for file in mine.iterdir()}
        assert there == {file.name for file in model.iterdir()}


@five
@slow
def test_a_break_leaves_what_the_journal_knows(
    comm: Communicator,
    model: Path,
    shared_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whole or absent; the next start goes on, at one step of a few bytes a time."""
    monkeypatch.setattr("mlxtp.loading.STEP_BYTES", 10_000)
    mine = shared_path / "broken" / f"host-{comm.rank}" / "model"
    shard(model, [1] * 5, mine)
    for rank in set(range(5)) - {comm.rank}:
        shutil.rmtree(mine / f"rank-{rank}-of-5")
    monkeypatch.chdir(mine.parent)
    hosts = Hosts(comm, shared_path / "broken")
    before = (comm.rank - 1) % 5
    spare = mine / f"rank-{before}-of-5"

    def begin(world: Communicator, client: Client) -> int:
        sent = counted(world, client.patch)
        steps = prepare("model", world).keeping_spare()
        for _ in range(4):
            next(steps)
        steps.close()
        assert not spare.exists() and spare.with_suffix(".partial").is_dir()
        return sent[0]

    def full(world: Communicator, client: Client) -> list[str]:
        """A service says that a disk is too small, and goes on."""
        usage = shutil.disk_usage(mine)._replace(free=1000 if comm.rank == 2 else 10**9)
        client.patch.setattr(shutil, "disk_usage", lambda _: usage)
        caplog.clear()
        keeping = Spare(world, prepare("model", world).keeping_spare())
        keeping.step()
        assert not keeping.is_left and not spare.exists()
        return caplog.messages

    def go_on(world: Communicator, client: Client) -> int:
        sent = counted(world, client.patch)
        keeping = Spare(world, prepare("model", world).keeping_spare())
        while keeping.is_left:
            keeping.step()
        assert spare.exists() and not spare.with_suffix(".partial").exists()
        return sent[0]

    first = sum(hosts.job(None, begin))
    [[said], *others] = hosts.job(None, full)
    assert not any(others)
    assert said.startswith("--spare: host-2 needs 0.0 GB of disk for its slices")
    second = sum(hosts.job(None, go_on))
    of_five = wants(model, 5)
    besides = [lacked_bytes(of_five[rank - 1], [of_five[rank]]) for rank in range(5)]
    assert first and second < sum(besides) <= first + second
    assert sum(hosts.job(None, go_on)) == 0
    named = [{t.name: part for t, part in slices.items()} for slices in of_five]
    nowhere = {t.name: StoredTensor(t, ()) for t in of_five[0]}
    size = bytes_besides(nowhere, named[comm.rank], [named[before]])
    assert size == besides[comm.rank]
    file = spare / "model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert file.stat().st_size - header == size
