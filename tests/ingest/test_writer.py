"""The writer between its run and a journal whose answers get lost: every frame once, whatever was known."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from deaf_follower import DeafFollower

from relay.cursor import Cursor
from relay.errors import JournalUnavailable, RunEnded
from relay.frame import Event
from relay.ingest.writer import HeldMemory, RunWriter
from relay.journal.base import Append, Appended, Retention, RunOpening
from relay.journal.sqlite import SqliteJournal
from relay.lifecycle import Reason, ending
from relay.settings import Settings


class Lossy(SqliteJournal):
    """A real journal that fails for a while: each outcome says whether the append was done before."""

    outcomes: list[str] = []
    tried = 0

    async def append(self, batch: Append) -> Appended:
        self.tried += 1
        outcome = self.outcomes.pop(0) if self.outcomes else "answered"
        if outcome == "lost before":
            raise JournalUnavailable("not sent")
        appended = await super().append(batch)
        if outcome == "lost after":
            raise JournalUnavailable("no answer")
        return appended


async def written(path: Path, outcomes: list[str], deadline_s: float = 30.0) -> tuple[Lossy, RunWriter]:
    journal = Lossy(path / "relay.db")
    await journal.start(DeafFollower())
    opening = RunOpening("s", "r", "w", "t" * 22, Retention(), owner="me")
    writer = RunWriter(journal, opening, Settings(journal_deadline_s=deadline_s), HeldMemory(10**6))
    writer.opened(await journal.open_run(opening))
    journal.outcomes = outcomes
    return journal, writer


async def texts(journal: Lossy) -> list[bytes]:
    page = await journal.read("s", Cursor(0, 0), 100, 10**6)
    return [frame.data for frame in page.frames if frame.event != "relay"]


@pytest.mark.parametrize(
    "outcomes",
    [
        [],
        ["lost before"],
        ["lost after"],
        ["lost after", "lost before", "lost after"],
        ["answered", "lost after"],
    ],
)
def test_p5_a_batch_whose_outcome_is_not_known_is_journaled_once(tmp_path: Path, outcomes: list[str]) -> None:
    async def check() -> None:
        journal, writer = await written(tmp_path, list(outcomes))
        await writer.append([Event("", b"one"), Event("", b"two")], 6)
        await writer.append([Event("", b"three")], 5)
        await writer.append([Event("", b"four")], 4, "raw", ending(Reason.UPSTREAM_END))
        assert await texts(journal) == [b"one", b"two", b"three", b"four"]
        run = await journal.run("s", "r")
        assert (run.status, run.frames, run.text_bytes) == ("completed", 4, 15)
        assert journal.tried == 3 + sum(outcome != "answered" for outcome in outcomes)
        await journal.close()

    asyncio.run(check())


def test_p3_an_ending_whose_outcome_is_not_known_is_written_once(tmp_path: Path) -> None:
    async def check() -> None:
        journal, writer = await written(tmp_path, ["lost after"])
        await writer.append([Event("", b"one")], 3, "raw", ending(Reason.UPSTREAM_END))
        page = await journal.read("s", Cursor(0, 0), 100, 10**6)
        assert [b"run.ended" in frame.data for frame in page.frames] == [False, False, True]
        await journal.close()

    asyncio.run(check())


def test_after_its_deadline_it_gives_up_and_the_same_batch_can_be_given_again(tmp_path: Path) -> None:
    async def check() -> None:
        journal, writer = await written(tmp_path, ["lost after"], deadline_s=1e-9)
        with pytest.raises(JournalUnavailable):
            await writer.append([Event("", b"one")], 3)
        await writer.append_once([Event("", b"one"), Event("", b"two")], 6, "", None)
        assert await texts(journal) == [b"one", b"two"]
        await journal.close()

    asyncio.run(check())


def test_a_run_that_has_ended_is_no_reason_to_wait(tmp_path: Path) -> None:
    async def check() -> None:
        journal, writer = await written(tmp_path, [])
        await writer.append([], 0, "", ending(Reason.CLIENT_CANCEL))
        with pytest.raises(RunEnded):
            await writer.append([Event("", b"late")], 4)
        assert journal.tried == 2
        assert await texts(journal) == []
        await journal.close()

    asyncio.run(check())
