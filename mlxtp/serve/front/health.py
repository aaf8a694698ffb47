"""`GET /health`: whether a request would be taken now."""

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from mlxtp.serve.front.access import TheRanks

router = APIRouter()


@router.get("/health")
async def health(ranks: TheRanks) -> JSONResponse:
    """Answer 200 when the ranks take requests, else 503, with the state."""
    is_ready = ranks.state == "ready"
    content = {"state": ranks.state, "message": ranks.words, "done": ranks.done}
    headers = {} if is_ready else {"Retry-After": "5"}
    return JSONResponse(content, 200 if is_ready else 503, headers)
