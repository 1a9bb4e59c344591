"""A SQLite journal in a file of its own, its clock steered, and a look into the file as a shell has it."""

from __future__ import annotations

import asyncio
import functools
import sqlite3
from collections.abc import Awaitable, Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, ParamSpec

from relay.cursor import ORIGIN, Cursor
from relay.frame import Event, Frame
from relay.journal.base import Append, Page, RunOpening
from relay.journal.sqlite import SqliteJournal
from relay.limits import Retention

P = ParamSpec("P")

NOON = 1_763_726_400_000
DAY_S = 24 * 3600
DEADLINE_S = 300


def on_a_loop(test: Callable[P, Awaitable[None]]) -> Callable[P, None]:
    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        async def in_time() -> None:
            await asyncio.wait_for(test(*args, **kwargs), DEADLINE_S)

        asyncio.run(in_time())

    return run


class Notes:
    """A follower that writes down what it is told."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.deleted: list[str] = []
        self.sealed: list[str] = []

    def on_frames(self, stream: str, previous: Cursor, frames: Sequence[Frame]) -> None:
        self.frames += frames

    def on_deleted(self, stream: str) -> None:
        self.deleted.append(stream)

    def on_sealed(self, stream: str) -> None:
        self.sealed.append(stream)

    def on_doubt(self, stream: str) -> None:
        pass


class Me:
    """A process as the owner of runs, which writes down what it is told."""

    def __init__(self, name: str = "me") -> None:
        self.name = name
        self.over: list[tuple[str, str]] = []

    def on_run_over(self, stream: str, run: str) -> None:
        self.over.append((stream, run))


class SteeredClock:
    def __init__(self) -> None:
        self.ms = NOON

    def __call__(self) -> int:
        return self.ms


async def started(path: Path, **options: Any) -> SqliteJournal:
    journal = SqliteJournal(path, **options)
    await journal.start(Notes())
    return journal


def opening(stream: str = "s", run: str = "r", **changes: Any) -> RunOpening:
    given: dict[str, Any] = {"writer": "w", "token": f"token-{stream}-{run}", "retention": Retention(0, 0, 0)}
    return RunOpening(stream, run, **(given | changes))


def batch(seq: int, *data: bytes, stream: str = "s", run: str = "r", **changes: Any) -> Append:
    given: dict[str, Any] = {"events": [Event("delta", each) for each in data]}
    return Append(stream, run, "w", seq, **(given | changes))


async def page(journal: SqliteJournal, stream: str = "s") -> Page:
    return await journal.read(stream, ORIGIN, 1_000_000, 1 << 40)


def rows(path: Path, query: str) -> list[tuple[Any, ...]]:
    """Ask the file itself, as a shell would."""
    with closing(sqlite3.connect(path)) as db:
        return db.execute(query).fetchall()


def count(path: Path, table: str) -> int:
    counted: int = rows(path, f"SELECT count(*) FROM {table}")[0][0]
    return counted


async def in_writer(journal: SqliteJournal, sql: str) -> None:
    """Run SQL on the writing connection: the limits SQLite has for a disk that is full belong to one."""
    writer = journal._writer
    assert writer is not None
    await writer.submit("", lambda: writer.store._db.execute(sql).fetchall())


async def refusals(journal: SqliteJournal, *calls: Awaitable[Any]) -> list[type]:
    return [type(each) for each in await asyncio.gather(*calls, return_exceptions=True)]
