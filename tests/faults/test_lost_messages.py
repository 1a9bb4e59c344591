"""A PUBLISH is a hint that may be lost; the journal is the truth, and readers get all of it, once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from faults.listener import DEADLINE_S, Listener, all_of, assert_answered_once, assert_heard_once, session
from faults.redis_seam import RedisSeam
from redis_server import RedisServer
from relay_process import RelayProcess
from scripted_upstream import Exchange, Gate, ScriptedUpstream

WORDS = [f"word-{n:02}." for n in range(12)]


@dataclass
class Pair:
    """Two relays on one Redis, each through a seam of its own. Runs are started at `writer`."""

    writer: RelayProcess
    other: RelayProcess
    seams: tuple[RedisSeam, RedisSeam]

    def lose(self, stream: str, part: bytes, most: int) -> None:
        """Lose, for each relay, the next `most` messages of a stream whose payload contains `part`."""
        channel = f"{{{stream}}}".encode()
        for seam in self.seams:
            seam.lost = 0

            def loses(kind: bytes, of: bytes, payload: bytes, seam: RedisSeam = seam) -> bool:
                return kind == b"message" and of.endswith(channel) and part in payload and seam.lost < most

            seam.loses = loses

    def lost(self) -> list[int]:
        return [seam.lost for seam in self.seams]

    async def have_lost(self, most: int) -> None:
        """Wait until so many messages were lost for each relay."""
        async with asyncio.timeout(DEADLINE_S):
            while True:
                if self.lost() == [most, most]:
                    return
                await asyncio.sleep(0.001)


@pytest.fixture(scope="module")
def pair(redis_server: RedisServer, upstream: ScriptedUpstream) -> Iterator[Pair]:
    with (
        RedisSeam.running(redis_server.port) as one,
        RedisSeam.running(redis_server.port) as two,
        RelayProcess.start(journal=one.redis_url(), upstream=upstream.url, quiet_check_s=0.3) as writer,
        RelayProcess.start(journal=two.redis_url(), upstream=upstream.url, quiet_check_s=0.3) as other,
    ):
        yield Pair(writer, other, (one, two))


@dataclass
class Audience:
    """A proxied client, and a reader of the events route at each relay, all of one run."""

    client: Listener
    readers: list[Listener]
    listening: list[asyncio.Task[Listener]]

    async def have(self, count: int) -> None:
        for listener in (self.client, *self.readers):
            await listener.has(count)


def word_by_word(upstream: ScriptedUpstream, name: str) -> Gate:
    """Script a stream whose every word waits to be let out, and whose end does too."""
    gate = upstream.gate()

    async def handler(exchange: Exchange) -> None:
        await exchange.head("200 OK", "text/event-stream", f"Relay-Stream: {name}")
        for word in WORDS:
            await gate.wait()
            await exchange.chunk(f"data: {word}\n\n".encode())
        await gate.wait()
        await exchange.end()

    upstream.on(f"/{name}", handler)
    return gate


async def gather(pair: Pair, name: str) -> Audience:
    """Everybody connected, caught up and following."""
    sessions = session()
    client = Listener(sessions, f"{pair.writer.url}/{name}", "POST")
    listening = [asyncio.create_task(client.listen())]
    await client.until(lambda: client.status == 200)
    readers = [
        Listener(sessions, f"{relay.url}/relay/v1/streams/{name}/events?run=latest")
        for relay in (pair.writer, pair.other)
    ]
    for reader in readers:
        listening.append(asyncio.create_task(reader.listen()))
        await reader.until(lambda reader=reader: "live" in reader.types())  # type: ignore[misc]
    return Audience(client, readers, listening)


async def leave(audience: Audience) -> None:
    await all_of(audience.listening)
    assert_answered_once(audience.client, WORDS)
    for reader in audience.readers:
        assert_heard_once(reader, WORDS)
    await audience.client.session.close()


def await_followers(redis_server: RedisServer, name: str) -> None:
    """Wait until both relays have subscribed, so that a message exists which can be lost."""
    deadline = time.monotonic() + DEADLINE_S
    with redis_server.client() as client:
        while client.pubsub_numsub(f"relay:0:follow:{{{name}}}")[0][1] < 2:
            assert time.monotonic() < deadline, "the relays do not follow the stream"


@pytest.mark.parametrize(
    ("lost_word", "then"), [(5, "more"), (5, "silence"), (0, "silence"), (len(WORDS) - 1, "silence")]
)
def test_p2_a_frame_whose_message_was_lost_arrives_once(
    pair: Pair, redis_server: RedisServer, upstream: ScriptedUpstream, name: str, lost_word: int, then: str
) -> None:
    """Whether the next frame shows the hole, or nothing comes for a while and the journal is asked."""

    async def scenario() -> None:
        gate = word_by_word(upstream, name)
        audience = await gather(pair, name)
        await_followers(redis_server, name)
        pair.lose(name, WORDS[lost_word].encode(), most=1)
        for count in range(1, len(WORDS) + 1):
            gate.pass_one()
            if then == "silence" or count != lost_word + 1:
                await audience.have(count)
        await pair.have_lost(1)
        gate.open()
        await leave(audience)

    asyncio.run(scenario())


def test_p3_an_ending_whose_message_was_lost_is_seen(
    pair: Pair, redis_server: RedisServer, upstream: ScriptedUpstream, name: str
) -> None:
    async def scenario() -> None:
        gate = word_by_word(upstream, name)
        audience = await gather(pair, name)
        await_followers(redis_server, name)
        pair.lose(name, b'"type":"run.ended"', most=1)
        gate.open()
        await leave(audience)
        await pair.have_lost(1)

    asyncio.run(scenario())


def test_p2_everything_arrives_while_every_message_is_lost(
    pair: Pair, redis_server: RedisServer, upstream: ScriptedUpstream, name: str
) -> None:
    """Also across the end of the outage, in the middle of the stream."""

    async def scenario() -> None:
        gate = word_by_word(upstream, name)
        audience = await gather(pair, name)
        await_followers(redis_server, name)
        pair.lose(name, b"", most=7)
        for count in range(1, len(WORDS) + 1):
            gate.pass_one()
            await pair.have_lost(min(count, 7))  # words let out together might share a message
            if count in (3, 7, 8):  # the journal is asked about several frames at once, then one alone
                await audience.have(count)
        gate.open()
        await leave(audience)

    asyncio.run(scenario())


def test_p2_a_reader_whose_subscription_is_never_confirmed_gets_everything(
    pair: Pair, upstream: ScriptedUpstream, name: str
) -> None:
    """Neither a confirmation nor a message comes through: only asking the journal helps."""

    async def scenario() -> None:
        channel = f"{{{name}}}".encode()
        for seam in pair.seams:
            seam.lost = 0
            seam.loses = lambda kind, of, payload: of.endswith(channel)
        gate = word_by_word(upstream, name)
        audience = await gather(pair, name)
        for count in range(1, len(WORDS) + 1):
            gate.pass_one()
            if count in (2, 6):
                await audience.have(count)
        gate.open()
        await leave(audience)
        assert min(pair.lost()) > 0

    asyncio.run(scenario())
