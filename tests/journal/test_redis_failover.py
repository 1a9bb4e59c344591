"""A Redis that fails: dies, hangs, is full, or is replaced by another that knows less."""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import Iterator
from dataclasses import replace

import pytest
from redis_journal import (
    DEADLINE_S,
    batch,
    links,
    opened,
    opening,
    persistently,
    read_all,
    state,
    wait_no_longer_than,
)
from redis_server import RedisSentinel, RedisServer
from tcp_proxy import TcpProxy

from relay.cursor import ORIGIN, Cursor
from relay.errors import (
    Diverged,
    JournalError,
    JournalRefused,
    JournalUnavailable,
    Rewound,
    RunEnded,
    StartupError,
    UnknownStream,
)
from relay.frame import Event, run_started
from relay.journal.base import Held, RunInfo
from relay.lifecycle import Reason, ending


def test_a_killed_server_costs_nothing_it_accepted_and_doubles_nothing(own_server: RedisServer) -> None:
    async def scenario() -> None:
        async with opened(own_server) as (journal, ear):
            journal.watch("s")
            journal.watch("t")
            await ear.until(lambda: sorted(ear.doubts) == ["s", "t"])
            await journal.open_run(opening("s"))
            sent = 0

            async def write() -> None:
                nonlocal sent
                for seq in range(1, 400):
                    await persistently(lambda seq=seq: journal.append(batch("s", seq, f"{seq}".encode())))  # type: ignore[misc]
                    sent = seq
                await persistently(lambda: journal.append(batch("s", 400, end=ending(Reason.PRODUCER_END))))

            writing = asyncio.create_task(write())
            for goal in (100, 200):
                await ear.until(lambda goal=goal: sent >= goal or len(ear.frames) >= goal)  # type: ignore[misc]
                ear.doubts.clear()
                await asyncio.to_thread(own_server.kill)
                await asyncio.to_thread(own_server.restart)
                await ear.until(lambda: set(ear.doubts) == {"s", "t"})
            await asyncio.wait_for(writing, DEADLINE_S)
            frames = await persistently(lambda: read_all(journal, "s"))
            assert [frame.seq for frame in frames] == list(range(1, 402))
            assert [frame.data for frame in frames[1:-1]] == [f"{seq}".encode() for seq in range(1, 400)]

    asyncio.run(scenario())


def test_another_life_of_the_server_is_told_from_another_connection(own_server: RedisServer) -> None:
    """Only the first may have lost something."""

    async def scenario() -> None:
        async with opened(own_server) as (journal, ear):
            journal.watch("s")
            await ear.until(lambda: ear.doubts == ["s"])
            with own_server.client() as client:
                for kind in ("normal", "pubsub"):
                    client.client_kill_filter(_type=kind, skipme=True)
            await ear.until(lambda: len(ear.doubts) >= 2)
            assert await persistently(lambda: journal.tops(["s"])) == {}
            assert journal.replaced_at == -math.inf
            before = asyncio.get_running_loop().time()
            await asyncio.to_thread(own_server.kill)
            await asyncio.to_thread(own_server.restart)
            assert await persistently(lambda: journal.tops(["s"])) == {}
            assert journal.replaced_at > before

    asyncio.run(scenario())


def test_a_stopped_server_is_unavailable_and_the_retry_is_journaled_once(own_server: RedisServer) -> None:
    async def scenario() -> None:
        async with opened(own_server) as (journal, _):
            await journal.open_run(opening("s"))
            own_server.pause()
            wait_no_longer_than(0.1, *links(journal))
            for operation in (
                journal.append(batch("s", 1, b"x")),
                journal.read("s", ORIGIN, 10, 1000),
                journal.tops(["s", "t"]),
            ):
                with pytest.raises(JournalUnavailable):
                    await asyncio.wait_for(operation, DEADLINE_S)
            wait_no_longer_than(DEADLINE_S, *links(journal))
            own_server.resume()
            await persistently(lambda: journal.append(batch("s", 1, b"x")))
            await persistently(lambda: journal.append(batch("s", 2, b"y")))
            frames = await persistently(lambda: read_all(journal, "s"))
            assert [frame.data for frame in frames[1:]] == [b"x", b"y"]

    asyncio.run(scenario())


def test_a_full_server_refuses_and_nothing_is_half_written(own_server: RedisServer) -> None:
    async def scenario() -> None:
        async with opened(own_server) as (journal, _):
            await journal.open_run(opening("s"))
            await journal.append(batch("s", 1, b"x"))
            with own_server.client() as client:
                before = state(client, "relay:{*")
                client.config_set("maxmemory", 1)
                for refused in (
                    journal.append(batch("s", 2, b"y", b"z")),
                    journal.append(batch("s", 2, end=ending(Reason.PRODUCER_END))),
                    journal.open_run(opening("s", "r2")),
                    journal.open_run(opening("t")),
                    journal.claim("k", "d", "o", 1, 1),
                ):
                    with pytest.raises(JournalRefused):
                        await refused
                assert state(client, "relay:{*") == before
                assert len(await read_all(journal, "s")) == 2
                client.config_set("maxmemory", 0)
            assert (await journal.append(batch("s", 2, b"y", b"z"))).last.seq == 4

    asyncio.run(scenario())


# A primary that is replaced.


@pytest.fixture
def pair() -> Iterator[tuple[RedisServer, RedisServer]]:
    """A primary, and a replica of it that is in sync."""
    primary, replica = RedisServer.start(), RedisServer.start()
    replica.replicate(primary)
    yield primary, replica
    replica.stop()
    primary.stop()


@pytest.mark.parametrize("way", ["dies", "hangs"])
def test_p2_a_failover_by_sentinels_costs_nothing_that_was_replicated(
    pair: tuple[RedisServer, RedisServer], way: str
) -> None:
    """Writers go on at the new primary, followers hear of it, nothing is twice, none is missing; whether the
    connections break, or only nothing answers any more. Sentinels that are dead or hang are passed over."""
    primary, replica = pair
    sentinel = RedisSentinel.watching(primary, replicas=1)
    mute = socket.socket()
    mute.bind(("127.0.0.1", 0))

    async def scenario() -> None:
        hanging = f"127.0.0.1:{mute.getsockname()[1]}"
        url = f"redis+sentinel://127.0.0.1:1,{hanging},127.0.0.1:{sentinel.port}/main/2"
        async with opened(url) as (journal, ear):
            journal.watch("s")
            await ear.until(lambda: ear.doubts == ["s"])
            run = await journal.open_run(opening("s"))
            last = (await journal.append(batch("s", 1, b"before", acknowledged=run.last))).last
            with primary.client() as client:
                assert await asyncio.to_thread(client.wait, 1, 30_000) == 1
                ear.doubts.clear()
                mute.listen()  # until now it was dead, too: one that hangs is waited for
                wait_no_longer_than(2.0, *links(journal))
                if way == "dies":
                    primary.kill()
                else:
                    primary.pause()
                sentinel.suspect()
            for seq in range(2, 100):
                said = batch("s", seq, f"{seq}".encode(), acknowledged=last)
                last = (await persistently(lambda said=said: journal.append(said))).last  # type: ignore[misc]
            await ear.until(lambda: "s" in ear.doubts)
            told = len(ear.frames)
            await persistently(
                lambda: journal.append(batch("s", 100, end=ending(Reason.PRODUCER_END), acknowledged=last))
            )
            await ear.until(lambda: len(ear.frames) > told)
            frames = await persistently(lambda: read_all(journal, "s"))
            assert [frame.seq for frame in frames] == list(range(1, 102))
            assert [frame.data for frame in frames[1:-1]] == [
                b"before",
                *(f"{seq}".encode() for seq in range(2, 100)),
            ]
            with replica.client(2) as client:
                assert client.role()[0] == b"master"
                assert client.xlen("relay:{s}:frames") == 101

    try:
        asyncio.run(scenario())
    finally:
        sentinel.stop()
        mute.close()


def test_a_service_that_the_sentinels_do_not_know_is_refused_at_start(
    pair: tuple[RedisServer, RedisServer],
) -> None:
    sentinel = RedisSentinel.watching(pair[0], replicas=1)

    async def scenario() -> None:
        with pytest.raises(StartupError, match="other"):
            async with opened(f"redis+sentinel://127.0.0.1:{sentinel.port}/other"):
                pass

    try:
        asyncio.run(scenario())
    finally:
        sentinel.stop()


def test_frames_that_no_replica_had_are_put_back_under_their_ids(
    pair: tuple[RedisServer, RedisServer],
) -> None:
    """Two runs wrote in turn. The name leads to a replica that knows only the first frames, and not the
    second run. Each puts back what it holds, waiting for the other; then the journal is what it was."""
    primary, replica = pair

    async def scenario() -> None:
        with TcpProxy.running(primary.port) as proxy:
            url = f"redis://127.0.0.1:{proxy.port}/0"
            async with opened(url) as (journal, ear):
                journal.watch("s")
                await ear.until(lambda: ear.doubts == ["s"])
                first = opening("s", "r1", owner="me")
                second = opening("s", "r2", owner="me", metadata='{"a":1}', dialect="raw")
                await journal.open_run(first)
                await journal.append(batch("s", 1, b"replicated"))
                with primary.client() as client:
                    assert await asyncio.to_thread(client.wait, 1, 30_000) == 1
                replica.promote()  # and hears no more of the other, which still takes writes

                opened_second = await journal.open_run(second)
                a = (await journal.append(batch("s", 2, b"a1", b"a2", text_bytes=4))).last
                b = (await journal.append(batch("s", 1, b"b1", run="r2", text_bytes=2))).last
                c = (await journal.append(batch("s", 4, b"a3", text_bytes=2))).last
                before = await read_all(journal, "s")
                runs_before = await journal.runs("s", "", 10)

                ear.doubts.clear()
                proxy.lead_to(replica.port)
                proxy.cut_all()
                await ear.until(lambda: "s" in ear.doubts)

                with pytest.raises(Rewound) as of_first:
                    await persistently(lambda: journal.append(batch("s", 5, b"a4", acknowledged=c)))
                assert of_first.value.extra["last_seq"] == 2
                with pytest.raises(Rewound) as of_second:
                    await journal.append(batch("s", 2, b"b2", run="r2", acknowledged=b))
                assert of_second.value.extra["last_seq"] == 0

                started = Event("relay", run_started("r2", "raw", {"a": 1}))
                lost_of_first = [
                    Held(Cursor(a.seq - 1, a.ms), 2, [Event("e", b"a1"), Event("e", b"a2")], 4),
                    Held(c, 4, [Event("e", b"a3")], 2),
                ]
                lost_of_second = [
                    Held(opened_second.first, 0, [started], 0),
                    Held(b, 1, [Event("e", b"b1")], 2),
                ]
                pending = {"r1": (first, lost_of_first), "r2": (second, lost_of_second)}
                waited: list[JournalError] = []
                for run in ("r1", "r2") * 3:
                    of_run, lost = pending[run]
                    try:
                        for held in lost:
                            await journal.restore(of_run, held)
                    except Rewound as error:
                        waited.append(error)
                assert [type(error) for error in waited] == [Rewound] * 3
                assert [error.extra["last_seq"] for error in waited] == [2, 3, 5]
                assert await read_all(journal, "s") == before
                after = await journal.runs("s", "", 10)
                assert [without_hearing(info) for info in after] == [
                    without_hearing(info) for info in runs_before
                ]
                assert set(await journal.owned("me", 10)) == {("s", "r1"), ("s", "r2")}
                assert await journal.resolve_token("token-s-r2") == ("s", "r2")
                assert (await journal.append(batch("s", 5, b"a4", acknowledged=c))).last.seq == c.seq + 1
                told: list[bytes] = []

                def has_told() -> bool:
                    told[:] = [frame.data for _, _, frames in ear.frames for frame in frames]
                    return told[-1] == b"a4"

                await ear.until(has_told)
                assert told[-5:] == [b"a1", b"a2", b"b1", b"a3", b"a4"]

    asyncio.run(scenario())


def without_hearing(info: RunInfo) -> RunInfo:
    return replace(info, heard_ms=0)


def test_what_others_wrote_in_the_place_of_lost_frames_stays(pair: tuple[RedisServer, RedisServer]) -> None:
    primary, replica = pair

    async def scenario() -> None:
        with TcpProxy.running(primary.port) as proxy:
            async with opened(f"redis://127.0.0.1:{proxy.port}/0") as (journal, _):
                first = opening("s", "r1", owner="me")
                await journal.open_run(first)
                with primary.client() as client:
                    assert await asyncio.to_thread(client.wait, 1, 30_000) == 1
                replica.promote()
                lost = (await journal.append(batch("s", 1, b"lost"))).last
                lost_opening = await journal.open_run(opening("s", "r2"))
                async with opened(replica, owner="another") as (other, _):
                    await other.open_run(opening("s", "r3"))
                proxy.lead_to(replica.port)
                proxy.cut_all()
                frames = await persistently(lambda: read_all(journal, "s"))
                for of_run, held in (
                    (first, Held(lost, 1, [Event("e", b"lost")], 0)),
                    (opening("s", "r2"), Held(lost_opening.first, 0, [Event("relay", b"{}")], 0)),
                    (opening("s", "r2"), Held(Cursor(9, lost.ms), 1, [Event("e", b"lost")], 0)),
                ):
                    with pytest.raises(Diverged):
                        await persistently(lambda of_run=of_run, held=held: journal.restore(of_run, held))  # type: ignore[misc]
                assert await read_all(journal, "s") == frames

    asyncio.run(scenario())


def test_frames_that_do_not_follow_what_the_run_has_are_not_put_in(redis_server: RedisServer) -> None:
    """Their place in the stream is free, and yet they are not the run's next ones."""

    async def scenario() -> None:
        async with opened(redis_server, prefix="next") as (journal, _):
            run = opening("s", "r1", owner="me")
            await journal.open_run(run)
            last = (await journal.append(batch("s", 1, b"x"))).last
            held = Held(Cursor(last.seq + 1, last.ms), 2, [Event("e", b"y")], 0)
            for producer_seq in (1, 3):
                with pytest.raises(Diverged):
                    await journal.restore(run, held._replace(producer_seq=producer_seq))
            await journal.restore(run, held)
            assert [frame.data for frame in (await read_all(journal, "s"))[1:]] == [b"x", b"y"]
            assert (await journal.run("s", "r1")).frames == 2

    asyncio.run(scenario())


def test_a_frame_from_before_the_acknowledged_one_of_the_same_seq_is_not_that_one(
    redis_server: RedisServer,
) -> None:
    async def scenario() -> None:
        async with opened(redis_server, prefix="older") as (journal, _):
            last = (await journal.open_run(opening("s"))).last
            with pytest.raises(Rewound) as caught:
                await journal.append(batch("s", 1, b"x", acknowledged=last._replace(ms=last.ms + 1)))
            assert caught.value.extra["last_seq"] == last.seq
            await journal.append(batch("s", 1, b"x", acknowledged=last))

    asyncio.run(scenario())


def test_frames_that_were_accepted_and_trimmed_since_are_not_missing(redis_server: RedisServer) -> None:
    async def scenario() -> None:
        async with opened(redis_server, prefix="trimmed") as (journal, _):
            run = opening("s", "r1", owner="me")
            await journal.open_run(run)
            first = (await journal.append(batch("s", 1, b"x"))).last
            await journal.append(batch("s", 2, b"y"))
            await journal.trim("s", 3)
            await journal.restore(run, Held(first, 1, [Event("e", b"x")], 0))
            assert [frame.data for frame in await read_all(journal, "s")] == [b"y"]
            assert (await journal.run("s", "r1")).frames == 2

    asyncio.run(scenario())


def test_a_stream_that_was_deleted_is_not_put_back(pair: tuple[RedisServer, RedisServer]) -> None:
    async def scenario() -> None:
        async with opened(pair[0]) as (journal, _):
            run = opening("s", "r1", owner="me")
            first = (await journal.open_run(run)).first
            await journal.delete("s")
            with pytest.raises(RunEnded) as caught:
                await journal.restore(run, Held(first, 0, [Event("relay", b"{}")], 0))
            assert (caught.value.extra["run_status"], caught.value.extra["reason"]) == (
                "cancelled",
                "stream_deleted",
            )
            with pytest.raises(UnknownStream):
                await journal.describe("s")

    asyncio.run(scenario())
