"""Two relays on one Redis, and a turn that is followed at both."""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import aiohttp
from faults.agent import Agent, Turn
from faults.listener import DEADLINE_S, Listener, all_of
from faults.redis_seam import RedisSeam
from faults.tally import Kept, Tally, kept_of
from redis_server import RedisServer
from relay_process import RelayProcess
from scripted_upstream import ScriptedUpstream

LEASE_S = 0.9

FAST = {"owner_lease_s": LEASE_S, "journal_timeout_s": 3, "quiet_check_s": 0.5}
"""Settings by which the dead are found soon, and the living not taken for dead on a busy machine."""


class Pair:
    """Two relays, each with a way of its own to Redis. Tests begin runs at `owner` and look from `other`."""

    def __init__(self, server: RedisServer, upstream: ScriptedUpstream, settings: dict[str, Any]) -> None:
        self.server = server
        self.upstream = upstream
        self.settings = {"redis_prefix": f"p-{secrets.token_hex(4)}"} | settings
        self.seams = RedisSeam(server.port), RedisSeam(server.port)
        self.owner = self._start(0)
        self.other = self._start(1)

    @classmethod
    @contextlib.contextmanager
    def running(cls, server: RedisServer, upstream: ScriptedUpstream, **settings: Any) -> Iterator[Pair]:
        pair = cls(server, upstream, settings)
        try:
            yield pair
        finally:
            for relay in (pair.owner, pair.other):
                relay.kill()
            for seam in pair.seams:
                seam.close()

    def _start(self, seam: int) -> RelayProcess:
        url = self.seams[seam].redis_url()
        return RelayProcess.start(journal=url, upstream=self.upstream.url, **self.settings)

    async def replace_owner(self) -> None:
        """The owner is gone: start another in its place."""
        self.owner = await asyncio.to_thread(self._start, 0)

    async def followed(self, sessions: aiohttp.ClientSession, **agent: Any) -> Followed:
        """A turn of the owner's, followed at the other."""
        return await followed(sessions, self.upstream, self.owner, self.other, **agent)

    @property
    def prefix(self) -> str:
        return str(self.settings["redis_prefix"])


@dataclass
class Followed:
    """A turn that an agent began: its proxied client at the owner, and a reader at the other relay."""

    agent: Agent
    turn: Turn
    run: str
    client: Listener
    answer: asyncio.Task[Listener]
    reader: Listener
    reading: asyncio.Task[Listener]

    @property
    def stream(self) -> str:
        return self.agent.stream

    async def kept(self, relay: RelayProcess) -> list[Kept]:
        """What the journal keeps of the run."""
        return [
            each for each in await kept_of(self.client.session, relay, self.stream) if each.run == self.run
        ]

    def count(self, tally: Tally, fault: str, kept: list[Kept], **listeners: list[Listener]) -> str:
        """Count the run, its client as one that was cut and its reader as one that was not."""
        seen = {"whole": [self.reader], "cut": [self.client]} | listeners
        return tally.count(fault, kept, self.turn.said, **seen)


async def followed(
    sessions: aiohttp.ClientSession,
    upstream: ScriptedUpstream,
    at: RelayProcess,
    read_at: RelayProcess,
    **agent: Any,
) -> Followed:
    """Begin a turn, and return when its client and its reader have heard of it."""
    speaker = Agent(upstream, f"s-{secrets.token_hex(6)}", **agent)
    client = Listener(sessions, f"{at.url}/{speaker.stream}", "POST")
    answer = asyncio.create_task(client.listen())
    await client.has(1)
    assert client.status == 200
    run = client.answer_headers["relay-run"]
    reader = reader_of(sessions, read_at, speaker.stream, run)
    reading = asyncio.create_task(reader.listen())
    await reader.has(1)
    return Followed(speaker, speaker.turns[0], run, client, answer, reader, reading)


def reader_of(sessions: aiohttp.ClientSession, relay: RelayProcess, stream: str, run: str) -> Listener:
    """A reader of one run, from its start."""
    return Listener(sessions, f"{relay.url}/relay/v1/streams/{stream}/events?run={run}")


async def late(sessions: aiohttp.ClientSession, relay: RelayProcess, turn: Followed) -> Listener:
    """A reader that comes when the run is over."""
    reader = reader_of(sessions, relay, turn.stream, turn.run)
    await all_of([asyncio.create_task(reader.listen())])
    return reader


async def cancel(
    sessions: aiohttp.ClientSession, relay: RelayProcess, stream: str, run: str
) -> dict[str, Any]:
    """Cancel a run; the run as it ended, now or before."""
    url = f"{relay.url}/relay/v1/streams/{stream}/runs/{run}/cancel"
    async with sessions.post(url) as response:
        assert response.status == 200, await response.text()
        ended: dict[str, Any] = json.loads(await response.read())
        return ended


async def run_of(
    sessions: aiohttp.ClientSession, relay: RelayProcess, stream: str, run: str
) -> dict[str, Any]:
    """A run as a relay describes it."""
    async with sessions.get(f"{relay.url}/relay/v1/streams/{stream}/runs/{run}") as response:
        assert response.status == 200, await response.text()
        found: dict[str, Any] = json.loads(await response.read())
        return found


async def until(happened: Callable[[], Awaitable[bool]]) -> None:
    """Ask again and again, until it happened."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            if await happened():
                return
            await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def fresh_sessions() -> AsyncIterator[aiohttp.ClientSession]:
    """A connection a request: none is left over to a relay that died."""
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=None)) as each:
        yield each
