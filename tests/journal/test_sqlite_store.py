"""Writing to SQLite: what fails is whole, what is cached is what the file says, what expires goes."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import sqlite3
from collections.abc import Awaitable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from journal_file import (
    DAY_S,
    NOON,
    Me,
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

from relay.cursor import ORIGIN, Cursor, Extent
from relay.errors import (
    Diverged,
    Fenced,
    JournalRefused,
    JournalUnavailable,
    RelayError,
    Rewound,
    RunEnded,
    UnknownStream,
)
from relay.frame import Event
from relay.journal import sqlite_file, sqlite_store
from relay.journal.base import (
    Append,
    Appended,
    Claim,
    Delivery,
    Ended,
    Held,
    Opened,
    RunState,
    StreamChange,
    TakenOver,
)
from relay.journal.sqlite import SqliteJournal
from relay.lifecycle import Reason, Status, ending
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


# Runs that supersede, end, and are taken over.


async def superseding(path: Path, notes: Notes, me: Me) -> SqliteJournal:
    """A journal with two open runs of ours and a third that has ended, its stream watched."""
    journal = SqliteJournal(path)
    await journal.start(notes, me)
    for run in ("r1", "r2", "r3"):
        await journal.open_run(opening(run=run, owner=me.name, deliver=True))
    await journal.append(batch(1, b"x", run="r3", ending=ending(Reason.PRODUCER_END)))
    journal.watch("s")
    return journal


REGENERATE = {"run": "r4", "supersedes": ["r1", "r2", "r3"], "seal": True}


@on_a_loop
async def test_a_disk_that_fills_in_the_middle_of_superseding_leaves_nothing_half_done(path: Path) -> None:
    notes, me = Notes(), Me()
    journal = await superseding(path, notes, me)
    before = (await page(journal), await journal.describe("s"), await journal.runs("s", "", 10))
    ((pages,),) = rows(path, "PRAGMA page_count")
    await in_writer(journal, f"PRAGMA max_page_count = {pages}")
    with pytest.raises(JournalRefused):
        await journal.open_run(opening(**REGENERATE, metadata=f'"{"m" * 50_000}"'))
    assert (await page(journal), await journal.describe("s"), await journal.runs("s", "", 10)) == before
    assert await journal.claim_deliveries(10, 60) == [Delivery("s", "r3", 0)]
    await in_writer(journal, "PRAGMA max_page_count = 1000000")
    assert (await journal.append(batch(1, b"on", run="r1"))).last.seq == 6
    assert (notes.sealed, me.over, [frame.run for frame in notes.frames]) == ([], [], ["r1"])

    opened = await journal.open_run(opening(**REGENERATE))
    assert (opened.superseded, opened.start.seq, opened.last.seq) == (("r1", "r2", "r3"), 10, 12)
    assert (notes.sealed, me.over) == (["s"], [("s", "r1"), ("s", "r2")])
    assert [frame.seq for frame in notes.frames] == list(range(6, 13))
    with pytest.raises(RunEnded):
        await journal.append(batch(2, b"late", run="r1"))
    await journal.close()


@on_a_loop
async def test_superseding_that_fails_alone_leaves_the_superseded_to_go_on(path: Path) -> None:
    """In the file and in what is cached: an append of the same group goes on where the run was."""
    notes, me = Notes(), Me()
    journal = await superseding(path, notes, me)
    outcomes = await asyncio.gather(
        journal.append(batch(1, b"a", run="r1")),
        journal.open_run(opening(**REGENERATE, writer="\ud800")),
        journal.append(batch(2, b"b", run="r1", ending=ending(Reason.PRODUCER_END))),
        journal.append(batch(1, b"c", run="r2")),
        return_exceptions=True,
    )
    assert [type(outcome) for outcome in outcomes] == [Appended, UnicodeEncodeError, Appended, Appended]
    assert (notes.sealed, me.over) == ([], [])
    assert [run.superseded_by for run in await journal.runs("s", "", 10)] == ["", "", ""]
    assert [frame.data for frame in (await page(journal)).frames if not frame.is_control] == [
        *(b"x", b"a", b"b", b"c")
    ]
    await journal.close()


@on_a_loop
async def test_frames_of_others_are_counted_past_every_kind_of_ending(path: Path) -> None:
    """Errors said in an ending, and the news of a successor, are frames of the run that they are about."""
    journal = await started(path)
    given = {"answer": "200", "dialect": "openai-chat"}
    said = Event("", b"broke off")
    await journal.open_run(opening(run="other"))
    await journal.open_run(opening(run="r1", **given))
    await journal.append(batch(1, b"x", run="r1", ending=ending(Reason.UPSTREAM_ERROR), error_event=said))
    await journal.open_run(opening(run="r2", **given))
    await journal.end_run("s", "r2", ending(Reason.CLIENT_CANCEL), {"openai-chat": said})
    await journal.open_run(opening(run="r3", **given))
    superseding = {"supersedes": ["r3"], "error_events": {"openai-chat": said}}
    assert (await journal.open_run(opening(run="r4", **given, **superseding))).frames_after == 0
    await journal.append(batch(1, b"a", b"b", run="other"))
    opened = await journal.open_run(opening(run="r5", supersedes=["r1", "r2", "r3", "r4"]))
    assert (opened.frames_after, opened.runs_after) == (2, ("other",))
    assert await journal.open_run(opening(run="r5")) == opened
    await journal.close()


@on_a_loop
async def test_only_the_owner_of_a_run_is_told_that_it_is_over(path: Path) -> None:
    me = Me()
    journal = SqliteJournal(path)
    await journal.start(Notes(), me)
    for run, owner in (("mine", "me"), ("other", "another"), ("nobodys", ""), ("own", "me"), ("taken", "me")):
        await journal.open_run(opening(run=run, owner=owner))
    for run in ("mine", "other", "nobodys"):
        assert (await journal.end_run("s", run, ending(Reason.CLIENT_CANCEL), {})).by_this
    await journal.append(batch(1, run="own", ending=ending(Reason.PRODUCER_END)))
    await journal.take_over("s", "taken", "w2", 60)
    await journal.take_over("s", "taken", "w2", 60)
    await journal.delete("s")
    assert me.over == [("s", "mine"), ("s", "taken")]
    await journal.close()


@on_a_loop
async def test_the_endings_of_a_deleted_stream_are_told_before_its_deletion(path: Path) -> None:
    heard: list[str] = []
    notes = Notes()
    notes.on_deleted = lambda stream: heard.append(f"deleted after {len(notes.frames)}")  # type: ignore[method-assign]
    journal = SqliteJournal(path)
    await journal.start(notes)
    await journal.open_run(opening(run="r1", answer="200", dialect="openai-chat", deliver=True))
    await journal.open_run(opening(run="r2"))
    journal.watch("s")
    await journal.delete("s")
    assert heard == ["deleted after 3"]
    assert [(frame.seq, frame.run, frame.is_control) for frame in notes.frames] == [
        *((3, "r1", False), (4, "r1", True), (5, "r2", True))
    ]
    assert await journal.claim_deliveries(10, 60) == []
    last = notes.frames[-1]
    assert (await journal.open_run(opening())).first.ms > last.ms
    await journal.close()


@on_a_loop
async def test_frames_to_be_delivered_have_twice_the_room(path: Path) -> None:
    """What is older than the first run still to be delivered has none of it."""
    journal = await started(path)
    await journal.open_run(opening(run="old", retention=Retention(max_frames=10)))
    await journal.append(batch(1, *[b"old"] * 7, run="old"))
    await journal.open_run(opening(run="kept", deliver=True))

    async def earliest() -> int:
        return (await journal.describe("s")).extent.earliest_seq

    await journal.append(batch(1, *[b"new"] * 5, run="kept"))
    assert await earliest() == 5
    await journal.append(batch(6, *[b"new"] * 10, run="kept", ending=ending(Reason.PRODUCER_END)))
    assert await earliest() == 9
    await journal.close()

    journal = await started(path)
    await journal.append(batch(8, *[b"new"] * 7, run="old"))
    assert await earliest() == 13
    await journal.settle_delivery("s", "kept")
    assert await earliest() == 23
    assert [frame.seq for frame in (await page(journal)).frames] == list(range(23, 33))
    await journal.close()


@on_a_loop
async def test_a_delivery_is_due_again_when_its_lease_lapses_and_counts_tries_that_failed(
    path: Path, clock: SteeredClock
) -> None:
    journal = await started(path, clock_ms=clock)
    await journal.open_run(opening(deliver=True))
    assert await journal.claim_deliveries(10, 60) == []
    await journal.end_run("s", "r", ending(Reason.CLIENT_CANCEL), {})
    assert await journal.claim_deliveries(10, 60) == [Delivery("s", "r", 0)]
    clock.ms += 59_999
    assert await journal.claim_deliveries(10, 60) == []
    clock.ms += 1
    assert await journal.claim_deliveries(10, 60) == [Delivery("s", "r", 0)]
    await journal.postpone_delivery("s", "r", 5)
    await journal.close()

    clock.ms += 5_000
    journal = await started(path, clock_ms=clock)
    assert await journal.claim_deliveries(10, 60) == [Delivery("s", "r", 1)]
    await journal.settle_delivery("s", "r")
    await journal.postpone_delivery("s", "r", 0)
    clock.ms += DAY_S * 1000
    assert await journal.claim_deliveries(10, 60) == []
    await journal.close()


@on_a_loop
async def test_a_repeated_append_is_heard_of(path: Path, clock: SteeredClock) -> None:
    """Its producer lives, though nothing new was journaled."""
    journal = await started(path, clock_ms=clock)
    await journal.open_run(opening(idle_timeout_s=10))
    await journal.append(batch(1, b"x"))
    clock.ms += 9_999
    assert (await journal.append(batch(1, b"x"))).duplicates == 1
    clock.ms += 9_999
    assert await journal.end_due("s", "r", 0, {}) is None
    clock.ms += 1
    assert await journal.end_due("s", "r", 0, {}) == Ended(True, Status.LOST, "idle_timeout")
    await journal.close()


# A file that was put back from a copy.


@on_a_loop
async def test_a_file_put_back_from_a_copy_takes_what_its_writers_still_hold(
    path: Path, clock: SteeredClock
) -> None:
    """Under the same ids, each in its turn, and once."""
    copy = path.with_name("copy.db")
    journal = await started(path, clock_ms=clock)
    await journal.open_run(opening(run="a", token="a"))
    await journal.append(batch(1, b"a1", run="a", text_bytes=2))
    await journal.close()
    shutil.copy(path, copy)

    journal = await started(path, clock_ms=clock)
    clock.ms += 5
    a2 = await journal.append(batch(2, b"a2", b"a3", run="a", text_bytes=4))
    opened = await journal.open_run(opening(run="b", token="b", metadata="1", idle_timeout_s=9))
    started_b = (await page(journal)).frames[-1]
    clock.ms += 5
    failed = ending(Reason.UPSTREAM_ERROR)
    said = Event("", b"broke off")
    end_b = await journal.append(batch(1, b"b1", run="b", text_bytes=2, ending=failed, error_event=said))
    whole = (await page(journal), await journal.describe("s"), await journal.runs("s", "", 9))
    await journal.close()

    os.replace(copy, path)
    clock.ms += 1000
    notes = Notes()
    journal = SqliteJournal(path, clock_ms=clock)
    await journal.start(notes)
    journal.watch("s")
    of_a = opening(run="a", token="a")
    of_b = opening(run="b", token="b", metadata="1", idle_timeout_s=9)
    held_a = Held(Cursor(a2.last.seq - 1, a2.last.ms), 2, [Event("delta", b"a2"), Event("delta", b"a3")], 4)
    held_b = Held(opened.first, 0, [Event(started_b.event, started_b.data)], 0)
    ending_b = Held(Cursor(6, end_b.last.ms), 1, [Event("delta", b"b1")], 2, said, failed)
    with pytest.raises(Rewound) as rewound:
        await journal.append(batch(4, b"a4", run="a", acknowledged=a2.last))
    assert rewound.value.extra == {"last_seq": 2}
    with pytest.raises(Rewound) as rewound:
        await journal.append(batch(2, b"b2", run="b", acknowledged=end_b.last))
    assert rewound.value.extra == {"last_seq": 0}
    with pytest.raises(Rewound) as rewound:
        await journal.restore(of_b, held_b)
    assert (type(rewound.value), rewound.value.extra) == (Rewound, {"last_seq": 2})
    for given, held in ((of_a, held_a), (of_b, held_b), (of_b, ending_b)) * 2:
        await journal.restore(given, held)
    restored = (await page(journal), await journal.describe("s"), await journal.runs("s", "", 9))
    assert restored[:2] == whole[:2]
    assert [replace(run, heard_ms=0) for run in restored[2]] == [replace(run, heard_ms=0) for run in whole[2]]
    assert [frame.seq for frame in notes.frames] == list(range(3, 9))
    assert (await journal.append(batch(4, b"a4", run="a", acknowledged=a2.last))).last.seq == 9
    await journal.close()


@on_a_loop
async def test_what_was_written_since_is_never_overwritten(path: Path, clock: SteeredClock) -> None:
    journal = await started(path, clock_ms=clock)
    await journal.open_run(opening(run="a", token="a"))
    await journal.append(batch(1, b"a1", run="a"))
    one = [Event("delta", b"x")]
    before = await page(journal)
    for given, held, refusal in (
        (opening(run="a"), Held(Cursor(2, NOON - 1), 1, one, 1), Diverged),
        (opening(run="b"), Held(Cursor(2, NOON), 1, one, 1), Diverged),
        (opening(run="b"), Held(Cursor(3, NOON), 1, one, 1), Diverged),
        (opening(run="a"), Held(Cursor(3, NOON - 1), 2, one, 1), Diverged),
        (opening(run="a"), Held(Cursor(4, NOON), 2, one, 1), Rewound),
        (opening(run="a", writer="w2"), Held(Cursor(3, NOON), 2, one, 1), Fenced),
    ):
        with pytest.raises(refusal) as refused:
            await journal.restore(given, held)
        assert type(refused.value) is refusal
    await journal.append(batch(1, run="a", ending=ending(Reason.PRODUCER_END)))
    with pytest.raises(RunEnded):
        await journal.restore(opening(run="a"), Held(Cursor(4, NOON), 2, one, 1))
    assert (await page(journal)).frames[:-1] == before.frames
    await journal.close()


@on_a_loop
async def test_a_deleted_stream_is_not_brought_back(path: Path, clock: SteeredClock) -> None:
    """Its writer may hold all of it; what it holds is of a former life."""
    journal = await started(path, clock_ms=clock)
    opened = await journal.open_run(opening())
    (frame,) = (await page(journal)).frames
    held = Held(opened.first, 0, [Event(frame.event, frame.data)], 0)
    await journal.delete("s")
    with pytest.raises(RunEnded, match="cancelled, stream_deleted"):
        await journal.restore(opening(), held)
    assert dict(await journal.tops(["s"])) == {}
    await journal.close()


@on_a_loop
async def test_a_lost_stream_comes_back_with_its_first_frame(path: Path, clock: SteeredClock) -> None:
    journal = await started(path, clock_ms=clock)
    started_frame = Event("relay", b'{"type":"run.started","run":"r"}')
    held = Held(Cursor(1, NOON - 9), 0, [started_frame], 0)
    await journal.restore(opening(seal=True, retention=Retention(5, 6, 70), deliver=True), held)
    info = await journal.describe("s")
    assert (info.extent, info.sealed) == (Extent(NOON - 9, 1, Cursor(1, NOON - 9)), True)
    assert (info.retention, info.open_runs) == (Retention(5, 6, 70), ["r"])
    assert (await journal.append(batch(1, b"on", acknowledged=held.first))).last.seq == 2
    await journal.close()


# What is cached.

TABLES = ("streams", "stream_texts", "runs", "run_texts", "frames", "tombstones")


def any_operation(dice: random.Random, journal: SqliteJournal) -> Awaitable[Any]:
    stream, run = dice.choice(("s1", "s2")), dice.choice(("r1", "r2", "r3", "r4", "r5"))
    writer = "w" if dice.random() < 0.9 else "w2"
    how = ending(dice.choice((Reason.PRODUCER_END, Reason.CLIENT_CANCEL, Reason.IDLE_TIMEOUT)))
    seq = dice.randrange(1, 5)
    if dice.random() < 0.5:
        events = [Event("delta", bytes([97 + n]) * dice.randrange(9)) for n in range(dice.randrange(4))]
        said = Event("", b"broke off") if dice.random() < 0.5 else None
        closing = {"ending": how, "error_event": said} if dice.random() < 0.1 else {}
        texts = {"dialect": dice.choice(("", "raw", "openai-chat")), "answer": dice.choice(("", "200"))}
        batch = Append(
            stream, run, writer, dice.choice((0, 0, 0, 0, seq)), events, len(events), **texts, **closing
        )
        if dice.random() < 0.05:
            batch = replace(batch, acknowledged=Cursor(dice.randrange(20), NOON))
        return journal.append(batch)
    given: dict[str, Any] = {
        "writer": writer,
        "retention": Retention(dice.choice((0, 9)), dice.choice((0, 120))),
        "owner": dice.choice(("", "me", "another")),
        "idle_timeout_s": dice.choice((0, 0.1)),
        "max_run_s": dice.choice((0, 0.3)),
        "supersedes": dice.choice(([], [], ["latest"], ["r1", "r3"])),
        "if_busy": dice.choice(("allow",) * 6 + ("reject", "supersede")),
        "deliver": dice.random() < 0.5,
        "seal": dice.random() < 0.02,
        "answer": dice.choice(("", "200")),
        "error_events": {"openai-chat": Event("", b"superseded")},
    }
    open_run = opening(stream, run, **given)
    change = StreamChange(
        dice.choice((None, 0, 7)), dice.choice((None, 0, 90)), None, dice.choice((None, "1"))
    )
    held = Held(Cursor(dice.randrange(1, 20), NOON + dice.randrange(3000)), seq - 1, [Event("", b"back")], 4)
    return dice.choice(
        (
            *[lambda: journal.open_run(open_run)] * 5,
            lambda: journal.put_stream(stream, Retention(0, 0, 0), change),
            lambda: journal.trim(stream, seq),
            lambda: journal.seal(stream) if dice.random() < 0.1 else journal.trim(stream, 2),
            lambda: journal.delete(stream) if dice.random() < 0.5 else journal.trim(stream, 2),
            lambda: journal.restore(open_run, held),
            lambda: journal.take_over(stream, run, writer, dice.choice((0, 0.2))),
            lambda: journal.hear_of(stream, run, writer),
            lambda: journal.end_run(stream, run, how, {"openai-chat": Event("", b"e")}, owner=given["owner"]),
            lambda: journal.end_due(stream, run, NOON, {}),
            lambda: journal.claim_deliveries(2, 0.1),
            lambda: journal.settle_delivery(stream, run),
            lambda: journal.postpone_delivery(stream, run, 0.1),
        )
    )()


@pytest.mark.parametrize("seed", range(4))
@on_a_loop
async def test_what_is_cached_changes_no_answer(
    path: Path, clock: SteeredClock, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """A journal that forgets everything between two operations answers, tells and keeps the same."""
    lives = []
    for cached in (sqlite_store.CACHE_MAX_ROWS, -1):
        monkeypatch.setattr(sqlite_store, "CACHE_MAX_ROWS", cached)
        notes, me, dice = Notes(), Me(), random.Random(seed)
        clock.ms = NOON
        file = path.with_name(f"{cached}.db")
        journal = SqliteJournal(file, clock_ms=clock)
        await journal.start(notes, me)
        journal.watch("s1")
        journal.watch("s2")
        answers: list[Any] = []
        for _ in range(1500):
            operation = any_operation(dice, journal)
            try:
                answers.append(await operation)
            except RelayError as error:
                answers.append((type(error), error.detail, error.extra))
            clock.ms += dice.randrange(20)
        await journal.close()
        told = (notes.frames, notes.deleted, notes.sealed, me.over)
        lives.append((answers, told, {table: rows(file, f"SELECT * FROM {table}") for table in TABLES}))
    kinds = {type(answer) for answer in lives[0][0]}
    assert kinds >= {Opened, Appended, Ended, TakenOver, RunState}
    assert lives[0] == lives[1]


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
