"""The real journals under the model test, and what only their operators can do to them."""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

import redis

from relay.journal.base import Journal
from relay.journal.redis_streams import RedisJournal
from relay.journal.sqlite import SqliteJournal

FOREVER_S = 1e9


class Backend(Protocol):
    """A real journal, and what only its operator can do to it."""

    hints_come_late: bool
    """Whether hints come by another way than answers, so that their arrival must be waited for."""
    rewinds_live: bool
    """Whether its data can be put back under a relay that runs."""
    of_one_process: bool
    """Whether it ends, when it starts, what a former process owned."""

    def journal(self) -> Journal: ...
    def move_clock(self, by_ms: int) -> None: ...
    def pass_ms(self, ms: int) -> None: ...
    def save(self, stream: str, tokens: list[str]) -> Any: ...
    def restore(self, stream: str, tokens: list[str], saved: Any) -> None: ...
    def close(self) -> None: ...


class SqliteBackend:
    hints_come_late = False
    rewinds_live = False
    of_one_process = True

    def __init__(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="relay-model-"))
        self._saved = 0
        self._ms = 1_763_726_400_000
        self._floor_ms = 0

    def journal(self) -> Journal:
        return SqliteJournal(self._directory / "relay.db", synchronous="off", clock_ms=lambda: self._ms)

    def move_clock(self, by_ms: int) -> None:
        self._ms = max(self._ms + by_ms, self._floor_ms)

    def pass_ms(self, ms: int) -> None:
        self._ms = self._floor_ms = max(self._ms, ms) + 1

    def save(self, stream: str, tokens: list[str]) -> Any:
        self._saved += 1
        path = self._directory / f"saved-{self._saved}.db"
        with (
            closing(sqlite3.connect(self._directory / "relay.db")) as source,
            closing(sqlite3.connect(path)) as target,
        ):
            source.backup(target)
        return path

    def restore(self, stream: str, tokens: list[str], saved: Any) -> None:
        for path in self._directory.glob("relay.db*"):
            path.unlink()
        shutil.copy(saved, self._directory / "relay.db")

    def close(self) -> None:
        shutil.rmtree(self._directory)


class RedisBackend:
    hints_come_late = True
    rewinds_live = True
    of_one_process = False

    def __init__(self, url: str) -> None:
        self._url = url
        self._client = redis.Redis.from_url(url, socket_timeout=30)
        self._client.flushdb()

    def journal(self) -> Journal:
        return RedisJournal(self._url, prefix="model", timeout_s=FOREVER_S)

    def move_clock(self, by_ms: int) -> None:
        pass  # it is the server's

    def pass_ms(self, ms: int) -> None:
        while True:
            seconds, micros = self._client.time()
            if seconds * 1000 + micros // 1000 > ms:
                return

    def _keys(self, stream: str, tokens: list[str]) -> list[bytes]:
        keys = list(self._client.scan_iter(f"model:{{{stream}}}:*", count=1000))
        return [*keys, *(f"model:token:{token}".encode() for token in tokens)]

    def save(self, stream: str, tokens: list[str]) -> Any:
        keys = self._keys(stream, tokens)
        with self._client.pipeline() as pipe:
            for key in keys:
                pipe.dump(key)
            return {key: value for key, value in zip(keys, pipe.execute(), strict=True) if value}

    def restore(self, stream: str, tokens: list[str], saved: Any) -> None:
        with self._client.pipeline() as pipe:
            pipe.delete("model:none", *self._keys(stream, tokens))
            for key, value in saved.items():
                pipe.restore(key, 24 * 3600 * 1000, value, replace=True)
            pipe.execute()

    def close(self) -> None:
        self._client.close()
