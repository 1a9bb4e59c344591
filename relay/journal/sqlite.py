"""The journal in one SQLite file: the embedded default, held by one process.

One thread writes. Operations are queued to it as closures; it takes everything that is queued, runs it in
one transaction, commits once, and only then answers the callers and tells the follower (group commit), so
that nobody hears of a frame that is not on disk. Between the commit and the callers stands a single
`call_soon_threadsafe` per group.

Appends, which are nearly all of the work, touch no SQL of their own: they are judged and applied on state
cached in the writing thread, and `_Store.flush` writes what a group of them comes to in a few statements.
This is not only quicker. `sqlite3` gives up the interpreter lock at every step of a statement, and may wait
a switch interval (5 ms) or longer to get it back from a busy event loop: few steps, few such waits.
The cache is write-back inside a transaction and never outlives a doubt: whatever fails to reach the
database takes the cached state with it, and the next operation reads the database.

Every other operation is preceded by a flush and runs under a savepoint.

Reads have two threads and connections of their own and see only what was committed. Each is one read
transaction that ends before its rows leave the thread: a reader that stalls never holds back a checkpoint.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import orjson

from relay.cursor import ORIGIN, Cursor, Extent
from relay.dialects import detect
from relay.errors import (
    Diverged,
    Fenced,
    JournalError,
    JournalRefused,
    JournalUnavailable,
    Rewound,
    RunEnded,
    RunExists,
    SequenceGap,
    StartupError,
    StreamBusy,
    StreamSealed,
    UnknownRun,
    UnknownStream,
)
from relay.frame import CONTROL_EVENT, Event, Frame, run_ended, run_started, run_superseded
from relay.journal.base import (
    Append,
    Appended,
    Claim,
    Delivery,
    Ended,
    EndedRun,
    Follower,
    Held,
    Opened,
    Page,
    Renewal,
    RunInfo,
    RunOpening,
    RunOwner,
    RunState,
    StreamChange,
    StreamInfo,
    StreamTop,
    TakenOver,
)
from relay.lifecycle import TRANSITIONS, Act, Ending, Reason, Status, allowed, ending
from relay.limits import Retention

T = TypeVar("T")

APPLICATION_ID = 0x524C5931  # "RLY1": tells a relay journal from another program's database.
SCHEMA_VERSION = 2

READ_THREADS = 2
BUSY_TIMEOUT_S = 5.0
"""Only a foreign process (a shell, a backup) can make the writer wait; the lock file keeps relays out."""
WAL_MAX_BYTES = 64 * 1024 * 1024
GROUP_MAX_OPERATIONS = 1024
GROUP_MAX_BYTES = 8 * 1024 * 1024
"""Data bytes after which a group takes no further operation. The one that fills it is part of it."""
SWEEP_EVERY_S = 60.0
SWEEP_MAX_ROWS = 1000
"""Rows of each kind that one sweep removes, so that it never holds up appends for long."""
TOMBSTONE_KEEP_MS = 2 * 24 * 3600 * 1000
CACHE_MAX_ROWS = 16 * 1024
"""Streams and runs cached before a group begins; the group can only add as many as it has operations."""
ROWS_AT_ONCE = (256, 64, 16, 4, 1)
"""Rows of the prepared statements that write many, so that any number of rows takes few steps."""
RUNS_AFTER_MAX = 64
"""Names in `Opened.runs_after`."""
MIN_SQLITE = (3, 33, 0)
"""The first with UPDATE FROM; it also takes the variables of 256 rows."""

SCHEMA = f"""
CREATE TABLE streams (
    id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, created_ms INTEGER NOT NULL,
    earliest_seq INTEGER NOT NULL, last_seq INTEGER NOT NULL, last_ms INTEGER NOT NULL,
    last_data INTEGER NOT NULL, bytes_held INTEGER NOT NULL, runs INTEGER NOT NULL, latest_run TEXT NOT NULL,
    sealed INTEGER NOT NULL, max_frames INTEGER NOT NULL, max_bytes INTEGER NOT NULL,
    retention_s INTEGER NOT NULL);
-- Apart from streams and runs, whose rows are rewritten with every append.
CREATE TABLE stream_texts (stream_id INTEGER PRIMARY KEY, metadata TEXT NOT NULL);
CREATE TABLE run_texts (
    run_id INTEGER PRIMARY KEY, metadata TEXT NOT NULL, answer TEXT NOT NULL, opened TEXT NOT NULL);
CREATE TABLE runs (
    id INTEGER PRIMARY KEY AUTOINCREMENT, stream_id INTEGER NOT NULL, name TEXT NOT NULL,
    writer TEXT NOT NULL, token TEXT NOT NULL, status TEXT NOT NULL, reason TEXT NOT NULL,
    error TEXT NOT NULL, dialect TEXT NOT NULL, start_seq INTEGER NOT NULL, start_ms INTEGER NOT NULL,
    last_seq INTEGER NOT NULL, last_ms INTEGER NOT NULL, last_data INTEGER NOT NULL,
    frames INTEGER NOT NULL, extra INTEGER NOT NULL, text_bytes INTEGER NOT NULL, started_ms INTEGER NOT NULL,
    ended_ms INTEGER NOT NULL, ended_no INTEGER NOT NULL, owner TEXT NOT NULL, idle_ms INTEGER NOT NULL,
    max_run_ms INTEGER NOT NULL, heard_ms INTEGER NOT NULL, due_ms INTEGER NOT NULL,
    superseded_by TEXT NOT NULL, deliver INTEGER NOT NULL DEFAULT 0, tries INTEGER NOT NULL DEFAULT 0,
    next_try_ms INTEGER NOT NULL DEFAULT 0, UNIQUE (stream_id, name));
CREATE INDEX runs_in_order ON runs (stream_id);
CREATE INDEX runs_open ON runs (stream_id) WHERE status = 'open';
CREATE INDEX runs_due ON runs (due_ms) WHERE status = 'open' AND due_ms > 0;
CREATE INDEX runs_ended ON runs (ended_ms, ended_no) WHERE ended_no > 0;
CREATE INDEX runs_undelivered ON runs (stream_id, start_seq) WHERE deliver = 1;
CREATE INDEX runs_to_deliver ON runs (next_try_ms) WHERE deliver = 1 AND status <> 'open';
CREATE INDEX runs_token ON runs (token) WHERE token <> '';
CREATE TABLE frames (
    stream_id INTEGER NOT NULL, seq INTEGER NOT NULL, ms INTEGER NOT NULL, run_id INTEGER NOT NULL,
    event TEXT NOT NULL, data BLOB NOT NULL, PRIMARY KEY (stream_id, seq)) WITHOUT ROWID;
-- The last ms of former lives: what a new life's created_ms must be beyond.
CREATE TABLE tombstones (name TEXT PRIMARY KEY, last_ms INTEGER NOT NULL, until_ms INTEGER NOT NULL);
CREATE INDEX tombstones_until ON tombstones (until_ms);
-- Streams that are gone, whose frames and runs wait for the sweep.
CREATE TABLE debris (stream_id INTEGER PRIMARY KEY);
CREATE TABLE claims (
    key TEXT PRIMARY KEY, digest TEXT NOT NULL, owner TEXT NOT NULL, state TEXT NOT NULL,
    stream TEXT NOT NULL, run TEXT NOT NULL, keep_ms INTEGER NOT NULL, until_ms INTEGER NOT NULL);
CREATE INDEX claims_until ON claims (until_ms);
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {SCHEMA_VERSION};
"""

# A stream is gone once retention_s has passed since its last append, removed or not.
_LIVE = "(streams.retention_s = 0 OR streams.last_ms + streams.retention_s * 1000 >= :now)"
_STREAM_COLUMNS = (
    "id, name, created_ms, earliest_seq, last_seq, last_ms, last_data, bytes_held, runs, latest_run, sealed, "
    "max_frames, max_bytes, retention_s"
)
_RUN_COLUMNS = (
    "runs.id, runs.name, writer, token, status, reason, error, dialect, start_seq, start_ms, runs.last_seq, "
    "runs.last_ms, runs.last_data, frames, extra, text_bytes, started_ms, ended_ms, ended_no, owner, "
    "idle_ms, max_run_ms, heard_ms, due_ms, superseded_by"
)
_INSERT_RUN = (
    "INSERT INTO runs (stream_id, name, writer, token, status, reason, error, dialect, start_seq, start_ms, "
    "last_seq, last_ms, last_data, frames, extra, text_bytes, started_ms, ended_ms, ended_no, owner, "
    f"idle_ms, max_run_ms, heard_ms, due_ms, superseded_by, deliver) VALUES ({', '.join('?' * 26)})"
)
_FRAME_COLUMNS = 6
_INSERT_FRAMES = "INSERT INTO frames VALUES {rows}"
# The columns that change, in the order of `_Stream.changes`, `_Run.progress` and `_Run.turns`.
_CHANGING_STREAM = ("earliest_seq", "last_seq", "last_ms", "last_data", "bytes_held", "runs", "latest_run")
_PROGRESS_OF_RUN = ("last_seq", "last_ms", "last_data", "frames", "text_bytes")
# Apart from the progress, so that an append touches no index.
_TURNS_OF_RUN = (
    *("status", "reason", "error", "dialect", "writer", "owner", "idle_ms", "heard_ms", "due_ms"),
    *("superseded_by", "extra", "ended_ms", "ended_no"),
)


def _update(table: str, columns: Sequence[str]) -> str:
    sets = ", ".join(f"{column} = new.column{number}" for number, column in enumerate(columns, 2))
    return f"UPDATE {table} SET {sets} FROM (VALUES {{rows}}) AS new WHERE {table}.id = new.column1"


_UPDATE_STREAMS = _update("streams", _CHANGING_STREAM)
_UPDATE_PROGRESS = _update("runs", _PROGRESS_OF_RUN)
_UPDATE_TURNS = _update("runs", _TURNS_OF_RUN)


@cache
def _for_rows(sql: str, rows: int, columns: int) -> str:
    row = "(" + ", ".join("?" * columns) + ")"
    return sql.format(rows=", ".join([row] * rows))


_REFUSED = {
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_PERM,
    sqlite3.SQLITE_AUTH,
    sqlite3.SQLITE_TOOBIG,
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_NOTADB,
}
_UNAVAILABLE = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_INTERRUPT, sqlite3.SQLITE_PROTOCOL}


@dataclass(slots=True)
class _Run:
    """A row of `runs`, in the order of `_RUN_COLUMNS`."""

    id: int
    name: str
    writer: str
    token: str
    status: Status
    reason: str
    error: str
    dialect: str
    start_seq: int
    start_ms: int
    last_seq: int
    last_ms: int
    last_data: int
    frames: int
    extra: int
    """Its frames that are not in `frames`: control frames, and what relay itself says in an ending."""
    text_bytes: int
    started_ms: int
    ended_ms: int = 0
    ended_no: int = 0
    """The number of its ending among all endings of the journal; 0: open."""
    owner: str = ""
    idle_ms: int = 0
    max_run_ms: int = 0
    heard_ms: int = 0
    due_ms: int = 0
    """When to look whether it is due, at the latest; 0: never. Appends do not move it."""
    superseded_by: str = ""

    @classmethod
    def from_row(cls, row: Sequence[Any]) -> _Run:
        run = cls(*row)
        run.status = Status(run.status)
        return run

    @property
    def last(self) -> Cursor:
        return Cursor(self.last_seq, self.last_ms)

    def idle_from(self, reachable_since_ms: int = 0) -> int:
        return max(self.last_ms, self.heard_ms, reachable_since_ms)

    def when_due(self, reachable_since_ms: int = 0) -> int:
        """When the idle timeout or the greatest age is reached, if nothing is heard of it; 0: never."""
        if self.owner:
            return 0
        idle = [self.idle_from(reachable_since_ms) + self.idle_ms] if self.idle_ms else []
        old = [self.started_ms + self.max_run_ms] if self.max_run_ms else []
        return min(idle + old, default=0)

    def row(self) -> tuple[Any, ...]:
        """What `_INSERT_RUN` takes after the stream's id, but for `deliver`."""
        identity = (
            self.name,
            self.writer,
            self.token,
            self.status.value,
            self.reason,
            self.error,
            self.dialect,
        )
        place = (self.start_seq, self.start_ms, self.last_seq, self.last_ms, self.last_data)
        counts = (self.frames, self.extra, self.text_bytes, self.started_ms, self.ended_ms, self.ended_no)
        life = (self.owner, self.idle_ms, self.max_run_ms, self.heard_ms, self.due_ms, self.superseded_by)
        return (*identity, *place, *counts, *life)

    def progress(self) -> tuple[Any, ...]:
        return (self.id, self.last_seq, self.last_ms, self.last_data, self.frames, self.text_bytes)

    def turns(self) -> tuple[Any, ...]:
        state = (self.status.value, self.reason, self.error, self.dialect, self.writer)
        life = (self.owner, self.idle_ms, self.heard_ms, self.due_ms, self.superseded_by, self.extra)
        return (self.id, *state, *life, self.ended_ms, self.ended_no)

    def state(self) -> RunState:
        return RunState(self.status, self.reason, self.writer, self.last)

    def info(self, metadata: str, answer: str) -> RunInfo:
        return RunInfo(
            run=self.name,
            status=self.status,
            start=Cursor(self.start_seq, self.start_ms),
            last=self.last,
            last_data=self.last_data,
            frames=self.frames,
            text_bytes=self.text_bytes,
            started_ms=self.started_ms,
            ended_ms=self.ended_ms,
            reason=self.reason,
            error=self.error,
            dialect=self.dialect,
            metadata=metadata,
            answer=answer,
            token=self.token,
            owner=self.owner,
            idle_timeout_s=self.idle_ms / 1000,
            heard_ms=self.idle_from(),
            superseded_by=self.superseded_by,
        )


@dataclass(slots=True)
class _Stream:
    """A row of `streams`, in the order of `_STREAM_COLUMNS`, and those of its runs that are cached."""

    id: int
    name: str
    created_ms: int
    earliest_seq: int
    last_seq: int
    last_ms: int
    last_data: int
    bytes_held: int
    runs: int
    latest_run: str
    sealed: int
    max_frames: int
    max_bytes: int
    retention_s: int
    keep_from: int = 0
    """The first frame of the earliest run whose end is still to be delivered; 0: there is none. Known to the
    writing thread only."""
    cached_runs: dict[str, _Run] = field(default_factory=dict)

    @property
    def top(self) -> Cursor:
        return Cursor(self.last_seq, self.last_ms) if self.last_seq else ORIGIN

    @property
    def extent(self) -> Extent:
        return Extent(self.created_ms, self.earliest_seq, self.top)

    def expired(self, now_ms: int) -> bool:
        return self.retention_s > 0 and self.last_ms + self.retention_s * 1000 < now_ms

    def changes(self) -> tuple[Any, ...]:
        last = (self.last_seq, self.last_ms, self.last_data)
        return (self.id, self.earliest_seq, *last, self.bytes_held, self.runs, self.latest_run)

    def info(self, open_runs: Sequence[str], metadata: str) -> StreamInfo:
        return StreamInfo(
            stream=self.name,
            extent=self.extent,
            sealed=bool(self.sealed),
            open_runs=open_runs,
            latest_run=self.latest_run,
            last_data=self.last_data,
            runs=self.runs,
            bytes_held=self.bytes_held,
            retention=Retention(self.max_frames, self.max_bytes, self.retention_s),
            metadata=metadata,
            active_ms=self.last_ms,
        )


class _Journaled(NamedTuple):
    """Events of one run that were journaled after `previous`."""

    stream: str
    previous: Cursor
    ms: int
    run: str
    events: Sequence[Event]

    def frames(self) -> list[Frame]:
        return [
            Frame(seq, self.ms, self.run, event, data)
            for seq, (event, data) in enumerate(self.events, self.previous.seq + 1)
        ]


class _Sealed(NamedTuple):
    stream: str


class _Deleted(NamedTuple):
    stream: str


class _RunOver(NamedTuple):
    """A run was ended or taken over by somebody else than its owner."""

    stream: str
    run: str
    owner: str


_Notice = _Journaled | _Sealed | _Deleted | _RunOver
"""What is to be told once it is committed."""


@dataclass(slots=True)
class _Operation:
    """`act` is run in the writing thread. One that is `pure` writes no SQL before the flush and raises before
    it changes anything, so it needs no savepoint. `stream` is the one it touches; empty: any."""

    act: Callable[[], Any]
    stream: str = ""
    pure: bool = False
    size: int = 0
    future: asyncio.Future[Any] | None = None
    result: Any = None
    error: BaseException | None = None


class SqliteJournal:
    """See `relay.journal.base.Journal`. `synchronous` is SQLite's: `normal` survives the death of the
    process, `full` that of the machine too. `clock_ms` is called in any thread."""

    def __init__(
        self, path: Path, *, synchronous: str = "normal", clock_ms: Callable[[], int] | None = None
    ) -> None:
        self.path = path
        self._synchronous = synchronous
        self._clock_ms = clock_ms or _wall_clock_ms
        self._watched: set[str] = set()
        self._lock: int | None = None
        self._writer: _Writer | None = None
        self._readers: _Readers | None = None

    async def start(self, follower: Follower, owner: RunOwner | None = None) -> None:
        # Opening blocks the loop on purpose: nothing is served before it returns.
        self._loop = asyncio.get_running_loop()
        self._follower = follower
        self._watched.clear()
        lock = _lock(self.path)
        try:
            db = _open_for_writing(self.path, self._synchronous)
        except BaseException:
            os.close(lock)
            raise
        self._lock = lock
        self._readers = _Readers(self.path)
        self._writer = _Writer(_Store(db, self._clock_ms), self._loop, self._watched, follower, owner)
        try:
            await self._write("", self._writer.store.end_orphans, owner.name if owner else "")
        except BaseException as error:
            await self.close()
            if isinstance(error, JournalError):
                raise StartupError(
                    f"The journal {self.path} cannot be written: {error.detail} Make room, or mend the disk."
                ) from error
            raise

    async def close(self) -> None:
        writer, readers, lock = self._writer, self._readers, self._lock
        if writer is None or readers is None or lock is None:
            return
        self._writer = self._readers = self._lock = None

        def shut() -> None:
            # Readers first: the last connection to close is the one that checkpoints and removes the log.
            readers.close()
            writer.close()
            os.close(lock)

        # A cancelled close goes on in its thread: the lock is not kept by accident.
        await asyncio.to_thread(shut)

    # Streams

    async def put_stream(self, stream: str, retention: Retention, change: StreamChange) -> bool:
        return await self._write(stream, self._store.put_stream, stream, retention, change)

    async def seal(self, stream: str) -> None:
        await self._write(stream, self._store.seal, stream)

    async def trim(self, stream: str, before_seq: int) -> None:
        await self._write(stream, self._store.trim, stream, before_seq)

    async def delete(self, stream: str) -> None:
        await self._write(stream, self._store.delete, stream)

    # Runs

    async def open_run(self, opening: RunOpening) -> Opened:
        metadata = orjson.loads(opening.metadata) if opening.metadata else None
        return await self._write(opening.stream, self._store.open_run, opening, metadata)

    async def append(self, batch: Append) -> Appended:
        writer = self._writing()
        size = sum(len(event.data) for event in batch.events)
        return await writer.submit(batch.stream, partial(writer.store.append, batch), pure=True, size=size)

    async def restore(self, opening: RunOpening, held: Held) -> None:
        await self._write(opening.stream, self._store.restore, opening, held)

    async def take_over(self, stream: str, run: str, writer: str, idle_timeout_s: float) -> TakenOver:
        return await self._write(stream, self._store.take_over, stream, run, writer, _ms(idle_timeout_s))

    async def hear_of(self, stream: str, run: str, writer: str) -> RunState:
        hear_of = partial(self._store.hear_of, stream, run, writer)
        return await self._writing().submit(stream, hear_of, pure=True)

    async def end_run(
        self, stream: str, run: str, ending: Ending, error_events: Mapping[str, Event], *, owner: str = ""
    ) -> Ended:
        return await self._write(stream, self._store.end_run, stream, run, ending, error_events, owner)

    async def run(self, stream: str, run: str) -> RunInfo:
        return await self._read(_read_run, stream, run)

    async def runs(self, stream: str, after: str, limit: int) -> Sequence[RunInfo]:
        return await self._read(_list_runs, stream, after, limit)

    async def states(self, runs: Sequence[tuple[str, str]]) -> Sequence[RunState | None]:
        return await self._read(_read_states, list(runs))

    # Liveness. The file belongs to one process: another's runs are ended by `start`, and there is no lease.

    async def renew(self, owner: str, lease_s: float) -> Renewal:
        return Renewal(True, self._clock_ms())

    async def resign(self, owner: str) -> None:
        pass

    async def lapsed_owners(self) -> Sequence[str]:
        return ()

    async def owned(self, owner: str, limit: int) -> Sequence[tuple[str, str]]:
        return ()

    async def due_runs(self, limit: int) -> Sequence[tuple[str, str]]:
        return await self._read(_list_due, limit)

    async def end_due(
        self,
        stream: str,
        run: str,
        reachable_since_ms: int,
        error_events: Mapping[Reason, Mapping[str, Event]],
    ) -> Ended | None:
        return await self._write(stream, self._store.end_due, stream, run, reachable_since_ms, error_events)

    async def file_ending(self, stream: str, run: str) -> None:
        """Nothing is left to do: a run, its place in the indexes and its delivery are one row."""

    async def reindex(self, after: str, limit: int) -> str:
        return ""

    async def ended_runs(self, ended_after_ms: int, after: str, limit: int) -> Sequence[EndedRun]:
        return await self._read(_list_ended, ended_after_ms, after, limit)

    # Delivery of endings

    async def claim_deliveries(self, limit: int, lease_s: float) -> Sequence[Delivery]:
        return await self._write("", self._store.claim_deliveries, limit, _ms(lease_s))

    async def settle_delivery(self, stream: str, run: str) -> None:
        await self._write(stream, self._store.settle_delivery, stream, run)

    async def postpone_delivery(self, stream: str, run: str, delay_s: float) -> None:
        await self._write(stream, self._store.postpone_delivery, stream, run, _ms(delay_s))

    # Reading

    async def read(self, stream: str, after: Cursor, max_frames: int, max_bytes: int) -> Page:
        return await self._read(_read_page, stream, after, max_frames, max_bytes)

    async def describe(self, stream: str) -> StreamInfo:
        return await self._read(_describe, stream)

    async def streams(self, after: str, limit: int) -> Sequence[StreamInfo]:
        return await self._read(_list_streams, after, limit)

    async def tops(self, streams: Sequence[str]) -> Mapping[str, StreamTop]:
        return await self._read(_read_tops, list(streams))

    async def resolve_token(self, token: str) -> tuple[str, str] | None:
        return await self._read(_resolve_token, token)

    # Following

    def watch(self, stream: str) -> None:
        self._watched.add(stream)
        self._loop.call_soon(self._doubt, stream)

    def unwatch(self, stream: str) -> None:
        self._watched.discard(stream)

    async def watchers(self, stream: str) -> int:
        return int(stream in self._watched)  # A file has one process.

    # Idempotency keys

    async def claim(self, key: str, body_digest: str, owner: str, lease_s: float, keep_s: float) -> Claim:
        return await self._write("", self._store.claim, key, body_digest, owner, _ms(lease_s), _ms(keep_s))

    async def settle(self, key: str, owner: str, stream: str, run: str) -> None:
        await self._write("", self._store.settle, key, owner, stream, run)

    async def release(self, key: str, owner: str) -> None:
        await self._write("", self._store.release, key, owner)

    async def sweep(self) -> None:
        """Remove some of what has expired now, as is done every `SWEEP_EVERY_S` without being asked."""
        await self._write("", self._store.sweep)

    @property
    def commits(self) -> int:
        """How many transactions were committed since `start`."""
        return self._writing().commits

    def _doubt(self, stream: str) -> None:
        if stream in self._watched:
            self._follower.on_doubt(stream)

    def _writing(self) -> _Writer:
        if self._writer is None:
            raise JournalUnavailable("The journal is closed.")
        return self._writer

    @property
    def _store(self) -> _Store:
        return self._writing().store

    async def _write(self, stream: str, operation: Callable[..., T], *arguments: Any) -> T:
        return await self._writing().submit(stream, partial(operation, *arguments))

    async def _read(self, query: Callable[..., T], *arguments: Any) -> T:
        if self._readers is None:
            raise JournalUnavailable("The journal is closed.")
        return await self._readers.run(query, self._clock_ms(), *arguments)


class _Writer:
    """The writing thread. Its queue needs no bound: it holds one operation of each waiting caller."""

    def __init__(
        self,
        store: _Store,
        loop: asyncio.AbstractEventLoop,
        watched: set[str],
        follower: Follower,
        owner: RunOwner | None,
    ) -> None:
        self.store = store
        self.commits = 0
        self._loop = loop
        self._watched = watched
        self._follower = follower
        self._owner = owner
        self._queue: queue.SimpleQueue[_Operation | None] = queue.SimpleQueue()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="relay-sqlite-writer", daemon=True)
        self._thread.start()

    async def submit(self, stream: str, act: Callable[[], T], *, pure: bool = False, size: int = 0) -> T:
        future: asyncio.Future[T] = self._loop.create_future()
        self._queue.put(_Operation(act, stream, pure, size, future))
        return await future

    def close(self) -> None:
        """Finish what is queued and end the thread. Blocks."""
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        next_sweep = time.monotonic() + SWEEP_EVERY_S
        try:
            while not self._closing:
                group = self._take(0.0 if self.store.unswept else max(0.0, next_sweep - time.monotonic()))
                if self.store.unswept or time.monotonic() >= next_sweep:
                    next_sweep = time.monotonic() + SWEEP_EVERY_S
                    self.store.unswept = False
                    group.append(_Operation(self.store.sweep))
                if group:
                    self._settle(group)
        finally:
            self.store.close()

    def _take(self, timeout_s: float) -> list[_Operation]:
        """Everything queued, up to the bounds of a group; waits for the first."""
        group: list[_Operation] = []
        size = 0
        try:
            operation = self._queue.get(block=timeout_s > 0, timeout=timeout_s or None)
            while True:
                if operation is None:
                    self._closing = True
                    return group
                group.append(operation)
                size += operation.size
                if len(group) >= GROUP_MAX_OPERATIONS or size >= GROUP_MAX_BYTES:
                    return group
                operation = self._queue.get_nowait()
        except queue.Empty:
            return group

    def _settle(self, group: list[_Operation]) -> None:
        """Run a group, then answer its callers, whatever happened."""
        news = [tell for notice in self._commit(group) if (tell := self._news(notice)) is not None]
        try:
            self._loop.call_soon_threadsafe(self._answer, group, news)
        except RuntimeError:
            pass  # The loop was closed under us; nobody is waiting any more.

    def _commit(self, group: list[_Operation]) -> list[_Notice]:
        """Run a group in one transaction. Returns what was then said; failures are left in the operations."""
        store = self.store
        try:
            store.begin()
            for operation in group:
                store.perform(operation)
            store.flush()
            store.commit()
        except BaseException as error:
            store.rollback()
            if _journal_error(error) is None and len(group) > 1:
                # One of them cannot be written for a reason of its own, and must not take the others along.
                return [notice for operation in group for notice in self._commit([operation])]
            for operation in group:
                operation.result, operation.error = None, _journal_error(error) or error
            return []
        self.commits += 1
        return store.take_notices()

    def _news(self, notice: _Notice) -> Callable[[], None] | None:
        """How to tell of it on the loop's thread; None when nobody here is to hear of it."""
        stream, follower, owner = notice.stream, self._follower, self._owner
        if isinstance(notice, _RunOver):
            if owner is None or notice.owner != owner.name:
                return None
            return partial(owner.on_run_over, stream, notice.run)
        # Looked up after the commit: whoever watches later than this reads the journal later than this.
        if stream not in self._watched:
            return None
        if isinstance(notice, _Journaled):
            return self._if_watched(
                stream, partial(follower.on_frames, stream, notice.previous, notice.frames())
            )
        tell = follower.on_sealed if isinstance(notice, _Sealed) else follower.on_deleted
        return self._if_watched(stream, partial(tell, stream))

    def _if_watched(self, stream: str, tell: Callable[[], None]) -> Callable[[], None]:
        return lambda: tell() if stream in self._watched else None

    def _answer(self, group: list[_Operation], news: list[Callable[[], None]]) -> None:
        for operation in group:
            future = operation.future
            if future is None or future.done():  # Cancelled: the operation has happened all the same.
                continue
            if operation.error is None:
                future.set_result(operation.result)
            else:
                future.set_exception(operation.error)
        for tell in news:
            tell()


class _Store:
    """The operations that write, on the one connection that writes. Belongs to the writing thread."""

    def __init__(self, db: sqlite3.Connection, clock_ms: Callable[[], int]) -> None:
        self._db = db
        self._clock_ms = clock_ms
        self._streams: dict[str, _Stream] = {}
        self._cached = 0
        self._rows: list[Any] = []
        self._changed_streams: dict[int, _Stream] = {}
        self._moved_runs: dict[int, _Run] = {}
        self._turned_runs: dict[int, _Run] = {}
        self._answers: dict[int, str] = {}
        (self._endings,) = db.execute("SELECT coalesce(max(ended_no), 0) FROM runs").fetchone()
        self._notices: list[_Notice] = []
        self.unswept = True
        """Whether a sweep is due at once: after a start, a deletion, and a sweep that left something."""

    # Transactions.

    def begin(self) -> None:
        if self._cached > CACHE_MAX_ROWS:
            self._forget("")
        self._db.execute("BEGIN IMMEDIATE")

    def perform(self, operation: _Operation) -> None:
        """Run one operation. What is wrong with it alone is kept in it; what dooms the group is raised."""
        if operation.pure:
            try:
                operation.result, operation.error = operation.act(), None
            except Exception as error:
                if not self._db.in_transaction:
                    raise
                operation.result, operation.error = None, _journal_error(error) or error
            return
        self.flush()
        said, unswept = len(self._notices), self.unswept
        self._db.execute("SAVEPOINT operation")
        try:
            operation.result, operation.error = operation.act(), None
            self.flush()
        except Exception as error:
            if not self._db.in_transaction:
                raise  # SQLite rolled everything back by itself, as it does when the disk is full.
            self._db.execute("ROLLBACK TO operation")
            self._forget(operation.stream)
            del self._notices[said:]
            self.unswept = unswept
            operation.result, operation.error = None, _journal_error(error) or error
        self._db.execute("RELEASE operation")

    def flush(self) -> None:
        """Write the changes that appends have left in the cached state, and apply retention."""
        self._write(_INSERT_FRAMES, _FRAME_COLUMNS, self._rows)
        self._rows.clear()
        for stream in self._changed_streams.values():
            self._retain(stream)
        streams = [value for stream in self._changed_streams.values() for value in stream.changes()]
        self._write(_UPDATE_STREAMS, 1 + len(_CHANGING_STREAM), streams)
        self._changed_streams.clear()
        moved = [value for run in self._moved_runs.values() for value in run.progress()]
        self._write(_UPDATE_PROGRESS, 1 + len(_PROGRESS_OF_RUN), moved)
        self._moved_runs.clear()
        turned = [value for run in self._turned_runs.values() for value in run.turns()]
        self._write(_UPDATE_TURNS, 1 + len(_TURNS_OF_RUN), turned)
        self._turned_runs.clear()
        for answer in self._answers.items():
            self._db.execute(
                "INSERT INTO run_texts VALUES (?, '', ?, '') "
                "ON CONFLICT (run_id) DO UPDATE SET answer = excluded.answer",
                answer,
            )
        self._answers.clear()

    def _write(self, sql: str, columns: int, values: list[Any]) -> None:
        """Run a statement that takes rows, given one after the other in `values`, in few steps."""
        at, left = 0, len(values) // columns
        for rows in ROWS_AT_ONCE:
            while left >= rows:
                end = at + rows * columns
                self._db.execute(_for_rows(sql, rows, columns), values[at:end])
                at, left = end, left - rows

    def commit(self) -> None:
        self._db.execute("COMMIT")

    def rollback(self) -> None:
        """Undo the transaction, and what was cached on the strength of it."""
        self._forget("")
        self._notices.clear()
        if self._db.in_transaction:
            try:
                self._db.execute("ROLLBACK")
            except sqlite3.Error:
                pass  # The failure that brought us here is the one worth reporting.

    def take_notices(self) -> list[_Notice]:
        notices, self._notices = self._notices, []
        return notices

    def close(self) -> None:
        self._db.close()

    # Operations on streams.

    def put_stream(self, name: str, retention: Retention, change: StreamChange) -> bool:
        now = self._clock_ms()
        stream = self._clear_of_expired(name, now)
        created = stream is None
        if stream is None:
            stream = self._create(name, retention, now)
        bounds = (change.max_frames, change.max_bytes, change.retention_s)
        held = (stream.max_frames, stream.max_bytes, stream.retention_s)
        stream.max_frames, stream.max_bytes, stream.retention_s = (
            old if new is None else new for old, new in zip(held, bounds, strict=True)
        )
        self._db.execute(
            "UPDATE streams SET max_frames = ?, max_bytes = ?, retention_s = ? WHERE id = ?",
            (stream.max_frames, stream.max_bytes, stream.retention_s, stream.id),
        )
        if change.metadata is not None:
            self._db.execute(
                "INSERT OR REPLACE INTO stream_texts VALUES (?, ?)", (stream.id, change.metadata)
            )
        self._changed_streams[stream.id] = stream
        return created

    def seal(self, name: str) -> None:
        self._seal(self._known_stream(name, self._clock_ms()))

    def trim(self, name: str, before_seq: int) -> None:
        stream = self._known_stream(name, self._clock_ms())
        self._drop(stream, min(before_seq, stream.last_seq + 1))

    def delete(self, name: str) -> None:
        now = self._clock_ms()
        stream = self._clear_of_expired(name, now)
        if stream is None:
            return
        for run in self._open_runs(stream):
            self._end(stream, run, ending(Reason.STREAM_DELETED), {}, now)
        self._bury(stream, now)

    # Operations on runs.

    def open_run(self, opening: RunOpening, metadata: Any) -> Opened:
        now = self._clock_ms()
        stream = self._clear_of_expired(opening.stream, now)
        if stream is not None:
            known = self._find_run(stream, opening.run)
            if known is not None:
                if known.writer != opening.writer:
                    raise RunExists(f"The stream has a run '{opening.run}' already.")
                return self._opened(known)
            if stream.sealed:
                raise StreamSealed("The stream takes no further run.")
        superseded = self._to_supersede(stream, opening)
        if stream is None:
            stream = self._create(opening.stream, opening.retention, now)
        frames_after, runs_after = self._standing_after(stream, superseded)
        ms = max(now, stream.last_ms)
        ended_before = [run for run in superseded if run.status is not Status.OPEN]
        for run in superseded:
            run.superseded_by = opening.run
            self._turned_runs[run.id] = run
            if run.status is Status.OPEN:
                told = Event(CONTROL_EVENT, run_superseded(run.name, opening.run))
                self._end(stream, run, ending(Reason.SUPERSEDED), opening.error_events, now, told)
        start = stream.top
        data = run_started(opening.run, opening.dialect or None, metadata)
        first = [Event(CONTROL_EVENT, data)]
        first += (Event(CONTROL_EVENT, run_superseded(run.name, opening.run)) for run in ended_before)
        names = tuple(run.name for run in superseded)
        said = orjson.dumps([len(first), names, frames_after, runs_after]).decode() if superseded else ""
        run = self._insert_run(stream, opening, start, ms, said)
        self._journal(stream, run, ms, first)
        run.extra = len(first)
        if opening.seal:
            self._seal(stream)
        return Opened(start, Cursor(start.seq + 1, ms), stream.top, names, frames_after, runs_after)

    def append(self, batch: Append) -> Appended:
        now = self._clock_ms()
        stream = self._find_stream(batch.stream)
        if stream is not None and stream.expired(now):
            stream = None
        run = None if stream is None else self._find_run(stream, batch.run)
        last = ORIGIN if run is None else run.last
        if last < batch.acknowledged:
            raise Rewound("The journal has less of the run than it had accepted.", last_seq=last.seq)
        if stream is None:
            raise _no_stream(batch.stream)
        if run is None:
            raise _no_run(batch.run)
        if run.writer != batch.writer:
            raise Fenced("The writer token is not the run's, or no longer.")
        expected = run.frames + 1
        if batch.producer_seq > expected:
            raise SequenceGap(f"The run expects frame {expected} next.", expected=expected)
        duplicates = min(len(batch.events), expected - batch.producer_seq) if batch.producer_seq else 0
        fresh = list(batch.events[duplicates:])
        ending = batch.ending
        if not allowed(run.status, Act.APPEND):
            if fresh or (ending is not None and (ending.status, ending.reason) != (run.status, run.reason)):
                raise self._has_ended(run)
            return Appended(last, 0, duplicates, expected)

        appended = len(fresh)
        frames = run.frames + appended
        text_bytes = run.text_bytes + (batch.text_bytes * appended // len(batch.events) if appended else 0)
        if ending is not None:
            _check_transition(run.status, ending)
            if batch.error_event is not None:
                fresh.append(batch.error_event)
            fresh.append(Event(CONTROL_EVENT, run_ended(run.name, ending, frames, text_bytes)))

        # Nothing from here on may raise: the cached state would be left half changed.
        if batch.dialect and batch.dialect != run.dialect:
            run.dialect = batch.dialect
            self._turned_runs[run.id] = run
        if batch.answer:
            self._answers[run.id] = batch.answer
        if not fresh:
            self._hear_of(run, now)
            return Appended(last, 0, duplicates, expected)
        self._journal(stream, run, max(now, stream.last_ms), fresh)
        run.frames, run.text_bytes = frames, text_bytes
        if ending is not None:
            run.extra += len(fresh) - appended
            self._turn(run, ending)
        return Appended(run.last, appended, duplicates, frames + 1)

    def restore(self, opening: RunOpening, held: Held) -> None:
        now = self._clock_ms()
        stream = self._clear_of_expired(opening.stream, now)
        last = ORIGIN if stream is None else stream.top
        run = None if stream is None else self._find_run(stream, opening.run)
        end = held.first.seq + len(held.events) - 1
        there = max(0, min(end, last.seq) - held.first.seq + 1)
        if stream is not None and there:
            (others,) = self._db.execute(
                "SELECT count(*) FROM frames WHERE stream_id = ? AND seq BETWEEN ? AND ? "
                "AND (ms <> ? OR run_id <> ?)",
                (stream.id, held.first.seq, end, held.first.ms, run.id if run is not None else 0),
            ).fetchone()
            # Frames that were trimmed away cannot be told apart; those of an unknown run never were here.
            if others or run is None:
                raise Diverged("The journal holds other frames in their place.", last_seq=last.seq)
        if there == len(held.events):
            return
        if held.first.seq > last.seq + 1:
            raise Rewound("Frames before these are missing.", last_seq=last.seq)
        if run is None and held.producer_seq:
            raise Diverged(
                "The journal lost the run's opening, and has other frames since.", last_seq=last.seq
            )
        if held.first.ms < (self._former_ms(opening.stream) + 1 if stream is None else stream.last_ms):
            raise Diverged("The journal was written on at a later time.", last_seq=last.seq)
        if run is not None and run.writer != opening.writer:
            raise Fenced("The writer token is not the run's, or no longer.")
        if run is not None and run.status is not Status.OPEN:
            raise self._has_ended(run)

        if stream is None:
            stream = self._create(opening.stream, opening.retention, held.first.ms)
        if run is None:
            run = self._insert_run(stream, opening, last, held.first.ms, "")
            if opening.seal:
                self._seal(stream)
        missing = held.events[there:]
        self._journal(stream, run, held.first.ms, missing)
        if held.producer_seq:
            run.frames += len(missing)
            run.text_bytes += held.text_bytes * len(missing) // len(held.events)
        else:
            run.extra += len(missing)
        self._hear_of(run, now)

    def take_over(self, stream_name: str, name: str, writer: str, idle_ms: int) -> TakenOver:
        now = self._clock_ms()
        stream, run = self._known_run(stream_name, name, now)
        if not allowed(run.status, Act.TAKE_OVER):
            raise self._has_ended(run)
        run.writer = writer
        if run.owner:
            self._notices.append(_RunOver(stream.name, run.name, run.owner))
            run.owner, run.idle_ms = "", idle_ms
        self._hear_of(run, now)
        run.due_ms = run.when_due()
        return TakenOver(run.frames + 1, run.last)

    def hear_of(self, stream_name: str, name: str, writer: str) -> RunState:
        now = self._clock_ms()
        _, run = self._known_run(stream_name, name, now)
        if run.writer != writer:
            raise Fenced("The writer token is not the run's, or no longer.")
        if run.status is Status.OPEN:
            self._hear_of(run, now)
        return run.state()

    def end_run(
        self, stream_name: str, name: str, ending: Ending, error_events: Mapping[str, Event], owner: str
    ) -> Ended:
        now = self._clock_ms()
        stream, run = self._known_run(stream_name, name, now)
        by_this = run.status is Status.OPEN and owner in ("", run.owner)
        if by_this:
            self._end(stream, run, ending, error_events, now)
        return Ended(by_this, run.status, run.reason, run.owner, run.text_bytes)

    def end_due(
        self,
        stream_name: str,
        name: str,
        reachable_since_ms: int,
        error_events: Mapping[Reason, Mapping[str, Event]],
    ) -> Ended | None:
        now = self._clock_ms()
        try:
            stream, run = self._known_run(stream_name, name, now)
        except (UnknownStream, UnknownRun):
            return None
        if run.status is not Status.OPEN:
            return None
        due_ms = run.when_due(reachable_since_ms)
        if due_ms == 0 or due_ms > now:
            run.due_ms = due_ms
            self._turned_runs[run.id] = run
            return None
        silent = run.idle_ms > 0 and run.idle_from(reachable_since_ms) + run.idle_ms <= now
        reason = Reason.IDLE_TIMEOUT if silent else Reason.MAX_RUN
        self._end(stream, run, ending(reason), error_events.get(reason, {}), now)
        return Ended(True, run.status, run.reason, run.owner, run.text_bytes)

    def end_orphans(self, owner: str) -> None:
        """End the open runs that belong to a process other than this owner, which must be a former one."""
        now = self._clock_ms()
        orphans = self._db.execute(
            "SELECT streams.name, runs.name FROM runs JOIN streams ON streams.id = stream_id "
            f"WHERE status = 'open' AND owner NOT IN ('', :owner) AND {_LIVE} ORDER BY runs.id",
            {"owner": owner, "now": now},
        ).fetchall()
        how = ending(Reason.OWNER_LOST)
        said = detect.error_events(how)
        for stream_name, name in orphans:
            stream, run = self._known_run(stream_name, name, now)
            self._end(stream, run, how, said, now)

    # Operations on deliveries, whose columns are not cached.

    def claim_deliveries(self, limit: int, lease_ms: int) -> list[Delivery]:
        now = self._clock_ms()
        due = self._db.execute(
            "SELECT runs.id, streams.name, runs.name, tries FROM runs JOIN streams ON streams.id = stream_id "
            f"WHERE deliver = 1 AND status <> 'open' AND next_try_ms <= :now AND {_LIVE} "
            "ORDER BY next_try_ms LIMIT :limit",
            {"now": now, "limit": max(0, limit)},
        ).fetchall()
        until = [(now + lease_ms, run_id) for run_id, *_ in due]
        self._db.executemany("UPDATE runs SET next_try_ms = ? WHERE id = ?", until)
        return [Delivery(*each) for _, *each in due]

    def settle_delivery(self, stream_name: str, name: str) -> None:
        stream = self._find_stream(stream_name)
        run = None if stream is None else self._find_run(stream, name)
        if stream is None or run is None:
            return
        self._db.execute("UPDATE runs SET deliver = 0 WHERE id = ?", (run.id,))
        stream.keep_from = self._undelivered_from(stream)
        self._changed_streams[stream.id] = stream

    def postpone_delivery(self, stream_name: str, name: str, delay_ms: int) -> None:
        self._db.execute(
            "UPDATE runs SET tries = tries + 1, next_try_ms = ? WHERE name = ? AND deliver = 1 "
            "AND stream_id = (SELECT id FROM streams WHERE name = ?)",
            (self._clock_ms() + delay_ms, name, stream_name),
        )

    # Operations on claims, and housekeeping.

    def claim(self, key: str, digest: str, owner: str, lease_ms: int, keep_ms: int) -> Claim:
        now = self._clock_ms()
        row = self._db.execute(
            "SELECT digest, owner, state, stream, run FROM claims WHERE key = ? AND until_ms > ?", (key, now)
        ).fetchone()
        if row is not None:
            held_digest, held_owner, state, stream, run = row
            if held_digest != digest:
                return Claim("mismatch")
            if state == "settled":
                return Claim("settled", stream, run)
            if held_owner != owner:
                return Claim("pending")
        self._db.execute(
            "INSERT OR REPLACE INTO claims VALUES (?, ?, ?, 'pending', '', '', ?, ?)",
            (key, digest, owner, keep_ms, now + lease_ms),
        )
        return Claim("won")

    def settle(self, key: str, owner: str, stream: str, run: str) -> None:
        self._db.execute(
            "UPDATE claims SET state = 'settled', stream = ?, run = ?, until_ms = ? + keep_ms "
            "WHERE key = ? AND owner = ? AND state = 'pending'",
            (stream, run, self._clock_ms(), key, owner),
        )

    def release(self, key: str, owner: str) -> None:
        self._db.execute("DELETE FROM claims WHERE key = ? AND owner = ? AND state = 'pending'", (key, owner))

    def sweep(self) -> None:
        """Remove some of what is gone: expired streams, remains of deleted ones, old claims, tombstones."""
        now = self._clock_ms()
        expired = self._db.execute(
            f"SELECT {_STREAM_COLUMNS} FROM streams WHERE NOT {_LIVE} LIMIT {SWEEP_MAX_ROWS}", {"now": now}
        ).fetchall()
        for row in expired:
            self._bury(_Stream(*row), now)
        removed = len(expired)
        for (stream_id,) in self._db.execute("SELECT stream_id FROM debris LIMIT 100").fetchall():
            if removed >= SWEEP_MAX_ROWS:
                break
            removed += self._clear(stream_id, SWEEP_MAX_ROWS - removed)
        for doomed in (
            # Until then a claim that lapsed can still be settled by its owner, if nobody else wanted it.
            "claims WHERE key IN (SELECT key FROM claims WHERE until_ms < :now "
            "AND (state = 'settled' OR until_ms + keep_ms < :now) LIMIT :limit)",
            "tombstones WHERE name IN (SELECT name FROM tombstones WHERE until_ms < :now LIMIT :limit)",
        ):
            bounds = {"now": now, "limit": SWEEP_MAX_ROWS}
            removed += self._db.execute(f"DELETE FROM {doomed}", bounds).rowcount
        self.unswept = removed >= SWEEP_MAX_ROWS or self._has_debris()

    # What the operations are made of.

    def _insert(self, sql: str, values: Sequence[Any]) -> int:
        row_id = self._db.execute(sql, values).lastrowid
        assert row_id is not None
        return row_id

    def _find_stream(self, name: str) -> _Stream | None:
        stream = self._streams.get(name)
        if stream is None:
            select = f"SELECT {_STREAM_COLUMNS} FROM streams WHERE name = ?"
            row = self._db.execute(select, (name,)).fetchone()
            if row is None:
                return None
            stream = self._streams[name] = _Stream(*row)
            stream.keep_from = self._undelivered_from(stream)
            self._cached += 1
        return stream

    def _clear_of_expired(self, name: str, now: int) -> _Stream | None:
        """The stream, if it has not expired; one that has is buried."""
        stream = self._find_stream(name)
        if stream is not None and stream.expired(now):
            self._bury(stream, now)
            return None
        return stream

    def _known_stream(self, name: str, now: int) -> _Stream:
        stream = self._find_stream(name)
        if stream is None or stream.expired(now):
            raise _no_stream(name)
        return stream

    def _known_run(self, stream_name: str, name: str, now: int) -> tuple[_Stream, _Run]:
        stream = self._known_stream(stream_name, now)
        run = self._find_run(stream, name)
        if run is None:
            raise _no_run(name)
        return stream, run

    def _find_run(self, stream: _Stream, name: str) -> _Run | None:
        run = stream.cached_runs.get(name)
        if run is None:
            row = self._db.execute(
                f"SELECT {_RUN_COLUMNS} FROM runs WHERE stream_id = ? AND name = ?", (stream.id, name)
            ).fetchone()
            if row is None:
                return None
            run = stream.cached_runs[name] = _Run.from_row(row)
            self._cached += 1
        return run

    def _open_runs(self, stream: _Stream) -> list[_Run]:
        """Oldest first."""
        runs = (self._find_run(stream, name) for name in _open_runs(self._db, stream))
        return [run for run in runs if run is not None]

    def _forget(self, stream: str) -> None:
        """Drop cached state that may not be what the database says; all of it for an empty name."""
        self._rows.clear()
        self._changed_streams.clear()
        self._moved_runs.clear()
        self._turned_runs.clear()
        self._answers.clear()
        if stream:
            self._streams.pop(stream, None)
        else:
            self._streams.clear()
            self._cached = 0

    def _former_ms(self, name: str) -> int:
        """The last ms of the stream's former life; -1: it had none."""
        row = self._db.execute("SELECT last_ms FROM tombstones WHERE name = ?", (name,)).fetchone()
        return -1 if row is None else int(row[0])

    def _create(self, name: str, retention: Retention, now: int) -> _Stream:
        created_ms = max(now, self._former_ms(name) + 1)
        self._db.execute(
            "INSERT INTO streams (name, created_ms, last_ms, max_frames, max_bytes, retention_s, "
            "earliest_seq, last_seq, last_data, bytes_held, runs, latest_run, sealed) "
            "VALUES (?, ?, ?, ?, ?, ?, 1, 0, 0, 0, 0, '', 0)",
            (name, created_ms, created_ms, *retention),
        )
        stream = self._find_stream(name)
        assert stream is not None
        return stream

    def _insert_run(self, stream: _Stream, opening: RunOpening, start: Cursor, ms: int, said: str) -> _Run:
        """Add a run whose first frame, at `ms`, is still to be journaled."""
        run = _Run(
            id=0,
            name=opening.run,
            writer=opening.writer,
            token=opening.token,
            status=Status.OPEN,
            reason="",
            error="",
            dialect=opening.dialect,
            start_seq=start.seq,
            start_ms=start.ms,
            last_seq=start.seq,
            last_ms=start.ms,
            last_data=0,
            frames=0,
            extra=0,
            text_bytes=0,
            started_ms=ms,
            owner=opening.owner,
            idle_ms=_ms(opening.idle_timeout_s),
            max_run_ms=_ms(opening.max_run_s),
            heard_ms=ms,
        )
        run.due_ms = run.when_due()
        run.id = self._insert(_INSERT_RUN, (stream.id, *run.row(), opening.deliver))
        if opening.metadata or opening.answer or said:
            texts = (run.id, opening.metadata, opening.answer, said)
            self._db.execute("INSERT INTO run_texts VALUES (?, ?, ?, ?)", texts)
        if opening.deliver and not stream.keep_from:
            stream.keep_from = start.seq + 1
        stream.cached_runs[run.name] = run
        self._cached += 1
        stream.runs += 1
        stream.latest_run = run.name
        self._turned_runs[run.id] = run
        return run

    def _opened(self, run: _Run) -> Opened:
        """What was answered when it was opened."""
        start, first = Cursor(run.start_seq, run.start_ms), Cursor(run.start_seq + 1, run.started_ms)
        row = self._db.execute("SELECT opened FROM run_texts WHERE run_id = ?", (run.id,)).fetchone()
        if row is None or not row[0]:
            return Opened(start, first, first)
        count, superseded, frames_after, runs_after = orjson.loads(row[0])
        last = Cursor(start.seq + count, first.ms)
        return Opened(start, first, last, tuple(superseded), frames_after, tuple(runs_after))

    def _to_supersede(self, stream: _Stream | None, opening: RunOpening) -> list[_Run]:
        """The runs that an opening supersedes, oldest first."""
        found: dict[int, _Run] = {}
        if stream is not None and opening.if_busy != "allow":
            found = {run.id: run for run in self._open_runs(stream)}
            if found and opening.if_busy == "reject":
                names = [run.name for run in found.values()]
                raise StreamBusy("The stream has an open run.", open_runs=names)
        for name in opening.supersedes:
            if name == "latest":
                name = stream.latest_run if stream is not None else ""
                if not name:
                    continue
            run = None if stream is None else self._find_run(stream, name)
            if run is None:
                raise _no_run(name)
            found[run.id] = run
        return [found[run_id] for run_id in sorted(found)]

    def _standing_after(self, stream: _Stream, superseded: Sequence[_Run]) -> tuple[int, tuple[str, ...]]:
        """How many frames of other runs stand at or after the start of the first superseded one, and the
        names of some of those runs."""
        if not superseded:
            return 0, ()
        start_seq = min(run.start_seq for run in superseded)
        own = sum(run.frames + run.extra for run in superseded)
        others = stream.last_seq - start_seq - own
        if others <= 0:
            return 0, ()
        ids = {run.id for run in superseded}
        rows = self._db.execute(
            "SELECT id, name FROM runs WHERE stream_id = ? AND last_seq > ? ORDER BY id LIMIT ?",
            (stream.id, start_seq, RUNS_AFTER_MAX + len(ids)),
        ).fetchall()
        names = (name for run_id, name in rows if run_id not in ids)
        return others, tuple(islice(names, RUNS_AFTER_MAX))

    def _end(
        self,
        stream: _Stream,
        run: _Run,
        ending: Ending,
        error_events: Mapping[str, Event],
        now: int,
        *before: Event,
    ) -> None:
        """End a run whoever its writer is. `before` is journaled first."""
        _check_transition(run.status, ending)
        events = list(before)
        error_event = error_events.get(run.dialect)
        if error_event is not None and self._was_proxied(run):
            events.append(error_event)
        events.append(Event(CONTROL_EVENT, run_ended(run.name, ending, run.frames, run.text_bytes)))
        self._journal(stream, run, max(now, stream.last_ms), events)
        run.extra += len(events)
        self._turn(run, ending)
        if run.owner:
            self._notices.append(_RunOver(stream.name, run.name, run.owner))

    def _was_proxied(self, run: _Run) -> bool:
        row = self._db.execute("SELECT answer <> '' FROM run_texts WHERE run_id = ?", (run.id,)).fetchone()
        return row is not None and bool(row[0])

    def _turn(self, run: _Run, ending: Ending) -> None:
        """Note the ending of a run whose terminal frame is its last."""
        run.status, run.reason, run.error = ending.status, ending.reason.value, ending.error
        self._endings += 1
        run.ended_ms, run.ended_no = run.last_ms, self._endings
        self._turned_runs[run.id] = run

    def _hear_of(self, run: _Run, now: int) -> None:
        run.heard_ms = max(now, run.heard_ms)
        self._turned_runs[run.id] = run

    def _has_ended(self, run: _Run) -> RunEnded:
        said = f"The run has ended: {run.status}, {run.reason}."
        return RunEnded(said, run_status=run.status.value, reason=run.reason)

    def _seal(self, stream: _Stream) -> None:
        if stream.sealed:
            return
        stream.sealed = 1
        self._db.execute("UPDATE streams SET sealed = 1 WHERE id = ?", (stream.id,))
        self._notices.append(_Sealed(stream.name))

    def _journal(self, stream: _Stream, run: _Run, ms: int, events: Sequence[Event]) -> None:
        """Put frames after the stream's last, in the cached state; `flush` writes them."""
        previous = stream.top
        seq, last_data = previous.seq, 0
        for name, data in events:
            seq += 1
            self._rows += (stream.id, seq, ms, run.id, name, data)
            stream.bytes_held += len(data)
            if name != CONTROL_EVENT:
                last_data = seq
        stream.last_seq, stream.last_ms = seq, ms
        run.last_seq, run.last_ms = seq, ms
        if last_data:
            stream.last_data = run.last_data = last_data
        self._changed_streams[stream.id] = stream
        self._moved_runs[run.id] = run
        self._notices.append(_Journaled(stream.name, previous, ms, run.name, events))

    def _undelivered_from(self, stream: _Stream) -> int:
        (start_seq,) = self._db.execute(
            "SELECT min(start_seq) FROM runs WHERE stream_id = ? AND deliver = 1", (stream.id,)
        ).fetchone()
        return 0 if start_seq is None else int(start_seq) + 1

    def _retain(self, stream: _Stream) -> None:
        """Drop what the bounds leave no room for, oldest first; the newest frame stays. From the first run
        whose end is still to be delivered, frames have twice the room."""
        if not stream.keep_from:
            self._drop(stream, self._first_within(stream, 1))
            return
        if stream.keep_from > stream.earliest_seq:
            self._drop(stream, min(stream.keep_from, self._first_within(stream, 1)))
        if stream.keep_from <= stream.earliest_seq:
            self._drop(stream, self._first_within(stream, 2))

    def _first_within(self, stream: _Stream, times: int) -> int:
        """The seq from which on frames are within so many times the bounds."""
        held = stream.last_seq - stream.earliest_seq + 1
        excess = held - times * stream.max_frames if stream.max_frames else 0
        over = stream.bytes_held - times * stream.max_bytes if stream.max_bytes else 0
        before_seq = stream.earliest_seq + max(0, excess)
        if over > 0:
            sizes = self._db.execute(
                "SELECT seq, length(data) FROM frames WHERE stream_id = ? AND seq < ? ORDER BY seq",
                (stream.id, stream.last_seq),
            )
            for seq, size in sizes:
                if over <= 0:
                    break
                over -= size
                before_seq = max(before_seq, seq + 1)
            sizes.close()
        return before_seq

    def _drop(self, stream: _Stream, before_seq: int) -> None:
        if before_seq <= stream.earliest_seq:
            return
        (size,) = self._db.execute(
            "SELECT total(length(data)) FROM frames WHERE stream_id = ? AND seq < ?", (stream.id, before_seq)
        ).fetchone()
        self._db.execute("DELETE FROM frames WHERE stream_id = ? AND seq < ?", (stream.id, before_seq))
        stream.bytes_held -= int(size)
        stream.earliest_seq = before_seq
        self._changed_streams[stream.id] = stream

    def _bury(self, stream: _Stream, now: int) -> None:
        """Make a stream unknown. Its frames and runs, unreachable from now on, are left to the sweep."""
        self._db.execute(
            "INSERT OR REPLACE INTO tombstones VALUES (?, ?, ?)",
            (stream.name, stream.last_ms, max(now, stream.last_ms) + TOMBSTONE_KEEP_MS),
        )
        self._db.execute("DELETE FROM streams WHERE id = ?", (stream.id,))
        self._db.execute("DELETE FROM stream_texts WHERE stream_id = ?", (stream.id,))
        self._db.execute("INSERT INTO debris VALUES (?)", (stream.id,))
        self._streams.pop(stream.name, None)
        self._notices.append(_Deleted(stream.name))
        self.unswept = True

    def _clear(self, stream_id: int, max_rows: int) -> int:
        """Remove up to so many rows of a buried stream; the count of those removed."""
        removed = self._db.execute(
            "DELETE FROM frames WHERE stream_id = ? AND seq IN "
            "(SELECT seq FROM frames WHERE stream_id = ? ORDER BY seq LIMIT ?)",
            (stream_id, stream_id, max_rows),
        ).rowcount
        if removed < max_rows:
            runs = "SELECT id FROM runs WHERE stream_id = ? LIMIT ?"
            bounds = (stream_id, max_rows - removed)
            self._db.execute(f"DELETE FROM run_texts WHERE run_id IN ({runs})", bounds)
            removed += self._db.execute(f"DELETE FROM runs WHERE id IN ({runs})", bounds).rowcount
        if removed < max_rows:
            self._db.execute("DELETE FROM debris WHERE stream_id = ?", (stream_id,))
        return removed

    def _has_debris(self) -> bool:
        return self._db.execute("SELECT 1 FROM debris LIMIT 1").fetchone() is not None


class _Readers:
    """A few threads that read, each time with a connection nobody else is using."""

    def __init__(self, path: Path) -> None:
        self._pool = ThreadPoolExecutor(READ_THREADS, thread_name_prefix="relay-sqlite-reader")
        self._connections = [_connect(path) for _ in range(READ_THREADS)]
        for db in self._connections:
            db.execute("PRAGMA query_only = ON")

    async def run(self, read: Callable[..., T], *arguments: Any) -> T:
        """Call `read(connection, *arguments)` in one read transaction."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, partial(self._read, read, arguments))

    def _read(self, read: Callable[..., T], arguments: Sequence[Any]) -> T:
        db = self._connections.pop()
        try:
            with _snapshot(db):
                return read(db, *arguments)
        except sqlite3.Error as error:
            raise _journal_error(error) or error from None
        finally:
            self._connections.append(db)

    def close(self) -> None:
        """Finish what is queued. Blocks."""
        self._pool.shutdown(wait=True)
        for db in self._connections:
            db.close()


def _wall_clock_ms() -> int:
    return time.time_ns() // 1_000_000


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


def _no_stream(name: str) -> UnknownStream:
    return UnknownStream(f"There is no stream '{name}'.")


def _no_run(name: str) -> UnknownRun:
    return UnknownRun(f"The stream has no run '{name}'.")


def _check_transition(status: Status, ending: Ending) -> None:
    assert any(TRANSITIONS.get((status, act)) is ending.status for act in Act), (status, ending)


def _journal_error(error: BaseException) -> JournalError | None:
    """The error a caller is to see for one of SQLite's; None for what can only be a mistake of ours."""
    code = getattr(error, "sqlite_errorcode", None)
    if not isinstance(error, sqlite3.Error) or code is None:
        return None
    failure: JournalError
    if code & 0xFF in _REFUSED:
        failure = JournalRefused(f"SQLite refuses: {error}.")
    elif code & 0xFF in _UNAVAILABLE:
        failure = JournalUnavailable(f"SQLite is held up: {error}.")
    else:
        return None
    failure.__cause__ = error
    return failure


# Starting.


def _lock(path: Path) -> int:
    """Take the journal for this process; the descriptor holds it until it is closed."""
    lock_path = f"{path}.lock"
    if not path.parent.is_dir():
        raise StartupError(f"The journal's directory {path.parent} does not exist: create it first.")
    try:
        lock = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StartupError(
            f"The journal's lock file {lock_path} cannot be opened: {error.strerror}. "
            f"Make {path.parent} writable for this user, or name another directory."
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            raise StartupError(f"The lock file {lock_path} cannot be locked: {error.strerror}.") from error
        raise StartupError(
            f"The journal {path} is held by another relay. A SQLite journal belongs to one process: "
            f"stop the other one, give this one another path, or use Redis to share a journal."
        ) from error
    return lock


def _connect(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)


def _open_for_writing(path: Path, synchronous: str) -> sqlite3.Connection:
    """Open the database and make it ours; raises `StartupError`."""
    if sqlite3.sqlite_version_info < MIN_SQLITE:
        needed = ".".join(map(str, MIN_SQLITE))
        raise StartupError(f"This Python has SQLite {sqlite3.sqlite_version}; relay needs {needed} or newer.")
    if synchronous not in ("off", "normal", "full", "extra"):
        raise StartupError(f"'{synchronous}' is not a synchronous mode: say off, normal, full or extra.")
    try:
        db = _connect(path)
    except sqlite3.Error as error:
        raise StartupError(f"The journal {path} cannot be opened: {error}.") from error
    try:
        _prepare(db, path, synchronous)
    except sqlite3.Error as error:
        db.close()
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
            raise StartupError(
                f"{path} is not a SQLite database, or a damaged one ({error}). "
                f"Move it away, or name another path."
            ) from error
        raise StartupError(f"The journal {path} cannot be used: {error}.") from error
    except BaseException:
        db.close()
        raise
    return db


def _prepare(db: sqlite3.Connection, path: Path, synchronous: str) -> None:
    (version,) = db.execute("PRAGMA user_version").fetchone()
    (application,) = db.execute("PRAGMA application_id").fetchone()
    (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if tables and application != APPLICATION_ID:
        raise StartupError(f"{path} is another program's database. Name another path for the journal.")
    if tables and version < SCHEMA_VERSION:
        raise StartupError(
            f"The journal {path} was written by an older relay: its schema is {version}, and this relay "
            f"knows only {SCHEMA_VERSION}. Move it away, or name another path."
        )
    if version > SCHEMA_VERSION:
        raise StartupError(
            f"The journal {path} was written by a newer relay: its schema is {version}, and this relay knows "
            f"{SCHEMA_VERSION}. Run the newer one, or name another path."
        )
    (mode,) = db.execute("PRAGMA journal_mode = WAL").fetchone()
    if mode != "wal":
        raise StartupError(f"SQLite cannot keep a write-ahead log beside {path}. Use a local disk.")
    db.execute(f"PRAGMA synchronous = {synchronous}")
    db.execute(f"PRAGMA journal_size_limit = {WAL_MAX_BYTES}")
    # Whole or not at all: a start that is killed here begins again. Finds out whether we may write, too.
    db.executescript(f"BEGIN IMMEDIATE; {'' if tables else SCHEMA} COMMIT;")


# Reading. Every function here runs within `_snapshot`.


@contextmanager
def _snapshot(db: sqlite3.Connection) -> Iterator[None]:
    """One read transaction: everything read within is of the same instant."""
    db.execute("BEGIN")
    try:
        yield
    finally:
        db.execute("COMMIT")


def _known_stream(db: sqlite3.Connection, now: int, name: str) -> _Stream:
    row = db.execute(
        f"SELECT {_STREAM_COLUMNS} FROM streams WHERE name = :name AND {_LIVE}", {"name": name, "now": now}
    ).fetchone()
    if row is None:
        raise _no_stream(name)
    return _Stream(*row)


def _read_page(
    db: sqlite3.Connection, now: int, name: str, after: Cursor, max_frames: int, max_bytes: int
) -> Page:
    stream = _known_stream(db, now, name)
    anchor = db.execute(
        "SELECT ms FROM frames WHERE stream_id = ? AND seq = ?", (stream.id, after.seq)
    ).fetchone()
    frames: list[Frame] = []
    size = 0
    rows = db.execute(
        "SELECT seq, ms, name, event, data FROM frames JOIN runs ON runs.id = frames.run_id "
        "WHERE frames.stream_id = ? AND seq > ? ORDER BY seq LIMIT ?",
        (stream.id, after.seq, max(1, max_frames)),
    )
    for row in rows:
        frame = Frame._make(row)
        frames.append(frame)
        size += len(frame.data)
        if size >= max_bytes:
            break
    rows.close()
    more = bool(frames) and frames[-1].seq < stream.last_seq
    return Page(stream.extent, anchor[0] if anchor else None, frames, more)


def _open_runs(db: sqlite3.Connection, stream: _Stream) -> list[str]:
    rows: Iterable[tuple[str]] = db.execute(
        "SELECT name FROM runs WHERE stream_id = ? AND status = 'open' ORDER BY id", (stream.id,)
    )
    return [name for (name,) in rows]


def _stream_infos(db: sqlite3.Connection, where: str, values: Mapping[str, Any]) -> list[StreamInfo]:
    rows = db.execute(
        f"SELECT {_STREAM_COLUMNS}, coalesce(metadata, '') "
        f"FROM streams LEFT JOIN stream_texts ON stream_id = id WHERE {_LIVE} AND {where}",
        values,
    ).fetchall()
    streams = ((_Stream(*row), metadata) for *row, metadata in rows)
    return [stream.info(_open_runs(db, stream), metadata) for stream, metadata in streams]


def _describe(db: sqlite3.Connection, now: int, name: str) -> StreamInfo:
    found = _stream_infos(db, "name = :name", {"name": name, "now": now})
    if not found:
        raise _no_stream(name)
    return found[0]


def _list_streams(db: sqlite3.Connection, now: int, after: str, limit: int) -> list[StreamInfo]:
    values = {"after": after, "now": now, "limit": max(0, limit)}
    return _stream_infos(db, "name > :after ORDER BY name LIMIT :limit", values)


_SELECT_RUN_INFOS = (
    f"SELECT {_RUN_COLUMNS}, coalesce(metadata, ''), coalesce(answer, '') "
    "FROM runs LEFT JOIN run_texts ON run_id = runs.id "
)


def _run_info(row: Sequence[Any]) -> RunInfo:
    return _Run.from_row(row[:-2]).info(*row[-2:])


def _read_run(db: sqlite3.Connection, now: int, stream_name: str, name: str) -> RunInfo:
    stream = _known_stream(db, now, stream_name)
    row = db.execute(
        f"{_SELECT_RUN_INFOS} WHERE stream_id = ? AND runs.name = ?", (stream.id, name)
    ).fetchone()
    if row is None:
        raise _no_run(name)
    return _run_info(row)


def _list_runs(db: sqlite3.Connection, now: int, stream_name: str, after: str, limit: int) -> list[RunInfo]:
    stream = _known_stream(db, now, stream_name)
    after_id = 0
    if after:
        row = db.execute(
            "SELECT id FROM runs WHERE stream_id = ? AND name = ?", (stream.id, after)
        ).fetchone()
        if row is None:
            raise _no_run(after)
        (after_id,) = row
    rows = db.execute(
        f"{_SELECT_RUN_INFOS} WHERE stream_id = ? AND runs.id > ? ORDER BY runs.id LIMIT ?",
        (stream.id, after_id, max(0, limit)),
    )
    return [_run_info(row) for row in rows]


def _read_states(db: sqlite3.Connection, now: int, runs: Sequence[tuple[str, str]]) -> list[RunState | None]:
    select = (
        "SELECT status, reason, writer, runs.last_seq, runs.last_ms "
        f"FROM runs JOIN streams ON streams.id = stream_id WHERE streams.name = :stream AND {_LIVE} "
        "AND runs.name = :run"
    )
    rows = (db.execute(select, {"stream": stream, "run": run, "now": now}).fetchone() for stream, run in runs)
    return [
        None if row is None else RunState(Status(row[0]), row[1], row[2], Cursor(row[3], row[4]))
        for row in rows
    ]


def _list_due(db: sqlite3.Connection, now: int, limit: int) -> list[tuple[str, str]]:
    return db.execute(
        "SELECT streams.name, runs.name FROM runs JOIN streams ON streams.id = stream_id "
        f"WHERE status = 'open' AND due_ms > 0 AND due_ms <= :now AND {_LIVE} ORDER BY due_ms LIMIT :limit",
        {"now": now, "limit": max(0, limit)},
    ).fetchall()


def _list_ended(
    db: sqlite3.Connection, now: int, ended_after_ms: int, after: str, limit: int
) -> list[EndedRun]:
    # By number within one ms, so that what is listed after a place ended after it.
    after_ms, after_no = (int(part) for part in after.split("-")) if after else (0, 0)
    rows = db.execute(
        f"SELECT {_RUN_COLUMNS}, coalesce(metadata, ''), coalesce(answer, ''), streams.name "
        "FROM runs JOIN streams ON streams.id = runs.stream_id LEFT JOIN run_texts ON run_id = runs.id "
        f"WHERE ended_no > 0 AND ended_ms > :ended_after AND (ended_ms, ended_no) > (:ms, :no) AND {_LIVE} "
        "ORDER BY ended_ms, ended_no LIMIT :limit",
        {"ended_after": ended_after_ms, "ms": after_ms, "no": after_no, "now": now, "limit": max(0, limit)},
    )
    ended = []
    for *row, stream in rows:
        run = _Run.from_row(row[:-2])
        ended.append(EndedRun(f"{run.ended_ms}-{run.ended_no}", stream, run.info(*row[-2:])))
    return ended


def _read_tops(db: sqlite3.Connection, now: int, names: Sequence[str]) -> dict[str, StreamTop]:
    tops = {}
    for name in names:
        select = f"SELECT last_seq, last_ms, sealed FROM streams WHERE name = :name AND {_LIVE}"
        row = db.execute(select, {"name": name, "now": now}).fetchone()
        if row is not None:
            seq, ms, sealed = row
            tops[name] = StreamTop(Cursor(seq, ms) if seq else ORIGIN, bool(sealed))
    return tops


def _resolve_token(db: sqlite3.Connection, now: int, token: str) -> tuple[str, str] | None:
    row: tuple[str, str] | None = db.execute(
        "SELECT streams.name, runs.name FROM runs JOIN streams ON streams.id = stream_id "
        "WHERE token = :token AND token <> '' "
        f"AND {_LIVE} ORDER BY runs.id DESC LIMIT 1",
        {"token": token, "now": now},
    ).fetchone()
    return row
