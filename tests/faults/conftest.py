"""Servers that these tests may harm, and the seam to harm them through."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator

import pytest
from faults.tally import Tally
from redis_server import RedisServer

SOAK = os.environ.get("RELAY_SOAK") == "1"
"""Long, randomly seeded versions of the seeded tests, instead of the short fixed ones."""


@pytest.fixture
def lasting_redis() -> Iterator[RedisServer]:
    """A Redis that keeps what it accepted when it is stopped or killed."""
    server = RedisServer.start("--appendonly", "yes", "--appendfsync", "always")
    yield server
    server.stop()


@pytest.fixture
def seed() -> int:
    """Printed, so that a failing soak can be repeated: RELAY_SEED."""
    given = os.environ.get("RELAY_SEED")
    chosen = int(given) if given else secrets.randbits(32) if SOAK else 20250
    print(f"seed {chosen}")
    return chosen


@pytest.fixture
def soak() -> bool:
    return SOAK


@pytest.fixture
def tally() -> Iterator[Tally]:
    """What the test counted, checked at its end."""
    tally = Tally()
    yield tally
    print(tally)
    tally.assert_clean()
