"""The composition: one ASGI application out of journal, proxy, tails and readers.

upstream → Proxy → Pump → RunWriter → Journal → Tail → Reader → response
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from relay import trace
from relay.access import Access
from relay.admin_api import admin_routes, health_routes
from relay.api import Api, read_routes
from relay.counts import Counts
from relay.diagnostics import Colleagues, Diagnostics
from relay.doctor import journal_state, upstream_state
from relay.errors import Busy, InvalidParameter, JournalError, RelayError, TooManyRequests
from relay.headers import Headers, first_of
from relay.ingest.owned import Facts, OwnedRuns
from relay.ingest.proxy import ClientGone, Proxy, RunWishes, StartedRun
from relay.ingest.push import Pushes
from relay.ingest.upstream import Upstream, UpstreamRequest
from relay.journal.base import Condition, Ended, Journal
from relay.lifecycle import OWNER_LOST, Ending, Reason, Status, ending
from relay.metrics import VERSION, Metrics
from relay.openapi import openapi_routes
from relay.proxied import Proxied
from relay.push_api import push_routes
from relay.reaper import Reaper
from relay.replay.reader import Lease, ReaderEnd, Readers
from relay.replay.response import (
    CONNECTION,
    Message,
    Receive,
    Scope,
    Send,
    StreamAnswer,
    send_problem,
    send_whole,
    serve_reader,
    takes_gzip,
)
from relay.replay.tail import Tails
from relay.security import EVERYTHING, LEEWAY_S, Grant
from relay.server import connections_allowed
from relay.settings import Settings
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
        self._proxied = Proxied(self, self._proxy)
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
        if traceparent := first_of(scope["headers"], trace.HEADER):
            trace.TRACE_ID.set(trace.trace_id_of(traceparent))
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

    def check_room(self, stream: str, client: str) -> None:
        """Raises `Busy` when no further reader may be served: at all, of the stream, or of the client."""
        settings, readers = self.settings, self.readers
        if len(readers) >= settings.readers_max:
            raise Busy("This relay serves as many readers as it may.")
        if settings.stream_readers_max and readers.of_stream[stream] >= settings.stream_readers_max:
            raise TooManyRequests("This stream has as many readers as it may.")
        if settings.client_readers_max and readers.of_client[client] >= settings.client_readers_max:
            raise TooManyRequests("This client has as many readers as it may.")


def _log_ended(stream: str, run: str, end: Ending, facts: Facts | None) -> None:
    level = logging.WARNING if end.status in (Status.FAILED, Status.LOST) else logging.INFO
    said = "run ended stream=%s run=%s status=%s reason=%s"
    told = stream, run, end.status.value, end.reason.value
    if facts is None:
        log.log(level, said, *told)
    else:
        log.log(level, said + " frames=%d duration_s=%.3f", *told, *facts)


async def _send_with(more: Headers, send: Send, message: Message) -> None:
    """Add headers to an answer, behind its own: a content type stands first, so that a cut head has it."""
    if message["type"] == "http.response.start":
        message["headers"] = [*message["headers"], *more]
    await send(message)


def _wall_ms() -> int:
    return time.time_ns() // 1_000_000
