"""Processes that die, stand still, or are told to go, while runs are open: one scene a fault."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import time
from collections.abc import Callable
from random import Random
from typing import Any

import aiohttp
from faults.agent import CHAT
from faults.listener import DEADLINE_S, Listener, all_of
from faults.pair import Followed, Pair, followed, fresh_sessions, late, reader_of, until
from faults.pusher import Pusher
from faults.tally import Tally, kept_of, shown_to
from own_journal import own_journal
from redis_server import RedisServer
from relay_process import RelayProcess

from relay.journal.base import RunOpening
from relay.limits import Retention

KILLED, PAUSED, DRAINED = "owner killed", "owner paused beyond its lease", "owner drained"
DRAIN_KILLED = "owner killed while it drained"

DIALECTS = ("raw", CHAT)


async def begin(sessions: aiohttp.ClientSession, pair: Pair, runs: int, **agent: Any) -> list[Followed]:
    """Turns of both kinds: those whose format can say an error, and those that can only break off."""
    turns = [pair.followed(sessions, dialect=DIALECTS[n % 2], **agent) for n in range(runs)]
    return list(await asyncio.gather(*turns))


async def ended_elsewhere(turns: list[Followed]) -> None:
    """Wait until the readers at the other relay have seen the end of every run."""
    await all_of([turn.reading for turn in turns])


async def owner_killed(pair: Pair, rng: Random, tally: Tally, runs: int = 4) -> None:
    """kill -9 at a random frame: readers see what was accepted, once, then that the owner was lost."""
    async with fresh_sessions() as sessions:
        turns = await begin(sessions, pair, runs)
        await turns[0].client.has(rng.randint(1, 40))
        await asyncio.sleep(rng.uniform(0, 0.01))  # between two frames, too
        pair.owner.kill()
        tally.inject(KILLED)
        replaced = asyncio.create_task(pair.replace_owner())
        for turn in turns:
            await turn.turn.await_over()
            assert turn.turn.closed
        await ended_elsewhere(turns)
        await all_of([turn.answer for turn in turns])
        await replaced
        for turn in turns:
            kept = await turn.kept(pair.other)
            at_both = [await late(sessions, relay, turn) for relay in (pair.owner, pair.other)]
            assert turn.count(tally, KILLED, kept, whole=[turn.reader, *at_both]) == "owner_lost"
            assert_told_alike(turn, at_both)
            assert turn.client.whole is False


def assert_told_alike(turn: Followed, others: list[Listener]) -> None:
    """Whoever reads the run, and whenever, is shown the same bytes under the same ids, and one ending."""
    for listener in (turn.reader, *others):
        assert shown_to(listener) == shown_to(turn.reader)
        assert listener.seqs() == list(range(1, len(listener.seqs()) + 1))
        assert len(listener.endings()) == 1
        assert not {"gap", "reset"}.intersection(listener.types())


async def owner_paused(
    pair: Pair, rng: Random, tally: Tally, runs: int = 4, *, told: bool | None = None
) -> None:
    """A process stands still beyond its lease and goes on: nothing it still says is taken any more. Unless it
    is `told` that its runs are over, it finds out by what it says."""
    seam = pair.seams[0]
    told = rng.random() < 0.5 if told is None else told
    async with fresh_sessions() as sessions:
        turns = await begin(sessions, pair, runs)
        await turns[0].client.has(rng.randint(1, 40))
        seam.loses = lambda kind, channel, payload: not told and kind == b"message" and b":owner:" in channel
        lost_before = seam.lost
        os.kill(pair.owner.pid, signal.SIGSTOP)
        tally.inject(PAUSED)
        try:
            said_before = [len(turn.turn.said) for turn in turns]
            await ended_elsewhere(turns)
            kept = [await turn.kept(pair.other) for turn in turns]
            assert not any(turn.turn.over.is_set() for turn in turns)  # it holds its connections
        finally:
            os.kill(pair.owner.pid, signal.SIGCONT)
        for turn, before in zip(turns, said_before, strict=True):
            await turn.turn.await_over()
            assert turn.turn.closed
            assert len(turn.turn.said) > before  # it came back to frames that it had not read
        assert told or seam.lost == lost_before + runs
        seam.loses = lambda kind, channel, payload: False
        await all_of([turn.answer for turn in turns])
        for turn, journaled in zip(turns, kept, strict=True):
            # The client was shown the journal to its end: in its format where that can say so.
            assert turn.client.whole is (turn.agent.dialect == CHAT)
            after = await turn.kept(pair.owner)
            assert after == journaled
            at_both = [await late(sessions, relay, turn) for relay in (pair.owner, pair.other)]
            assert turn.count(tally, PAUSED, after, whole=[turn.reader, *at_both]) == "owner_lost"
            assert_told_alike(turn, at_both)
            shown = [frame.data for frame in after if frame.event != "relay"]
            assert turn.client.data == shown
        await goes_on(sessions, pair, pair.owner)


async def goes_on(sessions: aiohttp.ClientSession, pair: Pair, relay: RelayProcess) -> None:
    """A relay serves a new run from its start to its end."""
    turn = await followed(sessions, pair.upstream, relay, pair.other, words=20, pace_s=0.001)
    turn.agent.end()
    await all_of([turn.answer, turn.reading])
    assert turn.client.whole
    assert turn.client.data == turn.reader.data == turn.turn.said
    assert [end["reason"] for end in turn.reader.endings()] == ["upstream_end"]


async def dead_found(server: RedisServer, prefix: str) -> None:
    """Have somebody found dead: whatever a reaper held against the living, it has acted on too."""
    stream = f"dead-{secrets.token_hex(4)}"
    async with own_journal(server.url(), prefix) as journal:
        opening = RunOpening(stream, "r", "w", f"token-{stream}", Retention(), owner=f"nobody-{stream}")
        await journal.open_run(opening)

        async def is_over() -> bool:
            return bool((await journal.run(stream, "r")).ended_ms)

        await until(is_over)


def lease_of(pair: Pair, turn: Followed) -> str:
    """The key in Redis that is there while a run's owner lives."""
    with pair.server.client() as client:
        owner = client.hget(f"{pair.prefix}:{{{turn.stream}}}:run:{turn.run}", "owner")
    assert isinstance(owner, bytes)
    return f"{pair.prefix}:owner:{owner.decode()}"


def await_looks(pair: Pair, turn: Followed, count: int) -> None:
    """Wait until somebody has looked for the lease of a run's owner so often in vain."""
    deadline = time.monotonic() + DEADLINE_S
    lease = lease_of(pair, turn)
    # Watched from before it lapses: a look that is missed here would be one more than was asked for.
    with pair.server.client() as client, client.monitor() as monitor:
        while count:
            assert time.monotonic() < deadline, "nobody looks for the lease in vain"
            looked = monitor.next_command()["command"] == f"EXISTS {lease}"
            count -= looked and client.pttl(lease) == -2


Outage = tuple[Callable[[RedisServer], None], Callable[[RedisServer], None]]

OUTAGES: dict[str, Outage] = {
    "Redis paused for three leases": (RedisServer.pause, RedisServer.resume),
    "Redis killed for three leases": (RedisServer.kill, RedisServer.restart),
}


async def redis_away(pair: Pair, rng: Random, tally: Tally, outage: str, runs: int = 4) -> None:
    """Nobody can renew a lease, or be heard of, for longer than it takes to be held for dead; and when Redis
    is back, one of the two finds its way later, so that the other looks for its lease in vain."""
    take_away, bring_back = OUTAGES[outage]
    lease_s = pair.settings["owner_lease_s"]
    async with fresh_sessions() as sessions:
        turns = await begin(sessions, pair, runs // 2)
        turns += [
            await followed(sessions, pair.upstream, pair.other, pair.owner, dialect=DIALECTS[n % 2])
            for n in range(runs - runs // 2)
        ]
        pushers = [
            Pusher(sessions, (pair.owner.url, pair.other.url), beats, idle_timeout_s=2.8 * lease_s)
            for beats in (0, 1)
        ]
        for pusher in pushers:
            await pusher.open()
        pushing = [asyncio.create_task(pusher.push()) for pusher in pushers]
        await asyncio.gather(*(pusher.has(3) for pusher in pushers))
        await turns[0].client.has(len(turns[0].client.data) + rng.randint(1, 20))
        await asyncio.to_thread(take_away, pair.server)
        tally.inject(outage)
        pair.seams[1].refusing = True
        pair.seams[1].cut_all()
        try:
            await asyncio.sleep(3 * lease_s)  # the outage itself
        finally:
            await asyncio.to_thread(bring_back, pair.server)
        await asyncio.to_thread(await_looks, pair, turns[-1], 3)
        pair.seams[1].refusing = False
        await dead_found(pair.server, pair.prefix)
        for pusher in pushers:
            await pusher.has(pusher.accepted + 3)
            pusher.finish()
        for turn in turns:
            await turn.client.has(len(turn.client.data) + 3)
            turn.agent.stop_speaking()
        await ended_elsewhere(turns)
        await all_of([turn.answer for turn in turns])
        await asyncio.gather(*pushing)
        for turn in turns:
            kept = await turn.kept(pair.other)
            reason = turn.count(tally, outage, kept, whole=[turn.reader], cut=[turn.client])
            assert reason == "upstream_end"
            assert turn.client.whole
            assert turn.client.data == turn.reader.data == turn.turn.said
        for pusher in pushers:
            kept = await kept_of(sessions, pair.other, pusher.stream)
            assert tally.count(outage, kept, pusher.said) == "producer_end"


# Told to go


async def owner_drained(pair: Pair, rng: Random, tally: Tally, runs: int = 4) -> None:
    """SIGTERM: some runs end within the grace, the others after it; readers go on at the other relay."""
    async with fresh_sessions() as sessions:
        turns = await begin(sessions, pair, runs)
        sent_away = [reader_of(sessions, pair.owner, turn.stream, turn.run) for turn in turns]
        leaving = [asyncio.create_task(reader.listen()) for reader in sent_away]
        for reader in sent_away:
            await reader.has(1)
        await turns[0].client.has(rng.randint(1, 20))
        drained, lease = pair.owner, lease_of(pair, turns[0])
        drained.process.send_signal(signal.SIGTERM)
        tally.inject(DRAINED)
        await all_of(leaving)
        for reader, turn in zip(sent_away, turns, strict=True):
            assert reader.controls[-1]["type"] == "bye"
            assert reader.controls[-1]["reason"] == "drain"
            assert not turn.turn.over.is_set()  # the run has the grace
            reader.url = reader_of(sessions, pair.other, turn.stream, turn.run).url
        rest = [asyncio.create_task(reader.listen()) for reader in sent_away]
        quick, endless = turns[: runs // 2], turns[runs // 2 :]
        for turn in quick:
            await turn.client.has(len(turn.client.data) + rng.randint(1, 10))
            turn.agent.stop_speaking()
        await ended_elsewhere(turns)
        await all_of([turn.answer for turn in turns])
        await all_of(rest)
        assert await asyncio.to_thread(drained.process.wait, DEADLINE_S) == 0
        with pair.server.client() as client:
            assert not client.exists(lease)  # given up: what it might have left need not wait for it to lapse
        for turn in endless:
            await turn.turn.await_over()
            assert turn.turn.closed
        await pair.replace_owner()
        await dead_found(pair.server, pair.prefix)
        for turn, reader in zip(turns, sent_away, strict=True):
            kept = await turn.kept(pair.other)
            reason = turn.count(tally, DRAINED, kept, whole=[turn.reader, reader])
            assert reason == ("upstream_end" if turn in quick else "shutdown")
            assert turn.client.whole is (turn in quick or turn.agent.dialect == CHAT)
            assert reader.connections == 2
            if turn in quick:
                assert reader.data == turn.turn.said


async def killed_while_draining(pair: Pair, rng: Random, tally: Tally, runs: int = 4) -> None:
    """SIGTERM, and kill -9 within the grace: the runs it still had are found like those of any dead."""
    async with fresh_sessions() as sessions:
        turns = await begin(sessions, pair, runs)
        drained = pair.owner
        drained.process.send_signal(signal.SIGTERM)

        async def is_draining() -> bool:
            # Runs go on, so what shows is that it takes no new ones.
            try:
                async with sessions.get(f"{drained.url}/relay/readyz") as answer:
                    return answer.status == 503
            except aiohttp.ClientConnectionError:
                return True

        await until(is_draining)
        await turns[0].client.has(len(turns[0].client.data) + rng.randint(1, 10))
        drained.kill()
        tally.inject(DRAIN_KILLED)
        replaced = asyncio.create_task(pair.replace_owner())
        await ended_elsewhere(turns)
        await replaced
        for turn in turns:
            assert turn.count(tally, DRAIN_KILLED, await turn.kept(pair.other)) == "owner_lost"
