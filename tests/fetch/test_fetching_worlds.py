"""What worlds of other sizes find in the caches, and two jobs on the same machines."""

from pathlib import Path

import mlx_lm
import pytest
from hub_client import Client, serve
from kept import kept
from parts import parted
from reference import greedy
from tiny import Tiny

from mlxtp import Communicator
from mlxtp.checkpoint import verify
from mlxtp.fetch import rounds
from mlxtp.loading import load_model

pytestmark = [pytest.mark.slow, pytest.mark.ranks(5)]

NAME = "org/model"


@pytest.fixture(scope="module")
def model(comm: Communicator) -> Path:
    def save(folder: Path) -> Path:
        Tiny(
            {"hidden_size": 320, "intermediate_size": 640, "num_attention_heads": 16,
             "num_key_value_heads": 8, "head_dim": 32},
        ).save(folder)  # fmt: skip
        return folder

    return kept(comm, "fetched-by-worlds", save)


@pytest.fixture(scope="module")
def expected(comm: Communicator, model: Path) -> list[int]:
    return kept(comm, "greedy-by-worlds", lambda _: greedy(mlx_lm.load(str(model))[0]))


class Jobs:
    """Jobs of some of the ranks, each rank on a host with a cache of its own."""

    def __init__(
        self, comm: Communicator, url: str, caches: Path, expected: list[int]
    ) -> None:
        self.comm, self.url = comm, url
        self.caches, self.expected = caches, expected

    def load(self, color: int) -> int:
        """Load on the ranks of each color apart; the bytes that came from the hub.

        Ranks of color -1 wait for the others.
        """
        world = parted(color + 1)
        asked = [0]
        if color >= 0:
            with pytest.MonkeyPatch.context() as patch:
                client = Client(world, patch)
                client.use(self.url, self.caches / f"host-{world.rank}")
                asked = client.count()
                model, _ = load_model(NAME, world)
            assert greedy(model) == self.expected
        return sum(self.comm.allgather_object(asked[0]))


@pytest.fixture
def caches(shared_path: Path, request: pytest.FixtureRequest) -> Path:
    return shared_path / request.node.name


def test_other_worlds_take_what_is_there(
    comm: Communicator, model: Path, expected: list[int], caches: Path
) -> None:
    """Four ranks, then three, five and two; the fourth machine's part comes from the
    hub, and nothing that is there comes again."""
    whole = (model / "model.safetensors").stat().st_size
    with serve(comm, {NAME: model}) as (_, url):
        jobs = Jobs(comm, url, caches, expected)

        def fetched(ranks: int) -> float:
            """Of the whole, by the first ranks."""
            return jobs.load(0 if comm.rank < ranks else -1) / whole

        assert 0.9 < fetched(4) < 1.1
        # A fourth of the rows, and all of those matrices of which columns are gone.
        assert 0.15 < fetched(3) < 0.6
        assert fetched(5) == 0
        # Of the last third the first two machines have nothing.
        assert 0.1 < fetched(2) < 0.6


def test_two_jobs_on_the_same_machines(
    comm: Communicator,
    model: Path,
    expected: list[int],
    caches: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One waits for the other, and then finds all there."""
    monkeypatch.setattr(rounds, "ROUND_BYTES", 100_000)
    whole = (model / "model.safetensors").stat().st_size
    with serve(comm, {NAME: model}) as (server, url):
        if server:
            server.delay_seconds = 0.05
        both = Jobs(comm, url, caches, expected).load([0, 0, 1, 1, -1][comm.rank])
    assert both < 1.1 * whole
    there = list(caches.glob("**/checkpoint.json"))
    assert len(there) == 2
    assert not any(verify.verify(file.parent) for file in there)
