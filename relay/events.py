"""`GET /relay/v1/streams/{stream}/events`: read, replay and follow."""

from __future__ import annotations

from functools import cache, partial
from typing import TYPE_CHECKING, NamedTuple

import orjson
from starlette.datastructures import Headers, QueryParams

from relay.cursor import Cursor, ResumeId, Standing, judge
from relay.errors import Busy, JournalError, MethodNotAllowed, ResumeUnknown, UnknownStream
from relay.frame import Frame, frame_object, is_terminal
from relay.journal.base import Page, RunInfo, StreamInfo
from relay.limits import PAGE_MAX_BYTES, PAGE_MAX_FRAMES, RUN_WORDS, check_stream_name
from relay.ndjson import NDJSON
from relay.replay.news import news_of
from relay.replay.pages import SharedPage
from relay.replay.reader import Reader, cursor_gone, ended_at, find, lately_replaced
from relay.replay.request import JSON, ReadRequest, read_request
from relay.replay.response import (
    ANSWER,
    CONNECTION,
    STREAMING_HEADERS,
    Receive,
    Scope,
    Send,
    StreamAnswer,
    send_no_content,
    send_whole,
)
from relay.replay.tail import WRITE_MAX_BYTES
from relay.replay.view import View
from relay.security import Grant, Right
from relay.sse import EVENT_STREAM

if TYPE_CHECKING:
    from relay.app import App


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
            grant = await self._app.access.grant(scope, Right.READ, stream)
            scope[ANSWER] = await self._read(stream, request, grant, scope, send)
        except (Busy, JournalError) as error:
            if not _can_be_asked_back(request):
                raise
            self._app.counts.refusals[error.code] += 1
            await self._ask_to_come_back(stream, request, "drain" if self._app.draining else "busy", send)

    async def _read(
        self, stream: str, request: ReadRequest, grant: Grant, scope: Scope, send: Send
    ) -> StreamAnswer | None:
        if self._app.draining:
            raise Busy("This relay is shutting down.")
        look = partial(self._look, stream, request, scope)
        place = await find(self._app.tails, look) if _knows_of_it(request) else (await look())[0]
        if place is None:
            if not _can_be_asked_back(request):
                raise UnknownStream(f"Stream {stream!r} was not created in time.")
            await self._ask_to_come_back(stream, request, "not_yet", send)
            return None
        info, run, position, page = place
        if request.run is not None and run is None:
            await send_no_content(send)
            return None
        view = request.view(None if run is None else run.run)
        standing = judge(position, page.extent, page.anchor_ms)
        nothing_left = _nothing_left(info, run, view, position)
        if request.cursor is not None:
            ended = nothing_left and standing.same_life
            self._app.metrics.resumed(_outcome(standing, ended))
        if request.media_type == JSON:
            if standing is not Standing.HERE:
                raise cursor_gone(standing, page)
            await _send_page(page, run, info, request, position, send)
            return None
        if nothing_left and standing.same_life:
            await send_no_content(send)
            return None
        if standing is not Standing.HERE and not view.tells_loss:
            raise cursor_gone(standing, page)
        client = self._app.access.client(scope)
        self._app.check_room(stream, client)
        self._app.counts.replay_frames.observe(max(0, page.extent.top.seq - position.seq))
        reader = Reader(
            self._app.tails,
            stream,
            view,
            position,
            page,
            resumed=request.cursor is not None,
            ended_at=None if run is None else ended_at(run),
            lease=self._app.lease(grant),
            client=client,
        )
        # Said at once: a cut comes before any goodbye, and browsers wait for seconds unless told.
        prime = b"retry: %d\n\n" % self._app.tails.retry_ms() if view.media_type == EVENT_STREAM else b""
        return StreamAnswer(reader, 200, _head(view.media_type), prime)

    async def _look(self, stream: str, request: ReadRequest, scope: Scope) -> tuple[_Place | None, bool]:
        """Where this reader begins, None in a stream that was not created in time; and whether the journal
        has less than was shown to it, which may come back."""
        info = await self._existing(stream, request.wait_s, scope)
        if info is None:
            return None, False
        cursor = await self._cursor(info, request)
        run = await self._run(info, request, cursor)
        position, page = await self._place(info, run, request, cursor)
        behind = cursor is not None and judge(cursor, page.extent, None) is Standing.AHEAD
        may_come_back = bool(info.open_runs) or lately_replaced(self._app.tails)
        return _Place(info, run, position, page), behind and may_come_back

    async def _existing(self, stream: str, wait_s: float, scope: Scope) -> StreamInfo | None:
        """The stream; None when it did not come into being in time. Raises `UnknownStream` without a wait."""
        app, journal, tails = self._app, self._app.journal, self._app.tails
        if not wait_s:
            return await journal.describe(stream)
        app.check_room(stream, app.access.client(scope))
        deadline = tails.now() + wait_s
        with news_of(stream, tails, app.readers, scope["extensions"][CONNECTION]) as news:
            while True:
                news.listen()  # before the question, so that no news after its answer is missed
                try:
                    return await journal.describe(stream)
                except UnknownStream:
                    if not await news.wait(deadline - tails.now()):
                        break
        if app.draining:
            raise Busy("This relay is shutting down.")
        return None

    async def _cursor(self, info: StreamInfo, request: ReadRequest) -> Cursor | None:
        """The cursor that the client presented. Raises `ResumeUnknown`."""
        cursor = request.cursor
        if not isinstance(cursor, ResumeId):
            return cursor
        found = await self._app.journal.resolve_token(cursor.token)
        if found is None or found[0] != info.stream:
            raise ResumeUnknown("This resume id is not one of this stream.")
        if cursor.cursor.seq:
            return cursor.cursor
        return (await self._app.journal.run(*found)).start

    async def _run(self, info: StreamInfo, request: ReadRequest, cursor: Cursor | None) -> RunInfo | None:
        wanted = request.run
        if wanted is None:
            return None
        if wanted == "current":
            name = info.current_run
        elif wanted == "latest":
            name = info.latest_run
        else:
            return await self._app.journal.run(info.stream, wanted)
        run = await self._app.journal.run(info.stream, name) if name else None
        if request.resumes and cursor is not None and (run is None or cursor.seq < run.start.seq):
            cut = await self._cut_run(info.stream, cursor)
            if cut is not None and not _nothing_left(info, cut, request.view(cut.run), cursor):
                return cut
        return run

    async def _cut_run(self, stream: str, cursor: Cursor) -> RunInfo | None:
        """The run whose answer was cut at a cursor. `current` may mean another one by now, or none, but who
        comes back to it is owed the rest of this one first."""
        journal = self._app.journal
        page = await journal.read(stream, Cursor(max(0, cursor.seq - 1), 0), 2, PAGE_MAX_BYTES)
        for frame in page.frames:
            if frame.seq == cursor.seq and frame.id != cursor:
                return None
            if frame.seq > cursor.seq + 1:
                return None
            if frame.seq > cursor.seq or not is_terminal(frame):
                return await journal.run(stream, frame.run)
        return None

    async def _place(
        self, info: StreamInfo, run: RunInfo | None, request: ReadRequest, cursor: Cursor | None
    ) -> tuple[Cursor, SharedPage]:
        """Where the reader stands, and what the journal holds after it."""
        # Whoever asks for a page itself is shown all that was accepted before.
        pages = self._app.tails.pages
        read = partial(pages.read_anew if request.media_type == JSON else pages.read, info.stream)
        nothing_to_show = request.run is not None and run is None
        bounds = (1, 1) if nothing_to_show else _page_bounds(request)
        if cursor is None:
            start = info.extent.before_earliest if run is None else run.start
            position = info.extent.top if request.from_tail else start
            return position, await read(position, *bounds)
        page = await read(cursor, *bounds)
        standing = judge(cursor, page.extent, page.anchor_ms)
        if run is None or cursor.seq >= run.start.seq or not standing.same_life:
            return cursor, page
        # What stood before the run is not shown to this reader, so it loses none of it.
        return run.start, await read(run.start, *bounds)

    async def _ask_to_come_back(self, stream: str, request: ReadRequest, reason: str, send: Send) -> None:
        view = request.view(None)
        position = request.cursor if isinstance(request.cursor, Cursor) else None
        bye = view.notice("bye", position, reason=reason, retry_ms=self._app.tails.retry_ms())
        await send_whole(200, _head(view.media_type), bye, send)


class _Place(NamedTuple):
    """Where a reader begins: behind `position`, with `page`, in a stream and perhaps in one run of it."""

    info: StreamInfo
    run: RunInfo | None
    position: Cursor
    page: SharedPage


def _can_be_asked_back(request: ReadRequest) -> bool:
    """Whether a read that cannot be served now can be told so in a 200: by `bye`, or at least by `retry`."""
    in_band = request.media_type == NDJSON and request.control == "events"
    return in_band or request.media_type == EVENT_STREAM


def _knows_of_it(request: ReadRequest) -> bool:
    """Whether the client was told of what it asks for: by a cursor, or by the name of a run."""
    return request.cursor is not None or request.run not in (None, *RUN_WORDS)


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
    await send_whole(200, headers, body, send)


@cache
def _head(media_type: str) -> list[tuple[bytes, bytes]]:
    charset = b"; charset=utf-8" if media_type == EVENT_STREAM else b""
    return [(b"content-type", media_type.encode() + charset), *STREAMING_HEADERS]
