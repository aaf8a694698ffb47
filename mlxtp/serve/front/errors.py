"""What a client reads where something went wrong: OpenAI's form, or Anthropic's."""

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from mlxtp.serve.front.ranks import Mistake, Unavailable

log = logging.getLogger(__name__)

ANTHROPIC_PATH = "/v1/messages"

# The `type` of each status in OpenAI's form and in Anthropic's.
TYPES = {
    400: ("invalid_request_error", "invalid_request_error"),
    401: ("authentication_error", "authentication_error"),
    403: ("permission_error", "permission_error"),
    404: ("not_found_error", "not_found_error"),
    413: ("invalid_request_error", "request_too_large"),
    429: ("rate_limit_error", "rate_limit_error"),
    500: ("server_error", "api_error"),
    503: ("service_unavailable_error", "overloaded_error"),
}


class Refusal(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        message: what was given, what was wanted.
        param: the field that is wrong, as a client wrote it: "messages.0.role".
        code: a word for programs, such as "model_not_found".
        retry_seconds: after how long it may go well; None where it never will.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_seconds: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_seconds = retry_seconds


def refusal(error: BaseException) -> Refusal:
    """Find the answer for any exception: one that nobody foresaw is logged, and 500."""
    match error:
        case Refusal():
            return error
        case Mistake():
            return Refusal(400, str(error))
        case Unavailable():
            return Refusal(503, str(error), code="unavailable", retry_seconds=5)
        case RequestValidationError() | ValidationError():
            return _invalid(error.errors())
        case HTTPException(status_code=404, detail="Not Found"):
            return Refusal(404, "there is no such path; GET /openapi.json lists them")
        case HTTPException():
            return Refusal(error.status_code, str(error.detail))
    log.error("a request failed", exc_info=error)
    return Refusal(500, "the server failed; its log says more", code="internal_error")


def body(error: Refusal, *, is_anthropic: bool = False) -> dict[str, Any]:
    """Write an error as JSON, in OpenAI's form or Anthropic's."""
    types = TYPES.get(error.status) or TYPES[500 if error.status >= 500 else 400]
    if is_anthropic:
        return {
            "type": "error",
            "error": {"type": types[1], "message": error.message},
        }
    return {
        "error": {
            "message": error.message,
            "type": types[0],
            "param": error.param,
            "code": error.code,
        }
    }


def response(error: BaseException, path: str) -> JSONResponse:
    """Answer a request for `path` with what `refusal` finds for an exception."""
    refused = refusal(error)
    headers = {}
    if refused.retry_seconds is not None:
        headers["Retry-After"] = str(refused.retry_seconds)
    if refused.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if refused.status == 408:
        headers["Connection"] = "close"
    if isinstance(error, HTTPException) and error.headers:
        headers |= error.headers
    content = body(refused, is_anthropic=path.startswith(ANTHROPIC_PATH))
    return JSONResponse(content, refused.status, headers)


async def handle(request: Request, error: Exception) -> JSONResponse:
    """Answer as FastAPI's handler of exceptions."""
    return response(error, request.url.path)


def _invalid(mistakes: Any) -> Refusal:
    """Say what pydantic has found: the first mistake, and how many more there are."""
    first: Mapping[str, Any] = mistakes[0]
    names = [str(part) for part in first["loc"]]
    param = ".".join(names[names[:1] == ["body"] :]) or None
    message = str(first["msg"]).removeprefix("Value error, ")
    given = repr(first.get("input"))
    if first["type"] not in ("missing", "value_error", "json_invalid"):
        message += f"; given: {given if len(given) <= 80 else given[:77] + '...'}"
    if len(mistakes) > 1:
        message += f" (and {len(mistakes) - 1} more)"
    return Refusal(
        400, f"{param}: {message}" if param else message, param=param, code="invalid"
    )
