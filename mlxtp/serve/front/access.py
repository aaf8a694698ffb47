"""How an endpoint gets at the ranks and the configuration: as its arguments."""

from typing import Annotated

from fastapi import Depends, Request

from mlxtp.serve.front.config import Config
from mlxtp.serve.front.ranks import Ranks


def _ranks(request: Request) -> Ranks:
    ranks: Ranks = request.app.state.ranks
    return ranks


def _config(request: Request) -> Config:
    config: Config = request.app.state.config
    return config


TheRanks = Annotated[Ranks, Depends(_ranks)]
TheConfig = Annotated[Config, Depends(_config)]
