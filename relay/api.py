"""relay's own routes, under `/relay`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import orjson
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route, Router

from relay.access import Access
from relay.browser_client import browser_client_routes
from relay.errors import MethodNotAllowed, RouteNotFound, UnknownRun
from relay.events import EventsEndpoint
from relay.frame import timestamp
from relay.headers import Headers
from relay.journal.base import RunInfo, StreamInfo
from relay.limits import RUN_WORDS, check_run_name, check_stream_name
from relay.replay.request import JSON, read_limit
from relay.replay.response import ANSWER, Receive, Scope, Send, StreamAnswer
from relay.security import Right
from relay.transcript import read_transcript

if TYPE_CHECKING:
    from relay.app import App


_NO_ROUTE = "relay serves nothing here; listing, diagnostics and metrics are at --admin-addr where it is set."


class Guarded(Route):
    """A route for who has a right: in the stream that its path names, or of the administrator."""

    def __init__(
        self, access: Access, right: Right, path: str, endpoint: Callable[..., Any], method: str = "GET"
    ) -> None:
        super().__init__(path, endpoint, methods=[method])
        self._access = access
        self._right = right

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Ask for the right before the endpoint runs."""
        if scope["method"] in (self.methods or ()):
            stream = scope["path_params"].get("stream", "")
            await self._access.grant(scope, self._right, stream and check_stream_name(stream))
        await super().handle(scope, receive, send)


class Json(Response):
    """A JSON answer."""

    media_type = JSON

    def __init__(self, content: Any, status_code: int = 200) -> None:
        super().__init__(content, status_code, {"cache-control": "no-store"})

    def render(self, content: Any) -> bytes:
        """Encode with orjson."""
        return orjson.dumps(content)


class Api:
    """The routes. Errors are raised; the application turns them into problem documents."""

    def __init__(self, app: App, routes: Sequence[Route]) -> None:
        self._app = app
        self._router = Router(routes, redirect_slashes=False)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> StreamAnswer | None:
        """Answer a request, or return what is to be served. What Starlette refuses becomes one of our
        errors."""
        scope["app"] = self  # lets Starlette's router raise instead of answering by itself
        try:
            await self._router(scope, receive, send)
            return scope.get(ANSWER)
        except HTTPException as error:
            if error.status_code == 405:
                allow = self._allowed(scope)
                raise MethodNotAllowed(f"Allowed: {allow}.", allow=allow) from None
            raise RouteNotFound(_NO_ROUTE) from None

    def _allowed(self, scope: Scope) -> str:
        """The methods of every route with this path; Starlette names those of one."""
        methods: set[str] = set()
        for route in self._router.routes:
            if route.matches(scope)[0] is not Match.NONE:
                methods |= getattr(route, "methods", None) or set()
        if scope["path"].endswith("/events"):
            methods.discard("HEAD")  # Starlette adds it, and an endless answer cannot serve it
        return ", ".join(sorted(methods))


def read_routes(app: App) -> list[Route]:
    """The routes that read one stream, and those that need no right."""
    reads, session = ReadRoutes(app), SessionRoutes(app)

    def read(path: str, endpoint: Callable[..., Any]) -> Route:
        return Guarded(app.access, Right.READ, "/relay/v1/streams/{stream}" + path, endpoint)

    return [
        read("", reads.stream),
        # It asks for the right itself, to say in band that nobody can be asked for it now.
        Route("/relay/v1/streams/{stream}/events", EventsEndpoint(app), methods=["GET"]),
        read("/runs", reads.runs),
        read("/runs/{run}", reads.run),
        read("/runs/{run}/transcript", reads.transcript),
        Route("/relay/v1/session", session.open, methods=["POST"]),
        Route("/relay/v1/session", session.close, methods=["DELETE"]),
        *browser_client_routes(),
    ]


class SessionRoutes:
    """A token in a cookie that no script can read, for a browser's own EventSource."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def open(self, request: Request) -> Response:
        """`POST /relay/v1/session`: 204, and the token of `Authorization` in a cookie."""
        return _no_content(await self._app.access.exchange(request.scope))

    async def close(self, request: Request) -> Response:
        """`DELETE /relay/v1/session`: 204, and the cookie is gone."""
        return _no_content(self._app.access.forget(request.scope))


def _no_content(headers: Headers) -> Response:
    response = Response(status_code=204, headers={"cache-control": "no-store"})
    response.raw_headers += headers
    return response


class ReadRoutes:
    """What is known of one stream and its runs."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def stream(self, request: Request) -> Response:
        """`GET /relay/v1/streams/{stream}`."""
        name = check_stream_name(request.path_params["stream"])
        return Json(stream_object(await self._app.journal.describe(name)))

    async def run(self, request: Request) -> Response:
        """`GET /relay/v1/streams/{stream}/runs/{run}`: a run by its name, `current` or `latest`."""
        stream, run = await self._stream_and_run(request)
        return Json(run_object(stream, await self._app.journal.run(stream, run)))

    async def _stream_and_run(self, request: Request) -> tuple[str, str]:
        stream, run = check_stream_name(request.path_params["stream"]), request.path_params["run"]
        if run not in RUN_WORDS:
            return stream, check_run_name(run)
        info = await self._app.journal.describe(stream)
        found = info.latest_run if run == "latest" else info.current_run
        if not found:
            raise UnknownRun("The stream has no run." if run == "latest" else "The stream has no open run.")
        return stream, found

    async def runs(self, request: Request) -> Response:
        """`GET /relay/v1/streams/{stream}/runs`: its runs, oldest first, paged with `after` and `limit`."""
        stream = check_stream_name(request.path_params["stream"])
        limit = read_limit(request.query_params, 100)
        after = request.query_params.get("after", "")
        infos = await self._app.journal.runs(stream, after and check_run_name(after), limit + 1)
        page = infos[:limit]
        return Json(
            {
                "runs": [run_object(stream, info) for info in page],
                "after": page[-1].run if page else None,
                "more": len(infos) > limit,
            }
        )

    async def transcript(self, request: Request) -> Response:
        """`GET /relay/v1/streams/{stream}/runs/{run}/transcript`: the text a reader could have been shown."""
        stream, run = await self._stream_and_run(request)
        max_bytes = self._app.settings.transcript_max_bytes
        transcript = await read_transcript(self._app.journal, stream, run, max_bytes)
        return Json(await asyncio.to_thread(transcript.document))


def stream_object(info: StreamInfo) -> dict[str, Any]:
    """A stream as JSON."""
    return {
        "stream": info.stream,
        "created": timestamp(info.extent.created_ms),
        "active": timestamp(info.active_ms),
        "earliest_seq": info.extent.earliest_seq,
        "top": str(info.extent.top),
        "sealed": info.sealed,
        "open_runs": list(info.open_runs),
        "latest_run": info.latest_run or None,
        "runs": info.runs,
        "bytes": info.bytes_held,
        "retention": info.retention._asdict(),
        "metadata": orjson.loads(info.metadata) if info.metadata else None,
    }


def run_object(stream: str, info: RunInfo) -> dict[str, Any]:
    """A run as JSON, without its secrets."""
    return {
        "stream": stream,
        "run": info.run,
        "status": info.status,
        "reason": info.reason or None,
        "error": info.error or None,
        "start": str(info.start),
        "last": str(info.last),
        "frames": info.frames,
        "text_bytes": info.text_bytes,
        "dialect": info.dialect or None,
        "started": timestamp(info.started_ms),
        "ended": timestamp(info.ended_ms) if info.ended_ms else None,
        "metadata": orjson.loads(info.metadata) if info.metadata else None,
        "heard": timestamp(max(info.heard_ms, info.last.ms)),
        "idle_timeout_s": info.idle_timeout_s or None,
        "superseded_by": info.superseded_by or None,
    }
