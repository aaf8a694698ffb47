"""Whose slices a host keeps besides its own: then no single loss needs the hub."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from mlxtp.checkpoint.tensors import Piece, StoredTensor
from mlxtp.comm.communicator import Communicator
from mlxtp.comm.errors import UsageError
from mlxtp.partition.spans import Slice

logger = logging.getLogger(__name__)

# What a rank passes on in a step: a service answers between two of them.
STEP_BYTES = 16 * 1024 * 1024


class Spare:
    """Slices of other hosts that come to this host's disk when there is time.

    `is_left` says whether there is something for `step`; it is the same on all ranks.
    """

    def __init__(self, comm: Communicator, steps: Iterator[None] | None) -> None:
        """Take the steps of `Prepared.keeping_spare`; without them nothing is left."""
        self._comm, self._steps = comm, steps or iter(())
        self.is_left = steps is not None

    def step(self) -> None:
        """Make one step, on all ranks together.

        What cannot be kept is said, and is no reason to end a service.
        """
        try:
            with self._comm.unlimited():  # disks may be slow, and not alike
                next(self._steps)
        except StopIteration:
            self.is_left = False
        except UsageError as error:
            self.is_left = False
            if self._comm.rank == 0:
                logger.warning(f"--spare: {error}")


def kept_besides(hosts: Sequence[str]) -> list[list[int]]:
    """For each rank: the ranks of another host whose slices it keeps on disk.

    `hosts` has each rank's host. The hosts make a ring, in the order of their first
    ranks, and each keeps what the host before it has: its ranks take turns with the
    ranks there. One host alone keeps nothing besides.
    """
    ring: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        ring.setdefault(host, []).append(rank)
    result: list[list[int]] = [[] for _ in hosts]
    before = list(ring.values())[-1]
    for ranks in ring.values():
        if ranks is not before:
            for place, other in enumerate(before):
                result[ranks[place % len(ranks)]].append(other)
        before = ranks
    return result


def bytes_besides(
    here: Mapping[str, StoredTensor],
    own: Mapping[str, Slice],
    others: Sequence[Mapping[str, Slice]],
) -> int:
    """Bytes that a rank writes to keep the slices of `others` beside its `own`.

    What is `here` on its disk is not written; slices are given by tensor's name.
    """
    held = {
        name: replace(here[name], pieces=(*here[name].pieces, Piece(Path(), 0, part)))
        for name, part in own.items()
    }
    total = 0
    for of_rank in others:
        for name, part in of_rank.items():
            stored = held.get(name, here[name])
            if missing := stored.missing(part):
                total += stored.tensor.bytes_of(missing)
                pieces = (*stored.pieces, Piece(Path(), 0, part))
                held[name] = replace(stored, pieces=pieces)
    return total
