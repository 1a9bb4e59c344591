"""The transparent proxy: requests go to upstream as they are; an answer that is a stream becomes a run."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Protocol, TypeVar

import orjson

from relay.counts import PROXIED
from relay.cursor import Cursor
from relay.dialects.base import Dialect
from relay.dialects.detect import BY_NAME, by_head
from relay.errors import (
    BodyTooLarge,
    Busy,
    Fenced,
    Forbidden,
    InvalidName,
    InvalidParameter,
    JournalError,
    JournalRefused,
    JournalUnavailable,
    KeyReused,
    RelayError,
    ResumeUnknown,
    RunEnded,
    StartupError,
    StreamBusy,
    StreamSealed,
    UnknownRun,
    UnknownStream,
    UpstreamError,
    UpstreamInvalid,
)
from relay.frame import Frame
from relay.headers import Headers, all_of, end_to_end, first_of
from relay.ingest.naming import naming_rules, parse_json, stream_routes
from relay.ingest.opening import SAID_OF_SUPERSEDED, open_run
from relay.ingest.owned import Facts, OnEnded, OwnedRuns
from relay.ingest.pump import Called, CallingPump, Lines, Parser, Pump, ServerSentEvents, Whole
from relay.ingest.upstream import Answer, Inflater, Upstream, UpstreamRequest
from relay.ingest.writer import RunWriter
from relay.journal.base import Journal, Opened, RunInfo, RunOpening
from relay.lifecycle import Ending, Reason, Status, ending
from relay.limits import METADATA_MAX_BYTES, check_run_name, check_stream_name, is_stream_name
from relay.ndjson import NDJSON
from relay.settings import Settings
from relay.sse import EVENT_STREAM

log = logging.getLogger("relay.proxy")

LINE_TYPES = (NDJSON, "application/jsonl", "application/stream+json")

# 204, 205 and 304 have no body, and 206 is a piece of a stored thing, not a stream.
_STREAM_STATUSES = (200, 201, 202, 203)

# What would no longer be true of a journaled answer. `vary` and `cache-control` are set anew.
_NOT_OF_A_STREAM = (
    b"content-length", b"content-encoding", b"etag", b"digest", b"content-digest", b"repr-digest",
    b"content-md5", b"accept-ranges", b"last-modified", b"age", b"expires", b"cache-control",
    b"x-accel-buffering", b"relay-stream", b"relay-run", b"relay-cursor", b"relay-metadata",
    b"relay-frames-after", b"relay-dialect", b"relay-token",
)  # fmt: skip

# What a request tells relay about its run, and not upstream.
_FOR_RELAY = (b"relay-authorization", b"relay-supersedes", b"relay-if-busy", b"relay-dialect")

_OF_WHO = (b"authorization", b"cookie", b"relay-authorization", b"x-api-key", b"api-key", b"x-goog-api-key")
"""What tells one caller of upstream from another: those with credentials in other places share their keys."""

IF_BUSY = ("allow", "reject", "supersede")

SUPERSEDES_MAX = 100
"""Runs that one opening may name to supersede."""

ANSWER_MAX_BYTES = 16 * 1024
"""Bound of the answer head kept for later responses; beyond it only the content type is kept."""

_SHUTTING_DOWN = "This relay is shutting down."
_TOO_MANY_RUNS = "This relay has as many open runs as it may."

CLAIM_POLL_S = 0.1
"""How often a request asks for a key that another one holds."""

UNWRITTEN_MAX = 1000
"""Endings kept for a journal that is away; beyond that the oldest is given up."""


SomePump = TypeVar("SomePump", bound=Pump)


class ClientGone(Exception):
    """The client left before its request was complete."""


class Caller(Protocol):
    """Who sends a request."""

    @property
    def is_gone(self) -> bool:
        """Whether nobody waits for the answer any more."""

    async def may_name(self, stream: str) -> bool:
        """Whether the caller may say itself which stream the answer goes to."""

    async def may(self, right: str, stream: str) -> bool:
        """Whether the caller may `read`, `write` or `cancel` in a stream by a right of its own, whatever
        upstream answers."""

    async def check_named(self, stream: str) -> None:
        """Raises what a caller is told whose answer may not go to the stream that its request is about."""


@dataclass(slots=True)
class Call:
    """A request for upstream. `target` is its raw path and query; header names are in lower case."""

    method: str
    path: str
    target: str
    headers: Headers
    body: AsyncIterator[bytes] | None
    caller: Caller


@dataclass(frozen=True, slots=True)
class RunAnswer:
    """A run as the answer to a request: what a response for it looks like, and where it begins.

    `pump` is there when this process reads its upstream, `info` when an earlier request opened the run.
    """

    stream: str
    run: str
    token: str
    start: Cursor
    status: int
    headers: Headers
    pump: Pump | None = None
    info: RunInfo | None = None

    @property
    def media_type(self) -> str:
        """The content type, parameters included."""
        return first_of(self.headers, b"content-type")

    @staticmethod
    def of(stream: str, info: RunInfo, pump: Pump | None) -> RunAnswer:
        """The answer of a run that was opened before; None of its upstream headers but those kept."""
        kept = orjson.loads(info.answer)
        headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in kept["headers"]]
        return RunAnswer(stream, info.run, info.token, info.start, kept["status"], headers, pump, info)


@dataclass(frozen=True, slots=True)
class StartedRun:
    """A run that goes on in the background, and where it begins. `frames_after` is None when it superseded
    nothing."""

    stream: str
    run: str
    cursor: Cursor
    frames_after: int | None = None


@dataclass(frozen=True, slots=True)
class RunWishes:
    """What a caller may say of the run it asks for; see `RunOpening`. An empty `run` is given a name."""

    run: str = ""
    dialect: str = ""
    metadata: str = ""
    seal: bool = False
    supersedes: Sequence[str] = ()
    if_busy: str = "allow"

    @property
    def supersede(self) -> bool:
        """Whether other runs may end for this one."""
        return bool(self.supersedes) or self.if_busy == "supersede"


def read_wishes(call: Call) -> RunWishes:
    """The wishes in a request's headers; raises `InvalidParameter`, `InvalidName`."""
    if_busy = first_of(call.headers, b"relay-if-busy") or "allow"
    if if_busy not in IF_BUSY:
        raise InvalidParameter(f"Relay-If-Busy is one of {', '.join(IF_BUSY)}.")
    given = all_of(call.headers, b"relay-supersedes")
    supersedes = [name.strip() for name in ",".join(given).split(",")] if given else []
    if len(supersedes) > SUPERSEDES_MAX:
        raise InvalidParameter(f"Relay-Supersedes names {SUPERSEDES_MAX} runs at most.")
    for name in supersedes:
        if name != "latest":
            check_run_name(name)
    dialect = first_of(call.headers, b"relay-dialect")
    if dialect and dialect not in BY_NAME:
        raise InvalidParameter(f"Relay-Dialect is one of {', '.join(BY_NAME)}.")
    return RunWishes(dialect=dialect, supersedes=supersedes, if_busy=if_busy)


@dataclass(slots=True)
class Passed:
    """An answer that is not journaled, to be passed on as it comes."""

    answer: Answer
    headers: Headers


@dataclass(frozen=True, slots=True)
class PassedWhole:
    """An answer that is no stream, to be passed on; its run has it too."""

    status: int
    headers: Headers
    body: bytes


Opening = Passed | PassedWhole | RunAnswer | StartedRun
"""What a request to upstream led to."""


class Audience(Protocol):
    """The readers of this process."""

    def readers_of(self, stream: str) -> int:
        """How many read a stream."""

    def expect(self, stream: str) -> None:
        """A run is about to be opened in the stream, and to be read."""

    def opened(self, stream: str, started: Frame, sealed: bool) -> None:
        """The run was opened; the stream is new, `started` is all it has, and it may be sealed."""


class Proxy:
    """Calls upstream, opens runs and owns their pumps.

    `owned` is told of every run; `audience` of those that somebody here waits for; `on_ended` of every run
    that is ended here.
    """

    def __init__(
        self,
        upstream: Upstream,
        journal: Journal,
        settings: Settings,
        owned: OwnedRuns,
        audience: Audience,
        on_ended: OnEnded,
    ) -> None:
        if settings.dialect and settings.dialect not in BY_NAME:
            raise StartupError(f"--dialect {settings.dialect!r} is none of {', '.join(BY_NAME)}.")
        self._upstream = upstream
        self._journal = journal
        self._settings = settings
        self._owned = owned
        self._audience = audience
        self._on_ended = on_ended
        self._naming = naming_rules(settings.stream_from)
        self._resume_route = stream_routes("--resume-route", settings.resume_route)
        self._stop_route = stream_routes("--stop-route", settings.stop_route)
        self._named_dialect = BY_NAME.get(settings.dialect)
        self._pumps: dict[tuple[str, str], Pump] = {}
        self._openings: set[asyncio.Future[None]] = set()
        self._calls: dict[asyncio.Future[None], asyncio.Task[Any]] = {}
        """Requests that may still become a run, and the tasks that work on them."""
        self._unwritten: dict[RunWriter, Callable[[], Awaitable[None]]] = {}
        self._finishing: set[asyncio.Task[None]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._draining = False
        self._shut = False

    @property
    def pumps(self) -> Collection[Pump]:
        """The pumps of the runs whose upstream this process is reading."""
        return self._pumps.values()

    @property
    def open_runs(self) -> int:
        """Runs whose upstream this process is reading."""
        return len(self._pumps)

    @property
    def _is_full(self) -> bool:
        return len(self._pumps) + len(self._openings) >= self._settings.open_runs_max

    # Requests

    def passes(self, path: str) -> bool:
        """Whether a path is never journaled, and closed with its client at every moment."""
        return any(fnmatchcase(path, glob) for glob in self._settings.passthrough)

    def resumes(self, call: Call) -> str:
        """The stream whose current run a request asks for by `--resume-route`; "" for any other request.
        Raises `InvalidName`."""
        return _valid(self._resume_route(call.method, call.target.partition("?")[0]))

    def stops(self, call: Call) -> str:
        """The stream whose current run a request stops by `--stop-route`; "" for any other request. Raises
        `InvalidName`."""
        return _valid(self._stop_route(call.method, call.target.partition("?")[0]))

    async def current(self, stream: str) -> RunAnswer | None:
        """The answer of a stream's newest open run that has one. Raises `JournalError`."""
        try:
            for run in reversed((await self._journal.describe(stream)).open_runs):
                info = await self._journal.run(stream, run)
                if info.answer:
                    return RunAnswer.of(stream, info, self.pump(stream, run))
        except (UnknownStream, UnknownRun):
            pass
        return None

    async def open(self, call: Call) -> Opening:
        """Send a request to upstream, or find the run an earlier one with the same key led to.

        A client that leaves meanwhile does not stop this: whether the answer is a run, which goes on without
        it, shows only when upstream's head is there."""
        if self._draining:
            raise Busy(_SHUTTING_DOWN)
        if self.passes(call.path):
            answer = await self._call(call, call.body)
            return Passed(answer, end_to_end(answer.headers))
        task = asyncio.current_task()
        assert task is not None
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._calls[done] = task
        try:
            return await self._open_call(call)
        except asyncio.CancelledError:
            if not self._shut:
                raise
            task.uncancel()
            raise Busy(_SHUTTING_DOWN) from None
        finally:
            del self._calls[done]
            done.set_result(None)

    async def _open_call(self, call: Call) -> Opening:
        wishes = read_wishes(call)
        key = first_of(call.headers, b"idempotency-key")
        others = _preferences_without_async(call)
        if others is not None and call.method != "HEAD":
            return await self._open_async(call, others, wishes, key)
        if self._is_full and first_of(call.headers, b"accept").lower() == EVENT_STREAM:
            raise Busy(_TOO_MANY_RUNS)  # it can only want a stream, so upstream need not be called in vain
        body: AsyncIterator[bytes] | bytes | None = call.body
        if key:
            body = await self._whole_body(call.body, "for an Idempotency-Key")
            name = await self._name(call, body)
            begin = partial(self._open, call, body, name, wishes)
            joined = await self._join(call, body, name, key, begin)
            if isinstance(joined, tuple):
                return await self._joined_answer(call, *joined)
            return joined
        if self._naming.needs_body and "json" in first_of(call.headers, b"content-type"):
            begun, rest = await self._begin_body(call.body)
            name = await self._name(call, begun if rest is None else None)
            return await self._open(call, begun if rest is None else _joined(begun, rest), name, wishes)
        return await self._open(call, body, await self._name(call, None), wishes)

    async def _open_async(
        self, call: Call, preferences: Sequence[str], wishes: RunWishes, key: str
    ) -> Opening:
        """Open the run first; upstream is called behind the answer."""
        body = await self._whole_body(call.body, "for a request that is answered before it is sent")
        name = await self._name(call, body)
        if name and not await call.caller.may("write", name):
            # Upstream has not been asked yet whose stream it is, and the answer would bring a token for it.
            raise Forbidden("Who has no right to write the stream cannot be answered before upstream has.")
        headers = _request_headers(call, b"prefer")
        headers += [(b"prefer", preference.encode("latin-1")) for preference in preferences]
        request = UpstreamRequest(call.method, call.target, headers, body)
        begin = partial(self._start_run, name, request, wishes)
        if not key:
            return await begin()
        joined = await self._join(call, body, name, key, begin)
        if not isinstance(joined, tuple):
            return joined
        info = await self._known(*joined)
        return StartedRun(joined[0], info.run, info.start)

    async def _name(self, call: Call, body: bytes | None) -> str:
        """The stream's name as the request tells it. Raises `InvalidName` for one the caller gave itself;
        what a setting finds is checked when the answer turns out to be a stream, and only then."""
        parsed = parse_json(body) if self._naming.needs_body and body is not None else None
        name = self._naming.find(call.target.partition("?")[0], call.headers, parsed)
        if name:
            if is_stream_name(name):
                await call.caller.check_named(name)
            return name
        given = first_of(call.headers, b"relay-stream")
        return check_stream_name(given) if given and await call.caller.may_name(given) else ""

    async def _open(
        self, call: Call, body: AsyncIterator[bytes] | bytes | None, stream: str, wishes: RunWishes
    ) -> Passed | PassedWhole | RunAnswer:
        # Who has no right of its own to stop a run replaces it when upstream has answered, as it does for its
        # own users alone.
        begins = bool(stream) and wishes.supersede and call.method != "HEAD"
        if begins and await call.caller.may("cancel", stream):
            if not isinstance(body, bytes):
                body = await self._whole_body(body, "for a request whose run begins before it is sent")
            answered = await self._open_first(call, body, stream, wishes)
            if answered is not None:
                return answered
        if stream and wishes.if_busy == "reject" and await call.caller.may("read", stream):
            await self._refuse_if_busy(stream)
        answer = await self._call(call, body)
        try:
            if not _is_stream(call.method, answer):
                return Passed(answer, end_to_end(answer.headers))
            return await self._open_run(call, answer, stream, wishes)
        except JournalError as error:
            log.warning("a stream begins without the journal (%s): %s", self._settings.journal_down, error)
            if self._settings.journal_down == "passthrough":
                headers = [*end_to_end(answer.headers), (b"relay-journal", b"down")]
                return Passed(answer, headers)
            answer.close()
            raise
        except BaseException:
            answer.close()
            raise

    async def _open_first(
        self, call: Call, body: bytes | None, stream: str, wishes: RunWishes
    ) -> PassedWhole | RunAnswer | None:
        """Replace runs before upstream is called, which may be slow to answer: every reader sees at once that
        they are over, and what is stopped meanwhile is the new run. None when the journal is away and the
        stream may go without it.

        The client gets upstream's answer as ever. One that is no stream is the run's too, and ends it."""
        request = UpstreamRequest(call.method, call.target, _request_headers(call), body)
        try:
            opening, pump, opened = await self._start(stream, request, wishes, awaited=True)
        except JournalError as error:
            if self._settings.journal_down != "passthrough":
                raise
            log.warning("a run cannot begin before upstream is called: %s", error)
            return None
        answered = await pump.answered
        if isinstance(answered, UpstreamError):
            raise answered
        if isinstance(answered, Whole):
            bodiless = (b"content-length",) if answered.answer.status in (204, 304) else ()
            headers = end_to_end(answered.answer.headers, *bodiless)
            return PassedWhole(answered.answer.status, headers, answered.body)
        if answered is None:
            raise await self._why_unanswered(pump)
        head = _head(answered.answer)
        if opened.superseded:
            head.append((b"relay-frames-after", b"%d" % opened.frames_after))
        status = answered.answer.status
        return RunAnswer(opening.stream, opening.run, opening.token, opened.start, status, head, pump)

    async def _why_unanswered(self, pump: Pump) -> RelayError:
        """Why a run was over before upstream answered. Raises `JournalError`."""
        if pump.unwritten is not None:
            return JournalUnavailable("The journal was away for too long.")
        if pump.ended is not None and pump.ended.reason is Reason.SHUTDOWN:
            return Busy(_SHUTTING_DOWN)
        stream, run = pump.writer.stream, pump.writer.run
        try:
            info = await self._journal.run(stream, run)
        except (UnknownStream, UnknownRun):
            return _stopped(stream, run, Reason.STREAM_DELETED)
        if not info.ended_ms:
            return Fenced("Another writer took the run over before upstream answered.")
        return _unanswered(stream, info)

    async def _call(self, call: Call, body: AsyncIterator[bytes] | bytes | None) -> Answer:
        return await self._upstream.call(call.method, call.target, _request_headers(call), body)

    async def _refuse_if_busy(self, stream: str) -> None:
        """Spare upstream a call whose answer could not be journaled. The opening asks again, atomically."""
        try:
            open_runs = (await self._journal.describe(stream)).open_runs
        except (JournalError, UnknownStream):
            return
        if open_runs:
            raise StreamBusy("The stream has an open run.", open_runs=list(open_runs))

    async def _whole_body(self, given: AsyncIterator[bytes] | None, what_for: str) -> bytes | None:
        body, rest = await self._begin_body(given)
        if rest is not None:
            raise BodyTooLarge(
                f"The body is larger than relay buffers {what_for}.",
                limit=self._settings.buffered_body_max_bytes,
            )
        return body

    async def _begin_body(
        self, given: AsyncIterator[bytes] | None
    ) -> tuple[bytes | None, AsyncIterator[bytes] | None]:
        """The body as far as relay buffers one, and the rest of it if it is longer."""
        if given is None:
            return None, None
        body = bytearray()
        async for data in given:
            body += data
            if len(body) > self._settings.buffered_body_max_bytes:
                return bytes(body), given
        return bytes(body), None

    # Runs

    async def _open_run(self, call: Call, answer: Answer, stream: str, wishes: RunWishes) -> RunAnswer:
        self._check_room()
        parser, found = self._reading(answer, call.path)
        dialect = _dialect_named_by(answer) or BY_NAME.get(wishes.dialect) or found
        named = _stream_named_by(answer) or (check_stream_name(stream) if stream else "")
        head = _head(answer)
        wishes = replace(wishes, metadata=_metadata_of(answer))
        opening = self._opening(named, wishes, dialect, _kept_head(answer.status, head))

        def pump_of(writer: RunWriter) -> Pump:
            return Pump(writer, answer, parser, dialect, self._now())

        pump, opened = await self._begin(opening, pump_of, awaited=True)
        if opened.superseded:
            head.append((b"relay-frames-after", b"%d" % opened.frames_after))
        return RunAnswer(opening.stream, opening.run, opening.token, opened.start, answer.status, head, pump)

    async def start_run(self, stream: str, request: UpstreamRequest, wishes: RunWishes) -> StartedRun:
        """Open a run in a stream ("": a fresh one, sealed with it), and call upstream for it in the
        background. An answer that is no stream becomes one frame, or the error that the run fails with.

        Raises `Busy`, `InvalidName`, `InvalidParameter`, and what `Journal.open_run` raises."""
        if self._draining:
            raise Busy(_SHUTTING_DOWN)
        return await self._start_run(stream, request, wishes)

    async def _start_run(self, stream: str, request: UpstreamRequest, wishes: RunWishes) -> StartedRun:
        opening, _, opened = await self._start(stream, request, wishes, awaited=False)
        frames_after = opened.frames_after if opened.superseded else None
        return StartedRun(opening.stream, opening.run, opened.start, frames_after)

    async def _start(
        self, stream: str, request: UpstreamRequest, wishes: RunWishes, *, awaited: bool
    ) -> tuple[RunOpening, CallingPump, Opened]:
        """Open a run and have its pump call upstream; `awaited` as for `CallingPump`."""
        self._check_room()
        if wishes.dialect and wishes.dialect not in BY_NAME:
            raise InvalidParameter(f"A dialect is one of {', '.join(BY_NAME)}.")
        dialect = BY_NAME.get(wishes.dialect) or self._named_dialect
        opening = self._opening(check_stream_name(stream) if stream else "", wishes, dialect, "")

        def pump_of(writer: RunWriter) -> CallingPump:
            call = partial(self._answer_to, opening.stream, request, dialect)
            limit = self._settings.frame_max_bytes
            return CallingPump(writer, call, dialect, self._now(), limit, awaited)

        pump, opened = await self._begin(opening, pump_of, awaited)
        return opening, pump, opened

    def _check_room(self) -> None:
        """Raises `Busy`. A request that came before relay began to shut down has the grace of the runs."""
        if self._shut:
            raise Busy(_SHUTTING_DOWN)
        if self._is_full:
            raise Busy(_TOO_MANY_RUNS)

    async def _answer_to(self, stream: str, request: UpstreamRequest, dialect: Dialect | None) -> Called:
        """Upstream's answer to the call for a run that is open already."""
        answer = await self._upstream.call(request.method, request.target, request.headers, request.body)
        try:
            kept_head = _kept_head(answer.status, _head(answer))
            if not _is_stream(request.method, answer):
                return Called(answer, None, dialect, kept_head)
            parser, found = self._reading(answer, request.path)
            named = first_of(answer.headers, b"relay-stream")
            if named not in ("", stream):
                # Too late: readers of the run's stream have been told of it.
                log.warning("stream=%s upstream's Relay-Stream %r comes too late", stream, named)
            return Called(answer, parser, _dialect_named_by(answer) or dialect or found, kept_head)
        except BaseException:
            answer.close()
            raise

    def _reading(self, answer: Answer, path: str) -> tuple[Parser, Dialect | None]:
        """How a stream is read, and its dialect if that shows before its first event."""
        coding = first_of(answer.headers, b"content-encoding").lower()
        if coding not in ("", "identity", *Inflater.CODINGS):
            raise UpstreamInvalid(f"Upstream was asked for identity and sent its stream as {coding!r}.")
        sse = answer.media_type == EVENT_STREAM
        parser = (ServerSentEvents if sse else Lines)(self._settings.frame_max_bytes)
        return parser, self._named_dialect or (by_head(path, answer.headers) if sse else None)

    def _opening(self, stream: str, wishes: RunWishes, dialect: Dialect | None, kept_head: str) -> RunOpening:
        supersedes = wishes.supersedes or wishes.if_busy == "supersede"
        return RunOpening(
            stream=stream or secrets.token_hex(16),
            run=wishes.run or secrets.token_hex(12),
            writer=secrets.token_urlsafe(16),
            token=secrets.token_urlsafe(24),
            retention=self._settings.retention,
            dialect="" if dialect is None else dialect.name,
            metadata=wishes.metadata,
            answer=kept_head,
            seal=wishes.seal or not stream,
            owner=self._owned.name,
            max_run_s=self._settings.max_run_s,
            supersedes=wishes.supersedes,
            if_busy=wishes.if_busy,
            error_events=SAID_OF_SUPERSEDED if supersedes else {},
            deliver=bool(self._settings.webhook_url),
        )

    async def _begin(
        self, opening: RunOpening, pump_of: Callable[[RunWriter], SomePump], awaited: bool
    ) -> tuple[SomePump, Opened]:
        """Open a run and start its pump. `awaited` says that a client is going to read it."""
        counts = self._owned.counts
        writer = RunWriter(self._journal, opening, self._settings, self._owned.memory, counts)
        pump = pump_of(writer)
        self._owned.add(writer, pump.over)
        done = asyncio.get_running_loop().create_future()
        self._openings.add(done)
        if awaited:
            self._audience.expect(opening.stream)
        try:
            timeout_s = self._settings.journal_timeout_s
            opened = await open_run(self._journal, opening, timeout_s, self._on_ended)
        except JournalUnavailable:
            # The run may have been opened: then it must end, and nobody else knows of it.
            self._write_later(writer, partial(self._end_unanswered, writer))
            raise
        except BaseException as error:
            self._owned.discard(writer)
            if isinstance(error, StreamSealed):
                log.warning("stream=%s is sealed; upstream's answer cannot be journaled", opening.stream)
            raise
        finally:
            self._openings.discard(done)
            done.set_result(None)
        counts.journaled[PROXIED].runs += 1
        started = writer.opened(opened)
        if awaited and started is not None and started.seq == 1:
            self._audience.opened(opening.stream, started, opening.seal)
        self._pumps[opening.stream, opening.run] = pump
        self._spawn(self._run(pump), self._tasks)
        if self._shut:
            pump.stop(_shut_down())
        return pump, opened

    async def _run(self, pump: Pump) -> None:
        key = (pump.writer.stream, pump.writer.run)
        try:
            await pump.run()
        finally:
            if self._pumps.get(key) is pump:  # or the stream was made anew, and so was a run of this name
                del self._pumps[key]
        self._count(pump)
        if pump.unwritten is None:
            self._owned.discard(pump.writer)
        else:
            self._write_later(pump.writer, partial(self._write_kept, pump))
        self._spawn(pump.let_upstream_finish(), self._finishing)

    def _count(self, pump: Pump) -> None:
        if pump.ended is not None:
            writer = pump.writer
            facts = Facts(max(0, writer.next_seq - 1), pump.ended_at - pump.started_at)
            self._on_ended(writer.stream, writer.run, pump.ended, pump.text_bytes, facts)

    def _write_later(self, writer: RunWriter, write: Callable[[], Awaitable[None]]) -> None:
        while len(self._unwritten) >= UNWRITTEN_MAX:
            oldest = next(iter(self._unwritten))
            del self._unwritten[oldest]
            self._owned.discard(oldest)
        self._unwritten[writer] = write

    async def _write_kept(self, pump: Pump) -> None:
        await pump.write_kept()
        self._count(pump)

    async def _end_unanswered(self, writer: RunWriter) -> None:
        """End a run of which it is not known whether the journal opened it."""
        end = ending(Reason.JOURNAL_LOST, "The journal did not say whether the run was opened.")
        try:
            await writer.append_once((), 0, "", end)
        except (UnknownStream, UnknownRun):
            return  # it was not
        self._on_ended(writer.stream, writer.run, end, 0, None)

    def pump(self, stream: str, run: str) -> Pump | None:
        """The pump of a run whose upstream this process reads."""
        return self._pumps.get((stream, run))

    async def attached(self, stream: str, run: str) -> RunAnswer:
        """The answer of a run opened before, by any relay. Raises `UnknownStream`, `UnknownRun`."""
        return RunAnswer.of(stream, await self._journal.run(stream, run), self.pump(stream, run))

    # Idempotency keys

    async def _known(self, stream: str, run: str) -> RunInfo:
        try:
            return await self._journal.run(stream, run)
        except (UnknownStream, UnknownRun):
            raise ResumeUnknown("The answer to this Idempotency-Key is not kept any more.") from None

    async def _joined_answer(self, call: Call, stream: str, run: str) -> RunAnswer:
        """The answer of the run a key led to. One that was begun in the background may have no head yet."""
        info = await self._known(stream, run)
        while not info.answer:
            if info.ended_ms:
                raise _unanswered(stream, info)
            if call.caller.is_gone:
                raise ClientGone
            if self._shut:
                raise Busy(_SHUTTING_DOWN)
            await asyncio.sleep(CLAIM_POLL_S)
            info = await self._known(stream, run)
        return RunAnswer.of(stream, info, self.pump(stream, run))

    async def _join(
        self,
        call: Call,
        body: bytes | None,
        stream: str,
        key: str,
        begin: Callable[[], Awaitable[Opening]],
    ) -> Opening | tuple[str, str]:
        """One run per key: the first request begins it, the others get the stream and run it led to.

        A key whose run the journal does not keep any more is 410 for the rest of its time. Calling upstream
        again would do twice what the key promises to do once; a new key asks for that."""
        scope = (
            call.method, call.target, stream, *(all_of(call.headers, header) for header in _OF_WHO), key,
        )  # fmt: skip
        claimed = hashlib.sha256(orjson.dumps(scope)).hexdigest()
        digest = hashlib.sha256(body or b"").hexdigest()
        holder = f"{self._owned.name}.{secrets.token_hex(8)}"
        try:
            joined = await self._claim(call, claimed, digest, holder)
        except JournalError:
            if self._settings.journal_down == "fail":
                raise
            return await begin()
        if joined is not None:
            return joined
        renewing = asyncio.create_task(self._renew(claimed, digest, holder))
        try:
            opened = await begin()
        except RunEnded as ended:
            # Stopped before upstream answered: who asks with this key again must not start it anew.
            led_to = ended.extra["stream"], ended.extra["run"]
            self._spawn(self._settle(renewing, claimed, holder, *led_to), self._tasks)
            raise
        except BaseException:
            await self._unclaim(renewing, claimed, holder)
            raise
        if isinstance(opened, Passed | PassedWhole):
            await self._unclaim(renewing, claimed, holder)
        else:
            self._spawn(self._settle(renewing, claimed, holder, opened.stream, opened.run), self._tasks)
        return opened

    async def _settle(
        self, renewing: asyncio.Task[None], key: str, holder: str, stream: str, run: str
    ) -> None:
        """Write down where a key led. Until then it stays this request's, and others wait for it."""
        deadline = self._now() + self._settings.journal_deadline_s
        try:
            while True:
                try:
                    await self._journal.settle(key, holder, stream, run)
                    return
                except JournalError as error:
                    if self._now() > deadline:
                        log.warning("an Idempotency-Key could not be settled run=%s: %s", run, error)
                        return
                await asyncio.sleep(CLAIM_POLL_S)
        finally:
            renewing.cancel()

    async def _claim(self, call: Call, key: str, digest: str, holder: str) -> tuple[str, str] | None:
        """Wait for the key. None when it is this request's to use, else the stream and run it led to."""
        settings = self._settings
        deadline = self._now() + settings.upstream_header_timeout_s + settings.claim_lease_s
        while True:
            claim = await self._journal.claim(
                key, digest, holder, settings.claim_lease_s, settings.idempotency_keep_s
            )
            if claim.state == "won":
                return None
            if claim.state == "settled":
                return claim.stream, claim.run
            if claim.state == "mismatch":
                raise KeyReused("This Idempotency-Key was sent before with another body.")
            if call.caller.is_gone:
                raise ClientGone
            if self._shut:
                raise Busy(_SHUTTING_DOWN)
            if self._now() > deadline:
                raise Busy("The request that holds this Idempotency-Key is not answered.")
            await asyncio.sleep(CLAIM_POLL_S)

    async def _renew(self, key: str, digest: str, holder: str) -> None:
        settings = self._settings
        while True:
            await asyncio.sleep(settings.claim_lease_s / 3)
            try:
                await self._journal.claim(
                    key, digest, holder, settings.claim_lease_s, settings.idempotency_keep_s
                )
            except JournalError as error:
                log.warning("an Idempotency-Key could not be renewed: %s", error)

    async def _unclaim(self, renewing: asyncio.Task[None], key: str, holder: str) -> None:
        renewing.cancel()
        try:
            await self._journal.release(key, holder)
        except JournalError:
            pass  # it lapses with its lease

    # Care of open runs

    async def visit(self) -> None:
        """End runs that are too old or that nobody reads; write endings that the journal did not take."""
        now, settings = self._now(), self._settings
        can_ask = True
        # By their names, which are there already: a new object a run, each second, makes the collector visit
        # everything.
        for key in list(self._pumps):
            pump, stream = self._pumps.get(key), key[0]
            if pump is None:
                continue
            if settings.max_run_s and now - pump.started_at > settings.max_run_s:
                pump.stop(ending(Reason.MAX_RUN, f"The run was open for {settings.max_run_s:g} s."))
            elif self._audience.readers_of(stream) or not settings.abandon_s or not pump.may_be_abandoned:
                pump.read_at = now
            elif now - pump.read_at > settings.abandon_s and can_ask:
                can_ask = await self._abandon(stream, pump)
        for writer, write in list(self._unwritten.items()):
            try:
                await write()
            except JournalRefused:
                continue
            except JournalError:
                return
            except RelayError as error:
                log.error("an ending was refused stream=%s run=%s: %s", writer.stream, writer.run, error)
            except Exception:
                log.exception("an ending cannot be written stream=%s run=%s", writer.stream, writer.run)
            self._unwritten.pop(writer, None)
            self._owned.discard(writer)

    async def _abandon(self, stream: str, pump: Pump) -> bool:
        """End a run if nobody reads it; False when that cannot be found out now."""
        try:
            # Readers of other processes count too. This process has none, so it watches no more.
            elsewhere = await self._journal.watchers(stream)
        except JournalError:
            return False
        if elsewhere or self._audience.readers_of(stream):  # or somebody came while that was asked
            pump.read_at = self._now()
        else:
            pump.stop(ending(Reason.ABANDONED, "Nobody read the run."))
        return True

    async def drain(self) -> None:
        """Take no new requests; let those that were under way, and the open runs, finish within the grace;
        end what is left."""
        self._draining = True
        until = self._now() + self._settings.drain_grace_s
        # Again and again: what was a request, or the opening of a run, has become a run meanwhile.
        while (under_way := self._tasks | self._openings | self._calls.keys()) and self._now() < until:
            await asyncio.wait(under_way, timeout=until - self._now())
        self._shut = True
        for pump in list(self._pumps.values()):
            pump.stop(_shut_down())
        if self._openings:
            await asyncio.wait(self._openings, timeout=self._settings.journal_timeout_s)
        # Not before: a run that is cut off in its opening would have nobody who ends it.
        for task in self._calls.values():
            task.cancel()
        if under_way := self._tasks | self._calls.keys():
            await asyncio.wait(under_way, timeout=self._settings.journal_timeout_s)

    @staticmethod
    def _spawn(work: Coroutine[Any, Any, None], tasks: set[asyncio.Task[None]]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()


def _unanswered(stream: str, info: RunInfo) -> RelayError:
    """What to say of a run that ended without an answer."""
    if info.status is Status.CANCELLED:
        return _stopped(stream, info.run, info.reason)
    return UpstreamError(info.error or "The run ended before upstream answered.")


def _stopped(stream: str, run: str, reason: str) -> RunEnded:
    text = "The run was ended before upstream answered."
    return RunEnded(text, stream=stream, run=run, run_status=Status.CANCELLED, reason=reason)


def _request_headers(call: Call, *drop: bytes) -> Headers:
    """A request's headers as upstream gets them."""
    return end_to_end(call.headers, *_FOR_RELAY, b"expect", b"accept-encoding", *drop)


def _valid(name: str) -> str:
    return check_stream_name(name) if name else ""


def _shut_down() -> Ending:
    return ending(Reason.SHUTDOWN, "relay was shut down.")


def _preferences_without_async(call: Call) -> list[str] | None:
    """What else a request prefers (RFC 7240) when it asks to be answered at once; None when it does not."""
    given = [part.strip() for value in all_of(call.headers, b"prefer") for part in value.split(",")]
    others = [part for part in given if part.partition(";")[0].strip().lower() != "respond-async"]
    return None if len(others) == len(given) else others


def _is_stream(method: str, answer: Answer) -> bool:
    if method == "HEAD" or answer.status not in _STREAM_STATUSES:
        return False
    return answer.media_type == EVENT_STREAM or answer.media_type in LINE_TYPES


def _head(answer: Answer) -> Headers:
    """The head of a journaled answer."""
    headers = end_to_end(answer.headers, *_NOT_OF_A_STREAM)
    vary = [value for name, value in headers if name == b"vary"]
    headers = [(name, value) for name, value in headers if name != b"vary"]
    # First, because Chromium takes a head that was cut in an orderly way for whole, and gives up for ever on
    # an event stream without its type.
    headers.sort(key=lambda header: header[0] != b"content-type")
    return [*headers, (b"vary", b", ".join([*vary, b"Last-Event-ID, Accept-Encoding"]))]


def _stream_named_by(answer: Answer) -> str:
    try:
        name = first_of(answer.headers, b"relay-stream")
        return check_stream_name(name) if name else ""
    except InvalidName as error:
        raise UpstreamInvalid(f"Upstream's Relay-Stream header: {error.detail}") from None


def _dialect_named_by(answer: Answer) -> Dialect | None:
    name = first_of(answer.headers, b"relay-dialect")
    if name and name not in BY_NAME:
        raise UpstreamInvalid(f"Upstream's Relay-Dialect header is none of {', '.join(BY_NAME)}.")
    return BY_NAME.get(name)


def _metadata_of(answer: Answer) -> str:
    text = first_of(answer.headers, b"relay-metadata")
    if text and (len(text) > METADATA_MAX_BYTES or not _can_be_kept(text.encode("latin-1"))):
        raise UpstreamInvalid("Upstream's Relay-Metadata header is not JSON, or too large.")
    return text.encode("latin-1").decode(errors="replace")


def _can_be_kept(metadata: bytes) -> bool:
    parsed = parse_json(metadata)
    try:
        return parsed is not None and bool(orjson.dumps(parsed))
    except TypeError:  # nested deeper than is written, though not than is read
        return False


def _kept_head(status: int, headers: Headers) -> str:
    """A head as text for later responses, without what was meant for the first client alone."""
    kept = [
        (name.decode("latin-1"), value.decode("latin-1")) for name, value in headers if name != b"set-cookie"
    ]
    text = orjson.dumps({"status": status, "headers": kept})
    if len(text) > ANSWER_MAX_BYTES:
        essential: Mapping[str, Any] = {
            "status": status, "headers": [pair for pair in kept if pair[0] == "content-type"],
        }  # fmt: skip
        text = orjson.dumps(essential)
    return text.decode()


async def _joined(begun: bytes | None, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield begun or b""
    async for data in rest:
        yield data
