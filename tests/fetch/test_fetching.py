"""Each rank fetches its own bytes from a hub on loopback, with huggingface-hub."""

import errno
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx_lm
import published
import pytest
from hub_client import Client, serve
from hub_server import Hub, Request
from huggingface_hub import constants
from kept import kept
from pyramid import sweep
from reference import greedy, on_rank_0
from tiny import Tiny, made_by_rank_0

import mlxtp
from mlxtp import Communicator, loading
from mlxtp.checkpoint import verify
from mlxtp.comm.errors import UsageError
from mlxtp.dryrun import chosen
from mlxtp.fetch import hub
from mlxtp.fetch.location import locate
from mlxtp.loading import load_model
from mlxtp.model import skeleton
from mlxtp.partition.shares import Shares
from mlxtp.shard import shard

Q4 = {"group_size": 32, "bits": 4}
NAME = "org/model"


@pytest.fixture
def client(comm: Communicator, monkeypatch: pytest.MonkeyPatch) -> Client:
    return Client(comm, monkeypatch)


@pytest.fixture(scope="module")
def model(comm: Communicator, shared_path: Path) -> Path:
    """Llama's shapes, quantized, in several moves."""
    tiny = Tiny(
        {"hidden_size": 320, "intermediate_size": 640, "num_attention_heads": 10,
         "num_key_value_heads": 5, "head_dim": 32, "vocab_size": 131},
        quantization=Q4,
    )  # fmt: skip
    return made_by_rank_0(tiny, shared_path / "on-the-hub", comm)


@pytest.fixture
def served(comm: Communicator, model: Path) -> Iterator[tuple[Hub | None, str]]:
    """The hub, which rank 0 has, and its address."""
    with serve(comm, {NAME: model}) as served:
        yield served


Served = tuple[Hub | None, str]


def alone(comm: Communicator, model: Path) -> list[int]:
    """Tokens of one process."""
    return kept(comm, "on-the-hub-steps", lambda _: greedy(mlx_lm.load(str(model))[0]))


def test_each_byte_is_fetched_once(
    comm: Communicator, model: Path, served: Served, client: Client, tmp_path: Path
) -> None:
    """On machines of their own: at most 1.1 times the checkpoint from the hub, of
    which a rank fetches its share, and nothing at the second start."""
    server, url = served
    client.use(url, tmp_path)
    asked = client.count()
    expected = alone(comm, model)
    split, _ = mlxtp.load(NAME, comm)
    assert greedy(split) == expected
    whole = (model / "model.safetensors").stat().st_size
    assert 0.9 * whole < sum(comm.allgather_object(asked[0])) < 1.1 * whole
    assert asked[0] <= 1.3 * whole / comm.size
    assert not server or server.sent < 1.1 * whole
    kept = list(tmp_path.glob("assets/**/rank-*/*.safetensors"))
    assert sum(file.stat().st_size for file in kept) <= 1.3 * whole / comm.size
    asked[0] = 0
    again, _ = mlxtp.load(NAME, comm)
    assert greedy(again) == expected
    assert asked[0] == 0


# Faults of the hub at the first request for a range.
PASSING: dict[str, int | str] = {
    "drops connections": "drop",
    "busy": 503,
    "too many requests": 429,
    "other bytes than asked for": "shifted",
    "more bytes than asked for": "long",
    "wrong bytes": "wrong",
}


# Each rank gets over them by itself: all of them on three ranks alone.
@pytest.mark.parametrize("fault", sweep(PASSING, ["busy", "wrong bytes"]))
def test_faults_that_pass(
    fault: str,
    comm: Communicator,
    model: Path,
    served: Served,
    client: Client,
    tmp_path: Path,
) -> None:
    server, url = served
    client.use(url, tmp_path)
    seen: set[str | None] = set()

    def at_first(request: Request) -> int | str | None:
        if not request.path.startswith("/cdn/") or request.range in seen:
            return None
        seen.add(request.range)
        # Those that cost a second of waiting only now and then.
        rare = isinstance(PASSING[fault], int) and len(seen) % 4 != 1
        return None if rare else PASSING[fault]

    if server:
        server.fault = at_first
    expected = alone(comm, model)
    split, _ = mlxtp.load(NAME, comm)
    assert greedy(split) == expected


def is_of_weights(request: Request) -> bool:
    return bool(request.range) and request.path.endswith("model.safetensors")


# Lasting ones, and what has to be said.
LASTING: dict[str, tuple[int | str, str]] = {
    "no token": (401, "does not exist or is private"),
    "gated": (403, "access to it has to be asked for"),
    "gone": (404, "or this revision of it, does not exist"),
    "no ranges": ("no range", "does not give ranges of files"),
    "drops all": ("shifted", r"could not be fetched: asked for bytes"),
    "wrong bytes": ("wrong", "came from the hub twice, and was not what the hub's SHA"),
}


@pytest.mark.parametrize("fault", sweep(LASTING, ["gone", "wrong bytes"]))
def test_faults_that_last(
    fault: str,
    comm: Communicator,
    model: Path,
    served: Served,
    client: Client,
    tmp_path: Path,
) -> None:
    """One message on all ranks, nothing that counts is left, and then it goes on."""
    server, url = served
    client.use(url, tmp_path)
    answer, said = LASTING[fault]
    if server:
        server.fault = lambda r: answer if is_of_weights(r) and r.number else None
    with pytest.raises(UsageError, match=said):
        mlxtp.load(NAME, comm)
    assert not list(tmp_path.glob("assets/**/manifest.json"))
    comm.barrier()
    if server:
        server.fault = lambda request: None
    comm.barrier()
    expected = alone(comm, model)
    split, _ = mlxtp.load(NAME, comm)
    assert greedy(split) == expected


def test_no_such_repository(
    comm: Communicator, served: Served, client: Client, tmp_path: Path
) -> None:
    client.use(served[1], tmp_path)
    with pytest.raises(UsageError, match="there is no folder org/other, and the hub"):
        mlxtp.load("org/other", comm)


def test_a_private_repository(
    comm: Communicator, model: Path, served: Served, client: Client, tmp_path: Path
) -> None:
    server, url = served
    client.use(url, tmp_path)
    if server:
        server.token = "hf_secret"
    comm.barrier()
    with pytest.raises(UsageError, match="does not exist or is private"):
        mlxtp.load(NAME, comm)
    client.patch.setenv("HF_TOKEN", "hf_secret")
    load_model(NAME, comm)


def test_root_fetches_for_all(
    comm: Communicator, model: Path, served: Served, client: Client, tmp_path: Path
) -> None:
    """Only rank 0 asks the hub; it keeps its own slices alone."""
    client.use(served[1] if comm.rank == 0 else "http://127.0.0.1:1", tmp_path)
    expected = alone(comm, model)
    split, _ = mlxtp.load(NAME, comm, fetch="root")
    assert greedy(split) == expected
    kept = list(tmp_path.glob("assets/**/rank-*/*.safetensors"))
    whole = (model / "model.safetensors").stat().st_size
    assert sum(file.stat().st_size for file in kept) <= 1.3 * whole / comm.size


def test_offline(
    comm: Communicator, model: Path, served: Served, client: Client, tmp_path: Path
) -> None:
    client.use(served[1], tmp_path)
    with client.patch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        with pytest.raises(
            UsageError, match="there is no folder org/model, and the hub"
        ):
            load_model(NAME, comm)
    expected = alone(comm, model)
    load_model(NAME, comm)
    client.use("http://127.0.0.1:1", tmp_path)
    client.patch.setattr(constants, "HF_HUB_OFFLINE", True)
    split, _ = mlxtp.load(NAME, comm)
    assert greedy(split) == expected


def test_a_damaged_file_is_fetched_again(
    comm: Communicator, model: Path, served: Served, client: Client, tmp_path: Path
) -> None:
    """On one machine; the others pass it on where they have it."""
    client.use(served[1], tmp_path)
    expected = alone(comm, model)
    load_model(NAME, comm)
    (file,) = tmp_path.glob("assets/**/rank-*/model.safetensors")
    asked = client.count()
    if comm.rank == comm.size - 1:
        content = bytearray(file.read_bytes())
        content[-7] ^= 4
        file.write_bytes(content)
    split, _ = mlxtp.load(NAME, comm)
    assert greedy(split) == expected
    assert (asked[0] > 0) == (comm.rank == comm.size - 1)
    folder = next(iter(tmp_path.glob("assets/**/checkpoint.json"))).parent
    assert not verify.verify(folder)
    asked[0] = 0
    load_model(NAME, comm)
    assert asked[0] == 0
    # So is one that was cut short.
    for file in tmp_path.glob("assets/**/rank-*/model.safetensors"):
        if comm.rank == 0:
            file.write_bytes(file.read_bytes()[:-8])
    load_model(NAME, comm)
    assert (asked[0] > 0) == (comm.rank == 0)
    assert not verify.verify(folder)


def test_other_shares_come_from_the_other_ranks(
    comm: Communicator, model: Path, served: Served, client: Client, tmp_path: Path
) -> None:
    client.use(served[1], tmp_path)
    expected = alone(comm, model)
    load_model(NAME, comm)
    asked = client.count()
    split, _ = mlxtp.load(NAME, comm, shares=[2] + [1] * (comm.size - 1))
    assert greedy(split) == expected
    assert asked[0] == 0


def test_shares_that_are_chosen_once_are_kept_with_the_slices(
    comm: Communicator,
    model: Path,
    served: Served,
    client: Client,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A rank that reads a third as fast gets less, and still when it no longer does."""
    client.use(served[1], tmp_path)
    rate = 1e9 if comm.rank else 3e9
    monkeypatch.setattr(chosen, "_bytes_per_second", lambda: rate)
    monkeypatch.setattr(comm, "host", f"host-{comm.rank}", raising=False)
    split, _ = mlxtp.load(NAME, comm, shares="auto", context=64)
    assert greedy(split) == alone(comm, model)
    columns = split.slice_table.matrices["model.layers.0.mlp.down_proj"].spans
    assert comm.size == 1 or columns[0].length > 2 * columns[1].length
    asked = client.count()
    monkeypatch.setattr(chosen, "_bytes_per_second", lambda: 1e9)
    again = load_model(NAME, comm, shares="auto")[0]
    assert again.slice_table.matrices == split.slice_table.matrices
    assert asked[0] == 0
    # One host that has lost its folder is told by the others.
    if comm.rank == comm.size - 1 and comm.size > 1:
        [kept] = tmp_path.glob("assets/**/shares.json")
        kept.unlink()
    again = load_model(NAME, comm, shares="auto")[0]
    assert again.slice_table.matrices == split.slice_table.matrices
    assert comm.size == 1 or list(tmp_path.glob("assets/**/shares.json"))


def test_shares_that_do_not_fit_are_not_kept_and_kept_ones_chosen_anew(
    comm: Communicator,
    served: Served,
    client: Client,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Once: they stay for a start that finds the memory again."""
    client.use(served[1], tmp_path)
    monkeypatch.setattr(comm, "host", f"host-{comm.rank}", raising=False)
    few = {**dict.fromkeys(range(comm.size), 1 << 40), 0: 100}
    monkeypatch.setattr(loading.memory, "available_bytes", lambda _: few[comm.rank])
    with pytest.raises(UsageError, match="for host-0 take"):
        loading.prepare(NAME, comm, shares="auto", context=64)
    assert not list(tmp_path.glob("assets/**/shares.json"))
    if comm.size == 1:
        return
    few[0] = 1 << 40
    kept = loading.prepare(NAME, comm, shares="auto", context=64)
    few[0] = kept.nbytes - 1
    suited = Shares([1, *[3] * (comm.size - 1)])
    monkeypatch.setattr(chosen.Fitting, "suited", lambda *_: suited)
    assert loading.prepare(NAME, comm, shares="auto").shard.shares == suited
    assert comm.rank or "others for this start than those in shares.json" in caplog.text
    few[0] = 1 << 40
    again = loading.prepare(NAME, comm, shares="auto")
    assert again.shard.shares == kept.shard.shares


def test_a_new_commit_is_fetched_anew(
    comm: Communicator, model: Path, client: Client, shared_path: Path, tmp_path: Path
) -> None:
    """And one that comes while it is fetched is not mixed with the old one."""
    mine = shared_path / "changing"
    tiny = Tiny()
    made_by_rank_0(tiny, mine, comm)
    server = Hub({NAME: mine})
    if comm.rank == 0:
        server.__enter__()
    client.use(comm.bcast_object(server.url if comm.rank == 0 else None), tmp_path)
    load_model(NAME, comm)

    def change(request: Request) -> None:
        if is_of_weights(request) and request.number > 0 and not changed:
            changed.append(True)
            shutil.rmtree(mine)
            another.rename(mine)

    changed: list[bool] = []
    another = shared_path / "another"
    comm.barrier()
    if comm.rank == 0:
        Tiny(seed=1).save(mine)
        # Not in the server's thread: a thread that used mx.random ends the process with
        # an abort if it is still there when Python ends.
        another.mkdir()
        Tiny(seed=2).save(another)
        server.ranges.clear()
        server.fault = change
    comm.barrier()
    with pytest.raises(UsageError, match="or this revision of it, does not exist"):
        load_model(NAME, comm)
    split, _ = mlxtp.load(NAME, comm)
    assert greedy(split) == on_rank_0(comm, lambda: greedy(mlx_lm.load(str(mine))[0]))
    comm.barrier()
    if comm.rank == 0:
        server.__exit__()


def test_too_small_a_disk_is_said_before(
    comm: Communicator, served: Served, client: Client, tmp_path: Path
) -> None:
    client.use(served[1], tmp_path)
    asked = client.count()
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    client.patch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(
        UsageError, match=r"host-0 needs 0\.0 GB of disk for its slices"
    ):
        load_model(NAME, comm)
    assert asked[0] == 0


def test_a_revision(
    comm: Communicator, model: Path, served: Served, client: Client, tmp_path: Path
) -> None:
    """A branch or a commit; one that the hub does not have is said.

    A commit that a machine keeps slices of is not asked for.
    """
    server, url = served
    client.use(url, tmp_path)
    if server:
        server.branches = frozenset({"main", "v2"})
    commit = comm.bcast_object(server and server.commit(NAME))
    comm.barrier()
    assert locate(NAME, comm, "v2").repo == hub.Repo(NAME, commit)
    load_model(NAME, comm, revision=commit)
    assert locate(model, comm, "v3").folder == model  # for a folder it says nothing
    for unknown in ("v3", "0" * 40):
        with pytest.raises(UsageError, match="or this revision of it, does not exist"):
            load_model(NAME, comm, revision=unknown)
    client.patch.setattr(hub, "small_files", None)  # nobody asks for what is kept
    load_model(NAME, comm, revision=commit)


def test_mistakes_name_what_was_given(
    comm: Communicator, served: Served, client: Client, tmp_path: Path
) -> None:
    """Not the folder of the cache that it is kept in."""
    client.use(served[1], tmp_path)
    client.patch.setattr(loading.memory, "available_bytes", lambda _: 1000)
    with pytest.raises(UsageError, match="the slices of org/model for host-"):
        load_model(NAME, comm)
    client.patch.undo()
    client.use(served[1], tmp_path)
    with pytest.raises(UsageError, match="cannot build the model in org/model: "):
        load_model(NAME, comm, model_config={"hidden_size": "many"})
    load_model(NAME, comm)
    prepared = loading.prepare(NAME, comm)
    (manifest,) = tmp_path.glob("assets/**/rank-*/manifest.json")
    manifest.write_text("{}")
    said = rf"(host-0: |^){NAME}/rank-\d-of-\d/manifest.json is no manifest of slices"
    with pytest.raises(UsageError, match=said):
        prepared.load()


@pytest.mark.parametrize(
    "content", ["", "{}", "\0" * 100], ids=["empty", "no manifest", "zeros"]
)
def test_a_manifest_that_says_nothing_is_mended(
    content: str,
    comm: Communicator,
    served: Served,
    client: Client,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As after a power failure: its slices are fetched again."""
    client.use(served[1], tmp_path)
    load_model(NAME, comm)
    (manifest,) = tmp_path.glob("assets/**/rank-*/manifest.json")
    before = json.loads(manifest.read_text())
    manifest.write_text(content)
    load_model(NAME, comm)
    after = json.loads(manifest.read_text())
    for each in (before, after):
        for file in each["files"].values():
            del file["stamp"]
    assert after == before
    assert f"{manifest} says nothing: its folder is removed" in caplog.text


def test_a_manifest_that_cannot_be_read_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be sound: a disk on the network was away for a moment, say."""

    def fail(file: Path) -> bytes:
        raise OSError(errno.ESTALE, "stale")

    manifest = tmp_path / "rank-0-of-1" / "manifest.json"
    manifest.parent.mkdir()
    manifest.write_text("{}")
    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(OSError, match="stale"):
        verify.drop_damaged(tmp_path)
    assert manifest.exists()
    monkeypatch.undo()
    verify.drop_damaged(tmp_path)
    assert not manifest.exists()


def test_few_collectives_find_a_model(
    comm: Communicator, model: Path, served: Served, client: Client, tmp_path: Path
) -> None:
    calls: list[str] = []

    def counted(name: str) -> None:
        collective = getattr(comm, name)

        def counting(*arguments: Any) -> Any:
            calls.append(name)
            return collective(*arguments)

        client.patch.setattr(comm, name, counting)

    for name in ("allgather_object", "bcast_object", "exchange", "barrier"):
        counted(name)
    client.use(served[1], tmp_path)
    shard(model, [1] * comm.size, tmp_path / "cut")
    for given, few in ((model, 1), (tmp_path / "cut", 1), (NAME, 6), (NAME, 5)):
        calls.clear()
        location = locate(given, comm)
        assert len(calls) <= few, (given, calls)
        assert location.name == str(given)
        assert location.is_cut == (given != model)
        assert (location.repo is not None) == (given == NAME)
        assert location.checkpoint.tensors


def test_built_and_traced_once(
    comm: Communicator, client: Client, shared_path: Path, tmp_path: Path
) -> None:
    """Files that are fetched change where tensors lie, and no more."""
    made = shared_path / "stacked-experts"
    if comm.rank == 0:
        made.mkdir()
    folder = on_rank_0(comm, lambda: published.published("stacked", made))
    expected = on_rank_0(comm, lambda: greedy(mlx_lm.utils.load_model(Path(folder))[0]))
    server = Hub({NAME: folder})
    if comm.rank == 0:
        server.__enter__()
    client.use(comm.bcast_object(server.url if comm.rank == 0 else None), tmp_path)
    counts = {"build": 0, "trace": 0}

    def counted(module: Any, name: str) -> None:
        function = getattr(module, name)

        def counting(*arguments: Any, **options: Any) -> Any:
            counts[name] += 1
            return function(*arguments, **options)

        client.patch.setattr(module, name, counting)

    counted(loading, "build")
    counted(skeleton, "trace")
    model, _ = load_model(NAME, comm)
    assert counts == {"build": 1, "trace": 1}
    assert greedy(model) == expected
    comm.barrier()
    if comm.rank == 0:
        server.__exit__()


def test_nothing_is_fetched_before_all_is_checked(
    comm: Communicator, model: Path, served: Served, client: Client, tmp_path: Path
) -> None:
    """Prepared, a model has its tokenizer and table, and none of its weights."""
    _, url = served
    client.use(url, tmp_path)
    asked = client.count()
    prepared = loading.prepare(NAME, comm)
    assert prepared.load_tokenizer().vocab_size == prepared.table.vocabulary_rows
    assert asked == [0] and prepared.nbytes > 0
    assert greedy(prepared.load()) == alone(comm, model)
    assert asked[0] > 0
