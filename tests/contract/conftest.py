"""The contract suite's journals: one of each backend for the whole session, on one event loop."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from relay.cursor import Cursor
from relay.frame import Frame
from relay.journal.base import Journal
from relay.journal.redis_streams import RedisJournal
from relay.journal.sqlite import SqliteJournal

DEADLINE_S = 10.0


class Heard(NamedTuple):
    """One call of the follower."""

    call: str
    previous: Cursor | None = None
    frames: Sequence[Frame] = ()


class Ear:
    """A follower that remembers what it was told of each stream."""

    def __init__(self) -> None:
        self.heard: defaultdict[str, list[Heard]] = defaultdict(list)
        self._told = asyncio.Event()

    def on_frames(self, stream: str, previous: Cursor, frames: Sequence[Frame]) -> None:
        self._note(stream, Heard("frames", previous, list(frames)))

    def on_deleted(self, stream: str) -> None:
        self._note(stream, Heard("deleted"))

    def on_doubt(self, stream: str) -> None:
        self._note(stream, Heard("doubt"))

    async def hears(self, stream: str, call: str, count: int = 1) -> list[Heard]:
        """Wait until the follower was called so often for the stream; answers those calls."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                calls = [heard for heard in self.heard[stream] if heard.call == call]
                if len(calls) >= count:
                    return calls
                self._told.clear()
                await self._told.wait()

    def _note(self, stream: str, heard: Heard) -> None:
        self.heard[stream].append(heard)
        self._told.set()


@pytest.fixture(scope="session")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run `async def` tests on the session's loop, because a journal belongs to one loop."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = inspect.signature(pyfuncitem.obj).parameters
    runner = pyfuncitem._request.getfixturevalue("runner")
    test = pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in names})
    runner.run(asyncio.wait_for(test, 6 * DEADLINE_S))
    return True


class Opened(NamedTuple):
    journal: Journal
    ear: Ear


@pytest.fixture(scope="session", params=["sqlite", "redis"])
def backend(
    request: pytest.FixtureRequest, runner: asyncio.Runner, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Opened]:
    journal: Journal
    if request.param == "sqlite":
        journal = SqliteJournal(tmp_path_factory.mktemp("journal") / "relay.db")
    else:
        journal = RedisJournal(request.getfixturevalue("redis_server").url(), prefix="contract")
    ear = Ear()
    runner.run(journal.start(ear))
    yield Opened(journal, ear)
    runner.run(journal.close())


@pytest.fixture
def journal(backend: Opened) -> Journal:
    return backend.journal


@pytest.fixture
def ear(backend: Opened) -> Ear:
    return backend.ear


_numbers = itertools.count(1)


@pytest.fixture
def name(request: pytest.FixtureRequest) -> Callable[[str], str]:
    """Names no other test uses."""
    test = re.sub(r"[^a-z0-9]+", "-", request.node.originalname)[:80]
    number = next(_numbers)
    return lambda suffix: f"{test}.{number}.{suffix}"


@pytest.fixture
def stream(name: Callable[[str], str]) -> str:
    return name("stream")


class SteeredClock:
    """A clock that stands where it is put."""

    def __init__(self, ms: int) -> None:
        self.ms = ms

    def __call__(self) -> int:
        return self.ms


@pytest.fixture
def clock() -> SteeredClock:
    return SteeredClock(1_763_726_400_000)


@pytest.fixture(params=["sqlite"])
def steered(clock: SteeredClock, runner: asyncio.Runner, tmp_path: Path) -> Iterator[SqliteJournal]:
    """A journal whose clock the test steers; Redis's clock is its server's and cannot be."""
    journal = SqliteJournal(tmp_path / "relay.db", clock_ms=clock)
    runner.run(journal.start(Ear()))
    yield journal
    runner.run(journal.close())
