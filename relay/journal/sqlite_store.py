"""What is written to a SQLite journal, and by which rules: the operations of its writing thread.

Appends, which are nearly all of the work, touch no SQL of their own: they are judged and applied on cached
state, and `Store.flush` writes what a group of them comes to in a few statements.
This is not only quicker. `sqlite3` gives up the interpreter lock at every step of a statement, and may wait
a switch interval (5 ms) or longer to get it back from a busy event loop: few steps, few such waits.
The cache is write-back inside a transaction and never outlives a doubt: whatever fails to reach the
database takes the cached state with it, and the next operation reads the database.

Every other operation is preceded by a flush and runs under a savepoint.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Any, NamedTuple

import orjson

from relay.cursor import ORIGIN, Cursor
from relay.dialects import detect
from relay.errors import (
    Diverged,
    Fenced,
    Rewound,
    RunEnded,
    RunExists,
    SequenceGap,
    StreamBusy,
    StreamSealed,
    UnknownRun,
    UnknownStream,
    unknown_run,
    unknown_stream,
)
from relay.frame import CONTROL_EVENT, Event, Frame, run_ended, run_started, run_superseded
from relay.journal.base import (
    Append,
    Appended,
    Claim,
    Delivery,
    Ended,
    Held,
    Opened,
    Orphan,
    RunOpening,
    RunState,
    StreamChange,
    TakenOver,
)
from relay.journal.sqlite_file import (
    CHANGING_STREAM,
    INSERT_RUN,
    LIVE,
    PROGRESS_OF_RUN,
    RUN_COLUMNS,
    STREAM_COLUMNS,
    TURNS_OF_RUN,
    UPDATE_PROGRESS,
    UPDATE_STREAMS,
    UPDATE_TURNS,
    Run,
    Stream,
    journal_error,
    to_ms,
)
from relay.journal.sqlite_reading import open_runs
from relay.lifecycle import OWNER_LOST, TRANSITIONS, Act, Ending, Reason, Status, allowed, ending
from relay.limits import Retention

SWEEP_MAX_ROWS = 1000
"""Rows of each kind that one sweep removes, so that it never holds up appends for long."""
TOMBSTONE_KEEP_MS = 2 * 24 * 3600 * 1000
CACHE_MAX_ROWS = 16 * 1024
"""Streams and runs cached before a group begins; the group can only add as many as it has operations."""
ROWS_AT_ONCE = (256, 64, 16, 4, 1)
"""Rows of the prepared statements that write many, so that any number of rows takes few steps."""
RUNS_AFTER_MAX = 64
"""Names in `Opened.runs_after`."""
_FRAME_COLUMNS = 6
_INSERT_FRAMES = "INSERT INTO frames VALUES {rows}"


@cache
def _for_rows(sql: str, rows: int, columns: int) -> str:
    row = "(" + ", ".join("?" * columns) + ")"
    return sql.format(rows=", ".join([row] * rows))


class Journaled(NamedTuple):
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


class Sealed(NamedTuple):
    stream: str


class Deleted(NamedTuple):
    stream: str


class RunOver(NamedTuple):
    """A run was ended or taken over by somebody else than its owner."""

    stream: str
    run: str
    owner: str


Notice = Journaled | Sealed | Deleted | RunOver
"""What is to be told once it is committed."""


@dataclass(slots=True)
class Operation:
    """`act` is run in the writing thread. One that is `pure` writes no SQL before the flush and raises before
    it changes anything, so it needs no savepoint. `stream` is the one it touches; empty: any."""

    act: Callable[[], Any]
    stream: str = ""
    pure: bool = False
    size: int = 0
    future: asyncio.Future[Any] | None = None
    result: Any = None
    error: BaseException | None = None


class Store:
    """The operations that write, on the one connection that writes. Belongs to the writing thread."""

    def __init__(self, db: sqlite3.Connection, clock_ms: Callable[[], int]) -> None:
        self._db = db
        self._clock_ms = clock_ms
        self._streams: dict[str, Stream] = {}
        self._cached = 0
        self._rows: list[Any] = []
        self._changed_streams: dict[int, Stream] = {}
        self._moved_runs: dict[int, Run] = {}
        self._turned_runs: dict[int, Run] = {}
        self._answers: dict[int, str] = {}
        (self._endings,) = db.execute(
            "SELECT coalesce(max(ended_no), 0) FROM runs WHERE ended_no > 0"
        ).fetchone()
        self._notices: list[Notice] = []
        self.unswept = True
        """Whether a sweep is due at once: after a start, a deletion, and a sweep that left something."""

    # Transactions.

    def begin(self) -> None:
        """Begin a group's transaction."""
        if self._cached > CACHE_MAX_ROWS:
            self._forget("")
        self._db.execute("BEGIN IMMEDIATE")

    def perform(self, operation: Operation) -> None:
        """Run one operation. What is wrong with it alone is kept in it; what dooms the group is raised."""
        if operation.pure:
            try:
                operation.result, operation.error = operation.act(), None
            except Exception as error:
                if not self._db.in_transaction:
                    raise
                operation.result, operation.error = None, journal_error(error) or error
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
            operation.result, operation.error = None, journal_error(error) or error
        self._db.execute("RELEASE operation")

    def flush(self) -> None:
        """Write the changes that appends have left in the cached state, and apply retention."""
        self._write(_INSERT_FRAMES, _FRAME_COLUMNS, self._rows)
        self._rows.clear()
        for stream in self._changed_streams.values():
            self._retain(stream)
        streams = [value for stream in self._changed_streams.values() for value in stream.changes()]
        self._write(UPDATE_STREAMS, 1 + len(CHANGING_STREAM), streams)
        self._changed_streams.clear()
        moved = [value for run in self._moved_runs.values() for value in run.progress()]
        self._write(UPDATE_PROGRESS, 1 + len(PROGRESS_OF_RUN), moved)
        self._moved_runs.clear()
        turned = [value for run in self._turned_runs.values() for value in run.turns()]
        self._write(UPDATE_TURNS, 1 + len(TURNS_OF_RUN), turned)
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

    def take_notices(self) -> list[Notice]:
        """What is to be told since the last time."""
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

    def delete(self, name: str) -> list[str]:
        now = self._clock_ms()
        stream = self._clear_of_expired(name, now)
        if stream is None:
            return []
        how = ending(Reason.STREAM_DELETED)
        open_runs = self._open_runs(stream)
        for run in open_runs:
            self._end(stream, run, how, detect.error_events(how), now)
        self._bury(stream, now)
        return [run.name for run in open_runs]

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
        names = tuple(run.name for run in superseded if run.status is Status.OPEN)
        names += tuple(run.name for run in ended_before)
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
            raise unknown_stream(batch.stream)
        if run is None:
            raise unknown_run(batch.run)
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
            fresh += _closing(run.name, ending, batch.error_event, frames, text_bytes)

        # Nothing from here on may raise: the cached state would be left half changed.
        self._learn(run, batch.dialect, batch.answer)
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
        run = None if stream is None else self._find_run(stream, opening.run)
        top, first = ORIGIN if stream is None else stream.top, held.first
        if run is None and self._former_ms(opening.stream) >= first.ms:
            raise _ended(Status.CANCELLED, Reason.STREAM_DELETED)
        count = len(held.events) + (held.error_event is not None) + (held.ending is not None)
        there = max(0, min(count, top.seq - first.seq + 1))
        if there and (stream is None or run is None or self._others_at(stream, run, first, there)):
            raise Diverged("The journal holds other frames in their place.", last_seq=top.seq)
        if there == count:
            return
        if stream is not None and first.ms < stream.last_ms:
            raise Diverged("The journal was written on at a later time.", last_seq=top.seq)
        if first.seq > top.seq + 1:
            raise Rewound("Frames before these are missing.", last_seq=top.seq)
        if run is None and held.producer_seq:
            raise Diverged("The journal lost the opening of the run, and has others since.", last_seq=top.seq)
        if run is not None and run.writer != opening.writer:
            raise Fenced("The writer token is not the run's, or no longer.")
        if run is not None and run.status is not Status.OPEN:
            raise self._has_ended(run)

        if stream is None:
            stream = self._create(opening.stream, opening.retention, first.ms)
        if run is None:
            run = self._insert_run(stream, opening, top, first.ms, "")
            if opening.seal:
                self._seal(stream)
        else:
            self._learn(run, opening.dialect, opening.answer)
        appended = max(0, len(held.events) - there) if held.producer_seq else 0
        if appended:
            run.frames += appended
            run.text_bytes += held.text_bytes * appended // len(held.events)
        events = list(held.events)
        if held.ending is not None:
            events += _closing(run.name, held.ending, held.error_event, run.frames, run.text_bytes)
        self._journal(stream, run, first.ms, events[there:])
        run.extra += count - there - appended
        self._hear_of(run, now)
        if held.ending is not None:
            self._turn(run, held.ending)

    def take_over(self, stream_name: str, name: str, writer: str, idle_ms: int) -> TakenOver:
        now = self._clock_ms()
        stream, run = self._known_run(stream_name, name, now)
        if not allowed(run.status, Act.TAKE_OVER):
            raise self._has_ended(run)
        run.writer = writer
        if run.owner:
            self._notices.append(RunOver(stream.name, run.name, run.owner))
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
            return Ended(False, run.status, run.reason, run.owner, run.text_bytes)
        due_ms = run.when_due(reachable_since_ms)
        if due_ms == 0 or due_ms > now:
            run.due_ms = due_ms
            self._turned_runs[run.id] = run
            return None
        silent = run.idle_ms > 0 and run.idle_from(reachable_since_ms) + run.idle_ms <= now
        reason = Reason.IDLE_TIMEOUT if silent else Reason.MAX_RUN
        self._end(stream, run, ending(reason), error_events.get(reason, {}), now)
        return Ended(True, run.status, run.reason, run.owner, run.text_bytes)

    def end_orphans(self, owner: str) -> list[Orphan]:
        """End the open runs that belong to a process other than this owner, which must be a former one."""
        now = self._clock_ms()
        orphans = self._db.execute(
            "SELECT streams.name, runs.name FROM runs INDEXED BY runs_open "
            "JOIN streams ON streams.id = stream_id "
            f"WHERE status = 'open' AND owner NOT IN ('', :owner) AND {LIVE} ORDER BY runs.id",
            {"owner": owner, "now": now},
        ).fetchall()
        said = detect.error_events(OWNER_LOST)
        told = []
        for stream_name, name in orphans:
            stream, run = self._known_run(stream_name, name, now)
            self._end(stream, run, OWNER_LOST, said, now)
            ended = Ended(True, run.status, run.reason, run.owner, run.text_bytes)
            told.append(Orphan(stream_name, name, ended))
        return told

    # Operations on deliveries, whose columns are not cached.

    def claim_deliveries(self, limit: int, lease_ms: int) -> list[Delivery]:
        now = self._clock_ms()
        due = self._db.execute(
            "SELECT runs.id, streams.name, runs.name, tries FROM runs JOIN streams ON streams.id = stream_id "
            f"WHERE deliver = 1 AND status <> 'open' AND next_try_ms <= :now AND {LIVE} "
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
            f"SELECT {STREAM_COLUMNS} FROM streams WHERE NOT {LIVE} LIMIT {SWEEP_MAX_ROWS}", {"now": now}
        ).fetchall()
        for row in expired:
            self._bury(Stream(*row), now)
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

    def _find_stream(self, name: str) -> Stream | None:
        stream = self._streams.get(name)
        if stream is None:
            select = f"SELECT {STREAM_COLUMNS} FROM streams WHERE name = ?"
            row = self._db.execute(select, (name,)).fetchone()
            if row is None:
                return None
            stream = self._streams[name] = Stream(*row)
            stream.keep_from = self._undelivered_from(stream)
            self._cached += 1
        return stream

    def _clear_of_expired(self, name: str, now: int) -> Stream | None:
        """The stream, if it has not expired; one that has is buried."""
        stream = self._find_stream(name)
        if stream is not None and stream.expired(now):
            self._bury(stream, now)
            return None
        return stream

    def _known_stream(self, name: str, now: int) -> Stream:
        stream = self._find_stream(name)
        if stream is None or stream.expired(now):
            raise unknown_stream(name)
        return stream

    def _known_run(self, stream_name: str, name: str, now: int) -> tuple[Stream, Run]:
        stream = self._known_stream(stream_name, now)
        run = self._find_run(stream, name)
        if run is None:
            raise unknown_run(name)
        return stream, run

    def _find_run(self, stream: Stream, name: str) -> Run | None:
        run = stream.cached_runs.get(name)
        if run is None:
            row = self._db.execute(
                f"SELECT {RUN_COLUMNS} FROM runs WHERE stream_id = ? AND name = ?", (stream.id, name)
            ).fetchone()
            if row is None:
                return None
            run = stream.cached_runs[name] = Run.from_row(row)
            self._cached += 1
        return run

    def _open_runs(self, stream: Stream) -> list[Run]:
        """Oldest first."""
        runs = (self._find_run(stream, name) for name in open_runs(self._db, stream))
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

    def _create(self, name: str, retention: Retention, now: int) -> Stream:
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

    def _insert_run(self, stream: Stream, opening: RunOpening, start: Cursor, ms: int, said: str) -> Run:
        """Add a run whose first frame, at `ms`, is still to be journaled."""
        run = Run(
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
            idle_ms=to_ms(opening.idle_timeout_s),
            max_run_ms=to_ms(opening.max_run_s),
            heard_ms=ms,
        )
        run.due_ms = run.when_due()
        run.id = self._insert(INSERT_RUN, (stream.id, *run.row(), opening.deliver))
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

    def _others_at(self, stream: Stream, run: Run, first: Cursor, count: int) -> bool:
        """Whether so many frames from `first` on are not all this run's, of the same `ms`. Of those that were
        trimmed away nothing can be told."""
        select = (
            "SELECT 1 FROM frames WHERE stream_id = ? AND seq BETWEEN ? AND ? AND (ms <> ? OR run_id <> ?)"
        )
        values = (stream.id, first.seq, first.seq + count - 1, first.ms, run.id)
        return self._db.execute(select, values).fetchone() is not None

    def _opened(self, run: Run) -> Opened:
        """What was answered when it was opened."""
        start, first = Cursor(run.start_seq, run.start_ms), Cursor(run.start_seq + 1, run.started_ms)
        row = self._db.execute("SELECT opened FROM run_texts WHERE run_id = ?", (run.id,)).fetchone()
        if row is None or not row[0]:
            return Opened(start, first, first)
        count, superseded, frames_after, runs_after = orjson.loads(row[0])
        last = Cursor(start.seq + count, first.ms)
        return Opened(start, first, last, tuple(superseded), frames_after, tuple(runs_after))

    def _to_supersede(self, stream: Stream | None, opening: RunOpening) -> list[Run]:
        """The runs that an opening supersedes, oldest first."""
        found: dict[int, Run] = {}
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
                raise unknown_run(name)
            found[run.id] = run
        return [found[run_id] for run_id in sorted(found)]

    def _standing_after(self, stream: Stream, superseded: Sequence[Run]) -> tuple[int, tuple[str, ...]]:
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
        stream: Stream,
        run: Run,
        ending: Ending,
        error_events: Mapping[str, Event],
        now: int,
        *before: Event,
    ) -> None:
        """End a run whoever its writer is. `before` is journaled first."""
        _check_transition(run.status, ending)
        error_event = error_events.get(run.dialect)
        if error_event is not None and not self._was_proxied(run):
            error_event = None
        events = [*before, *_closing(run.name, ending, error_event, run.frames, run.text_bytes)]
        self._journal(stream, run, max(now, stream.last_ms), events)
        run.extra += len(events)
        self._turn(run, ending)
        if run.owner:
            self._notices.append(RunOver(stream.name, run.name, run.owner))

    def _was_proxied(self, run: Run) -> bool:
        row = self._db.execute("SELECT answer <> '' FROM run_texts WHERE run_id = ?", (run.id,)).fetchone()
        return row is not None and bool(row[0])

    def _learn(self, run: Run, dialect: str, answer: str) -> None:
        if dialect and dialect != run.dialect:
            run.dialect = dialect
            self._turned_runs[run.id] = run
        if answer:
            self._answers[run.id] = answer

    def _turn(self, run: Run, ending: Ending) -> None:
        """Note the ending of a run whose terminal frame is its last."""
        run.status, run.reason, run.error = ending.status, ending.reason.value, ending.error
        self._endings += 1
        run.ended_ms, run.ended_no = run.last_ms, self._endings
        self._turned_runs[run.id] = run

    def _hear_of(self, run: Run, now: int) -> None:
        run.heard_ms = max(now, run.heard_ms)
        self._turned_runs[run.id] = run

    def _has_ended(self, run: Run) -> RunEnded:
        return _ended(run.status, run.reason)

    def _seal(self, stream: Stream) -> None:
        if stream.sealed:
            return
        stream.sealed = 1
        self._db.execute("UPDATE streams SET sealed = 1 WHERE id = ?", (stream.id,))
        self._notices.append(Sealed(stream.name))

    def _journal(self, stream: Stream, run: Run, ms: int, events: Sequence[Event]) -> None:
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
        self._notices.append(Journaled(stream.name, previous, ms, run.name, events))

    def _undelivered_from(self, stream: Stream) -> int:
        (start_seq,) = self._db.execute(
            "SELECT min(start_seq) FROM runs WHERE stream_id = ? AND deliver = 1", (stream.id,)
        ).fetchone()
        return 0 if start_seq is None else int(start_seq) + 1

    def _retain(self, stream: Stream) -> None:
        """Drop what the bounds leave no room for, oldest first; the newest frame stays. From the first run
        whose end is still to be delivered, frames have twice the room."""
        if not stream.keep_from:
            self._drop(stream, self._first_within(stream, 1))
            return
        if stream.keep_from > stream.earliest_seq:
            self._drop(stream, min(stream.keep_from, self._first_within(stream, 1)))
        if stream.keep_from <= stream.earliest_seq:
            self._drop(stream, self._first_within(stream, 2))

    def _first_within(self, stream: Stream, times: int) -> int:
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

    def _drop(self, stream: Stream, before_seq: int) -> None:
        if before_seq <= stream.earliest_seq:
            return
        (size,) = self._db.execute(
            "SELECT total(length(data)) FROM frames WHERE stream_id = ? AND seq < ?", (stream.id, before_seq)
        ).fetchone()
        self._db.execute("DELETE FROM frames WHERE stream_id = ? AND seq < ?", (stream.id, before_seq))
        stream.bytes_held -= int(size)
        stream.earliest_seq = before_seq
        self._changed_streams[stream.id] = stream

    def _bury(self, stream: Stream, now: int) -> None:
        """Make a stream unknown. Its frames and runs, unreachable from now on, are left to the sweep."""
        self._db.execute(
            "INSERT OR REPLACE INTO tombstones VALUES (?, ?, ?)",
            (stream.name, stream.last_ms, max(now, stream.last_ms) + TOMBSTONE_KEEP_MS),
        )
        self._db.execute("DELETE FROM streams WHERE id = ?", (stream.id,))
        self._db.execute("DELETE FROM stream_texts WHERE stream_id = ?", (stream.id,))
        self._db.execute("INSERT INTO debris VALUES (?)", (stream.id,))
        self._streams.pop(stream.name, None)
        self._notices.append(Deleted(stream.name))
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


def _closing(
    run: str, ending: Ending, error_event: Event | None, frames: int, text_bytes: int
) -> list[Event]:
    """What is journaled of an ending: what relay itself says, if anything, and the terminal frame."""
    terminal = Event(CONTROL_EVENT, run_ended(run, ending, frames, text_bytes))
    return [terminal] if error_event is None else [error_event, terminal]


def _ended(status: Status, reason: str) -> RunEnded:
    said = f"The run has ended: {status}, {reason}."
    return RunEnded(said, run_status=status.value, reason=str(reason))


def _check_transition(status: Status, ending: Ending) -> None:
    assert any(TRANSITIONS.get((status, act)) is ending.status for act in Act), (status, ending)
