"""The prefix cache finds, keeps and gives back what prompts have computed."""

import copy
import itertools
import logging
import os
import stat
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import pytest
from equal import Tokens
from every_type import LONG, PROMPT, for_types, split
from hypothesis import given
from hypothesis import strategies as st
from kept import kept_model
from metal_kernels import use_plain_operations
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    ChunkedKVCache,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
    make_prompt_cache,
)

import mlxtp
from mlxtp import Communicator
from mlxtp.generation import prefix_cache, prefix_files
from mlxtp.generation.prefix_cache import (
    LEAST_TOKENS,
    Match,
    PrefixIndex,
    PrefixStore,
    trimmable_below,
)
from mlxtp.generation.prefix_files import PrefixFiles, identity, name_of
from mlxtp.generation.rows import Rows

use_plain_operations()

TURN = LONG[:40]


def in_common(one: list[int], other: list[int]) -> int:
    pairs = itertools.takewhile(
        lambda pair: pair[0] == pair[1], zip(one, other, strict=False)
    )
    return sum(1 for _ in pairs)


class Plain:
    """What `PrefixIndex` promises, by looking at every entry."""

    def __init__(self, limit: int) -> None:
        self.limit, self.entries = limit, {}  # key: (tokens, is_trimmable), in order

    def use(self, key: int) -> None:
        self.entries[key] = self.entries.pop(key)

    def most(self, tokens: list[int], at_most: int) -> dict[int, int]:
        """What each entry spares."""
        result = {}
        for key, (entry, is_trimmable) in self.entries.items():
            common = min(in_common(entry, tokens), at_most)
            if is_trimmable or common == len(entry):
                result[key] = common
        return result

    def bytes(self) -> int:
        return sum(len(entry) for entry, _ in self.entries.values())

    def drop(self, keys: list[int]) -> None:
        for key in keys:
            del self.entries[key]

    def add(self, tokens: list[int], is_trimmable: bool) -> tuple[bool, list[int]]:
        covering = {
            array("I", entry).tobytes(): key
            for key, (entry, other) in self.entries.items()
            if entry == tokens or (other and entry[: len(tokens)] == tokens)
        }
        if covering:
            self.use(covering[min(covering)])  # of several the first in their order
            return False, []
        if len(tokens) < 2 or len(tokens) > self.limit:
            return False, []
        begins = [
            key
            for key, (entry, _) in self.entries.items()
            if is_trimmable and tokens[: len(entry)] == entry
        ]
        self.drop(begins)
        oldest = []
        while self.bytes() + len(tokens) > self.limit:
            oldest.append(next(iter(self.entries)))
            self.drop(oldest[-1:])
        return True, begins + oldest


# Many of them begin alike.
TOKENS = st.builds(
    lambda base, length, tail: (base * 9)[:length] + tail,
    st.sampled_from([[0], [0, 1]]),
    st.integers(0, 7),
    st.lists(st.sampled_from([0, 256]), max_size=2),
)


@pytest.mark.once
@given(st.lists(st.tuples(st.sampled_from("ffaab"), TOKENS, st.booleans())))
def test_the_index_is_as_one_that_looks_at_every_entry(
    calls: list[tuple[str, list[int], bool]],
) -> None:
    plain = Plain(limit=20)
    index = PrefixIndex(lambda tokens: (tokens // 2, tokens), 20)
    with mock.patch.object(prefix_cache, "LEAST_TOKENS", 2):
        for name, tokens, flag in calls:
            if name == "f":
                at_most = max(0, len(tokens) - flag)
                spared = plain.most(tokens, at_most)
                match = index.find(tokens, at_most=at_most)
                if max(spared.values(), default=0) < 2:
                    assert match is None
                else:
                    assert match is not None
                    assert match.tokens == max(spared.values()) == spared[match.key]
                    plain.use(match.key)
            elif name == "a":
                is_new, dropped = plain.add(tokens, flag)
                added = index.add(tokens, flag)
                assert (added.key is not None) == is_new
                assert sorted(added.dropped) == sorted(dropped)
                if added.key is not None:
                    assert added.key not in plain.entries
                    plain.entries[added.key] = (tokens, flag)
            else:
                wanted = len(tokens)
                dropped = index.free(wanted)
                assert dropped == list(plain.entries)[: len(dropped)]
                before = plain.bytes()
                plain.drop(dropped)
                freed = before - plain.bytes()
                assert freed >= wanted or not plain.entries
                assert not dropped or freed > 0
            assert index.nbytes[1] == plain.bytes() <= 20
            assert len(index) == len(plain.entries)


@pytest.mark.once
def test_a_few_tokens_are_no_match() -> None:
    index = PrefixIndex(lambda tokens: (tokens,), 1000)
    tokens = list(range(LEAST_TOKENS))
    assert index.add(tokens[:-1], True).key is None
    key = index.add([*tokens, 7, 8], True).key
    assert index.find([*tokens[:-1], 99, 98]) is None
    assert index.find([*tokens, 99]) == Match(key, LEAST_TOKENS)
    assert index.find(tokens, at_most=LEAST_TOKENS - 1) is None


# Caches of one layer, and how many tokens they may have to be trimmed.
KINDS: dict[str, Callable[[], Any]] = {
    "KVCache": KVCache,
    "QuantizedKVCache": lambda: QuantizedKVCache(32, 8),
    "RotatingKVCache": lambda: RotatingKVCache(96),
    "ChunkedKVCache": lambda: ChunkedKVCache(96),
    "CacheList": lambda: CacheList(KVCache(), RotatingKVCache(96)),
}


def feed(cache: Any, start: int, count: int) -> list[Any]:
    """What attention sees once tokens from `start` on have come: chosen by place."""
    if isinstance(cache, CacheList):
        return [x for one in cache.caches for x in feed(one, start, count)]
    places = mx.arange(start, start + count, dtype=mx.float32)[None, None, :, None]
    x = mx.sin(places + mx.arange(64))
    return [*cache.update_and_fetch(x, -x)]


def values(state: Any) -> list[Any]:
    return [
        x.tolist() if isinstance(x, mx.array) else x for _, x in tree_flatten(state)
    ]


@pytest.mark.once
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [90, 150])
def test_what_is_taken_may_be_changed(kind: str, length: int) -> None:
    store, cache = PrefixStore(), KINDS[kind]()
    feed(cache, 0, length - 1)
    feed(cache, length - 1, 1)  # a token alone goes into the room that is there
    is_trimmable = length < trimmable_below([cache])
    assert is_trimmable == (length < 96 or kind in ("KVCache", "QuantizedKVCache"))
    store.put(0, list(range(length)), [cache])
    before = values(cache.state)
    for kept_tokens in [40, 64, length] if is_trimmable else [length]:
        for more in [1, 20]:
            [taken] = store.take(0, kept_tokens)
            other = KINDS[kind]()
            feed(other, 0, length - 1)
            feed(other, length - 1, 1)
            if kept_tokens < length:
                other = KINDS[kind]()
                feed(other, 0, kept_tokens)
            for start in kept_tokens, kept_tokens + more:
                seen = feed(taken, start, more)
                assert values(seen) == values(feed(other, start, more))
            assert values(cache.state) == before


@pytest.mark.once
def test_states_are_not_shared() -> None:
    store, cache = PrefixStore(), ArraysCache(2)
    cache[0], cache[1] = mx.ones((1, 3, 4)), mx.zeros((1, 2, 4, 4))
    store.put(0, range(30), [cache])
    [taken] = store.take(0, 30)
    taken[1] = taken[1] + 1
    taken[0][:, 1] = 5
    assert mx.all(cache[0] == 1) and mx.all(cache[1] == 0)
    assert trimmable_below([KVCache(), cache]) == 0


@pytest.mark.once
def test_what_is_taken_costs_memory_once_it_is_written_to() -> None:
    """And then no more than the tokens that were taken."""

    def layers(tokens: int) -> list[KVCache]:
        caches = [KVCache() for _ in range(4)]
        for cache in caches:
            cache.update_and_fetch(*[mx.ones((1, 4, tokens, 64))] * 2)
        return caches

    store = PrefixStore()
    store.put(0, range(4096), layers(4096))
    before = mx.get_active_memory()
    taken = store.take(0, 512)
    mx.eval([cache.state for cache in taken])
    assert mx.get_active_memory() - before < 10_000
    for cache in taken:
        cache.update_and_fetch(*[mx.ones((1, 4, 1, 64))] * 2)
    mx.eval([cache.state for cache in taken])
    cost = mx.get_active_memory() - before
    assert cost <= sum(cache.nbytes for cache in taken) + 10_000
    assert sum(cache.nbytes for cache in taken) == 2 * 4 * 4 * 64 * 4 * (512 + 256)


# Whole, sliding, states alone and beside others, lists of caches, chunks, and a cache
# that one model alone has.
TYPES = ["llama", "gemma3_text", "mamba2", "qwen3_next", "falcon_h1", "llama4"]
TYPES += ["longcat_flash", "deepseek_v41"]
QUICK = [*TYPES[:5], "llama4"]


def continued(model: nn.Module, prompt: list[int], caches: list[Any]) -> Tokens:
    steps = generate_step(mx.array(prompt), model, max_tokens=6, prompt_cache=caches)
    return Tokens.of(steps)


@for_types(TYPES, QUICK)
def test_a_second_turn_is_as_without_the_cache(
    model_type: str, comm: Communicator
) -> None:
    model = split(model_type, comm)
    store, first = PrefixStore(), make_prompt_cache(model)
    index = PrefixIndex(lambda tokens: (tokens,), 1000)
    answer = continued(model, TURN, first)
    known = TURN + answer  # mlx-lm's loop has read the last token too
    added = index.add(known, len(known) < trimmable_below(first))
    store.put(added.key, known, first)
    turns = [known + PROMPT]
    if trimmable_below(first) == float("inf"):
        turns.append(TURN[:30] + PROMPT)
    for prompt in turns * 2:  # the entry is as it was
        match = index.find(prompt, at_most=len(prompt) - 1)
        assert match == Match(added.key, in_common(prompt, known))
        taken = store.take(match.key, match.tokens)
        alone = continued(model, prompt, make_prompt_cache(model))
        assert continued(model, prompt[match.tokens :], taken) == alone


@pytest.fixture
def warnings_of(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    caplog.set_level(logging.WARNING, logger=prefix_files.__name__)
    return lambda: [record.getMessage() for record in caplog.records]


def restored(
    comm: Communicator, files: PrefixFiles, limit: int = 1000
) -> tuple[PrefixStore, PrefixIndex | None]:
    store = PrefixStore(files)
    index = PrefixIndex(lambda n: (n,), limit) if comm.rank == 0 else None
    store.restore(comm, index)
    return store, index


def test_entries_are_there_after_a_restart(
    comm: Communicator, shared_path: Path, warnings_of: Callable[[], list[str]]
) -> None:
    """Those that all ranks have, whole; each rank has its own heads."""
    model, _ = mlxtp.load(kept_model(comm, "llama-64-4"), comm)
    name = identity(model, comm.rank, {}, {})
    store = PrefixStore(PrefixFiles(shared_path / "kept", name))
    prompts = [[*range(place, place + 30)] for place in range(5)]
    for key, prompt in enumerate(prompts):
        caches = make_prompt_cache(model)
        model(mx.array([prompt]), cache=caches)
        store.put(key, prompt, caches)
    store.drop([0])
    folder = shared_path / "kept" / name
    while store.write_one():
        pass
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert sorted(f.stem for f in folder.iterdir()) == sorted(map(name_of, prompts[1:]))
    store.drop([1])
    assert len([*folder.iterdir()]) == 3
    # The last rank lacks one, the first has one that was cut short.
    if comm.rank == comm.size - 1:
        (folder / f"{name_of(prompts[2])}.safetensors").unlink()
    if comm.rank == 0:
        broken = folder / f"{name_of(prompts[3])}.safetensors"
        broken.write_bytes(broken.read_bytes()[:-100])
        (folder / f".{'0' * 32}.safetensors").touch()
    comm.barrier()
    again, index = restored(comm, PrefixFiles(shared_path / "kept", name))
    assert len(again) == 1 and len([*folder.iterdir()]) == 1
    skipped = [name_of(prompts[3])] if comm.rank == 0 else []
    assert [Path(x.split()[0]).stem for x in warnings_of()] == skipped
    match = comm.bcast_object(index and index.find(prompts[4] + PROMPT))
    assert match.tokens == 30
    assert index is None or index.find(prompts[3] + PROMPT) is None
    taken = again.take(match.key, 30)
    alone = continued(model, prompts[4] + PROMPT, make_prompt_cache(model))
    assert continued(model, PROMPT, taken) == alone
    # What has no room any more goes from the disk.
    assert len(restored(comm, PrefixFiles(shared_path / "kept", name), 29)[0]) == 0
    assert not [*folder.iterdir()]


@pytest.mark.once
def test_every_kind_of_cache_is_written(tmp_path: Path, comm: Communicator) -> None:
    files = PrefixFiles(tmp_path, "0")
    store, caches = PrefixStore(files), []
    for make in KINDS.values():
        caches.append(make())
        feed(caches[-1], 0, 30)
    states = ArraysCache(2)
    states[0] = mx.ones((1, 3, 4))
    caches.append(states)
    store.put(0, range(30), caches)
    store.write_one()
    again, _ = restored(comm, files)
    for cache, other in zip(caches, again.take(0, 30), strict=True):
        assert type(cache) is type(other)
        assert values(cache.state) == values(other.state)
        if cache is not states:
            assert values(feed(copy.deepcopy(cache), 30, 1)) == values(
                feed(other, 30, 1)
            )


@pytest.mark.once
def test_a_full_disk_is_said_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    warnings_of: Callable[[], list[str]],
) -> None:
    def fill(file: str, *_: Any) -> None:
        Path(file).write_bytes(b"part")
        raise RuntimeError("No space left on device")

    monkeypatch.setattr(prefix_files, "save_prompt_cache", fill)
    store = PrefixStore(PrefixFiles(tmp_path, "0"))
    for key in range(2):
        store.put(key, range(key, 30), [])
    assert [store.write_one() for _ in range(3)] == [True, True, False]
    assert not [*(tmp_path / "0").iterdir()]
    [says] = warnings_of()
    assert "is not kept here any more: No space left on device" in says
    assert len(store.take(0, 30)) == 0


@pytest.mark.once
def test_a_folder_that_can_only_be_read(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    warnings_of: Callable[[], list[str]],
) -> None:
    """An entry that goes stays there, and what is no file is passed over."""

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(30, "Read-only file system")

    files = PrefixFiles(tmp_path, "0")
    (tmp_path / "0" / "a.safetensors").mkdir()
    assert files.names() == []
    monkeypatch.setattr(Path, "unlink", refuse)
    store = PrefixStore(files)
    store.put(0, range(30), [])
    store.drop([0])
    [says] = warnings_of()
    assert says.endswith("cannot be removed: Read-only file system")


@pytest.mark.once
def test_folders_that_nobody_uses(tmp_path: Path) -> None:
    """Are removed after a month, but for what is not a prefix cache's in them."""
    month = prefix_files.UNUSED_SECONDS
    names = [letter * 32 for letter in "abcd"]
    for name in [*names, "other"]:
        PrefixFiles(tmp_path, name)
        (tmp_path / name / f"x{prefix_files.SUFFIX}").touch()
    (tmp_path / names[0] / "notes").touch()
    for name, age in zip([*names, "other"], [2, 2, 0.9, 2, 2], strict=True):
        os.utime(tmp_path / name, (time.time() - age * month,) * 2)
    PrefixFiles(tmp_path, names[3]).remove_unused()
    left = sorted(folder.name for folder in tmp_path.iterdir())
    assert left == [names[0], names[2], names[3], "other"]
    assert [x.name for x in (tmp_path / names[0]).iterdir()] == ["notes"]
    assert len([*(tmp_path / names[3]).iterdir()]) == 1


@pytest.mark.once
def test_identity_is_all_that_decides_what_is_in_caches(comm: Communicator) -> None:
    folder = kept_model(comm, "llama-8-2-biases")

    def name(rank: int = 0, config: Any = None, **options: Any) -> str:
        model, _ = mlxtp.load(folder, comm)
        return identity(model, rank, config or {}, options)

    model, _ = mlxtp.load(folder, comm)
    weight = model.layers[1].self_attn.v_proj.weight
    weight[0, 0] = weight[0, 0] + 1e-3
    names = [name(), name(1), name(config={"rope_theta": 1}), name(kv_bits=8)]
    names.append(identity(model, 0, {}, {}))
    assert len({*names}) == 5 and name() == names[0]


@pytest.mark.once
def test_tokens_of_a_long_prompt_are_compared_to_the_end() -> None:
    index = PrefixIndex(lambda tokens: (tokens,), 10**9)
    base = array("I", range(100_000))

    def branches() -> Iterator[tuple[int, "array[int]"]]:
        for place in range(50, 100_000, 3331):
            yield place, base[:place] + array("I", [7] * 1000)

    keys = {place: index.add(branch, True).key for place, branch in branches()}
    for place, key in keys.items():
        prompt = base[:place] + array("I", [7] * 500 + [8])
        assert index.find(prompt) == Match(key, place + 500)


@pytest.mark.once
def test_a_row_holds_no_memory_of_the_others() -> None:
    """States too, of which mlx-lm gives a view of all rows."""
    rows = Rows()
    names = [str(number) for number in range(16)]
    caches = []
    for _ in names:
        state = ArraysCache(1)
        state[0] = mx.zeros((1, 100_000))
        caches.append([state])
    rows.join(names, caches)
    mx.eval([cache.state for cache in rows.caches])
    caches.clear()
    one = rows.extract("3")
    mx.eval([cache.state for cache in one])
    before = mx.get_active_memory()
    rows.drop(names)
    assert before - mx.get_active_memory() > 15 * 400_000
