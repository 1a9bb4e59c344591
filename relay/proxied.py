"""Upstream's paths: whatever is not under `/relay` is answered by upstream, or from the journal.

What proxying means for a run is `relay.ingest.proxy`; here its outcome becomes a response, and a request
that comes back for a run is served from the journal, never from upstream.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import orjson

from relay.access import Access, without_own_cookie
from relay.api import run_object
from relay.cursor import RESUME_PREFIX, Cursor, ResumeId, Standing, judge, parse_resume_id
from relay.dialects.detect import BY_NAME, RAW
from relay.errors import (
    Busy,
    CallerError,
    JournalError,
    RelayError,
    ResumeUnknown,
    RouteNotFound,
    UnknownRun,
    UnknownStream,
    UpgradeUnsupported,
)
from relay.headers import Headers, first_of
from relay.ingest.proxy import Call, ClientGone, Opening, Passed, PassedWhole, Proxy, RunAnswer, StartedRun
from relay.ingest.upstream import TruncatedBody
from relay.journal.base import Page
from relay.lifecycle import Reason, Status, ending
from relay.replay.reader import Reader, ReaderEnd, cursor_gone, ended_at, find
from relay.replay.response import (
    CONNECTION,
    STREAMING_HEADERS,
    Receive,
    Scope,
    Send,
    StreamAnswer,
    send_no_content,
    send_whole,
)
from relay.replay.view import ProxiedNdjsonView, ProxiedSseView
from relay.security import Right
from relay.sse import EVENT_STREAM

if TYPE_CHECKING:
    from relay.app import App

log = logging.getLogger("relay.proxied")


class _Client(NamedTuple):
    """Who is answered. `is_browser`: by a browser's own EventSource, which comes back by itself."""

    address: str
    is_browser: bool
    send: Send


class Proxied:
    """Answers requests for upstream; without a `proxy` only those that a resume id brings back."""

    def __init__(self, app: App, proxy: Proxy | None) -> None:
        self._app = app
        self._proxy = proxy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> StreamAnswer | None:
        """Answer a request, or return the reader that is to be served."""
        call = _call(scope, receive, self._app.access)
        upgrade = first_of(call.headers, b"upgrade").lower()
        if "websocket" in (token.strip() for token in upgrade.split(",")):
            raise UpgradeUnsupported("relay does not proxy WebSocket connections.")
        client = _Client(self._app.access.client(scope), _is_event_source(call), send)
        try:
            return await self._answer(call, client, scope)
        except (Busy, JournalError) as error:
            if not client.is_browser:
                raise
            await self._ask_to_come_back(error, send)
            return None

    async def _answer(self, call: Call, client: _Client, scope: Scope) -> StreamAnswer | None:
        presented = first_of(call.headers, b"last-event-id")
        if presented.startswith(RESUME_PREFIX):
            return await self._resume(presented, client)
        if self._proxy is None:
            raise RouteNotFound("No upstream is configured; relay's own routes are under /relay.")
        if stream := self._proxy.resumes(call):
            current = await self._current(self._proxy, stream, scope)
            if current is not None:
                return await self._known_run(current, None, client)
            await send_no_content(client.send)
            return None
        if stream := self._proxy.stops(call):
            await self._stop_current(stream, scope, client.send)
            return None
        opened = await self._open(self._proxy, call, scope)
        if isinstance(opened, Passed):
            await _pass_on(opened, call.method, scope, client.send)
        elif isinstance(opened, PassedWhole):
            await send_whole(opened.status, opened.headers, opened.body, client.send)
        elif isinstance(opened, StartedRun):
            await _send_started(opened, self._token_headers(opened.stream), client.send)
        else:
            answer = await self._opened_run(opened, client)
            if answer is not None:
                answer.headers += self._token_headers(opened.stream)
            return answer
        return None

    @staticmethod
    async def _open(proxy: Proxy, call: Call, scope: Scope) -> Opening:
        """Ask upstream. On paths that are never journaled a client that leaves takes the call with it."""
        if not proxy.passes(call.path):
            return await proxy.open(call)
        connection = scope["extensions"][CONNECTION]
        task = asyncio.current_task()
        assert task is not None
        connection.on_lost = task.cancel
        try:
            return await proxy.open(call)
        except asyncio.CancelledError:
            if not connection.lost:
                raise
            task.uncancel()
            raise ClientGone from None
        finally:
            connection.on_lost = None

    def _token_headers(self, stream: str) -> Headers:
        """What lets a client that was just answered read the stream of the answer, and stop it."""
        token = self._app.access.token_for(stream)
        return [(b"relay-token", token.encode())] if token else []

    async def _current(self, proxy: Proxy, stream: str, scope: Scope) -> RunAnswer | None:
        """The current run of a stream that this request may read."""
        try:
            await self._app.access.grant(scope, Right.READ, stream)
        except UnknownStream:
            return None
        return await proxy.current(stream)

    async def _stop_current(self, stream: str, scope: Scope, send: Send) -> None:
        """Cancel a stream's newest open run: the run as it ended, or 204."""
        try:
            await self._app.access.grant(scope, Right.CANCEL, stream)
            run = (await self._app.journal.describe(stream)).current_run
        except UnknownStream:
            run = ""
        if not run:
            await send_no_content(send)
            return
        info = await self._app.pushes.cancel(stream, run, "")
        headers = [(b"content-type", b"application/json"), (b"cache-control", b"no-store")]
        await send_whole(200, headers, orjson.dumps(run_object(stream, info)), send)

    async def _resume(self, presented: str, client: _Client) -> StreamAnswer | None:
        """Answer a request that carries a resume id."""
        resume_id = parse_resume_id(presented)
        answer, after, page = await find(self._app.tails, partial(self._look_up, resume_id))
        return await self._known_run(answer, (after, page), client)

    async def _look_up(self, resume_id: ResumeId) -> tuple[tuple[RunAnswer, Cursor, Page], bool]:
        """The run of a resume id, the reader's cursor and what comes behind it; and whether the journal has
        less of an open run than was shown to the reader. Raises `ResumeUnknown`."""
        journal = self._app.journal
        found = await journal.resolve_token(resume_id.token)
        if found is None:
            raise ResumeUnknown("This answer is not kept any more, or never was.")
        stream, name = found
        try:
            info = await journal.run(stream, name)
        except (UnknownStream, UnknownRun):
            raise ResumeUnknown("This answer is not kept any more.") from None
        if info.token != resume_id.token:
            # The stream was made anew between the two questions: a run of the same name is another's answer.
            raise ResumeUnknown("This answer is not kept any more.")
        answer = RunAnswer.of(stream, info, None if self._proxy is None else self._proxy.pump(stream, name))
        after = max(resume_id.cursor, answer.start)
        try:
            # One frame is enough to judge by, and no more is held as long as the client stays.
            page = await journal.read(stream, after, 1, 1)
        except UnknownStream:
            raise ResumeUnknown("This answer is not kept any more.") from None
        ahead = judge(after, page.extent, page.anchor_ms) is Standing.AHEAD
        return (answer, after, page), ahead and not info.ended_ms

    async def _opened_run(self, answer: RunAnswer, client: _Client) -> StreamAnswer | None:
        """A run that upstream was called for, just now or by an earlier request of the same key."""
        if answer.info is not None:
            return await self._known_run(answer, None, client)
        # A run opened just now is not refused its first reader: upstream was called for it.
        self._app.counts.replay_frames.observe(0)
        return self._run_from(answer, answer.start, None, client)

    async def _known_run(
        self, answer: RunAnswer, presented: tuple[Cursor, Page] | None, client: _Client
    ) -> StreamAnswer | None:
        """A run opened before, from its reader's cursor or its start. Who has all of it gets 204."""
        app, info = self._app, answer.info
        assert info is not None
        app.check_room(answer.stream, client.address)
        if presented is None:
            after = answer.start
            page = await app.journal.read(answer.stream, after, 1, 1)
        else:
            after, page = presented
        standing = judge(after, page.extent, page.anchor_ms)
        nothing_left = info.ended_ms and info.last_data <= after.seq
        if presented is not None and nothing_left and standing.same_life:
            app.metrics.resumed("ended")
            await send_no_content(client.send, answer.media_type if info.status is Status.COMPLETED else "")
            return None
        if standing is not Standing.HERE:
            app.metrics.resumed(standing.value)
            raise cursor_gone(standing, page)
        if presented is not None:
            app.metrics.resumed("resumed")
        app.counts.replay_frames.observe(max(0, page.extent.top.seq - after.seq))
        return self._run_from(answer, after, ended_at(info), client)

    def _run_from(
        self, answer: RunAnswer, after: Cursor, ended_seq: int | None, client: _Client
    ) -> StreamAnswer:
        """A run as upstream's own answer, from a cursor on."""
        app, prime = self._app, b""
        view: ProxiedSseView | ProxiedNdjsonView
        if answer.media_type.lower().startswith(EVENT_STREAM):
            view = ProxiedSseView(answer.run, answer.token, answer.media_type)
            if client.is_browser and after == answer.start:
                prime = view.prime(app.settings.retry_ms)
        else:
            view = ProxiedNdjsonView(answer.run, answer.media_type)
        reader = Reader(
            app.tails,
            answer.stream,
            view,
            after,
            None,
            ended_at=ended_seq,
            # Only a browser's EventSource is known to come back; others would take the end for the end.
            lease=app.lease() if client.is_browser else None,
            client=client.address,
        )

        def break_off() -> None:
            reader.leave(ReaderEnd.ERROR)

        async def whole(reader: Reader) -> bool:
            return await self._may_end_whole(answer.stream, answer.run, reader)

        headers = [
            *answer.headers,
            *(header for header in STREAMING_HEADERS if header[0] != b"vary"),
            (b"relay-stream", answer.stream.encode()),
            (b"relay-run", answer.run.encode()),
            (b"relay-cursor", str(after).encode()),
        ]
        released = None
        pump = answer.pump
        if pump is not None:
            pump.on_broken.add(break_off)
            released = partial(pump.on_broken.discard, break_off)
            if pump.broken:
                break_off()
        return StreamAnswer(reader, answer.status, headers, prime, whole, released)

    async def _may_end_whole(self, stream: str, run: str, reader: Reader) -> bool:
        """Whether a proxied answer may be closed as complete: it is, or its format said that it is not."""
        if reader.terminal is not None:
            status = orjson.loads(reader.terminal.data)["status"]
            if status == Status.COMPLETED:
                return True
        try:
            info = await self._app.journal.run(stream, run)
        except RelayError:
            return False
        # Who ends a run of which it is not known that it was answered leaves its format alone.
        said = info.answer and BY_NAME.get(info.dialect, RAW).error_event(ending(Reason.UPSTREAM_ERROR))
        return info.status is Status.COMPLETED or bool(said)

    async def _ask_to_come_back(self, error: RelayError, send: Send) -> None:
        """A browser's EventSource gives up for ever on anything but 200; this makes it try again."""
        log.warning("a browser is asked to come back: %s", error)
        self._app.counts.refusals[error.code] += 1
        headers = [(b"content-type", EVENT_STREAM.encode()), *STREAMING_HEADERS]
        await send_whole(200, headers, b"retry: %d\n\n" % self._app.tails.retry_ms(), send)


class Caller:
    """Who sends a request to upstream, by the rules of access."""

    def __init__(self, scope: Scope, access: Access) -> None:
        self._scope = scope
        self._connection = scope["extensions"][CONNECTION]
        self._access = access

    @property
    def is_gone(self) -> bool:
        """Whether the connection is lost."""
        return bool(self._connection.lost)

    async def may_name(self, stream: str) -> bool:
        """Whether its credential says so; without authentication, whether it is on this machine."""
        return await self._access.may_name(self._scope, stream)

    async def may(self, right: str, stream: str) -> bool:
        """Whether its credential says so; everybody may where there is no authentication."""
        return await self._access.may(self._scope, Right(right), stream)

    async def check_named(self, stream: str) -> None:
        """Raises what `Access.check_named` does."""
        await self._access.check_named(self._scope, stream)


def _call(scope: Scope, receive: Receive, access: Access) -> Call:
    raw_path: bytes = scope["raw_path"]
    if not raw_path.startswith(b"/"):
        raise CallerError("The request target is not a path.")
    query: bytes = scope["query_string"]
    target = raw_path + (b"?" + query if query else b"")
    headers: list[tuple[bytes, bytes]] = scope["headers"]
    has_body = any(
        name == b"transfer-encoding" or (name == b"content-length" and value.strip() != b"0")
        for name, value in headers
    )
    for name, value in headers:
        if name == b"transfer-encoding" and value.strip().lower() != b"chunked":
            # Passed on without the header, the body would be taken for something else.
            raise CallerError("A request's transfer coding can only be chunked.")
    return Call(
        method=scope["method"],
        path=scope["path"],
        target=target.decode("latin-1"),
        headers=without_own_cookie(headers),
        body=_request_body(receive) if has_body else None,
        caller=Caller(scope, access),
    )


async def _request_body(receive: Receive) -> AsyncIterator[bytes]:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        if message["body"]:
            yield message["body"]
        if not message["more_body"]:
            return


def _is_event_source(call: Call) -> bool:
    """A browser's own EventSource: it comes back by itself, with the last id it saw."""
    return (
        call.method == "GET"
        and first_of(call.headers, b"accept").lower() == EVENT_STREAM
        and first_of(call.headers, b"sec-fetch-dest") != ""
    )  # fmt: skip


async def _send_started(started: StartedRun, more: Headers, send: Send) -> None:
    """The answer to `Prefer: respond-async` (RFC 7240 section 4.1)."""
    cursor = str(started.cursor)
    document = {"stream": started.stream, "run": started.run, "cursor": cursor}
    headers = [
        (b"content-type", b"application/json"),
        (b"cache-control", b"no-store"),
        (b"preference-applied", b"respond-async"),
        (b"relay-stream", started.stream.encode()),
        (b"relay-run", started.run.encode()),
        (b"relay-cursor", cursor.encode()),
        *more,
    ]
    if started.frames_after is not None:
        headers.append((b"relay-frames-after", b"%d" % started.frames_after))
    await send_whole(202, headers, orjson.dumps(document), send)


async def _pass_on(passed: Passed, method: str, scope: Scope, send: Send) -> None:
    """An answer that is not journaled, as it comes; broken off if upstream breaks off."""
    connection = scope["extensions"][CONNECTION]
    answer = passed.answer
    connection.on_lost = answer.close
    headers = passed.headers
    if answer.status in (204, 304):
        headers = [(name, value) for name, value in headers if name != b"content-length"]
    try:
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        if method != "HEAD":
            async for data in answer.body():
                await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
    except TruncatedBody as error:
        if not connection.lost:
            log.info("passed answer broke off: %s", error)
        connection.finish_and_abort()
    finally:
        connection.on_lost = None
        answer.close()
