"""A primary that dies with frames which no replica has, and its replica promoted by a sentinel: one plot a
kind of run, any number of them in one failover."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from random import Random
from typing import Any

import aiohttp
from faults.agent import CHAT, Agent
from faults.listener import DEADLINE_S, Listener, all_of
from faults.pair import FAST, Followed, cancel, fresh_sessions, reader_of, run_of, until
from faults.tally import Kept, Tally, kept_of, shown_to
from reading import Block
from redis_server import RedisSentinel, RedisServer
from relay_process import RelayProcess
from scripted_upstream import ScriptedUpstream

SETTINGS = FAST | {"rewind_grace_s": 4}

LITTLE_HELD_BYTES = 600
"""Two words."""

TALKING, SILENT, ENDED = "upstream talking", "upstream silent", "run ended just before"
OPENED, OPENED_AGAIN = "run opened just before", "second run of a stream opened just before"
INTERLEAVED, PUSHED = "two runs in turn, two processes", "pushed, numbered"
KILLED, FORGOTTEN = "writer killed too", "more lost than held"
CANCELLED, SUPERSEDED, BEATEN = "cancel meanwhile", "supersede meanwhile", "heartbeat meanwhile"


class Cluster:
    """A primary and a replica, a sentinel that watches them, and two relays that ask it where the primary is.

    `unreplicated` counts the frames that primaries took with them, `failovers` the primaries, `diverged` the
    runs of which somebody else ended what was not put back yet."""

    def __init__(self, upstream: ScriptedUpstream) -> None:
        self.upstream = upstream
        self.prefix = f"f-{secrets.token_hex(4)}"
        self.unreplicated = self.failovers = self.diverged = 0
        self._ends = contextlib.ExitStack()
        self.primary, self.replica = RedisServer.start(), RedisServer.start()
        self._ends.callback(lambda: self.primary.stop())
        self._ends.callback(lambda: self.replica.stop())
        self.replica.replicate(self.primary)
        self.sentinel = RedisSentinel.watching(self.primary, replicas=1)
        self._ends.callback(self.sentinel.stop)
        self.owner, self.other = self.relay(), self.relay()

    @classmethod
    @contextlib.contextmanager
    def running(cls, upstream: ScriptedUpstream) -> Iterator[Cluster]:
        cluster = cls(upstream)
        try:
            yield cluster
        finally:
            cluster._ends.close()

    def relay(self, **settings: Any) -> RelayProcess:
        url = f"redis+sentinel://127.0.0.1:{self.sentinel.port}/main/0"
        relay = RelayProcess.start(
            journal=url, upstream=self.upstream.url, redis_prefix=self.prefix, **(SETTINGS | settings)
        )
        self._ends.callback(relay.kill)
        return relay

    def part(self) -> None:
        """Let the replica, which has everything so far, hear no more of its primary. Pausing it would not do:
        what waits in its socket is read when it goes on, though who sent that is dead."""
        with self.primary.client() as primary, self.replica.client() as replica:
            primary.set(f"{self.prefix}:mark", "")
            assert primary.wait(1, 30_000) == 1
            replica.replicaof("127.0.0.1", "1")

    def count_frames(self, server: RedisServer) -> int:
        with server.client() as client:
            pipe = client.pipeline(transaction=False)
            for key in client.scan_iter(f"{self.prefix}:*:frames", count=1000):
                pipe.xlen(key)
            return sum(pipe.execute())

    def lose_primary(self) -> None:
        """kill -9, with frames that no replica has."""
        ahead = self.count_frames(self.primary) - self.count_frames(self.replica)
        self.primary.kill()
        self.unreplicated += ahead
        self.failovers += 1

    def await_promotion(self) -> None:
        self.sentinel.await_primary(self.replica)

    def rejoin(self) -> None:
        """The former primary comes back, empty, a primary until it is told better, and becomes the replica.
        Both relays look for their primary meanwhile, and none asks the former one for anything."""
        self.primary, self.replica = self.replica, self.primary
        self.replica.restart()
        with self.primary.client() as client:
            for kind in ("normal", "pubsub"):
                client.client_kill_filter(_type=kind, skipme=True)
        for relay in (self.owner, self.other):
            deadline = time.monotonic() + DEADLINE_S
            while relay.json("/relay/readyz")["journal"] != "up":
                assert time.monotonic() < deadline, "a relay does not find its primary"
        with self.replica.client() as client:
            assert not {"cmdstat_eval", "cmdstat_evalsha"} & set(client.info("commandstats"))
        self.replica.replicate(self.primary)
        self.sentinel.look_again(self.primary, replicas=1)
        with self.replica.client() as client:
            assert not [each for each in client.client_list() if each["name"].startswith("relay")]

    def __str__(self) -> str:
        return (
            f"{self.failovers} failovers, {self.unreplicated} frames that no replica had; "
            f"{self.diverged} runs ended by others before their frames were back"
        )


class Failover:
    """One failover, in steps that everybody takes together. `tally` counts under `name`."""

    def __init__(
        self, cluster: Cluster, sessions: aiohttp.ClientSession, rng: Random, tally: Tally, plots: int
    ) -> None:
        self.cluster = cluster
        self.sessions = sessions
        self.rng = rng
        self.tally = tally
        self._barrier = asyncio.Barrier(plots + 1)

    async def parted(self) -> None:
        """In a plot: go on when nothing is replicated any more."""
        await self._step()

    async def struck(self) -> None:
        """In a plot: go on when the primary is dead."""
        await self._step()

    async def over(self) -> None:
        """In a plot: go on when the replica is the primary."""
        await self._step()

    async def _step(self) -> None:
        await self._barrier.wait()
        await self._barrier.wait()

    async def direct(self, killed: Sequence[RelayProcess]) -> None:
        """Bring it about."""

        def strike() -> None:
            for relay in killed:
                os.kill(relay.pid, signal.SIGSTOP)  # so that it appends nothing to the next primary
            self.cluster.lose_primary()
            for relay in killed:
                relay.kill()

        for deed in (self.cluster.part, strike, self.cluster.await_promotion):
            await self._barrier.wait()
            await asyncio.sleep(self.rng.uniform(0, 0.02))
            await asyncio.to_thread(deed)
            await self._barrier.wait()


Plot = Callable[[Failover, RelayProcess, RelayProcess], Awaitable[None]]


async def fail_over(
    cluster: Cluster, rng: Random, tally: Tally, plots: Sequence[Plot], *, kill_owner: bool = False
) -> None:
    """A failover with these plots. Their runs are written at the owner or at the other relay by chance,
    unless the owner is to be killed: then at the owner."""
    async with fresh_sessions() as sessions:
        failover = Failover(cluster, sessions, rng, tally, len(plots))
        async with asyncio.TaskGroup() as all_plots:
            for plot in plots:
                relays = [cluster.owner, cluster.other]
                if not kill_owner:
                    rng.shuffle(relays)
                all_plots.create_task(_in_time(plot(failover, *relays), plot))
            all_plots.create_task(failover.direct([cluster.owner] if kill_owner else []))
    if kill_owner:
        cluster.owner = await asyncio.to_thread(cluster.relay)
    await asyncio.to_thread(cluster.rejoin)


async def _in_time(plot: Awaitable[None], what: Plot) -> None:
    try:
        async with asyncio.timeout(DEADLINE_S):
            await plot
    except TimeoutError:
        raise AssertionError(f"not in time: {what}") from None


# Readers


class Pager(Listener):
    """Reads a run as JSON pages, to its end; told that its cursor is gone, it goes on from where it may."""

    resets = 0
    cursor = "start"

    async def listen(self) -> Listener:
        ended = False
        while not ended:
            async with self.session.get(
                f"{self.url}&after={self.cursor}&limit=7", headers={"Accept": "application/json"}
            ) as answer:
                self.status = answer.status
                page = json.loads(await answer.read())
            assert self.status in (200, 410, 503), page
            if self.status == 200:
                self.blocks += [Block(each["id"], each["event"], each["data"]) for each in page["frames"]]
                self.cursor, ended = page["cursor"], page["ended"]
                self._news.set()
            elif self.status == 410:
                self.resets += 1
                self.blocks.clear()
                self.cursor = page["cursor"]
            await asyncio.sleep(0.02)
        return self


class Returning:
    """A listener that is cut, and comes back with its last id until it has everything. Its client knows of no
    answer but those that it may come back after."""

    def __init__(self, listener: Listener) -> None:
        self.listener = listener
        self.comes_back()

    def comes_back(self) -> None:
        self.reading = asyncio.create_task(self._listen())

    async def is_cut(self) -> None:
        self.reading.cancel()
        await asyncio.gather(self.reading, return_exceptions=True)

    async def _listen(self) -> Listener:
        listener = self.listener
        while True:
            await listener.listen()
            assert listener.status in (200, 204, 503), (listener.status, listener.url)
            proxied = listener.status == 200 and "/relay/v1/" not in listener.url and listener.whole
            if listener.endings() or listener.status == 204 or proxied:
                return listener
            await asyncio.sleep(0.05)


class Audience:
    """Everybody who reads one run: its client, who asked for the answer; live readers at both relays; one who
    pages; and two who are cut in the failover and come back with their cursor, to the events and to the
    answer."""

    def __init__(self, failover: Failover, turn: Followed, at: RelayProcess, elsewhere: RelayProcess) -> None:
        sessions, self._rng = failover.sessions, failover.rng
        self.turn = turn
        self.beside = reader_of(sessions, at, turn.stream, turn.run)
        self.pager = Pager(sessions, reader_of(sessions, elsewhere, turn.stream, turn.run).url)
        again = Listener(sessions, f"{elsewhere.url}/{turn.stream}", "POST")
        again.last_id = turn.client.last_id.rpartition(".")[0] + ".0-0"
        self.returning = [
            Returning(reader_of(sessions, self._rng.choice((at, elsewhere)), turn.stream, turn.run)),
            Returning(again),
        ]
        self._tasks = [asyncio.create_task(each.listen()) for each in (self.beside, self.pager)]

    @property
    def live(self) -> list[Listener]:
        return [self.turn.reader, self.beside]

    @property
    def on_events(self) -> list[Listener]:
        """Those who are shown control frames, and so all of the run."""
        return [*self.live, self.pager, self.returning[0].listener]

    @property
    def in_format(self) -> list[Listener]:
        """Those who are shown upstream's own answer."""
        return [self.turn.client, self.returning[1].listener]

    async def have(self, count: int) -> None:
        for listener in (*self.on_events, *self.in_format):
            await listener.has(count)

    async def are_cut(self) -> None:
        for returning in self.returning:
            await returning.is_cut()

    async def come_back(self, now: bool | None = None) -> None:
        """Now, or a little later."""
        for returning in self.returning:
            if not now:
                await asyncio.sleep(self._rng.uniform(0, 0.5))
            returning.comes_back()

    async def ended(self) -> None:
        await all_of([self.turn.answer, self.turn.reading, *self._tasks])
        await all_of([returning.reading for returning in self.returning])

    def assert_untouched(self, failover: Failover, fault: str, kept: list[Kept], reason: str) -> None:
        """Nothing has happened to any of them: every word once, under the ids they were shown at first."""
        tally, turn = failover.tally, self.turn
        assert turn.count(tally, fault, kept, whole=self.on_events, cut=self.in_format) == reason
        words = turn.turn.said
        for listener in (*self.on_events, *self.in_format):
            assert listener.data == words, (listener.url, listener.controls)
        for listener in self.on_events:
            assert not {"gap", "reset"}.intersection(listener.types())
            assert [end["reason"] for end in listener.endings()] == [reason]
        assert all(listener.connections == 1 for listener in (*self.live, turn.client))
        assert turn.client.whole
        assert self.pager.resets == 0


async def take_turn(
    failover: Failover, agent: Agent, at: RelayProcess, elsewhere: RelayProcess, **headers: str
) -> Followed:
    """An agent's next turn, with its client and a reader elsewhere."""
    number = len(agent.turns)
    client = Listener(failover.sessions, f"{at.url}/{agent.stream}", "POST", **headers)
    answer = asyncio.create_task(client.listen())
    await client.has(1)
    assert client.status == 200
    run = client.answer_headers["relay-run"]
    reader = reader_of(failover.sessions, elsewhere, agent.stream, run)
    reading = asyncio.create_task(reader.listen())
    await reader.has(1)
    return Followed(agent, agent.turns[number], run, client, answer, reader, reading)


def new_agent(failover: Failover, **how: Any) -> Agent:
    stream, dialect = f"s-{secrets.token_hex(6)}", failover.rng.choice(("raw", CHAT))
    return Agent(failover.cluster.upstream, stream, dialect=dialect, **how)


async def put_back(failover: Failover, turn: Followed, at: RelayProcess, before: list[Kept]) -> list[Kept]:
    """Wait until the journal holds of a run what it held before."""

    async def is_back() -> bool:
        url = f"{at.url}/relay/v1/streams/{turn.stream}"
        async with failover.sessions.get(url) as answer:
            return answer.status == 200 and await turn.kept(at) == before

    await until(is_back)
    return before


# Plots. The writer lives.


async def talking(failover: Failover, at: RelayProcess, elsewhere: RelayProcess) -> None:
    """It finds out by what it says next."""
    rng = failover.rng
    turn = await take_turn(failover, new_agent(failover), at, elsewhere)
    audience = Audience(failover, turn, at, elsewhere)
    await audience.have(rng.randint(1, 20))
    await failover.parted()
    await audience.have(len(turn.turn.said) + rng.randint(1, 20))
    failover.tally.inject(TALKING)
    await audience.are_cut()
    await failover.struck()
    await audience.come_back()
    await failover.over()
    await turn.client.has(len(turn.client.data) + rng.randint(1, 20))
    turn.agent.stop_speaking()
    await audience.ended()
    audience.assert_untouched(failover, TALKING, await turn.kept(elsewhere), "upstream_end")


async def silent(failover: Failover, at: RelayProcess, elsewhere: RelayProcess) -> None:
    """It finds out when it renews its lease."""
    turn = await take_turn(failover, new_agent(failover, words=30), at, elsewhere)
    audience = Audience(failover, turn, at, elsewhere)
    await audience.have(failover.rng.randint(1, 10))
    await failover.parted()
    await audience.have(30)
    before = await turn.kept(at)
    failover.tally.inject(SILENT)
    await audience.are_cut()
    await failover.struck()
    await audience.come_back()
    await failover.over()
    assert turn.agent.turns[-1].said == turn.client.data
    await put_back(failover, turn, elsewhere, before)
    turn.agent.end()
    await audience.ended()
    kept = await turn.kept(elsewhere)
    assert kept[: len(before)] == before
    audience.assert_untouched(failover, SILENT, kept, "upstream_end")


async def ended(failover: Failover, at: RelayProcess, elsewhere: RelayProcess) -> None:
    """The ending is lost, and everybody has seen it: the run ends again, as it did."""
    turn = await take_turn(failover, new_agent(failover, words=20), at, elsewhere)
    audience = Audience(failover, turn, at, elsewhere)
    satisfied = [reader_of(failover.sessions, relay, turn.stream, turn.run) for relay in (at, elsewhere)]
    await audience.have(failover.rng.randint(1, 10))
    await failover.parted()
    await audience.are_cut()
    turn.agent.end()
    await all_of([turn.answer, turn.reading, *(asyncio.create_task(each.listen()) for each in satisfied)])
    before = await turn.kept(at)
    failover.tally.inject(ENDED)
    await failover.struck()
    await audience.come_back()
    again = [Returning(each) for each in satisfied]
    await failover.over()
    await put_back(failover, turn, elsewhere, before)
    await audience.ended()
    await all_of([each.reading for each in again])
    audience.assert_untouched(failover, ENDED, await turn.kept(elsewhere), "upstream_end")
    for listener in satisfied:
        assert shown_to(listener) == shown_to(turn.reader)
    assert (await run_of(failover.sessions, elsewhere, turn.stream, turn.run))["status"] == "completed"


async def opened(failover: Failover, at: RelayProcess, elsewhere: RelayProcess) -> None:
    """The journal does not know the run, nor its stream."""
    await _opened(failover, at, elsewhere, new_agent(failover), OPENED)


async def opened_again(failover: Failover, at: RelayProcess, elsewhere: RelayProcess) -> None:
    """The journal does not know the run, but one that had ended before it in the same stream."""
    agent = new_agent(failover, words=2)
    agent.end()
    former = await take_turn(failover, agent, elsewhere, at)
    await all_of([former.answer, former.reading])
    speaking = Agent(failover.cluster.upstream, agent.stream, dialect=agent.dialect)
    await _opened(failover, at, elsewhere, speaking, OPENED_AGAIN)


async def _opened(
    failover: Failover, at: RelayProcess, elsewhere: RelayProcess, agent: Agent, fault: str
) -> None:
    rng = failover.rng
    await failover.parted()
    turn = await take_turn(failover, agent, at, elsewhere)
    audience = Audience(failover, turn, at, elsewhere)
    await audience.have(rng.randint(1, 30))
    failover.tally.inject(fault)
    await audience.are_cut()
    await failover.struck()
    await audience.come_back()
    await failover.over()
    if rng.random() < 0.5:
        await turn.client.has(len(turn.client.data) + rng.randint(1, 20))
    turn.agent.stop_speaking()
    await audience.ended()
    audience.assert_untouched(failover, fault, await turn.kept(elsewhere), "upstream_end")


async def interleaved(failover: Failover, at: RelayProcess, elsewhere: RelayProcess) -> None:
    """Each process holds what lies between the frames of the other."""
    rng, agent = failover.rng, new_agent(failover)
    turns = [await take_turn(failover, agent, at, elsewhere), await take_turn(failover, agent, elsewhere, at)]
    audiences = [
        Audience(failover, turns[0], at, elsewhere),
        Audience(failover, turns[1], elsewhere, at),
    ]
    both = Listener(failover.sessions, f"{elsewhere.url}/relay/v1/streams/{agent.stream}/events")
    reading = asyncio.create_task(both.listen())
    for audience in audiences:
        await audience.have(rng.randint(1, 20))
    await failover.parted()
    for audience in audiences:
        await audience.have(len(audience.turn.turn.said) + rng.randint(1, 20))
        failover.tally.inject(INTERLEAVED)
        await audience.are_cut()
    await failover.struck()
    for audience in audiences:
        await audience.come_back()
    await failover.over()
    for turn in turns:
        await turn.client.has(len(turn.client.data) + rng.randint(1, 20))
    agent.stop_speaking()
    for audience in audiences:
        await audience.ended()
        kept = await audience.turn.kept(elsewhere)
        audience.assert_untouched(failover, INTERLEAVED, kept, "upstream_end")
    everything = await kept_of(failover.sessions, elsewhere, agent.stream)
    await both.until(lambda: len(both.endings()) == 2)
    reading.cancel()
    await asyncio.gather(reading, return_exceptions=True)
    assert shown_to(both) == [(frame.id, frame.event, frame.data) for frame in everything]
    assert not {"gap", "reset"}.intersection(both.types())
    assert both.connections == 1


# Plots. What the journal lost is with nobody.


def since_reset(listener: Listener) -> Listener:
    """What a listener was shown after it was told to begin anew: once."""
    resets = [
        place
        for place, block in enumerate(listener.blocks)
        if block.event == "relay" and json.loads(block.data)["type"] == "reset"
    ]
    assert len(resets) == 1, (listener.url, listener.controls)
    assert not listener.types().count("gap")
    rest = Listener(listener.session, listener.url)
    rest.blocks = listener.blocks[resets[0] + 1 :]
    return rest


def reasons_of_resets(listener: Listener) -> list[str]:
    return [control["reason"] for control in listener.controls if control["type"] == "reset"]


def assert_reset(failover: Failover, fault: str, turn: Followed, audience: Audience, kept: list[Kept]) -> str:
    """Everybody is told once, and shown what is left from its start. Returns why the run ended."""
    readers = [since_reset(listener) for listener in (*audience.live, audience.returning[0].listener)]
    assert audience.pager.resets == 1
    for listener in audience.live:
        assert reasons_of_resets(listener) == ["diverged"]
        assert listener.connections == 1
    # One who comes back may find that there is less than it has, and nothing to compare it with.
    assert reasons_of_resets(audience.returning[0].listener)[0] in ("diverged", "ahead")
    readers.append(audience.pager)
    reason = turn.count(failover.tally, fault, kept, whole=readers, cut=[])
    for listener in readers:
        assert [end["reason"] for end in listener.endings()] == [reason]
    return reason


async def killed(failover: Failover, at: RelayProcess, elsewhere: RelayProcess) -> None:
    """The writer's process dies with the primary."""
    rng = failover.rng
    turn = await take_turn(failover, new_agent(failover), at, elsewhere)
    audience = Audience(failover, turn, elsewhere, elsewhere)
    await audience.have(rng.randint(1, 20))
    await failover.parted()
    await audience.have(len(turn.turn.said) + rng.randint(1, 20))
    failover.tally.inject(KILLED)
    await audience.are_cut()
    await failover.struck()
    audience.returning[0].comes_back()
    await failover.over()
    await all_of([turn.reading, turn.answer, *audience._tasks, audience.returning[0].reading])
    again = audience.returning[1].listener
    while again.status != 410:  # its answer cannot be gone on with: not in upstream's own format
        await again.listen()
        assert again.status in (410, 503)
    assert assert_reset(failover, KILLED, turn, audience, await turn.kept(elsewhere)) == "owner_lost"


async def forgotten(failover: Failover, at: RelayProcess, elsewhere: RelayProcess) -> None:
    """The writer holds less than the journal lost."""
    rng = failover.rng
    at = await asyncio.to_thread(failover.cluster.relay, held_max_bytes=LITTLE_HELD_BYTES)
    turn = await take_turn(failover, new_agent(failover), at, elsewhere)
    audience = Audience(failover, turn, elsewhere, elsewhere)
    await audience.have(rng.randint(1, 20))
    await failover.parted()
    await audience.have(len(turn.turn.said) + rng.randint(10, 20))
    failover.tally.inject(FORGOTTEN)
    await audience.are_cut()
    await failover.struck()
    audience.returning[0].comes_back()
    await failover.over()
    if rng.random() < 0.5:
        turn.agent.stop_speaking()  # else it is found by what is said
    await all_of([turn.reading, turn.answer, *audience._tasks, audience.returning[0].reading])
    await turn.turn.await_over()
    assert assert_reset(failover, FORGOTTEN, turn, audience, await turn.kept(elsewhere)) == "journal_lost"
    await asyncio.to_thread(at.stop)


class Resender:
    """A producer that numbers its frames, keeps all of them, and sends again what it is asked for."""

    def __init__(self, sessions: aiohttp.ClientSession, relays: Sequence[RelayProcess]) -> None:
        self.stream = f"p-{secrets.token_hex(6)}"
        self.said: list[str] = []
        self.gaps = 0
        self._sessions = sessions
        self._urls = [f"{relay.url}/relay/v1/streams/{self.stream}" for relay in relays]
        self._finishing = False
        self._news = asyncio.Event()

    async def open(self) -> None:
        status, answer = await self.ask("runs", {"run": "turn", "idle_timeout_s": 60})
        assert status in (200, 201), answer
        self._writer = answer["writer"]

    async def push(self) -> None:
        next_seq = 1
        while next_seq <= len(self.said) or not self._finishing:
            if next_seq > len(self.said):
                self.said.append(f"pushed-{next_seq} ")
            frames = [{"data": word} for word in self.said[next_seq - 1 :]]
            status, answer = await self.ask("runs/turn/frames", frames, Relay_Seq=str(next_seq))
            if status == 409:
                assert answer["code"] == "sequence_gap", answer
                assert answer["expected"] < next_seq
                self.gaps += 1
                next_seq = answer["expected"]
            else:
                assert status == 200, answer
                next_seq = answer["next_seq"]
            self._news.set()
            await asyncio.sleep(0.01)
        status, answer = await self.ask("runs/turn/end", {"status": "completed"})
        assert status == 200, answer

    def finish(self) -> None:
        self._finishing = True

    async def until(self, happened: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while not happened():
                self._news.clear()
                await self._news.wait()

    async def ask(self, what: str, body: Any, **headers: str) -> tuple[int, Any]:
        """One answer that is not 503, by either relay."""
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        if hasattr(self, "_writer"):
            names["Relay-Writer"] = self._writer
        while True:
            self._urls.append(self._urls.pop(0))
            async with self._sessions.post(f"{self._urls[0]}/{what}", json=body, headers=names) as answer:
                if answer.status != 503:
                    return answer.status, await answer.json()
            await asyncio.sleep(0.02)


async def pushed(failover: Failover, at: RelayProcess, elsewhere: RelayProcess) -> None:
    """What it lost of a pushed run the journal asks the producer for."""
    rng, sessions = failover.rng, failover.sessions
    producer = Resender(sessions, (at, elsewhere))
    await producer.open()
    readers = [reader_of(sessions, relay, producer.stream, "turn") for relay in (at, elsewhere)]
    readings = [asyncio.create_task(reader.listen()) for reader in readers]
    pushing = asyncio.create_task(producer.push())
    for reader in readers:
        await reader.has(rng.randint(1, 10))
    await failover.parted()
    for reader in readers:
        await reader.has(len(producer.said) + rng.randint(1, 10))
    failover.tally.inject(PUSHED)
    await failover.struck()
    await failover.over()
    await producer.until(lambda: producer.gaps > 0)
    said = len(producer.said)
    await producer.until(lambda: len(producer.said) > said)
    producer.finish()
    await pushing
    await all_of(readings)
    assert producer.gaps == 1
    for reader in readers:
        assert reasons_of_resets(reader) == ["diverged"]
        assert reader.connections == 1
    after = [since_reset(reader) for reader in readers]
    kept = await kept_of(sessions, elsewhere, producer.stream)
    assert failover.tally.count(PUSHED, kept, producer.said, whole=after) == "producer_end"
    assert all(reader.data == producer.said for reader in after)


# Plots. Requests meanwhile.


async def cancelled(failover: Failover, at: RelayProcess, elsewhere: RelayProcess) -> None:
    """A cancel that sets out at any moment of it: refused, or done."""
    rng, sessions = failover.rng, failover.sessions
    turn = await take_turn(failover, new_agent(failover), at, elsewhere)
    await turn.reader.has(rng.randint(1, 20))
    await failover.parted()
    await turn.reader.has(len(turn.turn.said) + rng.randint(1, 10))
    failover.tally.inject(CANCELLED)

    async def stop() -> dict[str, Any]:
        await asyncio.sleep(rng.uniform(0, 3))
        url = f"{elsewhere.url}/relay/v1/streams/{turn.stream}/runs/{turn.run}/cancel"
        while True:
            async with sessions.post(url) as answer:
                if answer.status == 200:
                    ended: dict[str, Any] = json.loads(await answer.read())
                    return ended
                assert answer.status == 503, await answer.text()
            await asyncio.sleep(0.02)

    await failover.struck()
    stopping = asyncio.create_task(stop())
    await failover.over()
    assert (await stopping)["reason"] == "client_cancel"
    await all_of([turn.answer, turn.reading])
    await turn.turn.await_over()
    assert turn.turn.closed
    await consistent(failover, CANCELLED, turn, elsewhere, "client_cancel")
    assert (await cancel(sessions, at, turn.stream, turn.run))["reason"] == "client_cancel"


async def consistent(failover: Failover, fault: str, turn: Followed, at: RelayProcess, reason: str) -> None:
    """A run was ended before its writer could put back what was lost, or after: readers have what the journal
    has, either way."""
    resets = reasons_of_resets(turn.reader)
    reader = since_reset(turn.reader) if resets else turn.reader
    kept = await turn.kept(at)
    if not resets:
        assert turn.client.data == [frame.data for frame in kept if frame.event != "relay"]
    assert turn.count(failover.tally, fault, kept, whole=[reader], cut=[]) == reason
    assert resets in ([], ["diverged"])
    assert [end["reason"] for end in reader.endings()] == [reason]
    failover.cluster.diverged += len(resets)


async def superseded(failover: Failover, at: RelayProcess, elsewhere: RelayProcess) -> None:
    """A regenerate: refused, or done, and the old run ends with it."""
    rng, sessions = failover.rng, failover.sessions
    agent = new_agent(failover)
    turn = await take_turn(failover, agent, at, elsewhere)
    await turn.reader.has(rng.randint(1, 20))
    await failover.parted()
    await turn.reader.has(len(turn.turn.said) + rng.randint(1, 10))
    failover.tally.inject(SUPERSEDED)
    await failover.struck()
    await asyncio.sleep(rng.uniform(0, 3))
    client = Listener(sessions, f"{elsewhere.url}/{agent.stream}", "POST", Relay_Supersedes=turn.run)
    answering = asyncio.create_task(_asked(client))
    await failover.over()
    await all_of([turn.answer, turn.reading])
    await client.has(3)
    new_run = client.answer_headers["relay-run"]
    agent.stop_speaking()
    await all_of([answering])
    assert client.whole
    await consistent(failover, SUPERSEDED, turn, elsewhere, "superseded")

    async def all_over() -> bool:
        async with sessions.get(f"{elsewhere.url}/relay/v1/streams/{agent.stream}") as answer:
            return not (await answer.json())["open_runs"]

    await until(all_over)
    kept = await kept_of(sessions, elsewhere, agent.stream)
    started = [frame.run for frame in kept if frame.type == "run.started"]
    assert Counter(started) == Counter(dict.fromkeys(started, 1))
    assert Counter(frame.run for frame in kept if frame.type == "run.ended") == Counter(started)
    told = [json.loads(frame.data)["by"] for frame in kept if frame.type == "run.superseded"]
    assert set(told) == set(started) - {turn.run}
    said = next(each.said for each in agent.turns if each.said[: len(client.data)] == client.data)
    new = [frame for frame in kept if frame.run == new_run]
    assert failover.tally.count(SUPERSEDED, new, said, cut=[client]) == "upstream_end"


async def _asked(client: Listener) -> Listener:
    """Ask until the answer is not 503."""
    while True:
        await client.listen()
        if client.status == 200:
            return client
        assert client.status == 503
        await asyncio.sleep(0.02)


async def beaten(failover: Failover, at: RelayProcess, elsewhere: RelayProcess) -> None:
    """Heartbeats of a silent run: refused, or heard."""
    producer = Resender(failover.sessions, (at, elsewhere))
    await producer.open()
    beating = True

    async def beat() -> None:
        while beating:
            status, answer = await producer.ask("runs/turn/heartbeat", {})
            assert status == 200, answer
            assert answer["status"] == "open"

    beats = asyncio.create_task(beat())
    await failover.parted()
    failover.tally.inject(BEATEN)
    await failover.struck()
    await failover.over()
    status, answer = await producer.ask("runs/turn/heartbeat", {})
    assert (status, answer["status"]) == (200, "open")
    beating = False
    await beats
    producer.finish()
    await producer.push()
    kept = await kept_of(failover.sessions, elsewhere, producer.stream)
    assert failover.tally.count(BEATEN, kept, producer.said) == "producer_end"


WRITER_LIVES: Sequence[Plot] = (talking, silent, ended, opened, opened_again, interleaved)
MEANWHILE: Sequence[Plot] = (pushed, cancelled, superseded, beaten)
WRITER_LOST: Sequence[Plot] = (killed, killed, forgotten)
