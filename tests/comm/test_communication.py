"""What docs/communication.md derives, counted: calls, bytes, messages, cables."""

from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from tiny import VOCABULARY, Tiny, made_by_rank_0

import mlxtp
from mlxtp import Communicator
from mlxtp.cluster.cables import ring, routes
from mlxtp.comm.allreduce import ALGORITHMS, Collectives, algorithms
from mlxtp.comm.codec import GROUP_SIZE
from mlxtp.comm.eager import EagerCollectives
from mlxtp.comm.traffic import Traffic
from mlxtp.partition.shares import cut_axis
from mlxtp.stories import PATH as STORIES

# A rank, whom it sends to, and how many bytes.
Message = tuple[int, int, int]


class Counting:
    """Notes every message that goes to a transport."""

    def __init__(self, transport: Any) -> None:
        self.sent: list[Message] = []
        self._transport = transport
        self._prepared: list[tuple[Any, Message]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def send(self, buffer: np.ndarray, to: int, tag: int) -> Any:
        self.sent.append((self.rank, to, buffer.size))
        return self._transport.send(buffer, to, tag)

    def prepare_send(self, buffer: np.ndarray, to: int, tag: int) -> Any:
        request = self._transport.prepare_send(buffer, to, tag)
        self._prepared.append((request, (self.rank, to, buffer.size)))
        return request

    def start(self, requests: list[Any]) -> None:
        ids = {id(request) for request in requests}
        self.sent += [message for r, message in self._prepared if id(r) in ids]
        self._transport.start(requests)


class Nobody:
    """The transport of a rank whose messages get nowhere: to see what it sends."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def send(self, buffer: np.ndarray, peer: int, tag: int) -> object:
        return object()

    prepare_send = prepare_receive = send

    def start(self, requests: list[Any]) -> None: ...

    wait = start

    def wait_some(self, requests: list[Any]) -> list[int]:
        return list(range(len(requests)))


def messages(algorithm: str, ranks: int, size: int) -> list[Message]:
    """What all ranks send in an allreduce of `size` bytes."""
    sent = []
    for rank in range(ranks):
        transport: Any = Counting(Nobody(rank, ranks))
        Collectives(transport).allreduce(np.zeros(size // 4, np.int32), algorithm)
        sent += transport.sent
    return sent


def a_part(ranks: int) -> int:
    """Bytes of a part that is cut into equal blocks."""
    return 4 * GROUP_SIZE * ranks


@cache
def routes_on_a_ring(rank: int, ranks: int) -> dict[int, int]:
    """The neighbour through which a rank's host reaches each other host."""
    return routes(rank + 1, ring(ranks))


def cables(message: Message, ranks: int) -> Iterator[tuple[int, int]]:
    """The ends of the cables that a message crosses on a ring with our routes."""
    rank, to, _ = message
    while rank != to:
        after = routes_on_a_ring(rank, ranks)[to + 1] - 1
        yield rank, after
        rank = after


def busiest(sent: list[Message], cables_of: Callable[[Message], Any]) -> int:
    """Bytes on the cable and in the direction that carries most."""
    carried: Counter[tuple[int, int]] = Counter()
    for message in sent:
        for cable in cables_of(message):
            carried[cable] += message[2]
    return max(carried.values())


def on_a_ring(algorithm: str, ranks: int) -> Fraction:
    """Parts that the busiest cable carries in a direction."""
    near = sum(range((ranks - 1) // 2 + 1))
    directly = Fraction(near + (ranks // 2 if ranks % 2 == 0 else 0))
    gather = directly if algorithm.startswith("direct") else Fraction(ranks - 1, 2)
    return gather if algorithm.endswith("one-shot") else (directly + gather) / ranks


def on_a_mesh(algorithm: str, ranks: int) -> Fraction:
    gather = Fraction(1) if algorithm.startswith("direct") else Fraction(ranks - 1, 2)
    return gather if algorithm.endswith("one-shot") else (1 + gather) / ranks


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("ranks", range(2, 9))
def test_an_allreduce(ranks: int, algorithm: str) -> None:
    if algorithm not in algorithms(ranks):
        pytest.skip(f"on {ranks} ranks all are neighbours")
    part = a_part(ranks)
    sent = messages(algorithm, ranks, part)

    is_ring, is_two_shot = algorithm.startswith("ring"), algorithm.endswith("two-shot")
    gather = ranks if is_ring and ranks % 2 == 0 else ranks - 1
    number = gather + (ranks - 1 if is_two_shot else 0)
    volume = (ranks - 1) * part * (Fraction(2, ranks) if is_two_shot else 1)
    for rank in range(ranks):
        own = [nbytes for sender, _, nbytes in sent if sender == rank]
        assert (len(own), sum(own)) == (number, volume)

    assert (
        busiest(sent, lambda m: cables(m, ranks)) == on_a_ring(algorithm, ranks) * part
    )
    assert busiest(sent, lambda m: [m[:2]]) == on_a_mesh(algorithm, ranks) * part


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_a_rank_really_sends(algorithm: str, comm: Communicator) -> None:
    if algorithm not in algorithms(comm.size) or comm.size == 1:
        pytest.skip(f"not on {comm.size} ranks")
    counting = counted(comm)
    sums = Collectives(counting)
    for size in (a_part(comm.size), 1000):
        x = np.ones(size // 4, np.int32)
        for _ in range(2):  # the second time with what was kept
            counting.sent.clear()
            assert (sums.allreduce(x, algorithm) == comm.size).all()
            expected = [
                m for m in messages(algorithm, comm.size, size) if m[0] == comm.rank
            ]
            assert sorted(counting.sent) == sorted(expected)


def counted(comm: Communicator) -> Any:
    if comm.size == 1:
        pytest.skip("one rank sends nothing")
    from mlxtp.comm.transports.mpi import MPITransport

    return Counting(MPITransport())


def rows(vocabulary: int, comm: Communicator) -> int:
    start, stop = cut_axis(vocabulary, [1] * comm.size)[comm.rank]
    return stop - start


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_token_of_the_shipped_model(
    algorithm: str, comm: Communicator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table of docs/communication.md."""
    if algorithm not in algorithms(comm.size):
        pytest.skip(f"on {comm.size} ranks all are neighbours")
    counting, traffic = counted(comm), Traffic()
    arrays = EagerCollectives(counting, comm._progress, traffic, allreduce=algorithm)
    monkeypatch.setattr(comm, "_arrays", arrays)
    model, _ = mlxtp.load(STORIES, comm)
    layers, hidden, vocabulary, width, ranks = 4, 192, 1024, 2, comm.size

    cache = make_prompt_cache(model)
    mx.eval(model(mx.array([[3, 14, 15]]), cache=cache))
    for token in (92, 65):
        traffic.reset()
        counting.sent.clear()
        mx.eval(model(mx.array([[token]]), cache=cache))
        sums = (2 * layers + 1) * hidden
        assert traffic.calls == 2 * layers + 2
        assert traffic.bytes == (sums + rows(vocabulary, comm)) * width
        times = 2 if algorithm.endswith("two-shot") else ranks
        sent = sum(nbytes for _, _, nbytes in counting.sent)
        everyones = sum(comm.allgather_object(sent))
        assert everyones == (ranks - 1) * (times * sums + vocabulary) * width


@pytest.mark.usefixtures("each_mpi")
def test_prefill_and_decoding(comm: Communicator, shared_path: Path) -> None:
    if comm.size == 1:
        pytest.skip("one rank sends nothing")
    layers, hidden, width = 3, 64, 4
    tiny = Tiny({"num_hidden_layers": layers, "eos_token_id": None})
    folder = made_by_rank_0(tiny, shared_path / "communication", comm)
    model, tokenizer = mlxtp.load(folder, comm)
    prompt, step_size = list(range(3, 12)), 3
    chunks = [3, 3, 2]  # the last token of a prompt is a step of its own

    seen: list[tuple[int, int]] = []

    def look(*_: int) -> None:
        seen.append((comm.traffic.calls, comm.traffic.bytes))
        comm.traffic.reset()

    comm.traffic.reset()
    for _ in mlxtp.stream_generate(
        model,
        tokenizer,
        prompt,
        max_tokens=6,
        prefill_step_size=step_size,
        prompt_progress_callback=look,
    ):
        look()
    begin, *rest = seen
    assert begin == (0, 0)
    # Behind the last keys and values nobody listens: no sums of the last layer.
    sums = 2 * layers - 1
    assert rest[:3] == [(sums, sums * n * hidden * width) for n in chunks]
    token = ((2 * layers + 1) * hidden + rows(VOCABULARY, comm)) * width
    # mlx-lm begins a token before it gives out the one before.
    twice, nothing, *decoding = rest[3:-1]
    assert twice == (2 * (2 * layers + 2), 2 * token)
    assert nothing == (0, 0)
    assert decoding and set(decoding) == {(2 * layers + 2, token)}
