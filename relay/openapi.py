"""The description of relay's own routes (OpenAPI 3.1): a file, which a test holds to the routes."""

from __future__ import annotations

from functools import partial

from starlette.routing import Route

from relay.browser_client import STATIC, serve_file

DESCRIPTION = STATIC / "openapi.json"


def openapi_routes() -> list[Route]:
    """`GET /relay/openapi.json`, for everybody."""
    serve = partial(serve_file, DESCRIPTION.read_bytes(), "application/json")
    return [Route("/relay/openapi.json", serve)]
