"""Hosts whose caches hold a part of a repository, all of it, slices, or nothing."""

import errno
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from hub_server import Hub
from huggingface_hub import constants, hf_hub_download, snapshot_download
from reference import greedy, on_rank_0
from test_fetching import Client
from tiny import Tiny

from mlxtp import Communicator
from mlxtp.checkpoint.tensors import StoredTensor
from mlxtp.comm.errors import UsageError
from mlxtp.fetch import hub
from mlxtp.loading import load_model

NAME = "org/model"
INDEX = "model.safetensors.index.json"
SHARDS = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]


@pytest.fixture
def client(comm: Communicator, monkeypatch: pytest.MonkeyPatch) -> Client:
    return Client(comm, monkeypatch)


@pytest.fixture(scope="module")
def model(comm: Communicator, shared_path: Path) -> Path:
    """A tiny model in two shards, with their index."""
    folder = shared_path / "two-shards"

    def save() -> None:
        folder.mkdir()
        Tiny().save(folder)
        tensors = dict(mx.load(str(folder / "model.safetensors")))
        mx.eval(tensors)
        (folder / "model.safetensors").unlink()
        names = sorted(tensors)
        where = {name: SHARDS[place % 2] for place, name in enumerate(names)}
        for file in SHARDS:
            shard = {name: tensors[name] for name in names if where[name] == file}
            mx.save_safetensors(str(folder / file), shard, {"format": "mlx"})
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))

    on_rank_0(comm, save)
    return folder


@pytest.fixture(scope="module")
def expected(comm: Communicator, model: Path) -> list[int]:
    return on_rank_0(comm, lambda: greedy(mlx_lm.load(str(model))[0]))


@pytest.fixture
def url(comm: Communicator, model: Path) -> Iterator[str]:
    if comm.rank > 0:
        yield comm.bcast_object(None)
        return
    with Hub({NAME: model}) as server:
        yield comm.bcast_object(server.url)


def prepare(state: str, model: Path, comm: Communicator) -> None:
    """Put into this host's cache of the hub what `state` says."""
    if state == "whole":
        snapshot_download(NAME)
    elif state == "part":
        for file in (*(f.name for f in model.iterdir()), INDEX):
            if file != SHARDS[1]:
                hf_hub_download(NAME, file)
    elif state == "small files":
        snapshot_download(NAME, allow_patterns=["*.json"])
    comm.barrier()


# What each host has; the last is that of all further ranks.
MIXTURES = [
    ["part"],
    ["part", "whole"],
    ["nothing", "whole", "part"],
    ["small files", "nothing", "whole"],
]


@pytest.mark.parametrize("states", MIXTURES, ids="-".join)
def test_what_lacks_is_fetched(
    states: list[str],
    comm: Communicator,
    model: Path,
    expected: list[int],
    url: str,
    client: Client,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """What some host has comes from there, and then no hub is needed."""
    client.use(url, tmp_path)
    here = (states + states[-1:] * comm.size)[: comm.size]
    prepare(here[comm.rank], model, comm)
    asked = client.count()
    capfd.readouterr()
    split, _ = load_model(NAME, comm)
    assert capfd.readouterr() == ("", "")  # no bars of huggingface-hub
    assert greedy(split) == expected
    size = {file: (model / file).stat().st_size for file in SHARDS}
    fetched = sum(comm.allgather_object(asked[0]))
    if "whole" in here:
        assert fetched == 0
    elif "part" in here:
        assert 0.8 * size[SHARDS[1]] < fetched <= size[SHARDS[1]]
    client.use("http://127.0.0.1:1", tmp_path)
    client.patch.setattr(constants, "HF_HUB_OFFLINE", True)
    if here[0] != "nothing" or comm.size > 1:
        split, _ = load_model(NAME, comm)
        assert greedy(split) == expected


@pytest.mark.parametrize("hub_is", ["offline", "silent"])
def test_without_the_hub_files_and_host_are_named(
    hub_is: str,
    comm: Communicator,
    model: Path,
    url: str,
    client: Client,
    tmp_path: Path,
) -> None:
    client.use(url, tmp_path)
    last = comm.size - 1
    prepare("part" if comm.rank == last else "whole", model, comm)
    client.use("http://127.0.0.1:1", tmp_path)
    if hub_is == "offline":
        client.patch.setattr(constants, "HF_HUB_OFFLINE", True)
    sleep = time.sleep  # huggingface-hub waits between its attempts
    client.patch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))
    client.patch.setattr(hub, "PATIENCE_SECONDS", 0)
    asked = client.count()
    with pytest.raises(UsageError) as refused:
        load_model(NAME, comm)
    lacks = f"host-{last} lacks {SHARDS[1]} of {NAME}, and the hub did not give it: "
    assert str(refused.value).startswith(lacks)
    assert "\n" not in str(refused.value)
    assert ("HF_HUB_OFFLINE is set" in str(refused.value)) == (hub_is == "offline")
    assert asked[0] == 0


@pytest.mark.parametrize("has", ["whole", "small files"])
def test_mistakes_name_the_repository(
    has: str,
    comm: Communicator,
    model: Path,
    url: str,
    client: Client,
    tmp_path: Path,
) -> None:
    """Not the folder of the cache that the broken file is in."""
    client.use(url, tmp_path)
    prepare(has, model, comm)
    load_model(NAME, comm)
    for config in tmp_path.rglob("config.json"):
        config.unlink()
        config.write_text("[]")
    with pytest.raises(UsageError) as refused:
        load_model(NAME, comm)
    assert str(refused.value) == f"{NAME}/config.json holds no JSON object"


def test_a_failure_of_one_rank_is_said_on_all(
    comm: Communicator, model: Path, url: str, client: Client, tmp_path: Path
) -> None:
    """In the middle of fetching: its host and the file."""
    client.use(url, tmp_path)
    last = comm.size - 1
    where = f"rank {last} on host-{last}: " if comm.size > 1 else ""

    def fails(number: int, file: str) -> Any:
        def failing(*_: Any) -> Any:
            raise OSError(number, os.strerror(number), file)

        return failing

    def said() -> str:
        with pytest.raises(UsageError) as refused:
            load_model(NAME, comm)
        return str(refused.value)

    with client.patch.context() as patch:
        if comm.rank == last:
            patch.setattr(os, "pwrite", fails(errno.ENOSPC, ""))
        full = said()
    assert full.startswith(f"{where}[Errno 28] No space left on device: ")
    assert SHARDS[0] in full or SHARDS[1] in full
    with client.patch.context() as patch:
        if comm.rank == last:
            patch.setattr(hub, "cached_assets_path", fails(errno.EROFS, "/cache"))
        assert said() == f"{where}[Errno 30] Read-only file system: '/cache'"
    with client.patch.context() as patch:
        if comm.rank == last:
            patch.setattr(StoredTensor, "items", fails(errno.EIO, "a.safetensors"))
        assert said() == f"{where}[Errno 5] Input/output error: 'a.safetensors'"
    load_model(NAME, comm)
