"""A client that listens to an event stream beside many others, and what all of them must have heard."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any

import aiohttp
from reading import Block

DEADLINE_S = 60


class Listener:
    """Requests one URL, keeps every event, and resumes after the last one when it is told to listen again.

    `connections` counts its requests; `whole` says whether the last answer was ended as a complete one.
    """

    def __init__(self, session: aiohttp.ClientSession, url: str, method: str = "GET", **headers: str) -> None:
        self.blocks: list[Block] = []
        self.last_id = ""
        self.connections = 0
        self.status = 0
        self.answer_headers: dict[str, str] = {}
        self.whole: bool | None = None
        self.session = session
        self.url = url
        self._method = method
        self._headers = {name.replace("_", "-"): value for name, value in headers.items()}
        self._news = asyncio.Event()

    async def listen(self) -> Listener:
        """One connection, to its end."""
        self.connections += 1
        self.whole = None
        headers = self._headers | ({"Last-Event-ID": self.last_id} if self.last_id else {})
        try:
            async with self.session.request(self._method, self.url, headers=headers) as response:
                self.status = response.status
                self.answer_headers = {name.lower(): value for name, value in response.headers.items()}
                self._news.set()
                await self._read(response)
            self.whole = True
        except (aiohttp.ClientPayloadError, ConnectionError):
            self.whole = False
        finally:
            self._news.set()
        return self

    async def _read(self, response: aiohttp.ClientResponse) -> None:
        event, id_, pending = "", self.last_id, b""
        data: list[str] = []
        async for piece in response.content.iter_any():
            *lines, pending = (pending + piece).split(b"\n")
            for line in lines:
                field, _, text = line.decode().partition(":")
                text = text.removeprefix(" ")
                if not line:
                    self.last_id = id_
                    if data:
                        self.blocks.append(Block(id_, event, "\n".join(data)))
                    event, data = "", []
                elif field == "id":
                    id_ = text
                elif field == "event":
                    event = text
                elif field == "data":
                    data.append(text)
            self._news.set()

    async def until(self, happened: Callable[[], bool]) -> None:
        """Wait for something that this listener's events bring about."""
        async with asyncio.timeout(DEADLINE_S):
            while not happened():
                self._news.clear()
                await self._news.wait()

    async def has(self, count: int) -> None:
        """Wait until it has so many data frames."""
        await self.until(lambda: len(self.data) >= count)

    @property
    def data(self) -> list[str]:
        """The data of every frame, control frames left out."""
        return [block.data for block in self.blocks if block.event != "relay"]

    @property
    def controls(self) -> list[dict[str, Any]]:
        return [json.loads(block.data) for block in self.blocks if block.event == "relay"]

    def endings(self) -> list[dict[str, Any]]:
        """Every `run.ended` it was shown."""
        return [control for control in self.controls if control["type"] == "run.ended"]

    def seqs(self) -> list[int]:
        """The seq of every journaled frame it was shown."""
        journaled = ("run.started", "run.ended")
        return [
            int(block.id.rpartition(".")[2].partition("-")[0])
            for block in self.blocks
            if block.event != "relay" or json.loads(block.data)["type"] in journaled
        ]

    def types(self) -> list[str]:
        return [control["type"] for control in self.controls]


def session() -> aiohttp.ClientSession:
    """For any number of listeners; no time limit but the tests' own."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None)
    )


async def all_of(listeners: Sequence[asyncio.Task[Listener]], deadline_s: float = DEADLINE_S) -> None:
    """Wait until every listener's answer has ended."""
    async with asyncio.timeout(deadline_s):
        await asyncio.gather(*listeners)


def assert_heard_once(listener: Listener, words: Sequence[str], *, reason: str = "upstream_end") -> None:
    """A listener on the events route of a stream with one run, over one connection, saw exactly its frames:
    each once, in order, ids without holes, one ending, and no loss."""
    assert listener.data == list(words)
    assert listener.seqs() == list(range(1, len(words) + 3))  # run.started, the words, run.ended
    assert [ending["reason"] for ending in listener.endings()] == [reason]
    assert not {"gap", "reset"}.intersection(listener.types())
    assert listener.connections == 1


def assert_answered_once(listener: Listener, words: Sequence[str]) -> None:
    """A proxied client got upstream's whole answer over one connection."""
    assert listener.data == list(words)
    assert listener.whole
    assert listener.connections == 1
