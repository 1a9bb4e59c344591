"""The reaper: whom it takes for dead, when, and whom never.

Its judgement is tested in a world whose clock the test moves; what it does to runs, on real journals.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from deaf_follower import DeafFollower
from own_journal import own_journal
from redis_server import RedisServer

from relay.cursor import ORIGIN
from relay.errors import JournalUnavailable, UnknownRun
from relay.frame import Event
from relay.journal.base import Append, Ended, Journal, Renewal, RunInfo, RunOpening
from relay.journal.sqlite import SqliteJournal
from relay.lifecycle import Ending, Reason, Status, ending
from relay.limits import Retention
from relay.reaper import BATCH, Reaper
from relay.settings import Settings

SETTINGS = Settings()
LEASE_S = SETTINGS.owner_lease_s
TICK_S = LEASE_S / 3
DEADLINE_S = 60


class Run:
    """An open run of the world's journal."""

    def __init__(self, owner: str, idle_s: float, heard_ms: int) -> None:
        self.owner = owner
        self.idle_ms = int(idle_s * 1000)
        self.heard_ms = heard_ms
        self.status = Status.OPEN
        self.reason = ""


class World:
    """One clock, one journal, any number of processes. `step_s` is how finely time passes."""

    step_s = 0.25

    def __init__(self) -> None:
        self.s = 1000.0
        self.clock_offset_s = 1_763_726_400.0
        self.leases: dict[str, float] = {}
        self.runs: dict[tuple[str, str], Run] = {}
        self.indexed: list[tuple[str, str]] = []
        self.filed: list[tuple[str, str]] = []
        self.failing: set[str] = set()
        """Operations that fail; `all` is every one."""
        self.pauses: dict[str, float] = {}
        """How long the world goes on while an operation is answered for the next time."""
        self.slow: dict[str, float] = {}
        """The same, every time."""
        self.broken: set[tuple[str, str]] = set()
        """Runs that relay cannot end, by a mistake of its own."""
        self.reindexed: list[str] = []
        self.ended: list[tuple[str, str, str]] = []
        self.processes: list[Process] = []

    def now_ms(self) -> int:
        return round((self.s + self.clock_offset_s) * 1000)

    def process(self, name: str, phase_s: float = 0.0) -> Process:
        process = Process(self, name, phase_s)
        self.processes.append(process)
        return process

    def open(self, stream: str, owner: str = "", idle_s: float = 0.0) -> Run:
        run = self.runs[stream, "r"] = Run(owner, idle_s, self.now_ms())
        self.indexed.append((stream, "r"))
        return run

    async def live(self, seconds: float, until: Callable[[], bool] = lambda: False) -> float:
        """Let time pass, with every living process ticking when it has to; how long it took."""
        began = self.s
        while self.s < began + seconds and not until():
            for process in self.processes:
                if process.next_s <= self.s and not process.stopped:
                    process.next_s = max(self.s, process.next_s + TICK_S)
                    await process.reaper.tick()
            self.s += self.step_s
        return self.s - began

    # The journal

    async def _answer(self, operation: str) -> None:
        self.s += self.pauses.pop(operation, 0.0) + self.slow.get(operation, 0.0)
        if self.failing & {operation, "all"}:
            raise JournalUnavailable("The test wants it so.")

    async def renew(self, owner: str, lease_s: float) -> Renewal:
        await self._answer("renew")
        unbroken = self.leases.get(owner, 0.0) > self.s
        self.leases[owner] = self.s + lease_s
        return Renewal(unbroken, self.now_ms())

    async def resign(self, owner: str) -> None:
        await self._answer("resign")
        self.leases.pop(owner, None)

    async def lapsed_owners(self) -> Sequence[str]:
        await self._answer("lapsed_owners")
        owners = dict.fromkeys(self.runs[key].owner for key in self.indexed if key in self.runs)
        return [owner for owner in owners if owner and self.leases.get(owner, 0.0) <= self.s]

    async def owned(self, owner: str, limit: int) -> Sequence[tuple[str, str]]:
        await self._answer("owned")
        return [key for key in self.indexed if key not in self.runs or self.runs[key].owner == owner][:limit]

    async def end_run(
        self, stream: str, run: str, end: Ending, error_events: Mapping[str, Event], *, owner: str
    ) -> Ended:
        await self._answer("end_run")
        await asyncio.sleep(0)
        if (stream, run) in self.broken:
            raise ZeroDivisionError
        if (stream, run) not in self.runs:
            raise UnknownRun
        return self._end(stream, run, end.reason, self.runs[stream, run].owner == owner)

    def _end(self, stream: str, name: str, reason: Reason, matches: bool = True) -> Ended:
        run = self.runs[stream, name]
        by_this = run.status is Status.OPEN and matches
        if by_this:
            run.status, run.reason = ending(reason).status, reason
            self.indexed.remove((stream, name))
        return Ended(by_this, run.status, run.reason, run.owner)

    async def due_runs(self, limit: int) -> Sequence[tuple[str, str]]:
        await self._answer("due_runs")
        return [
            key
            for key in self.indexed
            if key in self.runs
            and self.runs[key].idle_ms
            and self.runs[key].heard_ms + self.runs[key].idle_ms <= self.now_ms()
        ][:limit]

    async def end_due(self, stream: str, run: str, since_ms: int, error_events: Any) -> Ended | None:
        await self._answer("end_due")
        assert error_events[Reason.IDLE_TIMEOUT]["openai-chat"]
        assert error_events[Reason.MAX_RUN]["openai-chat"]
        held = self.runs[stream, run]
        if max(held.heard_ms, since_ms) + held.idle_ms > self.now_ms():
            return None
        return self._end(stream, run, Reason.IDLE_TIMEOUT)

    async def file_ending(self, stream: str, run: str) -> None:
        if (stream, run) in self.runs and self.runs[stream, run].status is Status.OPEN:
            return
        self.filed.append((stream, run))
        if (stream, run) in self.indexed:
            self.indexed.remove((stream, run))

    async def reindex(self, after: str, limit: int) -> str:
        await self._answer("reindex")
        self.reindexed.append(after)
        return "" if after == "b" else chr(ord(after or "`") + 1)


class Process:
    """A relay: its reaper, and whether it stands still. `kill` and `stop` look the same from outside."""

    def __init__(self, world: World, name: str, phase_s: float) -> None:
        self.name = name
        self.next_s = world.s + phase_s
        self.stopped = False

        def on_ended(stream: str, run: str, ended: Ended) -> None:
            assert ended.by_this
            world.ended.append((name, stream, ended.reason))

        journal: Any = world
        self.reaper = Reaper(journal, SETTINGS, name, on_ended, lambda: world.s)

    def kill(self) -> None:
        self.stopped = True


@pytest.fixture
def world() -> World:
    return World()


def play(scene: Any) -> None:
    asyncio.run(asyncio.wait_for(scene, DEADLINE_S))


# Whom it takes for dead


@pytest.mark.parametrize("phase_s", [0.0, 0.5, 1.0, 1.75])
def test_p3_a_dead_process_loses_its_runs_within_ten_seconds_and_not_within_its_lease(
    world: World, phase_s: float, caplog: pytest.LogCaptureFixture
) -> None:
    async def scene() -> None:
        dead = world.process("dead")
        world.process("living", phase_s)
        await world.live(60)
        run = world.open("s", "dead")
        dead.kill()
        took_s = await world.live(60, lambda: run.status is not Status.OPEN)
        assert LEASE_S - TICK_S <= took_s <= 10
        assert world.ended == [("living", "s", "owner_lost")]

    caplog.set_level(logging.WARNING, "relay.reaper")
    play(scene())
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "stream=s run=r owner=dead silent_s=" in record.getMessage()


def test_one_look_that_finds_no_lease_is_not_enough(world: World) -> None:
    async def scene() -> None:
        slow = world.process("slow")
        living = world.process("living")
        run = world.open("s", "slow")
        await world.live(60)
        slow.stopped = True
        # Back just after it was missed for the first time.
        await world.live(60, lambda: bool(living.reaper._suspects))
        slow.stopped = False
        await world.live(60)
        assert run.status is Status.OPEN

    play(scene())


def test_looks_that_follow_each_other_at_once_are_one(world: World) -> None:
    async def scene() -> None:
        living = world.process("living")
        run = world.open("s", "missing")
        await world.live(60, lambda: bool(living.reaper._suspects))
        for _ in range(5):
            await living.reaper.tick()
        assert run.status is Status.OPEN

    play(scene())


def test_a_process_that_was_missed_and_came_back_is_not_suspected_any_more(world: World) -> None:
    async def scene() -> None:
        slow = world.process("slow")
        living = world.process("living")
        run = world.open("s", "slow")
        await world.live(60)
        for _ in range(5):
            slow.stopped = True
            await world.live(60, lambda: bool(living.reaper._suspects))
            slow.stopped = False
            await world.live(2 * TICK_S)
        assert run.status is Status.OPEN

    play(scene())


def test_a_process_started_again_ends_what_its_former_self_left(world: World) -> None:
    async def scene() -> None:
        former = world.process("former")
        run = world.open("s", "former")
        await world.live(60)
        former.kill()
        world.process("new")
        await world.live(15)
        assert run.status is Status.LOST

    play(scene())


def test_of_two_reapers_exactly_one_ends_a_run_and_says_so(world: World) -> None:
    async def scene() -> None:
        reapers = [world.process(name).reaper for name in ("one", "two")]
        for number in range(10):
            world.open(f"s{number}", "dead")
        for _ in range(10):
            await asyncio.gather(*(reaper.tick() for reaper in reapers))
            world.s += TICK_S
        assert sorted(stream for _, stream, _ in world.ended) == [f"s{number}" for number in range(10)]

    play(scene())


def test_a_process_that_resigned_is_not_waited_for(world: World) -> None:
    async def scene() -> None:
        leaving = world.process("leaving")
        world.process("living")
        run = world.open("s", "leaving")
        await world.live(60)
        leaving.kill()
        await leaving.reaper.resign()
        assert await world.live(60, lambda: run.status is not Status.OPEN) < LEASE_S

    play(scene())


def test_resigning_from_a_journal_that_is_away_is_no_error(world: World) -> None:
    world.failing = {"all"}
    play(world.process("leaving").reaper.resign())


# Whom never


@pytest.mark.parametrize("outage_s", [LEASE_S / 2, LEASE_S, 3 * LEASE_S, 20 * LEASE_S])
@pytest.mark.parametrize("phase_s", [0.0, 0.25, 0.5, 1.0, 1.5, 1.75])
def test_an_outage_of_the_journal_ends_no_healthy_run(world: World, outage_s: float, phase_s: float) -> None:
    async def scene() -> None:
        world.process("healthy", phase_s)
        world.process("living")
        owned = world.open("owned", "healthy")
        pushed = world.open("pushed", idle_s=10)
        await world.live(5)
        world.failing = {"all"}
        await world.live(outage_s)
        world.failing = set()
        # The healthy one's connection was dead without its knowing: it waited for an answer until now.
        world.processes[0].next_s = max(world.processes[0].next_s, world.s + SETTINGS.journal_timeout_s)
        await world.live(SETTINGS.journal_timeout_s + TICK_S)
        pushed.heard_ms = world.now_ms()
        await world.live(9)
        assert (owned.status, pushed.status) == (Status.OPEN, Status.OPEN)

    play(scene())


def test_the_dead_are_found_after_an_outage(world: World) -> None:
    async def scene() -> None:
        dead = world.process("dead")
        world.process("living")
        owned = world.open("owned", "dead")
        pushed = world.open("pushed", idle_s=10)
        await world.live(5)
        dead.kill()
        world.failing = {"all"}
        await world.live(3 * LEASE_S)
        world.failing = set()
        await world.live(3 * LEASE_S)
        assert (owned.reason, pushed.reason) == ("owner_lost", "idle_timeout")

    play(scene())


@pytest.mark.parametrize(
    ("operation", "look"),
    [("renew", 2), ("lapsed_owners", 2), ("owned", 2), ("lapsed_owners", 1), ("due_runs", 1), ("reindex", 1)],
)
def test_a_failure_of_the_journal_at_either_look_clears_all_suspicion(
    world: World, operation: str, look: int
) -> None:
    async def scene() -> None:
        living = world.process("living")
        run = world.open("s", "missing")
        looks_begin = -(-SETTINGS.journal_timeout_s // TICK_S)
        for tick in range(int(looks_begin) + 5):
            world.failing = {operation} if tick == looks_begin + look - 1 else set()
            await living.reaper.tick()
            assert run.status is Status.OPEN
            world.s += TICK_S

    play(scene())


def test_leases_that_the_journal_lost_are_not_held_against_their_owners(world: World) -> None:
    async def scene() -> None:
        for number in range(8):
            world.process(f"p{number}", number * TICK_S / 8)
            world.open(f"s{number}", f"p{number}")
        for _ in range(5):
            await world.live(60)
            world.leases.clear()  # Redis came back without them
        await world.live(60)
        assert world.ended == []

    play(scene())


def test_a_reaper_whose_own_lease_lapsed_begins_anew_with_its_suspicions(world: World) -> None:
    async def scene() -> None:
        living = world.process("living")
        run = world.open("s", "missing")
        await world.live(60, lambda: bool(living.reaper._suspects))
        world.leases.clear()
        patient_s = 0.0
        while patient_s < SETTINGS.journal_timeout_s + TICK_S:
            await living.reaper.tick()
            assert run.status is Status.OPEN
            world.s += TICK_S
            patient_s += TICK_S
        await world.live(2 * TICK_S)
        assert run.status is Status.LOST

    play(scene())


def test_a_reaper_that_stood_still_does_not_judge_by_what_it_saw_before(world: World) -> None:
    async def scene() -> None:
        healthy = world.process("healthy")
        living = world.process("living")
        owned = world.open("owned", "healthy")
        pushed = world.open("pushed", idle_s=10)
        await world.live(30, lambda: (setattr(pushed, "heard_ms", world.now_ms()), False)[1])
        healthy.stopped = True
        await world.live(60, lambda: bool(living.reaper._suspects))
        living.stopped = True
        world.leases["healthy"] = world.s + LEASE_S  # the healthy one was back meanwhile
        await world.live(60)
        # Both go on at once, the judge a moment earlier.
        await living.reaper.tick()
        assert (owned.status, pushed.status) == (Status.OPEN, Status.OPEN)

    play(scene())


@pytest.mark.parametrize("operation", ["renew", "lapsed_owners", "owned", "due_runs"])
def test_a_reaper_that_stood_still_in_the_midst_of_a_tick_ends_nothing_in_it(
    world: World, operation: str
) -> None:
    async def scene() -> None:
        living = world.process("living")
        owned = world.open("owned", "missing")
        pushed = world.open("pushed", idle_s=60)
        pushed.heard_ms = world.now_ms()
        await world.live(60, lambda: bool(living.reaper._suspects))
        world.s += TICK_S
        world.pauses = {operation: 300.0}
        await living.reaper.tick()
        assert pushed.status is Status.OPEN
        # By then the second look was over.
        assert owned.status is (Status.LOST if operation == "due_runs" else Status.OPEN)

    play(scene())


@pytest.mark.parametrize("jump_s", [3600.0, -3600.0])
def test_a_jump_of_the_journals_clock_ends_nothing(world: World, jump_s: float) -> None:
    async def scene() -> None:
        world.process("healthy")
        world.process("living", TICK_S / 2)
        world.open("owned", "healthy")
        world.open("pushed", idle_s=60)
        await world.live(10)
        world.clock_offset_s += jump_s
        await world.live(30)
        assert world.ended == []

    play(scene())


def test_a_jump_back_of_the_journals_clock_keeps_no_silent_run_alive(world: World) -> None:
    async def scene() -> None:
        world.process("living")
        await world.live(10)
        world.clock_offset_s -= 3600
        pushed = world.open("pushed", idle_s=10)
        await world.live(30)
        assert pushed.reason == "idle_timeout"

    play(scene())


# How much at a time, and what else may go wrong


def test_thousands_of_runs_are_ended_in_pieces_between_which_the_lease_is_renewed(world: World) -> None:
    async def scene() -> None:
        living = world.process("living")
        for number in range(40 * BATCH):
            world.open(f"s{number}", "dead")
        world.slow = {"owned": TICK_S / 4}
        ended_a_tick = []
        while len(world.ended) < 40 * BATCH:
            before, began = len(world.ended), world.s
            await living.reaper.tick()
            assert world.s - began <= 2 * TICK_S
            world.s = max(world.s, began + TICK_S)
            if len(world.ended) > before:
                ended_a_tick.append(len(world.ended) - before)
        assert len(ended_a_tick) > 5
        assert min(ended_a_tick) >= BATCH

    play(scene())


def test_what_an_index_leads_to_in_vain_is_filed_and_stands_in_nobodys_way(world: World) -> None:
    async def scene() -> None:
        world.process("living")
        for number in range(BATCH + 1):  # taken over: open, and another's
            world.open(f"taken{number}", "dead")
        ended = world.open("ended", "dead")
        ended.status, ended.reason = Status.COMPLETED, "upstream_end"
        world.open("gone", "dead")
        last = world.open("last", "dead")
        original = world.owned

        async def owned(owner: str, limit: int) -> Sequence[tuple[str, str]]:
            return world.indexed[:limit] if owner == "dead" else await original(owner, limit)

        world.owned = owned  # type: ignore[method-assign]
        await world.live(TICK_S)
        for number in range(BATCH + 1):
            world.runs[f"taken{number}", "r"].owner = "another"
            world.leases["another"] = world.s + 1000
        del world.runs["gone", "r"]
        await world.live(15)
        assert world.ended == [("living", "last", "owner_lost")]
        assert last.reason == "owner_lost"
        assert sorted(world.filed) == [("ended", "r"), ("gone", "r")]

    play(scene())


def test_a_run_that_cannot_be_ended_is_logged_and_the_others_are_ended(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    async def scene() -> None:
        world.process("living")
        world.broken = {("broken", "r")}
        world.open("broken", "dead")
        run = world.open("s", "dead")
        await world.live(15)
        assert run.reason == "owner_lost"

    caplog.set_level(logging.ERROR, "relay.reaper")
    play(scene())
    assert any("run cannot be ended stream=broken run=r" in record.getMessage() for record in caplog.records)


def test_a_mistake_in_one_duty_is_logged_and_the_others_go_on(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    async def reindex(after: str, limit: int) -> str:
        raise ZeroDivisionError

    async def scene() -> None:
        world.reindex = reindex  # type: ignore[method-assign]
        world.process("living")
        run = world.open("s", "dead")
        await world.live(15)
        assert run.reason == "owner_lost"

    caplog.set_level(logging.ERROR, "relay.reaper")
    play(scene())
    assert "a tick failed" in caplog.text


def test_indexes_are_mended_a_piece_at_a_time_round_and_round(world: World) -> None:
    async def scene() -> None:
        living = world.process("living")
        for _ in range(5):
            await living.reaper.tick()
        assert world.reindexed == ["", "a", "b", "", "a"]

    play(scene())


# On real journals


async def open_run(journal: Journal, stream: str, **opening: Any) -> None:
    await journal.open_run(RunOpening(stream, "r", "w", f"token-{stream}", Retention(), **opening))


async def over(journal: Journal, stream: str) -> RunInfo:
    """Wait until a run has ended."""
    while True:
        info = await journal.run(stream, "r")
        if info.status is not Status.OPEN:
            return info
        await asyncio.sleep(0.02)


async def all_forgotten(journal: Journal) -> None:
    """Wait until no process is listed that is dead: the look that finds it owning nothing strikes it out,
    some time after its last run has ended."""
    while True:
        if not await journal.lapsed_owners():
            return
        await asyncio.sleep(0.02)


async def terminals(journal: Journal, stream: str) -> list[bytes]:
    page = await journal.read(stream, ORIGIN, 1000, 2**20)
    return [frame.data for frame in page.frames if frame.data.startswith(b'{"type":"run.ended"')]


class Reapers:
    """Reapers that tick by themselves, each with a journal of its own: more often than they need to, so that
    the dead are found soon though the leases are long enough for a busy machine."""

    pause_s = 0.1

    def __init__(self, *journals: Journal, settings: Settings) -> None:
        self.told: list[tuple[str, str]] = []
        self._news = asyncio.Event()
        now = asyncio.get_running_loop().time
        self.all = [
            Reaper(journal, settings, f"process-{number}", self._on_ended, now)
            for number, journal in enumerate(journals)
        ]

    def _on_ended(self, stream: str, run: str, ended: Ended) -> None:
        self.told.append((stream, ended.reason))
        self._news.set()

    async def have_told(self, count: int) -> None:
        while len(self.told) < count:
            self._news.clear()
            await self._news.wait()

    async def have_looked(self) -> None:
        """Wait until each of them has begun and ended a tick from now on."""
        wanted = [count + 2 for count in self._ticks]
        while any(count < least for count, least in zip(self._ticks, wanted, strict=True)):
            self._news.clear()
            await self._news.wait()

    async def __aenter__(self) -> Reapers:
        self._ticks = [0 for _ in self.all]
        self._tasks = [asyncio.create_task(self._tick(number)) for number in range(len(self.all))]
        return self

    async def _tick(self, number: int) -> None:
        while True:
            await self.all[number].tick()
            self._ticks[number] += 1
            self._news.set()
            await asyncio.sleep(self.pause_s)

    async def __aexit__(self, *error: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


FAST = Settings(owner_lease_s=1.2, journal_timeout_s=0.2)


@contextlib.asynccontextmanager
async def heard_of(journal: Journal, stream: str) -> AsyncIterator[None]:
    """A pushed run whose producer is there: it was heard of before this begins, and is until it ends."""

    async def beat() -> None:
        while True:
            with contextlib.suppress(JournalUnavailable):
                await journal.hear_of(stream, "r", "w")
                heard.set()
            await asyncio.sleep(0.05)

    heard = asyncio.Event()
    beating = asyncio.create_task(beat())
    try:
        await heard.wait()
        yield
    finally:
        beating.cancel()
        await asyncio.gather(beating, return_exceptions=True)


def test_p3_two_reapers_on_redis_end_each_run_of_a_dead_process_once(
    redis_server: RedisServer, name: str
) -> None:
    async def scene() -> None:
        url = redis_server.url()
        async with own_journal(url, name) as one, own_journal(url, name) as two:
            await one.renew("dead", 0.3)
            streams = [f"s{number}" for number in range(3 * BATCH)]
            for stream in streams:
                await open_run(one, stream, owner="dead", answer="{}", dialect="openai-chat")
            await open_run(one, "living", owner="process-1")
            async with Reapers(one, two, settings=FAST) as reapers:
                infos = [await over(one, stream) for stream in streams]
                await reapers.have_told(len(streams))
                await all_forgotten(one)
            assert {info.reason for info in infos} == {"owner_lost"}
            assert sorted(reapers.told) == sorted((stream, "owner_lost") for stream in streams)
            for stream in streams:
                assert len(await terminals(one, stream)) == 1
            said = (await one.read("s0", ORIGIN, 10, 2**20)).frames[-2]
            assert b'"code":"owner_lost"' in said.data, "the format's own way to say it"
            assert (await one.run("living", "r")).status is Status.OPEN

    play(scene())


def test_an_outage_of_redis_ends_no_healthy_run(name: str) -> None:
    async def scene(server: RedisServer) -> None:
        url = server.url()
        async with own_journal(url, name) as one, own_journal(url, name) as two:
            await open_run(one, "healthy", owner="process-0")
            await open_run(one, "pushed", idle_timeout_s=1.7)
            async with Reapers(one, two, settings=FAST) as reapers:
                async with heard_of(one, "pushed"):
                    await open_run(one, "before", owner="dead")
                    await over(one, "before")  # so both sessions are old enough to judge
                server.pause()
                await asyncio.sleep(1.5 * FAST.owner_lease_s)  # the outage itself
                server.resume()
                await reapers.have_looked()  # before anything is heard
                async with heard_of(one, "pushed"):
                    await open_run(one, "after", owner="dead")
                    await over(one, "after")
                    await reapers.have_told(2)
                    assert reapers.told == [("before", "owner_lost"), ("after", "owner_lost")]
                    for stream in ("healthy", "pushed"):
                        assert (await one.run(stream, "r")).status is Status.OPEN

    server = RedisServer.start()
    try:
        play(scene(server))
    finally:
        server.stop()


def test_a_pushed_run_that_fell_silent_is_ended_and_one_that_was_heard_of_is_not(
    fresh_journal: Callable[[], str], name: str
) -> None:
    async def scene() -> None:
        async with own_journal(fresh_journal(), name) as journal:
            await open_run(journal, "silent", idle_timeout_s=0.5)
            await open_run(journal, "old", max_run_s=0.5)
            await open_run(journal, "patient", idle_timeout_s=300)
            async with Reapers(journal, settings=FAST) as reapers:
                silent, old = await over(journal, "silent"), await over(journal, "old")
                await reapers.have_told(2)
            assert (silent.status, silent.reason) == ("lost", "idle_timeout")
            assert (old.status, old.reason) == ("cancelled", "max_run")
            assert sorted(reapers.told) == [("old", "max_run"), ("silent", "idle_timeout")]
            assert (await journal.run("patient", "r")).status is Status.OPEN
            assert len(await terminals(journal, "silent")) == 1

    play(scene())


@pytest.fixture
def steered(tmp_path: Path) -> tuple[SqliteJournal, list[int]]:
    clock = [1_763_726_400_000]
    return SqliteJournal(tmp_path / "relay.db", clock_ms=lambda: clock[0]), clock


def test_a_process_that_was_suspended_ends_no_pushed_run_before_it_could_be_heard_of(
    steered: tuple[SqliteJournal, list[int]],
) -> None:
    async def scene() -> None:
        journal, clock = steered
        await journal.start(DeafFollower())
        try:
            reaper = Reaper(journal, SETTINGS, "p", lambda *_: None, lambda: clock[0] / 1000)
            await open_run(journal, "s", idle_timeout_s=60)
            await reaper.tick()
            clock[0] += 3_600_000
            await reaper.tick()
            await journal.append(Append("s", "r", "w", 1, [Event("", b"here I am")]))
            for _ in range(20):
                clock[0] += round(TICK_S * 1000)
                await reaper.tick()
            assert (await journal.run("s", "r")).status is Status.OPEN
            for _ in range(20):
                clock[0] += round(TICK_S * 1000)
                await reaper.tick()
            assert (await journal.run("s", "r")).reason == "idle_timeout"
        finally:
            await journal.close()

    play(scene())
