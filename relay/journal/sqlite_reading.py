"""What is read from a SQLite journal. Every query runs in one read transaction, and sees one instant."""

from __future__ import annotations

import asyncio
import re
import shutil
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from relay.cursor import ORIGIN, Cursor
from relay.errors import InvalidParameter, unknown_run, unknown_stream
from relay.frame import Frame
from relay.journal.base import (
    Condition,
    EndedRun,
    Page,
    RunInfo,
    RunState,
    StreamInfo,
    StreamTop,
)
from relay.journal.sqlite_file import (
    LIVE,
    RUN_COLUMNS,
    STREAM_COLUMNS,
    Run,
    Stream,
    connect,
    journal_error,
)
from relay.lifecycle import Status

T = TypeVar("T")

READ_THREADS = 2


class Readers:
    """A few threads that read, each time with a connection nobody else is using."""

    def __init__(self, path: Path) -> None:
        self._pool = ThreadPoolExecutor(READ_THREADS, thread_name_prefix="relay-sqlite-reader")
        self._connections = [connect(path) for _ in range(READ_THREADS)]
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
            raise journal_error(error) or error from None
        finally:
            self._connections.append(db)

    def close(self) -> None:
        """Finish what is queued. Blocks."""
        self._pool.shutdown(wait=True)
        for db in self._connections:
            db.close()


@contextmanager
def _snapshot(db: sqlite3.Connection) -> Iterator[None]:
    """One read transaction: everything read within is of the same instant."""
    db.execute("BEGIN")
    try:
        yield
    finally:
        db.execute("COMMIT")


def _known_stream(db: sqlite3.Connection, now: int, name: str) -> Stream:
    row = db.execute(
        f"SELECT {STREAM_COLUMNS} FROM streams WHERE name = :name AND {LIVE}", {"name": name, "now": now}
    ).fetchone()
    if row is None:
        raise unknown_stream(name)
    return Stream(*row)


def read_page(
    db: sqlite3.Connection, now: int, name: str, after: Cursor, max_frames: int, max_bytes: int
) -> Page:
    """See `Journal.read`."""
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


def open_runs(db: sqlite3.Connection, stream: Stream) -> list[str]:
    """Names of the stream's open runs, oldest first."""
    rows: Iterable[tuple[str]] = db.execute(
        "SELECT name FROM runs WHERE stream_id = ? AND status = 'open' ORDER BY id", (stream.id,)
    )
    return [name for (name,) in rows]


def _stream_infos(db: sqlite3.Connection, where: str, values: Mapping[str, Any]) -> list[StreamInfo]:
    rows = db.execute(
        f"SELECT {STREAM_COLUMNS}, coalesce(metadata, '') "
        f"FROM streams LEFT JOIN stream_texts ON stream_id = id WHERE {LIVE} AND {where}",
        values,
    ).fetchall()
    streams = ((Stream(*row), metadata) for *row, metadata in rows)
    return [stream.info(open_runs(db, stream), metadata) for stream, metadata in streams]


def describe(db: sqlite3.Connection, now: int, name: str) -> StreamInfo:
    """See `Journal.describe`."""
    found = _stream_infos(db, "name = :name", {"name": name, "now": now})
    if not found:
        raise unknown_stream(name)
    return found[0]


def list_streams(db: sqlite3.Connection, now: int, after: str, limit: int) -> list[StreamInfo]:
    """See `Journal.streams`."""
    values = {"after": after, "now": now, "limit": max(0, limit)}
    return _stream_infos(db, "name > :after ORDER BY name LIMIT :limit", values)


_SELECT_RUN_INFOS = (
    f"SELECT {RUN_COLUMNS}, coalesce(metadata, ''), coalesce(answer, '') "
    "FROM runs LEFT JOIN run_texts ON run_id = runs.id "
)


def _run_info(row: Sequence[Any]) -> RunInfo:
    return Run.from_row(row[:-2]).info(*row[-2:])


def read_run(db: sqlite3.Connection, now: int, stream_name: str, name: str) -> RunInfo:
    """See `Journal.run`."""
    stream = _known_stream(db, now, stream_name)
    row = db.execute(
        f"{_SELECT_RUN_INFOS} WHERE stream_id = ? AND runs.name = ?", (stream.id, name)
    ).fetchone()
    if row is None:
        raise unknown_run(name)
    return _run_info(row)


def list_runs(db: sqlite3.Connection, now: int, stream_name: str, after: str, limit: int) -> list[RunInfo]:
    """See `Journal.runs`."""
    stream = _known_stream(db, now, stream_name)
    after_id = 0
    if after:
        row = db.execute(
            "SELECT id FROM runs WHERE stream_id = ? AND name = ?", (stream.id, after)
        ).fetchone()
        if row is None:
            raise unknown_run(after)
        (after_id,) = row
    rows = db.execute(
        f"{_SELECT_RUN_INFOS} WHERE stream_id = ? AND runs.id > ? ORDER BY runs.id LIMIT ?",
        (stream.id, after_id, max(0, limit)),
    )
    return [_run_info(row) for row in rows]


def read_states(db: sqlite3.Connection, now: int, runs: Sequence[tuple[str, str]]) -> list[RunState | None]:
    """See `Journal.states`."""
    select = (
        "SELECT status, reason, writer, runs.last_seq, runs.last_ms "
        f"FROM runs JOIN streams ON streams.id = stream_id WHERE streams.name = :stream AND {LIVE} "
        "AND runs.name = :run"
    )
    rows = (db.execute(select, {"stream": stream, "run": run, "now": now}).fetchone() for stream, run in runs)
    return [
        None if row is None else RunState(Status(row[0]), row[1], row[2], Cursor(row[3], row[4]))
        for row in rows
    ]


def list_owned(db: sqlite3.Connection, now: int, owner: str, limit: int) -> list[tuple[str, str]]:
    """See `Journal.owned`."""
    return db.execute(
        "SELECT streams.name, runs.name FROM runs INDEXED BY runs_open "
        "JOIN streams ON streams.id = stream_id "
        f"WHERE status = 'open' AND owner = :owner AND {LIVE} LIMIT :limit",
        {"now": now, "owner": owner, "limit": max(0, limit)},
    ).fetchall()


def list_due(db: sqlite3.Connection, now: int, limit: int) -> list[tuple[str, str]]:
    """See `Journal.due_runs`."""
    return db.execute(
        "SELECT streams.name, runs.name FROM runs JOIN streams ON streams.id = stream_id "
        f"WHERE status = 'open' AND due_ms > 0 AND due_ms <= :now AND {LIVE} ORDER BY due_ms LIMIT :limit",
        {"now": now, "limit": max(0, limit)},
    ).fetchall()


# Of an ended run: numbers that SQLite holds.
_PLACE = re.compile(r"([0-9]{1,18})-([0-9]{1,18})", re.ASCII)


def list_ended(
    db: sqlite3.Connection, now: int, ended_after_ms: int, after: str, limit: int
) -> list[EndedRun]:
    """See `Journal.ended_runs`."""
    # By number within one ms, so that what is listed after a place ended after it.
    place = _PLACE.fullmatch(after or "0-0")
    if place is None:
        raise InvalidParameter("No page of ended runs ended so.", parameter="after")
    after_ms, after_no = int(place[1]), int(place[2])
    rows = db.execute(
        f"SELECT {RUN_COLUMNS}, coalesce(metadata, ''), coalesce(answer, ''), streams.name "
        "FROM runs JOIN streams ON streams.id = runs.stream_id LEFT JOIN run_texts ON run_id = runs.id "
        f"WHERE ended_no > 0 AND ended_ms > :ended_after AND (ended_ms, ended_no) > (:ms, :no) AND {LIVE} "
        "ORDER BY ended_ms, ended_no LIMIT :limit",
        {"ended_after": ended_after_ms, "ms": after_ms, "no": after_no, "now": now, "limit": max(0, limit)},
    )
    ended = []
    for *row, stream in rows:
        run = Run.from_row(row[:-2])
        ended.append(EndedRun(f"{run.ended_ms}-{run.ended_no}", stream, run.info(*row[-2:])))
    return ended


def read_tops(db: sqlite3.Connection, now: int, names: Sequence[str]) -> dict[str, StreamTop]:
    """See `Journal.tops`."""
    tops = {}
    for name in names:
        select = f"SELECT last_seq, last_ms, sealed FROM streams WHERE name = :name AND {LIVE}"
        row = db.execute(select, {"name": name, "now": now}).fetchone()
        if row is not None:
            seq, ms, sealed = row
            tops[name] = StreamTop(Cursor(seq, ms) if seq else ORIGIN, bool(sealed))
    return tops


def read_condition(db: sqlite3.Connection, now: int, path: Path, synchronous: str) -> Condition:
    """See `Journal.condition`."""
    (waiting_since,) = db.execute(
        "SELECT min(ended_ms) FROM runs JOIN streams ON streams.id = stream_id "
        f"WHERE deliver = 1 AND status <> 'open' AND {LIVE}",
        {"now": now},
    ).fetchone()
    log = path.with_name(path.name + "-wal")
    return Condition(
        kind="sqlite",
        version=sqlite3.sqlite_version,
        now_ms=now,
        waiting_since_ms=waiting_since or 0,
        details={
            "file_bytes": path.stat().st_size,
            "log_bytes": log.stat().st_size if log.exists() else 0,
            "disk_free_bytes": shutil.disk_usage(path.parent).free,
            "synchronous": synchronous,
        },
    )


def resolve_token(db: sqlite3.Connection, now: int, token: str) -> tuple[str, str] | None:
    """See `Journal.resolve_token`."""
    row: tuple[str, str] | None = db.execute(
        "SELECT streams.name, runs.name FROM runs JOIN streams ON streams.id = stream_id "
        "WHERE token = :token AND token <> '' "
        f"AND {LIVE} ORDER BY runs.id DESC LIMIT 1",
        {"token": token, "now": now},
    ).fetchone()
    return row
