"""What relay.journal.base promises of streams, appends and reads, of every backend."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from contract.phrases import COMPLETED, FAILED, MIB, ROOMY, batch, data, everything, opening, said, seqs, top

from relay.cursor import ORIGIN, Cursor, Extent, Standing, judge
from relay.errors import (
    Fenced,
    RunEnded,
    RunExists,
    SequenceGap,
    UnknownRun,
    UnknownStream,
)
from relay.frame import Event, Frame
from relay.journal.base import Appended, Journal, StreamInfo, StreamTop
from relay.journal.sqlite import SqliteJournal
from relay.lifecycle import Reason, Status, ending
from relay.limits import Retention

# Appending.


async def test_ids_are_contiguous_and_what_was_appended_is_read(journal: Journal, stream: str) -> None:
    await journal.open_run(opening(stream))
    first = await journal.append(batch(stream, 1, "a", "b"))
    second = await journal.append(batch(stream, 3, "c"))
    frames = await everything(journal, stream)
    assert [frame.seq for frame in frames] == [1, 2, 3, 4]
    assert [frame.event for frame in frames] == ["relay", "delta", "delta", "delta"]
    assert data(frames[1:]) == [b"a", b"b", b"c"]
    assert {frame.run for frame in frames} == {"r1"}
    assert first == Appended(frames[2].id, 2, 0, 3)
    assert second == Appended(frames[3].id, 1, 0, 4)
    assert [frame.ms for frame in frames] == sorted(frame.ms for frame in frames)


async def test_every_id_checks_itself(journal: Journal, stream: str) -> None:
    """The exact id of a held frame is found at its place; another ms at the same seq is not."""
    await journal.open_run(opening(stream))
    await journal.append(batch(stream, 1, "a", "b", "c"))
    for frame in await everything(journal, stream):
        page = await journal.read(stream, frame.id, 10, ROOMY)
        assert page.anchor_ms == frame.ms
        assert judge(frame.id, page.extent, page.anchor_ms) is Standing.HERE
        forged = Cursor(frame.seq, frame.ms + 1)
        assert judge(forged, page.extent, page.anchor_ms) is Standing.DIVERGED


async def test_ms_never_decreases_when_the_clock_does(
    steered: SqliteJournal, clock: Any, stream: str
) -> None:
    start = clock.ms
    opened = await steered.open_run(opening(stream))
    clock.ms -= 50_000
    back = await steered.append(batch(stream, 1, "a"))
    clock.ms = start + 7
    ahead = await steered.append(batch(stream, 2, "b"))
    assert [opened.first.ms, back.last.ms, ahead.last.ms] == [start, start, start + 7]


async def test_the_event_name_is_kept_and_may_be_empty(journal: Journal, stream: str) -> None:
    await journal.open_run(opening(stream))
    names = ["", "delta", "ein Name mit Leerzeichen: ü🎈"]
    await journal.append(batch(stream, 1, events=[Event(name, b"x") for name in names]))
    assert [frame.event for frame in await everything(journal, stream)] == ["relay", *names]


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\r\n\r\n\n\r", id="line-ends"),
        pytest.param(b"a\0b\0", id="nul"),
        pytest.param("🎈 \U0010ffff ü \u2028".encode(), id="four-byte-utf8"),
        pytest.param(b'{"a": "\\ud83c"}\t"\'', id="quotes"),
        pytest.param(b"12", id="looks-like-a-number"),
        pytest.param(b"x" * MIB, id="one-mebibyte"),
    ],
)
async def test_data_comes_back_byte_for_byte(journal: Journal, stream: str, text: bytes) -> None:
    await journal.open_run(opening(stream))
    await journal.append(batch(stream, 1, text, text))
    assert data((await everything(journal, stream))[1:]) == [text, text]


async def test_a_large_batch_is_appended_whole(journal: Journal, stream: str) -> None:
    texts = [f"frame {n}" for n in range(2500)]
    await journal.open_run(opening(stream))
    answer = await journal.append(batch(stream, 1, *texts))
    frames = await everything(journal, stream)
    assert (answer.appended, answer.last.seq, answer.next_seq) == (2500, 2501, 2501)
    assert [frame.seq for frame in frames] == list(range(1, 2502))
    assert data(frames[1:]) == [text.encode() for text in texts]


async def test_fifty_concurrent_runs_share_a_stream_without_holes(journal: Journal, stream: str) -> None:
    await asyncio.gather(*(journal.open_run(opening(stream, f"r{n}")) for n in range(50)))

    async def say(run: str) -> None:
        for seq in range(1, 11, 2):
            await journal.append(batch(stream, seq, f"{run}:{seq}", f"{run}:{seq + 1}", run=run))

    await asyncio.gather(*(say(f"r{n}") for n in range(50)))
    frames = await everything(journal, stream)
    assert [frame.seq for frame in frames] == list(range(1, 551))
    assert [frame.ms for frame in frames] == sorted(frame.ms for frame in frames)
    for n in range(50):
        own = [frame.data.decode() for frame in frames if frame.run == f"r{n}" and not frame.is_control]
        assert own == [f"r{n}:{seq}" for seq in range(1, 11)]


async def test_concurrent_batches_of_one_run_keep_their_sequence(journal: Journal, stream: str) -> None:
    """Sent together, in order, without waiting for one another."""
    await journal.open_run(opening(stream))
    answers = await asyncio.gather(*(journal.append(batch(stream, n, f"{n}")) for n in range(1, 51)))
    assert [answer.next_seq for answer in answers] == list(range(2, 52))
    assert data((await everything(journal, stream))[1:]) == [b"%d" % n for n in range(1, 51)]


# Repeating.


async def test_a_repeated_batch_is_journaled_once(journal: Journal, stream: str) -> None:
    await journal.open_run(opening(stream))
    first = await journal.append(batch(stream, 1, "a", "b", text_bytes=2))
    again = await journal.append(batch(stream, 1, "a", "b", text_bytes=2))
    assert again == Appended(first.last, 0, 2, 3)
    assert data((await everything(journal, stream))[1:]) == [b"a", b"b"]
    assert (await journal.run(stream, "r1")).text_bytes == 2


async def test_only_the_new_part_of_an_overlapping_batch_is_journaled(journal: Journal, stream: str) -> None:
    await journal.open_run(opening(stream))
    await journal.append(batch(stream, 1, "a", "b", text_bytes=2))
    answer = await journal.append(batch(stream, 2, "b", "c", "d", text_bytes=3))
    assert (answer.appended, answer.duplicates, answer.next_seq, answer.last.seq) == (2, 1, 5, 5)
    assert (await journal.run(stream, "r1")).text_bytes == 4
    assert data((await everything(journal, stream))[1:]) == [b"a", b"b", b"c", b"d"]


async def test_an_old_batch_does_not_reach_beyond_what_it_holds(journal: Journal, stream: str) -> None:
    await journal.open_run(opening(stream))
    await journal.append(batch(stream, 1, "a", "b", "c"))
    answer = await journal.append(batch(stream, 1, "a"))
    assert (answer.appended, answer.duplicates, answer.next_seq, answer.last.seq) == (0, 1, 4, 4)


async def test_control_frames_take_no_producer_sequence(journal: Journal, stream: str) -> None:
    await journal.open_run(opening(stream, "r1"))
    await journal.append(batch(stream, 1, "a"))
    await journal.open_run(opening(stream, "r2"))
    assert (await journal.append(batch(stream, 2, "b"))).next_seq == 3
    assert (await journal.append(batch(stream, 1, "c", run="r2"))).next_seq == 2


async def test_an_append_of_nothing_answers_where_the_run_stands(journal: Journal, stream: str) -> None:
    await journal.open_run(opening(stream))
    last = (await journal.append(batch(stream, 1, "a"))).last
    assert await journal.append(batch(stream, 2)) == Appended(last, 0, 0, 2)
    assert await journal.append(batch(stream, 1)) == Appended(last, 0, 0, 2)
    assert len(await everything(journal, stream)) == 2


async def test_last_is_the_runs_newest_id_not_the_streams(journal: Journal, stream: str) -> None:
    await journal.open_run(opening(stream, "r1"))
    first = await journal.append(batch(stream, 1, "a"))
    second = await journal.open_run(opening(stream, "r2"))
    assert (await journal.append(batch(stream, 1, "a"))).last == first.last
    assert (await journal.append(batch(stream, 1, run="r2"))).last == second.first


async def test_a_hole_in_the_producers_sequence_is_refused(journal: Journal, stream: str) -> None:
    await journal.open_run(opening(stream))
    await journal.append(batch(stream, 1, "a"))
    with pytest.raises(SequenceGap) as refused:
        await journal.append(batch(stream, 3, "c"))
    assert refused.value.extra == {"expected": 2}
    assert (await journal.append(batch(stream, 2, "b"))).appended == 1


async def test_an_ending_after_a_hole_is_refused(journal: Journal, stream: str) -> None:
    """The producer said more than the journal has: to end there would call a truncated run whole."""
    await journal.open_run(opening(stream))
    with pytest.raises(SequenceGap) as refused:
        await journal.append(batch(stream, 5, ending=COMPLETED))
    assert refused.value.extra == {"expected": 1}
    assert (await journal.run(stream, "r1")).status is Status.OPEN


async def test_another_writer_is_fenced(journal: Journal, stream: str) -> None:
    await journal.open_run(opening(stream))
    with pytest.raises(Fenced):
        await journal.append(batch(stream, 1, "a", writer="another"))
    assert len(await everything(journal, stream)) == 1


async def test_appends_to_what_does_not_exist_are_refused(journal: Journal, stream: str) -> None:
    with pytest.raises(UnknownStream):
        await journal.append(batch(stream, 1, "a"))
    await journal.open_run(opening(stream))
    with pytest.raises(UnknownRun):
        await journal.append(batch(stream, 1, "a", run="nobody"))


async def test_the_first_error_in_order_is_the_one_raised(journal: Journal, stream: str) -> None:
    """unknown stream, unknown run, fenced, sequence gap, run ended; all of them at once, then one less."""
    wrong = batch(stream, 9, "x", writer="another")
    with pytest.raises(UnknownStream):
        await journal.append(wrong)
    await journal.open_run(opening(stream, "other"))
    with pytest.raises(UnknownRun):
        await journal.append(wrong)
    await journal.open_run(opening(stream))
    await journal.append(batch(stream, 1, "a", ending=COMPLETED))
    with pytest.raises(Fenced):
        await journal.append(wrong)
    with pytest.raises(SequenceGap):
        await journal.append(batch(stream, 9, "x"))
    with pytest.raises(RunEnded):
        await journal.append(batch(stream, 2, "x"))


async def test_a_refused_append_changes_nothing_for_its_neighbours(journal: Journal, stream: str) -> None:
    """Sent together with good ones, as a group commit would take them."""
    await journal.open_run(opening(stream))
    await journal.open_run(opening(stream, "r2"))
    outcomes = await asyncio.gather(
        journal.append(batch(stream, 1, "a")),
        journal.append(batch(stream, 1, "x", writer="another")),
        journal.append(batch(stream, 7, "x", run="r2")),
        journal.open_run(opening(stream, "r2", writer="another")),
        journal.append(batch(stream, 2, "b")),
        return_exceptions=True,
    )
    kinds = [type(outcome) for outcome in outcomes]
    assert kinds == [Appended, Fenced, SequenceGap, RunExists, Appended]
    assert data((await everything(journal, stream))[2:]) == [b"a", b"b"]


async def test_a_cancelled_caller_does_not_harm_the_journal(journal: Journal, stream: str) -> None:
    """Whether its append happened is open, so it is repeated."""
    await journal.open_run(opening(stream))
    calls = [asyncio.ensure_future(journal.append(batch(stream, 1, "a"))) for _ in range(3)]
    await asyncio.sleep(0)
    calls[0].cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    assert calls[0].cancelled()
    assert (await journal.append(batch(stream, 1, "a"))).next_seq == 2
    assert data((await everything(journal, stream))[1:]) == [b"a"]


# Reading.


async def test_reading_begins_after_the_cursor(journal: Journal, stream: str) -> None:
    await journal.open_run(opening(stream))
    await journal.append(batch(stream, 1, "a", "b", "c"))
    frames = await everything(journal, stream)
    page = await journal.read(stream, frames[1].id, 10, ROOMY)
    assert list(page.frames) == frames[2:]
    assert not page.more
    assert page.extent == (await journal.describe(stream)).extent


async def test_only_the_seq_of_the_cursor_says_where_reading_begins(journal: Journal, stream: str) -> None:
    await journal.open_run(opening(stream))
    await journal.append(batch(stream, 1, "a", "b"))
    assert seqs(await journal.read(stream, Cursor(1, 0), 10, ROOMY)) == [2, 3]
    assert seqs(await journal.read(stream, Cursor(1, 10**17), 10, ROOMY)) == [2, 3]


async def test_a_page_at_the_top_or_beyond_is_empty(journal: Journal, stream: str) -> None:
    opened = await journal.open_run(opening(stream))
    at_top = await journal.read(stream, opened.first, 10, ROOMY)
    assert (list(at_top.frames), at_top.anchor_ms, at_top.more) == ([], opened.first.ms, False)
    for beyond in (Cursor(2, opened.first.ms), Cursor(10**18 - 1, 10**18 - 1)):
        page = await journal.read(stream, beyond, 10, ROOMY)
        assert (list(page.frames), page.anchor_ms, page.more) == ([], None, False)
        assert page.extent.top == opened.first


async def test_there_is_no_anchor_at_the_origin_or_where_frames_were_trimmed(
    journal: Journal, stream: str
) -> None:
    await journal.open_run(opening(stream))
    await journal.append(batch(stream, 1, "a", "b", "c"))
    assert (await journal.read(stream, ORIGIN, 10, ROOMY)).anchor_ms is None
    frames = await everything(journal, stream)
    await journal.trim(stream, 3)
    trimmed = await journal.read(stream, frames[0].id, 10, ROOMY)
    assert trimmed.anchor_ms is None
    assert seqs(trimmed) == [3, 4]
    assert (await journal.read(stream, frames[2].id, 10, ROOMY)).anchor_ms == frames[2].ms


async def test_a_page_holds_no_more_frames_than_asked(journal: Journal, stream: str) -> None:
    await journal.open_run(opening(stream))
    await journal.append(batch(stream, 1, "a", "b", "c"))
    page = await journal.read(stream, ORIGIN, 3, ROOMY)
    assert (seqs(page), page.more) == ([1, 2, 3], True)


async def test_a_page_that_ends_at_the_top_has_no_more(journal: Journal, stream: str) -> None:
    """Even if it is exactly full."""
    await journal.open_run(opening(stream))
    await journal.append(batch(stream, 1, b"x" * 10, b"x" * 10))
    by_count = await journal.read(stream, Cursor(1, 0), 2, ROOMY)
    by_bytes = await journal.read(stream, Cursor(1, 0), 10, 20)
    assert (seqs(by_count), by_count.more) == ([2, 3], False)
    assert (seqs(by_bytes), by_bytes.more) == ([2, 3], False)


@pytest.mark.parametrize(
    ("max_bytes", "expected"),
    [(1, [2]), (9, [2]), (10, [2]), (11, [2, 3]), (20, [2, 3]), (21, [2, 3, 4]), (1000, [2, 3, 4, 5])],
)
async def test_a_page_is_cut_by_bytes_after_the_frame_that_fills_it(
    journal: Journal, stream: str, max_bytes: int, expected: list[int]
) -> None:
    await journal.open_run(opening(stream))
    await journal.append(batch(stream, 1, *[b"x" * 10] * 4))
    page = await journal.read(stream, Cursor(1, 0), 100, max_bytes)
    assert seqs(page) == expected
    assert page.more is (expected[-1] < 5)


async def test_a_page_of_large_frames_is_cut_by_bytes(journal: Journal, stream: str) -> None:
    await journal.open_run(opening(stream))
    await journal.append(batch(stream, 1, *[b"x" * MIB] * 6))
    page = await journal.read(stream, Cursor(1, 0), 1000, 4 * MIB)
    assert (seqs(page), page.more) == ([2, 3, 4, 5], True)


async def test_a_frame_larger_than_the_page_is_read_alone(journal: Journal, stream: str) -> None:
    await journal.open_run(opening(stream))
    await journal.append(batch(stream, 1, b"x" * 1000, "b"))
    page = await journal.read(stream, Cursor(1, 0), 100, 1)
    assert (seqs(page), page.more) == ([2], True)


async def test_pages_follow_one_another_without_a_seam(journal: Journal, stream: str) -> None:
    await journal.open_run(opening(stream))
    await journal.append(batch(stream, 1, *(b"x" * (n % 40) for n in range(300))))
    whole = await everything(journal, stream)
    frames: list[Frame] = []
    more, after = True, ORIGIN
    while more:
        page = await journal.read(stream, after, 17, 100)
        frames += page.frames
        more, after = page.more, frames[-1].id
        assert 1 <= len(page.frames) <= 17
        assert sum(len(frame.data) for frame in page.frames[:-1]) < 100
    assert frames == whole


async def test_a_page_is_of_one_instant(journal: Journal, stream: str) -> None:
    """Its frames reach exactly to its extent's top, while the stream grows."""
    await journal.open_run(opening(stream))

    async def write() -> None:
        for n in range(1, 201):
            await journal.append(batch(stream, n, "x"))

    writing = asyncio.ensure_future(write())
    while not writing.done():
        page = await journal.read(stream, ORIGIN, 1000, ROOMY)
        assert page.frames[-1].id == page.extent.top
        assert not page.more
    await writing


async def test_reads_of_an_unknown_stream_are_refused(journal: Journal, stream: str) -> None:
    with pytest.raises(UnknownStream):
        await journal.read(stream, ORIGIN, 10, 10)
    with pytest.raises(UnknownStream):
        await journal.describe(stream)
    with pytest.raises(UnknownStream):
        await journal.run(stream, "r1")
    with pytest.raises(UnknownStream):
        await journal.trim(stream, 1)


async def test_an_unknown_run_of_a_known_stream_is_refused(journal: Journal, stream: str) -> None:
    await journal.open_run(opening(stream))
    with pytest.raises(UnknownRun):
        await journal.run(stream, "r2")


# Describing.


async def test_a_run_is_described_as_it_goes(journal: Journal, stream: str) -> None:
    await journal.open_run(opening(stream, "before"))
    texts = {"metadata": '{"a":1}', "answer": "opaque: ü", "token": "T"}
    opened = await journal.open_run(opening(stream, dialect="raw", **texts))
    info = await journal.run(stream, "r1")
    assert (info.run, info.status, info.start, info.last) == ("r1", Status.OPEN, opened.start, opened.first)
    assert (info.last_data, info.frames, info.text_bytes) == (0, 0, 0)
    assert (info.started_ms, info.ended_ms, info.reason, info.error) == (opened.first.ms, 0, "", "")
    assert (info.dialect, info.metadata, info.answer, info.token) == ("raw", '{"a":1}', "opaque: ü", "T")

    answer = await journal.append(batch(stream, 1, "ab", "cd", text_bytes=4))
    info = await journal.run(stream, "r1")
    assert (info.last, info.last_data, info.frames, info.text_bytes) == (answer.last, 4, 2, 4)

    answer = await journal.append(batch(stream, 3, "e", text_bytes=1, ending=FAILED))
    info = await journal.run(stream, "r1")
    assert (info.last, info.last_data, info.frames, info.text_bytes) == (answer.last, 5, 3, 5)
    assert (info.status, info.reason, info.error) == (Status.FAILED, "producer_failed", FAILED.error)
    assert info.ended_ms == answer.last.ms
    assert info.answer == "opaque: ü"


async def test_an_ending_alone_is_no_data(journal: Journal, stream: str) -> None:
    await journal.open_run(opening(stream))
    answer = await journal.append(batch(stream, 1, ending=COMPLETED))
    run, info = await journal.run(stream, "r1"), await journal.describe(stream)
    assert (run.last, run.last_data, info.last_data) == (answer.last, 0, 0)


async def test_an_append_can_say_the_runs_dialect(journal: Journal, stream: str) -> None:
    await journal.open_run(opening(stream, dialect="raw"))
    await journal.append(batch(stream, 1, "a"))
    assert (await journal.run(stream, "r1")).dialect == "raw"
    await journal.append(batch(stream, 2, "b", dialect="ag-ui"))
    assert (await journal.run(stream, "r1")).dialect == "ag-ui"
    await journal.append(batch(stream, 3, dialect="ai-sdk"))
    assert (await journal.run(stream, "r1")).dialect == "ai-sdk"


async def test_a_stream_is_described_as_it_goes(journal: Journal, stream: str) -> None:
    retention = Retention(1000, 100_000, 3600)
    await journal.open_run(opening(stream, "r1", retention=retention))
    await journal.open_run(opening(stream, "r2"))
    await journal.open_run(opening(stream, "r0"))
    answer = await journal.append(batch(stream, 1, "abc", "de"))
    info = await journal.describe(stream)
    frames = await everything(journal, stream)
    assert info.stream == stream
    assert info.extent == Extent(info.extent.created_ms, 1, answer.last)
    assert list(info.open_runs) == ["r1", "r2", "r0"]
    assert (info.latest_run, info.runs, info.last_data) == ("r0", 3, 5)
    assert info.bytes_held == sum(len(frame.data) for frame in frames)
    assert info.retention == retention
    assert info.active_ms == answer.last.ms
    assert not info.finished

    await journal.append(batch(stream, 1, run="r2", ending=COMPLETED))
    info = await journal.describe(stream)
    assert (list(info.open_runs), info.latest_run, info.last_data) == (["r1", "r0"], "r0", 5)


async def test_streams_are_listed_by_name_in_pages(journal: Journal, name: Callable[[str], str]) -> None:
    names = sorted(name(suffix) for suffix in ("b", "a", "a.b", "C", "c", "~", "0"))
    for each in names:
        await journal.open_run(opening(each))
    listed: list[StreamInfo] = []
    after = name("")
    while len(listed) < len(names):
        page = await journal.streams(after, 3)
        assert 1 <= len(page) <= 3
        listed += page
        after = page[-1].stream
    listed = listed[: len(names)]
    assert [info.stream for info in listed] == names
    assert listed[0] == await journal.describe(names[0])
    assert await journal.streams("~" * 200, 10) == []


async def test_tops_leave_out_what_does_not_exist(journal: Journal, name: Callable[[str], str]) -> None:
    first = await journal.open_run(opening(name("a")))
    await journal.open_run(opening(name("b")))
    second = await journal.append(batch(name("b"), 1, "x", "y"))
    tops = await journal.tops([name("a"), name("nowhere"), name("b")])
    assert dict(tops) == {name("a"): StreamTop(first.first, False), name("b"): StreamTop(second.last, False)}
    assert dict(await journal.tops([])) == {}


async def test_a_resume_token_finds_its_run(journal: Journal, stream: str) -> None:
    await journal.open_run(opening(stream, "r1"))
    await journal.open_run(opening(stream, "r2"))
    await journal.append(batch(stream, 1, ending=COMPLETED))
    assert await journal.resolve_token(f"token-{stream}-r1") == (stream, "r1")
    assert await journal.resolve_token(f"token-{stream}-r2") == (stream, "r2")
    assert await journal.resolve_token(f"token-{stream}-r3") is None


async def test_weird_but_legal_names_are_names(journal: Journal, name: Callable[[str], str]) -> None:
    streams = ["a:b~c.d-_", ":", "~", "-", ".", "..", "x" * 200, "X" * 200, "0", "relay"]
    for weird in streams:
        run = weird[::-1]
        await journal.open_run(opening(weird, run))
        await journal.append(batch(weird, 1, weird, run=run))
    for weird in streams:
        assert (await everything(journal, weird))[1].data == weird.encode()
        assert (await journal.describe(weird)).latest_run == weird[::-1]
        assert (await journal.run(weird, weird[::-1])).frames == 1
        await journal.delete(weird)


# Retention.


async def test_max_frames_is_kept_exactly_from_the_oldest(journal: Journal, stream: str) -> None:
    await journal.open_run(opening(stream, retention=Retention(max_frames=5, max_bytes=0)))
    for n in range(1, 13):
        await journal.append(batch(stream, n, f"{n}"))
        held = await everything(journal, stream)
        extent = (await journal.describe(stream)).extent
        assert [frame.seq for frame in held] == list(range(max(1, n - 3), n + 2))
        assert (extent.earliest_seq, extent.top.seq) == (held[0].seq, n + 1)


async def test_max_bytes_is_kept_exactly_from_the_oldest(journal: Journal, stream: str) -> None:
    """As few frames are dropped as the bound allows."""
    await journal.open_run(opening(stream, retention=Retention(max_frames=0, max_bytes=100)))
    said = await everything(journal, stream)
    for n in range(1, 40):
        await journal.append(batch(stream, n, b"x" * (n * 7 % 31)))
        info = await journal.describe(stream)
        held = await everything(journal, stream)
        said.append(held[-1])
        kept = len(held)
        assert held == said[-kept:]
        assert info.bytes_held == sum(len(frame.data) for frame in held) <= 100
        assert info.extent.earliest_seq == held[0].seq
        if kept < len(said):
            assert info.bytes_held + len(said[-kept - 1].data) > 100


async def test_both_bounds_hold_in_one_large_batch(journal: Journal, stream: str) -> None:
    await journal.open_run(opening(stream, retention=Retention(max_frames=50, max_bytes=200)))
    await journal.append(batch(stream, 1, *[b"x" * 10] * 300))
    assert [frame.seq for frame in await everything(journal, stream)] == list(range(282, 302))
    await journal.append(batch(stream, 301, *[b"x"] * 300))
    assert [frame.seq for frame in await everything(journal, stream)] == list(range(552, 602))


async def test_the_newest_frame_is_never_trimmed_by_a_bound(journal: Journal, stream: str) -> None:
    await journal.open_run(opening(stream, retention=Retention(max_frames=1, max_bytes=1)))
    assert len(await everything(journal, stream)) == 1
    answer = await journal.append(batch(stream, 1, b"x" * 1000, b"y" * 1000))
    assert data(await everything(journal, stream)) == [b"y" * 1000]
    answer = await journal.append(batch(stream, 3, b"z" * 1000, ending=COMPLETED))
    (frame,) = await everything(journal, stream)
    assert frame.is_control
    assert frame.id == answer.last


async def test_retention_applies_when_a_run_is_opened(journal: Journal, stream: str) -> None:
    await journal.open_run(opening(stream, "r1", retention=Retention(max_frames=2)))
    for n in range(2, 5):
        await journal.open_run(opening(stream, f"r{n}"))
    assert [frame.seq for frame in await everything(journal, stream)] == [3, 4]


async def test_bounds_of_zero_bound_nothing(journal: Journal, stream: str) -> None:
    await journal.open_run(opening(stream, retention=Retention(0, 0, 0)))
    await journal.append(batch(stream, 1, *[b"x" * 100] * 500))
    assert len(await everything(journal, stream)) == 501


async def test_runs_and_endings_outlive_their_frames(journal: Journal, stream: str) -> None:
    await journal.open_run(opening(stream, "r1", retention=Retention(max_frames=2)))
    await journal.append(batch(stream, 1, "a", ending=FAILED))
    before = await journal.run(stream, "r1")
    await journal.open_run(opening(stream, "r2"))
    await journal.append(batch(stream, 1, "b", "c", "d", run="r2"))
    assert await journal.run(stream, "r1") == before
    assert (await journal.append(batch(stream, 1, "a", ending=FAILED))).duplicates == 1
    assert await journal.resolve_token(f"token-{stream}-r1") == (stream, "r1")


async def test_trim_drops_the_frames_before_a_seq(journal: Journal, stream: str) -> None:
    await journal.open_run(opening(stream))
    await journal.append(batch(stream, 1, "a", "bb", "ccc"))
    before = await journal.describe(stream)
    for before_seq, earliest in ((0, 1), (1, 1), (3, 3), (2, 3), (3, 3), (4, 4)):
        await journal.trim(stream, before_seq)
        info = await journal.describe(stream)
        assert info.extent == before.extent._replace(earliest_seq=earliest)
    assert info.bytes_held == 3
    assert (await journal.append(batch(stream, 4, "d"))).last.seq == 5
    assert [frame.seq for frame in await everything(journal, stream)] == [4, 5]


async def test_a_stream_trimmed_empty_remembers_its_top(journal: Journal, stream: str) -> None:
    await journal.open_run(opening(stream))
    last = (await journal.append(batch(stream, 1, "a", "b"))).last
    await journal.trim(stream, 1000)
    info = await journal.describe(stream)
    assert info.extent == Extent(info.extent.created_ms, 4, last)
    assert (info.bytes_held, info.last_data) == (0, 3)
    page = await journal.read(stream, ORIGIN, 10, ROOMY)
    assert (list(page.frames), page.more, page.extent) == ([], False, info.extent)
    assert judge(last, page.extent, None) in (Standing.HERE, Standing.RECREATED)
    assert dict(await journal.tops([stream])) == {stream: StreamTop(last, False)}
    opened = await journal.open_run(opening(stream, "r2"))
    assert (opened.start, opened.first.seq) == (last, 4)
    assert [frame.seq for frame in await everything(journal, stream)] == [4]


# Deleting.


async def test_a_deleted_stream_is_gone_with_its_runs_and_tokens(journal: Journal, stream: str) -> None:
    await journal.open_run(opening(stream))
    await journal.append(batch(stream, 1, "a"))
    await journal.delete(stream)
    with pytest.raises(UnknownStream):
        await journal.read(stream, ORIGIN, 10, ROOMY)
    with pytest.raises(UnknownStream):
        await journal.append(batch(stream, 2, "b"))
    with pytest.raises(UnknownStream):
        await journal.run(stream, "r1")
    assert await journal.resolve_token(f"token-{stream}-r1") is None
    assert dict(await journal.tops([stream])) == {}
    assert stream not in [info.stream for info in await journal.streams(stream[:-1], 10)]


async def test_deleting_an_unknown_stream_is_no_error(journal: Journal, stream: str) -> None:
    await journal.delete(stream)
    await journal.open_run(opening(stream))
    await journal.delete(stream)
    await journal.delete(stream)


async def test_a_deletion_tells_which_runs_it_ended(journal: Journal, stream: str) -> None:
    assert list(await journal.delete(stream)) == []
    for run in ("r1", "r2", "r3"):
        await journal.open_run(opening(stream, run))
    await journal.end_run(stream, "r2", ending(Reason.CLIENT_CANCEL), {})
    assert sorted(await journal.delete(stream)) == ["r1", "r3"]
    assert list(await journal.delete(stream)) == []


# How the store is.


async def test_a_journal_tells_how_it_is(journal: Journal) -> None:
    condition = await journal.condition()
    assert condition.kind in ("redis", "sqlite")
    assert re.match(r"\d+\.\d+", condition.version)
    again = await journal.condition()
    assert 0 < condition.now_ms <= again.now_ms
    wanted = {
        "redis": {"memory_bytes", "memory_max_bytes", "memory_policy", "evicted_keys", "aof", "role"},
        "sqlite": {"file_bytes", "disk_free_bytes", "synchronous"},
    }
    assert wanted[condition.kind] <= condition.details.keys()
    assert None not in condition.details.values()
    assert journal.reconnects == 0


async def test_a_recreated_stream_begins_anew_with_other_ids(journal: Journal, stream: str) -> None:
    """As fast as it can be done: much of it within one millisecond."""
    given_out: list[Cursor] = []
    for _ in range(10):
        await journal.open_run(opening(stream, retention=Retention(max_frames=3)))
        await journal.append(batch(stream, 1, "a", "b"))
        info = await journal.describe(stream)
        assert (info.extent.earliest_seq, info.extent.top.seq, info.runs) == (1, 3, 1)
        for former in given_out:
            page = await journal.read(stream, former, 10, ROOMY)
            assert judge(former, page.extent, page.anchor_ms) is Standing.RECREATED
        given_out += [frame.id for frame in await everything(journal, stream)]
        await journal.delete(stream)
    assert len(set(given_out)) == 30


async def test_ids_of_a_recreated_stream_are_beyond_the_old_ones_when_the_clock_went_back(
    steered: SqliteJournal, clock: Any, stream: str
) -> None:
    for _ in range(3):
        opened = await steered.open_run(opening(stream))
        former = (await steered.append(batch(stream, 1, "a"))).last
        await steered.delete(stream)
        clock.ms -= 3600 * 1000
        again = await steered.open_run(opening(stream))
        assert again.start == ORIGIN
        assert (await steered.describe(stream)).extent.created_ms > former.ms >= opened.first.ms
        await steered.delete(stream)


# Following.


async def test_watching_begins_with_doubt(journal: Journal, ear: Any, stream: str) -> None:
    journal.watch(stream)
    assert len(await ear.hears(stream, "doubt")) >= 1
    journal.unwatch(stream)


async def test_appends_to_a_watched_stream_are_told_with_what_was_before(
    journal: Journal, ear: Any, stream: str
) -> None:
    journal.watch(stream)
    await ear.hears(stream, "doubt")
    opened = await journal.open_run(opening(stream))
    await journal.append(batch(stream, 1, "a", "b"))
    await journal.append(batch(stream, 3, "c", ending=COMPLETED))
    told = await ear.hears(stream, "frames", 3)
    frames = await everything(journal, stream)
    assert [frame for call in told for frame in call.frames] == frames
    assert [call.previous for call in told] == [ORIGIN, opened.first, frames[2].id]
    journal.unwatch(stream)


async def test_what_is_told_can_be_read_at_once(journal: Journal, ear: Any, stream: str) -> None:
    """Nobody hears of a frame before the journal accepted it (P1)."""
    journal.watch(stream)
    await ear.hears(stream, "doubt")
    await journal.open_run(opening(stream))
    for n in range(1, 20):
        writing = asyncio.ensure_future(journal.append(batch(stream, n, f"{n}")))
        (*_, told) = await ear.hears(stream, "frames", n + 1)
        page = await journal.read(stream, told.previous, 10, ROOMY)
        assert list(page.frames) == told.frames
        await writing
    journal.unwatch(stream)


async def test_duplicates_and_refusals_are_not_told(journal: Journal, ear: Any, stream: str) -> None:
    await journal.open_run(opening(stream))
    journal.watch(stream)
    await ear.hears(stream, "doubt")
    await journal.append(batch(stream, 1, "a"))
    await journal.append(batch(stream, 1, "a"))
    with pytest.raises(Fenced):
        await journal.append(batch(stream, 2, "b", writer="another"))
    await journal.append(batch(stream, 1, "a", "b"))
    told = await ear.hears(stream, "frames", 2)
    assert [data(call.frames) for call in told] == [[b"a"], [b"b"]]
    journal.unwatch(stream)


async def test_an_unwatched_stream_is_silent(journal: Journal, ear: Any, name: Callable[[str], str]) -> None:
    """What is told of a stream watched later was written later."""
    quiet, loud = name("quiet"), name("loud")
    journal.watch(quiet)
    journal.watch(loud)
    await ear.hears(quiet, "doubt")
    await ear.hears(loud, "doubt")
    journal.unwatch(quiet)
    before = len(ear.heard[quiet])
    await journal.open_run(opening(quiet))
    await journal.delete(quiet)
    await journal.open_run(opening(loud))
    await ear.hears(loud, "frames")
    assert len(ear.heard[quiet]) == before
    journal.unwatch(loud)


async def test_a_stream_watched_again_is_told_of_again(journal: Journal, ear: Any, stream: str) -> None:
    journal.watch(stream)
    await ear.hears(stream, "doubt")
    journal.unwatch(stream)
    await journal.open_run(opening(stream))
    doubts = len([heard for heard in ear.heard[stream] if heard.call == "doubt"])
    journal.watch(stream)
    await ear.hears(stream, "doubt", doubts + 1)
    # A message that was under way may have come.
    late = len([heard for heard in ear.heard[stream] if heard.call == "frames"])
    await journal.append(batch(stream, 1, "a"))
    (*_, told) = await ear.hears(stream, "frames", late + 1)
    assert data(told.frames) == [b"a"]
    journal.unwatch(stream)


async def test_a_deletion_is_told(journal: Journal, ear: Any, stream: str) -> None:
    await journal.open_run(opening(stream))
    journal.watch(stream)
    await ear.hears(stream, "doubt")
    await journal.delete(stream)
    await ear.hears(stream, "deleted")
    opened = await journal.open_run(opening(stream))
    (*_, told) = await ear.hears(stream, "frames", 2)
    assert (told.previous, told.frames[0].id) == (ORIGIN, opened.first)
    journal.unwatch(stream)


async def test_the_endings_of_open_runs_are_told_just_before_a_deletion(
    journal: Journal, ear: Any, owner: Any, stream: str
) -> None:
    """And their owners are told."""
    await journal.open_run(opening(stream, "r1", owner=owner.name))
    await journal.open_run(opening(stream, "r2"))
    await journal.open_run(opening(stream, "r3"))
    await journal.append(batch(stream, 1, "a", run="r3", ending=COMPLETED))
    before = await top(journal, stream)
    journal.watch(stream)
    await ear.hears(stream, "doubt")
    await journal.delete(stream)
    await ear.hears(stream, "deleted")
    await owner.hears_of(stream, "r1")
    *told, deleted = [heard for heard in ear.heard[stream] if heard.call != "doubt"]
    assert deleted.call == "deleted"
    assert {heard.call for heard in told} == {"frames"}
    assert told[0].previous == before
    frames = [frame for heard in told for frame in heard.frames]
    assert [frame.seq for frame in frames] == [before.seq + 1, before.seq + 2]
    assert sorted(said(frames)) == [("r1", "run.ended"), ("r2", "run.ended")]
    for frame in frames:
        told_of = json.loads(frame.data)
        assert (told_of["status"], told_of["reason"]) == ("cancelled", "stream_deleted")
    journal.unwatch(stream)


async def test_watchers_counts_the_processes_that_watch(journal: Journal, ear: Any, stream: str) -> None:
    assert await journal.watchers(stream) == 0
    journal.watch(stream)
    await ear.hears(stream, "doubt")
    assert await journal.watchers(stream) == 1
