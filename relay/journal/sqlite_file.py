"""The file of a SQLite journal: its lock, its tables, their rows, and what its errors mean."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from relay.cursor import ORIGIN, Cursor, Extent
from relay.errors import (
    JournalError,
    JournalRefused,
    JournalUnavailable,
    StartupError,
)
from relay.journal.base import (
    RunInfo,
    RunState,
    StreamInfo,
)
from relay.lifecycle import Status
from relay.limits import Retention

APPLICATION_ID = 0x524C5931  # "RLY1": tells a relay journal from another program's database.
SCHEMA_VERSION = 2

BUSY_TIMEOUT_S = 5.0
"""Only a foreign process (a shell, a backup) can make the writer wait; the lock file keeps relays out."""
WAL_MAX_BYTES = 64 * 1024 * 1024
WAL_CHECKPOINT_PAGES = WAL_MAX_BYTES // 4096
"""Pages in the log after which the writing thread itself copies them into the database, whoever waits for it.
Mostly this was done before, beside it: two files are synced, which takes tens of milliseconds."""
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
LIVE = "(streams.retention_s = 0 OR streams.last_ms + streams.retention_s * 1000 >= :now)"
STREAM_COLUMNS = (
    "id, name, created_ms, earliest_seq, last_seq, last_ms, last_data, bytes_held, runs, latest_run, sealed, "
    "max_frames, max_bytes, retention_s"
)
RUN_COLUMNS = (
    "runs.id, runs.name, writer, token, status, reason, error, dialect, start_seq, start_ms, runs.last_seq, "
    "runs.last_ms, runs.last_data, frames, extra, text_bytes, started_ms, ended_ms, ended_no, owner, "
    "idle_ms, max_run_ms, heard_ms, due_ms, superseded_by"
)
INSERT_RUN = (
    "INSERT INTO runs (stream_id, name, writer, token, status, reason, error, dialect, start_seq, start_ms, "
    "last_seq, last_ms, last_data, frames, extra, text_bytes, started_ms, ended_ms, ended_no, owner, "
    f"idle_ms, max_run_ms, heard_ms, due_ms, superseded_by, deliver) VALUES ({', '.join('?' * 26)})"
)
# The columns that change, in the order of `Stream.changes`, `Run.progress` and `Run.turns`.
CHANGING_STREAM = ("earliest_seq", "last_seq", "last_ms", "last_data", "bytes_held", "runs", "latest_run")
PROGRESS_OF_RUN = ("last_seq", "last_ms", "last_data", "frames", "text_bytes")
# Apart from the progress, so that an append touches no index.
TURNS_OF_RUN = (
    *("status", "reason", "error", "dialect", "writer", "owner", "idle_ms", "heard_ms", "due_ms"),
    *("superseded_by", "extra", "ended_ms", "ended_no"),
)


def _update(table: str, columns: Sequence[str]) -> str:
    sets = ", ".join(f"{column} = new.column{number}" for number, column in enumerate(columns, 2))
    return f"UPDATE {table} SET {sets} FROM (VALUES {{rows}}) AS new WHERE {table}.id = new.column1"


UPDATE_STREAMS = _update("streams", CHANGING_STREAM)
UPDATE_PROGRESS = _update("runs", PROGRESS_OF_RUN)
UPDATE_TURNS = _update("runs", TURNS_OF_RUN)


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
class Run:
    """A row of `runs`, in the order of `RUN_COLUMNS`."""

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
    def from_row(cls, row: Sequence[Any]) -> Run:
        """Read a row of `RUN_COLUMNS`."""
        run = cls(*row)
        run.status = Status(run.status)
        return run

    @property
    def last(self) -> Cursor:
        return Cursor(self.last_seq, self.last_ms)

    def idle_from(self, reachable_since_ms: int = 0) -> int:
        """From when on it is silent."""
        return max(self.last_ms, self.heard_ms, reachable_since_ms)

    def when_due(self, reachable_since_ms: int = 0) -> int:
        """When the idle timeout or the greatest age is reached, if nothing is heard of it; 0: never."""
        if self.owner:
            return 0
        idle = [self.idle_from(reachable_since_ms) + self.idle_ms] if self.idle_ms else []
        old = [self.started_ms + self.max_run_ms] if self.max_run_ms else []
        return min(idle + old, default=0)

    def row(self) -> tuple[Any, ...]:
        """What `INSERT_RUN` takes after the stream's id, but for `deliver`."""
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
        """What `UPDATE_PROGRESS` takes."""
        return (self.id, self.last_seq, self.last_ms, self.last_data, self.frames, self.text_bytes)

    def turns(self) -> tuple[Any, ...]:
        """What `UPDATE_TURNS` takes."""
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
class Stream:
    """A row of `streams`, in the order of `STREAM_COLUMNS`, and those of its runs that are cached."""

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
    cached_runs: dict[str, Run] = field(default_factory=dict)

    @property
    def top(self) -> Cursor:
        return Cursor(self.last_seq, self.last_ms) if self.last_seq else ORIGIN

    @property
    def extent(self) -> Extent:
        return Extent(self.created_ms, self.earliest_seq, self.top)

    def expired(self, now_ms: int) -> bool:
        return self.retention_s > 0 and self.last_ms + self.retention_s * 1000 < now_ms

    def changes(self) -> tuple[Any, ...]:
        """What `UPDATE_STREAMS` takes."""
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


def to_ms(seconds: float) -> int:
    return round(seconds * 1000)


def journal_error(error: BaseException) -> JournalError | None:
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


def lock_file(path: Path) -> int:
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


def connect(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)


def open_for_writing(path: Path, synchronous: str) -> sqlite3.Connection:
    """Open the database and make it ours; raises `StartupError`."""
    if sqlite3.sqlite_version_info < MIN_SQLITE:
        needed = ".".join(map(str, MIN_SQLITE))
        raise StartupError(f"This Python has SQLite {sqlite3.sqlite_version}; relay needs {needed} or newer.")
    if synchronous not in ("off", "normal", "full", "extra"):
        raise StartupError(f"'{synchronous}' is not a synchronous mode: say off, normal, full or extra.")
    try:
        with contextlib.suppress(FileExistsError):
            # For this user alone, as SQLite then makes its other files too: it is what people said.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        db = connect(path)
    except (sqlite3.Error, OSError) as error:
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
    db.execute(f"PRAGMA wal_autocheckpoint = {WAL_CHECKPOINT_PAGES}")
    # Whole or not at all: a start that is killed here begins again. Finds out whether we may write, too.
    db.executescript(f"BEGIN IMMEDIATE; {'' if tables else SCHEMA} COMMIT;")
