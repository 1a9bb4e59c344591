"""Openings that got no answer: the run is opened once, or ended, and upstream is called once."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from anybody import ANYBODY
from audience import Audience
from deaf_follower import DeafFollower
from scripted_upstream import Exchange, ScriptedUpstream

from relay.errors import JournalUnavailable
from relay.ingest.owned import OwnedRuns
from relay.ingest.proxy import Call, Proxy, RunAnswer
from relay.ingest.upstream import Upstream
from relay.journal.base import Opened, RunOpening
from relay.journal.sqlite import SqliteJournal
from relay.lifecycle import Status
from relay.settings import Settings


class Unanswering(SqliteJournal):
    """A real journal whose first answers to openings are lost, after or before they happened."""

    def __init__(self, path: Path, outcomes: list[str]) -> None:
        super().__init__(path)
        self.outcomes = outcomes

    async def open_run(self, opening: RunOpening) -> Opened:
        outcome = self.outcomes.pop(0) if self.outcomes else "answered"
        if outcome == "lost before":
            raise JournalUnavailable("not sent")
        opened = await super().open_run(opening)
        if outcome == "lost after":
            raise JournalUnavailable("no answer")
        return opened


@pytest.mark.parametrize("outcome", ["lost before", "lost after"])
def test_an_opening_under_which_a_connection_broke_is_asked_once_more(
    tmp_path: Path, upstream: ScriptedUpstream, name: str, outcome: str
) -> None:
    opened, statuses = asyncio.run(_opened(tmp_path, upstream, name, [outcome]))
    assert isinstance(opened, RunAnswer)
    assert statuses == [Status.COMPLETED]
    assert upstream.calls(f"/{name}") == 1


def test_p3_an_opening_without_any_answer_is_refused_and_the_run_it_may_have_made_is_ended(
    tmp_path: Path, upstream: ScriptedUpstream, name: str
) -> None:
    opened, statuses = asyncio.run(_opened(tmp_path, upstream, name, ["lost after", "lost after"]))
    assert isinstance(opened, JournalUnavailable)
    assert statuses == [Status.LOST]
    assert upstream.calls(f"/{name}") == 1


class Slow(SqliteJournal):
    """A real journal that opens a run when it is let."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.asked = asyncio.Event()
        self.let = asyncio.Event()

    async def open_run(self, opening: RunOpening) -> Opened:
        self.asked.set()
        await self.let.wait()
        return await super().open_run(opening)


@pytest.mark.parametrize("waited_for", [True, False])
def test_p3_a_run_that_is_being_opened_at_shutdown_ends_too(
    tmp_path: Path, upstream: ScriptedUpstream, name: str, waited_for: bool
) -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.head()
        await exchange.closed()

    async def check() -> None:
        upstream.on(f"/{name}", handler)
        settings = Settings(upstream=upstream.url, drain_grace_s=0, journal_timeout_s=60)
        journal = Slow(tmp_path / "relay.db")
        async with _proxied(journal, settings) as proxy:
            preference = [] if waited_for else [(b"prefer", b"respond-async")]
            opening = asyncio.create_task(proxy.open(_call(name, *preference)))
            await journal.asked.wait()
            draining = asyncio.create_task(proxy.drain())
            await asyncio.sleep(0)
            asyncio.get_running_loop().call_later(0.05, journal.let.set)
            await draining
            assert await _endings(journal) == [("lost", "shutdown")]
            await opening

    asyncio.run(check())


async def _opened(
    path: Path, upstream: ScriptedUpstream, name: str, outcomes: list[str]
) -> tuple[object, list[Status]]:
    """What a request led to, and how every run in the journal ended."""
    upstream.on_stream(f"/{name}", [b"data: hello\n\n"])
    journal = Unanswering(path / "relay.db", outcomes)
    async with _proxied(journal, Settings(upstream=upstream.url, drain_grace_s=60)) as proxy:
        try:
            opened: object = await proxy.open(_call(name))
        except JournalUnavailable as error:
            opened = error
        await proxy.drain()
        await proxy.visit()
        return opened, [status for status, _ in await _endings(journal)]


@contextlib.asynccontextmanager
async def _proxied(journal: SqliteJournal, settings: Settings) -> AsyncIterator[Proxy]:
    await journal.start(DeafFollower())
    backend = Upstream(settings.upstream, settings)
    await backend.start()
    owned = OwnedRuns(settings, lambda *ended: None)
    yield Proxy(backend, journal, settings, owned, Audience(1), lambda *ended: None)
    await backend.close()
    await journal.close()


def _call(name: str, *headers: tuple[bytes, bytes]) -> Call:
    sent = [(b"host", b"relay"), *headers]
    return Call("GET", f"/{name}", f"/{name}", sent, None, ANYBODY)


async def _endings(journal: SqliteJournal) -> list[tuple[Status, str]]:
    """How the latest run of every stream ended."""
    streams = await journal.streams("", 10)
    runs = [await journal.run(info.stream, info.latest_run) for info in streams]
    return [(run.status, run.reason) for run in runs]
