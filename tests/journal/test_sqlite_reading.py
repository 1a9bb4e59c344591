"""Reading from a SQLite journal: what its lists leave out, and their order."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from journal_file import (
    NOON,
    SteeredClock,
    batch,
    on_a_loop,
    opening,
    refusals,
    started,
)

from relay.cursor import ORIGIN
from relay.errors import UnknownStream
from relay.journal import sqlite_reading
from relay.lifecycle import Reason, ending
from relay.limits import Retention


@on_a_loop
async def test_an_expired_stream_is_unknown_at_once(path: Path, clock: SteeredClock) -> None:
    """Whatever is asked, before anything was swept."""
    journal = await started(path, clock_ms=clock)
    await journal.open_run(opening(retention=Retention(retention_s=10)))
    await journal.open_run(opening("eternal"))
    clock.ms += 10_000
    assert (await journal.describe("s")).runs == 1
    assert await journal.resolve_token("token-s-r") == ("s", "r")
    clock.ms += 1
    calls = (
        journal.read("s", ORIGIN, 10, 10),
        journal.describe("s"),
        journal.run("s", "r"),
        journal.trim("s", 1),
        journal.append(batch(1, b"x")),
    )
    assert await refusals(journal, *calls) == [UnknownStream] * 5
    assert await journal.resolve_token("token-s-r") is None
    assert dict(await journal.tops(["s"])) == {}
    assert [info.stream for info in await journal.streams("", 10)] == ["eternal"]
    await journal.delete("s")
    await journal.close()


@on_a_loop
async def test_lists_of_all_streams_leave_out_those_that_expired_or_were_deleted(
    path: Path, clock: SteeredClock
) -> None:
    journal = await started(path, clock_ms=clock)
    for stream, retention_s in (("kept", 0), ("deleted", 0), ("expired", 10)):
        given: dict[str, Any] = {"retention": Retention(retention_s=retention_s), "deliver": True}
        await journal.open_run(opening(stream, "silent", idle_timeout_s=1, **given))
        await journal.open_run(opening(stream, "ended", **given))
        await journal.end_run(stream, "ended", ending(Reason.CLIENT_CANCEL), {})
    assert len(await journal.ended_runs(0, "", 10)) == 3
    await journal.delete("deleted")
    await journal.sweep()
    clock.ms += 10_001
    assert await journal.due_runs(10) == [("kept", "silent")]
    assert [(each.stream, each.info.run) for each in await journal.ended_runs(0, "", 10)] == [
        ("kept", "ended")
    ]
    assert [(each.stream, each.run) for each in await journal.claim_deliveries(10, 1)] == [("kept", "ended")]
    runs = [(stream, run) for stream in ("expired", "deleted", "kept") for run in ("silent", "none")]
    assert [state is not None for state in await journal.states(runs)] == [False] * 4 + [True, False]
    await journal.close()


@on_a_loop
async def test_endings_of_one_millisecond_are_listed_in_their_order(path: Path, clock: SteeredClock) -> None:
    """Whoever goes on after a place misses nothing that ended since, though the clock stood still."""
    journal = await started(path, clock_ms=clock)
    for run in ("r1", "r2", "r3"):
        await journal.open_run(opening(run=run))
    await journal.append(batch(1, run="r2", ending=ending(Reason.PRODUCER_END)))
    (first,) = await journal.ended_runs(NOON - 1, "", 10)
    assert (first.info.run, first.info.ended_ms) == ("r2", NOON)
    await journal.end_run("s", "r3", ending(Reason.CLIENT_CANCEL), {})
    await journal.close()
    journal = await started(path, clock_ms=clock)
    await journal.end_run("s", "r1", ending(Reason.CLIENT_CANCEL), {})
    rest = await journal.ended_runs(NOON - 1, first.place, 10)
    assert [each.info.run for each in rest] == ["r3", "r1"]
    assert await journal.ended_runs(NOON - 1, rest[-1].place, 10) == []
    assert await journal.ended_runs(NOON, "", 10) == []
    await journal.close()


@on_a_loop
async def test_a_run_that_is_heard_of_keeps_no_other_from_being_found_due(
    path: Path, clock: SteeredClock
) -> None:
    """A list of one: what turned out not to be due makes room until it may be."""
    journal = await started(path, clock_ms=clock)
    await journal.open_run(opening(run="lively", idle_timeout_s=10))
    clock.ms += 1
    await journal.open_run(opening(run="silent", idle_timeout_s=10))
    clock.ms += 5_000
    await journal.append(batch(1, b"x", run="lively"))
    clock.ms += 5_000
    assert await journal.due_runs(1) == [("s", "lively")]
    assert await journal.end_due("s", "lively", 0, {}) is None
    assert await journal.due_runs(1) == [("s", "silent")]
    ended = await journal.end_due("s", "silent", 0, {})
    assert ended is not None
    assert (ended.by_this, ended.reason) == (True, "idle_timeout")
    assert await journal.due_runs(1) == []
    clock.ms += 5_000
    assert await journal.due_runs(1) == [("s", "lively")]
    await journal.close()


@on_a_loop
async def test_lists_of_all_streams_cost_what_they_list_and_not_what_is_there(
    path: Path, clock: SteeredClock
) -> None:
    """They go along an index of just that: 300 open runs take no more of SQLite's steps than none."""
    journal = await started(path, clock_ms=clock)
    await asyncio.gather(*(journal.open_run(opening("s", f"r{n}", owner="me")) for n in range(300)))
    steps = 0

    def step() -> int:
        nonlocal steps
        steps += 1
        return 0

    with closing(sqlite3.connect(path)) as db:
        db.set_progress_handler(step, 10)
        assert sqlite_reading.list_due(db, clock.ms, 1000) == []
        assert sqlite_reading.list_ended(db, clock.ms, 0, "", 1000) == []
    assert steps < 30
    await journal.close()
