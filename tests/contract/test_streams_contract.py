"""What relay.journal.base promises of streams that are made, changed and sealed by name, of every backend."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from contract.phrases import COMPLETED, ROOMY, batch, everything, opening, seqs, top

from relay.cursor import ORIGIN, Cursor, Extent, Standing, judge
from relay.errors import StreamSealed, UnknownRun, UnknownStream
from relay.journal.base import Journal, Page, StreamChange, StreamInfo, StreamTop
from relay.limits import Retention

SMALL = Retention(100, 10_000, 3600)


# Making.


async def test_a_stream_made_without_frames_is_there(journal: Journal, stream: str) -> None:
    assert await journal.put_stream(stream, SMALL, StreamChange()) is True
    info = await journal.describe(stream)
    assert info == StreamInfo(
        stream=stream,
        extent=Extent(info.extent.created_ms, 1, ORIGIN),
        sealed=False,
        open_runs=info.open_runs,
        latest_run="",
        last_data=0,
        runs=0,
        bytes_held=0,
        retention=SMALL,
        metadata="",
        active_ms=info.active_ms,
    )
    assert list(info.open_runs) == []
    assert list(await journal.runs(stream, "", 10)) == []
    assert 0 < info.extent.created_ms <= info.active_ms
    page = await journal.read(stream, ORIGIN, 10, ROOMY)
    assert page == Page(info.extent, None, page.frames, False)
    assert list(page.frames) == []
    assert judge(ORIGIN, page.extent, None) is Standing.HERE
    assert dict(await journal.tops([stream])) == {stream: StreamTop(ORIGIN, False)}
    assert info in await journal.streams(stream[:-1], 10)
    with pytest.raises(UnknownRun):
        await journal.run(stream, "r1")
    with pytest.raises(UnknownRun):
        await journal.append(batch(stream, 1, "a"))


async def test_runs_of_a_stream_that_was_made_begin_with_the_first_id(journal: Journal, stream: str) -> None:
    """Whoever waited at the origin gets everything."""
    await journal.put_stream(stream, SMALL, StreamChange())
    made = (await journal.describe(stream)).extent
    opened = await journal.open_run(opening(stream))
    assert (opened.start, opened.first.seq) == (ORIGIN, 1)
    last = (await journal.append(batch(stream, 1, "a"))).last
    page = await journal.read(stream, ORIGIN, 10, ROOMY)
    assert page.extent == Extent(made.created_ms, 1, last)
    assert made.created_ms <= opened.first.ms
    assert judge(ORIGIN, page.extent, page.anchor_ms) is Standing.HERE
    assert seqs(page) == [1, 2]
    assert (await journal.describe(stream)).retention == SMALL


async def test_those_who_wait_for_a_stream_that_was_made_hear_of_its_frames(
    journal: Journal, ear: Any, stream: str
) -> None:
    await journal.put_stream(stream, SMALL, StreamChange())
    journal.watch(stream)
    await ear.hears(stream, "doubt")
    opened = await journal.open_run(opening(stream))
    (told,) = await ear.hears(stream, "frames")
    assert (told.previous, told.frames[0].id) == (ORIGIN, opened.first)
    journal.unwatch(stream)


async def test_what_is_not_said_of_a_new_stream_is_as_the_default_has_it(
    journal: Journal, name: Callable[[str], str]
) -> None:
    for number, (change, retention) in enumerate(
        (
            (StreamChange(max_frames=7), SMALL._replace(max_frames=7)),
            (StreamChange(max_bytes=8), SMALL._replace(max_bytes=8)),
            (StreamChange(retention_s=9), SMALL._replace(retention_s=9)),
            (StreamChange(0, 0, 0), Retention(0, 0, 0)),
        )
    ):
        stream = name(str(number))
        assert await journal.put_stream(stream, SMALL, change) is True
        assert (await journal.describe(stream)).retention == retention


# Changing.


async def test_a_change_changes_only_what_it_names(journal: Journal, stream: str) -> None:
    await journal.open_run(opening(stream, retention=SMALL))
    metadata = '{"title": "ü", "n": [1, null]}'
    other = Retention(1, 1, 1)
    for change, retention, text in (
        (StreamChange(), SMALL, ""),
        (StreamChange(metadata=metadata), SMALL, metadata),
        (StreamChange(max_frames=50), SMALL._replace(max_frames=50), metadata),
        (StreamChange(max_bytes=0, retention_s=7200), Retention(50, 0, 7200), metadata),
        (StreamChange(metadata=""), Retention(50, 0, 7200), ""),
    ):
        for _ in range(2):
            assert await journal.put_stream(stream, other, change) is False
            info = await journal.describe(stream)
            assert (info.retention, info.metadata) == (retention, text)
    assert len(await everything(journal, stream)) == 1
    assert list(info.open_runs) == ["r1"]


async def test_making_a_stream_again_changes_nothing(journal: Journal, stream: str) -> None:
    change = StreamChange(5, 1000, 60, '{"a":1}')
    assert await journal.put_stream(stream, SMALL, change) is True
    before = await journal.describe(stream)
    assert await journal.put_stream(stream, SMALL, change) is False
    assert (await journal.describe(stream)).extent == before.extent
    await journal.open_run(opening(stream))
    assert await journal.put_stream(stream, SMALL, change) is False
    info = await journal.describe(stream)
    assert (info.metadata, info.extent.created_ms) == ('{"a":1}', before.extent.created_ms)


async def test_of_many_who_make_a_stream_at_once_one_does(journal: Journal, stream: str) -> None:
    made = await asyncio.gather(*(journal.put_stream(stream, SMALL, StreamChange()) for _ in range(10)))
    assert sorted(made) == [False] * 9 + [True]


async def test_a_narrower_bound_holds_from_the_next_append_on(journal: Journal, stream: str) -> None:
    await journal.open_run(opening(stream))
    await journal.append(batch(stream, 1, *(f"{n}" for n in range(20))))
    await journal.put_stream(stream, Retention(), StreamChange(max_frames=5))
    await journal.append(batch(stream, 21, "x"))
    assert [frame.seq for frame in await everything(journal, stream)] == [18, 19, 20, 21, 22]
    await journal.put_stream(stream, Retention(), StreamChange(max_frames=0))
    await journal.append(batch(stream, 22, *(f"{n}" for n in range(20))))
    assert len(await everything(journal, stream)) == 25


async def test_a_stream_made_where_one_was_deleted_has_other_ids(journal: Journal, stream: str) -> None:
    """As fast as it can be done: much of it within one millisecond."""
    former: list[Cursor] = []
    for _ in range(20):
        await journal.open_run(opening(stream))
        former.append(await top(journal, stream))
        await journal.delete(stream)
        await journal.put_stream(stream, SMALL, StreamChange())
        page = await journal.read(stream, former[-1], 10, ROOMY)
        assert judge(former[-1], page.extent, page.anchor_ms) is Standing.RECREATED
        assert page.extent.created_ms > former[-1].ms
        former.append((await journal.open_run(opening(stream))).first)
        await journal.delete(stream)
    assert len(set(former)) == 40


# Sealing.


async def test_a_stream_can_be_sealed_while_runs_are_open(journal: Journal, ear: Any, stream: str) -> None:
    await journal.open_run(opening(stream))
    journal.watch(stream)
    await ear.hears(stream, "doubt")
    await journal.seal(stream)
    await ear.hears(stream, "sealed")
    assert (await journal.describe(stream)).sealed
    assert (await journal.tops([stream]))[stream].sealed
    with pytest.raises(StreamSealed):
        await journal.open_run(opening(stream, "r2"))
    last = await journal.append(batch(stream, 1, "a", ending=COMPLETED))
    info = await journal.describe(stream)
    assert info.finished
    assert info.extent.top == last.last
    journal.unwatch(stream)


async def test_sealing_again_is_no_error_and_nothing_unseals(journal: Journal, stream: str) -> None:
    await journal.put_stream(stream, SMALL, StreamChange())
    await journal.seal(stream)
    await journal.seal(stream)
    assert await journal.put_stream(stream, SMALL, StreamChange(max_frames=7)) is False
    info = await journal.describe(stream)
    assert (info.sealed, info.finished, info.retention.max_frames) == (True, True, 7)
    with pytest.raises(StreamSealed):
        await journal.open_run(opening(stream))
    assert dict(await journal.tops([stream])) == {stream: StreamTop(ORIGIN, True)}


async def test_only_a_stream_that_is_there_can_be_sealed(journal: Journal, stream: str) -> None:
    with pytest.raises(UnknownStream):
        await journal.seal(stream)
    await journal.open_run(opening(stream, seal=True))
    await journal.delete(stream)
    with pytest.raises(UnknownStream):
        await journal.seal(stream)
    await journal.open_run(opening(stream))
    assert not (await journal.describe(stream)).sealed


async def test_an_opening_is_repeated_after_its_stream_was_sealed(journal: Journal, stream: str) -> None:
    opened = await journal.open_run(opening(stream))
    await journal.seal(stream)
    assert await journal.open_run(opening(stream)) == opened
