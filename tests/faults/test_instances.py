"""Relays come, go and stand beside each other; the journal is what they have in common."""

from __future__ import annotations

import asyncio
import http.client
from collections.abc import Callable, Iterator
from contextlib import closing

import pytest
from faults.listener import Listener, all_of, assert_heard_once, session
from reading import Block, Reading
from redis_server import RedisServer
from relay_process import RelayProcess
from scripted_upstream import Exchange, Gate, ScriptedUpstream

WORDS = [f"word-{n}" for n in range(30)]


def gated(upstream: ScriptedUpstream, name: str, before: int) -> Gate:
    """Script a stream that waits before one of its words."""
    gate = upstream.gate()

    async def handler(exchange: Exchange) -> None:
        await exchange.head("200 OK", "text/event-stream", f"Relay-Stream: {name}")
        for n, word in enumerate(WORDS):
            if n == before:
                await gate.wait()
            await exchange.chunk(f"event: say\ndata: {word}\n\n".encode())
        await exchange.end()

    upstream.on(f"/{name}", handler)
    return gate


@pytest.mark.parametrize("ends", [RelayProcess.stop, RelayProcess.kill])
def test_p2_a_finished_stream_replays_in_full_from_a_relay_that_was_restarted(
    fresh_journal: Callable[[], str],
    upstream: ScriptedUpstream,
    name: str,
    ends: Callable[[RelayProcess], None],
) -> None:
    """Ids, event names and data are those of before, and a cursor of before is still good."""
    gated(upstream, name, before=0).open()
    journal = fresh_journal()
    relay = RelayProcess.start(journal=journal, upstream=upstream.url)
    try:
        with Reading(f"{relay.url}/{name}") as answer:
            proxied = answer.frames()
        with Reading(f"{relay.url}/relay/v1/streams/{name}/events?run=latest") as events:
            before = [block for block in events.blocks() if block.id]
    finally:
        ends(relay)
    assert [block.data for block in proxied] == WORDS
    with RelayProcess.start(journal=journal, upstream=upstream.url) as relay:
        with Reading(f"{relay.url}/relay/v1/streams/{name}/events?run=latest") as events:
            assert journaled(list(events.blocks())) == journaled(before)
        for position in (0, 12, len(WORDS) - 2):
            with Reading(f"{relay.url}/{name}", Last_Event_ID=proxied[position].id) as rest:
                assert rest.frames() == proxied[position + 1 :]
        with Reading(f"{relay.url}/{name}", Last_Event_ID=proxied[-1].id) as nothing:
            assert nothing.status == 204
    assert upstream.calls(f"/{name}") == 1


def journaled(blocks: list[Block]) -> list[Block]:
    """Without the control frames of a connection, whose ids repeat a position."""
    own = ('"type":"hello"', '"type":"live"', '"type":"bye"')
    return [
        block for block in blocks if not (block.event == "relay" and any(kind in block.data for kind in own))
    ]


@pytest.fixture(scope="module")
def two_relays(
    redis_server: RedisServer, upstream: ScriptedUpstream
) -> Iterator[tuple[RelayProcess, RelayProcess]]:
    url = redis_server.url()
    with (
        RelayProcess.start(journal=url, upstream=upstream.url) as one,
        RelayProcess.start(journal=url, upstream=upstream.url) as other,
    ):
        yield one, other


def test_a_run_is_read_and_resumed_at_a_relay_that_does_not_own_it(
    two_relays: tuple[RelayProcess, RelayProcess], upstream: ScriptedUpstream, name: str
) -> None:
    """By cursor, by resume id, by `current`; while it runs and after."""
    owner, other = two_relays
    gate = gated(upstream, name, before=10)
    with Reading(f"{owner.url}/{name}") as first:
        seen = first.take(10)

    async def scenario() -> None:
        async with session() as sessions:
            current = Listener(sessions, f"{other.url}/relay/v1/streams/{name}/events?run=current")
            resumed = Listener(sessions, f"{other.url}/{name}")
            resumed.last_id = seen[-4].id
            by_cursor = Listener(sessions, f"{other.url}/relay/v1/streams/{name}/events?run=latest")
            by_cursor.last_id = seen[6].id.rpartition(".")[2]
            tasks = [asyncio.create_task(each.listen()) for each in (current, resumed, by_cursor)]
            await current.has(10)
            await resumed.has(3)
            await by_cursor.has(3)
            gate.open()
            await all_of(tasks)
            assert_heard_once(current, WORDS)
            assert resumed.data == by_cursor.data == WORDS[7:]
            assert resumed.whole
            assert len(by_cursor.endings()) == 1

    asyncio.run(scenario())
    assert other.get(f"/relay/v1/streams/{name}/events?run=current")[0] == 204
    with Reading(f"{other.url}/{name}", Last_Event_ID=seen[-1].id) as late:
        assert [block.data for block in late.frames()] == WORDS[10:]
    assert upstream.calls(f"/{name}") == 1


def test_an_idempotency_key_used_at_one_relay_joins_its_run_at_another(
    two_relays: tuple[RelayProcess, RelayProcess], upstream: ScriptedUpstream, name: str
) -> None:
    owner, other = two_relays
    gate = gated(upstream, name, before=5)

    async def scenario() -> None:
        async with session() as sessions:
            listeners = [
                Listener(sessions, f"{relay.url}/{name}", "POST", Idempotency_Key=name)
                for relay in (owner, other, other, owner)
            ]
            tasks = [asyncio.create_task(each.listen()) for each in listeners]
            for each in listeners:
                await each.has(5)
            gate.open()
            await all_of(tasks)
            assert [each.data for each in listeners] == [WORDS] * 4
            assert len({each.answer_headers["relay-run"] for each in listeners}) == 1

    asyncio.run(scenario())
    host = other.url.removeprefix("http://")
    with closing(http.client.HTTPConnection(host, timeout=60)) as connection:
        connection.request("POST", f"/{name}", b"another body", {"Idempotency-Key": name})
        assert connection.getresponse().status == 422
    assert upstream.calls(f"/{name}") == 1
