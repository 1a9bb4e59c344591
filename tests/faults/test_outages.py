"""Redis goes away while streams run: nothing is lost, nothing comes twice, nobody is disconnected."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable

import aiohttp
import pytest
from faults.listener import DEADLINE_S, Listener, all_of, assert_answered_once, assert_heard_once, session
from faults.redis_seam import RedisSeam
from redis_server import RedisServer
from relay_process import RelayProcess
from scripted_upstream import Exchange, Gate, ScriptedUpstream

TIMEOUT_S = 3
"""Short, but long enough for a busy machine, and a Redis that waits for its disk: relay asks Redis within it
when it starts."""

STREAMS = 6
WORDS = [f"word-{n:03}" for n in range(60)]


def script(upstream: ScriptedUpstream, name: str, words: list[str], pauses: dict[int, Gate]) -> None:
    """An upstream that says its words one a chunk, and waits before some of them."""

    async def handler(exchange: Exchange) -> None:
        await exchange.head("200 OK", "text/event-stream", f"Relay-Stream: {name}")
        for n, word in enumerate(words):
            if n in pauses:
                await pauses[n].wait()
            await exchange.chunk(f"data: {word}\n\n".encode())
        await exchange.end()

    upstream.on(f"/{name}", handler)


def await_journal(relay: RelayProcess, state: str) -> None:
    """Wait until relay says of its journal that it is up, or down."""
    deadline = time.monotonic() + DEADLINE_S
    while relay.json("/relay/readyz")["journal"] != state:
        assert time.monotonic() < deadline, f"the journal is never {state}"


def await_port_closed(port: int) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=10).close()
        except ConnectionRefusedError:
            return
        except ConnectionResetError:
            pass  # it stops at this very moment
        assert time.monotonic() < deadline, "the server does not stop"


def stopped(server: RedisServer) -> None:
    os.kill(server.pid, signal.SIGTERM)
    await_port_closed(server.port)


OUTAGES: dict[str, tuple[Callable[[RedisServer], None], Callable[[RedisServer], None]]] = {
    "stopped": (stopped, RedisServer.restart),
    "killed": (RedisServer.kill, RedisServer.restart),
    "paused": (RedisServer.pause, RedisServer.resume),
}


@pytest.mark.parametrize("outage", OUTAGES)
def test_p2_an_outage_of_redis_costs_no_frame_and_no_connection(
    lasting_redis: RedisServer, upstream: ScriptedUpstream, name: str, outage: str
) -> None:
    """Readers at the relay that owns the runs and at another stay connected; other requests do not notice."""
    take_away, bring_back = OUTAGES[outage]
    streams = [f"{name}-{n}" for n in range(STREAMS)]
    outage_begins, outage_ends = upstream.gate(), upstream.gate()
    for stream in streams:
        script(upstream, stream, WORDS, {20: outage_begins, 45: outage_ends})

    async def hello(exchange: Exchange) -> None:
        await exchange.answer("200 OK", exchange.received.body or b"hello", "text/plain")

    upstream.on(f"/{name}-plain", hello)

    async def scenario(owner: RelayProcess, other: RelayProcess) -> None:
        async with session() as sessions:
            clients = [Listener(sessions, f"{owner.url}/{stream}", "POST") for stream in streams]
            tasks = [asyncio.create_task(client.listen()) for client in clients]
            for client in clients:
                await client.has(20)
            readers = [
                Listener(sessions, f"{relay.url}/relay/v1/streams/{stream}/events?run=latest")
                for stream in streams
                for relay in (owner, other)
            ]
            tasks += [asyncio.create_task(reader.listen()) for reader in readers]
            for reader in readers:
                await reader.has(20)

            await asyncio.to_thread(take_away, lasting_redis)
            outage_begins.open()
            await asyncio.gather(*(asyncio.to_thread(await_journal, each, "down") for each in (owner, other)))
            for body in (b"", b"x" * 100_000):
                async with sessions.post(f"{owner.url}/{name}-plain", data=body) as response:
                    assert (response.status, await response.read()) == (200, body or b"hello")
            assert not any(task.done() for task in tasks)
            await asyncio.to_thread(bring_back, lasting_redis)
            outage_ends.open()

            await all_of(tasks)
            for client in clients:
                assert_answered_once(client, WORDS)
            for reader in readers:
                assert_heard_once(reader, WORDS)

    url = lasting_redis.url()
    with (
        RelayProcess.start(journal=url, upstream=upstream.url, journal_timeout_s=TIMEOUT_S) as owner,
        RelayProcess.start(journal=url, upstream=upstream.url, journal_timeout_s=TIMEOUT_S) as other,
    ):
        asyncio.run(scenario(owner, other))
        assert owner.metric('relay_runs_ended_total{reason="upstream_end",status="completed"}') == STREAMS


@pytest.mark.parametrize("dialect", ["raw", "openai-chat"])
def test_p3_a_journal_away_for_too_long_ends_the_run_and_the_ending_is_written_when_it_is_back(
    lasting_redis: RedisServer, upstream: ScriptedUpstream, name: str, dialect: str
) -> None:
    """Upstream is let go and the client is cut off, not told that this was all; readers stay."""
    gate = upstream.gate()
    let_go = threading.Event()

    async def handler(exchange: Exchange) -> None:
        await exchange.head("200 OK", "text/event-stream", f"Relay-Stream: {name}")
        await exchange.chunk(b"data: one\n\n")
        await gate.wait()
        await exchange.chunk(b"data: two\n\n")
        await exchange.closed()
        let_go.set()

    upstream.on(f"/{name}", handler)

    async def scenario(owner: RelayProcess, other: RelayProcess) -> None:
        async with session() as sessions:
            client = Listener(sessions, f"{owner.url}/{name}", "POST")
            cut_off = asyncio.create_task(client.listen())
            await client.has(1)
            readers = [
                Listener(sessions, f"{relay.url}/relay/v1/streams/{name}/events?run=latest")
                for relay in (owner, other)
            ]
            tasks = [asyncio.create_task(reader.listen()) for reader in readers]
            for reader in readers:
                await reader.has(1)
            await asyncio.to_thread(lasting_redis.kill)
            gate.open()
            await all_of([cut_off])
            assert client.whole is False
            assert await asyncio.to_thread(let_go.wait, DEADLINE_S), "upstream's connection is kept"
            assert not any(task.done() for task in tasks)
            await asyncio.to_thread(lasting_redis.restart)
            await all_of(tasks)
            said = 1 if dialect == "raw" else 2  # raw has no way to say an error in upstream's own format
            for reader in readers:
                assert reader.data[:2] == ["one", "two"]
                assert len(reader.data) == said + 1
                assert reader.seqs() == list(range(1, said + 4))
                assert [(e["status"], e["reason"]) for e in reader.endings()] == [("lost", "journal_lost")]
                assert reader.connections == 1
            assert client.data == ["one"]
            await client.listen()  # it comes back with its last id
            assert client.data[:2] == ["one", "two"]
            assert len(client.data) == said + 1
            assert client.whole is (dialect != "raw")

    url = lasting_redis.url()
    with (
        RelayProcess.start(
            journal=url,
            upstream=upstream.url,
            journal_timeout_s=TIMEOUT_S,
            journal_deadline_s=1,
            dialect=dialect,
        ) as owner,
        RelayProcess.start(journal=url, journal_timeout_s=TIMEOUT_S) as other,
    ):
        asyncio.run(scenario(owner, other))
        assert owner.metric('relay_runs_ended_total{reason="journal_lost",status="lost"}') == 1


def test_p5_connections_reset_at_random_bytes_double_and_lose_nothing(
    redis_server: RedisServer, upstream: ScriptedUpstream, name: str, seed: int, soak: bool
) -> None:
    """Of an append whose connection breaks nobody knows whether it happened; it is repeated."""
    cuts, streams = (2000, 20) if soak else (60, 20)
    begun, calm = upstream.gate(), threading.Event()
    names = [f"{name}-{n}" for n in range(streams)]
    said: dict[str, list[str]] = {stream: [] for stream in names}

    def script_endless(stream: str) -> None:
        async def handler(exchange: Exchange) -> None:
            await exchange.head("200 OK", "text/event-stream", f"Relay-Stream: {stream}")
            while not calm.is_set() or len(said[stream]) < 5:
                word = f"word-{len(said[stream])}"
                said[stream].append(word)
                await exchange.chunk(f"data: {word}\n\n".encode())
                if len(said[stream]) == 2:
                    await begun.wait()
                await asyncio.sleep(0.005)  # an agent's pace, so that there are many appends to break
            await exchange.end()

        upstream.on(f"/{stream}", handler)

    async def scenario(relay: RelayProcess, seam: RedisSeam) -> None:
        for stream in names:
            script_endless(stream)
        async with session() as sessions:
            clients = [Listener(sessions, f"{relay.url}/{stream}", "POST") for stream in names]
            tasks = [asyncio.create_task(client.listen()) for client in clients]
            for client in clients:
                await client.has(2)
            readers = [
                Listener(sessions, f"{relay.url}/relay/v1/streams/{stream}/events?run=latest")
                for stream in names
            ]
            tasks += [asyncio.create_task(reader.listen()) for reader in readers]
            for reader in readers:
                await reader.has(2)
            before = seam.connections
            seam.cut_at_random(seed, cuts, mean_bytes=6000)
            begun.open()
            deadline = time.monotonic() + (600 if soak else DEADLINE_S)
            while seam.connections - before < cuts:  # each but the last three was cut
                assert time.monotonic() < deadline, f"{seam.connections - before} of {cuts} cuts"
                await clients[0].has(len(clients[0].data) + 1)
            calm.set()
            await all_of(tasks)
            for client, reader, stream in zip(clients, readers, names, strict=True):
                assert_answered_once(client, said[stream])
                assert_heard_once(reader, said[stream])
            print(f"{cuts} cuts, {sum(map(len, said.values()))} frames in {streams} runs")

    with (
        RedisSeam.running(redis_server.port) as seam,
        RelayProcess.start(
            journal=seam.redis_url(), upstream=upstream.url, journal_timeout_s=TIMEOUT_S, redis_prefix=name
        ) as relay,
    ):
        asyncio.run(scenario(relay, seam))


def test_p3_no_run_is_left_open_when_its_opening_was_not_answered(
    redis_server: RedisServer, upstream: ScriptedUpstream, name: str, seed: int, soak: bool
) -> None:
    """The request is answered, or refused; either way what the journal holds of it has one ending."""
    requests = 400 if soak else 60
    for n in range(requests):
        script(upstream, f"{name}-{n}", WORDS[:3], {})
    script(upstream, f"{name}-warm", WORDS[:3], {})

    async def scenario(relay: RelayProcess, seam: RedisSeam) -> None:
        async with session() as sessions:
            # Redis knows the scripts from here on: as texts, few of them would come through whole.
            await Listener(sessions, f"{relay.url}/{name}-warm", "POST").listen()
            seam.cut_at_random(seed, requests * 4, mean_bytes=2000)
            clients = [Listener(sessions, f"{relay.url}/{name}-{n}", "POST") for n in range(requests)]
            for start in range(0, requests, 10):
                await all_of([asyncio.create_task(c.listen()) for c in clients[start : start + 10]])
            seam.plan = seam.plan_to_server = lambda number: None
            for client in clients:
                assert client.status in (200, 503)
                if client.status == 200:
                    assert_answered_once(client, WORDS[:3])
            refused = sum(client.status == 503 for client in clients)
            over = await listed_when_over(sessions, relay, requests + 1)
            ended_unanswered = len(over) - 1 - (requests - refused)
            print(f"{refused} of {requests} refused, of which {ended_unanswered} had been opened")
            assert ended_unanswered > 0
            for stream in over:
                page = await journaled(sessions, relay, stream)
                assert '"type":"run.started"' in page[0]["data"]
                assert '"type":"run.ended"' in page[-1]["data"]
                assert sum('"type":"run.ended"' in frame["data"] for frame in page) == 1

    with (
        RedisSeam.running(redis_server.port) as seam,
        RelayProcess.start(
            journal=seam.redis_url(), upstream=upstream.url, journal_timeout_s=TIMEOUT_S, redis_prefix=name
        ) as relay,
    ):
        asyncio.run(scenario(relay, seam))


async def listed_when_over(sessions: aiohttp.ClientSession, relay: RelayProcess, most: int) -> list[str]:
    """The names of all streams, once none has an open run."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        async with sessions.get(f"{relay.url}/relay/v1/streams?limit={most + 1}") as response:
            streams = json.loads(await response.read()).get("streams", [{"open_runs": ["?"]}])
        open_runs = [stream for stream in streams if stream["open_runs"]]
        if not open_runs:
            return [stream["stream"] for stream in streams]
        assert time.monotonic() < deadline, open_runs


async def journaled(
    sessions: aiohttp.ClientSession, relay: RelayProcess, stream: str
) -> list[dict[str, str]]:
    url = f"{relay.url}/relay/v1/streams/{stream}/events"
    async with sessions.get(url, headers={"Accept": "application/json"}) as response:
        frames: list[dict[str, str]] = json.loads(await response.read())["frames"]
        return frames
