"""The Lua files: loaded when they are missing, each one used, and handed what they understand."""

from __future__ import annotations

import asyncio
from importlib import resources

import msgpack
from redis_journal import batch, opened, opening, read_all
from redis_server import RedisServer

from relay.cursor import ORIGIN
from relay.frame import Event
from relay.journal import redis_scripts
from relay.journal.redis_scripts import Script, packed_ending, packed_opening
from relay.lifecycle import Reason, ending
from relay.limits import Retention


def test_every_lua_file_is_part_of_a_script() -> None:
    directory = resources.files("relay.journal") / "lua"
    scripts = [each for each in vars(redis_scripts).values() if isinstance(each, Script)]
    for file in directory.iterdir():
        assert any(file.read_bytes() in script.text for script in scripts), file.name


def test_what_every_append_runs_is_as_little_as_it_can_be() -> None:
    """What begins and ends runs would cost each frame its closures."""
    life = (resources.files("relay.journal") / "lua" / "life.lua").read_bytes()
    assert life not in redis_scripts.APPEND.text


def test_openings_and_endings_are_packed_without_types_that_redis_does_not_know() -> None:
    """Its MessagePack is of a time before `bin`."""
    packed = packed_opening(opening("s", "r1", Retention(1, 2, 3), idle_timeout_s=0.25, deliver=True))
    read = msgpack.unpackb(packed, raw=True)
    assert read[b"writer"] == b"writer-r1"
    assert (read[b"max_frames"], read[b"max_bytes"], read[b"retention_ms"]) == (1, 2, 3000)
    assert (read[b"idle_ms"], read[b"deliver"], read[b"seal"]) == (250, b"pending", False)
    how = packed_ending(ending(Reason.OWNER_LOST, "\u00fc"), {"raw": Event("error", b"\xff")})
    assert b"\xc4" not in how
    assert msgpack.unpackb(how, raw=True) == [
        b"lost", b"owner_lost", "\u00fc".encode(), '"\u00fc"'.encode(), {b"raw": [b"error", b"\xff"]},
    ]  # fmt: skip


def test_the_last_words_of_a_run_are_any_bytes(redis_server: RedisServer) -> None:
    async def scenario() -> None:
        async with opened(redis_server, prefix="words") as (journal, _):
            data = bytes(range(256)) * 300
            await journal.open_run(opening("s", dialect="raw", answer="{}"))
            await journal.end_run("s", "r1", ending(Reason.OWNER_LOST), {"raw": Event("", data)})
            assert (await read_all(journal, "s"))[1].data == data

    asyncio.run(scenario())


def test_scripts_the_server_forgot_are_loaded_again(redis_server: RedisServer) -> None:
    async def scenario() -> None:
        async with opened(redis_server, prefix="scripts") as (journal, _):
            with redis_server.client() as client:
                client.script_flush()
                await journal.open_run(opening("s"))
                client.script_flush()
                appends = [journal.append(batch("s", seq, b"x")) for seq in range(1, 51)]
                assert [(await each).last.seq for each in appends] == list(range(2, 52))
                client.script_flush()
                assert (await journal.describe("s")).last_data == 51
                client.script_flush()
                assert len((await journal.read("s", ORIGIN, 100, 10**6)).frames) == 51
                client.script_flush()
                await journal.delete("s")

    asyncio.run(scenario())


def test_concurrent_appends_keep_their_order_when_scripts_are_forgotten(redis_server: RedisServer) -> None:
    async def scenario() -> None:
        async with opened(redis_server, prefix="overtaking") as (journal, _):
            await journal.open_run(opening("s"))
            with redis_server.client() as client:
                for first in range(1, 400, 40):
                    client.script_flush()
                    await asyncio.gather(*(journal.append(batch("s", first + n, b"x")) for n in range(40)))
            assert (await journal.run("s", "r1")).frames == 400

    asyncio.run(scenario())
