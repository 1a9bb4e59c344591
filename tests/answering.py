"""Answers that a test gives word by word, and refusals."""

from __future__ import annotations

import asyncio
import json
import secrets
from typing import Any

from reading import Reading
from relay_process import RelayProcess
from scripted_upstream import Exchange, ScriptedUpstream


class Agent:
    """An answer in a named stream (or in a fresh one), one frame a `say`. It stays open until `end`."""

    def __init__(self, relay: RelayProcess, upstream: ScriptedUpstream, stream: str = "") -> None:
        self._loop = upstream.loop
        self._said: asyncio.Queue[str | None] = asyncio.Queue()
        path = "/" + secrets.token_hex(8)

        async def handler(exchange: Exchange) -> None:
            await exchange.head()
            while (word := await self._said.get()) is not None:
                await exchange.chunk(f"data: {word}\n\n".encode())
            await exchange.end()

        upstream.on(path, handler)
        self._client = Reading(relay.url + path, **({"Relay_Stream": stream} if stream else {}))
        self.stream = self._client.headers["relay-stream"]
        self.run = self._client.headers["relay-run"]
        self.events = f"{relay.url}/relay/v1/streams/{self.stream}/events"
        self.resume_ids: list[str] = []

    def say(self, *words: str) -> None:
        """Returns when the frames are journaled: the agent's own client has them."""
        self.send(*words)
        self.receive(len(words))

    def send(self, *words: str) -> None:
        for word in words:
            self._loop.call_soon_threadsafe(self._said.put_nowait, word)

    def receive(self, count: int) -> None:
        self.resume_ids += [block.id for block in self._client.take(count)]

    def end(self) -> None:
        self._loop.call_soon_threadsafe(self._said.put_nowait, None)
        assert list(self._client.blocks()) == []
        self._client.cut()


def answer(relay: RelayProcess, upstream: ScriptedUpstream, stream: str, *words: str) -> Agent:
    """A whole answer: run.started, the words, run.ended."""
    agent = Agent(relay, upstream, stream)
    agent.say(*words)
    agent.end()
    return agent


def problem(answer: tuple[int, dict[str, str], bytes]) -> dict[str, Any]:
    status, headers, body = answer
    assert headers["content-type"] == "application/problem+json"
    document = json.loads(body)
    assert document["status"] == status
    assert document["title"]
    return document
