"""The whole of one example: relay in this process over a real journal, its model, and its clients."""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import redis
from model.client import Client, Violation, Wish
from model.plain_list import ModelRun, Node, State, Stream
from model.steered import SteeredJournal, SteeredLoop

from relay.app import App
from relay.cursor import ORIGIN, Cursor
from relay.errors import Fenced, JournalError, RunEnded, RunExists, SequenceGap, StreamSealed, UnknownStream
from relay.frame import CONTROL_EVENT, Event
from relay.journal.base import Append, Journal, Retention, RunOpening
from relay.journal.redis_streams import RedisJournal
from relay.journal.sqlite import SqliteJournal
from relay.lifecycle import Ending
from relay.settings import Settings

T = TypeVar("T")

ANSWER = '{"status":200,"headers":[["content-type","text/event-stream"]]}'
FOREVER_S = 1e9


class Backend(Protocol):
    """A real journal, and what only its operator can do to it."""

    hints_come_late: bool
    """Whether hints come by another way than answers, so that their arrival must be waited for."""
    rewinds_live: bool
    """Whether its data can be put back under a relay that runs."""

    def journal(self) -> Journal: ...
    def move_clock(self, by_ms: int) -> None: ...
    def pass_ms(self, ms: int) -> None: ...
    def save(self, stream: str, tokens: list[str]) -> Any: ...
    def restore(self, stream: str, tokens: list[str], saved: Any) -> None: ...
    def close(self) -> None: ...


class SqliteBackend:
    hints_come_late = False
    rewinds_live = False

    def __init__(self) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="relay-model-"))
        self._saved = 0
        self._ms = 1_763_726_400_000
        self._floor_ms = 0

    def journal(self) -> Journal:
        return SqliteJournal(self._directory / "relay.db", synchronous="off", clock_ms=lambda: self._ms)

    def move_clock(self, by_ms: int) -> None:
        self._ms = max(self._ms + by_ms, self._floor_ms)

    def pass_ms(self, ms: int) -> None:
        self._ms = self._floor_ms = max(self._ms, ms) + 1

    def save(self, stream: str, tokens: list[str]) -> Any:
        self._saved += 1
        path = self._directory / f"saved-{self._saved}.db"
        with (
            closing(sqlite3.connect(self._directory / "relay.db")) as source,
            closing(sqlite3.connect(path)) as target,
        ):
            source.backup(target)
        return path

    def restore(self, stream: str, tokens: list[str], saved: Any) -> None:
        for path in self._directory.glob("relay.db*"):
            path.unlink()
        shutil.copy(saved, self._directory / "relay.db")

    def close(self) -> None:
        shutil.rmtree(self._directory)


class RedisBackend:
    hints_come_late = True
    rewinds_live = True

    def __init__(self, url: str) -> None:
        self._url = url
        self._client = redis.Redis.from_url(url, socket_timeout=30)
        self._client.flushdb()

    def journal(self) -> Journal:
        return RedisJournal(self._url, prefix="model", timeout_s=FOREVER_S)

    def move_clock(self, by_ms: int) -> None:
        pass  # it is the server's

    def pass_ms(self, ms: int) -> None:
        while True:
            seconds, micros = self._client.time()
            if seconds * 1000 + micros // 1000 > ms:
                return

    def _keys(self, stream: str, tokens: list[str]) -> list[bytes]:
        keys = list(self._client.scan_iter(f"model:{{{stream}}}:*", count=1000))
        return [*keys, *(f"model:token:{token}".encode() for token in tokens)]

    def save(self, stream: str, tokens: list[str]) -> Any:
        keys = self._keys(stream, tokens)
        with self._client.pipeline() as pipe:
            for key in keys:
                pipe.dump(key)
            return {key: value for key, value in zip(keys, pipe.execute(), strict=True) if value}

    def restore(self, stream: str, tokens: list[str], saved: Any) -> None:
        with self._client.pipeline() as pipe:
            pipe.delete("model:none", *self._keys(stream, tokens))
            for key, value in saved.items():
                pipe.restore(key, 24 * 3600 * 1000, value, replace=True)
            pipe.execute()

    def close(self) -> None:
        self._client.close()


class World:
    """Streams, clients, and one relay after the other between them."""

    def __init__(self, backend: Backend, page_max_frames: int, ring_max_frames: int, seed: int) -> None:
        self.backend = backend
        self.loop = SteeredLoop()
        self.streams = [Stream("one"), Stream("two")]
        self.clients: list[Client] = []
        self.saved: list[tuple[Stream | None, list[State], Any]] = []
        self.choice = random.Random(seed)
        self._names = 0
        self._page_max_frames = page_max_frames
        self._settings = Settings(
            group_ms=0, ring_max_frames=ring_max_frames, ring_max_bytes=200_000, rings_max_bytes=300_000
        )
        self._wrote = False
        self._missed = False
        """Whether relay was kept from learning something since everybody was last served."""
        self._barriers = 0
        self._held_before = False
        self._last_quiet = {stream.name: 0 for stream in self.streams}
        self._chores: list[asyncio.Task[None]] = []
        self._start()

    # relay

    def _start(self) -> None:
        self._barrier = f"barrier-{self._fresh_name()}"
        self._barriers = 0
        self.journal = SteeredJournal(self.backend.journal(), self._page_max_frames, self._barrier)
        self.app = App(self._settings, self.journal)  # type: ignore[arg-type]
        self.loop.run(self._start_journal())

    async def _start_journal(self) -> None:
        await self.journal.start(self.app.tails)
        if self.backend.hints_come_late:
            await self.inner.open_run(RunOpening(self._barrier, "b", "w", "", Retention(4, 0, 0)))
            self.journal.watch(self._barrier)

    @property
    def inner(self) -> Journal:
        """The real journal."""
        return self.journal.inner

    def restart(self, *, graceful: bool) -> None:
        """Another relay takes the place of this one."""
        self._stop(graceful=graceful)
        self._start()

    def _stop(self, *, graceful: bool) -> None:
        if graceful:
            self.loop.run(self.app.drain())
        self._let_everything_go()
        self.settle()
        for client in self.clients:
            if client.connected:
                self.inside(client.leave)
        self.settle()
        self.loop.run(self.app.close())

    def _let_everything_go(self) -> None:
        """Nothing is held any more; held hints are lost."""
        self.journal.failures = 0
        self.journal.holds_reads = self.journal.holds_hints = False
        self.release_hints("lose")
        self.journal.release_reads(len(self.journal.held_reads), self.choice)
        for client in self.clients:
            client.go_on()

    def close(self) -> None:
        """End everything, whatever state it is in."""
        try:
            for client in self.clients:
                self.inside(client.leave)
            with suppress(Violation):
                self._stop(graceful=False)
        finally:
            for task in asyncio.all_tasks(self.loop):
                task.cancel()
            self.loop.run(self.loop.shutdown_default_executor())
            self.loop.close()
            self.backend.close()

    # Rest

    def settle(self) -> None:
        """Let everything happen that can happen by itself, then look at what the clients got."""
        self.loop.run(self._rest())
        self.inside(self._look)

    def _look(self) -> None:
        for client in self.clients:
            client.look()

    async def _rest(self) -> None:
        await self._calm()
        if self._wrote and self.backend.hints_come_late:
            self._wrote = False
            self._barriers += 1
            barrier = self._barriers + 1
            await self.inner.append(
                Append(self._barrier, "b", "w", self._barriers, [Event("", b"")])
            )
            while self.journal.barrier_seq < barrier:
                self.journal.changed.clear()
                await self.journal.changed.wait()
            await self._calm()

    async def _calm(self) -> None:
        journal = self.journal
        turns = 0
        while turns < 8:
            before = journal.activity
            await asyncio.sleep(0)
            if journal.in_flight or journal.unconfirmed:
                journal.changed.clear()
                await journal.changed.wait()
                turns = 0
            else:
                turns = turns + 1 if before == journal.activity else 0

    def quiesce(self, fate: str) -> None:
        """Let everything arrive, or be found by the quiet check; then everybody has everything."""
        journal = self.journal
        journal.failures = 0
        journal.holds_reads = journal.holds_hints = False
        self.release_hints(fate)
        journal.release_reads(len(journal.held_reads), self.choice)
        for client in self.clients:
            client.go_on()
        self.settle()
        self.pass_time(0.3)  # a reader's own pause
        if not self._missed:
            # Nothing was kept from relay, so it needs no second look to have served everybody.
            self._check_served()
        self.pass_time(2.5)  # pauses after failures
        self.check_quiet()
        self.settle()
        self.pass_time(0.5)
        self.check_journal()
        self._check_served()
        self._missed = False
        for client in self.clients:
            client.since = len(client.stream.states) - 1
        for stream in self.streams:
            self._last_quiet[stream.name] = len(stream.states) - 1

    def _check_served(self) -> None:
        for client in self.clients:
            client.check_served()

    def release_hints(self, fate: str) -> None:
        """Decide what becomes of the hints held."""
        if self.journal.held_hints and fate in ("some", "lose"):
            self._missed = True
        self.inside(lambda: self.journal.release_hints(fate, self.choice))

    def fail_reads(self, count: int) -> None:
        """So many of relay's next reads fail."""
        self._missed = True
        self.journal.failures = count

    def deafen(self) -> None:
        """From now on hints are lost. Those held already are."""
        self._held_before = self.journal.holds_hints
        self.journal.holds_hints = True

    def hear_again(self) -> None:
        """Hints are heard again, unless they were held before."""
        self.release_hints("lose")
        self.journal.holds_hints = self._held_before

    def check_quiet(self) -> None:
        """relay's care for streams whose hints were lost."""

        async def care() -> None:
            with suppress(JournalError):
                await self.app.tails.check_quiet()

        self.loop.run(asyncio.sleep(0))
        self._chores.append(self.loop.create_task(care()))
        self.settle()
        for chore in self._chores:
            if chore.done():
                chore.result()
        self._chores = [chore for chore in self._chores if not chore.done()]

    def pass_time(self, seconds: float) -> None:
        """Time goes by on relay's clock."""
        self.loop.advance(seconds)
        self.settle()

    def visit_readers(self) -> None:
        """relay's care for readers: heartbeats, rotation, cutting those that take nothing."""

        self.inside(lambda: self.app.readers.visit(self.app.tails.now()))
        self.settle()

    def inside(self, act: Callable[[], None]) -> None:
        """Do something on the loop, where relay expects it."""

        async def run() -> None:
            act()

        self.loop.run(run())

    def check_journal(self) -> None:
        """The journal holds what the list says."""
        for stream in self.streams:
            state = stream.now
            held = self.loop.run(self._held(stream.name))
            expected = [(n.id, n.run, n.event, n.data) for n in state.held()] if state.exists else None
            if held != expected:
                raise self._broken(f"{stream.name} holds {held}, not {expected}")

    async def _held(self, stream: str) -> list[tuple[str, str, str, bytes]] | None:
        found: list[tuple[str, str, str, bytes]] = []
        after = ORIGIN
        while True:
            try:
                page = await self.inner.read(stream, after, 1000, 1 << 24)
            except UnknownStream:
                return None
            found += [(str(f.id), f.run, f.event, f.data) for f in page.frames]
            if not page.more:
                return found
            after = page.frames[-1].id

    def _broken(self, what: str) -> Violation:
        self.streams[0].broken = True
        return Violation(what)

    # Producers

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        self._wrote = True
        self.backend.move_clock(self.choice.choice((0, 0, 0, 1, 7, -1000)))
        return self.loop.run(self.journal.direct(work))

    def _fresh_name(self) -> str:
        self._names += 1
        return f"{self._names:032x}"

    def _node(self, stream: Stream, previous: Node | None, cursor: Cursor, run: str, expected: Event) -> Node:
        return stream.add(previous, cursor.ms, run, expected.event, expected.data)

    def _control_node(
        self, stream: Stream, previous: Node | None, cursor: Cursor, run: str, expected: dict[str, Any]
    ) -> Node:
        """A control frame is written by the journal itself: compared member by member, then taken over."""
        before = Cursor(cursor.seq - 1, 0)
        page = self.loop.run(self.inner.read(stream.name, before, 1, 1))
        data = page.frames[0].data
        if json.loads(data) != expected or page.frames[0].event != CONTROL_EVENT:
            raise self._broken(f"{stream.name} has {data!r} where {expected} should be")
        return stream.add(previous, cursor.ms, run, CONTROL_EVENT, data)

    def open_run(self, stream: Stream, name: str, *, seal: bool, retention: Retention) -> None:
        """Open a run, or be refused as the state says."""
        state = stream.now
        known = state.runs.get(name) if state.exists else None
        writer, token = self._fresh_name(), self._fresh_name()
        opening = RunOpening(stream.name, name, writer, token, retention, answer=ANSWER, seal=seal)
        if known is not None:
            self._refused(self.inner.open_run(opening), RunExists)
            again = self._do(self.inner.open_run(replace(opening, writer=known.writer)))
            if again.start != (_cursor(known.start) if known.start else ORIGIN):
                raise self._broken(f"opened again, {name} begins at {again.start}")
            return
        if state.exists and state.sealed:
            self._refused(self.inner.open_run(opening), StreamSealed)
            return
        opened = self._do(self.inner.open_run(opening))
        previous = state.head if state.exists else None
        if opened.start != (_cursor(previous) if previous else ORIGIN):
            raise self._broken(f"{name} begins at {opened.start}, not after {previous}")
        first = self._control_node(
            stream, previous, opened.first, name, {"type": "run.started", "run": name}
        )
        if not state.exists:
            stream.lives += 1
        run = ModelRun(name, writer, token, previous, first)
        stream.become(state.opened(stream.lives, run, seal, retention))

    def append(
        self, stream: Stream, name: str, events: list[Event], repeat: int, ending: Ending | None
    ) -> None:
        """Append, with so many of the run's last frames sent once more in front."""
        run = stream.now.runs[name]
        repeated = run.events[max(0, len(run.events) - repeat) :]
        batch = (len(run.events) - len(repeated) + 1, (*repeated, *events), ending)
        self._append(stream, run, *batch)

    def repeat(self, stream: Stream, name: str) -> None:
        """The run's last append once more, as after a lost answer."""
        run = stream.now.runs[name]
        self._append(stream, run, *run.batch)

    def misbehave(self, stream: Stream, name: str) -> None:
        """Appends that no run takes."""
        run = stream.now.runs[name]
        batch = Append(stream.name, name, run.writer, len(run.events) + 2, [Event("", b"hole")])
        self._refused(self.inner.append(batch), SequenceGap)
        stale = replace(batch, writer="stale", producer_seq=len(run.events) + 1)
        self._refused(self.inner.append(stale), Fenced)

    def _append(
        self, stream: Stream, run: ModelRun, first: int, events: tuple[Event, ...], ending: Ending | None
    ) -> None:
        state = stream.now
        duplicates = min(len(events), len(run.events) + 1 - first)
        fresh = events[duplicates:]
        batch = Append(stream.name, run.name, run.writer, first, events, 0, "", ending)
        if run.ended is not None:
            if fresh or (ending is not None and ending[:2] != run.ended[:2]):
                self._refused(self.inner.append(batch), RunEnded)
                return
            ending = None
        appended = self._do(self.inner.append(batch))
        node = state.head
        assert node is not None
        last = appended.last
        for event in fresh:
            node = self._node(stream, node, last, run.name, event)
        all_events = (*run.events, *fresh)
        if ending is not None:
            expected: dict[str, Any] = {"type": "run.ended", "run": run.name, "status": ending.status}
            expected |= {"reason": ending.reason, "frames": len(all_events), "text_bytes": 0}
            if ending.error:
                expected["error"] = ending.error
            node = self._control_node(stream, node, last, run.name, expected)
        outcome = (str(last), appended.appended, appended.duplicates, appended.next_seq)
        if outcome != (node.id, len(fresh), duplicates, len(all_events) + 1):
            raise self._broken(f"an append of {batch} came to {appended}")
        if node is not state.head:
            changed = replace(
                run, last=node, events=all_events, ended=ending or run.ended, batch=(first, events, ending)
            )
            stream.become(state.appended(changed))

    def _refused(self, work: Coroutine[Any, Any, Any], error: type[Exception]) -> None:
        try:
            result = self._do(work)
        except error:
            return
        raise self._broken(f"{error.__name__} was due, and it came to {result}")

    # Operators

    def trim(self, stream: Stream, before_seq: int) -> None:
        """Drop frames before a seq."""
        self._do(self.inner.trim(stream.name, before_seq))
        stream.become(stream.now.trimmed(before_seq))

    def delete(self, stream: Stream) -> None:
        """Remove a stream."""
        self._do(self.inner.delete(stream.name))
        stream.become(State())

    def save(self, stream: Stream) -> None:
        """Keep a copy of the journal: of one stream, or of all where they share a file."""
        streams = [stream] if self.backend.rewinds_live else self.streams
        tokens = [run.token for each in streams for run in each.now.runs.values()]
        states = [each.now for each in streams]
        kept = stream if self.backend.rewinds_live else None
        self.saved.append((kept, states, self.backend.save(stream.name, tokens)))
        del self.saved[:-4]

    def rewind(self, number: int, *, live: bool) -> None:
        """Put a copy back, as a failover or a restored backup does. No frame written from now on has an id
        that was given out before: a journal that is rewound and goes on within one millisecond is not told
        from one that was not, which the ids cannot help."""
        stream, states, saved = self.saved[number % len(self.saved)]
        live = live and self.backend.rewinds_live
        self._missed = True
        if not live:
            self._stop(graceful=False)
        streams = self.streams if stream is None else [stream]
        tokens = [run.token for each in streams for state in each.states for run in state.runs.values()]
        self.backend.restore(streams[0].name, list(set(tokens)), saved)
        for each, state in zip(streams, states, strict=True):
            each.become(state)
            self.backend.pass_ms(max([node.ms for node in each.nodes.values()], default=0))
        if not live:
            self._start()

    # Clients

    def add_client(self, stream: Stream, wish: Wish, token: str = "") -> None:
        """A client that was not here before."""
        client = Client(len(self.clients), stream, wish, token)
        self.clients.append(client)
        self.connect(client)

    def connect(self, client: Client) -> None:
        """Come, or come back."""
        client.connect(self.app, self.loop, self._last_quiet[client.stream.name])

    def gone_clients(self) -> Iterator[Client]:
        """Those that may come back."""
        return (client for client in self.clients if not client.connected)


def _cursor(node: Node) -> Cursor:
    return Cursor(node.seq, node.ms)
