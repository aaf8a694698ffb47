"""The page: files of `serve/page/`, with headers that let nothing else in."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, Request, Response
from starlette.exceptions import HTTPException

FOLDER = Path(__file__).parents[1] / "page"

MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

# Scripts and styles are this server's files, never text in a page; requests go to this
# server alone; HTML is made of text by DOMPurify alone; no other page may frame this.
POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self'",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "require-trusted-types-for": "'script'",
    "trusted-types": "dompurify",
}
HEADERS = {
    "Content-Security-Policy": "; ".join(f"{k} {v}" for k, v in POLICY.items()),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",  # ask each time; what has not changed is not sent
}

router = APIRouter(include_in_schema=False)


@dataclass(frozen=True)
class _File:
    content: bytes
    media_type: str
    tag: str


def _read(path: Path) -> _File:
    content = path.read_bytes()
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    return _File(content, MEDIA_TYPES[path.suffix], tag)


# A path of a request is looked up here and never reaches the file system.
FILES = {
    path.relative_to(FOLDER).as_posix(): _read(path)
    for path in FOLDER.rglob("*")
    if path.suffix in MEDIA_TYPES
}


@router.get("/")
@router.head("/")  # Claude Code looks so whether the server is there
async def index(request: Request) -> Response:
    """Send the page."""
    return _send(request, "index.html")


@router.get("/page/{name:path}")
async def file(request: Request, name: str) -> Response:
    """Send a file that the page names."""
    return _send(request, name)


def _send(request: Request, name: str) -> Response:
    if name not in FILES:
        raise HTTPException(404, f"no file {name!r} belongs to the page")
    file = FILES[name]
    headers = {**HEADERS, "ETag": file.tag}
    if request.headers.get("If-None-Match") == file.tag:
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)
