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
from faults.listener import DEADLINE_S, all_of
from faults.pair import FAST, Followed, Pair, fresh_sessions
from faults.tally import Tally
from redis_server import RedisServer
from scripted_upstream import ScriptedUpstream


@pytest.fixture(scope="module")
def pair(redis_server: RedisServer, upstream: ScriptedUpstream) -> Iterator[Pair]:
    with Pair.running(redis_server, upstream, **FAST, drain_grace_s=2) as pair:
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
    with Pair.running(lasting_redis, upstream, **FAST) as pair:
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
                await asyncio.to_thread(await_one_look, pair, turn)
            finally:
                os.kill(pair.owner.pid, signal.SIGCONT)
            await deaths.dead_found(pair.server, pair.prefix)
            turn.agent.stop_speaking()
            await all_of([turn.answer, turn.reading])
            assert turn.client.data == turn.reader.data == turn.turn.said
            assert [end["reason"] for end in turn.reader.endings()] == ["upstream_end"]

    # So long that the owner can renew between two looks, whatever else the machine does.
    with Pair.running(redis_server, upstream, **(FAST | {"owner_lease_s": 2.4})) as pair:
        asyncio.run(scene(pair))


def await_one_look(pair: Pair, turn: Followed) -> None:
    """Wait until the lease of a run's owner has lapsed, and then until somebody looks for it."""
    deadline = time.monotonic() + DEADLINE_S
    with pair.server.client() as client:
        owner = client.hget(f"{pair.prefix}:{{{turn.stream}}}:run:{turn.run}", "owner")
        assert isinstance(owner, bytes)
        lease = f"{pair.prefix}:owner:{owner.decode()}"
        while client.pttl(lease) != -2:
            assert time.monotonic() < deadline, "the lease does not lapse"
        with client.monitor() as monitor:
            while monitor.next_command()["command"] != f"EXISTS {lease}":
                assert time.monotonic() < deadline, "nobody looks for the lease"
