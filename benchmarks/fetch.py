"""What ranks fetch from a hub, and what moves when the world changes.

Serves a checkpoint with random weights and the shapes of Llama 3.2 1B from a hub on
loopback, and loads it in worlds of several sizes one after the other. Each rank is a
machine of its own, with its own cache. For each world: the bytes that its ranks lacked
(the least that has to move), what came to them, what of it the hub gave, in how many
requests, and the most that one rank fetched.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from ranks import measured

sys.path.append(str(Path(__file__).parent.parent / "tests" / "support"))

NAME = "org/model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worlds", type=int, nargs="+", default=[5, 5, 4, 7, 3])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="keep the checkpoint here")
    parser.add_argument("--rank", type=Path, metavar="CACHE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank:
        measure(args.rank)
        return
    import mlx.core as mx
    from hub_server import Hub
    from models import LLAMA_3_2_1B, make

    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary) / "model"
        config = {**LLAMA_3_2_1B, "num_hidden_layers": args.layers}
        make(folder, config, mx.bfloat16, args.bits)
        whole = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        worlds = []
        with Hub({NAME: folder}) as hub:
            for ranks in args.worlds:
                options = ["--rank", Path(temporary) / "machines"]
                figures = measured(ranks, __file__, *options, HF_ENDPOINT=hub.url)
                worlds.append({"ranks": ranks, **figures})
    report(whole, worlds)


def report(whole: int, worlds: list[dict[str, Any]]) -> None:
    print(f"a checkpoint of {whole / 1e6:.0f} MB; all in MB")
    print(
        f"{'ranks':>5} {'lacked':>8} {'came':>8} {'from the hub':>13} {'of it':>6} "
        f"{'most by a rank':>15} {'requests':>9}"
    )
    for world in worlds:
        fetched = sum(world["fetched"])
        print(
            f"{world['ranks']:5} {sum(world['lacked']) / 1e6:8.1f} "
            f"{sum(world['came']) / 1e6:8.1f} {fetched / 1e6:13.1f} "
            f"{fetched / whole:6.2f} {max(world['fetched']) / 1e6:15.1f} "
            f"{sum(world['requests']):9}"
        )
    print(json.dumps({"bytes": whole, "worlds": worlds}))


def measure(machines: Path) -> None:
    """Load on this rank and tell what it took; rank 0 prints it for all."""
    # Before huggingface-hub is imported: it looks once.
    rank = os.environ.get("OMPI_COMM_WORLD_RANK", "0")
    os.environ["HF_HOME"] = str(machines / f"host-{rank}")
    import numpy as np

    import mlxtp
    from mlxtp.fetch import hub
    from mlxtp.fetch.journal import Journal
    from mlxtp.loading import load_model

    comm = mlxtp.Communicator.world()
    comm.host = f"host-{rank}"
    fetched: list[int] = []
    came: list[int] = []
    fetch, write = hub.fetch, Journal.write

    def counted_fetch(
        repo: hub.Repo, file: str, offset: int, target: np.ndarray, *more: Any
    ) -> None:
        fetch(repo, file, offset, target, *more)
        # The beginnings of files are for comparing them with the hub's hashes.
        fetched.append(target.size if offset else 0)

    def counted_write(self: Journal, *arguments: Any, from_hub: bool) -> None:
        came.append(arguments[-1].size)
        write(self, *arguments, from_hub=from_hub)

    hub.fetch, Journal.write = counted_fetch, counted_write  # type: ignore[method-assign]
    before = kept(machines / f"host-{rank}")
    model, _ = load_model(NAME, comm)
    assert model is not None
    mine = {
        "lacked": kept(machines / f"host-{rank}") - before,
        "came": sum(came),
        "fetched": sum(fetched),
        "requests": len([size for size in fetched if size]),
    }
    everyone = comm.allgather_object(mine)
    if comm.rank == 0:
        print(json.dumps({key: [rank[key] for rank in everyone] for key in mine}))


def kept(machine: Path) -> int:
    """Bytes of the slices in a machine's cache, without their files' headers."""
    files = machine.glob("assets/**/rank-*/*.safetensors")
    headers = {f: int.from_bytes(f.open("rb").read(8), "little") + 8 for f in files}
    return sum(file.stat().st_size - header for file, header in headers.items())


if __name__ == "__main__":
    main()
