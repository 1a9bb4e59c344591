"""What relay.journal.base promises of a journal that lost what it had accepted, of every backend.

A failover to a replica that was behind does it, or a backup that is put back. Writers find out, and put back
what they still hold under the ids that readers have.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from contract.phrases import (
    CANCELLED,
    COMPLETED,
    ERROR_EVENT,
    ERROR_EVENTS,
    FAILED,
    PROXIED,
    ROOMY,
    batch,
    data,
    everything,
    list_ended,
    opening,
    said,
    the_ending,
    until,
)

from relay.cursor import Cursor, Standing, judge
from relay.errors import Diverged, Fenced, Rewound, RunEnded, RunExists, UnknownStream
from relay.frame import Event, Frame
from relay.journal.base import Append, Appended, Delivery, Held, Journal, Opened
from relay.limits import Retention

# Finding out.


async def test_a_writer_that_acknowledges_what_the_journal_has_appends_as_ever(
    journal: Journal, stream: str
) -> None:
    opened = await journal.open_run(opening(stream))
    await journal.open_run(opening(stream, "r2"))
    first = await journal.append(batch(stream, 1, "a", acknowledged=opened.first))
    await journal.append(batch(stream, 1, "x", run="r2"))
    second = await journal.append(batch(stream, 2, "b", acknowledged=first.last))
    assert (await journal.append(batch(stream, 2, "b", acknowledged=first.last))).last == second.last
    assert (await journal.append(batch(stream, 3, "c", acknowledged=opened.first))).appended == 1


async def test_a_writer_that_knows_more_of_its_run_than_the_journal_is_told(
    journal: Journal, stream: str
) -> None:
    """How far the journal's knowledge of the run goes; frames of others do not count."""
    await journal.open_run(opening(stream))
    last = (await journal.append(batch(stream, 1, "a"))).last
    await journal.open_run(opening(stream, "r2"))
    await journal.append(batch(stream, 1, *"abcdef", run="r2"))
    before = await everything(journal, stream)
    for ahead in (Cursor(3, last.ms), Cursor(9, last.ms), Cursor(1000, last.ms + 5)):
        with pytest.raises(Rewound) as refused:
            await journal.append(batch(stream, 2, "b", acknowledged=ahead))
        assert type(refused.value) is Rewound
        assert refused.value.extra == {"last_seq": 2}
    assert await everything(journal, stream) == before


async def test_that_the_journal_lost_frames_is_said_before_anything_else(
    journal: Journal, stream: str
) -> None:
    """Before unknown stream, unknown run, fenced, sequence gap and run ended."""
    wrong = batch(stream, 9, "x", writer="another", acknowledged=Cursor(50, 1))
    for _ in range(2):
        with pytest.raises(Rewound) as refused:
            await journal.append(wrong)
        assert refused.value.extra == {"last_seq": 0}
        await journal.open_run(opening(stream, "other"))
    await journal.open_run(opening(stream))
    with pytest.raises(Rewound) as refused:
        await journal.append(wrong)
    assert refused.value.extra == {"last_seq": 2}
    await journal.end_run(stream, "r1", CANCELLED, {})
    with pytest.raises(Rewound) as refused:
        await journal.append(wrong)
    assert refused.value.extra == {"last_seq": 3}
    assert len(await everything(journal, stream)) == 3


# Putting back.


def held(said: Append, came_to: Appended) -> Held:
    """What a writer holds of an append."""
    after = len(said.events) + (said.error_event is not None) + (said.ending is not None)
    first = Cursor(came_to.last.seq - after + 1, came_to.last.ms)
    return Held(
        first,
        said.producer_seq,
        said.events,
        said.text_bytes,
        error_event=said.error_event,
        ending=said.ending,
    )


def started(opened: Opened, frame: Frame) -> Held:
    """What a writer holds of its opening."""
    return Held(opened.first, 0, [Event(frame.event, frame.data)], 0)


async def test_lost_frames_are_put_back_under_the_same_ids(rewindable: Any, stream: str) -> None:
    """Then nothing has happened: to the run, to its writer, and to any reader (P2)."""
    journal = rewindable.journal
    said_at_opening = opening(stream, dialect="raw", metadata='{"a": 1}', answer=PROXIED)
    opened = await journal.open_run(said_at_opening)
    kept = await journal.append(batch(stream, 1, "a", text_bytes=1))
    await rewindable.save()
    batches = [batch(stream, 2, "b", "c", text_bytes=2), batch(stream, 4, "d", text_bytes=1)]
    lost = [held(each, await journal.append(each)) for each in batches]
    before = await everything(journal, stream), await journal.run(stream, "r1")
    last = before[1].last
    await rewindable.rewind()
    journal = rewindable.journal
    assert len(await everything(journal, stream)) == 2
    with pytest.raises(Rewound) as refused:
        await journal.append(batch(stream, 5, "e", acknowledged=last))
    assert refused.value.extra == {"last_seq": kept.last.seq}
    for each in lost:
        await journal.restore(said_at_opening, each)
    frames, run = await everything(journal, stream), await journal.run(stream, "r1")
    assert frames == before[0]
    assert replace(run, heard_ms=0) == replace(before[1], heard_ms=0)
    page = await journal.read(stream, last, 10, ROOMY)
    assert judge(last, page.extent, page.anchor_ms) is Standing.HERE
    assert judge(opened.first, page.extent, opened.first.ms) is Standing.HERE
    again = await journal.append(batch(stream, 4, "d", acknowledged=last))
    assert (again.duplicates, again.last) == (1, last)
    assert (await journal.append(batch(stream, 5, "e", acknowledged=last))).last.seq == last.seq + 1


async def test_what_the_journal_has_is_not_put_back_again(rewindable: Any, stream: str) -> None:
    journal = rewindable.journal
    opened = await journal.open_run(opening(stream))
    await rewindable.save()
    one = batch(stream, 1, "a", "b", text_bytes=2)
    lost = held(one, await journal.append(one))
    await rewindable.rewind()
    journal = rewindable.journal
    (first,) = await everything(journal, stream)
    for _ in range(3):
        await journal.restore(opening(stream), started(opened, first))
        await journal.restore(opening(stream), lost)
    assert data((await everything(journal, stream))[1:]) == [b"a", b"b"]
    info = await journal.run(stream, "r1")
    assert (info.frames, info.text_bytes) == (2, 2)
    await journal.append(batch(stream, 3, "c"))
    await journal.restore(opening(stream), lost)
    assert len(await everything(journal, stream)) == 4


@pytest.mark.parametrize("whole_stream", [True, False])
async def test_a_lost_run_is_put_back_from_its_first_frame(
    rewindable: Any, stream: str, whole_stream: bool
) -> None:
    """And with it the stream, if that was lost too: its readers go on."""
    journal = rewindable.journal
    if not whole_stream:
        await journal.open_run(opening(stream, "r0"))
    await rewindable.save()
    said_at_opening = opening(
        stream,
        seal=True,
        dialect="raw",
        metadata='{"n": [1, "ü"]}',
        answer=PROXIED,
        idle_timeout_s=500,
        retention=Retention(50, 5000, 600),
    )
    opened = await journal.open_run(said_at_opening)
    first = (await everything(journal, stream))[-1]
    one = batch(stream, 1, "a")
    lost = held(one, await journal.append(one))
    before = await everything(journal, stream), await journal.run(stream, "r1")
    described = await journal.describe(stream)
    await rewindable.rewind()
    journal = rewindable.journal
    with pytest.raises(Rewound) as refused:
        await journal.append(batch(stream, 2, "b", acknowledged=before[1].last))
    assert refused.value.extra == {"last_seq": 0}
    with pytest.raises(Rewound) as refused:
        await journal.restore(said_at_opening, lost)
    assert refused.value.extra == {"last_seq": 0 if whole_stream else 1}
    await journal.restore(said_at_opening, started(opened, first))
    await journal.restore(said_at_opening, lost)
    frames, run = await everything(journal, stream), await journal.run(stream, "r1")
    assert frames == before[0]
    assert replace(run, heard_ms=0) == replace(before[1], heard_ms=0)
    info = await journal.describe(stream)
    assert (info.retention, info.latest_run, list(info.open_runs), info.sealed) == (
        *(described.retention, described.latest_run, list(described.open_runs)),
        described.sealed,
    )
    assert await journal.resolve_token(f"token-{stream}-r1") == (stream, "r1")
    for frame in frames:
        page = await journal.read(stream, frame.id, 10, ROOMY)
        assert judge(frame.id, page.extent, page.anchor_ms) is Standing.HERE
    assert await journal.open_run(said_at_opening) == opened
    with pytest.raises(RunExists):
        await journal.open_run(replace(said_at_opening, writer="another"))
    assert (await journal.append(batch(stream, 2, "b", acknowledged=before[1].last))).appended == 1


async def test_an_ending_that_was_lost_is_put_back_too(rewindable: Any, stream: str) -> None:
    """Under its id, with what relay itself said before it; the run ends again, once."""
    journal = rewindable.journal
    said_at_opening = opening(stream, answer=PROXIED, dialect="openai-chat", deliver=True)
    await journal.open_run(said_at_opening)
    await rewindable.save()
    last = batch(stream, 1, "a", "b", text_bytes=2, ending=FAILED, error_event=ERROR_EVENT)
    end = await journal.append(last)
    before = await everything(journal, stream), await journal.run(stream, "r1")
    await rewindable.rewind()
    journal = rewindable.journal
    for _ in range(2):
        await journal.restore(said_at_opening, held(last, end))
        assert await everything(journal, stream) == before[0]
    assert replace(await journal.run(stream, "r1"), heard_ms=0) == replace(before[1], heard_ms=0)
    assert await the_ending(journal, stream) == ("failed", "producer_failed")
    assert (await journal.append(last)).last == end.last
    assert list((await journal.describe(stream)).open_runs) == []

    async def is_listed() -> bool:
        return len(await list_ended(journal, before[1].ended_ms - 1)) == 1

    await until(is_listed)
    assert await until(lambda: journal.claim_deliveries(10, 60)) == [Delivery(stream, "r1", 0)]


async def test_what_a_lost_append_said_of_the_run_is_put_back_with_its_frames(
    rewindable: Any, stream: str
) -> None:
    """Its writer's opening says by then what the run is."""
    journal = rewindable.journal
    await journal.open_run(opening(stream))
    await rewindable.save()
    one = batch(stream, 1, "a", dialect="openai-chat", answer=PROXIED)
    lost = held(one, await journal.append(one))
    await rewindable.rewind()
    journal = rewindable.journal
    await journal.restore(opening(stream, dialect="openai-chat", answer=PROXIED), lost)
    info = await journal.run(stream, "r1")
    assert (info.dialect, info.answer) == ("openai-chat", PROXIED)
    await journal.end_run(stream, "r1", CANCELLED, ERROR_EVENTS)
    assert said(await everything(journal, stream))[2] == ("r1", ERROR_EVENT.data.decode())


async def test_an_ending_alone_can_be_put_back(rewindable: Any, stream: str) -> None:
    journal = rewindable.journal
    await journal.open_run(opening(stream))
    await journal.append(batch(stream, 1, "a"))
    await rewindable.save()
    last = batch(stream, 2, ending=COMPLETED)
    end = await journal.append(last)
    await rewindable.rewind()
    journal = rewindable.journal
    with pytest.raises(Rewound):
        await journal.append(replace(last, acknowledged=end.last))
    await journal.restore(opening(stream), held(last, end))
    assert (await journal.append(replace(last, acknowledged=end.last))).last == end.last
    assert await the_ending(journal, stream) == ("completed", "producer_end")


async def test_frames_are_put_back_in_the_order_of_all_runs(rewindable: Any, stream: str) -> None:
    """Each writer waits for those of the others in between, and is told how far the stream is."""
    journal = rewindable.journal
    await journal.open_run(opening(stream, "r1"))
    await journal.open_run(opening(stream, "r2"))
    await rewindable.save()
    lost: dict[str, list[Held]] = {"r1": [], "r2": []}
    for number, run in enumerate(("r1", "r2", "r2", "r1", "r2", "r1", "r1")):
        said_now = batch(stream, len(lost[run]) + 1, f"{run}:{number}", run=run)
        lost[run].append(held(said_now, await journal.append(said_now)))
    before = await everything(journal, stream)
    await rewindable.rewind()
    journal = rewindable.journal
    with pytest.raises(Rewound) as refused:
        await journal.restore(opening(stream, "r2"), lost["r2"][0])
    assert type(refused.value) is Rewound
    assert refused.value.extra == {"last_seq": 2}
    assert len(await everything(journal, stream)) == 2

    async def put_back(run: str) -> None:
        for each in lost[run]:
            while True:
                try:
                    await journal.restore(opening(stream, run), each)
                    break
                except Diverged:
                    raise
                except Rewound:
                    await asyncio.sleep(0)

    await asyncio.gather(put_back("r2"), put_back("r1"))
    assert await everything(journal, stream) == before


async def test_followers_are_told_of_what_is_put_back(rewindable: Any, stream: str) -> None:
    journal, ear = rewindable.journal, rewindable.ear
    opened = await journal.open_run(opening(stream))
    await rewindable.save()
    said_now = batch(stream, 1, "a", "b", ending=COMPLETED)
    lost = held(said_now, await journal.append(said_now))
    before = await everything(journal, stream)
    await rewindable.rewind()
    journal = rewindable.journal
    journal.watch(stream)
    await ear.hears(stream, "doubt")
    await journal.restore(opening(stream), lost)
    assert await ear.hears_frames(stream, 3) == before[1:]
    assert (await ear.hears(stream, "frames"))[0].previous == opened.first


# When it is too late.


async def test_frames_are_not_put_back_where_others_stand_now(rewindable: Any, stream: str) -> None:
    journal = rewindable.journal
    await journal.open_run(opening(stream, "r1"))
    await journal.open_run(opening(stream, "r2"))
    await rewindable.save()
    batches = [batch(stream, 1, "a", "b"), batch(stream, 3, "c")]
    lost = [held(each, await journal.append(each)) for each in batches]
    await rewindable.rewind()
    journal = rewindable.journal
    for seq in (1, 2, 3, 4):
        await journal.append(batch(stream, seq, f"{seq}", run="r2"))
        before = await everything(journal, stream)
        with pytest.raises(Diverged):
            await journal.restore(opening(stream, "r1"), lost[0])
        assert await everything(journal, stream) == before
    with pytest.raises(Diverged):
        await journal.restore(opening(stream, "r1"), lost[1])
    assert (await journal.run(stream, "r1")).frames == 0
    assert (await journal.append(batch(stream, 1, "x"))).appended == 1


async def test_p4_who_was_taken_over_puts_nothing_back(rewindable: Any, stream: str) -> None:
    journal = rewindable.journal
    await journal.open_run(opening(stream))
    await rewindable.save()
    said_now = batch(stream, 1, "a")
    lost = held(said_now, await journal.append(said_now))
    await rewindable.rewind()
    journal = rewindable.journal
    await journal.take_over(stream, "r1", "second", 60)
    with pytest.raises(Fenced):
        await journal.restore(opening(stream), lost)
    assert len(await everything(journal, stream)) == 1
    assert (await journal.append(batch(stream, 1, "x", writer="second"))).appended == 1
    with pytest.raises((Fenced, Diverged)):
        await journal.restore(opening(stream), lost)
    assert data((await everything(journal, stream))[1:]) == [b"x"]


async def test_p4_nothing_is_put_back_behind_an_ending(rewindable: Any, stream: str) -> None:
    """The run was ended by somebody who knew nothing of the lost frames."""
    journal = rewindable.journal
    await journal.open_run(opening(stream))
    await rewindable.save()
    batches = [batch(stream, 1, "a"), batch(stream, 2, "b"), batch(stream, 3, "c", ending=COMPLETED)]
    lost = [held(each, await journal.append(each)) for each in batches]
    await rewindable.rewind()
    journal = rewindable.journal
    await journal.end_run(stream, "r1", CANCELLED, {})
    before = await everything(journal, stream)
    for each in lost:
        with pytest.raises((Diverged, RunEnded)):
            await journal.restore(opening(stream), each)
    end = before[-1].id
    with pytest.raises(RunEnded):
        await journal.restore(opening(stream), lost[0]._replace(first=Cursor(end.seq + 1, end.ms + 1)))
    assert await everything(journal, stream) == before
    assert await the_ending(journal, stream) == ("cancelled", "client_cancel")


async def test_a_deleted_stream_is_not_put_back(journal: Journal, stream: str) -> None:
    """What an operator removed is not what the journal lost, and its ids are never given out again."""
    opened = await journal.open_run(opening(stream))
    (first,) = await everything(journal, stream)
    one = batch(stream, 1, "a")
    lost = held(one, await journal.append(one))
    await journal.delete(stream)
    for each in (started(opened, first), lost):
        with pytest.raises(RunEnded, match="cancelled, stream_deleted"):
            await journal.restore(opening(stream), each)
        with pytest.raises(UnknownStream):
            await journal.describe(stream)
    await journal.open_run(opening(stream, "r2"))
    for each in (started(opened, first), lost):
        with pytest.raises(RunEnded, match="cancelled, stream_deleted"):
            await journal.restore(opening(stream), each)
    assert said(await everything(journal, stream)) == [("r2", "run.started")]
