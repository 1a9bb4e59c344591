"""relay.replay.pages: who asks for the same at one time gets the same, but nothing older than it knows."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from replay.doubtful_journal import Stage, staged

from relay.cursor import ORIGIN, Cursor
from relay.errors import JournalUnavailable
from relay.journal.base import Page
from relay.replay.pages import SharedPage
from relay.replay.view import EventsView


def ask(stage: Stage, after: Cursor = ORIGIN) -> asyncio.Task[SharedPage]:
    return asyncio.create_task(stage.tails.pages.read("s", after, 100, 10**6))


def test_a_page_is_read_and_encoded_once_for_all_that_wait_for_it(tmp_path: Path) -> None:
    async def test() -> None:
        async with staged(tmp_path) as stage:
            await stage.open()
            await stage.say("a", "b")
            stage.journal.close_gate()
            asked = [ask(stage) for _ in range(10)]
            await stage.journal.arrived.wait()
            other = ask(stage, Cursor(1, 1))
            stage.journal.gate.set()
            pages = await asyncio.gather(*asked)
            await other
            assert stage.journal.reads == 2
            plain, same, none = (
                EventsView(None, control, False, False) for control in ("events", "events", "none")
            )
            chunks = {id(page.chunk(view)) for page in pages for view in (plain, same)}
            assert len(chunks) == 1
            assert pages[0].chunk(none).data != pages[0].chunk(plain).data
            assert pages[0].chunk(plain).data.count(b"data: ") == 3
            await ask(stage)
            assert stage.journal.reads == 3

    asyncio.run(test())


def test_p3_a_page_that_was_asked_for_before_somebodys_frame_was_accepted_is_not_taken_for_a_loss(
    tmp_path: Path,
) -> None:
    async def test() -> None:
        async with staged(tmp_path) as stage:
            await stage.open()
            old = await stage.journal.real.read("s", ORIGIN, 100, 10**6)
            await stage.say("a")
            top = (await stage.journal.real.describe("s")).extent.top
            answers = asyncio.Queue[Page]()

            async def read(stream: str, after: Cursor, max_frames: int, max_bytes: int) -> Page:
                return await answers.get()

            stage.journal.read = read
            early, late = ask(stage, top), ask(stage, top)
            await asyncio.sleep(0)
            answers.put_nowait(old._replace(anchor_ms=None, frames=[]))  # from before the frame was accepted
            assert (await early).extent.top < top
            assert not late.done()
            answers.put_nowait(await stage.journal.real.read("s", top, 100, 10**6))
            assert (await late).extent.top == top

    asyncio.run(test())


def test_who_leaves_takes_nothing_from_those_that_wait_on(tmp_path: Path) -> None:
    async def test() -> None:
        async with staged(tmp_path) as stage:
            await stage.open()
            stage.journal.close_gate()
            first, second = ask(stage), ask(stage)
            await stage.journal.arrived.wait()
            first.cancel()
            await asyncio.wait([first])
            stage.journal.gate.set()
            assert len((await second).frames) == 1
            assert stage.journal.reads == 1

    asyncio.run(test())


def test_an_error_is_everybodys(tmp_path: Path) -> None:
    async def test() -> None:
        async with staged(tmp_path) as stage:
            await stage.open()
            stage.journal.failing = 1
            asked = [ask(stage) for _ in range(3)]
            for task in asked:
                with pytest.raises(JournalUnavailable):
                    await task
            assert stage.journal.reads == 1
            assert len((await ask(stage)).frames) == 1

    asyncio.run(test())
