"""Lanes and the follow link: many callers, few connections, and what happens when one breaks."""

from __future__ import annotations

import asyncio
import select
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import hiredis
import pytest
import redis
import uvloop
from redis_journal import DEADLINE_S, wait_no_longer_than
from redis_server import RedisServer
from tcp_proxy import TcpProxy

from relay.errors import JournalRefused, JournalUnavailable, StartupError
from relay.journal import redis_connection
from relay.journal.redis_connection import Address, FollowLink, Lane, as_journal_error, error_names, pack


@asynccontextmanager
async def lane(server: RedisServer) -> AsyncIterator[Lane]:
    opened = Lane(Address(server.url()), "test", DEADLINE_S)
    await opened.open()
    try:
        yield opened
    finally:
        await opened.close()


async def connection_id(opened: Lane) -> int:
    """Of the connection the lane uses now; waits while there is none."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            try:
                found: int = await opened.submit(pack("CLIENT", "ID"))
                return found
            except JournalUnavailable:
                continue


async def connections_beyond(client: redis.Redis, count: int) -> None:
    """Wait until the server took more connections than so many."""
    async with asyncio.timeout(DEADLINE_S):
        while (await asyncio.to_thread(client.info, "stats"))["total_connections_received"] <= count:
            pass


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost",
        "localhost:6379",
        "redis://localhost?no_such_option=1",
        "redis+sentinel://localhost",
        "redis+sentinel://localhost/main/x",
        "redis+sentinel:///main",
        "redis+sentinel://a,:1/main",
        "redis+sentinel://a:x/main",
        "redis+sentinel://a/main?no_such_option=1",
    ],
)
def test_an_address_that_cannot_be_meant_is_refused(url: str) -> None:
    with pytest.raises(ValueError):
        Address(url)


def test_an_address_names_its_place_without_the_password() -> None:
    assert Address("redis://user:secret@example.org:7000/3?protocol=3").name == "example.org:7000/3"
    assert Address("unix:///run/redis.sock?db=2").name == "/run/redis.sock/2"
    sentinels = "redis+sentinel://user:secret@a:1,b,[::1]:3/main/4?sentinel_password=hidden"
    assert Address(sentinels).name == "a:1,b,[::1]:3/main/4"
    assert Address(sentinels).db == 4


def test_a_redis_py_without_the_streams_we_take_over_is_refused_at_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are private to redis-py: should a version move them, relay says so instead of waiting for ever."""
    monkeypatch.setattr(Address, "connection", lambda self, role, timeout_s: object())
    with pytest.raises(StartupError, match="redis-py"):
        Address("redis://localhost")


def test_error_replies_are_told_apart() -> None:
    """The code stands first, or after a dash where Redis 6.2 reports what a script met."""
    old_style = hiredis.ReplyError("ERR Error running script (call to f_0): @user_script:1: -OOM not allowed")
    assert error_names(old_style, "OOM")
    assert isinstance(as_journal_error(old_style), JournalRefused)
    for text in ("OOM command not allowed", "MISCONF disk", "NOREPLICAS few", "WRONGTYPE other"):
        assert isinstance(as_journal_error(hiredis.ReplyError(text)), JournalRefused)
    for text in (
        "LOADING dataset",
        "READONLY replica",
        "MASTERDOWN link",
        "CLUSTERDOWN",
        "TRYAGAIN",
        "BUSY now",
    ):
        assert isinstance(as_journal_error(hiredis.ReplyError(text)), JournalUnavailable)


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_a_reply_that_came_while_this_process_stood_still_is_taken(
    own_server: RedisServer, run: Callable[[Coroutine[Any, Any, None]], None]
) -> None:
    """uvloop reads all that there is, and then calls timers before it looks whether there is more."""

    async def scenario() -> None:
        async with lane(own_server) as opened:
            before = await connection_id(opened)
            loop = asyncio.get_running_loop()
            own_server.pause()
            answer = opened.submit(pack("ECHO", "late"))
            here, there = socket.socketpair()
            with here, there:

                def stand_still() -> None:
                    loop.remove_reader(here)
                    own_server.resume()
                    # The reply comes, and the wait for it is over.
                    assert opened._wire is not None
                    connection = opened._wire.transport.get_extra_info("socket")
                    assert select.select([connection], [], [], DEADLINE_S)[0]
                    (batch,) = opened._sent
                    batch.deadline = loop.time()
                    loop.call_later(0, opened._check_deadlines)

                await asyncio.sleep(0)  # it is sent
                loop.add_reader(here, stand_still)
                there.send(b".")
                assert await answer == b"late"
            assert await connection_id(opened) == before

    run(scenario())


def test_every_caller_gets_its_own_reply(redis_server: RedisServer) -> None:
    async def scenario() -> None:
        async with lane(redis_server) as opened:
            single = [opened.submit(pack("ECHO", f"{number}")) for number in range(3000)]
            group = opened.submit(pack("MULTI") + pack("ECHO", "in") + pack("EXEC"), 3)
            assert [int(reply) for reply in await asyncio.gather(*single)] == list(range(3000))
            assert await group == [b"OK", b"QUEUED", [b"in"]]

    asyncio.run(scenario())


def test_an_error_reply_is_a_result_and_harms_nobody_else(redis_server: RedisServer) -> None:
    async def scenario() -> None:
        async with lane(redis_server) as opened:
            replies = [opened.submit(pack(command)) for command in ("PING", "NONSENSE", "PING")]
            first, second, third = await asyncio.gather(*replies)
            assert (first, third) == (b"PONG", b"PONG")
            assert isinstance(second, hiredis.ReplyError)

    asyncio.run(scenario())


def test_replies_larger_than_a_read_arrive_whole(redis_server: RedisServer) -> None:
    async def scenario() -> None:
        async with lane(redis_server) as opened:
            large = [bytes([65 + number]) * (3_000_000 + number) for number in range(4)]
            assert await asyncio.gather(*(opened.submit(pack("ECHO", data)) for data in large)) == large

    asyncio.run(scenario())


def test_a_cancelled_caller_does_not_shift_the_replies_of_others(redis_server: RedisServer) -> None:
    async def scenario() -> None:
        async with lane(redis_server) as opened:
            await opened.submit(pack("DEL", "cancelled"))
            never_sent = opened.submit(pack("INCR", "cancelled"))
            never_sent.cancel()
            after = opened.submit(pack("ECHO", "after"))
            assert await after == b"after"
            assert await opened.submit(pack("GET", "cancelled")) is None

    asyncio.run(scenario())


def test_a_stopped_server_is_unavailable_in_time_and_comes_back(own_server: RedisServer) -> None:
    """In flight or waiting, everything is answered by the deadline; afterwards the lane heals by itself."""

    async def scenario() -> None:
        async with lane(own_server) as opened:
            before = await connection_id(opened)
            own_server.pause()
            wait_no_longer_than(0.1, opened)
            started = asyncio.get_running_loop().time()
            in_flight = opened.submit(pack("PING"))
            with pytest.raises(JournalUnavailable, match="not known"):
                await asyncio.wait_for(in_flight, DEADLINE_S)
            with pytest.raises(JournalUnavailable):
                await asyncio.wait_for(opened.submit(pack("PING")), DEADLINE_S)
            assert asyncio.get_running_loop().time() - started >= 0.1
            wait_no_longer_than(DEADLINE_S, opened)
            own_server.resume()
            assert await connection_id(opened) != before

    asyncio.run(scenario())


def test_what_waits_while_the_server_is_away_is_sent_when_it_is_back(own_server: RedisServer) -> None:
    async def scenario() -> None:
        async with lane(own_server) as opened:
            own_server.kill()
            await asyncio.wait_for(opened.lost(), DEADLINE_S)
            answers = [opened.submit(pack("ECHO", f"{number}")) for number in range(100)]
            await asyncio.to_thread(own_server.restart)
            assert [int(reply) for reply in await asyncio.gather(*answers)] == list(range(100))

    asyncio.run(scenario())


def test_waiting_commands_are_bounded(own_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_connection, "WAITING_MAX", 5)

    async def scenario() -> None:
        async with lane(own_server) as opened:
            answers = [opened.submit(pack("PING")) for _ in range(5)]
            with pytest.raises(JournalUnavailable, match="wait"):
                opened.submit(pack("PING"))
            assert await asyncio.gather(*answers) == [b"PONG"] * 5

    asyncio.run(scenario())


def test_closing_fails_whatever_waits(own_server: RedisServer) -> None:
    async def scenario() -> None:
        async with lane(own_server) as opened:
            own_server.pause()
            answer = opened.submit(pack("PING"))
            await opened.close()
            with pytest.raises(JournalUnavailable):
                await answer
            with pytest.raises(JournalUnavailable):
                opened.submit(pack("PING"))
        own_server.resume()

    asyncio.run(scenario())


def test_a_demoted_primary_costs_every_link_its_connection_until_there_is_a_primary_again(
    own_server: RedisServer,
) -> None:
    """The first write meets READONLY. Whoever only reads would be told old things and never find out."""

    async def scenario() -> None:
        address = Address(own_server.url())
        writing, reading = Lane(address, "write", DEADLINE_S), Lane(address, "read", DEADLINE_S)
        await asyncio.gather(writing.open(), reading.open())
        before = await asyncio.gather(connection_id(writing), connection_id(reading))
        lost = asyncio.ensure_future(reading.lost())
        await writing.submit(pack("REPLICAOF", "127.0.0.1", "1"))
        with pytest.raises(JournalUnavailable):
            await writing.submit(pack("SET", "a", "b"))
        await asyncio.wait_for(lost, DEADLINE_S)
        waiting = [writing.submit(pack("SET", "a", "c")), reading.submit(pack("GET", "a"))]
        with own_server.client() as client:
            # a replica is refused until it is promoted, so nothing was answered yet
            for _ in range(2):
                await connections_beyond(client, client.info("stats")["total_connections_received"])
            assert not any(answer.done() for answer in waiting)
            client.replicaof("NO", "ONE")
        assert (await asyncio.wait_for(waiting[0], DEADLINE_S)) == b"OK"
        await asyncio.wait_for(waiting[1], DEADLINE_S)
        after = await asyncio.gather(connection_id(writing), connection_id(reading))
        assert not set(after) & set(before)
        await asyncio.gather(writing.close(), reading.close())

    asyncio.run(scenario())


def test_links_follow_the_first_that_finds_another_primary(
    redis_server: RedisServer, own_server: RedisServer
) -> None:
    """A name that leads elsewhere is found by whoever has to connect again: the others are told, because the
    server they still speak to is not the one that is written to any more."""

    async def scenario() -> None:
        with TcpProxy.running(own_server.port) as proxy:
            address = Address(f"redis://127.0.0.1:{proxy.port}/0")
            writing, reading = Lane(address, "write", DEADLINE_S), Lane(address, "read", DEADLINE_S)
            await asyncio.gather(writing.open(), reading.open())
            assert writing.primary == reading.primary != ""
            lost = asyncio.ensure_future(reading.lost())
            number = await connection_id(writing)
            proxy.lead_to(redis_server.port)
            with own_server.client() as client:
                client.client_kill_filter(_id=str(number))
            await asyncio.wait_for(lost, DEADLINE_S)
            for each in (writing, reading):
                port = await asyncio.wait_for(each.submit(pack("CONFIG", "GET", "port")), DEADLINE_S)
                assert port == [b"port", b"%d" % redis_server.port]
            await asyncio.gather(writing.close(), reading.close())

    asyncio.run(scenario())


class Channels:
    """Remembers what a follow link said."""

    def __init__(self) -> None:
        self.messages: asyncio.Queue[tuple[bytes, bytes]] = asyncio.Queue()
        self.subscribed: asyncio.Queue[bytes] = asyncio.Queue()

    def link(self, server: RedisServer) -> FollowLink:
        return FollowLink(
            Address(server.url()),
            DEADLINE_S,
            lambda channel, payload: self.messages.put_nowait((channel, payload)),
            self.subscribed.put_nowait,
        )


def test_a_silent_link_is_pinged_and_a_dead_one_replaced(
    own_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_connection, "FOLLOW_PING_S", 0.1)

    async def scenario() -> None:
        channels = Channels()
        link = channels.link(own_server)
        await link.open()
        wait_no_longer_than(0.5, link)
        link.subscribe(b"c")
        assert await asyncio.wait_for(channels.subscribed.get(), DEADLINE_S) == b"c"
        own_server.pause()
        async with asyncio.timeout(DEADLINE_S):
            await link.lost()
        wait_no_longer_than(DEADLINE_S, link)
        own_server.resume()
        assert await asyncio.wait_for(channels.subscribed.get(), DEADLINE_S) == b"c"
        with own_server.client() as client:
            client.publish("c", "after")
        assert await asyncio.wait_for(channels.messages.get(), DEADLINE_S) == (b"c", b"after")
        await link.close()

    asyncio.run(scenario())


def test_a_silent_link_that_answers_is_kept(own_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        channels = Channels()
        link = channels.link(own_server)
        link.subscribe(b"c")
        await link.open()
        assert link._watchdog is not None
        link._watchdog.cancel()  # the test looks in its place
        monkeypatch.setattr(redis_connection, "FOLLOW_PING_S", 0.0)
        with own_server.client() as client:
            before = client.info("commandstats")["cmdstat_ping"]["calls"]
            async with asyncio.timeout(DEADLINE_S):
                for _ in range(4):
                    while link._pinged:
                        await asyncio.to_thread(client.echo, "")
                    link._check_silence()
                    assert link._pinged
            assert client.info("commandstats")["cmdstat_ping"]["calls"] >= before + 3
        assert await asyncio.wait_for(channels.subscribed.get(), DEADLINE_S) == b"c"
        assert (link.lives, channels.subscribed.qsize()) == (1, 0)
        await link.close()

    asyncio.run(scenario())


def test_wishes_of_one_moment_end_in_the_last_one(redis_server: RedisServer) -> None:
    async def scenario() -> None:
        channels = Channels()
        link = channels.link(redis_server)
        link.subscribe(b"early")
        await link.open()
        assert await asyncio.wait_for(channels.subscribed.get(), DEADLINE_S) == b"early"
        link.subscribe(b"gone")
        link.unsubscribe(b"gone")
        link.unsubscribe(b"early")
        link.subscribe(b"early")
        assert await asyncio.wait_for(channels.subscribed.get(), DEADLINE_S) == b"early"
        with redis_server.client() as client:
            assert client.publish("gone", "x") == 0
            assert client.publish("early", "x") == 1
        assert await asyncio.wait_for(channels.messages.get(), DEADLINE_S) == (b"early", b"x")
        await link.close()

    asyncio.run(scenario())


def test_a_link_closes_though_a_cancellation_was_taken_for_something_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Opening a connection may swallow one; the link must not live on, or relay does not stop."""

    async def test() -> None:
        swallowed = asyncio.Event()

        async def connect(role: str, timeout_s: float) -> None:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                if swallowed.is_set():
                    raise
                swallowed.set()
                raise TimeoutError from None

        address = Address("redis://127.0.0.1:1/0")
        monkeypatch.setattr(address, "connect", connect)
        lane = Lane(address, "write", 0.01)
        with pytest.raises(TimeoutError):
            await lane.open()
        await asyncio.wait_for(lane.close(), 30)
        assert swallowed.is_set()

    asyncio.run(test())
