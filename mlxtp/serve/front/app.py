"""The front's application: every endpoint, behind the guard."""

import logging
from collections import defaultdict
from collections.abc import Callable

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from starlette.exceptions import HTTPException

from mlxtp.serve.front import (
    anthropic,
    cluster,
    errors,
    metrics,
    models,
    openai_chat,
    openai_completions,
    page,
    responses,
)
from mlxtp.serve.front.config import Config
from mlxtp.serve.front.ranks import Generation, Mistake, Ranks, Unavailable
from mlxtp.serve.front.security import Guard
from mlxtp.serve.messages import Event

log = logging.getLogger(__name__)

MODULES = (
    openai_chat,
    openai_completions,
    responses,
    anthropic,
    models,
    metrics,
    cluster,
    page,
)

EXCEPTIONS = (
    errors.Refusal,
    Mistake,
    Unavailable,
    RequestValidationError,
    HTTPException,
)


def create_app(ranks: Ranks, config: Config) -> FastAPI:
    """Make the application that serves `ranks`; `config` gives both to endpoints."""
    app = FastAPI(
        title="mlxtp",
        description="A language model on several machines.",
        docs_url=None,
        redoc_url=None,
    )
    name = config.model_names[0]
    app.state.ranks, app.state.config = ranks, config
    app.state.metrics = metrics.Metrics(ranks, name)
    app.state.cluster = cluster.Cluster(ranks, name)
    for module in MODULES:
        app.include_router(module.router)
    for exception in EXCEPTIONS:
        app.add_exception_handler(exception, errors.handle)
    if config.log_prompts:
        ranks.observers.append(_logger_of_answers())
    app.add_middleware(Guard, config=config)
    # Outermost, so that the pages that are let in can read errors too.
    app.add_middleware(
        CORSMiddleware,
        allow_origins=config.allowed_origins,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
    )
    return app


def _logger_of_answers() -> Callable[[Generation, Event | None], None]:
    """An observer that writes each answer to the log when it has ended."""
    answers: dict[str, list[str]] = defaultdict(list)

    def observe(generation: Generation, event: Event | None) -> None:
        if event is None:
            return
        answers[event.id] += [str(value) for _, value in event.pieces]
        if event.finish is not None:
            log.info("answer %s: %s", event.id, "".join(answers.pop(event.id)))

    return observe
