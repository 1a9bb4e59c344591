"""Writing to SQLite: what fails is whole, what is cached is what the file says, what expires goes."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from journal_file import (
    DAY_S,
    NOON,
    Notes,
    SteeredClock,
    batch,
    count,
    in_writer,
    on_a_loop,
    opening,
    page,
    rows,
    started,
)

from relay.cursor import ORIGIN
from relay.errors import JournalRefused, JournalUnavailable, UnknownStream
from relay.frame import Event
from relay.journal import sqlite_file, sqlite_store
from relay.journal.base import Append, Appended, Claim
from relay.journal.sqlite import SqliteJournal
from relay.lifecycle import Reason, ending
from relay.limits import Retention

# Failures while writing.


@on_a_loop
async def test_a_full_disk_is_an_error_and_not_a_corruption(path: Path) -> None:
    """Nothing that was accepted is lost, refusals are whole, and it goes on when there is room again."""
    journal = await started(path)
    await journal.open_run(opening())
    await journal.append(batch(1, *[b"x" * 1000] * 20))
    before = await page(journal)
    ((pages,),) = rows(path, "PRAGMA page_count")
    await in_writer(journal, f"PRAGMA max_page_count = {pages + 2}")

    for _ in range(3):
        with pytest.raises(JournalRefused):
            await journal.append(batch(21, *[b"y" * 1000] * 100))
    assert await page(journal) == before
    assert (await journal.run("s", "r")).frames == 20
    assert rows(path, "PRAGMA integrity_check") == [("ok",)]

    await in_writer(journal, "PRAGMA max_page_count = 1000000")
    answer = await journal.append(batch(21, *[b"y" * 1000] * 100))
    assert (answer.appended, answer.last.seq) == (100, 121)
    assert list((await page(journal)).frames[:21]) == list(before.frames)
    await journal.close()


@on_a_loop
async def test_a_full_disk_refuses_the_whole_group_and_says_so_to_each(path: Path) -> None:
    journal = await started(path)
    for n in range(10):
        await journal.open_run(opening(run=f"r{n}"))
    before = await page(journal)
    ((pages,),) = rows(path, "PRAGMA page_count")
    await in_writer(journal, f"PRAGMA max_page_count = {pages}")
    appends = [journal.append(batch(1, b"x" * 50_000, run=f"r{n}")) for n in range(10)]
    outcomes = await asyncio.gather(*appends, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [JournalRefused] * 10
    assert len({id(outcome) for outcome in outcomes}) == 10
    assert await page(journal) == before
    await in_writer(journal, "PRAGMA max_page_count = 1000000")
    answers = await asyncio.gather(*(journal.append(batch(1, b"x", run=f"r{n}")) for n in range(10)))
    assert [answer.last.seq for answer in answers] == list(range(11, 21))
    await journal.close()


@on_a_loop
async def test_a_follower_hears_nothing_of_what_was_refused(path: Path) -> None:
    notes = Notes()
    journal = SqliteJournal(path)
    await journal.start(notes)
    await journal.open_run(opening())
    journal.watch("s")
    ((pages,),) = rows(path, "PRAGMA page_count")
    await in_writer(journal, f"PRAGMA max_page_count = {pages}")
    with pytest.raises(JournalRefused):
        await journal.append(batch(1, b"x" * 50_000))
    await in_writer(journal, "PRAGMA max_page_count = 1000000")
    await journal.append(batch(1, b"y"))
    assert [(frame.seq, frame.data) for frame in notes.frames] == [(2, b"y")]
    await journal.close()


@on_a_loop
async def test_a_database_locked_by_a_stranger_is_unavailable(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_file, "BUSY_TIMEOUT_S", 0.01)
    journal = await started(path)
    await journal.open_run(opening())
    with closing(sqlite3.connect(path, isolation_level=None)) as stranger:
        stranger.execute("BEGIN IMMEDIATE")
        with pytest.raises(JournalUnavailable):
            await journal.append(batch(1, b"a"))
        assert len((await page(journal)).frames) == 1
        stranger.execute("ROLLBACK")
    assert (await journal.append(batch(1, b"a"))).last.seq == 2
    await journal.close()


@on_a_loop
async def test_what_cannot_be_written_fails_alone(path: Path) -> None:
    """A text no encoding has is found out only when the group is written."""
    journal = await started(path)
    await journal.open_run(opening())
    await journal.open_run(opening(run="bad"))
    outcomes = await asyncio.gather(
        journal.append(batch(1, b"a")),
        journal.append(Append("s", "bad", "w", 1, [Event("\ud800", b"x")])),
        journal.append(batch(2, b"b")),
        return_exceptions=True,
    )
    assert [type(outcome) for outcome in outcomes] == [Appended, UnicodeEncodeError, Appended]
    assert [frame.data for frame in (await page(journal)).frames[2:]] == [b"a", b"b"]
    assert (await journal.run("s", "bad")).frames == 0
    await journal.close()


@on_a_loop
async def test_an_opening_that_fails_half_way_leaves_no_trace(path: Path) -> None:
    """The stream it had created before is rolled back with it, in the file and in what is cached."""
    journal = await started(path)
    await journal.open_run(opening("other"))
    outcomes = await asyncio.gather(
        journal.append(batch(1, b"a", stream="other")),
        journal.open_run(opening(writer="\ud800")),
        journal.append(batch(1, b"b")),
        journal.append(batch(2, b"c", stream="other")),
        return_exceptions=True,
    )
    assert [type(outcome) for outcome in outcomes] == [Appended, UnicodeEncodeError, UnknownStream, Appended]
    with pytest.raises(UnknownStream):
        await journal.describe("s")
    opened = await journal.open_run(opening())
    assert (opened.start, opened.first.seq) == (ORIGIN, 1)
    assert [frame.data for frame in (await page(journal, "other")).frames[1:]] == [b"a", b"c"]
    await journal.close()


@on_a_loop
async def test_what_is_cached_never_disagrees_with_the_file(path: Path, clock: SteeredClock) -> None:
    """After successes and refusals of every kind in shared groups, a fresh start answers the same."""
    journal = await started(path, clock_ms=clock)
    tight = Retention(max_frames=9, max_bytes=120)
    for step in range(30):
        stream, run = f"s{step % 3}", f"r{step % 4}"
        await asyncio.gather(
            journal.open_run(opening(stream, run, retention=tight)),
            journal.append(batch(1, b"x" * step, b"y", stream=stream, run=run)),
            journal.append(batch(3, b"z", stream=stream, run=run, dialect=f"d{step}")),
            journal.append(batch(99, b"gap", stream=stream, run=run)),
            journal.open_run(opening(stream, "bad", token="\ud800")),
            journal.append(batch(4, b"end", stream=stream, run=run, ending=ending(Reason.PRODUCER_END))),
            journal.trim(stream, step),
            journal.delete(stream if step % 11 == 10 else "nowhere"),
            return_exceptions=True,
        )
        clock.ms += step - 7
    await asyncio.gather(*(journal.open_run(opening(f"s{n}", "last")) for n in range(3)))
    answers = [await journal.append(batch(1, b"a", stream=f"s{n}", run="last")) for n in range(3)]
    await journal.close()

    journal = await started(path, clock_ms=clock)
    for n, answer in enumerate(answers):
        held, info = await page(journal, f"s{n}"), await journal.describe(f"s{n}")
        assert info.extent.top == held.frames[-1].id == answer.last
        assert info.extent.earliest_seq == held.frames[0].seq
        assert [f.seq for f in held.frames] == list(range(info.extent.earliest_seq, answer.last.seq + 1))
        assert info.bytes_held == sum(len(frame.data) for frame in held.frames) <= 120
        assert len(held.frames) <= 9
    await journal.close()


@on_a_loop
async def test_state_dropped_from_the_cache_is_read_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_store, "CACHE_MAX_ROWS", 2)
    journal = await started(path)
    for n in range(10):
        await journal.open_run(opening(f"s{n}"))
    for seq in range(1, 5):
        await asyncio.gather(*(journal.append(batch(seq, b"x", stream=f"s{n}")) for n in range(10)))
    tops = await journal.tops([f"s{n}" for n in range(10)])
    assert {top.id.seq for top in tops.values()} == {5}
    await journal.close()


# Expiry.


@on_a_loop
async def test_an_append_renews_a_stream_and_a_read_does_not(path: Path, clock: SteeredClock) -> None:
    journal = await started(path, clock_ms=clock)
    await journal.open_run(opening(retention=Retention(retention_s=10)))
    for n in range(1, 5):
        clock.ms += 10_000
        await journal.append(batch(n, b"x"))
    clock.ms += 9_000
    await page(journal)
    await journal.append(batch(4, b"x"))  # a duplicate is no append
    clock.ms += 1_001
    with pytest.raises(UnknownStream):
        await page(journal)
    await journal.close()


@on_a_loop
async def test_an_expired_stream_is_replaced_by_one_with_later_ids(path: Path, clock: SteeredClock) -> None:
    journal = await started(path, clock_ms=clock)
    await journal.open_run(opening(retention=Retention(retention_s=10), seal=True))
    last = (await journal.append(batch(1, b"a"))).last
    clock.ms += 10_001
    opened = await journal.open_run(opening(writer="w", token="new"))
    info = await journal.describe("s")
    assert (opened.start, opened.first.seq) == (ORIGIN, 1)
    assert info.extent.created_ms > last.ms
    assert (info.runs, info.sealed, info.retention) == (1, False, Retention(0, 0, 0))
    assert (await journal.run("s", "r")).frames == 0
    assert await journal.resolve_token("token-s-r") is None
    assert await journal.resolve_token("new") == ("s", "r")
    assert [frame.run for frame in (await page(journal)).frames] == ["r"]
    await journal.close()


@on_a_loop
async def test_a_replacement_that_fails_takes_back_the_deletion_it_told_of(
    path: Path, clock: SteeredClock
) -> None:
    notes = Notes()
    journal = SqliteJournal(path, clock_ms=clock)
    await journal.start(notes)
    journal.watch("s")
    await journal.open_run(opening(retention=Retention(retention_s=10)))
    clock.ms += 10_001
    with pytest.raises(UnicodeEncodeError):
        await journal.open_run(opening(run="r2", writer="\ud800"))
    assert notes.deleted == []
    clock.ms = NOON
    assert (await journal.append(batch(1, b"x"))).last.seq == 2
    await journal.close()


@on_a_loop
async def test_the_sweep_removes_what_expired_and_tells_who_watches(path: Path, clock: SteeredClock) -> None:
    notes = Notes()
    journal = SqliteJournal(path, clock_ms=clock)
    await journal.start(notes)
    journal.watch("s")
    await journal.open_run(opening(retention=Retention(retention_s=10), metadata='{"a":1}'))
    await journal.append(batch(1, *[b"x"] * 2500))
    await journal.open_run(opening("kept"))
    clock.ms += 10_001
    sweeps = 0
    while count(path, "frames") > 1 or count(path, "debris"):
        await journal.sweep()
        sweeps += 1
        assert sweeps < 10, "the sweep does not come to an end"
    assert [count(path, table) for table in ("streams", "runs", "run_texts")] == [1, 1, 0]
    assert notes.deleted == ["s"]
    assert len((await page(journal, "kept")).frames) == 1
    await journal.close()


@on_a_loop
async def test_a_deleted_stream_is_removed_from_the_file_without_harm_to_its_successor(
    path: Path, clock: SteeredClock
) -> None:
    journal = await started(path, clock_ms=clock)
    await journal.open_run(opening(metadata='{"a":1}'))
    await journal.append(batch(1, *[b"old"] * 1500))
    await journal.delete("s")
    await journal.open_run(opening(metadata='{"a":2}'))
    await journal.append(batch(1, b"new"))
    for _ in range(4):
        await journal.sweep()
    assert [count(path, table) for table in ("frames", "runs", "run_texts", "debris")] == [2, 1, 1, 0]
    assert (await page(journal)).frames[1].data == b"new"
    assert (await journal.run("s", "r")).metadata == '{"a":2}'
    await journal.close()


@on_a_loop
async def test_the_memory_of_former_lives_outlasts_a_day_and_a_restart(
    path: Path, clock: SteeredClock
) -> None:
    journal = await started(path, clock_ms=clock)
    former = (await journal.open_run(opening())).first
    await journal.delete("s")
    clock.ms += DAY_S * 1000
    await journal.sweep()
    await journal.close()

    clock.ms = NOON - 5000
    journal = await started(path, clock_ms=clock)
    await journal.open_run(opening())
    assert (await journal.describe("s")).extent.created_ms > former.ms
    await journal.delete("s")
    clock.ms = NOON + 10 * DAY_S * 1000
    await journal.sweep()
    assert count(path, "tombstones") == 0
    await journal.close()


@on_a_loop
async def test_claims_nobody_can_use_any_more_are_swept(path: Path, clock: SteeredClock) -> None:
    journal = await started(path, clock_ms=clock)
    await journal.claim("settled", "digest", "owner", 10, 100)
    await journal.settle("settled", "owner", "s", "r")
    await journal.claim("lapsed", "digest", "owner", 10, 100)
    clock.ms += 50_000
    await journal.sweep()
    assert count(path, "claims") == 2
    assert await journal.claim("settled", "digest", "other", 10, 100) == Claim("settled", "s", "r")
    clock.ms += 60_001
    await journal.sweep()
    assert count(path, "claims") == 0
    await journal.close()
