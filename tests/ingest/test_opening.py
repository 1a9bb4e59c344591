"""Openings that got no answer: the run is opened once, or ended, and upstream is called once."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from deaf_follower import DeafFollower
from scripted_upstream import ScriptedUpstream

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


async def _opened(
    path: Path, upstream: ScriptedUpstream, name: str, outcomes: list[str]
) -> tuple[object, list[Status]]:
    """What a request led to, and how every run in the journal ended."""
    upstream.on_stream(f"/{name}", [b"data: hello\n\n"])
    settings = Settings(upstream=upstream.url)
    journal = Unanswering(path / "relay.db", outcomes)
    await journal.start(DeafFollower())
    backend = Upstream(upstream.url, settings)
    await backend.start()
    owned = OwnedRuns(settings, lambda *ended: None)
    proxy = Proxy(backend, journal, settings, owned, lambda stream: 1, lambda *ended: None)
    call = Call("GET", f"/{name}", f"/{name}", [(b"host", b"relay")], None, "127.0.0.1", lambda: False)
    try:
        opened: object = await proxy.open(call)
    except JournalUnavailable as error:
        opened = error
    await proxy.drain()
    await proxy.visit()
    streams = await journal.streams("", 10)
    statuses = [(await journal.run(info.stream, info.latest_run)).status for info in streams]
    await backend.close()
    await journal.close()
    return opened, statuses
