"""The transparent proxy: requests go to upstream as they are; an answer that is a stream becomes a run."""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import orjson

from relay.cursor import Cursor
from relay.dialects.detect import BY_NAME, by_path
from relay.errors import (
    BodyTooLarge,
    Busy,
    InvalidName,
    JournalError,
    JournalRefused,
    JournalUnavailable,
    KeyReused,
    RelayError,
    ResumeUnknown,
    StartupError,
    StreamSealed,
    UnknownRun,
    UnknownStream,
    UpstreamInvalid,
)
from relay.ingest.naming import naming_rules, parse_json
from relay.ingest.pump import Lines, Pump, ServerSentEvents
from relay.ingest.upstream import Answer, Headers, Inflater, Upstream, end_to_end
from relay.ingest.writer import RunWriter
from relay.journal.base import Journal, Opened, RunInfo, RunOpening
from relay.lifecycle import Ending, Reason, ending
from relay.limits import METADATA_MAX_BYTES, check_stream_name
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
)  # fmt: skip

ANSWER_MAX_BYTES = 16 * 1024
"""Bound of the answer head kept for later responses; beyond it only the content type is kept."""

_TOO_MANY_RUNS = "This relay has as many open runs as it may."

CLAIM_POLL_S = 0.1
"""How often a request asks for a key that another one holds."""

UNWRITTEN_MAX = 1000
"""Endings kept for a journal that is away; beyond that the oldest is given up."""


class ClientGone(Exception):
    """The client left before its request was complete."""


@dataclass(slots=True)
class Call:
    """A request for upstream. `target` is its raw path and query; header names are in lower case."""

    method: str
    path: str
    target: str
    headers: Headers
    body: AsyncIterator[bytes] | None
    client_host: str
    client_gone: Callable[[], bool]

    def header(self, name: str) -> str:
        """A header's first value, or ""."""
        return next(iter(self.all_of(name)), "")

    def all_of(self, name: str) -> list[str]:
        """A header's values, one for each time it was sent."""
        wanted = name.encode()
        return [value.decode("latin-1").strip() for key, value in self.headers if key == wanted]

    @property
    def trusted(self) -> bool:
        """Whether the caller may name streams: on loopback, and not forwarded for somebody else."""
        if self.all_of("x-forwarded-for") or self.all_of("forwarded"):
            return False
        try:
            return ipaddress.ip_address(self.client_host).is_loopback
        except ValueError:
            return False


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
        return next(value.decode("latin-1") for name, value in self.headers if name == b"content-type")

    @staticmethod
    def of(stream: str, info: RunInfo, pump: Pump | None) -> RunAnswer:
        """The answer of a run that was opened before; None of its upstream headers but those kept."""
        kept = orjson.loads(info.answer)
        headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in kept["headers"]]
        return RunAnswer(stream, info.run, info.token, info.start, kept["status"], headers, pump, info)


@dataclass(slots=True)
class Passed:
    """An answer that is not journaled, to be passed on as it comes."""

    answer: Answer
    headers: Headers


class Proxy:
    """Calls upstream, opens runs and owns their pumps.

    `readers_of` tells how many readers of this process a stream has; `on_ended` is called with the ending
    and the bytes of text of every run that ends here.
    """

    def __init__(
        self,
        upstream: Upstream,
        journal: Journal,
        settings: Settings,
        readers_of: Callable[[str], int],
        on_ended: Callable[[Ending, int], None],
    ) -> None:
        if settings.dialect and settings.dialect not in BY_NAME:
            raise StartupError(f"--dialect {settings.dialect!r} is none of {', '.join(BY_NAME)}.")
        self._upstream = upstream
        self._journal = journal
        self._settings = settings
        self._readers_of = readers_of
        self._on_ended = on_ended
        self._naming = naming_rules(settings.stream_from)
        self._named_dialect = BY_NAME.get(settings.dialect)
        self._pumps: dict[tuple[str, str], Pump] = {}
        self._opening = 0
        self._unwritten: dict[tuple[str, str], Callable[[], Awaitable[None]]] = {}
        self._finishing: set[asyncio.Task[None]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._draining = False
        self._owner = secrets.token_urlsafe(16)

    @property
    def open_runs(self) -> int:
        """Runs whose upstream this process is reading."""
        return len(self._pumps)

    @property
    def _is_full(self) -> bool:
        return len(self._pumps) + self._opening >= self._settings.open_runs_max

    # Requests

    def passes(self, path: str) -> bool:
        """Whether a path is never journaled, and closed with its client at every moment."""
        return any(fnmatchcase(path, glob) for glob in self._settings.passthrough)

    async def open(self, call: Call) -> Passed | RunAnswer:
        """Send a request to upstream, or find the run an earlier one with the same key led to.

        A client that leaves meanwhile does not stop this: whether the answer is a run, which goes on without
        it, shows only when upstream's head is there."""
        if self._draining:
            raise Busy("This relay is shutting down.")
        if self.passes(call.path):
            answer = await self._call(call, call.body)
            return Passed(answer, end_to_end(answer.headers))
        if self._is_full and call.header("accept").lower() == EVENT_STREAM:
            raise Busy(_TOO_MANY_RUNS)  # it can only want a stream, so upstream need not be called in vain
        key = call.header("idempotency-key")
        body: AsyncIterator[bytes] | bytes | None = call.body
        if key:
            body, rest = await self._begin_body(call)
            if rest is not None:
                raise BodyTooLarge(
                    "The body is larger than relay buffers for an Idempotency-Key.",
                    limit=self._settings.buffered_body_max_bytes,
                )
            return await self._open_keyed(call, body, self._name(call, body), key)
        if self._naming.needs_body and "json" in call.header("content-type"):
            begun, rest = await self._begin_body(call)
            name = self._name(call, begun if rest is None else None)
            return await self._open(call, begun if rest is None else _joined(begun, rest), name)
        return await self._open(call, body, self._name(call, None))

    def _name(self, call: Call, body: bytes | None) -> str:
        """The stream's name as the request tells it. Raises `InvalidName` for one the caller gave itself;
        what a setting finds is checked when the answer turns out to be a stream, and only then."""
        parsed = parse_json(body) if self._naming.needs_body and body is not None else None
        name = self._naming.find(call.target.partition("?")[0], call.header, parsed)
        if not name and call.trusted and call.header("relay-stream"):
            name = check_stream_name(call.header("relay-stream"))
        return name

    async def _open(
        self, call: Call, body: AsyncIterator[bytes] | bytes | None, stream: str
    ) -> Passed | RunAnswer:
        answer = await self._call(call, body)
        try:
            if not self._is_stream(call, answer):
                return Passed(answer, end_to_end(answer.headers))
            return await self._open_run(call, answer, stream)
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

    async def _call(self, call: Call, body: AsyncIterator[bytes] | bytes | None) -> Answer:
        headers = end_to_end(call.headers, b"expect", b"accept-encoding")
        return await self._upstream.call(call.method, call.target, headers, body)

    async def _begin_body(self, call: Call) -> tuple[bytes | None, AsyncIterator[bytes] | None]:
        """The body as far as relay buffers one, and the rest of it if it is longer."""
        if call.body is None:
            return None, None
        body = bytearray()
        async for data in call.body:
            body += data
            if len(body) > self._settings.buffered_body_max_bytes:
                return bytes(body), call.body
        return bytes(body), None

    @staticmethod
    def _is_stream(call: Call, answer: Answer) -> bool:
        if call.method == "HEAD" or answer.status not in _STREAM_STATUSES:
            return False
        return answer.media_type == EVENT_STREAM or answer.media_type in LINE_TYPES

    # Runs

    async def _open_run(self, call: Call, answer: Answer, stream: str) -> RunAnswer:
        if self._draining or self._is_full:
            raise Busy(_TOO_MANY_RUNS)
        coding = answer.header(b"content-encoding").lower()
        if coding not in ("", "identity", *Inflater.CODINGS):
            raise UpstreamInvalid(f"Upstream was asked for identity and sent its stream as {coding!r}.")
        named = _stream_named_by(answer) or (check_stream_name(stream) if stream else "")
        sse = answer.media_type == EVENT_STREAM
        dialect = self._named_dialect or (by_path(call.path) if sse else None)
        head = self._head(answer)
        opening = RunOpening(
            stream=named or secrets.token_hex(16),
            run=secrets.token_hex(12),
            writer=secrets.token_urlsafe(16),
            token=secrets.token_urlsafe(24),
            retention=self._settings.retention,
            dialect="" if dialect is None else dialect.name,
            metadata=_metadata_of(answer),
            answer=_kept_head(answer.status, head),
            seal=not named,
        )
        writer = RunWriter(
            self._journal, opening.stream, opening.run, opening.writer, self._settings.journal_deadline_s
        )
        self._opening += 1
        try:
            opened = await self._opened(opening)
        except StreamSealed:
            log.warning("stream=%s is sealed; upstream's answer cannot be journaled", opening.stream)
            raise
        except JournalUnavailable:
            # The run may have been opened: then it must end, and nobody else knows of it.
            self._write_later(writer, partial(_end_unanswered, writer))
            raise
        finally:
            self._opening -= 1
        parser = (ServerSentEvents if sse else Lines)(self._settings.frame_max_bytes)
        pump = Pump(writer, answer, parser, dialect, self._now())
        self._pumps[opening.stream, opening.run] = pump
        self._spawn(self._run(pump), self._tasks)
        return RunAnswer(
            opening.stream, opening.run, opening.token, opened.start, answer.status, head, pump
        )

    async def _opened(self, opening: RunOpening) -> Opened:
        """Open a run, and ask once more if a connection broke under the question."""
        asked_at = self._now()
        try:
            return await self._journal.open_run(opening)
        except JournalUnavailable:
            if self._now() - asked_at > self._settings.journal_timeout_s / 2:
                raise  # no blip: the client has waited long enough
            return await self._journal.open_run(opening)

    async def _run(self, pump: Pump) -> None:
        key = (pump.writer.stream, pump.writer.run)
        try:
            await pump.run()
        finally:
            del self._pumps[key]
        self._count(pump)
        if pump.unwritten is not None:
            self._write_later(pump.writer, partial(self._write_kept, pump))
        self._spawn(pump.let_upstream_finish(), self._finishing)

    def _count(self, pump: Pump) -> None:
        if pump.ended is not None:
            self._on_ended(pump.ended, pump.text_bytes)

    def _write_later(self, writer: RunWriter, write: Callable[[], Awaitable[None]]) -> None:
        while len(self._unwritten) >= UNWRITTEN_MAX:
            self._unwritten.pop(next(iter(self._unwritten)))
        self._unwritten[writer.stream, writer.run] = write

    async def _write_kept(self, pump: Pump) -> None:
        await pump.write_kept()
        self._count(pump)

    @staticmethod
    def _head(answer: Answer) -> Headers:
        headers = end_to_end(answer.headers, *_NOT_OF_A_STREAM)
        vary = [value for name, value in headers if name == b"vary"]
        headers = [(name, value) for name, value in headers if name != b"vary"]
        # First, because Chromium takes a head that was cut in an orderly way for whole, and gives up for ever
        # on an event stream without its type.
        headers.sort(key=lambda header: header[0] != b"content-type")
        return [*headers, (b"vary", b", ".join([*vary, b"Last-Event-ID"]))]

    def pump(self, stream: str, run: str) -> Pump | None:
        """The pump of a run whose upstream this process reads."""
        return self._pumps.get((stream, run))

    async def attached(self, stream: str, run: str) -> RunAnswer:
        """The answer of a run opened before, by any relay. Raises `UnknownStream`, `UnknownRun`."""
        return RunAnswer.of(stream, await self._journal.run(stream, run), self.pump(stream, run))

    # Idempotency keys

    async def _open_keyed(
        self, call: Call, body: bytes | None, stream: str, key: str
    ) -> Passed | RunAnswer:
        """One run per key: the first request calls upstream, the others join its run.

        A key whose run the journal does not keep any more is 410 for the rest of its time. Calling upstream
        again would do twice what the key promises to do once; a new key asks for that."""
        scope = (
            call.method, call.target, stream, call.all_of("authorization"), call.all_of("cookie"), key,
        )  # fmt: skip
        claimed = hashlib.sha256(orjson.dumps(scope)).hexdigest()
        digest = hashlib.sha256(body or b"").hexdigest()
        holder = f"{self._owner}.{secrets.token_hex(8)}"
        try:
            joined = await self._claim(call, claimed, digest, holder)
        except JournalError:
            if self._settings.journal_down == "fail":
                raise
            return await self._open(call, body, stream)
        if joined is not None:
            try:
                return await self.attached(*joined)
            except (UnknownStream, UnknownRun):
                raise ResumeUnknown("The answer to this Idempotency-Key is not kept any more.") from None
        renewing = asyncio.create_task(self._renew(claimed, digest, holder))
        try:
            opened = await self._open(call, body, stream)
        except BaseException:
            await self._unclaim(renewing, claimed, holder)
            raise
        if isinstance(opened, Passed):
            await self._unclaim(renewing, claimed, holder)
        else:
            self._spawn(self._settle(renewing, claimed, holder, opened), self._tasks)
        return opened

    async def _settle(self, renewing: asyncio.Task[None], key: str, holder: str, answer: RunAnswer) -> None:
        """Write down where a key led. Until then it stays this request's, and others wait for it."""
        deadline = self._now() + self._settings.journal_deadline_s
        try:
            while True:
                try:
                    await self._journal.settle(key, holder, answer.stream, answer.run)
                    return
                except JournalError as error:
                    if self._now() > deadline:
                        log.warning("an Idempotency-Key could not be settled run=%s: %s", answer.run, error)
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
            if call.client_gone():
                raise ClientGone
            if self._draining or self._now() > deadline:
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
        for (stream, _), pump in list(self._pumps.items()):
            if settings.max_run_s and now - pump.started_at > settings.max_run_s:
                pump.stop(ending(Reason.MAX_RUN, f"The run was open for {settings.max_run_s:g} s."))
            elif self._readers_of(stream) or not settings.abandon_s or not pump.may_be_abandoned:
                pump.read_at = now
            elif now - pump.read_at > settings.abandon_s:
                await self._abandon(stream, pump)
        for key, write in list(self._unwritten.items()):
            try:
                await write()
            except JournalRefused:
                continue
            except JournalError:
                return
            except RelayError as error:
                log.error("an ending was refused stream=%s run=%s: %s", *key, error)
            self._unwritten.pop(key, None)

    async def _abandon(self, stream: str, pump: Pump) -> None:
        try:
            # Readers of other processes count too. This process has none, so it watches no more.
            elsewhere = await self._journal.watchers(stream)
        except JournalError:
            return
        if elsewhere:
            pump.read_at = self._now()
        else:
            pump.stop(ending(Reason.ABANDONED, "Nobody read the run."))

    async def drain(self) -> None:
        """Take no new runs, let the open ones finish within the grace, end what is left."""
        self._draining = True
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=self._settings.drain_grace_s)
        for pump in list(self._pumps.values()):
            pump.stop(ending(Reason.SHUTDOWN, "relay was shut down."))
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=self._settings.journal_timeout_s)

    @staticmethod
    def _spawn(work: Coroutine[Any, Any, None], tasks: set[asyncio.Task[None]]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()


async def _end_unanswered(writer: RunWriter) -> None:
    """End a run of which it is not known whether the journal opened it."""
    try:
        await writer.append_once(
            (), 0, "", ending(Reason.JOURNAL_LOST, "The journal did not say whether the run was opened.")
        )
    except (UnknownStream, UnknownRun):
        pass  # it was not


def _stream_named_by(answer: Answer) -> str:
    try:
        name = answer.header(b"relay-stream")
        return check_stream_name(name) if name else ""
    except InvalidName as error:
        raise UpstreamInvalid(f"Upstream's Relay-Stream header: {error.detail}") from None


def _metadata_of(answer: Answer) -> str:
    text = answer.header(b"relay-metadata")
    if text and (len(text) > METADATA_MAX_BYTES or parse_json(text.encode("latin-1")) is None):
        raise UpstreamInvalid("Upstream's Relay-Metadata header is not JSON, or too large.")
    return text.encode("latin-1").decode(errors="replace")


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
