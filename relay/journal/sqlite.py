"""The journal in one SQLite file: the embedded default, held by one process.

One thread writes. Operations are queued to it as closures; it takes everything that is queued, runs it in
one transaction, commits once, and only then answers the callers and tells the follower (group commit), so
that nobody hears of a frame that is not on disk. Between the commit and the callers stands a single
`call_soon_threadsafe` per group.

The log is copied into the database by a third thread, so that nobody who waits for a commit waits for that.

Reads have two threads and connections of their own and see only what was committed. Each is one read
transaction that ends before its rows leave the thread: a reader that stalls never holds back a checkpoint.
"""

from __future__ import annotations

import asyncio
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import inf
from pathlib import Path
from typing import Any, TypeVar

import orjson

from relay.cursor import Cursor
from relay.errors import (
    JournalError,
    JournalUnavailable,
    StartupError,
)
from relay.frame import Event
from relay.journal import sqlite_reading as reading
from relay.journal.base import (
    Append,
    Appended,
    Claim,
    Condition,
    Delivery,
    Ended,
    EndedRun,
    Follower,
    Held,
    Opened,
    Orphan,
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
from relay.journal.sqlite_file import (
    connect,
    journal_error,
    lock_file,
    open_for_writing,
    to_ms,
)
from relay.journal.sqlite_reading import Readers
from relay.journal.sqlite_store import Journaled, Notice, Operation, RunOver, Sealed, Store
from relay.lifecycle import Ending, Reason
from relay.limits import Retention

T = TypeVar("T")

GROUP_MAX_OPERATIONS = 1024
GROUP_MAX_BYTES = 8 * 1024 * 1024
"""Data bytes after which a group takes no further operation. The one that fills it is part of it."""
SWEEP_EVERY_S = 60.0
CHECKPOINT_AFTER = 250
"""Operations after which the log is copied into the database: each leaves about four pages there."""
CHECKPOINT_PAUSE_S = 0.2
"""Between two checkpoints: the longer, the more often a page was changed that is copied once."""


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
        self._readers: Readers | None = None
        self._checkpointer: _Checkpointer | None = None

    async def start(self, follower: Follower, owner: RunOwner | None = None) -> Sequence[Orphan]:
        # Opening blocks the loop on purpose: nothing is served before it returns.
        self._loop = asyncio.get_running_loop()
        self._follower = follower
        self._watched.clear()
        lock = lock_file(self.path)
        try:
            db = open_for_writing(self.path, self._synchronous)
        except BaseException:
            os.close(lock)
            raise
        self._lock = lock
        self._readers = Readers(self.path)
        self._checkpointer = _Checkpointer(self.path, self._synchronous)
        store, copied = Store(db, self._clock_ms), self._checkpointer.committed
        self._writer = _Writer(store, self._loop, self._watched, follower, owner, copied)
        try:
            return await self._write("", self._writer.store.end_orphans, owner.name if owner else "")
        except BaseException as error:
            await self.close()
            if isinstance(error, JournalError):
                raise StartupError(
                    f"The journal {self.path} cannot be written: {error.detail} Make room, or mend the disk."
                ) from error
            raise

    async def close(self) -> None:
        writer, readers, checkpointer, lock = self._writer, self._readers, self._checkpointer, self._lock
        if writer is None or readers is None or checkpointer is None or lock is None:
            return
        self._writer = self._readers = self._checkpointer = self._lock = None

        def shut() -> None:
            # The writer last: the last connection to close is the one that checkpoints and removes the log.
            readers.close()
            checkpointer.close()
            writer.close()
            os.close(lock)

        # A cancelled close goes on in its thread: the lock is not kept by accident.
        await asyncio.to_thread(shut)

    @property
    def replaced_at(self) -> float:
        return -inf  # it is locked as long as this process has it

    @property
    def reconnects(self) -> int:
        return 0

    async def condition(self) -> Condition:
        return await self._read(reading.read_condition, self.path, self._synchronous)

    # Streams

    async def put_stream(self, stream: str, retention: Retention, change: StreamChange) -> bool:
        return await self._write(stream, self._store.put_stream, stream, retention, change)

    async def seal(self, stream: str) -> None:
        await self._write(stream, self._store.seal, stream)

    async def trim(self, stream: str, before_seq: int) -> None:
        await self._write(stream, self._store.trim, stream, before_seq)

    async def delete(self, stream: str) -> Sequence[str]:
        return await self._write(stream, self._store.delete, stream)

    # Runs

    async def open_run(self, opening: RunOpening) -> Opened:
        metadata = orjson.loads(opening.metadata) if opening.metadata else None
        open_run = partial(self._store.open_run, opening, metadata)
        size = len(opening.metadata) + len(opening.answer)
        return await self._writing().submit(opening.stream, open_run, size=size)

    async def append(self, batch: Append) -> Appended:
        writer = self._writing()
        size = sum(len(event.data) for event in batch.events)
        return await writer.submit(batch.stream, partial(writer.store.append, batch), pure=True, size=size)

    async def restore(self, opening: RunOpening, held: Held) -> None:
        restore = partial(self._store.restore, opening, held)
        size = sum(len(event.data) for event in held.events)
        await self._writing().submit(opening.stream, restore, size=size)

    async def take_over(self, stream: str, run: str, writer: str, idle_timeout_s: float) -> TakenOver:
        return await self._write(stream, self._store.take_over, stream, run, writer, to_ms(idle_timeout_s))

    async def hear_of(self, stream: str, run: str, writer: str) -> RunState:
        hear_of = partial(self._store.hear_of, stream, run, writer)
        return await self._writing().submit(stream, hear_of, pure=True)

    async def end_run(
        self, stream: str, run: str, ending: Ending, error_events: Mapping[str, Event], *, owner: str = ""
    ) -> Ended:
        return await self._write(stream, self._store.end_run, stream, run, ending, error_events, owner)

    async def run(self, stream: str, run: str) -> RunInfo:
        return await self._read(reading.read_run, stream, run)

    async def runs(self, stream: str, after: str, limit: int) -> Sequence[RunInfo]:
        return await self._read(reading.list_runs, stream, after, limit)

    async def states(self, runs: Sequence[tuple[str, str]]) -> Sequence[RunState | None]:
        return await self._read(reading.read_states, list(runs))

    # Liveness. The file belongs to one process: another's runs are ended by `start`, and there is no lease.

    async def renew(self, owner: str, lease_s: float) -> Renewal:
        return Renewal(True, self._clock_ms())

    async def resign(self, owner: str) -> None:
        pass

    async def lapsed_owners(self) -> Sequence[str]:
        return ()

    async def owned(self, owner: str, limit: int) -> Sequence[tuple[str, str]]:
        return await self._read(reading.list_owned, owner, limit)

    async def due_runs(self, limit: int) -> Sequence[tuple[str, str]]:
        return await self._read(reading.list_due, limit)

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
        return await self._read(reading.list_ended, ended_after_ms, after, limit)

    # Delivery of endings

    async def claim_deliveries(self, limit: int, lease_s: float) -> Sequence[Delivery]:
        return await self._write("", self._store.claim_deliveries, limit, to_ms(lease_s))

    async def settle_delivery(self, stream: str, run: str) -> None:
        await self._write(stream, self._store.settle_delivery, stream, run)

    async def postpone_delivery(self, stream: str, run: str, delay_s: float) -> None:
        await self._write(stream, self._store.postpone_delivery, stream, run, to_ms(delay_s))

    # Reading

    async def read(self, stream: str, after: Cursor, max_frames: int, max_bytes: int) -> Page:
        return await self._read(reading.read_page, stream, after, max_frames, max_bytes)

    async def describe(self, stream: str) -> StreamInfo:
        return await self._read(reading.describe, stream)

    async def streams(self, after: str, limit: int) -> Sequence[StreamInfo]:
        return await self._read(reading.list_streams, after, limit)

    async def tops(self, streams: Sequence[str]) -> Mapping[str, StreamTop]:
        return await self._read(reading.read_tops, list(streams))

    async def resolve_token(self, token: str) -> tuple[str, str] | None:
        return await self._read(reading.resolve_token, token)

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
        return await self._write(
            "", self._store.claim, key, body_digest, owner, to_ms(lease_s), to_ms(keep_s)
        )

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
    def _store(self) -> Store:
        return self._writing().store

    async def _write(self, stream: str, operation: Callable[..., T], *arguments: Any) -> T:
        return await self._writing().submit(stream, partial(operation, *arguments))

    async def _read(self, query: Callable[..., T], *arguments: Any) -> T:
        if self._readers is None:
            raise JournalUnavailable("The journal is closed.")
        return await self._readers.run(query, self._clock_ms(), *arguments)


class _Checkpointer:
    """Copies what was committed from the log into the database, in a thread and over a connection of its own:
    the writing thread would stand still meanwhile, and all who wait for it."""

    def __init__(self, path: Path, synchronous: str) -> None:
        self._db = connect(path)
        self._db.execute(f"PRAGMA synchronous = {synchronous}")
        self._wanted = threading.Event()
        self._closing = threading.Event()
        self._uncopied = 0
        self._thread = threading.Thread(target=self._work, name="relay-sqlite-checkpointer", daemon=True)
        self._thread.start()

    def committed(self, operations: int) -> None:
        """So many operations more are in the log. Does not wait."""
        self._uncopied += operations
        if self._uncopied >= CHECKPOINT_AFTER:
            self._uncopied = 0
            self._wanted.set()

    def close(self) -> None:
        """Finish, and end the thread. Blocks."""
        self._closing.set()
        self._wanted.set()
        self._thread.join()
        self._db.close()

    def _work(self) -> None:
        while self._wanted.wait() and not self._closing.is_set():
            self._wanted.clear()
            try:
                self._db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
            except sqlite3.Error:
                pass  # a full disk, say: the writer meets it too, and tells those concerned
            self._closing.wait(CHECKPOINT_PAUSE_S)


class _Writer:
    """The writing thread. Its queue needs no bound: it holds one operation of each waiting caller."""

    def __init__(
        self,
        store: Store,
        loop: asyncio.AbstractEventLoop,
        watched: set[str],
        follower: Follower,
        owner: RunOwner | None,
        on_commit: Callable[[int], None],
    ) -> None:
        self.store = store
        self._on_commit = on_commit
        self.commits = 0
        self._loop = loop
        self._watched = watched
        self._follower = follower
        self._owner = owner
        self._queue: queue.SimpleQueue[Operation | None] = queue.SimpleQueue()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="relay-sqlite-writer", daemon=True)
        self._thread.start()

    async def submit(self, stream: str, act: Callable[[], T], *, pure: bool = False, size: int = 0) -> T:
        future: asyncio.Future[T] = self._loop.create_future()
        self._queue.put(Operation(act, stream, pure, size, future))
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
                    group.append(Operation(self.store.sweep))
                if group:
                    self._settle(group)
        finally:
            self.store.close()

    def _take(self, timeout_s: float) -> list[Operation]:
        """Everything queued, up to the bounds of a group; waits for the first."""
        group: list[Operation] = []
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

    def _settle(self, group: list[Operation]) -> None:
        """Run a group, then answer its callers, whatever happened."""
        news = [tell for notice in self._commit(group) if (tell := self._news(notice)) is not None]
        try:
            self._loop.call_soon_threadsafe(self._answer, group, news)
        except RuntimeError:
            pass  # The loop was closed under us; nobody is waiting any more.

    def _commit(self, group: list[Operation]) -> list[Notice]:
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
            if journal_error(error) is None and len(group) > 1:
                # One of them cannot be written for a reason of its own, and must not take the others along.
                return [notice for operation in group for notice in self._commit([operation])]
            for operation in group:
                operation.result, operation.error = None, journal_error(error) or error
            return []
        self.commits += 1
        self._on_commit(len(group))
        return store.take_notices()

    def _news(self, notice: Notice) -> Callable[[], None] | None:
        """How to tell of it on the loop's thread; None when nobody here is to hear of it."""
        stream, follower, owner = notice.stream, self._follower, self._owner
        if isinstance(notice, RunOver):
            if owner is None or notice.owner != owner.name:
                return None
            return partial(owner.on_run_over, stream, notice.run)
        # Looked up after the commit: whoever watches later than this reads the journal later than this.
        if stream not in self._watched:
            return None
        if isinstance(notice, Journaled):
            tell = partial(follower.on_frames, stream, notice.previous, notice.frames())
        else:
            told = follower.on_sealed if isinstance(notice, Sealed) else follower.on_deleted
            tell = partial(told, stream)
        return partial(self._tell, stream, tell)

    def _tell(self, stream: str, tell: Callable[[], None]) -> None:
        if stream in self._watched:
            tell()

    def _answer(self, group: list[Operation], news: list[Callable[[], None]]) -> None:
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


def _wall_clock_ms() -> int:
    return time.time_ns() // 1_000_000
