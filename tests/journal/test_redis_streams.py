"""What only the Redis backend has: keys, scripts, channels, and what it asks of a server."""

from __future__ import annotations

import asyncio
import random
import time

import pytest
from redis_journal import batch, opened, opening, read_all
from redis_server import RedisServer

from relay.cursor import ORIGIN, Cursor
from relay.frame import Event, run_ended, run_started
from relay.journal.base import Append, RunOpening
from relay.lifecycle import Ending, Reason, ending
from relay.limits import Retention

# Keys.


def test_an_entry_of_the_redis_stream_is_a_frame_under_its_own_id(redis_server: RedisServer) -> None:
    async def scenario() -> None:
        async with opened(redis_server, prefix="entries") as (journal, _):
            await journal.open_run(opening("s"))
            await journal.append(
                batch("s", 1, b"one", "zwei \u00fc".encode(), end=ending(Reason.PRODUCER_END))
            )
            frames = await read_all(journal, "s")
            with redis_server.client() as client:
                entries = client.xrange("entries:{s}:frames")
            assert entries == [
                (str(f.id).encode(), {b"r": f.run.encode(), b"e": f.event.encode(), b"d": f.data})
                for f in frames
            ]
            assert [f.seq for f in frames] == [1, 2, 3, 4]
            assert [f.event for f in frames] == ["relay", "e", "e", "relay"]

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "how",
    [
        ending(Reason.UPSTREAM_END),
        ending(Reason.UPSTREAM_ERROR, 'quotes " and \\ and \n and \x00 and \u00fc and \U0001f600 and \u2028'),
        ending(Reason.UPSTREAM_ERROR, "%d %s"),
        ending(Reason.CLIENT_CANCEL),
    ],
)
def test_control_frames_are_byte_for_byte_what_frame_py_makes(redis_server: RedisServer, how: Ending) -> None:
    async def scenario() -> None:
        async with opened(redis_server, prefix=f"bytes-{how.reason}-{len(how.error)}") as (journal, _):
            metadata = '{"b": 1.5, "a": "\u00fc"}'
            await journal.open_run(
                RunOpening("s", "r1", "writer-r1", "t", Retention(), dialect="raw", metadata=metadata)
            )
            await journal.append(
                Append("s", "r1", "writer-r1", 1, [Event("", b"x")], 12345678901, ending=how)
            )
            first, *_, last = await read_all(journal, "s")
            assert first.data == run_started("r1", "raw", {"b": 1.5, "a": "\u00fc"})
            assert last.data == run_ended("r1", how, 1, 12345678901)

    asyncio.run(scenario())


def test_every_key_expires_and_activity_renews_them_all(redis_server: RedisServer) -> None:
    async def scenario() -> None:
        async with opened(redis_server, prefix="expiry") as (journal, _):
            retention = Retention(retention_s=1000)
            for run in ("r1", "r2", "r3"):
                await journal.open_run(opening("s", run, retention))
            await journal.append(batch("s", 1, b"x" * 70_000))
            await journal.append(batch("s", 1, run="r2", end=ending(Reason.PRODUCER_END)))
            with redis_server.client() as client:
                keys = client.keys("expiry:{s}:*") + client.keys("expiry:token:*")
                assert len(keys) == 8 + 3
                assert all(1_000_000 <= client.pttl(key) <= 1_100_000 for key in keys), keys
                for key in keys:
                    client.pexpire(key, 950_000)
                client.hincrby("expiry:{s}:meta", "renewed", -150_000)
                await journal.append(batch("s", 2, b"y"))
                await journal.resign("nobody")  # behind what nobody waits for
                of_stream = client.keys("expiry:{s}:*")
                assert len(of_stream) == 8
                assert all(client.pttl(key) > 1_000_000 for key in [*of_stream, "expiry:token:token-s-r1"])

    asyncio.run(scenario())


def test_retention_without_an_age_expires_nothing(redis_server: RedisServer) -> None:
    async def scenario() -> None:
        async with opened(redis_server, prefix="forever") as (journal, _):
            await journal.open_run(opening("s", "r1", Retention(retention_s=0)))
            await journal.append(batch("s", 1, b"x" * 70_000))
            with redis_server.client() as client:
                keys = client.keys("forever:{s}:*") + client.keys("forever:token:*")
                assert len(keys) == 6 + 1
                assert {client.pttl(key) for key in keys} == {-1}

    asyncio.run(scenario())


def test_deleting_leaves_only_a_tombstone_that_expires(redis_server: RedisServer) -> None:
    async def scenario() -> None:
        async with opened(redis_server, prefix="deleted") as (journal, ear):
            journal.watch("s")
            await ear.until(lambda: ear.doubts == ["s"])
            await journal.open_run(opening("s"))
            await journal.append(batch("s", 1, b"x" * 70_000))
            future_ms = int(time.time() * 1000) + 3_600_000
            with redis_server.client() as client:
                client.hset("deleted:{s}:meta", "last_ms", future_ms)  # a clock that was an hour ahead
                await journal.delete("s")
                await ear.until(lambda: ear.deleted == ["s"])
                assert client.keys("deleted:*") == [b"deleted:{s}:tombstone"]
                assert 0 < client.ttl("deleted:{s}:tombstone") <= 86_400
            assert (await journal.open_run(opening("s"))).first == Cursor(1, future_ms + 1)

    asyncio.run(scenario())


def test_the_redis_stream_decides_where_meta_is_wrong(redis_server: RedisServer) -> None:
    """meta is a cache: behind the stream, or with the stream gone, ids still never repeat."""

    async def scenario() -> None:
        async with opened(redis_server, prefix="authority") as (journal, _):
            await journal.open_run(opening("s"))
            await journal.append(batch("s", 1, b"x"))
            with redis_server.client() as client:
                by_hand = client.xadd(
                    "authority:{s}:frames", {"r": "", "e": "", "d": "by hand"}, id="3-9999999999999"
                )
                assert by_hand == b"3-9999999999999"
                appended = await journal.append(batch("s", 2, b"y"))
                assert appended.last == Cursor(4, 9_999_999_999_999)
                client.delete("authority:{s}:frames")
                appended = await journal.append(batch("s", 3, b"z"))
                assert appended.last == Cursor(1, 10_000_000_000_000)
                assert client.pttl("authority:{s}:frames") > 0
            page = await journal.read("s", ORIGIN, 10, 1000)
            assert [frame.data for frame in page.frames] == [b"z"]
            assert page.extent.created_ms == 10_000_000_000_000
            assert (await journal.describe("s")).bytes_held == 1

    asyncio.run(scenario())


def test_a_stale_name_is_taken_off_the_listing(redis_server: RedisServer) -> None:
    async def scenario() -> None:
        async with opened(redis_server, prefix="listing") as (journal, _):
            for number in range(6):
                await journal.open_run(opening(f"s{number}"))
            with redis_server.client() as client:
                client.delete(*(f"listing:{{s{number}}}:meta" for number in (0, 1, 2, 4)))  # as if expired
                assert [info.stream for info in await journal.streams("", 2)] == ["s3", "s5"]
                assert client.zrange("listing:streams", 0, -1) == [b"s3", b"s5"]
                await journal._forget(["s3"])  # as when it came to be after it was found missing
                assert client.zrange("listing:streams", 0, -1) == [b"s3", b"s5"]

    asyncio.run(scenario())


@pytest.mark.parametrize("seed", range(4))
def test_retention_by_bytes_is_exact_against_a_list(redis_server: RedisServer, seed: int) -> None:
    """A list of sizes, trimmed by the plain rule, agrees after every step; the byte index stays true."""

    async def scenario() -> None:
        chance = random.Random(seed)
        max_frames, max_bytes = chance.choice([(0, 300_000), (400, 300_000), (50, 0), (700, 150_000)])
        prefix = f"exact-{seed}"
        async with opened(redis_server, prefix=prefix) as (journal, _):
            opened_run = await journal.open_run(opening("s", "r1", Retention(max_frames, max_bytes, 0)))
            model = [(opened_run.first.seq, len(run_started("r1", None, None)))]
            cumulative = {1: model[0][1]}
            producer_seq = 1
            for _ in range(120):
                kind = chance.random()
                if kind < 0.08:
                    before = chance.randint(1, model[-1][0] + 2) if model else 1
                    await journal.trim("s", before)
                    model = [(seq, size) for seq, size in model if seq >= before]
                else:
                    largest = chance.choice([1, 40, 40, 400, 9_000, 120_000, 500_000])
                    sizes = [chance.randint(0, largest) for _ in range(chance.choice([1, 1, 3, 60, 300]))]
                    sizes = sizes[: max(1, 1_000_000 // largest)]
                    appended = await journal.append(
                        batch("s", producer_seq, *(b"x" * size for size in sizes))
                    )
                    producer_seq = appended.next_seq
                    top = max(cumulative)
                    for seq, size in enumerate(sizes, top + 1):
                        model.append((seq, size))
                        cumulative[seq] = cumulative[seq - 1] + size
                    while len(model) > 1 and (
                        (max_frames and len(model) > max_frames)
                        or (max_bytes and sum(size for _, size in model) > max_bytes)
                    ):
                        del model[0]
                info = await journal.describe("s")
                assert info.extent.earliest_seq == (model[0][0] if model else info.extent.top.seq + 1)
                assert info.bytes_held == sum(size for _, size in model)
            frames = await read_all(journal, "s")
            assert [(frame.seq, len(frame.data)) for frame in frames] == model
            with redis_server.client() as client:
                index = client.zrange(f"{prefix}:{{s}}:index", 0, -1, withscores=True)
                assert client.xlen(f"{prefix}:{{s}}:frames") == len(model)
            assert [int(total) for _, total in index] == [cumulative[int(seq)] for seq, _ in index]
            assert len(index) <= info.bytes_held / 65_536 + 2

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("max_frames", "max_bytes", "size"),
    [(10_000, 0, 40), (10_000, 0, 4_000), (0, 7_000_000, 40), (0, 7_000_000, 4_000)],
)
def test_a_large_bound_is_never_undercut_and_exceeded_by_a_hundredth_at_most(
    redis_server: RedisServer, max_frames: int, max_bytes: int, size: int
) -> None:
    """What is held stays counted to the byte, though nothing of what is dropped is read."""

    async def scenario() -> None:
        async with opened(redis_server, prefix=f"large-{max_frames}-{size}") as (journal, _):
            await journal.open_run(opening("s", "r1", Retention(max_frames, max_bytes, 0)))
            said, bound = 1, max_frames or max_bytes
            rest = len(run_started("r1", None, None))
            while said < 1.3 * (max_frames or max_bytes / size):
                await journal.append(batch("s", said, *[b"x" * size] * 333))
                said += 333
                info = await journal.describe("s")
                held = info.extent.top.seq - info.extent.earliest_seq + 1
                first_is_held = info.extent.earliest_seq == 1
                assert info.bytes_held == (held - first_is_held) * size + first_is_held * rest
                kept = held if max_frames else info.bytes_held
                assert kept <= bound * 1.01
                if not first_is_held:
                    assert kept + (1 if max_frames else size) > bound
            assert not first_is_held
            with redis_server.client() as client:
                assert client.xlen(f"large-{max_frames}-{size}:{{s}}:frames") == held

    asyncio.run(scenario())


def test_a_page_is_the_same_whichever_way_it_is_read(redis_server: RedisServer) -> None:
    """Small frames are read by one XRANGE, large ones by a script that counts bytes."""

    async def scenario() -> None:
        chance = random.Random(7)
        async with opened(redis_server, prefix="ways") as (journal, _):
            await journal.open_run(opening("s"))
            await journal.append(batch("s", 1, *(b"x" * chance.randint(0, 50) for _ in range(600))))
            everything = await read_all(journal, "s")
            for after in (ORIGIN, everything[0].id, Cursor(300, 1), everything[-1].id, Cursor(9999, 1)):
                for max_frames, max_bytes in ((1, 10**6), (10, 10**6), (1000, 10**6), (1000, 777), (1000, 1)):
                    pages = []
                    for largest in (0, 10**9):
                        journal._remember_largest("s", largest)
                        pages.append(await journal.read("s", after, max_frames, max_bytes))
                    assert pages[0] == pages[1]
                    page, held = pages[0], everything[after.seq :]
                    assert page.frames == held[: len(page.frames)]
                    assert page.more == (len(held) > len(page.frames))
                    assert bool(page.frames) == bool(held)
                    assert page.anchor_ms == (everything[after.seq - 1].ms if 0 < after.seq <= 601 else None)

    asyncio.run(scenario())


# Following.


def test_databases_and_prefixes_do_not_hear_each_other(redis_server: RedisServer) -> None:
    async def scenario() -> None:
        async with (
            opened(redis_server, db=3, prefix="apart") as one,
            opened(redis_server, db=4, prefix="apart") as two,
            opened(redis_server, db=3, prefix="apart2") as three,
        ):
            everyone = [one, two, three]
            for journal, ear in everyone:
                journal.watch("s")
                await ear.until(lambda ear=ear: ear.doubts == ["s"])  # type: ignore[misc]
                assert await journal.watchers("s") == 1
            for number, (journal, _) in enumerate(everyone):
                await journal.open_run(opening("s", f"r{number}"))
            for number, (_, ear) in enumerate(everyone):
                await ear.until(lambda ear=ear: bool(ear.frames))  # type: ignore[misc]
                assert [frame.run for _, _, frames in ear.frames for frame in frames] == [f"r{number}"]

    asyncio.run(scenario())


def test_connections_stay_three_with_many_streams_watched_and_appended_to(own_server: RedisServer) -> None:
    async def scenario() -> None:
        async with opened(own_server) as (journal, ear):
            streams = [f"s{number}" for number in range(200)]
            for stream in streams:
                journal.watch(stream)
            await asyncio.gather(*(journal.open_run(opening(stream)) for stream in streams))
            appends = asyncio.gather(*(journal.append(batch(stream, 1, b"x", b"y")) for stream in streams))
            with own_server.client() as client:
                others = [each for each in client.client_list() if each["name"].startswith("relay-")]
                assert {each["name"] for each in others} == {"relay-write", "relay-read", "relay-follow"}
                assert len(client.client_list()) - 1 == len(others) == 3
            await appends
            await ear.until(lambda: set(ear.doubts) == set(streams))
            await ear.until(lambda: sum(len(frames) for _, _, frames in ear.frames) >= 400)

    asyncio.run(scenario())
