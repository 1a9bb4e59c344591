"""What relay.journal.base promises of runs nobody is heard of, and of processes that own some."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from contract.phrases import (
    CANCELLED,
    COMPLETED,
    ERROR_EVENT,
    ERROR_EVENTS,
    PROXIED,
    batch,
    data,
    everything,
    list_ended,
    opening,
    said,
    the_ending,
    until,
)
from deaf_follower import DeafFollower

from relay.errors import RunEnded, UnknownStream
from relay.frame import Event, run_ended
from relay.journal.base import Ended, Journal
from relay.journal.sqlite import SqliteJournal
from relay.lifecycle import Reason, Status, ending
from relay.limits import Retention

SILENCE = ending(Reason.IDLE_TIMEOUT)
SAYS = {Reason.IDLE_TIMEOUT: ERROR_EVENTS, Reason.MAX_RUN: {"openai-chat": Event("error", b"too old")}}
HOUR_MS = 3600 * 1000
ALL = 1000
SOON_S = 0.03
"""Short enough to wait for, on a journal's own clock."""


many_processes = pytest.mark.parametrize("backend", ["redis"], indirect=True)
"""A journal that belongs to one process needs no lease: what a former one left open ends when it starts."""


async def due(journal: Journal, stream: str) -> list[str]:
    return [run for of, run in await journal.due_runs(ALL) if of == stream]


# Runs without an owner.


async def test_a_silent_run_is_lost_after_its_idle_timeout(journal: Journal, ear: Any, stream: str) -> None:
    await journal.open_run(opening(stream, idle_timeout_s=SOON_S))
    last = (await journal.append(batch(stream, 1, "a", text_bytes=3))).last
    journal.watch(stream)
    await ear.hears(stream, "doubt")
    assert await until(lambda: due(journal, stream)) == ["r1"]
    ended = await until(lambda: journal.end_due(stream, "r1", 0, SAYS))
    assert ended == Ended(True, Status.LOST, "idle_timeout", "", 3)
    frames = await everything(journal, stream)
    assert data(frames[2:]) == [run_ended("r1", SILENCE, 1, 3)]
    assert frames[2].ms >= last.ms + SOON_S * 1000
    assert await the_ending(journal, stream) == ("lost", "idle_timeout")
    assert (await journal.run(stream, "r1")).error == SILENCE.error
    (told,) = await ear.hears(stream, "frames")
    assert (told.previous, told.frames) == (last, frames[2:])
    with pytest.raises(RunEnded):
        await journal.append(batch(stream, 2, "b"))
    await until(lambda: _is_not_due(journal, stream))
    journal.unwatch(stream)


async def _is_not_due(journal: Journal, stream: str) -> bool:
    return not await due(journal, stream)


async def test_a_run_that_is_not_due_goes_on(journal: Journal, stream: str) -> None:
    await journal.open_run(opening(stream, "r1", idle_timeout_s=3600, max_run_s=3600))
    await journal.open_run(opening(stream, "r2"))
    for _ in range(3):
        for run in ("r1", "r2"):
            assert await journal.end_due(stream, run, 0, SAYS) is None
    assert await due(journal, stream) == []
    assert len(await everything(journal, stream)) == 2


async def test_p3_one_of_many_reapers_ends_a_run(journal: Journal, stream: str) -> None:
    await journal.open_run(opening(stream, idle_timeout_s=SOON_S))
    await until(lambda: due(journal, stream))

    async def reap() -> list[Ended]:
        found = await asyncio.gather(*(journal.end_due(stream, "r1", 0, SAYS) for _ in range(10)))
        return [ended for ended in found if ended is not None and ended.by_this]

    assert len(await until(reap)) == 1
    assert await reap() == []
    assert await the_ending(journal, stream) == ("lost", "idle_timeout")


async def test_an_owned_run_may_be_silent(journal: Journal, owner: Any, stream: str) -> None:
    """Its owner speaks for it."""
    await journal.open_run(opening(stream, "owned", owner=owner.name, idle_timeout_s=SOON_S))
    await journal.open_run(opening(stream, "alone", idle_timeout_s=SOON_S))
    await until(lambda: journal.end_due(stream, "alone", 0, SAYS))
    assert await journal.end_due(stream, "owned", 0, SAYS) is None
    assert (await journal.run(stream, "owned")).status is Status.OPEN


async def test_a_run_that_was_taken_over_has_nobody_to_speak_for_it(
    journal: Journal, owner: Any, stream: str
) -> None:
    await journal.open_run(opening(stream, owner=owner.name, answer=PROXIED, dialect="openai-chat"))
    await journal.take_over(stream, "r1", "second", SOON_S)
    await until(lambda: due(journal, stream))
    ended = await until(lambda: journal.end_due(stream, "r1", 0, SAYS))
    assert ended == Ended(True, Status.LOST, "idle_timeout", "", 0)
    assert said(await everything(journal, stream)) == [
        ("r1", "run.started"),
        ("r1", ERROR_EVENT.data.decode()),
        ("r1", "run.ended"),
    ]


async def test_a_run_too_old_is_cancelled_however_much_it_says(journal: Journal, stream: str) -> None:
    """And whenever the journal was reachable."""
    await journal.open_run(
        opening(stream, idle_timeout_s=3600, max_run_s=SOON_S, answer=PROXIED, dialect="openai-chat")
    )
    assert await until(lambda: due(journal, stream)) == ["r1"]

    async def say_and_reap() -> Ended | None:
        await journal.hear_of(stream, "r1", "writer-r1")
        now_ms = (await journal.renew("a reaper", 60)).now_ms
        return await journal.end_due(stream, "r1", now_ms + HOUR_MS, SAYS)

    ended = await until(say_and_reap)
    assert ended == Ended(True, Status.CANCELLED, "max_run", "", 0)
    assert await the_ending(journal, stream) == ("cancelled", "max_run")
    assert said(await everything(journal, stream))[1] == ("r1", "too old")


async def test_silence_counts_only_while_the_journal_could_be_reached(journal: Journal, stream: str) -> None:
    await journal.open_run(opening(stream, idle_timeout_s=SOON_S))
    await until(lambda: due(journal, stream))
    now_ms = (await journal.renew("a reaper", 60)).now_ms
    assert await journal.end_due(stream, "r1", now_ms + HOUR_MS, SAYS) is None
    assert await due(journal, stream) == []
    assert len(await everything(journal, stream)) == 1
    await until(lambda: journal.end_due(stream, "r1", 0, SAYS))
    assert await the_ending(journal, stream) == ("lost", "idle_timeout")


async def test_a_run_that_was_not_due_is_listed_when_it_is(journal: Journal, stream: str) -> None:
    await journal.open_run(opening(stream, idle_timeout_s=SOON_S))
    await until(lambda: due(journal, stream))
    await journal.hear_of(stream, "r1", "writer-r1")
    while await journal.end_due(stream, "r1", 0, SAYS) is not None:
        await journal.delete(stream)  # this machine took longer than the timeout: once more
        await journal.open_run(opening(stream, idle_timeout_s=SOON_S))
        await until(lambda: due(journal, stream))
        await journal.hear_of(stream, "r1", "writer-r1")
    assert await until(lambda: due(journal, stream)) == ["r1"]
    await until(lambda: journal.end_due(stream, "r1", 0, SAYS))
    assert await the_ending(journal, stream) == ("lost", "idle_timeout")


async def test_unknown_runs_are_not_due(journal: Journal, stream: str) -> None:
    """A deleted one neither, even if an index still leads to it."""
    assert await journal.end_due(stream, "r1", 0, SAYS) is None
    await journal.open_run(opening(stream, "r1", idle_timeout_s=SOON_S))
    assert await journal.end_due(stream, "r2", 0, SAYS) is None
    await until(lambda: due(journal, stream))
    await journal.delete(stream)
    assert await journal.end_due(stream, "r1", 0, SAYS) is None
    assert await due(journal, stream) == []
    with pytest.raises(UnknownStream):
        await journal.describe(stream)


async def test_as_many_due_runs_are_listed_as_asked(journal: Journal, stream: str) -> None:
    runs = [f"r{n}" for n in range(5)]
    for run in runs:
        await journal.open_run(opening(stream, run, idle_timeout_s=SOON_S))

    async def all_due() -> bool:
        return len(await due(journal, stream)) == 5

    await until(all_due)
    assert len(await journal.due_runs(2)) == 2
    for run in runs:
        await until(lambda run=run: journal.end_due(stream, run, 0, SAYS))  # type: ignore[misc]


async def test_an_idle_timeout_is_counted_from_when_the_run_was_last_heard_of(
    steered: SqliteJournal, clock: Any, stream: str
) -> None:
    """Its appends, its writer's word and a takeover are all heard; to the millisecond."""
    await steered.open_run(opening(stream, idle_timeout_s=10))

    async def is_due_after_ten_seconds() -> None:
        clock.ms += 9_999
        assert await steered.end_due(stream, "r1", 0, SAYS) is None
        assert await due(steered, stream) == []

    await is_due_after_ten_seconds()
    await steered.append(batch(stream, 1, "a"))
    await is_due_after_ten_seconds()
    await steered.hear_of(stream, "r1", "writer-r1")
    heard = clock.ms
    info = await steered.run(stream, "r1")
    assert (info.heard_ms, info.status) == (heard, Status.OPEN)
    await is_due_after_ten_seconds()
    await steered.take_over(stream, "r1", "second", 99)
    await is_due_after_ten_seconds()
    clock.ms += 2
    assert await due(steered, stream) == ["r1"]
    reachable_since = clock.ms - 9_000
    assert await steered.end_due(stream, "r1", reachable_since, SAYS) is None
    clock.ms += 999
    assert await steered.end_due(stream, "r1", reachable_since, SAYS) is None
    clock.ms += 2
    assert await due(steered, stream) == ["r1"]
    ended = await steered.end_due(stream, "r1", reachable_since, SAYS)
    assert ended == Ended(True, Status.LOST, "idle_timeout", "", 0)


async def test_a_run_that_was_taken_over_is_too_old_when_it_would_have_been(
    steered: SqliteJournal, clock: Any, stream: str
) -> None:
    await steered.open_run(opening(stream, owner="somebody", max_run_s=100))
    clock.ms += 99_000
    assert await steered.end_due(stream, "r1", 0, SAYS) is None
    await steered.take_over(stream, "r1", "second", 3600)
    assert await steered.end_due(stream, "r1", 0, SAYS) is None
    clock.ms += 1_001
    assert await due(steered, stream) == ["r1"]
    ended = await steered.end_due(stream, "r1", 0, SAYS)
    assert ended == Ended(True, Status.CANCELLED, "max_run", "", 0)


async def test_a_run_without_timeouts_is_never_due(steered: SqliteJournal, clock: Any, stream: str) -> None:
    await steered.open_run(opening(stream, retention=Retention(0, 0, 0)))
    clock.ms += 1000 * 24 * HOUR_MS
    assert await steered.end_due(stream, "r1", 0, SAYS) is None
    assert await due(steered, stream) == []


# After an ending.


async def test_filing_an_ending_again_does_nothing_again(journal: Journal, stream: str) -> None:
    opened = await journal.open_run(opening(stream, idle_timeout_s=3600))
    await journal.append(batch(stream, 1, "a", ending=COMPLETED))
    for _ in range(3):
        await journal.file_ending(stream, "r1")
    listed = [ended for ended in await list_ended(journal, opened.first.ms - 1) if ended.stream == stream]
    assert [ended.info for ended in listed] == [await journal.run(stream, "r1")]
    assert len(await everything(journal, stream)) == 3


async def test_filing_the_ending_of_an_open_run_does_nothing(
    journal: Journal, owner: Any, stream: str
) -> None:
    opened = await journal.open_run(opening(stream, "r1", idle_timeout_s=SOON_S))
    await journal.open_run(opening(stream, "r2", owner=owner.name))
    for run in ("r1", "r2"):
        await journal.file_ending(stream, run)
    assert stream not in [ended.stream for ended in await list_ended(journal, opened.first.ms - 1)]
    assert len(await everything(journal, stream)) == 2
    assert await until(lambda: due(journal, stream)) == ["r1"]
    await until(lambda: journal.end_due(stream, "r1", 0, SAYS))
    assert await the_ending(journal, stream) == ("lost", "idle_timeout")


async def test_filing_the_ending_of_an_unknown_run_is_no_error(journal: Journal, stream: str) -> None:
    await journal.file_ending(stream, "r1")
    with pytest.raises(UnknownStream):
        await journal.describe(stream)
    await journal.open_run(opening(stream))
    await journal.file_ending(stream, "r2")


async def test_reindexing_walks_all_streams_and_changes_nothing(
    journal: Journal, name: Callable[[str], str]
) -> None:
    streams = [name(f"{n}") for n in range(5)]
    for stream in streams:
        await journal.open_run(opening(stream, "r1", idle_timeout_s=SOON_S))
        await journal.open_run(opening(stream, "r2", idle_timeout_s=3600))
        await journal.append(batch(stream, 1, "a", run="r2", ending=COMPLETED))
    place, steps = "", 0
    while steps == 0 or place:
        place = await journal.reindex(place, 2)
        steps += 1
        assert steps < 100_000
    for stream in streams:
        assert await until(lambda stream=stream: due(journal, stream)) == ["r1"]  # type: ignore[misc]
        assert len(await everything(journal, stream)) == 4
        await until(lambda stream=stream: journal.end_due(stream, "r1", 0, SAYS))  # type: ignore[misc]


# Processes.


def another_owner() -> str:
    return f"owner-{secrets.token_hex(8)}"


async def test_the_journal_tells_its_time_to_who_renews(journal: Journal, stream: str) -> None:
    me = another_owner()
    before = (await journal.open_run(opening(stream))).first.ms
    await journal.renew(me, 60)
    renewal = await journal.renew(me, 60)
    assert renewal.unbroken
    after = (await journal.open_run(opening(stream, "r2"))).first.ms
    assert before <= renewal.now_ms <= after
    await journal.resign(me)


@many_processes
async def test_a_lease_that_lapsed_in_between_is_a_broken_one(journal: Journal, stream: str) -> None:
    me = another_owner()
    await journal.open_run(opening(stream, owner=me))
    await journal.renew(me, SOON_S)

    async def lapsed() -> bool:
        return me in await journal.lapsed_owners()

    await until(lapsed)
    assert not (await journal.renew(me, 60)).unbroken
    assert not await lapsed()
    assert (await journal.renew(me, 60)).unbroken
    await journal.end_run(stream, "r1", CANCELLED, {})


@many_processes
async def test_who_owns_runs_and_holds_no_lease_is_found(journal: Journal, stream: str) -> None:
    """One that never held one too, and one that resigned."""
    silent, alive, resigned, idle = (another_owner() for _ in range(4))
    for each in (alive, resigned, idle):
        await journal.renew(each, 60)
    for number, each in enumerate((silent, alive, resigned)):
        await journal.open_run(opening(stream, f"r{number}", owner=each))
    lapsed = set(await journal.lapsed_owners()) & {silent, alive, resigned, idle}
    assert lapsed == {silent}
    await journal.resign(resigned)
    await journal.resign(resigned)
    await journal.resign(idle)
    lapsed = set(await journal.lapsed_owners()) & {silent, alive, resigned}
    assert lapsed == {silent, resigned}
    for number in range(3):
        await journal.end_run(stream, f"r{number}", CANCELLED, {})


async def test_what_a_process_owns_is_listed_until_it_ends(
    journal: Journal, name: Callable[[str], str]
) -> None:
    me = another_owner()
    mine = [(name(of), run) for of in ("one", "two") for run in ("r1", "r2")]
    for stream, run in mine:
        await journal.open_run(opening(stream, run, owner=me))
    await journal.open_run(opening(name("one"), "another", owner=another_owner()))
    await journal.open_run(opening(name("one"), "nobody"))
    assert sorted(await journal.owned(me, 10)) == sorted(mine)
    assert len(await journal.owned(me, 3)) == 3

    async def owns(*runs: tuple[str, str]) -> bool:
        return sorted(await journal.owned(me, 10)) == sorted(runs)

    await journal.append(batch(*(name("one"), 1), "a", ending=COMPLETED))
    await until(lambda: owns(*mine[1:]))
    await journal.end_run(*mine[1], CANCELLED, {})
    await until(lambda: owns(*mine[2:]))
    await journal.take_over(*mine[2], "second", 60)
    await until(lambda: owns(mine[3]))
    await journal.open_run(opening(name("two"), "r3", supersedes=["r2"]))
    await until(owns)

    async def is_forgotten() -> bool:
        return me not in await journal.lapsed_owners()

    await until(is_forgotten)
    assert await journal.owned(another_owner(), 10) == []


async def test_the_runs_of_a_deleted_stream_are_nobodys(journal: Journal, stream: str) -> None:
    """Whoever still finds one in an index has it dropped."""
    me = another_owner()
    await journal.open_run(opening(stream, owner=me))
    await journal.delete(stream)
    await journal.file_ending(stream, "r1")
    assert list(await journal.owned(me, 10)) == []
    assert me not in await journal.lapsed_owners()


async def test_a_journal_of_one_process_ends_what_the_former_one_owned(
    clock: Any, stream: str, tmp_path: Path
) -> None:
    """Others' pushed runs go on: their producers come back."""
    former = SqliteJournal(tmp_path / "relay.db", clock_ms=clock)
    await former.start(DeafFollower())
    await former.open_run(opening(stream, "owned", owner=another_owner(), deliver=True))
    await former.open_run(opening(stream, "pushed", idle_timeout_s=60, max_run_s=3600))
    await former.append(batch(stream, 1, "a", run="owned", text_bytes=1))
    await former.close()
    clock.ms += 30_000
    journal = SqliteJournal(tmp_path / "relay.db", clock_ms=clock)
    await journal.start(DeafFollower())
    assert await the_ending(journal, stream, "owned") == ("lost", "owner_lost")
    assert said(await everything(journal, stream))[2:] == [("owned", "a"), ("owned", "run.ended")]
    assert (await journal.run(stream, "owned")).error
    assert await journal.end_due(stream, "pushed", 0, SAYS) is None
    assert (await journal.append(batch(stream, 1, "b", run="pushed"))).appended == 1
    assert [delivery.run for delivery in await journal.claim_deliveries(10, 60)] == ["owned"]
    assert [ended.info.run for ended in await list_ended(journal, 0)] == ["owned"]
    await journal.close()
