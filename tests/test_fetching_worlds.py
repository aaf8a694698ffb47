"""Worlds of other sizes, one after the other on the same seven machines."""

from pathlib import Path

import mlx_lm
import pytest
from mpi4py import MPI
from test_fetching import NAME, Client, served
from test_models import greedy, on_rank_0
from tiny import Tiny, made_by_rank_0

from mlxtp import Communicator
from mlxtp.loading import load_model
from mlxtp.transports.mpi import MPITransport

pytestmark = pytest.mark.ranks(7)

__all__ = ["served"]  # a fixture


@pytest.fixture(scope="module")
def model(comm: Communicator, shared_path: Path) -> Path:
    tiny = Tiny(
        {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 16,
         "num_key_value_heads": 8, "head_dim": 32},
    )  # fmt: skip
    return made_by_rank_0(tiny, shared_path / "for-worlds", comm)


class World:
    """The first `ranks` of the ranks there are."""

    def __init__(self, comm: Communicator, ranks: int) -> None:
        self.ranks = ranks
        mine = MPI.COMM_WORLD.Split(int(comm.rank >= ranks), comm.rank)
        control = MPITransport()
        control._comm, control.rank, control.size = mine, mine.rank, mine.size
        self.comm = Communicator(control, timeout_seconds=60)
        self.is_mine = comm.rank < ranks


def test_other_worlds_take_what_is_there(
    comm: Communicator,
    model: Path,
    served: tuple[object, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Five ranks, then four, seven and three; the fifth machine's part comes from the
    hub, and nothing that is there comes again."""
    whole = (model / "model.safetensors").stat().st_size
    expected = on_rank_0(comm, lambda: greedy(mlx_lm.load(str(model))[0]))

    def loaded(ranks: int) -> int:
        """Bytes from the hub for a world of so many ranks."""
        world = World(comm, ranks)
        client = Client(world.comm, monkeypatch)
        client.use(served[1], tmp_path)
        asked = client.count()
        # The others do what it takes to be there.
        split, _ = load_model(NAME if world.is_mine else model, world.comm)
        assert greedy(split) == expected
        return sum(comm.allgather_objects(asked[0]))

    assert loaded(5) < 1.1 * whole
    # A fifth of the rows, and all of those matrices of which columns are gone.
    assert 0.1 * whole < loaded(4) < 0.55 * whole
    assert loaded(7) == 0
    # Of the last quarter the first three machines have nothing.
    assert 0.1 * whole < loaded(3) < 0.6 * whole
    assert loaded(3) == 0
