"""Which way of an allreduce is taken, and that all ranks agree."""

import numpy as np
import pytest

from mlxtp import Communicator
from mlxtp.comm.allreduce import WAYS, Collectives, ways
from mlxtp.comm.tuning import Choice, choose

MEASURED = Choice(
    sizes=(1000, 2000, 10_000),
    seconds={
        "ring-one-shot": (1.0, 2.0, 10.0),
        "direct-two-shot": (4.0, 4.0, 5.0),
        "mpi-one-shot": (3.0, 3.0, 9.0),
    },
)


@pytest.mark.parametrize(
    ("nbytes", "way", "gather"),
    [
        (1, "ring-one-shot", "ring-one-shot"),
        (2500, "ring-one-shot", "ring-one-shot"),
        (5000, "direct-two-shot", "ring-one-shot"),
        (10_000, "direct-two-shot", "mpi-one-shot"),
        (10**8, "direct-two-shot", "mpi-one-shot"),
    ],
)
def test_the_fastest_is_taken(nbytes: int, way: str, gather: str) -> None:
    assert MEASURED.way(nbytes) == way
    assert MEASURED.gather(nbytes) == gather


def test_beyond_the_sizes_the_last_slope_goes_on() -> None:
    close = Choice((1, 10), {"early": (1.0, 2.0), "flat": (5.0, 5.0)})
    assert close.way(36) == "early"
    assert close.way(38) == "flat"
    falling = Choice((1, 10), {"noisy": (9.0, 3.0), "steady": (2.0, 2.0)})
    assert falling.way(1000) == "steady"  # no way gets faster with size


def test_in_words() -> None:
    assert str(Choice((), {"mpi-one-shot": ()})) == "allreduce: mpi-one-shot"
    lines = str(MEASURED).splitlines()
    assert len(lines) == 1 + len(MEASURED.seconds) + 1
    assert lines[-1] == "taken: ring-one-shot, direct-two-shot from 8 KiB"


def test_all_ranks_measure_and_agree(comm: Communicator) -> None:
    if comm.size == 1:
        pytest.skip("one rank sends nothing")
    from mlxtp.comm.transports.mpi import MPITransport

    transport = MPITransport()
    choice = choose(Collectives(transport), transport, ways(comm.size))
    assert set(choice.seconds) == set(ways(comm.size)) <= set(WAYS)
    assert len(choice.sizes) >= 2 and list(choice.sizes) == sorted(choice.sizes)
    assert np.array([*choice.seconds.values()]).min() > 0
    assert len(set(map(str, comm.allgather_object(choice)))) == 1
    only = choose(Collectives(transport), transport, ["mpi-one-shot"])
    assert only == Choice((), {"mpi-one-shot": ()})
    assert only.way(7) == only.gather(7) == "mpi-one-shot"
