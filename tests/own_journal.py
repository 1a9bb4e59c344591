"""A journal that a test has for itself, opened in its own process and event loop."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from deaf_follower import DeafFollower

from relay.journal.base import Journal
from relay.journal.redis_streams import RedisJournal
from relay.journal.sqlite import SqliteJournal


@contextlib.asynccontextmanager
async def own_journal(url: str, prefix: str) -> AsyncIterator[Journal]:
    """The journal at a URL. Those in one Redis are kept apart by `prefix`."""
    journal: Journal
    if url.startswith("sqlite:"):
        journal = SqliteJournal(Path(url.removeprefix("sqlite:///")))
    else:
        journal = RedisJournal(url, prefix=prefix, timeout_s=60)  # for a machine that is busy
    await journal.start(DeafFollower())
    try:
        yield journal
    finally:
        await journal.close()
