"""Fixtures of the whole test-suite."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from redis_server import RedisServer


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """A redis-server shared by the tests of this process (each pytest-xdist worker has its own)."""
    server = RedisServer.start()
    yield server
    server.stop()
