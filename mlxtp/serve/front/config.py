"""What the command line says of the front, and how an endpoint gets at it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import Depends, Request

from mlxtp.serve.front.journal import Journal
from mlxtp.serve.front.ranks import Ranks


@dataclass(frozen=True)
class Config:
    """How the front serves.

    Args:
        model_names: under which names clients ask for the model; the first is the one
            that answers carry. At least one.
        host: the address that it listens on.
        port: the port that it listens on.
        api_keys: any of them lets a client in; none lets everybody in.
        max_concurrency: the most requests that ranks work on at once.
        max_queue: the most requests that wait besides.
        allowed_origins: origins of other sites whose pages may ask; "*" for all.
        defaults: what a request that leaves a setting open gets, in `Settings`' names;
            it holds what the command line gives.
        log_prompts: prompts and answers may stand in the log.
        drain_seconds: how long requests under way may take once the server is to end.
        max_body_bytes: the longest body of a request.
        journal: of requests that have an Idempotency-Key; None keeps none.
    """

    model_names: tuple[str, ...]
    host: str = "127.0.0.1"
    port: int = 8080
    api_keys: tuple[str, ...] = ()
    max_concurrency: int = 32
    max_queue: int = 256
    allowed_origins: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    log_prompts: bool = False
    drain_seconds: float = 30.0
    max_body_bytes: int = 32 << 20
    journal: Journal | None = None


def _ranks(request: Request) -> Ranks:
    ranks: Ranks = request.app.state.ranks
    return ranks


def _config(request: Request) -> Config:
    config: Config = request.app.state.config
    return config


# Arguments of an endpoint, which FastAPI fills in.
TheRanks = Annotated[Ranks, Depends(_ranks)]
TheConfig = Annotated[Config, Depends(_config)]
