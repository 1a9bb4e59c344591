"""Journals in a Redis, what they are told in tests of Redis alone, and what they tell."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import redis
from redis_server import RedisServer

from relay.cursor import ORIGIN, Cursor
from relay.errors import JournalUnavailable
from relay.frame import Event, Frame
from relay.journal.base import Append, Page, RunOpening
from relay.journal.redis_connection import Lane, Link
from relay.journal.redis_streams import RedisJournal
from relay.lifecycle import Ending
from relay.limits import Retention

T = TypeVar("T")

DEADLINE_S = 120.0


class Ear:
    """A follower, and an owner, that remembers what it was told."""

    def __init__(self, name: str = "me") -> None:
        self.name = name
        self.over: list[tuple[str, str]] = []
        self.frames: list[tuple[str, Cursor, Sequence[Frame]]] = []
        self.doubts: list[str] = []
        self.deleted: list[str] = []
        self.sealed: list[str] = []
        self._told = asyncio.Event()

    def on_frames(self, stream: str, previous: Cursor, frames: Sequence[Frame]) -> None:
        self.frames.append((stream, previous, frames))
        self._told.set()

    def on_deleted(self, stream: str) -> None:
        self.deleted.append(stream)
        self._told.set()

    def on_sealed(self, stream: str) -> None:
        self.sealed.append(stream)
        self._told.set()

    def on_doubt(self, stream: str) -> None:
        self.doubts.append(stream)
        self._told.set()

    def on_run_over(self, stream: str, run: str) -> None:
        self.over.append((stream, run))
        self._told.set()

    async def until(self, heard: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not heard():
                self._told.clear()
                await self._told.wait()


@asynccontextmanager
async def opened(
    server: RedisServer | str,
    *,
    db: int = 0,
    prefix: str = "relay",
    owner: str = "me",
) -> AsyncIterator[tuple[RedisJournal, Ear]]:
    """A journal in a server, or under a URL, and who hears what it tells."""
    url = server if isinstance(server, str) else server.url(db)
    journal, ear = RedisJournal(url, prefix=prefix, timeout_s=DEADLINE_S), Ear(owner)
    await journal.start(ear, ear)
    try:
        yield journal, ear
    finally:
        await journal.close()


def wait_no_longer_than(timeout_s: float, *links: Link) -> None:
    """For a server that does not answer. Not from the start on: one that does may take its time, too."""
    for link in links:
        link._timeout_s = timeout_s
        if isinstance(link, Lane) and link._watchdog is not None:
            link._watchdog.cancel()  # it would look when what was asked before should have been answered
            link._watchdog = None


def links(journal: RedisJournal) -> list[Link]:
    """All that a started journal has."""
    found = (journal._writing, journal._reading, journal._following)
    return [link for link in found if link is not None]


def opening(stream: str, run: str = "r1", retention: Retention | None = None, **more: Any) -> RunOpening:
    return RunOpening(stream, run, f"writer-{run}", f"token-{stream}-{run}", retention or Retention(), **more)


def batch(
    stream: str, seq: int, *data: bytes, run: str = "r1", end: Ending | None = None, **more: Any
) -> Append:
    return Append(stream, run, f"writer-{run}", seq, [Event("e", each) for each in data], ending=end, **more)


async def read_all(journal: RedisJournal, stream: str) -> list[Frame]:
    frames: list[Frame] = []
    page: Page | None = None
    while page is None or page.more:
        page = await journal.read(stream, frames[-1].id if frames else ORIGIN, 100, 1_000_000)
        frames += page.frames
    return frames


async def persistently(operation: Callable[[], Awaitable[T]]) -> T:
    """Repeat while the outcome is unknown, as every caller of a journal may."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            try:
                return await operation()
            except JournalUnavailable:
                await asyncio.sleep(0)


def state(client: redis.Redis, pattern: str = "*") -> dict[bytes, object]:
    """Everything the keys hold."""
    found: dict[bytes, object] = {}
    for key in client.keys(pattern):
        assert isinstance(key, bytes)
        match client.type(key):
            case b"hash":
                found[key] = client.hgetall(key)
            case b"zset":
                found[key] = client.zrange(key, 0, -1, withscores=True)
            case b"stream":
                found[key] = client.xrange(key)
            case _:
                found[key] = client.get(key)
    return found
