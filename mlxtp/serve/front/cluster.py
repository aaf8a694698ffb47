"""`GET /health` and `/cluster`: whether the ranks are ready, and how they are."""

import time
from collections import deque
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from mlxtp.serve.front.config import TheRanks
from mlxtp.serve.front.ranks import Generation, Ranks
from mlxtp.serve.messages import Event

WINDOW_SECONDS = 3.0  # what is said of now is said of so many seconds

router = APIRouter()


@router.get("/health")
async def health(ranks: TheRanks) -> JSONResponse:
    """Answer 200 when the ranks are ready, else 503, with the state."""
    is_ready = ranks.state == "ready"
    content = {"state": ranks.state, "message": ranks.words, "done": ranks.done}
    headers = {} if is_ready else {"Retry-After": "5"}
    return JSONResponse(content, 200 if is_ready else 503, headers)


@router.get("/cluster")
async def cluster(request: Request) -> dict[str, Any]:
    """Describe the cluster as it is now."""
    content: dict[str, Any] = request.app.state.cluster.describe()
    return content


class Cluster:
    """Follows the ranks; `model_name` is the one that clients know."""

    def __init__(self, ranks: Ranks, model_name: str) -> None:
        self._ranks = ranks
        self._model_name = model_name
        self._tokens: deque[tuple[float, int]] = deque()  # when, how many
        ranks.observers.append(self._observe)

    def describe(self) -> dict[str, Any]:
        """Give all that is known; what is not known yet is None.

        Seconds and bytes. `tokens_per_second` and each rank's `collective_share` (the
        part of the time that it spent in collectives) are those of the last three
        seconds.
        """
        ranks, stats = self._ranks, self._ranks.stats
        running, waiting = ranks.running_and_waiting()
        described: dict[str, Any] = {
            "state": ranks.state,
            "words": ranks.words,
            "done": ranks.done,
            "model": None,
            "context": None,
            "links": None,
            "notes": [],
            "running": running,
            "waiting": waiting,
            "tokens_per_second": self._speed(),
            "step_seconds": stats and stats.step_seconds,
            "cache_use": stats.cache_use if stats else 0.0,
            "prefix_queries": stats.prefix_queries if stats else 0,
            "prefix_hits": stats.prefix_hits if stats else 0,
            "prefix_bytes": stats.prefix_bytes if stats else 0,
            "missing": ranks.missing,
            "hosts": [],
            "ranks": [],
        }
        if (ready := ranks.ready) is None:
            return described
        chips = {rank.host: rank.chip for rank in ready.ranks}
        of_rank = {rank.rank: rank for rank in stats.ranks} if stats else {}
        shares = self._collective_shares()
        return described | {
            "model": self._model_name,
            "context": ready.context,
            "links": ready.links,
            "notes": ready.notes,
            "hosts": [
                {
                    "host": host,
                    "chip": chip,
                    "ranks": [r.rank for r in ready.ranks if r.host == host],
                }
                for host, chip in chips.items()
            ],
            "ranks": [
                {
                    **asdict(rank),
                    "used_bytes": now.memory_bytes if now else None,
                    "peak_bytes": now.peak_memory_bytes if now else None,
                    "sent_bytes": now.sent_bytes if now else None,
                    "collective_seconds": now.collective_seconds if now else None,
                    "collective_share": shares.get(rank.rank),
                }
                for rank in ready.ranks
                for now in [of_rank.get(rank.rank)]
            ],
        }

    def _observe(self, generation: Generation, event: Event | None) -> None:
        if event is not None and event.tokens:
            self._tokens.append((time.monotonic(), len(event.tokens)))
            self._forget()

    def _forget(self) -> None:
        while self._tokens and self._tokens[0][0] < time.monotonic() - WINDOW_SECONDS:
            self._tokens.popleft()

    def _speed(self) -> float:
        self._forget()
        return sum(count for _, count in self._tokens) / WINDOW_SECONDS

    def _collective_shares(self) -> dict[int, float]:
        """The part of each rank's time; none where nothing has been computed."""
        earliest = time.monotonic() - WINDOW_SECONDS
        recent = [each for each in self._ranks.recent_stats if each[0] >= earliest]
        if not recent or recent[-1][1].steps == recent[0][1].steps:
            return {}
        (begun, first), (ended, last) = recent[0], recent[-1]
        before = {rank.rank: rank.collective_seconds for rank in first.ranks}
        return {
            rank.rank: min(
                1.0, (rank.collective_seconds - before[rank.rank]) / (ended - begun)
            )
            for rank in last.ranks
        }
