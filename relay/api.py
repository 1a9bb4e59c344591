"""relay's own routes, under `/relay`."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import orjson
from starlette.datastructures import Headers, QueryParams
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router

from relay.cursor import Cursor, ResumeId, Standing, judge
from relay.errors import (
    Busy,
    CursorGone,
    InvalidParameter,
    JournalError,
    MethodNotAllowed,
    ResumeUnknown,
    RouteNotFound,
    UnknownStream,
)
from relay.frame import Frame, frame_object, timestamp
from relay.journal.base import Page, RunInfo, StreamInfo
from relay.limits import PAGE_MAX_BYTES, PAGE_MAX_FRAMES, check_run_name, check_stream_name
from relay.metrics import CONTENT_TYPE
from relay.replay.reader import Reader, ended_at
from relay.replay.request import EVENT_STREAM, JSON, ReadRequest, read_request
from relay.replay.response import CONNECTION, STREAMING_HEADERS, Receive, Scope, Send, send_no_content
from relay.replay.tail import WRITE_MAX_BYTES, Tail
from relay.replay.view import View, is_terminal

if TYPE_CHECKING:
    from relay.app import App


class Json(Response):
    """A JSON answer."""

    media_type = JSON

    def render(self, content: Any) -> bytes:
        """Encode with orjson."""
        return orjson.dumps(content)


class Api:
    """The routes. Errors are raised; the application turns them into problem documents."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._router = Router(
            [
                Route("/relay/v1/streams", self.streams),
                Route("/relay/v1/streams/{stream}", self.stream),
                Route("/relay/v1/streams/{stream}/events", EventsEndpoint(app), methods=["GET"]),
                Route("/relay/v1/streams/{stream}/runs/{run}", self.run),
                Route("/relay/healthz", self.healthz),
                Route("/relay/readyz", self.readyz),
                Route("/relay/metrics", self.metrics),
            ],
            redirect_slashes=False,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Route a request; what Starlette refuses becomes one of our errors."""
        scope["app"] = self  # lets Starlette's router raise instead of answering by itself
        try:
            await self._router(scope, receive, send)
        except HTTPException as error:
            if error.status_code == 405:
                allow = (error.headers or {}).get("Allow", "")
                raise MethodNotAllowed(f"Allowed: {allow}.", allow=allow) from None
            raise RouteNotFound("No such route.") from None

    async def streams(self, request: Request) -> Response:
        """`GET /relay/v1/streams`: streams by name, paged with `after` and `limit`."""
        limit = _limit(request.query_params.get("limit", "100"))
        infos = await self._app.journal.streams(request.query_params.get("after", ""), limit + 1)
        page = infos[:limit]
        return Json(
            {
                "streams": [stream_object(info) for info in page],
                "after": page[-1].stream if page else None,
                "more": len(infos) > limit,
            }
        )

    async def stream(self, request: Request) -> Response:
        """`GET /relay/v1/streams/{stream}`."""
        name = check_stream_name(request.path_params["stream"])
        return Json(stream_object(await self._app.journal.describe(name)))

    async def run(self, request: Request) -> Response:
        """`GET /relay/v1/streams/{stream}/runs/{run}`."""
        stream = check_stream_name(request.path_params["stream"])
        run = check_run_name(request.path_params["run"])
        return Json(run_object(stream, await self._app.journal.run(stream, run)))

    async def healthz(self, request: Request) -> Response:
        """Alive, whatever else is wrong."""
        return Json({"status": "alive"})

    async def readyz(self, request: Request) -> Response:
        """Ready unless draining; the journal's state is a field."""
        return Json(
            {"status": "draining" if self._app.draining else "ready", "journal": await self._journal_state()},
            status_code=503 if self._app.draining else 200,
        )

    async def metrics(self, request: Request) -> Response:
        """For Prometheus."""
        app = self._app
        app.metrics.open_readers.set(len(app.readers))
        app.metrics.open_runs.set(app.open_runs)
        app.metrics.followed_streams.set(len(app.tails))
        app.metrics.ring_bytes.set(app.tails.held_bytes)
        app.metrics.journal_up.set(await self._journal_state() == "up")
        return Response(app.metrics.exposition(), headers={"content-type": CONTENT_TYPE})

    async def _journal_state(self) -> str:
        try:
            await self._app.journal.tops(["-"])
        except JournalError:
            return "down"
        return "up"


class EventsEndpoint:
    """`GET /relay/v1/streams/{stream}/events`: read, replay and follow."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a read. What keeps it from being served only for now is said in band, because a browser's
        EventSource gives up for ever on anything but 200."""
        if scope["method"] == "HEAD":
            raise MethodNotAllowed("Allowed: GET.", allow="GET")
        stream = check_stream_name(scope["path_params"]["stream"])
        headers = Headers(scope=scope)
        # ASGI headers are latin-1 to Starlette; a cursor is ASCII, so anything else is malformed either way.
        request = read_request(
            QueryParams(scope["query_string"]),
            headers.get("last-event-id", "").strip(),
            headers.get("accept", ""),
        )
        try:
            await self._read(stream, request, scope, receive, send)
        except (Busy, JournalError):
            if request.media_type == JSON:
                raise
            await self._ask_to_come_back(stream, request, "drain" if self._app.draining else "busy", send)

    async def _read(
        self, stream: str, request: ReadRequest, scope: Scope, receive: Receive, send: Send
    ) -> None:
        if self._app.draining:
            raise Busy("This relay is shutting down.")
        info = await self._existing(stream, request.wait_s, scope)
        if info is None:
            if request.media_type == JSON:
                raise UnknownStream(f"Stream {stream!r} was not created in time.")
            await self._ask_to_come_back(stream, request, "not_yet", send)
            return
        run = await self._run(info, request.run)
        if request.run is not None and run is None:
            await send_no_content(send)
            return
        view = request.view(None if run is None else run.run)
        position = await self._position(info, run, request)
        page = await self._app.journal.read(stream, position, *_page_bounds(request))
        standing = judge(position, page.extent, page.anchor_ms)
        nothing_left = _nothing_left(info, run, view, position)
        if request.cursor is not None:
            ended = nothing_left and standing in (Standing.HERE, Standing.GAP)
            self._app.metrics.resumed(_outcome(standing, ended))
        if request.media_type == JSON:
            if standing is not Standing.HERE:
                raise _cursor_gone(standing, page)
            await _send_page(page, run, info, request, position, send)
            return
        if nothing_left and standing in (Standing.HERE, Standing.GAP):
            await send_no_content(send)
            return
        if standing is not Standing.HERE and not view.tells_loss:
            raise _cursor_gone(standing, page)
        reader = Reader(
            self._app.tails,
            stream,
            view,
            position,
            page,
            resumed=request.cursor is not None,
            ended_at=None if run is None else ended_at(run),
            rotate_at=self._app.rotate_at(),
        )
        await self._app.serve(reader, scope, send, status=200, headers=_head(view.media_type))

    async def _existing(self, stream: str, wait_s: float, scope: Scope) -> StreamInfo | None:
        """The stream; None when it did not come into being in time. Raises `UnknownStream` without a wait."""
        journal, tails = self._app.journal, self._app.tails
        if not wait_s:
            return await journal.describe(stream)
        deadline = tails.now() + wait_s
        tail = tails.acquire(stream)
        arrival = _Arrival(tail)
        connection = scope["extensions"][CONNECTION]
        connection.on_lost = arrival.give_up
        try:
            while True:
                try:
                    return await journal.describe(stream)
                except UnknownStream:
                    if not await arrival.wait(deadline - tails.now()):
                        return None
        finally:
            connection.on_lost = None
            tails.release(tail)

    async def _run(self, info: StreamInfo, wanted: str | None) -> RunInfo | None:
        if wanted is None:
            return None
        if wanted == "current":
            name = info.open_runs[-1] if info.open_runs else ""
        else:
            name = info.latest_run if wanted == "latest" else wanted
        return await self._app.journal.run(info.stream, name) if name else None

    async def _position(self, info: StreamInfo, run: RunInfo | None, request: ReadRequest) -> Cursor:
        cursor = request.cursor
        start = info.extent.before_earliest if run is None else run.start
        if cursor is None:
            return info.extent.top if request.from_tail else start
        if isinstance(cursor, ResumeId):
            found = await self._app.journal.resolve_token(cursor.token)
            if found is None or found[0] != info.stream:
                raise ResumeUnknown("This resume id is not one of this stream.")
            if cursor.cursor.seq == 0:
                start_of = await self._app.journal.run(*found)
                cursor = ResumeId(cursor.token, start_of.start)
            cursor = cursor.cursor
        return max(cursor, start) if run is not None else cursor

    async def _ask_to_come_back(self, stream: str, request: ReadRequest, reason: str, send: Send) -> None:
        view = request.view(None)
        position = request.cursor if isinstance(request.cursor, Cursor) else None
        bye = view.notice("bye", position, reason=reason, retry_ms=self._app.tails.retry_ms())
        await send(
            {"type": "http.response.start", "status": 200, "headers": _head(view.media_type)}
        )
        await send({"type": "http.response.body", "body": bye})


class _Arrival:
    """Waits for a stream to be created."""

    def __init__(self, tail: Tail) -> None:
        self._tail = tail
        self._news: asyncio.Future[bool] | None = None
        self._given_up = False

    def wake(self) -> None:
        """There is news of the stream."""
        if self._news is not None and not self._news.done():
            self._news.set_result(True)

    def give_up(self) -> None:
        """Nobody waits any more."""
        self._given_up = True
        self.wake()

    async def wait(self, longest_s: float) -> bool:
        """True when there is news, False when the time is over."""
        if longest_s <= 0 or self._given_up:
            return False
        loop = asyncio.get_running_loop()
        self._news = loop.create_future()
        self._tail.wait(self)
        timer = loop.call_later(longest_s, self.wake)
        try:
            return await self._news
        finally:
            timer.cancel()


def _page_bounds(request: ReadRequest) -> tuple[int, int]:
    if request.media_type == JSON:
        return request.limit, PAGE_MAX_BYTES
    return PAGE_MAX_FRAMES, WRITE_MAX_BYTES


def _nothing_left(info: StreamInfo, run: RunInfo | None, view: View, position: Cursor) -> bool:
    """Whether nothing this reader would be shown remains, and nothing more will come."""
    if run is None:
        shown = info.extent.top.seq if view.shows_control else info.last_data
        return info.finished and shown <= position.seq
    shown = run.last.seq if view.shows_control else run.last_data
    return bool(run.ended_ms) and shown <= position.seq


def _outcome(standing: Standing, ended: bool) -> str:
    if ended:
        return "ended"
    return "resumed" if standing is Standing.HERE else standing.value


def _cursor_gone(standing: Standing, page: Page) -> CursorGone:
    return CursorGone(
        "The journal does not hold what comes after this cursor.",
        reason=standing.value,
        earliest_seq=page.extent.earliest_seq,
        top=str(page.extent.top),
    )


async def _send_page(
    page: Page, run: RunInfo | None, info: StreamInfo, request: ReadRequest, position: Cursor, send: Send
) -> None:
    frames: list[Frame] = []
    last, run_over = position, run is not None and bool(run.ended_ms) and run.last.seq <= position.seq
    for frame in page.frames:
        last = frame.id
        if run is not None and frame.run != run.run:
            continue
        if request.control == "events" or not frame.is_control:
            frames.append(frame)
        if run is not None and is_terminal(frame):
            run_over = True
            break
    more = not run_over and (page.more or last.seq < page.extent.top.seq)
    ended = run_over if run is not None else info.finished and not more
    body = orjson.dumps(
        {
            "frames": [frame_object(frame) for frame in frames],
            "cursor": str(last),
            "more": more,
            "ended": ended,
        }
    )
    headers = [(b"content-type", JSON.encode()), (b"cache-control", b"no-store"), (b"vary", b"Last-Event-ID")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _head(media_type: str) -> list[tuple[bytes, bytes]]:
    charset = b"; charset=utf-8" if media_type == EVENT_STREAM else b""
    return [(b"content-type", media_type.encode() + charset), *STREAMING_HEADERS]


def _limit(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= PAGE_MAX_FRAMES:
        raise InvalidParameter(f"'limit' is a number from 1 to {PAGE_MAX_FRAMES}.", parameter="limit")
    return int(text)


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
    }
