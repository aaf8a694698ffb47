"""A hub for all ranks, and each rank's way to it, as on a machine of its own."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub_server import Hub
from huggingface_hub import constants
from huggingface_hub.utils import _cache_assets

from mlxtp import Communicator
from mlxtp.fetch import hub


@contextmanager
def serve(
    comm: Communicator, repos: dict[str, Path]
) -> Iterator[tuple[Hub | None, str]]:
    """The hub, which rank 0 has, and its address."""
    if comm.rank == 0:
        with Hub(repos) as server:
            comm.bcast_object(server.url)
            yield server, server.url
    else:
        yield None, comm.bcast_object(None)


class Client:
    """A rank's way to the hub: its own cache, as on a machine of its own."""

    def __init__(self, comm: Communicator, patch: pytest.MonkeyPatch) -> None:
        self.comm, self.patch = comm, patch

    def use(self, url: str, cache: Path) -> None:
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        self.patch.setattr(constants, "ENDPOINT", url)
        self.patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        self.patch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
        self.patch.setattr(_cache_assets, "HF_ASSETS_CACHE", str(cache / "assets"))
        self.patch.setattr(hub, "WAIT_SECONDS", 0.01)
        self.patch.setattr(self.comm, "host", f"host-{self.comm.rank}")

    def count(self) -> list[int]:
        """Bytes of tensors that this rank asks the hub for, from now on."""
        asked = [0]
        fetch = hub.fetch

        def counting(
            repo: hub.Repo, file: str, offset: int, target: np.ndarray, *more: Any
        ) -> None:
            asked[0] += target.size if offset else 0  # beginnings are for the hash
            fetch(repo, file, offset, target, *more)

        self.patch.setattr(hub, "fetch", counting)
        return asked
