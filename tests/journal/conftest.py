"""Journals that a test has to itself: the file and the clock of one in SQLite, the server of one in Redis."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from journal_file import SteeredClock
from redis_server import RedisServer


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "relay.db"


@pytest.fixture
def clock() -> SteeredClock:
    return SteeredClock()


@pytest.fixture
def own_server() -> Iterator[RedisServer]:
    """A redis-server that this test may configure or kill; it keeps what it accepted."""
    server = RedisServer.start("--appendonly", "yes", "--appendfsync", "always")
    yield server
    server.stop()
