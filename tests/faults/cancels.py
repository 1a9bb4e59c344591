"""Runs that are stopped by several at once, and stopped when nobody hears of it: one scene a fault."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from random import Random
from typing import Any

import aiohttp
from faults.agent import CHAT
from faults.listener import Listener, all_of
from faults.pair import Followed, Pair, cancel, fresh_sessions, late, run_of, until
from faults.tally import Tally, kept_of

NATURAL_END, TWICE, SUPERSEDE = "cancel and natural end", "cancel and cancel", "cancel and supersede"
UNHEARD, DEAD, RESUMED = (
    "cancel unheard by the owner",
    "cancel of a dead owner's run",
    "cancel of a resumed run",
)

LANES = 8
"""Races run beside each other."""

STEP_S = 0.002
LEAD_MAX_S = 1.0


class Aim:
    """How long before its rival a cancel sets out: moved by the outcome of each race, so that either wins
    about half of them. It is moved farther each time the same one wins again: how long either takes is the
    machine's business, and a few races must do to find it."""

    def __init__(self, rng: Random, lead_s: float = 0.0) -> None:
        self.lead_s = lead_s
        self._rng = rng
        self._most_s = STEP_S
        self._cancelled: bool | None = None

    def note(self, cancelled: bool) -> None:
        self._most_s = 4 * self._most_s if cancelled is self._cancelled else STEP_S
        self._cancelled = cancelled
        step = self._rng.uniform(self._most_s / 2, self._most_s)
        self.lead_s = max(-LEAD_MAX_S, min(LEAD_MAX_S, self.lead_s + (-step if cancelled else step)))


Race = Callable[[aiohttp.ClientSession, Pair, Random, Tally, float], Awaitable[bool]]


async def races(pair: Pair, rng: Random, tally: Tally, race: Race, count: int) -> None:
    """Cancels that meet something else that ends their run."""

    async def lane(lane_rng: Random, races: int) -> int:
        aim, won = Aim(lane_rng), 0
        for _ in range(races):
            cancelled = await race(sessions, pair, lane_rng, tally, aim.lead_s)
            aim.note(cancelled)
            won += cancelled
        return won

    async with fresh_sessions() as sessions:
        lanes = [lane(Random(rng.random()), count // LANES + (n < count % LANES)) for n in range(LANES)]
        won = sum(await asyncio.gather(*lanes))
        await nothing_open(pair)
    assert 0 < won < count, "these were no races"


async def with_natural_end(
    sessions: aiohttp.ClientSession, pair: Pair, rng: Random, tally: Tally, lead_s: float
) -> bool:
    """One cancel, `lead_s` before upstream is told to end; whether it won."""
    dialect = rng.choice(("raw", CHAT))
    turn = await pair.followed(
        sessions,
        words=rng.randint(1, 4),
        pace_s=0.001,
        dialect=dialect,
    )
    at = rng.choice((pair.owner, pair.other))
    cancelling: asyncio.Task[dict[str, Any]]
    if lead_s > 0:
        cancelling = asyncio.create_task(cancel(sessions, at, turn.stream, turn.run))
        await asyncio.sleep(lead_s)
        turn.agent.end()
    else:
        turn.agent.end()
        await asyncio.sleep(-lead_s)
        cancelling = asyncio.create_task(cancel(sessions, at, turn.stream, turn.run))
    tally.inject(NATURAL_END)
    answer = await cancelling
    return await settled(sessions, pair, turn, tally, NATURAL_END, answer) == "client_cancel"


async def settled(
    sessions: aiohttp.ClientSession,
    pair: Pair,
    turn: Followed,
    tally: Tally,
    fault: str,
    *answers: dict[str, Any],
) -> str:
    """A run is over: everybody who was told how is told the same, and upstream is let go."""
    await all_of([turn.answer, turn.reading])
    await turn.turn.await_over()
    kept = await turn.kept(pair.other)
    after = await late(sessions, pair.owner, turn)
    reason = turn.count(tally, fault, kept, whole=[turn.reader, after])
    described = [await run_of(sessions, relay, turn.stream, turn.run) for relay in (pair.owner, pair.other)]
    assert {each["reason"] for each in (*described, *answers)} == {reason}
    assert turn.client.whole is (reason == "upstream_end" or turn.agent.dialect == CHAT)
    if reason == "upstream_end":
        assert turn.turn.finished
        assert turn.client.data == turn.turn.said
    return reason


async def nothing_open(pair: Pair) -> None:
    """No process goes on holding a run for open that is over: readers may see its end a moment before it."""

    async def all_let_go() -> bool:
        relays = (pair.owner, pair.other)
        held = [await asyncio.to_thread(relay.metric, "relay_runs_open ") for relay in relays]
        return not any(held)

    await until(all_let_go)


async def cancelled_twice(pair: Pair, rng: Random, tally: Tally, runs: int = 8) -> None:
    """Two cancels at once, one at each relay: one of them ends the run, both are told the same."""

    async def one() -> None:
        turn = await pair.followed(
            sessions,
            pace_s=rng.uniform(0, 0.01),
            dialect=rng.choice(("raw", CHAT)),
        )
        tally.inject(TWICE)
        both = (cancel(sessions, relay, turn.stream, turn.run) for relay in (pair.owner, pair.other))
        answers = await asyncio.gather(*both)
        assert await settled(sessions, pair, turn, tally, TWICE, *answers) == "client_cancel"
        assert turn.turn.closed
        again = await cancel(sessions, pair.other, turn.stream, turn.run)
        assert again == answers[0]

    async with fresh_sessions() as sessions:
        await asyncio.gather(*(one() for _ in range(runs)))
        await nothing_open(pair)


async def with_supersede(
    sessions: aiohttp.ClientSession, pair: Pair, rng: Random, tally: Tally, lead_s: float
) -> bool:
    """One cancel, and at the other relay a regenerate of the same run; whether the cancel won. That the run
    was superseded is told once, wherever that still has a place."""
    turn = await pair.followed(sessions, words=rng.randint(1, 20), pace_s=0.001)
    new = Listener(sessions, f"{pair.other.url}/{turn.stream}", "POST", Relay_Supersedes=turn.run)
    tally.inject(SUPERSEDE)
    if lead_s > 0:
        cancelling = asyncio.create_task(cancel(sessions, pair.owner, turn.stream, turn.run))
        await asyncio.sleep(lead_s)
        superseding = asyncio.create_task(new.listen())
    else:
        superseding = asyncio.create_task(new.listen())
        await asyncio.sleep(-lead_s)
        cancelling = asyncio.create_task(cancel(sessions, pair.owner, turn.stream, turn.run))
    reason = await settled(sessions, pair, turn, tally, SUPERSEDE, await cancelling)
    assert reason in ("client_cancel", "superseded")
    assert turn.turn.closed
    turn.agent.stop_speaking()
    await all_of([superseding])
    kept = await kept_of(sessions, pair.owner, turn.stream)
    run = new.answer_headers["relay-run"]
    frames = [frame for frame in kept if frame.run == run]
    assert tally.count(SUPERSEDE, frames, turn.agent.turns[1].said, cut=[new]) == "upstream_end"
    told = [frame.run for frame in kept if frame.type == "run.superseded"]
    assert told == [turn.run if reason == "superseded" else run]
    return reason == "client_cancel"


async def cancelled_unheard(pair: Pair, rng: Random, tally: Tally, runs: int = 4) -> None:
    """The owner is not woken: it finds out at its next renewal, though upstream is silent."""
    async with fresh_sessions() as sessions:
        turns = [await pair.followed(sessions, words=rng.randint(1, 5), pace_s=0.001) for _ in range(runs)]
        for turn in turns:
            await turn.reader.has(len(turn.turn.said))
        seam = pair.seams[0]
        seam.loses = lambda kind, channel, payload: kind == b"message" and b":owner:" in channel
        try:
            lost_before = seam.lost
            for turn in turns:
                tally.inject(UNHEARD)
                answer = await cancel(sessions, pair.other, turn.stream, turn.run)
                assert answer["reason"] == "client_cancel"
            for turn in turns:
                assert await settled(sessions, pair, turn, tally, UNHEARD) == "client_cancel"
                assert turn.turn.closed
            assert seam.lost >= lost_before + runs
        finally:
            seam.loses = lambda kind, channel, payload: False


async def cancelled_when_dead(pair: Pair, rng: Random, tally: Tally, runs: int = 4) -> None:
    """The owner dies and its runs are cancelled: at once, or when the reaper is at them too."""
    lease_s = pair.settings["owner_lease_s"]
    async with fresh_sessions() as sessions:
        turns = [await pair.followed(sessions, dialect=rng.choice(("raw", CHAT))) for _ in range(runs)]
        pair.owner.kill()

        async def stop(turn: Followed, after_s: float) -> dict[str, Any]:
            tally.inject(DEAD)
            await asyncio.sleep(after_s)
            return await cancel(sessions, pair.other, turn.stream, turn.run)

        delays = [0.0, *(rng.uniform(lease_s, 2 * lease_s) for _ in turns[1:])]
        stopping = asyncio.gather(*map(stop, turns, delays))
        await pair.replace_owner()
        for turn, answer in zip(turns, await stopping, strict=True):
            await all_of([turn.answer, turn.reading])
            kept = await turn.kept(pair.other)
            reason = turn.count(
                tally, DEAD, kept, whole=[turn.reader, await late(sessions, pair.owner, turn)]
            )
            assert reason == answer["reason"]
            assert reason in ("client_cancel", "owner_lost")
        assert (await run_of(sessions, pair.owner, turns[0].stream, turns[0].run))["status"] == "cancelled"


async def resumed_and_cancelled(pair: Pair, rng: Random, tally: Tally, runs: int = 4) -> None:
    """A proxied client is cut, resumes at the other relay, is cancelled from the first, and comes again."""

    async def one(dialect: str) -> None:
        turn = await pair.followed(sessions, dialect=dialect)
        await turn.client.has(rng.randint(1, 20))
        turn.answer.cancel()
        await asyncio.gather(turn.answer, return_exceptions=True)
        seen = len(turn.client.data)
        turn.client.url = f"{pair.other.url}/{turn.stream}"
        turn.answer = asyncio.create_task(turn.client.listen())
        await turn.client.has(seen + rng.randint(1, 5))
        tally.inject(RESUMED)
        answer = await cancel(sessions, pair.owner, turn.stream, turn.run)
        assert await settled(sessions, pair, turn, tally, RESUMED, answer) == "client_cancel"
        assert turn.turn.closed
        kept = [frame.data for frame in await turn.kept(pair.owner) if frame.event != "relay"]
        assert turn.client.data == kept  # and what the format itself says of the end
        assert [end["reason"] for end in turn.reader.endings()] == ["client_cancel"]
        await turn.client.listen()
        assert turn.client.status == 204
        assert turn.client.data == kept
        transcript_url = f"{pair.other.url}/relay/v1/streams/{turn.stream}/runs/{turn.run}/transcript"
        async with sessions.get(transcript_url) as got:
            transcript = await got.json()
        if dialect == "raw":
            assert transcript["text"] == "".join(turn.client.data)
        assert transcript["status"] == "cancelled"

    async with fresh_sessions() as sessions:
        await asyncio.gather(*(one(("raw", CHAT)[n % 2]) for n in range(runs)))
        await nothing_open(pair)
