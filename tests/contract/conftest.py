"""The contract suite's journals: one of each backend for the whole session, on one event loop."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import re
import secrets
import shutil
import sqlite3
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pytest
import redis
from contract.phrases import DEADLINE_S
from redis_server import RedisServer

from relay.cursor import Cursor
from relay.frame import Frame
from relay.journal.base import Journal
from relay.journal.redis_streams import RedisJournal
from relay.journal.sqlite import SqliteJournal


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

    def on_sealed(self, stream: str) -> None:
        self._note(stream, Heard("sealed"))

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

    async def hears_frames(self, stream: str, count: int) -> list[Frame]:
        """Wait until so many frames were told of the stream; answers them all."""
        calls = 0
        while True:
            calls += 1
            told = await self.hears(stream, "frames", calls)
            frames = [frame for heard in told for frame in heard.frames]
            if len(frames) >= count:
                return frames

    def _note(self, stream: str, heard: Heard) -> None:
        self.heard[stream].append(heard)
        self._told.set()


class Owner:
    """This process as the owner of runs, which remembers what it was told of them."""

    def __init__(self) -> None:
        self.name = f"owner-{secrets.token_hex(8)}"
        self.over: list[tuple[str, str]] = []
        self._told = asyncio.Event()

    def on_run_over(self, stream: str, run: str) -> None:
        self.over.append((stream, run))
        self._told.set()

    async def hears_of(self, stream: str, *runs: str) -> None:
        """Wait until it was told that these runs are over for it."""
        async with asyncio.timeout(DEADLINE_S):
            while not {(stream, run) for run in runs} <= set(self.over):
                self._told.clear()
                await self._told.wait()


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
    runner.run(asyncio.wait_for(test, 5 * DEADLINE_S))
    return True


class Backend(NamedTuple):
    journal: Journal
    ear: Ear
    owner: Owner


@pytest.fixture(scope="session", params=["sqlite", "redis"])
def backend(
    request: pytest.FixtureRequest, runner: asyncio.Runner, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Backend]:
    journal: Journal
    if request.param == "sqlite":
        journal = SqliteJournal(tmp_path_factory.mktemp("journal") / "relay.db")
    else:
        url = request.getfixturevalue("redis_server").url()
        journal = RedisJournal(url, prefix="contract", timeout_s=DEADLINE_S)
    ear, owner = Ear(), Owner()
    runner.run(journal.start(ear, owner))
    yield Backend(journal, ear, owner)
    runner.run(journal.close())


@pytest.fixture
def journal(backend: Backend) -> Journal:
    return backend.journal


@pytest.fixture
def ear(backend: Backend) -> Ear:
    return backend.ear


@pytest.fixture
def owner(backend: Backend) -> Owner:
    return backend.owner


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


class Rewindable(Protocol):
    """A journal of one test, of which a copy can be put back: what a failover to a replica that was behind
    does, or a restored backup. Followers have to watch anew after it."""

    journal: Journal
    ear: Ear

    async def start(self) -> None: ...
    async def close(self) -> None: ...
    async def save(self) -> None: ...
    async def rewind(self) -> None: ...


class RewindableSqlite:
    def __init__(self, directory: Path) -> None:
        self._path = directory / "relay.db"
        self._saved = directory / "saved.db"
        self.ear = Ear()
        self.journal: Journal = SqliteJournal(self._path)

    async def start(self) -> None:
        await self.journal.start(self.ear)

    async def close(self) -> None:
        await self.journal.close()

    async def save(self) -> None:
        with closing(sqlite3.connect(self._path)) as source, closing(sqlite3.connect(self._saved)) as target:
            source.backup(target)

    async def rewind(self) -> None:
        await self.close()
        for path in self._path.parent.glob("relay.db*"):
            path.unlink()
        shutil.copy(self._saved, self._path)
        self.journal = SqliteJournal(self._path)
        await self.start()


class RewindableRedis:
    def __init__(self, server: RedisServer) -> None:
        self._server = server
        self._prefix = f"rewindable-{secrets.token_hex(4)}"
        self._saved: dict[bytes, Any] = {}
        self.ear = Ear()
        self.journal: Journal = RedisJournal(server.url(), prefix=self._prefix, timeout_s=DEADLINE_S)

    async def start(self) -> None:
        await self.journal.start(self.ear)

    async def close(self) -> None:
        await self.journal.close()

    async def save(self) -> None:
        with self._server.client() as client:
            self._saved = {key: client.dump(key) for key in self._keys(client)}

    async def rewind(self) -> None:
        with self._server.client() as client:
            for key in self._keys(client):
                client.delete(key)
            for key, value in self._saved.items():
                client.restore(key, 3600 * 1000, value, replace=True)

    def _keys(self, client: redis.Redis) -> list[bytes]:
        return list(client.scan_iter(f"{self._prefix}:*", count=1000))  # among those of all other tests


@pytest.fixture(params=["sqlite", "redis"])
def rewindable(
    request: pytest.FixtureRequest, runner: asyncio.Runner, tmp_path: Path
) -> Iterator[Rewindable]:
    it: Rewindable
    if request.param == "sqlite":
        it = RewindableSqlite(tmp_path)
    else:
        it = RewindableRedis(request.getfixturevalue("redis_server"))
    runner.run(it.start())
    yield it
    runner.run(it.close())
