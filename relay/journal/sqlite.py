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
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import orjson

from relay.cursor import ORIGIN, Cursor, Extent
from relay.errors import (
    Fenced,
    JournalError,
    JournalRefused,
    JournalUnavailable,
    RunEnded,
    RunExists,
    SequenceGap,
    StartupError,
    StreamSealed,
    UnknownRun,
    UnknownStream,
)
from relay.frame import CONTROL_EVENT, Event, Frame, run_ended, run_started
from relay.journal.base import (
    Append,
    Appended,
    Claim,
    Follower,
    Opened,
    Page,
    RunInfo,
    RunOpening,
    StreamInfo,
)
from relay.lifecycle import TRANSITIONS, Act, Ending, Status, allowed
from relay.limits import Retention

T = TypeVar("T")

APPLICATION_ID = 0x524C5931  # "RLY1": tells a relay journal from another program's database.
SCHEMA_VERSION = 1

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
MIN_SQLITE = (3, 33, 0)
"""The first with UPDATE FROM; it also takes the variables of 256 rows."""

SCHEMA = f"""
CREATE TABLE streams (
    id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, created_ms INTEGER NOT NULL,
    earliest_seq INTEGER NOT NULL, last_seq INTEGER NOT NULL, last_ms INTEGER NOT NULL,
    last_data INTEGER NOT NULL, bytes_held INTEGER NOT NULL, runs INTEGER NOT NULL, latest_run TEXT NOT NULL,
    sealed INTEGER NOT NULL, max_frames INTEGER NOT NULL, max_bytes INTEGER NOT NULL,
    retention_s INTEGER NOT NULL);
CREATE TABLE runs (
    id INTEGER PRIMARY KEY AUTOINCREMENT, stream_id INTEGER NOT NULL, name TEXT NOT NULL,
    writer TEXT NOT NULL, token TEXT NOT NULL, status TEXT NOT NULL, reason TEXT NOT NULL,
    error TEXT NOT NULL, dialect TEXT NOT NULL, start_seq INTEGER NOT NULL, start_ms INTEGER NOT NULL,
    last_seq INTEGER NOT NULL, last_ms INTEGER NOT NULL, last_data INTEGER NOT NULL,
    frames INTEGER NOT NULL, text_bytes INTEGER NOT NULL, started_ms INTEGER NOT NULL,
    ended_ms INTEGER NOT NULL, UNIQUE (stream_id, name));
CREATE INDEX runs_open ON runs (stream_id) WHERE status = 'open';
CREATE INDEX runs_token ON runs (token) WHERE token <> '';
-- Apart from runs, whose rows are rewritten with every append.
CREATE TABLE run_texts (run_id INTEGER PRIMARY KEY, metadata TEXT NOT NULL, answer TEXT NOT NULL);
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
_LIVE = "(retention_s = 0 OR last_ms + retention_s * 1000 >= :now)"
_STREAM_COLUMNS = (
    "id, name, created_ms, earliest_seq, last_seq, last_ms, last_data, bytes_held, runs, latest_run, sealed, "
    "max_frames, max_bytes, retention_s"
)
_RUN_COLUMNS = (
    "runs.id, name, writer, token, status, reason, error, dialect, start_seq, start_ms, last_seq, last_ms, "
    "last_data, frames, text_bytes, started_ms, ended_ms"
)
_FRAME_COLUMNS = 6
_INSERT_FRAMES = "INSERT INTO frames VALUES {rows}"
# The columns that change, in the order of `_Stream.changes` and `_Run.changes`.
_CHANGING_STREAM = ("earliest_seq", "last_seq", "last_ms", "last_data", "bytes_held", "runs", "latest_run")
_CHANGING_RUN = (
    *("status", "reason", "error", "dialect", "last_seq", "last_ms", "last_data"),
    *("frames", "text_bytes", "ended_ms"),
)


def _update(table: str, columns: Sequence[str]) -> str:
    sets = ", ".join(f"{column} = new.column{number}" for number, column in enumerate(columns, 2))
    return f"UPDATE {table} SET {sets} FROM (VALUES {{rows}}) AS new WHERE {table}.id = new.column1"


_UPDATE_STREAMS = _update("streams", _CHANGING_STREAM)
_UPDATE_RUNS = _update("runs", _CHANGING_RUN)


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
    text_bytes: int
    started_ms: int
    ended_ms: int

    @classmethod
    def from_row(cls, row: Sequence[Any]) -> _Run:
        run = cls(*row)
        run.status = Status(run.status)
        return run

    def changes(self) -> tuple[Any, ...]:
        state = (self.status.value, self.reason, self.error, self.dialect)
        last = (self.last_seq, self.last_ms, self.last_data)
        return (self.id, *state, *last, self.frames, self.text_bytes, self.ended_ms)

    def info(self, metadata: str, answer: str) -> RunInfo:
        return RunInfo(
            run=self.name,
            status=self.status,
            start=Cursor(self.start_seq, self.start_ms),
            last=Cursor(self.last_seq, self.last_ms),
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

    def info(self, open_runs: Sequence[str]) -> StreamInfo:
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
            active_ms=self.last_ms,
        )


class _Notice(NamedTuple):
    """What the follower is to hear once it is committed. `previous` is None for a deletion."""

    stream: str
    previous: Cursor | None = None
    ms: int = 0
    run: str = ""
    events: Sequence[Event] = ()


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

    async def start(self, follower: Follower) -> None:
        # Blocks the loop on purpose: nothing is served before it returns.
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
        self._writer = _Writer(_Store(db, self._clock_ms), self._loop, self._watched, follower)

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

    async def open_run(self, opening: RunOpening) -> Opened:
        metadata = orjson.loads(opening.metadata) if opening.metadata else None
        writer = self._writing()
        open_run = partial(writer.store.open_run, opening, metadata)
        return await writer.submit(opening.stream, open_run, size=len(opening.metadata) + len(opening.answer))

    async def append(self, batch: Append) -> Appended:
        writer = self._writing()
        size = sum(len(event.data) for event in batch.events)
        return await writer.submit(batch.stream, partial(writer.store.append, batch), pure=True, size=size)

    async def read(self, stream: str, after: Cursor, max_frames: int, max_bytes: int) -> Page:
        return await self._reading().run(_read_page, self._clock_ms(), stream, after, max_frames, max_bytes)

    async def describe(self, stream: str) -> StreamInfo:
        return await self._reading().run(_describe, self._clock_ms(), stream)

    async def run(self, stream: str, run: str) -> RunInfo:
        return await self._reading().run(_read_run, self._clock_ms(), stream, run)

    async def streams(self, after: str, limit: int) -> Sequence[StreamInfo]:
        return await self._reading().run(_list_streams, self._clock_ms(), after, limit)

    async def tops(self, streams: Sequence[str]) -> Mapping[str, Cursor]:
        return await self._reading().run(_read_tops, self._clock_ms(), list(streams))

    async def trim(self, stream: str, before_seq: int) -> None:
        writer = self._writing()
        await writer.submit(stream, partial(writer.store.trim, stream, before_seq))

    async def delete(self, stream: str) -> None:
        writer = self._writing()
        await writer.submit(stream, partial(writer.store.delete, stream))

    async def resolve_token(self, token: str) -> tuple[str, str] | None:
        return await self._reading().run(_resolve_token, self._clock_ms(), token)

    def watch(self, stream: str) -> None:
        self._watched.add(stream)
        self._loop.call_soon(self._doubt, stream)

    def unwatch(self, stream: str) -> None:
        self._watched.discard(stream)

    async def watchers(self, stream: str) -> int:
        return int(stream in self._watched)  # A file has one process.

    async def claim(self, key: str, body_digest: str, owner: str, lease_s: float, keep_s: float) -> Claim:
        writer = self._writing()
        lease_ms, keep_ms = round(lease_s * 1000), round(keep_s * 1000)
        return await writer.submit(
            "", partial(writer.store.claim, key, body_digest, owner, lease_ms, keep_ms)
        )

    async def settle(self, key: str, owner: str, stream: str, run: str) -> None:
        writer = self._writing()
        await writer.submit("", partial(writer.store.settle, key, owner, stream, run))

    async def release(self, key: str, owner: str) -> None:
        writer = self._writing()
        await writer.submit("", partial(writer.store.release, key, owner))

    async def sweep(self) -> None:
        """Remove some of what has expired now, as is done every `SWEEP_EVERY_S` without being asked."""
        writer = self._writing()
        await writer.submit("", writer.store.sweep)

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

    def _reading(self) -> _Readers:
        if self._readers is None:
            raise JournalUnavailable("The journal is closed.")
        return self._readers


class _Writer:
    """The writing thread. Its queue needs no bound: it holds one operation of each waiting caller."""

    def __init__(
        self, store: _Store, loop: asyncio.AbstractEventLoop, watched: set[str], follower: Follower
    ) -> None:
        self.store = store
        self.commits = 0
        self._loop = loop
        self._watched = watched
        self._follower = follower
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
        notices = self._commit(group)
        # Looked up after the commit: whoever watches later than this reads the journal later than this.
        news = [(notice, _frames(notice)) for notice in notices if notice.stream in self._watched]
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

    def _answer(self, group: list[_Operation], news: list[tuple[_Notice, list[Frame]]]) -> None:
        for operation in group:
            future = operation.future
            if future is None or future.done():  # Cancelled: the operation has happened all the same.
                continue
            if operation.error is None:
                future.set_result(operation.result)
            else:
                future.set_exception(operation.error)
        for notice, frames in news:
            if notice.stream not in self._watched:
                continue
            if notice.previous is None:
                self._follower.on_deleted(notice.stream)
            else:
                self._follower.on_frames(notice.stream, notice.previous, frames)


class _Store:
    """The operations that write, on the one connection that writes. Belongs to the writing thread."""

    def __init__(self, db: sqlite3.Connection, clock_ms: Callable[[], int]) -> None:
        self._db = db
        self._clock_ms = clock_ms
        self._streams: dict[str, _Stream] = {}
        self._cached = 0
        self._rows: list[Any] = []
        self._changed_streams: dict[int, _Stream] = {}
        self._changed_runs: dict[int, _Run] = {}
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
        runs = [value for run in self._changed_runs.values() for value in run.changes()]
        self._write(_UPDATE_RUNS, 1 + len(_CHANGING_RUN), runs)
        self._changed_runs.clear()

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

    # Operations.

    def open_run(self, opening: RunOpening, metadata: Any) -> Opened:
        now = self._clock_ms()
        stream = self._find_stream(opening.stream)
        if stream is not None and stream.expired(now):
            self._bury(stream, now)
            stream = None
        if stream is not None:
            run = self._find_run(stream, opening.run)
            if run is not None:
                if run.writer != opening.writer:
                    raise RunExists(f"The stream has a run '{opening.run}' already.")
                start = Cursor(run.start_seq, run.start_ms)
                return Opened(start, Cursor(run.start_seq + 1, run.started_ms))
            if stream.sealed:
                raise StreamSealed("The stream takes no further run.")
        else:
            stream = self._create(opening, now)
        data = run_started(opening.run, opening.dialect or None, metadata)
        start = stream.top
        first = Cursor(start.seq + 1, max(now, stream.last_ms))
        identity = (opening.run, opening.writer, opening.token, opening.dialect)
        run_id = self._insert(
            "INSERT INTO runs (started_ms, stream_id, name, writer, token, dialect, start_seq, start_ms, "
            "last_seq, last_ms, status, reason, error, last_data, frames, text_bytes, ended_ms) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 'open', '', '', 0, 0, 0, 0)",
            (first.ms, stream.id, *identity, *start, *first),
        )
        if opening.metadata or opening.answer:
            texts = (run_id, opening.metadata, opening.answer)
            self._db.execute("INSERT INTO run_texts VALUES (?, ?, ?)", texts)
        stream.runs += 1
        stream.latest_run = opening.run
        self._journal(stream, run_id, opening.run, first.ms, [Event(CONTROL_EVENT, data)])
        return Opened(start, first)

    def append(self, batch: Append) -> Appended:
        now = self._clock_ms()
        stream = self._find_stream(batch.stream)
        if stream is None or stream.expired(now):
            raise UnknownStream(f"There is no stream '{batch.stream}'.")
        run = self._find_run(stream, batch.run)
        if run is None:
            raise UnknownRun(f"The stream has no run '{batch.run}'.")
        if run.writer != batch.writer:
            raise Fenced("The writer token is not the run's, or no longer.")
        expected = run.frames + 1
        if batch.producer_seq > expected:
            raise SequenceGap(f"The run expects frame {expected} next.", expected=expected)
        duplicates = min(len(batch.events), expected - batch.producer_seq)
        fresh = list(batch.events[duplicates:])
        ending = batch.ending
        if not allowed(run.status, Act.APPEND):
            if fresh or (ending is not None and (ending.status, ending.reason) != (run.status, run.reason)):
                said = f"The run has ended: {run.status}, {run.reason}."
                raise RunEnded(said, run_status=run.status.value, reason=run.reason)
            return Appended(stream.top, 0, duplicates, expected)
        if not fresh and ending is None:
            if batch.dialect:
                run.dialect = batch.dialect
                self._changed_runs[run.id] = run
            return Appended(stream.top, 0, duplicates, expected)

        appended = len(fresh)
        frames = run.frames + appended
        text_bytes = run.text_bytes + (batch.text_bytes * appended // len(batch.events) if appended else 0)
        if ending is not None:
            _check_transition(run.status, ending)
            fresh.append(Event(CONTROL_EVENT, run_ended(run.name, ending, frames, text_bytes)))

        # Nothing from here on may raise: the cached state would be left half changed.
        ms = max(now, stream.last_ms)
        if appended:
            run.last_data = stream.last_data = stream.last_seq + appended
        self._journal(stream, run.id, run.name, ms, fresh)
        run.frames = frames
        run.text_bytes = text_bytes
        run.last_seq, run.last_ms = stream.last_seq, ms
        run.dialect = batch.dialect or run.dialect
        if ending is not None:
            run.status, run.reason, run.error = ending.status, ending.reason.value, ending.error
            run.ended_ms = ms
        self._changed_runs[run.id] = run
        return Appended(stream.top, appended, duplicates, frames + 1)

    def trim(self, stream_name: str, before_seq: int) -> None:
        stream = self._find_stream(stream_name)
        if stream is None or stream.expired(self._clock_ms()):
            raise UnknownStream(f"There is no stream '{stream_name}'.")
        self._drop(stream, min(before_seq, stream.last_seq + 1))

    def delete(self, stream_name: str) -> None:
        stream = self._find_stream(stream_name)
        if stream is not None:
            self._bury(stream, self._clock_ms())

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
            self._cached += 1
        return stream

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

    def _forget(self, stream: str) -> None:
        """Drop cached state that may not be what the database says; all of it for an empty name."""
        self._rows.clear()
        self._changed_streams.clear()
        self._changed_runs.clear()
        if stream:
            self._streams.pop(stream, None)
        else:
            self._streams.clear()
            self._cached = 0

    def _create(self, opening: RunOpening, now: int) -> _Stream:
        row = self._db.execute("SELECT last_ms FROM tombstones WHERE name = ?", (opening.stream,)).fetchone()
        created_ms = now if row is None else max(now, row[0] + 1)
        self._insert(
            "INSERT INTO streams (name, created_ms, last_ms, sealed, max_frames, max_bytes, retention_s, "
            "earliest_seq, last_seq, last_data, bytes_held, runs, latest_run) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, 1, 0, 0, 0, 0, '')",
            (opening.stream, created_ms, created_ms, opening.seal, *opening.retention),
        )
        stream = self._find_stream(opening.stream)
        assert stream is not None
        return stream

    def _journal(self, stream: _Stream, run_id: int, run: str, ms: int, events: Sequence[Event]) -> None:
        """Put frames after the stream's last, in the cached state; `flush` writes them."""
        previous = stream.top
        seq = previous.seq
        for name, data in events:
            seq += 1
            self._rows += (stream.id, seq, ms, run_id, name, data)
            stream.bytes_held += len(data)
        stream.last_seq, stream.last_ms = seq, ms
        self._changed_streams[stream.id] = stream
        self._notices.append(_Notice(stream.name, previous, ms, run, events))

    def _retain(self, stream: _Stream) -> None:
        """Drop what the bounds leave no room for, oldest first; the newest frame stays."""
        held = stream.last_seq - stream.earliest_seq + 1
        excess = held - stream.max_frames if stream.max_frames else 0
        over = stream.bytes_held - stream.max_bytes if stream.max_bytes else 0
        if excess <= 0 and over <= 0:
            return
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
        self._drop(stream, before_seq)

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
        self._db.execute("INSERT INTO debris VALUES (?)", (stream.id,))
        self._streams.pop(stream.name, None)
        self._notices.append(_Notice(stream.name))
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


def _frames(notice: _Notice) -> list[Frame]:
    if notice.previous is None:
        return []
    first = notice.previous.seq + 1
    return [
        Frame(seq, notice.ms, notice.run, event, data)
        for seq, (event, data) in enumerate(notice.events, first)
    ]


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
        raise UnknownStream(f"There is no stream '{name}'.")
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


def _describe(db: sqlite3.Connection, now: int, name: str) -> StreamInfo:
    stream = _known_stream(db, now, name)
    return stream.info(_open_runs(db, stream))


def _list_streams(db: sqlite3.Connection, now: int, after: str, limit: int) -> list[StreamInfo]:
    rows = db.execute(
        f"SELECT {_STREAM_COLUMNS} FROM streams WHERE name > :after AND {_LIVE} ORDER BY name LIMIT :limit",
        {"after": after, "now": now, "limit": max(0, limit)},
    ).fetchall()
    return [stream.info(_open_runs(db, stream)) for stream in (_Stream(*row) for row in rows)]


def _read_run(db: sqlite3.Connection, now: int, stream_name: str, name: str) -> RunInfo:
    stream = _known_stream(db, now, stream_name)
    row = db.execute(
        f"SELECT {_RUN_COLUMNS}, coalesce(metadata, ''), coalesce(answer, '') "
        "FROM runs LEFT JOIN run_texts ON run_id = runs.id WHERE stream_id = ? AND name = ?",
        (stream.id, name),
    ).fetchone()
    if row is None:
        raise UnknownRun(f"The stream has no run '{name}'.")
    return _Run.from_row(row[:-2]).info(*row[-2:])


def _read_tops(db: sqlite3.Connection, now: int, names: Sequence[str]) -> dict[str, Cursor]:
    tops = {}
    for name in names:
        select = f"SELECT last_seq, last_ms FROM streams WHERE name = :name AND {_LIVE}"
        row = db.execute(select, {"name": name, "now": now}).fetchone()
        if row is not None:
            tops[name] = Cursor(*row)
    return tops


def _resolve_token(db: sqlite3.Connection, now: int, token: str) -> tuple[str, str] | None:
    row: tuple[str, str] | None = db.execute(
        "SELECT streams.name, runs.name FROM runs JOIN streams ON streams.id = stream_id "
        "WHERE token = :token AND token <> '' "
        "AND (retention_s = 0 OR streams.last_ms + retention_s * 1000 >= :now) ORDER BY runs.id DESC LIMIT 1",
        {"token": token, "now": now},
    ).fetchone()
    return row
