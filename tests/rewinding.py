"""Journals that can be put back to what they were: a failover to a replica that lagged, a restored copy."""

from __future__ import annotations

import contextlib
import secrets
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from deaf_follower import DeafFollower
from redis import Redis
from redis_server import RedisServer

from relay.cursor import ORIGIN
from relay.frame import Frame
from relay.journal.base import Journal, RunOwner
from relay.journal.redis_streams import RedisJournal
from relay.journal.sqlite import SqliteJournal


class UntoldOwner:
    """Owns runs, and hears nothing of them."""

    def __init__(self, name: str) -> None:
        self.name = name

    def on_run_over(self, stream: str, run: str) -> None:
        pass


UNTOLD = UntoldOwner("me")

PATIENCE_S = 60.0
"""For an answer of Redis: no test of these journals is about one that does not come."""


class Rewinding:
    """A real journal, all calls of which go through; `remember` what it holds and `rewind` to that."""

    def __init__(self, inner: Journal) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    async def remember(self) -> None:
        raise NotImplementedError

    async def rewind(self) -> None:
        raise NotImplementedError

    async def frames(self, stream: str) -> list[Frame]:
        return list((await self.inner.read(stream, ORIGIN, 1000, 10**7)).frames)


class RewindingSqlite(Rewinding):
    """Rewound by putting a copy of its file in the place of the file."""

    def __init__(self, path: Path) -> None:
        super().__init__(SqliteJournal(path))
        self._path = path
        self._copy = path.with_suffix(".copy")

    async def start(self, follower: DeafFollower, owner: RunOwner) -> None:
        self._started_with = follower, owner
        await self.inner.start(follower, owner)

    async def remember(self) -> None:
        with (
            contextlib.closing(sqlite3.connect(self._path)) as db,
            contextlib.closing(sqlite3.connect(self._copy)) as copy,
        ):
            db.backup(copy)

    async def rewind(self) -> None:
        await self.inner.close()
        self._exchange_files()
        self.inner = SqliteJournal(self._path)
        await self.inner.start(*self._started_with)

    def _exchange_files(self) -> None:
        for suffix in ("", "-wal", "-shm"):
            Path(f"{self._path}{suffix}").unlink(missing_ok=True)
        self._path.write_bytes(self._copy.read_bytes())


class RewindingRedis(Rewinding):
    """Rewound by putting back what its keys held."""

    def __init__(self, server: RedisServer) -> None:
        self._prefix = secrets.token_hex(6)
        super().__init__(RedisJournal(server.url(), prefix=self._prefix, timeout_s=PATIENCE_S))
        self._server = server
        self._kept: dict[bytes, tuple[int, bytes]] = {}

    async def remember(self) -> None:
        with self._server.client() as redis:
            held = {key: (max(0, redis.pttl(key)), redis.dump(key)) for key in self._keys(redis)}
            # A lease may have lapsed since it was listed.
            self._kept = {key: (ttl_ms, value) for key, (ttl_ms, value) in held.items() if value is not None}

    async def rewind(self) -> None:
        with self._server.client() as redis:
            pipe = redis.pipeline(transaction=True)
            for key in self._keys(redis):
                pipe.delete(key)
            for key, (ttl_ms, value) in self._kept.items():
                pipe.restore(key, ttl_ms, value, replace=True)  # what was sent before may have come since
            pipe.execute()

    def _keys(self, redis: Redis) -> list[bytes]:
        return list(redis.scan_iter(f"{self._prefix}:*", count=1000))  # among those of all other tests


@contextlib.asynccontextmanager
async def rewinding(
    kind: str, path: Path, server: RedisServer, owner: RunOwner = UNTOLD
) -> AsyncIterator[Any]:
    """A journal of a kind ("sqlite", "redis") that nobody else uses, started for an owner."""
    journal: Any = RewindingSqlite(path / "relay.db") if kind == "sqlite" else RewindingRedis(server)
    await journal.start(DeafFollower(), owner)
    try:
        yield journal
    finally:
        await journal.close()
