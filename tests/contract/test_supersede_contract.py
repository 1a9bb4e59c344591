"""What relay.journal.base promises of runs that take the place of others (regenerate), of every backend."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
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
    opening,
    said,
    the_ending,
)

from relay.cursor import ORIGIN
from relay.errors import RunEnded, RunExists, StreamBusy, StreamSealed, UnknownRun, UnknownStream
from relay.frame import run_ended, run_superseded
from relay.journal.base import Journal, Opened, StreamChange
from relay.lifecycle import Reason, Status, ending
from relay.limits import Retention

# Which frames, and whose.


async def test_an_open_run_is_told_of_its_successor_and_ends_before_it_begins(
    journal: Journal, ear: Any, owner: Any, stream: str
) -> None:
    await journal.open_run(opening(stream, "r1", owner=owner.name))
    last = (await journal.append(batch(stream, 1, "a", text_bytes=1))).last
    journal.watch(stream)
    await ear.hears(stream, "doubt")
    opened = await journal.open_run(opening(stream, "r2", supersedes=["r1"]))
    frames = await everything(journal, stream)
    assert said(frames[2:]) == [("r1", "run.superseded"), ("r1", "run.ended"), ("r2", "run.started")]
    assert {frame.event for frame in frames[2:]} == {"relay"}
    assert frames[2].data == run_superseded("r1", "r2")
    assert frames[3].data == run_ended("r1", ending(Reason.SUPERSEDED), 1, 1)
    assert opened == Opened(frames[3].id, frames[4].id, frames[4].id, ("r1",), 0, ())
    assert await ear.hears_frames(stream, 3) == frames[2:]
    assert (await ear.hears(stream, "frames"))[0].previous == last
    await owner.hears_of(stream, "r1")
    assert await the_ending(journal, stream, "r1") == ("cancelled", "superseded")
    assert (await journal.run(stream, "r1")).superseded_by == "r2"
    info = await journal.run(stream, "r2")
    assert (info.status, info.start, info.last, info.superseded_by) == (
        *(Status.OPEN, opened.start, opened.last),
        "",
    )
    described = await journal.describe(stream)
    assert (list(described.open_runs), described.latest_run) == (["r2"], "r2")
    journal.unwatch(stream)


async def test_a_run_that_had_ended_is_superseded_by_a_frame_of_the_new_one(
    journal: Journal, stream: str
) -> None:
    """Its terminal frame stays its last (P3)."""
    await journal.open_run(opening(stream, "r1"))
    await journal.append(batch(stream, 1, "a", ending=COMPLETED))
    before = await journal.run(stream, "r1")
    opened = await journal.open_run(opening(stream, "r2", supersedes=["r1"]))
    frames = await everything(journal, stream)
    assert said(frames[3:]) == [("r2", "run.started"), ("r2", "run.superseded")]
    assert frames[4].data == run_superseded("r1", "r2")
    assert opened == Opened(frames[2].id, frames[3].id, frames[4].id, ("r1",), 0, ())
    assert await the_ending(journal, stream, "r1") == ("completed", "producer_end")
    assert await journal.run(stream, "r1") == replace(before, superseded_by="r2")
    info = await journal.run(stream, "r2")
    assert (info.last, info.last_data, info.frames) == (opened.last, 0, 0)
    assert (await journal.append(batch(stream, 1, "b", run="r2"))).next_seq == 2


async def test_several_runs_are_superseded_at_once(journal: Journal, stream: str) -> None:
    for run in ("r1", "r2", "r3", "r4"):
        await journal.open_run(opening(stream, run))
    await journal.end_run(stream, "r1", CANCELLED, {})
    await journal.append(batch(stream, 1, "a", run="r3", ending=COMPLETED))
    before = len(await everything(journal, stream))
    opened = await journal.open_run(opening(stream, "r5", supersedes=["r1", "r2", "r3", "r4"]))
    frames = (await everything(journal, stream))[before:]
    whose = said(frames)
    assert sorted(whose[:4]) == [
        *(("r2", "run.ended"), ("r2", "run.superseded"), ("r4", "run.ended"), ("r4", "run.superseded"))
    ]
    for run in ("r2", "r4"):
        assert whose.index((run, "run.superseded")) < whose.index((run, "run.ended"))
    assert whose[4:] == [("r5", "run.started"), ("r5", "run.superseded"), ("r5", "run.superseded")]
    assert sorted(data(frames[5:])) == [run_superseded("r1", "r5"), run_superseded("r3", "r5")]
    assert {frame.ms for frame in frames} == {opened.first.ms}
    assert (opened.start, opened.first, opened.last) == (frames[3].id, frames[4].id, frames[6].id)
    assert sorted(opened.superseded) == ["r1", "r2", "r3", "r4"]
    endings = [await the_ending(journal, stream, run) for run in ("r1", "r2", "r3", "r4")]
    assert [reason for _, reason in endings] == [
        *("client_cancel", "superseded", "producer_end", "superseded")
    ]
    infos = [await journal.run(stream, run) for run in ("r1", "r2", "r3", "r4")]
    assert {info.superseded_by for info in infos} == {"r5"}
    assert list((await journal.describe(stream)).open_runs) == ["r5"]


async def test_latest_is_the_newest_run_open_or_not(journal: Journal, stream: str) -> None:
    await journal.open_run(opening(stream, "r1"))
    await journal.open_run(opening(stream, "r2"))
    await journal.append(batch(stream, 1, "a", run="r2", ending=COMPLETED))
    assert (await journal.open_run(opening(stream, "r3", supersedes=["latest"]))).superseded == ("r2",)
    assert (await journal.open_run(opening(stream, "r4", supersedes=["latest"]))).superseded == ("r3",)
    assert (await journal.run(stream, "r1")).status is Status.OPEN
    assert await the_ending(journal, stream, "r3") == ("cancelled", "superseded")


async def test_latest_of_a_stream_without_runs_is_none(journal: Journal, name: Callable[[str], str]) -> None:
    await journal.put_stream(name("empty"), Retention(), StreamChange())
    for stream in (name("new"), name("empty")):
        opened = await journal.open_run(opening(stream, supersedes=["latest"]))
        assert (opened.start, opened.first.seq, list(opened.superseded)) == (ORIGIN, 1, [])
        assert said(await everything(journal, stream)) == [("r1", "run.started")]


async def test_a_run_named_twice_is_superseded_once(journal: Journal, stream: str) -> None:
    await journal.open_run(opening(stream, "r1"))
    again = opening(stream, "r2", supersedes=["r1", "latest", "r1"], if_busy="supersede")
    assert list((await journal.open_run(again)).superseded) == ["r1"]
    assert len(await everything(journal, stream)) == 4


async def test_a_superseded_run_can_be_superseded_again(journal: Journal, stream: str) -> None:
    """By another regenerate of the same answer; the newest successor is the one it names."""
    await journal.open_run(opening(stream, "r1"))
    await journal.open_run(opening(stream, "r2", supersedes=["r1"]))
    opened = await journal.open_run(opening(stream, "r3", supersedes=["r1", "r2"]))
    assert (list(opened.superseded), list(opened.ended)) == (["r2", "r1"], ["r2"])
    infos = [await journal.run(stream, run) for run in ("r1", "r2")]
    assert [info.superseded_by for info in infos] == ["r3", "r3"]
    frames = await everything(journal, stream)
    assert said(frames[4:]) == [
        ("r2", "run.superseded"),
        ("r2", "run.ended"),
        ("r3", "run.started"),
        ("r3", "run.superseded"),
    ]


async def test_a_proxied_run_that_is_superseded_says_so_in_its_dialect(journal: Journal, stream: str) -> None:
    proxied = {"answer": PROXIED, "dialect": "openai-chat"}
    await journal.open_run(opening(stream, "r1", **proxied))
    await journal.open_run(opening(stream, "r2"))
    await journal.open_run(opening(stream, "r3", **proxied))
    await journal.append(batch(stream, 1, "a", run="r3", ending=COMPLETED))
    events = {"supersedes": ["r1", "r2", "r3"], "error_events": ERROR_EVENTS}
    await journal.open_run(opening(stream, "r4", **proxied, **events))
    frames = (await everything(journal, stream))[5:]
    own = {run: said([frame for frame in frames if frame.run == run]) for run in ("r1", "r2", "r3")}
    error = ("r1", ERROR_EVENT.data.decode())
    assert sorted(own["r1"][:2]) == sorted([("r1", "run.superseded"), error])
    assert own["r1"][2:] == [("r1", "run.ended")]
    assert own["r2"] == [("r2", "run.superseded"), ("r2", "run.ended")]
    assert own["r3"] == []
    info = await journal.run(stream, "r1")
    assert (info.frames, info.last_data) == (0, next(f.seq for f in frames if not f.is_control))
    assert (await journal.describe(stream)).last_data == info.last_data


async def test_p4_the_writer_of_a_superseded_run_appends_nothing_more(journal: Journal, stream: str) -> None:
    await journal.open_run(opening(stream, "r1"))
    await journal.append(batch(stream, 1, "a"))
    await journal.open_run(opening(stream, "r2", supersedes=["r1"]))
    for late in (batch(stream, 2, "b"), batch(stream, 0, "b"), batch(stream, 2, ending=COMPLETED)):
        with pytest.raises(RunEnded) as refused:
            await journal.append(late)
        assert refused.value.extra == {"run_status": "cancelled", "reason": "superseded"}
    assert (await journal.append(batch(stream, 1, "a"))).duplicates == 1
    assert len(await everything(journal, stream)) == 5


# Repeating.


async def test_opening_again_supersedes_nothing_again(journal: Journal, stream: str) -> None:
    """It answers as the first time, whatever came after."""
    await journal.open_run(opening(stream, "r1"))
    await journal.open_run(opening(stream, "other"))
    await journal.append(batch(stream, 1, "a", run="other"))
    await journal.append(batch(stream, 1, "a", ending=COMPLETED))
    await journal.open_run(opening(stream, "r2"))
    regenerate = opening(stream, "r3", supersedes=["r1", "latest"])
    first = await journal.open_run(regenerate)
    assert (list(first.superseded), list(first.ended)) == (["r2", "r1"], ["r2"])
    assert (first.frames_after, list(first.runs_after)) == (2, ["other"])
    assert await journal.open_run(regenerate) == first
    await journal.append(batch(stream, 1, "x", run="r3"))
    await journal.open_run(opening(stream, "r4"))
    before = await everything(journal, stream)
    assert await journal.open_run(regenerate) == first
    assert (
        await journal.open_run(opening(stream, "r3", supersedes=["r1", "latest"], if_busy="reject")) == first
    )
    assert await everything(journal, stream) == before
    assert (await journal.run(stream, "r4")).status is Status.OPEN


# Refusing.


async def test_to_supersede_an_unknown_run_changes_nothing(
    journal: Journal, name: Callable[[str], str]
) -> None:
    stream = name("stream")
    with pytest.raises(UnknownRun):
        await journal.open_run(opening(stream, supersedes=["r1"]))
    with pytest.raises(UnknownStream):
        await journal.describe(stream)
    await journal.open_run(opening(stream, "r1"))
    await journal.open_run(opening(name("elsewhere"), "theirs"))
    before = await everything(journal, stream)
    for unknown in (["r1", "nobody"], ["nobody", "latest"], ["r1", "r2"], ["theirs"]):
        with pytest.raises(UnknownRun):
            await journal.open_run(opening(stream, "r2", supersedes=unknown, if_busy="supersede", seal=True))
    assert await everything(journal, stream) == before
    info = await journal.describe(stream)
    assert (list(info.open_runs), info.runs, info.sealed) == (["r1"], 1, False)
    assert (await journal.run(stream, "r1")).superseded_by == ""
    assert await journal.resolve_token(f"token-{stream}-r2") is None
    assert (await journal.append(batch(stream, 1, "a"))).appended == 1


async def test_a_busy_stream_can_refuse_further_runs(journal: Journal, stream: str) -> None:
    await journal.open_run(opening(stream, "r1", if_busy="reject"))
    await journal.open_run(opening(stream, "r2"))
    before = await everything(journal, stream)
    with pytest.raises(StreamBusy) as refused:
        await journal.open_run(opening(stream, "r3", if_busy="reject"))
    assert refused.value.extra == {"open_runs": ["r1", "r2"]}
    assert await everything(journal, stream) == before
    await journal.end_run(stream, "r1", CANCELLED, {})
    with pytest.raises(StreamBusy) as refused:
        await journal.open_run(opening(stream, "r3", if_busy="reject"))
    assert refused.value.extra == {"open_runs": ["r2"]}
    with pytest.raises(StreamBusy):
        await journal.open_run(opening(stream, "r3", supersedes=["r2"], if_busy="reject"))
    await journal.append(batch(stream, 1, "a", run="r2", ending=COMPLETED))
    assert (await journal.open_run(opening(stream, "r3", if_busy="reject"))).superseded == ()


async def test_a_busy_stream_can_be_cleared_for_the_next_run(journal: Journal, stream: str) -> None:
    await journal.open_run(opening(stream, "r0"))
    await journal.append(batch(stream, 1, "a", run="r0", ending=COMPLETED))
    await journal.open_run(opening(stream, "r1", if_busy="supersede"))
    await journal.open_run(opening(stream, "r2", if_busy="allow"))
    opened = await journal.open_run(opening(stream, "r3", if_busy="supersede"))
    assert sorted(opened.superseded) == ["r1", "r2"]
    assert list((await journal.describe(stream)).open_runs) == ["r3"]
    assert (await journal.run(stream, "r0")).superseded_by == ""
    both = await journal.open_run(opening(stream, "r4", supersedes=["r0"], if_busy="supersede"))
    assert list(both.superseded) == ["r3", "r0"]


async def test_the_first_reason_in_order_to_refuse_an_opening_is_the_one_raised(
    journal: Journal, stream: str
) -> None:
    """Run exists, stream sealed, stream busy, unknown run; all of them at once, then one less."""
    wrong = {"supersedes": ["nobody"], "if_busy": "reject"}
    await journal.open_run(opening(stream, "r1"))
    with pytest.raises(StreamBusy):
        await journal.open_run(opening(stream, "r2", **wrong))
    await journal.end_run(stream, "r1", CANCELLED, {})
    with pytest.raises(UnknownRun):
        await journal.open_run(opening(stream, "r2", **wrong))
    await journal.open_run(opening(stream, "r2", seal=True))
    with pytest.raises(StreamSealed):
        await journal.open_run(opening(stream, "r3", **wrong))
    with pytest.raises(RunExists):
        await journal.open_run(opening(stream, "r2", writer="another", **wrong))


async def test_the_run_that_seals_can_supersede(journal: Journal, stream: str) -> None:
    await journal.open_run(opening(stream, "r1"))
    await journal.open_run(opening(stream, "r2", supersedes=["r1"], seal=True))
    info = await journal.describe(stream)
    assert (info.sealed, list(info.open_runs), info.finished) == (True, ["r2"], False)


# What is left standing.


async def test_frames_of_other_runs_since_the_first_superseded_one_are_counted(
    journal: Journal, stream: str
) -> None:
    """Exactly, where runs interleave: those before its start are not, and neither are its own."""
    await journal.open_run(opening(stream, "early"))
    await journal.append(batch(stream, 1, "1", "2", "3", run="early"))
    await journal.open_run(opening(stream, "r1"))
    await journal.append(batch(stream, 1, "a", "b"))
    await journal.append(batch(stream, 4, "4", run="early"))
    await journal.open_run(opening(stream, "between"))
    await journal.append(batch(stream, 3, "c"))
    await journal.append(batch(stream, 1, "x", "y", run="between", ending=COMPLETED))
    await journal.open_run(opening(stream, "r2"))
    await journal.append(batch(stream, 1, "a", run="r2", ending=COMPLETED))
    await journal.append(batch(stream, 5, "5", "6", run="early"))
    frames = await everything(journal, stream)

    def others(first: str, *superseded: str) -> tuple[int, set[str]]:
        start = next(frame.seq for frame in frames if frame.run == first)
        runs = [frame.run for frame in frames if frame.seq >= start and frame.run not in superseded]
        return len(runs), set(runs)

    assert others("r1", "r1", "r2") == (7, {"early", "between"})
    opened = await journal.open_run(opening(stream, "r3", supersedes=["r2", "r1"]))
    assert (opened.frames_after, set(opened.runs_after)) == others("r1", "r1", "r2")
    assert len(opened.runs_after) == 2
    frames = await everything(journal, stream)
    opened = await journal.open_run(opening(stream, "r4", supersedes=["r2"]))
    assert (opened.frames_after, set(opened.runs_after)) == others("r2", "r2")
    frames = await everything(journal, stream)
    opened = await journal.open_run(opening(stream, "r5", supersedes=["latest"]))
    assert (opened.frames_after, set(opened.runs_after)) == others("r4", "r4") == (0, set())
    frames = await everything(journal, stream)
    opened = await journal.open_run(opening(stream, "r6", supersedes=["r1", "r4", "r5"]))
    assert (opened.frames_after, set(opened.runs_after)) == others("r1", "r1", "r4", "r5")


async def test_of_many_runs_that_stand_after_only_some_are_named(journal: Journal, stream: str) -> None:
    await journal.open_run(opening(stream, "r1"))
    runs = [f"other-{n}" for n in range(70)]
    for run in runs:
        await journal.open_run(opening(stream, run))
    opened = await journal.open_run(opening(stream, "r2", supersedes=["r1"]))
    assert opened.frames_after == 70
    assert len(opened.runs_after) == len(set(opened.runs_after)) == 64
    assert set(opened.runs_after) <= set(runs)


# At once.


async def test_p3_of_many_who_regenerate_at_once_the_last_is_left_open(journal: Journal, stream: str) -> None:
    await journal.open_run(opening(stream, "r0"))

    async def regenerate(n: int) -> Opened:
        return await journal.open_run(opening(stream, f"r{n}", supersedes=["latest"]))

    async def write() -> None:
        try:
            for seq in range(1, 100):
                await journal.append(batch(stream, seq, "x", run="r0"))
        except RunEnded:
            pass

    *outcomes, _ = await asyncio.gather(*map(regenerate, range(1, 13)), write())
    (last,) = (await journal.describe(stream)).open_runs
    for n in range(13):
        if f"r{n}" != last:
            assert await the_ending(journal, stream, f"r{n}") == ("cancelled", "superseded")
    assert sorted(run for opened in outcomes if opened for run in opened.superseded) == sorted(
        f"r{n}" for n in range(13) if f"r{n}" != last
    )
    frames = await everything(journal, stream)
    assert [frame.seq for frame in frames] == list(range(1, len(frames) + 1))


async def test_the_superseded_runs_that_were_open_until_then_are_told_apart(
    journal: Journal, stream: str
) -> None:
    for run in ("r1", "r2", "r3", "r4"):
        await journal.open_run(opening(stream, run))
    await journal.append(batch(stream, 1, run="r1", ending=COMPLETED))
    await journal.append(batch(stream, 1, run="r3", ending=COMPLETED))
    wanted = opening(stream, "r5", supersedes=["r3", "r4", "r1", "r2"])
    opened = await journal.open_run(wanted)
    assert (opened.superseded, opened.ended) == (("r2", "r4", "r1", "r3"), ("r2", "r4"))
    assert (await journal.open_run(wanted)).ended == ("r2", "r4")
