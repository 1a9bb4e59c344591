"""The browser client as relay serves it: the files that are published as `relay-stream`, unchanged."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

STATIC = Path(__file__).parent / "static"

MEDIA_TYPES = {
    "relay-stream.js": "text/javascript; charset=utf-8",
    "relay-stream.d.ts": "application/typescript; charset=utf-8",
}


def browser_client_routes() -> list[Route]:
    """`GET /relay/static/relay-stream.js` and its types."""
    return [
        Route(f"/relay/static/{name}", partial(serve_file, (STATIC / name).read_bytes(), media_type))
        for name, media_type in MEDIA_TYPES.items()
    ]


async def serve_file(body: bytes, media_type: str, request: Request) -> Response:
    """A file that browsers keep and ask for anew: it changes with relay."""
    tag = f'"{hashlib.sha256(body).hexdigest()[:16]}"'
    headers = {"cache-control": "no-cache", "etag": tag, "content-type": media_type}
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(body, headers=headers)
