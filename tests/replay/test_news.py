"""relay.replay.news: who waits for a stream hears of its change, and is not kept when it is no use."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from replay.doubtful_journal import Stage, staged

from relay.replay.news import News, news_of
from relay.replay.reader import Readers

LONG_S = 3600.0
"""Longer than a scene may last."""


class Scene:
    """A client that waits for news of the stream `s`."""

    def __init__(self, stage: Stage, news: News, readers: Readers, connection: SimpleNamespace) -> None:
        self.stage = stage
        self.news = news
        self.readers = readers
        self.connection = connection

    async def hears_after(self, act: Callable[[], Awaitable[None]]) -> bool:
        """Whether there is use in asking again, when something happened after the last question."""
        self.news.listen()
        await act()
        return await self.news.wait(LONG_S)


@asynccontextmanager
async def waiting(tmp_path: Path) -> AsyncIterator[Scene]:
    async with staged(tmp_path) as stage:
        readers, connection = Readers(15, 30), SimpleNamespace(on_lost=None)
        with news_of("s", stage.tails, readers, connection) as news:
            yield Scene(stage, news, readers, connection)
        assert connection.on_lost is None
        assert not readers._callers
        assert news.tail.readers == 0


def play(tmp_path: Path, scene: Callable[[Scene], Awaitable[None]]) -> None:
    async def test() -> None:
        async with waiting(tmp_path) as waiter:
            await scene(waiter)

    asyncio.run(test())


def test_a_stream_that_comes_into_being_is_news(tmp_path: Path) -> None:
    async def scene(waiter: Scene) -> None:
        assert await waiter.hears_after(waiter.stage.open)

    play(tmp_path, scene)


def test_news_before_the_wait_and_after_the_question_are_not_missed(tmp_path: Path) -> None:
    async def scene(waiter: Scene) -> None:
        waiter.news.listen()
        await waiter.stage.open()
        await waiter.stage.settled()
        assert await waiter.news.wait(LONG_S)

    play(tmp_path, scene)


@pytest.mark.parametrize("way", ["the client leaves", "relay drains"])
def test_who_gives_up_does_not_ask_again(tmp_path: Path, way: str) -> None:
    async def scene(waiter: Scene) -> None:
        async def give_up() -> None:
            if way == "relay drains":
                waiter.readers.drain()
            else:
                waiter.connection.on_lost()

        assert not await waiter.hears_after(give_up)
        waiter.news.listen()
        assert not await waiter.news.wait(LONG_S), "nor a second time"

    play(tmp_path, scene)


def test_a_time_that_is_over_is_not_waited_for(tmp_path: Path) -> None:
    async def scene(waiter: Scene) -> None:
        await waiter.stage.open()
        await waiter.stage.settled()
        waiter.news.listen()
        assert not await waiter.news.wait(0)
        assert await waiter.news.wait(0.01), "the last look is made when the time is over"

    play(tmp_path, scene)
