"""The composition: one ASGI application out of journal, proxy, tails and readers.

upstream → Proxy → Pump → RunWriter → Journal → Tail → Reader → response
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any

import orjson

from relay import trace
from relay.access import Access, without_own_cookie
from relay.admin_api import admin_routes, health_routes
from relay.api import Api, read_routes, run_object
from relay.counts import Counts
from relay.cursor import RESUME_PREFIX, Cursor, ResumeId, Standing, judge, parse_resume_id
from relay.diagnostics import Colleagues, Diagnostics
from relay.dialects.detect import BY_NAME, RAW
from relay.doctor import journal_state, upstream_state
from relay.errors import (
    Busy,
    CallerError,
    InvalidParameter,
    JournalError,
    RelayError,
    ResumeUnknown,
    RouteNotFound,
    TooManyRequests,
    UnknownRun,
    UnknownStream,
    UpgradeUnsupported,
)
from relay.ingest.owned import Facts, OwnedRuns
from relay.ingest.proxy import (
    Call,
    ClientGone,
    Opening,
    Passed,
    PassedWhole,
    Proxy,
    RunAnswer,
    RunWishes,
    StartedRun,
)
from relay.ingest.push import Pushes
from relay.ingest.upstream import TruncatedBody, Upstream, UpstreamRequest
from relay.journal.base import Condition, Ended, Journal, Page
from relay.lifecycle import OWNER_LOST, Ending, Reason, Status, ending
from relay.metrics import VERSION, Metrics
from relay.openapi import openapi_routes
from relay.push_api import push_routes
from relay.reaper import Reaper
from relay.replay.reader import Lease, Reader, ReaderEnd, Readers, cursor_gone, ended_at, find
from relay.replay.response import (
    CONNECTION,
    STREAMING_HEADERS,
    Head,
    Message,
    Receive,
    Scope,
    Send,
    StreamAnswer,
    send_no_content,
    send_problem,
    send_whole,
    serve_reader,
    takes_gzip,
)
from relay.replay.tail import Tails
from relay.replay.view import ProxiedNdjsonView, ProxiedSseView
from relay.security import EVERYTHING, LEEWAY_S, Grant, Right
from relay.server import connections_allowed
from relay.settings import Settings
from relay.sse import EVENT_STREAM
from relay.webhook import Webhook
from relay.workers import Worker

log = logging.getLogger("relay.app")

FindAnswer = Callable[[Scope, Receive, Send], Awaitable[StreamAnswer | None]]

_AS_DECLARED = (b"x-content-type-options", b"nosniff")
"""What others wrote into a stream is never taken for a page of relay's own."""

VISIT_S = 1.0
"""How often open readers, quiet streams and open runs are looked at, at least."""


class App:
    """relay as an ASGI application. `start` it before it serves, `drain` and `close` it after. `place` is
    this process's place among several workers of one port."""

    def __init__(self, settings: Settings, journal: Journal, place: Worker | None = None) -> None:
        self.settings = settings
        self.journal = journal
        self.place = place
        kind = "sqlite" if settings.journal.startswith("sqlite:") else "redis"
        self.metrics = Metrics(place.directory if place else "", kind)
        self.counts = Counts()
        self._reconnects = 0
        self.tails = Tails(journal, settings, self.counts)
        self.readers = Readers(settings.heartbeat_s, settings.write_timeout_s)
        self.draining = False
        self.diagnostics = Diagnostics()
        self._colleagues = (
            None if place is None else Colleagues(place.number, place.count, place.directory, self._holdings)
        )
        self.owned = OwnedRuns(settings, self._run_ended, self.tails.seen, self.counts)
        self.pushes = Pushes(journal, settings, self.owned, self._run_ended)
        self._reaper = Reaper(journal, settings, self.owned.name, self._reaped, time.monotonic)
        self._webhook = Webhook(journal, settings, self.counts) if settings.webhook_url else None
        self._workers: list[asyncio.Task[None]] = []
        self._looking_up: set[asyncio.Task[None]] = set()
        self._upstream = Upstream(settings.upstream, settings) if settings.upstream else None
        self._proxy = (
            None
            if self._upstream is None
            else Proxy(self._upstream, journal, settings, self.owned, self.tails, self._run_ended)
        )
        self.access = Access(settings)
        routes = [*push_routes(self), *read_routes(self), *health_routes(self), *openapi_routes()]
        administration = admin_routes(self)
        self._api = Api(self, routes if settings.admin_addr else [*routes, *administration])
        self._administration = Api(self, [*administration, *health_routes(self), *openapi_routes()])

    # Life of the process

    async def start(self) -> None:
        """Connect to the journal; raises `StartupError`."""
        for orphan in await self.journal.start(self.tails, self.owned):
            self._reaped(*orphan)
        if self._upstream is not None:
            await self._upstream.start()
        if self._colleagues is not None:
            await self._colleagues.start()
        await self._reaper.tick()  # no run is opened before the lease is held
        work = [self._visit_readers(), self._take_care(), self._keep_lease(), self._ask_for_own_runs()]
        if self._webhook is not None:
            work.append(self._webhook.run())
        self._workers = [asyncio.create_task(worker) for worker in work]
        self.metrics.started()

    async def drain(self) -> None:
        """Send readers away and let open runs finish."""
        self.draining = True
        self.metrics.draining.set(1)
        if self.open_runs:
            log.info("draining: open_runs=%s get grace_s=%s", self.open_runs, self.settings.drain_grace_s)
        self.readers.drain()
        draining = [self.pushes.drain()]
        if self._proxy is not None:
            draining.append(self._proxy.drain())
        await asyncio.gather(*draining)

    async def close(self) -> None:
        """Release everything."""
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)
        if self._workers:
            await self._reaper.resign()
        if self._colleagues is not None:
            self._colleagues.close()
        self.pushes.close()
        if self._upstream is not None:
            await self._upstream.close()
        await self.access.close()
        self.measure()
        await asyncio.gather(*self._looking_up)
        self.tails.close()
        await self.journal.close()

    async def _visit_readers(self) -> None:
        """Apart from what asks the journal, which may be away."""
        pause_s = min(VISIT_S, self.settings.heartbeat_s / 2, self.settings.write_timeout_s / 2)
        while True:
            await asyncio.sleep(pause_s)
            self.readers.visit(self.tails.now())
            if self.place is not None:
                self.measure()  # whichever worker is asked tells it for all

    async def _take_care(self) -> None:
        while True:
            await asyncio.sleep(VISIT_S)
            try:
                if self._proxy is not None:
                    await self._proxy.visit()
                await self.tails.check_quiet()
            except JournalError:
                pass  # readers and pumps meet it themselves, and wait
            except Exception:
                log.exception("care failed")

    async def _keep_lease(self) -> None:
        """Renew the lease of this process's runs, and look for those that others left."""
        while True:
            began = self.tails.now()
            await self._reaper.tick()
            await asyncio.sleep(max(0.0, began + self._reaper.tick_s - self.tails.now()))

    async def _ask_for_own_runs(self) -> None:
        """Find out what became of this process's runs. Apart from the lease, which must not wait for it."""
        while True:
            await asyncio.sleep(self._reaper.tick_s)
            try:
                await self.owned.check(self.journal)
            except JournalError:
                pass  # the reaper says so
            except Exception:
                log.exception("owned runs could not be checked")

    def _run_ended(self, stream: str, run: str, end: Ending, text_bytes: int, facts: Facts | None) -> None:
        """This process ended a run, its own or another's."""
        if facts is not None or end.reason is Reason.STREAM_DELETED:
            _log_ended(stream, run, end, facts)
        else:
            look_up = asyncio.get_running_loop().create_task(self._look_up_ended(stream, run, end))
            self._looking_up.add(look_up)
            look_up.add_done_callback(self._looking_up.discard)
        self.metrics.run_ended(end, text_bytes)
        self.diagnostics.run_ended(stream, run, end, _wall_ms())
        if self._webhook is not None:
            self._webhook.wake()

    async def _look_up_ended(self, stream: str, run: str, end: Ending) -> None:
        """Log an ending that somebody concluded who knows nothing else of the run."""
        facts = None
        try:
            facts = Facts.of(await self.journal.run(stream, run))
        except RelayError:
            pass
        finally:
            _log_ended(stream, run, end, facts)

    def _reaped(self, stream: str, run: str, ended: Ended) -> None:
        reason = Reason(ended.reason)
        end = OWNER_LOST if reason is Reason.OWNER_LOST else ending(reason)
        self.counts.orphans_reaped += end.status is Status.LOST
        self._run_ended(stream, run, end, ended.text_bytes, None)

    @property
    def open_runs(self) -> int:
        """Runs whose upstream this process reads."""
        return 0 if self._proxy is None else self._proxy.open_runs

    async def start_run(self, stream: str, request: UpstreamRequest, wishes: RunWishes) -> StartedRun:
        """Call upstream for a run that nobody waits for, as `Proxy.start_run`."""
        if self._proxy is None:
            raise InvalidParameter("No upstream is configured.", parameter="upstream")
        return await self._proxy.start_run(stream, request, wishes)

    def measure(self) -> None:
        """Write down what this process holds now, and what it has counted."""
        metrics, now = self.metrics, self.tails.now()
        metrics.open_readers.set(len(self.readers))
        metrics.open_runs.set(self.open_runs)
        metrics.followed_streams.set(len(self.tails))
        metrics.ring_bytes.set(self.tails.held_bytes)
        # Who is of a cohort is written to with the next flush, so that only others can fall behind.
        metrics.reader_lag.set(max((r.lag for r in self.readers if r.cohort is None), default=0))
        pumps = () if self._proxy is None else self._proxy.pumps
        metrics.oldest_open_run.set(now - min((pump.started_at for pump in pumps), default=now))
        metrics.longest_silence.set(now - min((pump.writer.heard_at for pump in pumps), default=now))
        reconnects = self.journal.reconnects
        self.counts.journal_reconnects += max(0, reconnects - self._reconnects)
        self._reconnects = reconnects
        metrics.take(self.counts)

    async def examine_journal(self) -> Condition | None:
        """How the journal is; None when it does not answer."""
        try:
            return await self.journal.condition()
        except JournalError:
            return None

    async def diagnosis(self) -> dict[str, Any]:
        """What the workers of this port hold open, how what they held ended, and what they depend on."""
        journal, upstream = await asyncio.gather(
            journal_state(self.journal), upstream_state(self.settings.upstream)
        )
        held = self._holdings() if self._colleagues is None else await self._colleagues.report()
        about = {
            "version": VERSION,
            "authentication": self.access.is_required,
            "connections_allowed": connections_allowed(),
            "connections_wanted": self.settings.readers_max + self.settings.open_runs_max,
        }
        return held | {"relay": about, "journal": journal, "upstream": upstream}

    def _holdings(self) -> dict[str, Any]:
        pumps = [] if self._proxy is None else self._proxy.pumps
        report = self.diagnostics.report(pumps, self.readers, self.tails.now())
        return {"draining": self.draining} | report

    def lease(self, grant: Grant = EVERYTHING) -> Lease:
        """How long a reader that begins now goes on: until it is sent to reconnect, jittered, so that they do
        not all come together; or until what lets it read is over."""
        now = self.tails.now()
        rotation = Lease(now + self.settings.reader_max_s * random.uniform(0.75, 1.25), ReaderEnd.ROTATE)
        if grant.expires_at is None:
            return rotation
        end = ReaderEnd.ROTATE if grant.renewable else ReaderEnd.REVOKED
        # No sooner than a new request would be refused, or who comes back is let in again for a moment.
        return min(rotation, Lease(now + grant.expires_at + LEEWAY_S - time.time(), end))

    async def delete_under(self, prefix: str) -> int:
        """Delete every stream whose name begins so; how many. Raises `JournalError`."""
        # No name stands between this and the first one with the prefix: none holds the last character.
        deleted, after = 0, prefix[:-1] + chr(ord(prefix[-1]) - 1) + "\x7f"
        while infos := await self.journal.streams(after, 100):
            for info in infos:
                if not info.stream.startswith(prefix):
                    return deleted
                await self.pushes.delete(info.stream)
                deleted += 1
            after = infos[-1].stream
        return deleted

    # Requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Route: `/relay` is ours, everything else is upstream's."""
        if scope["type"] != "http":
            return
        path: str = scope["path"]
        is_ours = path == "/relay" or path.startswith("/relay/")
        if is_ours:
            await self._serve_own(self._own, scope, receive, send)
        else:
            await self._serve(self._proxied, scope, receive, send)

    async def administration(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The application behind `--admin-addr`."""
        if scope["type"] == "http":
            await self._serve_own(self._administration, scope, receive, send)

    async def _serve_own(self, find_answer: FindAnswer, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request for one of our own routes, with what each of their answers has."""
        more = [*self.access.cors(scope), _AS_DECLARED]
        scope["extensions"][CONNECTION].more_headers = more
        await self._serve(find_answer, scope, receive, partial(_send_with, more, send))

    async def _serve(
        self,
        find_answer: FindAnswer,
        scope: Scope,
        receive: Receive,
        send: Send,
    ) -> None:
        """Answer a request, whatever happens."""
        for name, value in scope["headers"]:
            if name == trace.HEADER:
                trace.TRACE_ID.set(trace.trace_id_of(value.decode("latin-1")))
        try:
            self.access.admit(scope)
            answer = await find_answer(scope, receive, send)
            if answer is not None:
                gzip = takes_gzip(scope, self.settings.compress)
                end = await serve_reader(answer, self.readers, scope, send, gzip)
                self.metrics.readers_ended.labels(end).inc()
                self.diagnostics.reader_ended(answer.reader, end, _wall_ms())
        except ClientGone:
            pass
        except RelayError as error:
            await self._refuse(error, send)
        except Exception:
            if scope["extensions"][CONNECTION].response_started:
                raise  # uvicorn breaks the connection
            log.exception("a request failed: %s %s", scope["method"], scope["path"])
            await self._refuse(RelayError("relay failed; its log says why."), send)
        finally:
            scope["extensions"].clear()  # or the request would know itself, and stay for the collector

    async def _refuse(self, error: RelayError, send: Send) -> None:
        self.counts.refusals[error.code] += 1
        await send_problem(error, send)

    async def _own(self, scope: Scope, receive: Receive, send: Send) -> StreamAnswer | None:
        if self.access.is_preflight(scope):
            await send_whole(204, self.access.preflight(scope), b"", send)
            return None
        return await self._api(scope, receive, send)

    async def _proxied(self, scope: Scope, receive: Receive, send: Send) -> StreamAnswer | None:
        call = _call(scope, receive, self.access)
        if any(token.strip().lower() == "websocket" for token in call.header("upgrade").split(",")):
            raise UpgradeUnsupported("relay does not proxy WebSocket connections.")
        presented = call.header("last-event-id")
        browser = _is_event_source(call)
        client = self.access.client(scope)
        try:
            if presented.startswith(RESUME_PREFIX):
                return await self._resume(presented, browser, client, send)
            if self._proxy is None:
                raise RouteNotFound("No upstream is configured; relay's own routes are under /relay.")
            if stream := self._proxy.resumes(call):
                current = await self._current(self._proxy, stream, scope)
                if current is not None:
                    return await self._known_run(current, None, browser, client, send)
                await send_no_content(send)
                return None
            if stream := self._proxy.stops(call):
                await self._stop_current(stream, scope, send)
                return None
            opened = await self._open(self._proxy, call, scope)
            if isinstance(opened, Passed):
                await _pass_on(opened, call.method, scope, send)
            elif isinstance(opened, PassedWhole):
                await send_whole(opened.status, opened.headers, opened.body, send)
            elif isinstance(opened, StartedRun):
                await _send_started(opened, self._token_headers(opened.stream), send)
            elif opened.info is None:
                # A run opened just now is not refused its first reader: upstream was called for it.
                self.counts.replay_frames.observe(0)
                found = self._run_from(opened, opened.start, None, browser, client)
                found.headers += self._token_headers(opened.stream)
                return found
            else:
                known = await self._known_run(opened, None, browser, client, send)
                if known is not None:
                    known.headers += self._token_headers(opened.stream)
                return known
        except (Busy, JournalError) as error:
            if not browser:
                raise
            await self._ask_to_come_back(error, send)
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

    def _token_headers(self, stream: str) -> Head:
        """What lets a client that was just answered read the stream of the answer, and stop it."""
        token = self.access.token_for(stream)
        return [(b"relay-token", token.encode())] if token else []

    async def _current(self, proxy: Proxy, stream: str, scope: Scope) -> RunAnswer | None:
        """The current run of a stream that this request may read."""
        try:
            await self.access.grant(scope, Right.READ, stream)
        except UnknownStream:
            return None
        return await proxy.current(stream)

    async def _stop_current(self, stream: str, scope: Scope, send: Send) -> None:
        """Cancel a stream's newest open run: the run as it ended, or 204."""
        try:
            await self.access.grant(scope, Right.CANCEL, stream)
            run = (await self.journal.describe(stream)).current_run
        except UnknownStream:
            run = ""
        if not run:
            await send_no_content(send)
            return
        info = await self.pushes.cancel(stream, run, "")
        headers = [(b"content-type", b"application/json"), (b"cache-control", b"no-store")]
        await send_whole(200, headers, orjson.dumps(run_object(stream, info)), send)

    async def _resume(self, presented: str, browser: bool, client: str, send: Send) -> StreamAnswer | None:
        """Answer a request that carries a resume id from the journal, never from upstream."""
        resume_id = parse_resume_id(presented)
        answer, after, page = await find(self.tails, partial(self._look_up, resume_id))
        return await self._known_run(answer, (after, page), browser, client, send)

    async def _look_up(self, resume_id: ResumeId) -> tuple[tuple[RunAnswer, Cursor, Page], bool]:
        """The run of a resume id, the reader's cursor and what comes behind it; and whether the journal has
        less of an open run than was shown to the reader. Raises `ResumeUnknown`."""
        found = await self.journal.resolve_token(resume_id.token)
        if found is None:
            raise ResumeUnknown("This answer is not kept any more, or never was.")
        stream, name = found
        try:
            info = await self.journal.run(stream, name)
        except (UnknownStream, UnknownRun):
            raise ResumeUnknown("This answer is not kept any more.") from None
        if info.token != resume_id.token:
            # The stream was made anew between the two questions: a run of the same name is another's answer.
            raise ResumeUnknown("This answer is not kept any more.")
        answer = RunAnswer.of(stream, info, None if self._proxy is None else self._proxy.pump(stream, name))
        after = max(resume_id.cursor, answer.start)
        try:
            # One frame is enough to judge by, and no more is held as long as the client stays.
            page = await self.journal.read(stream, after, 1, 1)
        except UnknownStream:
            raise ResumeUnknown("This answer is not kept any more.") from None
        ahead = judge(after, page.extent, page.anchor_ms) is Standing.AHEAD
        return (answer, after, page), ahead and not info.ended_ms

    async def _known_run(
        self,
        answer: RunAnswer,
        presented: tuple[Cursor, Page] | None,
        browser: bool,
        client: str,
        send: Send,
    ) -> StreamAnswer | None:
        """A run opened before, from its reader's cursor or its start. Who has all of it gets 204."""
        info = answer.info
        assert info is not None
        self.check_room(answer.stream, client)
        if presented is None:
            after = answer.start
            page = await self.journal.read(answer.stream, after, 1, 1)
        else:
            after, page = presented
        standing = judge(after, page.extent, page.anchor_ms)
        nothing_left = info.ended_ms and info.last_data <= after.seq
        if presented is not None and nothing_left and standing.same_life:
            self.metrics.resumed("ended")
            await send_no_content(send, answer.media_type if info.status is Status.COMPLETED else "")
            return None
        if standing is not Standing.HERE:
            self.metrics.resumed(standing.value)
            raise cursor_gone(standing, page)
        if presented is not None:
            self.metrics.resumed("resumed")
        self.counts.replay_frames.observe(max(0, page.extent.top.seq - after.seq))
        return self._run_from(answer, after, ended_at(info), browser, client)

    def _run_from(
        self, answer: RunAnswer, after: Cursor, ended_seq: int | None, browser: bool, client: str
    ) -> StreamAnswer:
        """A run as upstream's own answer, from a cursor on."""
        prime = b""
        view: ProxiedSseView | ProxiedNdjsonView
        if answer.media_type.lower().startswith(EVENT_STREAM):
            view = ProxiedSseView(answer.run, answer.token, answer.media_type)
            if browser and after == answer.start:
                prime = view.prime(self.settings.retry_ms)
        else:
            view = ProxiedNdjsonView(answer.run, answer.media_type)
        reader = Reader(
            self.tails,
            answer.stream,
            view,
            after,
            None,
            ended_at=ended_seq,
            # Only a browser's EventSource is known to come back; others would take the end for the end.
            lease=self.lease() if browser else None,
            client=client,
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
            info = await self.journal.run(stream, run)
        except RelayError:
            return False
        # Who ends a run of which it is not known that it was answered leaves its format alone.
        said = info.answer and BY_NAME.get(info.dialect, RAW).error_event(ending(Reason.UPSTREAM_ERROR))
        return info.status is Status.COMPLETED or bool(said)

    def check_room(self, stream: str, client: str) -> None:
        """Raises `Busy` when no further reader may be served: at all, of the stream, or of the client."""
        settings, readers = self.settings, self.readers
        if len(readers) >= settings.readers_max:
            raise Busy("This relay serves as many readers as it may.")
        if settings.stream_readers_max and readers.of_stream[stream] >= settings.stream_readers_max:
            raise TooManyRequests("This stream has as many readers as it may.")
        if settings.client_readers_max and readers.of_client[client] >= settings.client_readers_max:
            raise TooManyRequests("This client has as many readers as it may.")

    async def _ask_to_come_back(self, error: RelayError, send: Send) -> None:
        """A browser's EventSource gives up for ever on anything but 200; this makes it try again."""
        log.warning("a browser is asked to come back: %s", error)
        self.counts.refusals[error.code] += 1
        headers = [(b"content-type", EVENT_STREAM.encode()), *STREAMING_HEADERS]
        await send_whole(200, headers, b"retry: %d\n\n" % self.tails.retry_ms(), send)


def _log_ended(stream: str, run: str, end: Ending, facts: Facts | None) -> None:
    level = logging.WARNING if end.status in (Status.FAILED, Status.LOST) else logging.INFO
    said = "run ended stream=%s run=%s status=%s reason=%s"
    told = stream, run, end.status.value, end.reason.value
    if facts is None:
        log.log(level, said, *told)
    else:
        log.log(level, said + " frames=%d duration_s=%.3f", *told, *facts)


async def _send_with(more: Head, send: Send, message: Message) -> None:
    """Add headers to an answer, behind its own: a content type stands first, so that a cut head has it."""
    if message["type"] == "http.response.start":
        message["headers"] = [*message["headers"], *more]
    await send(message)


def _wall_ms() -> int:
    return time.time_ns() // 1_000_000


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
        and call.header("accept").lower() == EVENT_STREAM
        and call.header("sec-fetch-dest") != ""
    )  # fmt: skip


async def _send_started(started: StartedRun, more: Head, send: Send) -> None:
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
