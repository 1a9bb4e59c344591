"""What relay.journal.base promises of a run from its opening to its ending, whoever ends it."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from typing import Any

import pytest
from contract.phrases import (
    CANCELLED,
    COMPLETED,
    ERROR_EVENT,
    ERROR_EVENTS,
    FAILED,
    LOST,
    PROXIED,
    batch,
    data,
    everything,
    list_ended,
    opening,
    said,
    the_ending,
    top,
    until,
)

from relay.cursor import ORIGIN
from relay.errors import (
    Fenced,
    InvalidParameter,
    RunEnded,
    RunExists,
    SequenceGap,
    StreamSealed,
    UnknownRun,
    UnknownStream,
)
from relay.frame import Event, run_ended, run_started
from relay.journal.base import Appended, Ended, EndedRun, Journal, Opened, RunState, StreamTop, TakenOver
from relay.lifecycle import Ending, Reason, Status, ending
from relay.limits import Retention

# Opening runs.


async def test_a_first_run_creates_the_stream_and_starts_at_the_origin(journal: Journal, stream: str) -> None:
    opened = await journal.open_run(opening(stream))
    info = await journal.describe(stream)
    assert opened.start == ORIGIN
    assert opened.first.seq == 1
    assert info.extent.earliest_seq == 1
    assert info.extent.top == opened.first
    assert 0 < info.extent.created_ms <= opened.first.ms


async def test_a_later_run_starts_where_the_stream_stood(journal: Journal, stream: str) -> None:
    first = await journal.open_run(opening(stream, "r1"))
    second = await journal.open_run(opening(stream, "r2"))
    assert second.start == first.first
    assert second.first.seq == 2


async def test_run_started_says_run_dialect_and_metadata(journal: Journal, stream: str) -> None:
    metadata = '{"model": "m", "nested": {"n": [1, 2.5, null, "ü"]}}'
    await journal.open_run(opening(stream, dialect="openai-chat", metadata=metadata))
    (frame,) = await everything(journal, stream)
    assert (frame.seq, frame.run, frame.event) == (1, "r1", "relay")
    assert frame.is_control
    assert frame.data == run_started("r1", "openai-chat", json.loads(metadata))
    assert json.loads(frame.data) == {
        "type": "run.started",
        "run": "r1",
        "dialect": "openai-chat",
        "metadata": {"model": "m", "nested": {"n": [1, 2.5, None, "ü"]}},
    }


async def test_run_started_leaves_out_what_was_not_given(journal: Journal, stream: str) -> None:
    await journal.open_run(opening(stream, answer='{"status":200}'))
    (frame,) = await everything(journal, stream)
    assert frame.data == b'{"type":"run.started","run":"r1"}'


async def test_opening_again_answers_as_the_first_time(journal: Journal, stream: str) -> None:
    """Also after other frames, and after the run's end."""
    first = await journal.open_run(opening(stream))
    await journal.append(batch(stream, 1, "a"))
    assert await journal.open_run(opening(stream)) == first
    await journal.append(batch(stream, 2, ending=COMPLETED))
    assert await journal.open_run(opening(stream)) == first
    assert len(await everything(journal, stream)) == 3
    assert (await journal.describe(stream)).runs == 1


async def test_another_writer_cannot_open_the_same_run(journal: Journal, stream: str) -> None:
    await journal.open_run(opening(stream))
    with pytest.raises(RunExists):
        await journal.open_run(opening(stream, writer="another"))
    assert len(await everything(journal, stream)) == 1


async def test_one_of_many_concurrent_openers_wins(journal: Journal, stream: str) -> None:
    attempts = [journal.open_run(opening(stream, writer=f"w{i}")) for i in range(10)]
    outcomes = await asyncio.gather(*attempts, return_exceptions=True)
    assert sum(isinstance(outcome, Opened) for outcome in outcomes) == 1
    assert sum(isinstance(outcome, RunExists) for outcome in outcomes) == 9


async def test_a_sealed_stream_takes_no_further_run(journal: Journal, stream: str) -> None:
    opened = await journal.open_run(opening(stream, seal=True))
    with pytest.raises(StreamSealed):
        await journal.open_run(opening(stream, "r2"))
    assert (await journal.describe(stream)).sealed
    assert await journal.open_run(opening(stream, seal=True)) == opened
    with pytest.raises(RunExists):
        await journal.open_run(opening(stream, writer="another"))


async def test_a_sealed_stream_is_finished_when_its_run_has_ended(journal: Journal, stream: str) -> None:
    await journal.open_run(opening(stream, seal=True))
    assert not (await journal.describe(stream)).finished
    await journal.append(batch(stream, 1, "a", ending=COMPLETED))
    assert (await journal.describe(stream)).finished


async def test_retention_applies_only_to_a_new_stream(journal: Journal, stream: str) -> None:
    await journal.open_run(opening(stream, "r1", retention=Retention(100, 0, 0)))
    await journal.open_run(opening(stream, "r2", retention=Retention(7, 8, 9)))
    assert (await journal.describe(stream)).retention == Retention(100, 0, 0)


async def test_any_opening_can_seal_and_followers_are_told(journal: Journal, ear: Any, stream: str) -> None:
    """Its run is the last one, whatever is still open."""
    await journal.open_run(opening(stream, "r1"))
    journal.watch(stream)
    await ear.hears(stream, "doubt")
    opened = await journal.open_run(opening(stream, "r2", seal=True))
    await ear.hears(stream, "sealed")
    assert (await journal.describe(stream)).sealed
    assert dict(await journal.tops([stream])) == {stream: StreamTop(opened.last, True)}
    with pytest.raises(StreamSealed):
        await journal.open_run(opening(stream, "r3"))
    assert (await journal.append(batch(stream, 1, "a"))).appended == 1
    journal.unwatch(stream)


async def test_a_run_is_described_as_it_was_opened(journal: Journal, owner: Any, stream: str) -> None:
    opened = await journal.open_run(opening(stream, owner=owner.name))
    info = await journal.run(stream, "r1")
    assert (info.owner, info.idle_timeout_s, info.superseded_by) == (owner.name, 0, "")
    assert max(info.heard_ms, info.last.ms) == opened.first.ms
    await journal.open_run(opening(stream, "r2", idle_timeout_s=1234.5))
    info = await journal.run(stream, "r2")
    assert (info.owner, info.idle_timeout_s) == ("", 1234.5)


# Ending.


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(COMPLETED, id="completed"),
        pytest.param(FAILED, id="failed"),
        pytest.param(ending(Reason.CLIENT_CANCEL), id="cancelled"),
        pytest.param(ending(Reason.OWNER_LOST, "the owner is gone"), id="lost"),
    ],
)
async def test_run_ended_is_the_last_frame_of_the_same_step(
    journal: Journal, stream: str, how: Ending
) -> None:
    await journal.open_run(opening(stream))
    await journal.append(batch(stream, 1, "a", text_bytes=1))
    answer = await journal.append(batch(stream, 2, "b", "c", text_bytes=20, ending=how))
    frames = await everything(journal, stream)
    assert data(frames[1:4]) == [b"a", b"b", b"c"]
    assert (frames[4].run, frames[4].event) == ("r1", "relay")
    assert frames[4].data == run_ended("r1", how, 3, 21)
    assert answer == Appended(frames[4].id, 2, 0, 4)


async def test_run_ended_has_an_error_only_when_there_is_one(journal: Journal, stream: str) -> None:
    await journal.open_run(opening(stream, "r1"))
    await journal.append(batch(stream, 1, ending=COMPLETED))
    await journal.open_run(opening(stream, "r2"))
    await journal.append(batch(stream, 1, "ab", text_bytes=2, run="r2", ending=FAILED))
    ended = [frame.data for frame in await everything(journal, stream) if b"run.ended" in frame.data]
    assert ended == [
        b'{"type":"run.ended","run":"r1","status":"completed","reason":"producer_end",'
        b'"frames":0,"text_bytes":0}',
        b'{"type":"run.ended","run":"r2","status":"failed","reason":"producer_failed",'
        b'"error":"the \\"model\\" broke","frames":1,"text_bytes":2}',
    ]


async def test_nothing_new_is_appended_after_the_end(journal: Journal, stream: str) -> None:
    await journal.open_run(opening(stream))
    await journal.append(batch(stream, 1, "a", ending=FAILED))
    for late in (batch(stream, 2, "b"), batch(stream, 1, "a", "b"), batch(stream, 2, "b", ending=FAILED)):
        with pytest.raises(RunEnded) as refused:
            await journal.append(late)
        assert refused.value.extra == {"run_status": "failed", "reason": "producer_failed"}
    assert len(await everything(journal, stream)) == 3


async def test_an_ending_batch_can_be_retried(journal: Journal, stream: str) -> None:
    """Duplicates are dropped before the status is checked, and the same ending is one of them."""
    await journal.open_run(opening(stream))
    last = batch(stream, 1, "a", "b", ending=FAILED)
    first = await journal.append(last)
    assert await journal.append(last) == Appended(first.last, 0, 2, 3)
    assert await journal.append(batch(stream, 3, ending=FAILED)) == Appended(first.last, 0, 0, 3)
    assert len(await everything(journal, stream)) == 4


async def test_duplicates_alone_are_no_error_after_the_end(journal: Journal, stream: str) -> None:
    await journal.open_run(opening(stream))
    end = await journal.append(batch(stream, 1, "a", ending=COMPLETED))
    assert await journal.append(batch(stream, 1, "a")) == Appended(end.last, 0, 1, 2)
    assert await journal.append(batch(stream, 2)) == Appended(end.last, 0, 0, 2)


async def test_an_ending_with_another_error_text_is_the_same_ending(journal: Journal, stream: str) -> None:
    await journal.open_run(opening(stream))
    end = await journal.append(batch(stream, 1, ending=FAILED))
    other = ending(Reason.PRODUCER_FAILED, "said otherwise")
    assert (await journal.append(batch(stream, 1, ending=other))).last == end.last
    assert (await journal.run(stream, "r1")).error == FAILED.error


async def test_another_ending_is_refused(journal: Journal, stream: str) -> None:
    await journal.open_run(opening(stream))
    await journal.append(batch(stream, 1, ending=COMPLETED))
    for other in (FAILED, ending(Reason.UPSTREAM_END)):
        with pytest.raises(RunEnded) as refused:
            await journal.append(batch(stream, 1, ending=other))
        assert refused.value.extra == {"run_status": "completed", "reason": "producer_end"}


async def test_one_of_two_concurrent_endings_wins(journal: Journal, stream: str) -> None:
    await journal.open_run(opening(stream))
    outcomes = await asyncio.gather(
        journal.append(batch(stream, 1, ending=COMPLETED)),
        journal.append(batch(stream, 1, ending=FAILED)),
        return_exceptions=True,
    )
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["Appended", "RunEnded"]
    assert len(await everything(journal, stream)) == 2


async def test_other_runs_go_on_after_one_has_ended(journal: Journal, stream: str) -> None:
    await journal.open_run(opening(stream, "r1"))
    await journal.open_run(opening(stream, "r2"))
    await journal.append(batch(stream, 1, ending=COMPLETED))
    assert (await journal.append(batch(stream, 1, "a", run="r2"))).appended == 1
    assert (await journal.describe(stream)).open_runs == ["r2"]


# Ending with relay's own words.


async def test_the_error_event_comes_before_the_terminal_frame_and_is_not_counted(
    journal: Journal, stream: str
) -> None:
    await journal.open_run(opening(stream))
    answer = await journal.append(batch(stream, 1, "a", text_bytes=1, ending=FAILED, error_event=ERROR_EVENT))
    frames = await everything(journal, stream)
    assert [(frame.run, frame.event) for frame in frames] == [
        ("r1", "relay"),
        ("r1", "delta"),
        ("r1", "error"),
        ("r1", "relay"),
    ]
    assert frames[2].data == ERROR_EVENT.data
    assert frames[3].data == run_ended("r1", FAILED, 1, 1)
    assert answer == Appended(frames[3].id, 1, 0, 2)
    info = await journal.run(stream, "r1")
    assert (info.frames, info.last_data, info.last, info.text_bytes) == (1, 3, frames[3].id, 1)
    assert (await journal.describe(stream)).last_data == 3


async def test_an_error_event_without_an_ending_is_not_journaled(journal: Journal, stream: str) -> None:
    await journal.open_run(opening(stream, answer=PROXIED))
    answer = await journal.append(batch(stream, 1, "a", error_event=ERROR_EVENT))
    assert (answer.appended, answer.next_seq) == (1, 2)
    assert data(await everything(journal, stream))[1:] == [b"a"]


async def test_an_ending_with_its_error_event_can_be_retried(journal: Journal, stream: str) -> None:
    await journal.open_run(opening(stream))
    last = batch(stream, 1, "a", ending=FAILED, error_event=ERROR_EVENT)
    first = await journal.append(last)
    assert await journal.append(last) == Appended(first.last, 0, 1, 2)
    alone = batch(stream, 2, ending=FAILED, error_event=ERROR_EVENT)
    assert await journal.append(alone) == Appended(first.last, 0, 0, 2)
    assert len(await everything(journal, stream)) == 4


async def test_an_error_event_alone_takes_no_producer_sequence(journal: Journal, stream: str) -> None:
    """A retry of the producer's last frame is a duplicate, and not of relay's own event."""
    await journal.open_run(opening(stream))
    await journal.append(batch(stream, 1, "a"))
    end = await journal.append(batch(stream, 2, ending=FAILED, error_event=ERROR_EVENT))
    assert (end.appended, end.next_seq) == (0, 2)
    info = await journal.run(stream, "r1")
    assert (info.last_data, info.frames) == (3, 1)
    assert (await journal.describe(stream)).last_data == 3
    with pytest.raises(RunEnded):
        await journal.append(batch(stream, 2, "b"))
    assert (await journal.append(batch(stream, 1, "a"))).duplicates == 1


# Unnumbered frames.


async def test_unnumbered_frames_are_journaled_whatever_was_before(journal: Journal, stream: str) -> None:
    await journal.open_run(opening(stream))
    assert (await journal.append(batch(stream, 0, "a", text_bytes=1)))[1:] == (1, 0, 2)
    assert (await journal.append(batch(stream, 0, "a", "b", text_bytes=2)))[1:] == (2, 0, 4)
    assert (await journal.append(batch(stream, 4, "c")))[1:] == (1, 0, 5)
    assert (await journal.append(batch(stream, 3, "b", "c")))[1:] == (0, 2, 5)
    assert data((await everything(journal, stream))[1:]) == [b"a", b"a", b"b", b"c"]
    info = await journal.run(stream, "r1")
    assert (info.frames, info.text_bytes) == (4, 3)


async def test_unnumbered_frames_need_the_writer_and_an_open_run(journal: Journal, stream: str) -> None:
    await journal.open_run(opening(stream))
    with pytest.raises(Fenced):
        await journal.append(batch(stream, 0, "a", writer="another"))
    end = await journal.append(batch(stream, 0, "a", ending=COMPLETED))
    with pytest.raises(RunEnded):
        await journal.append(batch(stream, 0, "a", ending=COMPLETED))
    assert await journal.append(batch(stream, 0, ending=COMPLETED)) == Appended(end.last, 0, 0, 2)
    assert len(await everything(journal, stream)) == 3


# Taking over.


async def test_p4_a_run_that_was_taken_over_goes_on_where_it_stood_and_its_old_writer_is_fenced(
    journal: Journal, stream: str
) -> None:
    await journal.open_run(opening(stream))
    last = (await journal.append(batch(stream, 1, "a", "b"))).last
    await journal.open_run(opening(stream, "r2"))
    taken = await journal.take_over(stream, "r1", "second", 60)
    assert taken == TakenOver(3, last)
    for late in (batch(stream, 3, "c"), batch(stream, 1, "a"), batch(stream, 0, "c"), batch(stream, 3)):
        with pytest.raises(Fenced):
            await journal.append(late)
    with pytest.raises(Fenced):
        await journal.append(batch(stream, 3, ending=COMPLETED))
    again = await journal.append(batch(stream, 2, "b", "c", writer="second", ending=COMPLETED))
    assert (again.appended, again.duplicates, again.next_seq) == (1, 1, 4)
    assert await the_ending(journal, stream) == ("completed", "producer_end")


async def test_taking_over_again_answers_alike_and_journals_nothing(journal: Journal, stream: str) -> None:
    await journal.open_run(opening(stream))
    await journal.append(batch(stream, 1, "a"))
    first = await journal.take_over(stream, "r1", "second", 60)
    assert await journal.take_over(stream, "r1", "second", 60) == first
    assert len(await everything(journal, stream)) == 2
    assert (await journal.take_over(stream, "r1", "third", 60)) == first
    with pytest.raises(Fenced):
        await journal.append(batch(stream, 2, "b", writer="second"))


async def test_a_run_that_was_taken_over_has_no_owner_and_an_idle_timeout(
    journal: Journal, owner: Any, stream: str
) -> None:
    """One that had no owner keeps the timeout it was opened with."""
    await journal.open_run(opening(stream, "r1", owner=owner.name))
    await journal.open_run(opening(stream, "r2", idle_timeout_s=100))
    for run in ("r1", "r2"):
        await journal.take_over(stream, run, "second", 77)
        await journal.take_over(stream, run, "third", 88)
    await owner.hears_of(stream, "r1")
    infos = [await journal.run(stream, run) for run in ("r1", "r2")]
    assert [(info.owner, info.idle_timeout_s) for info in infos] == [("", 77), ("", 100)]
    assert (stream, "r2") not in owner.over


async def test_after_a_takeover_only_the_new_writer_opens_the_run_again(
    journal: Journal, stream: str
) -> None:
    opened = await journal.open_run(opening(stream))
    await journal.take_over(stream, "r1", "second", 60)
    with pytest.raises(RunExists):
        await journal.open_run(opening(stream))
    assert await journal.open_run(opening(stream, writer="second")) == opened


async def test_only_an_open_run_can_be_taken_over(journal: Journal, stream: str) -> None:
    with pytest.raises(UnknownStream):
        await journal.take_over(stream, "r1", "second", 60)
    await journal.open_run(opening(stream))
    with pytest.raises(UnknownRun):
        await journal.take_over(stream, "r2", "second", 60)
    end = batch(stream, 1, "a", ending=FAILED)
    last = (await journal.append(end)).last
    with pytest.raises(RunEnded) as refused:
        await journal.take_over(stream, "r1", "second", 60)
    assert refused.value.extra == {"run_status": "failed", "reason": "producer_failed"}
    assert (await journal.append(end)).last == last


# Ending somebody else's run.


async def test_anybody_can_end_a_run(journal: Journal, ear: Any, owner: Any, stream: str) -> None:
    """In one step, told to followers and to the owner; the writer finds out with its next append."""
    await journal.open_run(opening(stream, owner=owner.name))
    last = (await journal.append(batch(stream, 1, "a", text_bytes=5))).last
    journal.watch(stream)
    await ear.hears(stream, "doubt")
    ended = await journal.end_run(stream, "r1", CANCELLED, {})
    assert ended == Ended(True, Status.CANCELLED, "client_cancel", owner.name, 5)
    assert await the_ending(journal, stream) == ("cancelled", "client_cancel")
    (told,) = await ear.hears(stream, "frames")
    assert (told.previous, data(told.frames)) == (last, [run_ended("r1", CANCELLED, 1, 5)])
    await owner.hears_of(stream, "r1")
    with pytest.raises(RunEnded) as refused:
        await journal.append(batch(stream, 2, "b"))
    assert refused.value.extra == {"run_status": "cancelled", "reason": "client_cancel"}
    assert (await journal.append(batch(stream, 1, "a"))).duplicates == 1
    assert list((await journal.describe(stream)).open_runs) == []
    journal.unwatch(stream)


async def test_ending_a_run_that_ended_answers_how_it_ended(journal: Journal, stream: str) -> None:
    await journal.open_run(opening(stream, "r1"))
    await journal.open_run(opening(stream, "r2"))
    await journal.append(batch(stream, 1, "a", text_bytes=1, ending=FAILED))
    await journal.end_run(stream, "r2", CANCELLED, {})
    before = await everything(journal, stream)
    for how in (CANCELLED, FAILED, LOST):
        ended = await journal.end_run(stream, "r1", how, ERROR_EVENTS)
        assert ended == Ended(False, Status.FAILED, "producer_failed", "", 1)
        ended = await journal.end_run(stream, "r2", how, ERROR_EVENTS)
        assert ended == Ended(False, Status.CANCELLED, "client_cancel", "", 0)
    assert await everything(journal, stream) == before
    assert (await journal.run(stream, "r1")).error == FAILED.error


async def test_a_run_is_not_ended_for_an_owner_that_has_it_no_more(
    journal: Journal, owner: Any, stream: str
) -> None:
    await journal.open_run(opening(stream, "r1", owner=owner.name))
    await journal.open_run(opening(stream, "r2"))
    for run, named in (("r1", "another"), ("r2", owner.name)):
        ended = await journal.end_run(stream, run, LOST, ERROR_EVENTS, owner=named)
        assert (ended.by_this, ended.status, ended.reason) == (False, Status.OPEN, "")
    assert len(await everything(journal, stream)) == 2
    assert (await journal.end_run(stream, "r1", LOST, {}, owner=owner.name)).by_this
    assert await the_ending(journal, stream) == ("lost", "owner_lost")
    assert not (await journal.end_run(stream, "r1", LOST, {}, owner=owner.name)).by_this


async def test_a_run_that_was_taken_over_is_not_lost_with_its_former_owner(
    journal: Journal, owner: Any, stream: str
) -> None:
    await journal.open_run(opening(stream, owner=owner.name))
    await journal.take_over(stream, "r1", "second", 60)
    assert not (await journal.end_run(stream, "r1", LOST, {}, owner=owner.name)).by_this
    assert (await journal.append(batch(stream, 1, "a", writer="second"))).appended == 1


async def test_a_proxied_run_that_is_ended_says_so_in_its_dialect(journal: Journal, stream: str) -> None:
    """relay's own event, before the terminal frame and never counted as the producer's."""
    await journal.open_run(opening(stream, answer=PROXIED, dialect="raw"))
    await journal.append(batch(stream, 1, "a", text_bytes=1, dialect="openai-chat"))
    await journal.end_run(stream, "r1", LOST, ERROR_EVENTS | {"raw": Event("", b"not this one")})
    frames = await everything(journal, stream)
    assert (frames[2].run, frames[2].event, frames[2].data) == ("r1", "error", ERROR_EVENT.data)
    assert data(frames[3:]) == [run_ended("r1", LOST, 1, 1)]
    info = await journal.run(stream, "r1")
    assert (info.frames, info.last_data, info.last) == (1, 3, frames[3].id)
    assert not (await journal.end_run(stream, "r1", LOST, ERROR_EVENTS)).by_this
    assert len(await everything(journal, stream)) == 4


@pytest.mark.parametrize(
    "how",
    [
        pytest.param({"answer": "", "dialect": "openai-chat"}, id="pushed"),
        pytest.param({"answer": PROXIED, "dialect": "raw"}, id="a-dialect-without-words"),
        pytest.param({"answer": PROXIED, "dialect": ""}, id="no-dialect"),
    ],
)
async def test_no_other_run_gets_an_error_event(journal: Journal, stream: str, how: dict[str, str]) -> None:
    await journal.open_run(opening(stream, **how))
    await journal.end_run(stream, "r1", LOST, ERROR_EVENTS)
    assert said(await everything(journal, stream)) == [("r1", "run.started"), ("r1", "run.ended")]


async def test_an_append_can_make_a_run_one_that_was_proxied(journal: Journal, stream: str) -> None:
    await journal.open_run(opening(stream))
    proxied = {"answer": PROXIED, "dialect": "openai-chat"}
    await asyncio.gather(  # in this order, and without waiting for one another
        journal.append(batch(stream, 1, **proxied)),
        journal.append(batch(stream, 1, "a")),
        journal.end_run(stream, "r1", LOST, ERROR_EVENTS),
    )
    assert (await journal.run(stream, "r1")).answer == PROXIED
    assert len(await everything(journal, stream)) == 4


async def test_only_a_run_that_is_known_can_be_ended(journal: Journal, stream: str) -> None:
    with pytest.raises(UnknownStream):
        await journal.end_run(stream, "r1", CANCELLED, {})
    await journal.open_run(opening(stream))
    with pytest.raises(UnknownRun):
        await journal.end_run(stream, "r2", CANCELLED, {})


async def test_an_owner_is_not_told_of_what_it_ended_itself(
    journal: Journal, owner: Any, stream: str
) -> None:
    await journal.open_run(opening(stream, "r1", owner=owner.name))
    await journal.open_run(opening(stream, "r2", owner=owner.name))
    await journal.append(batch(stream, 1, "a", ending=COMPLETED))
    await journal.end_run(stream, "r1", CANCELLED, {})
    await journal.end_run(stream, "r2", CANCELLED, {})
    await owner.hears_of(stream, "r2")
    assert (stream, "r1") not in owner.over


# Exactly one ending.


@pytest.mark.parametrize("seed", range(8))
async def test_p3_of_everybody_who_would_end_a_run_at_once_one_does(
    journal: Journal, owner: Any, stream: str, seed: int
) -> None:
    """Its writer, those who cancel, supersede or take it over, and a reaper; nothing comes after it (P4)."""
    proxied = {"answer": PROXIED, "dialect": "openai-chat"}
    await journal.open_run(opening(stream, owner=owner.name, **proxied))
    writers = ("writer-r1", "second", "third")
    calls: list[Callable[[], Any]] = [
        *(lambda n=n: journal.append(batch(stream, n, f"{n}")) for n in range(1, 9)),
        *(lambda w=w: journal.append(batch(stream, 0, w, writer=w)) for w in writers),
        *(lambda w=w: journal.append(batch(stream, 0, writer=w, ending=COMPLETED)) for w in writers),
        *(lambda: journal.end_run(stream, "r1", CANCELLED, ERROR_EVENTS) for _ in range(3)),
        lambda: journal.end_run(stream, "r1", LOST, ERROR_EVENTS, owner=owner.name),
        lambda: journal.end_due(stream, "r1", 0, {}),
        lambda: journal.take_over(stream, "r1", "second", 60),
        lambda: journal.take_over(stream, "r1", "third", 60),
        lambda: journal.open_run(opening(stream, "r2", supersedes=["r1"], error_events=ERROR_EVENTS)),
        lambda: journal.open_run(opening(stream, "r3", supersedes=["latest"], error_events=ERROR_EVENTS)),
        lambda: journal.open_run(opening(stream, "r4", if_busy="supersede", error_events=ERROR_EVENTS)),
    ]
    random.Random(seed).shuffle(calls)
    outcomes = await asyncio.gather(*(call() for call in calls), return_exceptions=True)
    await journal.end_run(stream, "r1", CANCELLED, ERROR_EVENTS)
    refusals = (Fenced, RunEnded, SequenceGap)
    assert all(isinstance(outcome, refusals) or not isinstance(outcome, Exception) for outcome in outcomes)
    assert sum(isinstance(outcome, Ended) and outcome.by_this for outcome in outcomes) <= 1
    frames = await everything(journal, stream)
    assert [frame.seq for frame in frames] == list(range(1, len(frames) + 1))
    status, _ = await the_ending(journal, stream)
    own = said([frame for frame in frames if frame.run == "r1"])
    assert sum(kind == "run.superseded" for _, kind in own) <= 1
    said_by_relay = [text for _, text in own if text == ERROR_EVENT.data.decode()]
    assert len(said_by_relay) == (status != "completed")
    for run in ("r2", "r3", "r4"):
        if (await journal.run(stream, run)).status is not Status.OPEN:
            assert await the_ending(journal, stream, run) == ("cancelled", "superseded")


# What a writer and an owner ask.


async def test_hearing_of_a_run_says_what_became_of_it(journal: Journal, stream: str) -> None:
    opened = await journal.open_run(opening(stream))
    writer = "writer-r1"
    assert await journal.hear_of(stream, "r1", writer) == RunState(Status.OPEN, "", writer, opened.first)
    last = (await journal.append(batch(stream, 1, "a"))).last
    assert await journal.hear_of(stream, "r1", writer) == RunState(Status.OPEN, "", writer, last)
    await journal.end_run(stream, "r1", CANCELLED, {})
    ended = RunState(Status.CANCELLED, "client_cancel", writer, await top(journal, stream))
    assert await journal.hear_of(stream, "r1", writer) == ended
    assert len(await everything(journal, stream)) == 3


async def test_hearing_of_a_run_is_for_its_writer_only(journal: Journal, stream: str) -> None:
    with pytest.raises(UnknownStream):
        await journal.hear_of(stream, "r1", "another")
    await journal.open_run(opening(stream))
    with pytest.raises(UnknownRun):
        await journal.hear_of(stream, "r2", "another")
    with pytest.raises(Fenced):
        await journal.hear_of(stream, "r1", "another")
    await journal.take_over(stream, "r1", "second", 60)
    with pytest.raises(Fenced):
        await journal.hear_of(stream, "r1", "writer-r1")
    assert (await journal.hear_of(stream, "r1", "second")).writer == "second"


async def test_states_of_many_runs_come_in_the_order_asked(
    journal: Journal, name: Callable[[str], str]
) -> None:
    one, two = name("one"), name("two")
    first = await journal.open_run(opening(one, "r1"))
    second = await journal.open_run(opening(two, "r1"))
    await journal.open_run(opening(one, "r2"))
    await journal.take_over(one, "r2", "second", 60)
    await journal.append(batch(one, 1, "a", run="r2", writer="second", ending=FAILED))
    asked = [(two, "r1"), (one, "r2"), (name("nowhere"), "r1"), (one, "r3"), (one, "r1"), (two, "r1")]
    there = RunState(Status.OPEN, "", "writer-r1", second.first)
    ended = RunState(Status.FAILED, "producer_failed", "second", await top(journal, one))
    open_one = RunState(Status.OPEN, "", "writer-r1", first.first)
    assert list(await journal.states(asked)) == [there, ended, None, None, open_one, there]
    assert list(await journal.states([])) == []


# Listing.


async def test_runs_are_listed_in_pages_as_they_were_opened(journal: Journal, stream: str) -> None:
    names = ["r5", "b", "a", "r1", "~", "0", "r3"]
    for run in names:
        await journal.open_run(opening(stream, run))
        await journal.append(batch(stream, 1, "x", run=run))
    await journal.end_run(stream, "a", CANCELLED, {})
    whole = await journal.runs(stream, "", 100)
    assert [info.run for info in whole] == names
    assert list(whole) == [await journal.run(stream, run) for run in names]
    paged: list[str] = []
    while len(paged) < len(names):
        page = await journal.runs(stream, paged[-1] if paged else "", 3)
        assert 1 <= len(page) <= 3
        paged += [info.run for info in page]
    assert paged == names
    assert list(await journal.runs(stream, "r3", 3)) == []


async def test_runs_of_what_is_unknown_are_refused(journal: Journal, stream: str) -> None:
    with pytest.raises(UnknownStream):
        await journal.runs(stream, "", 10)
    with pytest.raises(UnknownStream):
        await journal.runs(stream, "r1", 10)
    await journal.open_run(opening(stream))
    with pytest.raises(UnknownRun):
        await journal.runs(stream, "r2", 10)


@pytest.mark.parametrize("limit", [1, 2, 3, 1000])
async def test_ended_runs_are_listed_in_pages_in_the_order_of_their_endings(
    journal: Journal, stream: str, limit: int
) -> None:
    """Complete where many ended at the same time, whatever they are called and whoever ended them."""
    since = (await journal.open_run(opening(stream, "r0"))).first.ms - 1
    runs = ["b", "a", "~", "0", "c"]
    for run in runs:
        await journal.open_run(opening(stream, run))
    await journal.append(batch(stream, 1, "x", run="c", ending=COMPLETED))
    together = await journal.open_run(opening(stream, "r1", supersedes=["b", "a", "~", "0"]))
    await journal.end_run(stream, "r1", CANCELLED, {})

    async def listed() -> list[EndedRun]:
        own = [ended for ended in await list_ended(journal, since, limit) if ended.stream == stream]
        return own if len(own) >= 6 else []

    ended = await until(listed)
    assert [entry.info.run for entry in (ended[0], ended[-1])] == ["c", "r1"]
    assert sorted(entry.info.run for entry in ended[1:-1]) == sorted(["b", "a", "~", "0"])
    assert {entry.info.ended_ms for entry in ended[1:-1]} == {together.first.ms}
    assert len({entry.place for entry in ended}) == 6
    for entry in ended:
        assert entry.info == await journal.run(stream, entry.info.run)
        assert all(
            earlier.place != entry.place for earlier in await journal.ended_runs(since, entry.place, 1000)
        )
    after_all = await list_ended(journal, ended[-1].info.ended_ms, limit)
    assert stream not in [entry.stream for entry in after_all]


@pytest.mark.parametrize("place", ["x", "5eb47777b016", "1", "1-", "1 ", "-1", "1-1-1", "9" * 5000])
async def test_ended_runs_are_not_listed_after_what_is_no_place(journal: Journal, place: str) -> None:
    with pytest.raises(InvalidParameter):
        await journal.ended_runs(0, place, 10)


async def test_ended_runs_of_deleted_streams_are_passed_over(
    journal: Journal, name: Callable[[str], str]
) -> None:
    """A page is full as long as there is more."""
    gone, here = name("gone"), name("here")
    since = (await journal.open_run(opening(gone, "r0"))).first.ms - 1
    for n in range(1, 121):  # more than are looked through at once
        await journal.open_run(opening(gone, f"r{n}", supersedes=["latest"]))
    await journal.open_run(opening(here))
    await journal.end_run(here, "r1", CANCELLED, {})
    await journal.delete(gone)
    await journal.file_ending(here, "r1")  # and with it whatever ended before
    (first,) = await journal.ended_runs(since, "", 1)
    assert first.stream == here
    assert gone not in [ended.stream for ended in await list_ended(journal, since, 3)]
