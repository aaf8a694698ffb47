"""What each host keeps of a model on its disk, and what `--spare` adds to it."""

from collections.abc import Sequence
from dataclasses import dataclass

from mlxtp.checkpoint.tensors import StoredTensor, bytes_of
from mlxtp.fetch.spare import bytes_besides, kept_besides
from mlxtp.model.sources import needed
from mlxtp.partition.shares import Share
from mlxtp.plan.model import PlannedModel
from mlxtp.sharding.decide import slice_table


@dataclass(frozen=True)
class Disk:
    """Bytes on a host's disk: its ranks' slices, and those of the host before it."""

    host: str
    slices_bytes: int
    spare_bytes: int


def disks(
    model: PlannedModel, shares: Sequence[int | Share], hosts: Sequence[str]
) -> list[Disk]:
    """Say what the hosts keep of a model that is cut or comes from the hub: exact.

    `hosts` has each rank's host.

    Raises: ValueError if the model cannot be split so.
    """
    empty = model.build()
    table = slice_table(empty.model, shares)
    empty.settle(table.slices(0))
    ranks = range(len(shares))
    tensors = [needed(empty.sources, table.slices(r), r, len(shares)) for r in ranks]
    nowhere = {t.name: StoredTensor(t, ()) for of_rank in tensors for t in of_rank}
    named = [{t.name: part for t, part in of_rank.items()} for of_rank in tensors]
    kept = kept_besides(hosts)
    slices, spare = dict.fromkeys(hosts, 0), dict.fromkeys(hosts, 0)
    for rank, host in enumerate(hosts):
        slices[host] += bytes_of(tensors[rank])
        others = [named[other] for other in kept[rank]]
        spare[host] += bytes_besides(nowhere, named[rank], others)
    return [Disk(host, slices[host], spare[host]) for host in slices]
