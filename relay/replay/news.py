"""Waiting for a stream to change, for clients that are not its readers."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from relay.replay.reader import Readers
from relay.replay.tail import Tail, Tails


class News:
    """Waits for news of a stream."""

    def __init__(self, tail: Tail) -> None:
        self.tail = tail
        self._news: asyncio.Future[None] | None = None
        self._given_up = False

    def wake(self) -> None:
        """There is news of the stream."""
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    def give_up(self) -> None:
        """Nobody waits any more."""
        self._given_up = True
        self.wake()

    def listen(self) -> None:
        """Hear of news from now on."""
        self._news = asyncio.get_running_loop().create_future()
        self.tail.wait(self)

    async def wait(self, longest_s: float) -> bool:
        """Until there is news or the time is over. False when there is no use in asking again."""
        if longest_s <= 0 or self._given_up:
            return False
        assert self._news is not None
        timer = asyncio.get_running_loop().call_later(longest_s, self.wake)
        try:
            await self._news
        finally:
            timer.cancel()
        return not self._given_up


@contextmanager
def news_of(stream: str, tails: Tails, readers: Readers, connection: Any) -> Iterator[News]:
    """News of a stream, which may not exist yet, as long as its client is there and relay does not drain."""
    tail = tails.acquire(stream)
    news = News(tail)
    connection.on_lost = news.give_up
    readers.expect(news.give_up)
    try:
        yield news
    finally:
        connection.on_lost = None
        readers.expected(news.give_up)
        tails.release(tail, news)
