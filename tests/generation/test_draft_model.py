"""The draft that ships: where it is held, what it needs, and that it drafts well."""

import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from equal import Tokens

import mlxtp
from mlxtp import Communicator, UsageError, loading
from mlxtp.cluster import memory
from mlxtp.generation import draft_model
from mlxtp.generation.drafts import ModelDrafts
from mlxtp.stories import DRAFT_NAME, DRAFT_PATH, PATH

# Worlds of 2 and 5 add no case: what drafts is whole on a rank, or split like any.
pytestmark = pytest.mark.ranks(1, 3)

STEPS = 40


@pytest.fixture(scope="module")
def target(comm: Communicator) -> loading.Prepared:
    return loading.prepare(PATH, comm)


@pytest.fixture(scope="module")
def loaded(target: loading.Prepared) -> Any:
    tokenizer = target.load_tokenizer()
    model = target.load()
    model.set_dtype(mx.float32)
    return model, tokenizer


def prepared(
    target: loading.Prepared,
    loaded: Any,
    where: Any,
    rank: int | None = None,
    **options: Any,
) -> draft_model.PreparedDraft:
    return draft_model.prepare(DRAFT_NAME, where, rank, target, loaded[1], **options)


@pytest.mark.once
def test_it_is_small_and_has_the_models_tokens() -> None:
    assert sum(file.stat().st_size for file in DRAFT_PATH.iterdir()) <= 1_000_000
    files = [folder / "tokenizer.json" for folder in (PATH, DRAFT_PATH)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("where", ["auto", "one", "all", "split"])
def test_it_drafts_well_wherever_it_is(
    where: str, comm: Communicator, target: loading.Prepared, loaded: Any
) -> None:
    def told(**options: Any) -> tuple[Tokens, int]:
        responses = list(
            mlxtp.stream_generate(
                *(*loaded, "Once upon a time"), max_tokens=STEPS, **options
            )
        )
        tokens = Tokens.of((said.token, said.logprobs) for said in responses)
        return tokens, sum(said.from_draft for said in responses)

    drafts = prepared(target, loaded, where).load()
    assert isinstance(drafts, ModelDrafts)
    places = comm.allgather_object(drafts.model is not None)
    if where == "one" and comm.size > 1:
        assert drafts.root == 0 and places == [True, *[False] * (comm.size - 1)]
    elif where in ("all", "split"):
        assert drafts.root is None and all(places)
    assert len(set(comm.allgather_object(drafts.root))) == 1
    tokens, drafted = told(draft_model=drafts, num_draft_tokens=4)
    assert tokens == told()[0]
    assert drafted > STEPS // 2


def test_ranks_of_a_host_prepare_it_one_after_the_other(
    target: loading.Prepared,
    loaded: Any,
    shared_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first fetches from the hub, into the folder that all of them use."""
    folder, prepare = shared_path / "one-at-a-time", loading.prepare

    def prepare_alone(*args: Any, **options: Any) -> loading.Prepared:
        folder.mkdir()  # fails while another rank is here
        time.sleep(0.05)
        result = prepare(*args, **options)
        folder.rmdir()
        return result

    monkeypatch.setattr(loading, "prepare", prepare_alone)
    assert prepared(target, loaded, "all").prepared is not None


def test_a_rank_that_is_asked_for(
    comm: Communicator, target: loading.Prepared, loaded: Any
) -> None:
    draft = prepared(target, loaded, "auto", comm.size - 1)
    if comm.size > 1:
        assert draft.places == ("one",) and draft.root == comm.size - 1
        assert (draft.prepared is not None) == (comm.rank == draft.root)
    with pytest.raises(UsageError, match=f"wanted 0 to {comm.size - 1}"):
        prepared(target, loaded, "one", comm.size)


def test_where_memory_is_short(
    comm: Communicator,
    target: loading.Prepared,
    loaded: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On all ranks it does not fit, on one it does, and then on none."""
    if comm.size == 1:
        return
    room = target.nbytes

    def check(comm: Communicator, held: int, name: str, turn_bytes: int = 0) -> None:
        free = room + (1_000_000 if comm.rank == 0 and comm.size > 1 else 0)
        with comm.agreement():
            if held > free and comm.size > 1:
                raise ValueError("it does not fit")

    monkeypatch.setattr(loading, "check_memory", check)
    assert prepared(target, loaded, "auto").places == ("one",)
    for where, rank in (("all", None), ("one", 1)):
        with pytest.raises(UsageError, match=r"it does not fit$"):
            prepared(target, loaded, where, rank)
    with pytest.raises(UsageError, match="--shares auto does not count the draft"):
        prepared(target, loaded, "one", 1, shares="auto")


def test_it_goes_where_there_is_room(
    comm: Communicator,
    target: loading.Prepared,
    loaded: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To the last rank, where nobody says which; never past what is said."""
    if comm.size == 1:
        return
    last = comm.size - 1
    room = target.nbytes + (10_000_000 if comm.rank == last else 0)
    monkeypatch.setattr(memory, "available_bytes", lambda _: room)
    monkeypatch.setattr(comm, "host", f"host-{comm.rank}")
    for where in "auto", "one":
        draft = prepared(target, loaded, where)
        assert (draft.places, draft.root) == (("one",), last)
        assert (draft.prepared is not None) == (comm.rank == last)
    with pytest.raises(UsageError, match="for host-0 take"):
        prepared(target, loaded, "auto", 0)
    with pytest.raises(UsageError, match="for host-0 take"):
        prepared(target, loaded, "auto", fetch="root")


def test_where_one_rank_alone_can_have_it(
    comm: Communicator,
    target: loading.Prepared,
    loaded: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The others cannot reach it, cannot read it, or are not to."""
    if comm.size == 1:
        return
    assert prepared(target, loaded, "auto", fetch="root").places == ("one",)
    both = prepared(target, loaded, "auto")
    assert both.places == ("one", "all") or comm.machines_differ

    def fail(*_: Any, **__: Any) -> Any:
        raise UsageError("the hub does not answer")

    if comm.rank != 0:
        monkeypatch.setattr(loading.Prepared, "load", fail)
        monkeypatch.setattr(loading, "prepare", fail)
    drafts = both.load()
    assert isinstance(drafts, ModelDrafts) and drafts.root == 0
    alone = prepared(target, loaded, "auto")
    assert alone.places == ("one",) and (alone.prepared is None) == (comm.rank != 0)
    with pytest.raises(UsageError, match="the hub does not answer"):
        prepared(target, loaded, "all")
