"""A process dies, stands still, or is told to go: every run of its has one ending, seen everywhere."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from random import Random

import pytest
from faults import deaths
from faults.listener import all_of
from faults.pair import FAST, Pair, fresh_sessions
from faults.tally import Tally
from redis_server import RedisServer
from scripted_upstream import ScriptedUpstream


@pytest.fixture(scope="module")
def pair(redis_server: RedisServer, upstream: ScriptedUpstream) -> Iterator[Pair]:
    with Pair.running(redis_server, upstream, **FAST, drain_grace_s=6) as pair:
        yield pair


def test_p3_runs_of_an_owner_killed_at_any_frame_end_owner_lost_once(
    pair: Pair, seed: int, tally: Tally
) -> None:
    """A reader elsewhere sees each frame that was accepted once, then the ending; so does who comes later."""
    rng = Random(seed)
    for _ in range(3):
        asyncio.run(deaths.owner_killed(pair, rng, tally))


@pytest.mark.parametrize("told", [True, False], ids=["told", "not told"])
def test_p4_a_zombie_is_fenced_lets_upstream_go_and_serves_new_runs(
    pair: Pair, seed: int, tally: Tally, told: bool
) -> None:
    asyncio.run(deaths.owner_paused(pair, Random(seed), tally, told=told))


def test_a_drain_ends_runs_once_and_its_readers_go_on_elsewhere(pair: Pair, seed: int, tally: Tally) -> None:
    asyncio.run(deaths.owner_drained(pair, Random(seed), tally))


def test_p3_runs_of_an_owner_killed_in_its_drain_end_once(pair: Pair, seed: int, tally: Tally) -> None:
    asyncio.run(deaths.killed_while_draining(pair, Random(seed), tally))


@pytest.mark.parametrize("outage", deaths.OUTAGES)
def test_an_outage_of_three_leases_ends_no_run_of_the_living(
    lasting_redis: RedisServer, upstream: ScriptedUpstream, seed: int, tally: Tally, outage: str
) -> None:
    # A process may wait so long before it sees that a connection is dead; nobody is held for dead before.
    with Pair.running(lasting_redis, upstream, **(FAST | {"journal_timeout_s": 5})) as pair:
        asyncio.run(deaths.redis_away(pair, Random(seed), tally, outage))


def test_p3_with_default_settings_a_dead_owner_is_found_and_how_soon_is_printed(
    redis_server: RedisServer, upstream: ScriptedUpstream
) -> None:
    async def scene(pair: Pair) -> None:
        async with fresh_sessions() as sessions:
            turn = await pair.followed(sessions)
            await turn.client.has(10)
            began = time.monotonic()
            pair.owner.kill()
            await all_of([turn.reading])
            print(f"owner_lost seen by a reader elsewhere {time.monotonic() - began:.1f} s after kill -9")
            assert [end["reason"] for end in turn.reader.endings()] == ["owner_lost"]

    with Pair.running(redis_server, upstream) as pair:
        asyncio.run(scene(pair))


def test_one_look_that_finds_no_lease_ends_nothing(
    redis_server: RedisServer, upstream: ScriptedUpstream
) -> None:
    """Who stood still until just after its lease lapsed was seen without it once, and lives."""

    async def scene(pair: Pair) -> None:
        async with fresh_sessions() as sessions:
            turn = await pair.followed(sessions)
            os.kill(pair.owner.pid, signal.SIGSTOP)
            try:
                await asyncio.to_thread(deaths.await_looks, pair, turn, 1)
            finally:
                os.kill(pair.owner.pid, signal.SIGCONT)
            await deaths.dead_found(pair.server, pair.prefix)
            turn.agent.stop_speaking()
            await all_of([turn.answer, turn.reading])
            assert turn.client.data == turn.reader.data == turn.turn.said
            assert [end["reason"] for end in turn.reader.endings()] == ["upstream_end"]

    # So long that the owner can renew between two looks, whatever else the machine does.
    # The one who looks may judge before that: what it sees then it would hold against the owner.
    patient = FAST | {"owner_lease_s": 2.4, "journal_timeout_s": 1.5}
    with Pair.running(redis_server, upstream, **patient) as pair:
        asyncio.run(scene(pair))
