"""The whole of one example: relay in this process over a real journal, its model, and its clients."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

import orjson
from model.backends import Backend
from model.client import Client, Violation, Wish
from model.plain_list import TEXT_BYTES, UNTOLD_MS, Farewell, ModelRun, Node, Said, State, Stream
from model.steered import SteeredJournal, SteeredLoop

from relay.app import App
from relay.cursor import ORIGIN, Cursor
from relay.errors import (
    Fenced,
    JournalError,
    RunEnded,
    RunExists,
    SequenceGap,
    StreamBusy,
    StreamSealed,
    UnknownRun,
    UnknownStream,
)
from relay.frame import CONTROL_EVENT, Event, Frame
from relay.journal.base import (
    Append,
    Appended,
    Ended,
    Held,
    Journal,
    Opened,
    RunOpening,
    RunState,
    StreamTop,
    TakenOver,
)
from relay.lifecycle import Ending, Reason, Status, ending
from relay.limits import Retention
from relay.settings import Settings

T = TypeVar("T")

ANSWER = '{"status":200,"headers":[["content-type","text/event-stream"]]}'
DEFAULT_RETENTION = Retention()
ERROR_EVENT = Event("error", b"it is over")
ERROR_EVENTS = {"wordy": ERROR_EVENT}
"""What dialects say of an ending; runs are of this one, or of none."""
COMPLETED = ending(Reason.PRODUCER_END)
SUPERSEDED = ending(Reason.SUPERSEDED)
STREAM_DELETED = ending(Reason.STREAM_DELETED)
OWNER_LOST = ending(Reason.OWNER_LOST)


class World:
    """Streams, clients, and one relay after the other between them."""

    def __init__(
        self, backend: Backend, page_max_frames: int, ring_max_frames: int, rewind_grace_s: float, seed: int
    ) -> None:
        self.backend = backend
        self.loop = SteeredLoop()
        self.streams = [Stream("one"), Stream("two")]
        self.clients: list[Client] = []
        self.saved: list[tuple[Stream | None, list[State], Any]] = []
        self.choice = random.Random(seed)
        self._names = 0
        self._page_max_frames = page_max_frames
        self._settings = Settings(
            group_ms=0,
            compress="always",
            ring_max_frames=ring_max_frames,
            ring_max_bytes=200_000,
            rings_max_bytes=300_000,
            rewind_grace_s=rewind_grace_s,
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
        self.journal = SteeredJournal(
            self.backend.journal(), self._page_max_frames, self._barrier, self._hear
        )
        self.app = App(self._settings, self.journal)  # type: ignore[arg-type]
        self.loop.run(self._start_journal())
        if self.backend.of_one_process:
            for stream in self.streams:
                self._bury_orphans(stream)

    def _hear(self, stream: str, frames: Sequence[Frame]) -> None:
        for one in self.streams:
            if one.name == stream:
                for frame in frames:
                    one.hear(frame)

    async def _start_journal(self) -> None:
        await self.journal.start(self.app.tails, self.app.owned)
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
            await self.inner.append(Append(self._barrier, "b", "w", self._barriers, [Event("", b"")]))
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
            # Nothing was kept from relay, so it needs no second look to have served everybody. Only what a
            # client has and the journal has not is waited for.
            self._check_served(but_ahead=True)
        self.pass_time(2.5)  # pauses after failures
        self.check_quiet()
        self.settle()
        self.pass_time(0.5)
        for _ in range(2):  # what is lost may come back: relay waits, and finds it no more, then looks again
            self.pass_time(self._settings.rewind_grace_s)
            self.pass_time(0.5)
        self.check_journal()
        self._check_served()
        self._missed = False
        for client in self.clients:
            client.since = len(client.stream.states) - 1
        for stream in self.streams:
            self._last_quiet[stream.name] = len(stream.states) - 1

    def _check_served(self, *, but_ahead: bool = False) -> None:
        for client in self.clients:
            if not (but_ahead and client.is_ahead):
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

    def _journaled(self, stream: Stream, said: Sequence[Said]) -> list[Node]:
        """Read what the journal has after what the list has: exactly this."""
        head = stream.now.head
        page = self.loop.run(self.inner.read(stream.name, _cursor(head), 1000, 1 << 24))
        seq = head.seq if head else 0
        if page.extent.top.seq != seq + len(said):
            raise self._broken(f"{stream.name} goes on after {head} with {page.frames}, not {said}")
        found = {frame.seq: frame for frame in page.frames}
        nodes = []
        for run, event, data in said:
            seq += 1
            frame = found.get(seq)
            as_bytes = data if isinstance(data, bytes) else orjson.dumps(data)
            if frame is None and seq >= page.extent.earliest_seq:
                raise self._broken(f"{stream.name} does not hold {seq}")
            if frame is not None and (frame.run, frame.event, frame.data) != (run, event, as_bytes):
                raise self._broken(f"{stream.name} has {frame} where {run} {event} {as_bytes!r} should be")
            # The frames of one step share their time, so that it is known of those that are trimmed already.
            head = stream.add(head, frame.ms if frame else page.extent.top.ms, run, event, as_bytes)
            nodes.append(head)
        return nodes

    def _become(self, stream: Stream, state: State) -> None:
        """The journal has changed to this, which keeps its promises and agrees with what it says of runs."""
        former = stream.now
        stream.become(state)
        broken = state.broken_promise()
        if broken:
            raise self._broken(f"{stream.name}: {broken}")
        runs = [(stream.name, name) for name in state.runs]
        expected = [
            RunState(*(run.ended[:2] if run.ended else (Status.OPEN, "")), run.writer, _cursor(run.last))
            for run in state.runs.values()
        ]
        found = list(self.loop.run(self.inner.states(runs)))
        if found != expected:
            raise self._broken(f"{stream.name}: runs are {found}, not {expected}")
        for run in state.runs.values():
            if run is not former.runs.get(run.name):
                self._check_run(stream, run)

    def _check_run(self, stream: Stream, run: ModelRun) -> None:
        info = self.loop.run(self.inner.run(stream.name, run.name))
        found = (info.owner, info.dialect, info.superseded_by, info.start, info.frames, info.text_bytes)
        expected = (run.owner, run.dialect, run.superseded_by, _cursor(run.start), len(run.events))
        if found != (*expected, run.text_bytes):
            raise self._broken(f"{info} is not {run}")

    def open_run(
        self,
        stream: Stream,
        name: str,
        *,
        seal: bool = False,
        retention: Retention = DEFAULT_RETENTION,
        owner: str = "",
        dialect: str = "",
        supersedes: Sequence[str] = (),
        if_busy: str = "allow",
        unheard: bool = False,
    ) -> None:
        """Open a run, or be refused as the state says."""
        state = stream.now
        writer, token = self._fresh_name(), self._fresh_name()
        opening = RunOpening(
            stream.name,
            name,
            writer,
            token,
            retention,
            dialect=dialect,
            answer=ANSWER,
            seal=seal,
            owner=owner,
            supersedes=supersedes,
            if_busy=if_busy,
            error_events=ERROR_EVENTS,
        )
        known = state.runs.get(name)
        if known is not None:
            for other in (writer, *known.former):
                self._refused(stream, self.inner.open_run(replace(opening, writer=other)), RunExists)
            again = self._do(self.inner.open_run(replace(opening, writer=known.writer)))
            if again != known.opened:
                raise self._broken(f"opened again, {name} came to {again}, not {known.opened}")
            self._unchanged(stream)
            return
        named = [state.latest() if each == "latest" else each for each in supersedes]
        named = [each for each in named if each]
        refusal: type[Exception] | None = None
        if state.sealed:
            refusal = StreamSealed
        elif if_busy == "reject" and state.open_runs():
            refusal = StreamBusy
        elif not set(named) <= set(state.runs):
            refusal = UnknownRun
        if refusal is not None:
            self._refused(stream, self.inner.open_run(opening), refusal)
            return
        if if_busy == "supersede":
            named += state.open_runs()
        old = [run for run in state.runs.values() if run.name in named]
        if unheard:
            self._send_unheard(lambda: self.inner.open_run(opening))
        opened = self._do(self.inner.open_run(opening))
        said: list[Said] = []
        lengths: list[int] = []
        for run in old:
            if run.ended is None:
                said.append(_superseded(run.name, run.name, name))
                said += _ending(run, SUPERSEDED, by_others=True)
            lengths.append(len(said))
        before = len(said)
        started: dict[str, Any] = {"type": "run.started", "run": name}
        if dialect:
            started["dialect"] = dialect
        said.append(Said(name, CONTROL_EVENT, started))
        said += (_superseded(name, run.name, name) for run in old if run.ended is not None)
        nodes = self._journaled(stream, said)
        ended = [
            replace(
                run,
                last=run.last if run.ended else nodes[length - 1],
                ended=run.ended or SUPERSEDED,
                superseded_by=name,
            )
            for run, length in zip(old, lengths, strict=True)
        ]
        start, first = nodes[before].previous, nodes[before]
        after = state.others_since(old[0], [run.name for run in old]) if old else []
        expected = Opened(
            *(_cursor(start), _cursor(first), _cursor(nodes[-1])),
            tuple(run.name for run in sorted(old, key=lambda run: run.ended is not None)),
            len(after),
            opened.runs_after,
        )
        if opened != expected or set(opened.runs_after) != set(after):
            raise self._broken(f"opening {opening} came to {opened}, not {expected}, {set(after)}")
        if not state.exists:
            stream.lives += 1
            state = State(stream.lives, retention=retention)
        run = ModelRun(name, writer, token, start, nodes[-1], owner, dialect, seal, opened)
        self._become(stream, state.went_on(nodes[-1], *ended, run, sealed=seal))

    def append(
        self,
        stream: Stream,
        name: str,
        events: list[Event],
        repeat: int,
        ending: Ending | None,
        *,
        unheard: bool = False,
        error: bool = False,
    ) -> None:
        """Append, with so many of the run's last frames sent once more in front."""
        run = stream.now.runs[name]
        repeated = run.events[max(0, len(run.events) - repeat) :]
        first = run.next_seq - len(repeated)
        self._append(stream, run, first, (*repeated, *events), ending, unheard=unheard, error=error)

    def append_unnumbered(
        self, stream: Stream, name: str, events: list[Event], ending: Ending | None
    ) -> None:
        """Append frames that are journaled whatever was before."""
        self._append(stream, stream.now.runs[name], 0, tuple(events), ending)

    def repeat(self, stream: Stream, name: str) -> None:
        """The run's last append once more, as after a lost answer."""
        run = stream.now.runs[name]
        self._append(stream, run, *run.batch)

    def misbehave(self, stream: Stream, name: str) -> None:
        """Appends that no run takes, and all that its former writers may try."""
        run = stream.now.runs[name]
        batch = Append(stream.name, name, run.writer, run.next_seq + 1, [Event("", b"hole")])
        self._refused(stream, self.inner.append(batch), SequenceGap)
        for writer in (*run.former, "stale"):
            late = replace(batch, writer=writer, producer_seq=run.next_seq)
            self._refused(stream, self.inner.append(late), Fenced)
            self._refused(stream, self.inner.append(replace(late, producer_seq=0)), Fenced)
            end = replace(late, events=(), ending=COMPLETED)
            self._refused(stream, self.inner.append(end), Fenced)
            self._refused(stream, self.inner.hear_of(stream.name, name, writer), Fenced)

    def _append(
        self,
        stream: Stream,
        run: ModelRun,
        first: int,
        events: tuple[Event, ...],
        ending: Ending | None,
        *,
        unheard: bool = False,
        error: bool = False,
    ) -> None:
        state = stream.now
        duplicates = min(len(events), run.next_seq - first) if first else 0
        fresh = events[duplicates:]
        batch = Append(
            *(stream.name, run.name, run.writer, first, events, TEXT_BYTES * len(events)),
            ending=ending,
            error_event=ERROR_EVENT if error else None,
            acknowledged=_cursor(run.last if self.choice.random() < 0.5 else run.start),
        )
        if run.ended is not None and (fresh or (ending is not None and ending[:2] != run.ended[:2])):
            self._refused(stream, self.inner.append(batch), RunEnded)
            return
        if unheard and first:
            self._send_unheard(lambda: self.inner.append(batch))
        appended = self._do(self.inner.append(batch))
        grown = replace(run, events=(*run.events, *fresh))
        said = [Said(run.name, *event) for event in fresh]
        if ending is not None and run.ended is None:
            said += _ending(grown, ending, error=ERROR_EVENT if error else None)
            grown = replace(grown, ended=ending)
        nodes = self._journaled(stream, said)
        grown = replace(grown, last=nodes[-1] if nodes else run.last)
        expected = Appended(_cursor(grown.last), len(fresh), duplicates, grown.next_seq)
        if unheard and first:  # the second try finds some of it there, or all, or nothing
            appended = appended._replace(appended=len(fresh), duplicates=duplicates)
        if appended != expected:
            raise self._broken(f"an append of {batch} came to {appended}, not {expected}")
        if nodes:
            grown = replace(grown, batch=(first, events, ending) if first else (1, (), None))
            self._become(stream, state.went_on(nodes[-1], grown))

    def take_over(self, stream: Stream, name: str, *, unheard: bool) -> None:
        """Another writer for a run; the former one does not know yet."""
        run = stream.now.runs[name]
        writer = self._fresh_name()

        def take_over() -> Coroutine[Any, Any, TakenOver]:
            return self.inner.take_over(stream.name, name, writer, 3600)

        if run.ended is not None:
            self._refused(stream, take_over(), RunEnded)
            return
        if unheard:
            self._send_unheard(take_over)
        taken = self._do(take_over())
        if taken != TakenOver(run.next_seq, _cursor(run.last)):
            raise self._broken(f"{run} was taken over with {taken}")
        self._journaled(stream, [])
        taken_over = replace(run, writer=writer, owner="", former=(*run.former, run.writer))
        self._become(stream, stream.now.went_on(stream.now.head, taken_over))

    def end_run(
        self, stream: Stream, name: str, ending: Ending, owner: str = "", *, unheard: bool = False
    ) -> None:
        """End a run whoever its writer is, if it is open, and owned so."""
        run = stream.now.runs[name]

        def end() -> Coroutine[Any, Any, Ended]:
            return self.inner.end_run(stream.name, name, ending, ERROR_EVENTS, owner=owner)

        ends = run.ended is None and owner in ("", run.owner)
        if unheard:
            self._send_unheard(end)
        ended = self._do(end())
        if not ends:
            known = run.ended[:2] if run.ended else (Status.OPEN, "")
            if ended[:3] != (False, *known):
                raise self._broken(f"{run} was not to be ended, and that came to {ended}")
            self._unchanged(stream)
            return
        if ended.by_this is False and not unheard:
            raise self._broken(f"{run} was not ended: {ended}")
        if (ended.status, ended.reason, ended.text_bytes) != (*ending[:2], run.text_bytes):
            raise self._broken(f"{run} was ended as {ending}, and that came to {ended}")
        if ended.by_this and ended.owner != run.owner:
            raise self._broken(f"{run} was ended, and its owner is said to be {ended.owner}")
        nodes = self._journaled(stream, _ending(run, ending, by_others=True))
        self._become(stream, stream.now.went_on(nodes[-1], replace(run, last=nodes[-1], ended=ending)))

    def kill_owner(self, owner: str) -> None:
        """A process dies, and what it owned is lost: as a reaper does it, that has it from the journal."""
        mine = {
            (stream.name, run.name)
            for stream in self.streams
            for run in stream.now.runs.values()
            if run.ended is None and run.owner == owner
        }
        if not self.backend.of_one_process:
            self._do(self._reindex())  # the indexes were not rewound with the streams
            self._do(self.inner.resign(owner))
            found = set(self._do(self.inner.owned(owner, 1000)))
            if not mine <= found:
                raise self._broken(f"{owner} owns {mine}, and only {found} is found")
            if mine and owner not in self._do(self.inner.lapsed_owners()):
                raise self._broken(f"{owner} owns {mine}, and is not found to be gone")
        for stream in self.streams:
            for name in list(stream.now.runs):
                self.end_run(stream, name, OWNER_LOST, owner)

    async def _reindex(self) -> None:
        place = await self.inner.reindex("", 1)
        while place:
            place = await self.inner.reindex(place, 1)

    def _bury_orphans(self, stream: Stream) -> None:
        """A journal of one process has just ended what the former one owned."""
        state = stream.now
        orphans = {run.name: run for run in state.runs.values() if run.ended is None and run.owner}
        if not orphans:
            return
        page = self.loop.run(self.inner.read(stream.name, _cursor(state.head), 1000, 1 << 24))
        buried = [orphans.pop(frame.run) for frame in page.frames]
        said = []
        for run, frame in zip(buried, page.frames, strict=True):
            error = json.loads(frame.data).get("error", "")
            said += _ending(run, OWNER_LOST._replace(error=error))
        nodes = self._journaled(stream, said)
        if orphans:
            raise self._broken(f"{list(orphans)} go on after their process")
        ended = [replace(run, last=node, ended=OWNER_LOST) for run, node in zip(buried, nodes, strict=True)]
        self._become(stream, state.went_on(state.head if not nodes else nodes[-1], *ended))

    def _send_unheard(self, make: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        """Ask, and lose the answer: whether it happens is open."""

        async def ask() -> None:
            asking = asyncio.ensure_future(make())
            for _ in range(self.choice.randrange(3)):
                await asyncio.sleep(0)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

        self._do(ask())

    def _refused(self, stream: Stream, work: Coroutine[Any, Any, Any], error: type[Exception]) -> None:
        try:
            result = self._do(work)
        except error:
            self._unchanged(stream)
            return
        raise self._broken(f"{error.__name__} was due, and it came to {result}")

    def _unchanged(self, stream: Stream) -> None:
        state = stream.now
        tops = self.loop.run(self.inner.tops([stream.name]))
        expected = {stream.name: StreamTop(_cursor(state.head), state.sealed)} if state.exists else {}
        if dict(tops) != expected:
            raise self._broken(f"nothing was to happen to {stream.name}, and it is at {tops}, not {expected}")

    # Operators

    def trim(self, stream: Stream, before_seq: int) -> None:
        """Drop frames before a seq."""
        self._do(self.inner.trim(stream.name, before_seq))
        stream.become(stream.now.trimmed(before_seq))

    def seal(self, stream: Stream) -> None:
        """Take no further run."""
        if not stream.now.exists:
            self._refused(stream, self.inner.seal(stream.name), UnknownStream)
            return
        self._do(self.inner.seal(stream.name))
        self._become(stream, stream.now.went_on(stream.now.head, sealed=True))

    def delete(self, stream: Stream) -> None:
        """Remove a stream. The endings of its open runs are told, and can never be read."""
        self.settle()  # those of its last life have been told by now, if anybody followed
        state = stream.now
        ended = [run for run in state.runs.values() if run.ended is None]
        stream.farewells = []
        head = state.head
        for number, run in enumerate(ended):
            ((_, event, data),) = _ending(run, STREAM_DELETED)
            assert head is not None
            head = Farewell(head, head.seq + 1, UNTOLD_MS, run.name, event, orjson.dumps(data))
            stream.farewells.append(head)
            ended[number] = replace(run, last=head, ended=STREAM_DELETED)
        self._do(self.inner.delete(stream.name))
        if ended:
            stream.become(state.went_on(head, *ended))
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
        if live and self.choice.random() < 0.5:
            self.journal.replaced_at = self.loop.time()
        for each, state in zip(streams, states, strict=True):
            each.become(state)
            self.backend.pass_ms(max([node.ms for node in each.nodes.values()], default=0))
        if not live:
            self._start()

    def fail_over(self, number: int, *, slowly: bool) -> None:
        """The journal loses what came after a copy, and its writers put it back before relay gives up on it:
        nothing has happened to any reader. Left alone are states that writers cannot put back, and clients
        that are just being answered: relay reads for them what is there."""
        if not self.saved or not self.backend.rewinds_live or not self._settings.rewind_grace_s:
            return
        self.settle()
        stream, (then,), saved = self.saved[number % len(self.saved)]
        assert stream is not None
        lost = self._can_be_put_back(stream.now, then)
        answering = any(client.connected and not client.answered for client in self.clients)
        if not lost or answering or self.journal.holds_reads or self.journal.failures:
            return
        self._missed = True
        served = [(client, len(client.log)) for client in self.clients if client.has_everything_of(stream)]
        tokens = [run.token for state in stream.states for run in state.runs.values()]
        self.backend.restore(stream.name, list(set(tokens)), saved)
        self.journal.replaced_at = self.loop.time()
        if slowly:  # relay's links broke, and it looks at what there is, again and again; so do clients
            self.inside(lambda: self.app.tails.on_doubt(stream.name))
            for client in list(self.gone_clients()):
                # Who has less than the journal is served from that, and may be told that this is all.
                if client.stream is stream and client.position and client.position.seq > then.top:
                    self.connect(client)
            self.pass_time(0.3)
            self.pass_time(0.6)
        for opening, held in self._held_by_writers(stream, then, lost):
            if slowly:
                self.settle()
            self._do(self.inner.restore(opening, held))
            if self.choice.random() < 0.2:
                self._do(self.inner.restore(opening, held))
        self._become(stream, replace(stream.now, earliest=then.earliest if then.exists else 1).retained())
        self.check_journal()
        self.settle()
        for client, so_far in served:
            client.check_untold(so_far)

    @staticmethod
    def _can_be_put_back(now: State, then: State) -> list[Node]:
        """The frames after a former state, oldest first; none where more changed than they can tell."""
        lost = list(now.path())
        if then.head is not None:
            if then.head not in lost:
                return []
            lost = lost[: lost.index(then.head)]
        changed = any(
            (run.writer, run.owner) != (now.runs[name].writer, now.runs[name].owner)
            for name, run in then.runs.items()
            if name in now.runs
        )
        sealed = then.sealed or any(run.seals for name, run in now.runs.items() if name not in then.runs)
        told = any(node.is_control and b"run.superseded" in node.data for node in lost)
        if changed or told or sealed != now.sealed or (then.exists and then.life != now.life):
            return []
        return lost[::-1]

    def _held_by_writers(
        self, stream: Stream, then: State, lost: Sequence[Node]
    ) -> Iterator[tuple[RunOpening, Held]]:
        sent = {name: len(run.events) for name, run in then.runs.items()}
        error: Node | None = None
        for node in lost:
            run = stream.now.runs[node.run]
            opening = RunOpening(
                *(stream.name, run.name, run.writer, run.token, stream.now.retention),
                dialect=run.dialect,
                answer=ANSWER,
                owner=run.owner,
                seal=run.seals,
            )
            event = Event(node.event, node.data)
            count = sent.get(run.name)
            if count is None:
                sent[run.name] = 0
                yield opening, Held(_cursor(node), 0, [event], 0)
            elif node.is_terminal:
                said = None if error is None else Event(error.event, error.data)
                yield opening, Held(_cursor(error or node), count + 1, (), 0, said, run.ended)
                error = None
            elif count == len(run.events):
                error = node
            else:
                sent[run.name] += 1
                yield opening, Held(_cursor(node), count + 1, [event], TEXT_BYTES)

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


def _cursor(node: Node | None) -> Cursor:
    return Cursor(node.seq, node.ms) if node else ORIGIN


def _superseded(said_by: str, run: str, by: str) -> Said:
    return Said(said_by, CONTROL_EVENT, {"type": "run.superseded", "run": run, "by": by})


def _ending(run: ModelRun, how: Ending, *, by_others: bool = False, error: Event | None = None) -> list[Said]:
    """The last frames of a run. Who ends another's run says so in its dialect, if that has words for it."""
    if by_others:
        error = ERROR_EVENTS.get(run.dialect)
    said = [] if error is None else [Said(run.name, *error)]
    ended: dict[str, Any] = {"type": "run.ended", "run": run.name, "status": how.status, "reason": how.reason}
    if how.error:
        ended["error"] = how.error
    ended |= {"frames": len(run.events), "text_bytes": run.text_bytes}
    return [*said, Said(run.name, CONTROL_EVENT, ended)]
