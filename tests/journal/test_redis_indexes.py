"""The indexes beside the streams: written before the run they lead to, left only when its ending is filed."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest
import redis
from redis_journal import DEADLINE_S, batch, opened, opening
from redis_server import RedisServer
from tcp_proxy import TcpProxy

from relay.errors import JournalUnavailable, StreamBusy, UnknownRun
from relay.journal import redis_streams
from relay.journal.base import EndedRun, StreamChange
from relay.journal.redis_streams import RedisJournal
from relay.lifecycle import Reason, Status, ending
from relay.limits import Retention

CANCELLED = ending(Reason.CLIENT_CANCEL)


async def until(client: redis.Redis, holds: Callable[[redis.Redis], object]) -> None:
    """Wait until something is true of a server."""
    async with asyncio.timeout(DEADLINE_S):
        while not await asyncio.to_thread(holds, client):
            pass


class Interference:
    """Changes what goes to a server from when it is armed: `at` a text, `then` says what remains of it."""

    def __init__(self, at: bytes, then: Callable[[bytes], bytes]) -> None:
        self.at = at
        self.then = then
        self.armed = False
        self.happened = threading.Event()

    def __call__(self, data: bytes) -> bytes:
        if not self.armed or self.at not in data:
            return data
        self.happened.set()
        return self.then(data)


def test_an_ordinary_append_costs_the_server_these_commands_and_no_other() -> None:
    """Nothing that a run can be asked for besides makes its frames dearer."""
    server = RedisServer.start()  # of its own: it counts for all who use it, relays of other tests among them

    async def scenario() -> None:
        async with opened(server, prefix="cost") as (journal, _):
            await journal.open_run(opening("s", owner="me", deliver=True, dialect="raw"))
            await journal.append(batch("s", 1, b"x"))
            first = (await journal.append(batch("s", 2, b"x"))).last
            with server.client() as client:
                client.config_resetstat()
                await journal.append(batch("s", 3, b"x", dialect="raw", acknowledged=first))
                stats = client.info("commandstats")
            calls = {name.removeprefix("cmdstat_"): of["calls"] for name, of in stats.items()}
            calls.pop("config|resetstat", None)
            calls.pop("info", None)
            expected = {"evalsha": 1, "time": 1, "hmget": 2, "xadd": 1, "hset": 2, "publish": 1}
            assert calls == expected

    try:
        asyncio.run(scenario())
    finally:
        server.stop()


def test_what_leads_to_a_run_is_there_before_the_run(redis_server: RedisServer) -> None:
    """The connection breaks between the two."""

    async def scenario() -> None:
        cut = Interference(b"EVALSHA", lambda data: data[: data.index(b"EVALSHA")])
        with (
            TcpProxy.running(redis_server.port, to_server=cut) as proxy,
            redis_server.client() as client,
        ):
            async with opened(f"redis://127.0.0.1:{proxy.port}/0", prefix="before") as (journal, _):
                cut.armed = True
                asking = asyncio.create_task(journal.open_run(opening("s", owner="me")))
                assert await asyncio.to_thread(cut.happened.wait, DEADLINE_S)
                await until(client, lambda client: client.sismember("before:owners", "me"))  # written last
                cut.armed = False
                proxy.cut_all()
                with pytest.raises(JournalUnavailable):
                    await asking
        async with opened(redis_server, prefix="before") as (journal, _):
            assert await journal.states([("s", "r1")]) == [None]
            assert await journal.owned("me", 10) == [("s", "r1")]
            assert await journal.lapsed_owners() == ["me"]
            await journal.file_ending("s", "r1")  # which is what a reaper does with what leads nowhere
            assert await journal.owned("me", 10) == []
            assert await journal.lapsed_owners() == []

    asyncio.run(scenario())


@pytest.mark.parametrize("owner", ["me", ""])
def test_an_ending_that_nobody_came_to_file_is_found_and_filed(redis_server: RedisServer, owner: str) -> None:
    """The process dies between the ending and what follows it."""
    prefix = f"crash-{owner}"

    async def scenario() -> None:
        with TcpProxy.running(redis_server.port) as proxy:
            dies = Interference(f"{prefix}:ended".encode(), lambda data: b"")
            proxy.to_server = dies
            async with opened(f"redis://127.0.0.1:{proxy.port}/0", prefix=prefix) as (journal, _):
                await journal.open_run(opening("s", owner=owner, deliver=True, idle_timeout_s=0.001))
                dies.armed = True
                await journal.append(batch("s", 1, b"x", end=ending(Reason.PRODUCER_END)))
                assert await asyncio.to_thread(dies.happened.wait, DEADLINE_S)
        async with opened(redis_server, prefix=prefix) as (journal, _):
            assert await journal.ended_runs(0, "", 10) == []
            assert await journal.claim_deliveries(10, 1) == []
            if owner:
                assert await journal.owned("me", 10) == [("s", "r1")]
                ended = await journal.end_run("s", "r1", ending(Reason.OWNER_LOST), {}, owner="me")
                assert (ended.by_this, ended.status) == (False, Status.COMPLETED)
            else:
                with redis_server.client() as client:
                    await until(client, lambda client: client.zcount(f"{prefix}:due", 0, clock_ms(client)))
                assert await journal.due_runs(10) == [("s", "r1")]
                assert await journal.end_due("s", "r1", 0, {}) is None
            with redis_server.client() as client:
                await until(client, lambda client: not client.exists(f"{prefix}:owned:me", f"{prefix}:due"))
            (listed,) = await journal.ended_runs(0, "", 10)
            assert listed.info == await journal.run("s", "r1")
            assert [each[:2] for each in await journal.claim_deliveries(10, 1)] == [("s", "r1")]

    asyncio.run(scenario())


def clock_ms(client: redis.Redis) -> int:
    seconds, micros = client.time()
    return seconds * 1000 + micros // 1000


def test_a_server_too_full_to_list_an_ending_keeps_the_run_where_it_is_found() -> None:
    """Redis refuses to write into the listing, and would let the run be taken off the other index."""
    server = RedisServer.start()

    async def scenario() -> None:
        with TcpProxy.running(server.port) as proxy, server.client() as client:

            def fill(data: bytes) -> bytes:
                client.config_set("maxmemory", 1)
                return data

            full = Interference(b"relay:ended", fill)
            proxy.to_server = full
            async with opened(f"redis://127.0.0.1:{proxy.port}/0") as (journal, _):
                await journal.open_run(opening("s", owner="me"))
                full.armed = True
                assert (await journal.end_run("s", "r1", CANCELLED, {})).by_this
                await journal.tops(["s"])
                assert (await journal.describe("s")).open_runs == []
                await journal.resolve_token("t")
                await journal.resign("nobody")  # by the lane that files
                assert full.happened.is_set()
                assert await journal.owned("me", 10) == [("s", "r1")]
                client.config_set("maxmemory", 0)
                full.armed = False
                await journal.end_run("s", "r1", CANCELLED, {})
                await until(client, lambda client: not client.exists("relay:owned:me"))
                assert [ended.info.run for ended in await journal.ended_runs(0, "", 10)] == ["r1"]

    try:
        asyncio.run(scenario())
    finally:
        server.stop()


def test_a_full_server_still_deletes() -> None:
    server = RedisServer.start()

    async def scenario() -> None:
        async with opened(server) as (journal, ear):
            journal.watch("s")
            await ear.until(lambda: ear.doubts == ["s"])
            await journal.put_stream("empty", Retention(), StreamChange())
            await journal.open_run(opening("s", owner="me"))
            with server.client() as client:
                client.config_set("maxmemory", 1)
                for stream in ("s", "empty"):
                    await journal.delete(stream)
                tombstones = [b"relay:{empty}:tombstone", b"relay:{s}:tombstone"]
                assert sorted(client.keys("relay:{*")) == tombstones
            await ear.until(lambda: bool(ear.deleted and ear.over))
            assert ear.over == [("s", "r1")]
            assert [frame.data for _, _, frames in ear.frames for frame in frames][1:] == [
                b'{"type":"run.ended","run":"r1","status":"cancelled","reason":"stream_deleted",'
                b'"frames":0,"text_bytes":0}'
            ]

    try:
        asyncio.run(scenario())
    finally:
        server.stop()


def test_an_owner_that_is_not_told_finds_out_by_asking(redis_server: RedisServer) -> None:
    async def scenario() -> None:
        told = threading.Event()

        def deaf(data: bytes) -> bytes:
            if b"message" not in data or b":owner:" not in data:
                return data
            told.set()
            return b""

        with TcpProxy.running(redis_server.port, to_client=deaf) as proxy:
            async with opened(f"redis://127.0.0.1:{proxy.port}/0", prefix="deaf") as (journal, ear):
                await journal.open_run(opening("s", owner="me"))
                with redis_server.client() as client:  # its wish takes the longer way
                    await until(client, lambda client: client.pubsub_numsub("deaf:0:owner:me")[0][1])
                async with opened(redis_server, prefix="deaf", owner="another") as (other, _):
                    await other.end_run("s", "r1", CANCELLED, {})
                (state,) = await journal.states([("s", "r1")])
                assert state is not None
                assert (state.status, state.reason) == (Status.CANCELLED, "client_cancel")
                assert await asyncio.to_thread(told.wait, DEADLINE_S)
                assert ear.over == []

    asyncio.run(scenario())


def test_only_the_owner_of_a_run_is_told(redis_server: RedisServer) -> None:
    """However it came to be over: ended, superseded, taken over, deleted. Other databases do not hear."""

    async def scenario() -> None:
        async with (
            opened(redis_server, prefix="told") as (journal, ear),
            opened(redis_server, prefix="told", owner="other") as (_, other_ear),
            opened(redis_server, prefix="told", db=1) as (_, apart_ear),
        ):
            for run in ("r1", "r2", "r3", "r4"):
                await journal.open_run(opening("s", run, owner="me"))
            await journal.open_run(opening("s", "of-nobody"))
            await journal.append(batch("s", 1, b"x", run="r4", end=ending(Reason.PRODUCER_END)))
            await journal.open_run(opening("s", "r5", owner="other", supersedes=["r1", "of-nobody"]))
            await journal.end_run("s", "r2", CANCELLED, {})
            await journal.end_run("s", "r2", CANCELLED, {})
            await journal.take_over("s", "r3", "new", 60)
            await journal.take_over("s", "r3", "newer", 60)
            await journal.delete("s")
            await other_ear.until(lambda: bool(other_ear.over))
            await ear.until(lambda: len(ear.over) >= 3)
            assert ear.over == [("s", "r1"), ("s", "r2"), ("s", "r3")]
            assert other_ear.over == [("s", "r5")]
            assert apart_ear.over == []

    asyncio.run(scenario())


def test_a_run_found_where_it_no_longer_belongs_is_taken_off(redis_server: RedisServer) -> None:
    """The former owner of a run that was taken over, and that lists it still, may be dead."""

    async def scenario() -> None:
        async with opened(redis_server, prefix="former") as (journal, _):
            await journal.open_run(opening("s", owner="me"))
            await journal.take_over("s", "r1", "new", 60)
            with redis_server.client() as client:
                await until(client, lambda client: not client.exists("former:owned:me"))
                for listed in ("s r1", "s no-run", "no-stream r1"):
                    client.sadd("former:owned:me", listed)
                ended = await journal.end_run("s", "r1", ending(Reason.OWNER_LOST), {}, owner="me")
                assert (ended.by_this, ended.status, ended.owner) == (False, Status.OPEN, "")
                for run in ("no-run", "r2"):
                    with pytest.raises(UnknownRun):
                        await journal.end_run("s", run, ending(Reason.OWNER_LOST), {}, owner="me")
                await until(client, lambda client: client.scard("former:owned:me") == 1)
                assert await journal.owned("me", 10) == [("no-stream", "r1")]

    asyncio.run(scenario())


def test_an_owner_that_comes_to_own_a_run_just_then_is_not_forgotten(redis_server: RedisServer) -> None:
    """A reaper saw that it owns nothing, and takes it off the owners: the run comes in between."""

    async def scenario() -> None:
        with TcpProxy.running(redis_server.port) as proxy, redis_server.client() as client:

            def own(data: bytes) -> bytes:
                client.sadd("justthen:owned:me", "s r1")
                client.sadd("justthen:owners", "me")
                return data

            meanwhile = Interference(b"SCARD", own)
            proxy.to_server = meanwhile
            async with opened(f"redis://127.0.0.1:{proxy.port}/0", prefix="justthen") as (journal, _):
                client.sadd("justthen:owners", "me")
                meanwhile.armed = True
                assert await journal.owned("me", 10) == []
                assert meanwhile.happened.is_set()
                assert await journal.lapsed_owners() == ["me"]

    asyncio.run(scenario())


def test_indexes_that_were_lost_are_written_again(redis_server: RedisServer) -> None:
    async def scenario() -> None:
        async with opened(redis_server, prefix="lost") as (journal, _):
            for number in range(5):
                stream = f"s{number}"
                await journal.open_run(opening(stream, "owned", owner="me"))
                await journal.open_run(opening(stream, "pushed", idle_timeout_s=0.001))
                await journal.open_run(opening(stream, "ended", owner="me", deliver=True))
                await journal.append(batch(stream, 1, run="ended", end=ending(Reason.PRODUCER_END)))
            with redis_server.client() as client:
                await until(client, lambda client: client.zcard("lost:deliveries") == 5)
                await until(client, lambda client: client.scard("lost:owned:me") == 5)
                for name in ("due", "owners", "owned:me", "ended", "deliveries"):
                    client.delete(f"lost:{name}")
            assert await journal.due_runs(100) == []
            calls = 0
            after = ""
            while after or not calls:
                after = await journal.reindex(after, 2)
                calls += 1
            assert calls == 3
            streams = [f"s{number}" for number in range(5)]
            assert sorted(await journal.owned("me", 100)) == [(stream, "owned") for stream in streams]
            assert await journal.lapsed_owners() == ["me"]
            assert sorted(await journal.due_runs(100)) == [(stream, "pushed") for stream in streams]
            claimed = await journal.claim_deliveries(100, 1)
            assert sorted(each.stream for each in claimed) == streams

    asyncio.run(scenario())


def test_what_was_delivered_is_not_delivered_again_when_its_ending_is_filed_again(
    redis_server: RedisServer,
) -> None:
    """The run's hash knows; the indexes may be behind. One that is gone is passed over."""

    async def scenario() -> None:
        async with opened(redis_server, prefix="settled") as (journal, _):
            for stream in ("s", "deleted"):
                await journal.open_run(opening(stream, deliver=True))
                await journal.end_run(stream, "r1", CANCELLED, {})
                await journal.file_ending(stream, "r1")
            await journal.delete("deleted")
            assert [each[:2] for each in await journal.claim_deliveries(10, 600)] == [("s", "r1")]
            await journal.file_ending("s", "r1")  # whoever has it has it still
            assert await journal.claim_deliveries(10, 600) == []
            await journal.settle_delivery("s", "r1")
            await journal.file_ending("s", "r1")
            await journal.reindex("", 100)
            assert await journal.claim_deliveries(10, 600) == []
            with redis_server.client() as client:
                await until(client, lambda client: not client.exists("settled:deliveries"))

    asyncio.run(scenario())


@pytest.mark.parametrize("how", ["take_over", "hear_of", "a duplicate", "nothing"])
def test_what_a_run_was_heard_of_by_counts_against_its_silence(redis_server: RedisServer, how: str) -> None:
    """A run silent for an hour, by what its hash says."""
    prefix = f"heard-{how}"

    async def scenario() -> None:
        async with opened(redis_server, prefix=prefix) as (journal, _):
            await journal.open_run(opening("s", idle_timeout_s=600))
            await journal.append(batch("s", 1, b"x"))
            with redis_server.client() as client:
                for of, field in (("run:r1", "last_ms"), ("run:r1", "heard_ms")):
                    client.hincrby(f"{prefix}:{{s}}:{of}", field, -3_600_000)
            match how:
                case "take_over":
                    await journal.take_over("s", "r1", "new", 1)
                case "hear_of":
                    await journal.hear_of("s", "r1", "writer-r1")
                case "a duplicate":
                    assert (await journal.append(batch("s", 1, b"x"))).duplicates == 1
            ended = await journal.end_due("s", "r1", 0, {})
            assert (ended is None) == (how != "nothing")
            assert (await journal.run("s", "r1")).idle_timeout_s == 600

    asyncio.run(scenario())


def test_a_run_that_is_never_due_is_looked_at_all_the_same(redis_server: RedisServer) -> None:
    """Otherwise nobody would find that its ending was not filed. Silence or age never end it."""

    async def scenario() -> None:
        async with opened(redis_server, prefix="never") as (journal, _):
            await journal.open_run(opening("s"))
            with redis_server.client() as client:
                later_ms = client.zscore("never:due", "s r1") - clock_ms(client)
                assert 0 < later_ms <= redis_streams.LOOKED_AT_MS
                client.zadd("never:due", {"s r1": 0})
                assert await journal.due_runs(1) == [("s", "r1")]
                assert await journal.end_due("s", "r1", 0, {}) is None
                assert client.zscore("never:due", "s r1") > clock_ms(client)

    asyncio.run(scenario())


def test_an_opening_that_was_refused_makes_no_run_due_later(redis_server: RedisServer) -> None:
    async def scenario() -> None:
        async with opened(redis_server, prefix="sooner") as (journal, _):
            await journal.open_run(opening("s", idle_timeout_s=60))
            with redis_server.client() as client:
                before = client.zscore("sooner:due", "s r1")
                await journal.open_run(opening("s", idle_timeout_s=600))
                assert client.zscore("sooner:due", "s r1") == before
            with pytest.raises(StreamBusy) as caught:
                await journal.open_run(opening("s", "r2", if_busy="reject"))
            assert caught.value.extra["open_runs"] == ["r1"]

    asyncio.run(scenario())


def test_the_listing_of_endings_is_bounded(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_streams, "ENDED_MAX", 3)

    async def scenario() -> None:
        async with opened(redis_server, prefix="bounded") as (journal, _):
            runs = [f"r{number}" for number in range(6)]
            for run in runs:
                await journal.open_run(opening("s", run))
                await journal.append(batch("s", 1, run=run, end=ending(Reason.PRODUCER_END)))
            assert [ended.info.run for ended in await listed(journal)] == runs[3:]

    asyncio.run(scenario())


def test_a_repeated_ending_is_filed_again(redis_server: RedisServer) -> None:
    """Its first try may have been cut off right behind the ending. That goes for superseded runs, too."""

    async def scenario() -> None:
        async with opened(redis_server, prefix="refiled") as (journal, _):
            await journal.open_run(opening("s", "r1", owner="me"))
            await journal.open_run(opening("s", "r2", owner="me"))
            superseding = opening("s", "r3", owner="me", supersedes=["r1"])
            await journal.open_run(superseding)
            final = batch("s", 1, b"x", run="r2", end=ending(Reason.PRODUCER_END))
            await journal.append(final)
            await journal.end_run("s", "r3", CANCELLED, {})
            with redis_server.client() as client:
                await until(client, lambda client: client.zcard("refiled:ended") == 3)
                await until(client, lambda client: not client.exists("refiled:owned:me"))
                client.delete("refiled:ended")
                await journal.append(final)
                await journal.end_run("s", "r3", CANCELLED, {})
                await journal.open_run(superseding)
                await until(client, lambda client: client.zcard("refiled:ended") == 3)
                await until(client, lambda client: not client.exists("refiled:owned:me"))

    asyncio.run(scenario())


def test_streams_that_expired_are_taken_off_the_listing_though_nobody_lists_them(
    redis_server: RedisServer,
) -> None:
    async def scenario() -> None:
        async with opened(redis_server, prefix="expired") as (journal, _):
            for stream in ("a", "b", "c"):
                await journal.open_run(opening(stream))
            with redis_server.client() as client:
                for key in client.keys("expired:{b}:*"):
                    client.pexpire(key, 1)
                await until(client, lambda client: not client.exists("expired:{b}:meta"))
                assert client.zrange("expired:streams", 0, -1) == [b"a", b"b", b"c"]
                assert await journal.reindex("", 10) == ""
                assert client.zrange("expired:streams", 0, -1) == [b"a", b"c"]

    asyncio.run(scenario())


def test_a_changed_age_is_that_of_every_key(redis_server: RedisServer) -> None:
    async def scenario() -> None:
        async with opened(redis_server, prefix="aged") as (journal, _):
            await journal.open_run(opening("s", deliver=True))
            await journal.append(batch("s", 1, b"x" * 70_000, end=ending(Reason.PRODUCER_END)))
            await journal.open_run(opening("s", "r2"))
            with redis_server.client() as client:
                keys = [*client.keys("aged:{s}:*"), b"aged:token:token-s-r1", b"aged:token:token-s-r2"]
                assert len(keys) == 8 + 2
                for seconds in (1000, 100_000):
                    await journal.put_stream("s", Retention(), StreamChange(retention_s=seconds))
                    await journal.describe("s")
                    await journal.resign("nobody")  # behind what nobody waits for
                    assert all(seconds < client.ttl(key) <= seconds * 1.1 for key in keys)
                await journal.put_stream("s", Retention(), StreamChange(retention_s=0))
                await journal.resign("nobody")
                assert {client.ttl(key) for key in keys} == {-1}
                assert not await journal.put_stream("s", Retention(), StreamChange(retention_s=50))
                await journal.put_stream("empty", Retention(retention_s=50), StreamChange())
                assert 50 < client.ttl("aged:{empty}:meta") <= 55
                client.expire("aged:{empty}:meta", 40)
                await journal.open_run(opening("empty"))
                assert all(40 <= client.ttl(key) <= 55 for key in client.keys("aged:{empty}:*"))

    asyncio.run(scenario())


async def listed(journal: RedisJournal) -> list[EndedRun]:
    """The endings, once what was sent before has arrived."""
    await journal.resign("nobody")
    return list(await journal.ended_runs(0, "", 100))
