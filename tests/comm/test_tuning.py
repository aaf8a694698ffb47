"""Which algorithm of an allreduce is taken, and that all ranks agree."""

import numpy as np
import pytest

from mlxtp import Communicator
from mlxtp.cluster.curve import interpolate
from mlxtp.comm.allreduce import ALGORITHMS, Collectives, algorithms
from mlxtp.comm.tuning import Tuning, tune, untimed

MEASURED = Tuning(
    sizes=(1000, 2000, 10_000),
    seconds={
        "ring-one-shot": (1.0, 2.0, 10.0),
        "direct-two-shot": (4.0, 4.0, 5.0),
        "direct-one-shot": (3.0, 3.0, 9.0),
    },
)


@pytest.mark.parametrize(
    ("nbytes", "algorithm", "gather"),
    [
        (1, "ring-one-shot", "ring-one-shot"),
        (2500, "ring-one-shot", "ring-one-shot"),
        (5000, "direct-two-shot", "ring-one-shot"),
        (10_000, "direct-two-shot", "direct-one-shot"),
        (10**8, "direct-two-shot", "direct-one-shot"),
    ],
)
def test_the_fastest_is_taken(nbytes: int, algorithm: str, gather: str) -> None:
    assert MEASURED.algorithm(nbytes) == algorithm
    assert MEASURED.gather(nbytes) == gather


def test_beyond_the_sizes_the_last_slope_goes_on() -> None:
    close = Tuning((1, 10), {"early": (1.0, 2.0), "flat": (5.0, 5.0)})
    assert close.algorithm(36) == "early"
    assert close.algorithm(38) == "flat"
    falling = Tuning((1, 10), {"noisy": (9.0, 3.0), "steady": (2.0, 2.0)})
    assert falling.algorithm(1000) == "steady"  # nothing gets faster with size


@pytest.mark.parametrize(
    ("size", "seconds"),
    [(0, 3.0), (1, 3.0), (2, 4.0), (3, 5.0), (5, 6.0), (7, 7.0), (11, 9.0)],
)
def test_lines_between_measured_points(size: int, seconds: float) -> None:
    assert interpolate(size, (1, 3, 7), (3.0, 5.0, 7.0)) == seconds


def test_lines_of_few_points_or_falling_ones() -> None:
    assert interpolate(1, (4,), (2.0,)) == interpolate(9, (4,), (2.0,)) == 2.0
    assert interpolate(5, (4, 6), (2.0, 1.0)) == 1.5
    assert interpolate(99, (4, 6), (2.0, 1.0)) == 1.0


def test_without_a_measurement_the_size_decides() -> None:
    tuning = untimed(algorithms(5))
    assert tuning.algorithm(256 * 1024 - 1) == "direct-one-shot"
    assert tuning.algorithm(256 * 1024) == "direct-two-shot"
    assert tuning.gather(1) == tuning.gather(10**8) == "direct-one-shot"
    assert str(tuning) == "allreduce: direct-one-shot, direct-two-shot from 256 KiB"
    ring = untimed(algorithms(5, "ring"))
    assert [ring.algorithm(n) for n in (1, 10**6)] == algorithms(5, "ring")
    only = untimed(["ring-two-shot"])
    assert only.algorithm(1) == only.gather(1) == "ring-two-shot"


def test_in_words() -> None:
    assert str(Tuning((), {"direct-one-shot": ()})) == "allreduce: direct-one-shot"
    lines = str(MEASURED).splitlines()
    assert len(lines) == 1 + len(MEASURED.seconds) + 1
    assert lines[-1] == "taken: ring-one-shot, direct-two-shot from 8 KiB"


def test_all_ranks_measure_and_agree(comm: Communicator) -> None:
    if comm.size == 1:
        pytest.skip("one rank sends nothing")
    from mlxtp.comm.transports.mpi import MPITransport

    transport = MPITransport()
    tuning = tune(Collectives(transport).allreduce, transport, algorithms(comm.size))
    assert set(tuning.seconds) == set(algorithms(comm.size)) <= set(ALGORITHMS)
    assert len(tuning.sizes) >= 2 and list(tuning.sizes) == sorted(tuning.sizes)
    assert np.array([*tuning.seconds.values()]).min() > 0
    assert len(set(map(str, comm.allgather_object(tuning)))) == 1
    only = tune(Collectives(transport).allreduce, transport, ["direct-one-shot"])
    assert only == Tuning((), {"direct-one-shot": ()})
    assert only.algorithm(7) == only.gather(7) == "direct-one-shot"
