"""Tails: the recent frames of followed streams, held once per process and shared by every reader here.

The journal's follow messages are hints. A tail takes a batch only when it begins exactly where the tail
ends; anything else is a doubt, and the tail reads the journal from its own end on. So what a tail holds is
always an unbroken piece of the journal, and a reader needs nothing but its cursor to go from pages of the
journal to the tail.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Coroutine, Hashable, Mapping, Sequence
from typing import Any, Protocol

from relay.counts import Counts
from relay.cursor import ORIGIN, Cursor, Standing, judge
from relay.errors import RelayError, UnknownStream
from relay.frame import CONTROL_EVENT, Frame, is_opening, is_terminal
from relay.journal.base import Journal
from relay.limits import PAGE_MAX_BYTES, PAGE_MAX_FRAMES
from relay.replay.pages import Pages
from relay.replay.sink import Deflater, GzipSink, Sink
from relay.replay.view import Chunk, View, chunk
from relay.settings import Settings
from relay.sse import encode_wire

log = logging.getLogger("relay.tail")

WRITE_MAX_BYTES = 256 * 1024
"""Data bytes joined into one write. Bounds what one stalled reader holds."""

LINGER_S = 5.0
"""A tail without readers is kept so long: a reader that was cut comes back to a warm ring."""

UNSETTLED_MAX_BATCHES = 256
"""Batches kept aside while the journal is read; what comes beyond that is read from the journal too."""

RETRY_S = 0.25
"""Pause before a doubt that the journal could not settle is put to it again; doubled up to the next one."""

RETRY_MAX_S = 2.0

ASKED_AT_ONCE = 200
"""Streams whose ends the journal is asked for at once."""

QUIET_CHECK_STRETCH = 8
"""So many times `quiet_check_s` lie between two checks of a stream that has long been quiet."""

FLUSH_EVERY_MAX_S = 0.1
"""A flush to many readers takes a while. Frames that come faster than they can be written one by one are
written in ever larger pieces, at most so far apart, so that writing leaves most of the loop to others."""


class Sleeper(Protocol):
    """Somebody who waits for news of a stream."""

    def wake(self) -> None:
        """There is news, or something else to do. Must not block; may be called when awake."""


class Follower(Sleeper, Protocol):
    """A reader that stands at the end of a tail. Who is woken follows no more, until it asks again."""

    cohort: Cohort | None


class Cohort:
    """Readers that stand at one position and are shown one view: what comes next is looked up once for all,
    written to one after the other, and their tasks sleep on."""

    def __init__(self, view: View, position: Cursor, written_at: float) -> None:
        self.view = view
        self.position = position
        self.written_at = written_at
        self.members: dict[Follower, Sink] = {}

    @property
    def key(self) -> Hashable:
        """What its members have in common."""
        return self.view.key, self.position.seq, type(self)

    def take_in(self, members: Mapping[Follower, Sink]) -> None:
        """Let others that stand here be of it."""
        self.members |= members
        for member in members:
            member.cohort = self

    def write(self, data: bytes) -> Sequence[Follower]:
        """Send data to each; those that take no more for now."""
        return [member for member, sink in self.members.items() if not sink.write(data)]


class GzipCohort(Cohort):
    """One whose members all have gzip sinks, and who were all sent what its deflater has seen."""

    members: dict[Follower, GzipSink]  # type: ignore[assignment]
    _deflater: Deflater | None = None

    def take_in(self, members: Mapping[Follower, Sink]) -> None:
        """As any cohort."""
        super().take_in(members)
        self._deflater = None

    def write(self, data: bytes) -> Sequence[Follower]:
        """As any cohort."""
        self._deflater = self._deflater or Deflater()
        blocks = self._deflater.deflate(data)
        return [member for member, sink in self.members.items() if not sink.write_deflated(blocks, data)]


class Patience:
    """Waits for a journal that has less than was read from it. After a failover the writers put back what it
    lost, under the same ids, and then nothing has happened to any reader."""

    def __init__(self, tails: Tails) -> None:
        self._tails = tails
        self._behind_since: float | None = None

    def waits_while(self, behind: bool) -> bool:
        """Whether the journal is behind, and has not been for longer than `rewind_grace_s`."""
        now = self._tails.now()
        if not behind:
            self._behind_since = None
        elif self._behind_since is None:
            self._behind_since = now
        return behind and now - (self._behind_since or now) < self._tails.settings.rewind_grace_s


class Tail:
    """The newest frames of one stream. `top` is the last id known here."""

    def __init__(self, stream: str, tails: Tails) -> None:
        self.stream = stream
        self.top = ORIGIN
        self.known = False
        """Whether the journal has told where the stream stands; before that the tail holds nothing."""
        self.deleted = False
        self.expected = False
        """Whether `opened` is about to tell where the stream stands: then nobody need ask."""
        self._closed = False
        self.generation = 0
        """Counts the times the journal was found to be another than the one read before."""
        self.readers = 0
        self.active_at = 0.0
        self.check_at = 0.0
        """Not to be compared with the journal before, if it stays quiet."""
        self._tails = tails
        self._sealed = False
        self._open_runs: set[str] = set()
        self._floor = ORIGIN  # the id just before the first frame held
        self._frames: list[Frame] = []
        self._wires: list[bytes] = []
        self._bytes = 0
        self._chunks: dict[tuple[object, int], Chunk] = {}
        self._chunk_bytes = 0
        self._waiting: set[Sleeper] = set()
        self._cohorts: dict[Hashable, Cohort] = {}
        self._unsettled: list[tuple[Cursor, Sequence[Frame]]] = []
        self._doubted = False
        self._sealing_doubted = False
        self._settling: asyncio.Task[None] | None = None
        self._patience = Patience(tails)
        self._flush_timer: asyncio.TimerHandle | None = None
        self._flush_due = 0.0
        self._flushed_seq = 0
        self.idle_timer: asyncio.TimerHandle | None = None

    @property
    def finished(self) -> bool:
        """Nothing more will come: sealed, and no run is open."""
        return self.known and self._sealed and not self._open_runs

    @property
    def sealed(self) -> bool:
        """Whether the stream is known to take no further run."""
        return self._sealed

    def run_is_open(self, run: str) -> bool | None:
        """Whether a run is open, as far as the frames told; None while that is not known."""
        return run in self._open_runs if self.known else None

    # What readers do

    def next_chunk(self, view: View, position: Cursor) -> Chunk | None:
        """The encoded frames after `position`, one write's worth; None when the tail does not hold them."""
        first = position.seq - self._floor.seq
        if not 0 <= first < len(self._frames):
            return None
        if position.ms != (self._floor if first == 0 else self._frames[first - 1]).ms:
            return None
        key = (view.key, position.seq)
        found = self._chunks.get(key)
        if found is None:
            last = self._write_end(first)
            found = chunk(view, self._frames[first:last], self._wires[first:last])
            self._keep_chunk(key, found)
        return found

    def _keep_chunk(self, key: tuple[object, int], found: Chunk) -> None:
        """Share what was encoded; readers at many different positions must not make it grow."""
        size = len(found.data)
        if self._chunk_bytes + size > self._tails.settings.ring_max_bytes:
            self._drop_chunks()
        self._chunks[key] = found
        self._chunk_bytes += size
        self._tails.hold(size)
        self._tails.make_room(self)

    def wait(self, sleeper: Sleeper) -> None:
        """Wake `sleeper` once, when there is news."""
        self._waiting.add(sleeper)

    def stop_waiting(self, sleeper: Sleeper) -> None:
        """`sleeper` is not to be woken any more."""
        self._waiting.discard(sleeper)

    def follow(self, follower: Follower, view: View, position: Cursor, sink: Sink) -> None:
        """Write to the sink of `follower`, who has all there is, what comes. Wakes it when that does not
        suffice."""
        kind = GzipCohort if isinstance(sink, GzipSink) else Cohort
        cohort = kind(view, position, self._tails.now())
        cohort = self._cohorts.setdefault(cohort.key, cohort)
        cohort.take_in({follower: sink})

    def unfollow(self, follower: Follower) -> None:
        """Pass nothing on to it any more."""
        cohort = follower.cohort
        assert cohort is not None
        follower.cohort = None
        del cohort.members[follower]
        if not cohort.members and self._cohorts.get(cohort.key) is cohort:
            del self._cohorts[cohort.key]

    def _write_end(self, first: int) -> int:
        size = 0
        for index in range(first, len(self._wires)):
            size += len(self._wires[index])
            if size >= WRITE_MAX_BYTES:
                return index + 1
        return len(self._wires)

    # What the journal tells

    def on_frames(self, previous: Cursor, frames: Sequence[Frame]) -> None:
        """Take a batch that continues the tail; doubt anything else that is not a plain repetition."""
        if self._settling is not None:
            if len(self._unsettled) < UNSETTLED_MAX_BATCHES:
                self._unsettled.append((previous, frames))
            else:
                self._doubted = True
        elif not self.known:
            self.doubt()
        elif previous == self.top:
            self._take(frames)
        elif not self._holds(frames[-1]):
            self.doubt()

    def on_deleted(self) -> None:
        """The stream is gone: readers take what is held here and leave."""
        self.deleted = self._closed = True
        if self._settling is not None:
            self._settling.cancel()
        self._wake()

    def doubt_sealing(self) -> None:
        """Ask the journal whether the stream takes further runs, and which are open: what is known of them
        here is as old as the last frame here, which may not be the stream's."""
        self._sealing_doubted = True
        self.doubt()

    def doubt(self) -> None:
        """Read the journal: something may have been missed."""
        if self._closed:
            return
        self._doubted = True
        if self._settling is None and not self.expected:
            self._settling = self._tails.spawn(self._settle())

    def opened(self, started: Frame, sealed: bool) -> None:
        """The stream was made just now, with this as its only frame, and maybe sealed."""
        self.expected = self._doubted = self._sealing_doubted = False
        self.known, self._sealed = True, sealed
        self._open_runs.add(started.run)
        self._take([started])
        self._flush_due = 0.0  # nobody waited for this frame; the next one is not to wait for others

    def no_longer_expected(self) -> None:
        """Whoever reads the stream first does not wait for `opened`."""
        self.expected = False
        if self._doubted:
            self.doubt()

    def _holds(self, frame: Frame) -> bool:
        index = frame.seq - self._floor.seq - 1
        return 0 <= index < len(self._frames) and self._frames[index].ms == frame.ms

    async def _settle(self) -> None:
        pause_s = RETRY_S
        try:
            while self._doubted:
                self._doubted = False
                try:
                    async with self._tails.pages.slots:
                        caught_up = await self._read_journal()
                    if not caught_up:
                        self._doubted = True
                        await asyncio.sleep(RETRY_S)
                except RelayError as error:
                    if pause_s == RETRY_S:
                        log.warning("stream=%s cannot be checked: %s", self.stream, error)
                    self._doubted = True
                    await asyncio.sleep(pause_s)
                    pause_s = min(pause_s * 2, RETRY_MAX_S)
        finally:
            self._settling = None
            unsettled, self._unsettled = self._unsettled, []
        for previous, frames in unsettled:
            self.on_frames(previous, frames)

    async def _read_journal(self) -> bool:
        """Take what the journal has beyond the tail. False while it has less, and may get it back."""
        journal = self._tails.journal
        try:
            if not self.known:
                await self._restart(count=False)
                return True
            self._unsettled.clear()  # What was told before the journal is asked is in its answer.
            self._tails.counts.journal_pages += 1
            page = await journal.read(self.stream, self.top, PAGE_MAX_FRAMES, PAGE_MAX_BYTES)
        except UnknownStream:
            if self._patience.waits_while(self.known and self.top != ORIGIN):
                return False
            self._lost()
            return True
        standing = judge(self.top, page.extent, page.anchor_ms)
        if self._patience.waits_while(standing is Standing.AHEAD):
            return False
        if standing is Standing.HERE and not page.more:
            if page.frames:
                self._take(page.frames)
            if not self._sealing_doubted:
                return True
        # Too far behind to catch up in memory, not the journal read before, or changed in a way that no frame
        # tells: begin anew at its end.
        await self._restart(count=not standing.same_life)
        return True

    async def _restart(self, *, count: bool) -> None:
        self._unsettled.clear()
        info = await self._tails.journal.describe(self.stream)
        self._sealing_doubted = self._sealing_doubted and self._doubted  # told meanwhile: asked again
        self.forget()
        self.known = True
        self.top = self._floor = info.extent.top
        self._sealed = info.sealed
        self._open_runs = set(info.open_runs)
        if count:
            self.generation += 1
        self._wake()

    def _lost(self) -> None:
        # Not created yet, or gone with its journal.
        if self.known and self.top != ORIGIN:
            self.generation += 1
        self.forget()
        self.known, self.top, self._floor = True, ORIGIN, ORIGIN
        self._sealed = self._sealing_doubted = False
        self._open_runs.clear()
        self._wake()

    def forget(self) -> None:
        """Hold nothing any more: what a tail holds is in the journal too."""
        self._drop_chunks()
        self._drop_frames(len(self._frames))

    def _drop_chunks(self) -> None:
        self._tails.hold(-self._chunk_bytes)
        self._chunk_bytes = 0
        self._chunks.clear()

    def _drop_frames(self, count: int) -> None:
        """Drop the oldest frames held; readers that still want them read the journal."""
        if not count:
            return
        size = sum(map(len, self._wires[:count]))
        self._bytes -= size
        self._tails.hold(-size)
        self._floor = self._frames[count - 1].id
        del self._frames[:count]
        del self._wires[:count]

    def _take(self, frames: Sequence[Frame]) -> None:
        size = 0
        for frame in frames:
            wire = encode_wire(frame)
            size += len(wire)
            self._frames.append(frame)
            self._wires.append(wire)
            if frame.event == CONTROL_EVENT:
                self._note_control(frame)
        self._bytes += size
        self.top = frames[-1].id
        self._drop_chunks()
        self._tails.hold(size)
        self._shrink(len(frames))
        self._flush_soon()
        self._tails.make_room(self)

    def _note_control(self, frame: Frame) -> None:
        if is_terminal(frame):
            self._open_runs.discard(frame.run)
        elif is_opening(frame) and frame.run not in self._open_runs:
            self._open_runs.add(frame.run)
            if frame.seq == 1 and not self._sealed:
                # A stream that was made just now may have been made sealed, which no frame tells.
                self.known = False
                self.doubt()

    def _shrink(self, newest: int) -> None:
        settings = self._tails.settings
        if self._bytes <= settings.ring_max_bytes and len(self._frames) <= settings.ring_max_frames:
            return
        # Down to three quarters, so that shrinking is rare; the newest batch always stays.
        max_bytes = settings.ring_max_bytes * 3 // 4
        max_frames = settings.ring_max_frames * 3 // 4
        drop, held = 0, self._bytes
        while drop < len(self._frames) - newest and (
            held > max_bytes or len(self._frames) - drop > max_frames
        ):
            held -= len(self._wires[drop])
            drop += 1
        self._drop_frames(drop)

    # Passing on

    def _flush_soon(self) -> None:
        """The first frame after quiet is passed on at once; under load, those that come together are."""
        now = self.active_at = self._tails.now()
        self.check_at = 0.0
        if now >= self._flush_due:
            self._flush()
        elif self._flush_timer is None:
            self._flush_timer = self._tails.call_at(self._flush_due, self._flush)

    def _flush(self) -> None:
        """Pass on what is new to those that follow, and wake everybody else."""
        self._flush_timer = None
        began, group_s = self._tails.now(), self._tails.group_s
        if self.readers:
            self._note_delay()
        cohorts, self._cohorts = self._cohorts, {}
        for cohort in cohorts.values():
            self._pass_on(cohort)
        self._wake_sleepers()
        if group_s:
            took_s, came = self._tails.now() - began, self.top.seq - self._flushed_seq
            # Half of the loop's time at most; less the more frames a flush had.
            crowded_s = min(took_s * (1 + came / 2), FLUSH_EVERY_MAX_S)
            self._flush_due = began + max(group_s, crowded_s, took_s * 2)
        self._flushed_seq = self.top.seq

    def _note_delay(self) -> None:
        """How long the oldest of the new frames took from the journal to here. The journal's clock may be
        another host's, and ahead of ours."""
        oldest = max(0, self._flushed_seq - self._floor.seq)
        if oldest < len(self._frames):
            delay_s = time.time() - self._frames[oldest].ms / 1000
            self._tails.counts.delivery_delay.observe(max(0.0, delay_s))

    def _pass_on(self, cohort: Cohort) -> None:
        if cohort.position != self.top:
            found = self.next_chunk(cohort.view, cohort.position)
            if found is None or found.terminal is not None:
                _wake_members(cohort)
                return
            cohort.position = found.last
            if data := found.data:
                members, counts = len(cohort.members), self._tails.counts
                counts.ring_hits += members
                counts.frames_delivered += members * found.shown
                counts.delivered_bytes += members * len(data)
                cohort.written_at = self.active_at
                for behind in cohort.write(data):
                    behind.wake()
            if found.last != self.top or self.finished:
                _wake_members(cohort)
                return
        self._keep(cohort)

    def _keep(self, cohort: Cohort) -> None:
        there = self._cohorts.get(cohort.key)
        if there is not None:
            if len(there.members) > len(cohort.members):
                cohort, there = there, cohort
            cohort.take_in(there.members)
        self._cohorts[cohort.key] = cohort

    def _wake(self) -> None:
        """Wake everybody: what they stand at may not be what it was."""
        cohorts, self._cohorts = self._cohorts, {}
        for cohort in cohorts.values():
            _wake_members(cohort)
        self._wake_sleepers()

    def _wake_sleepers(self) -> None:
        waiting, self._waiting = self._waiting, set()
        for sleeper in waiting:
            sleeper.wake()

    def close(self) -> None:
        """Forget everything; the tail is not used any more."""
        self._closed = True
        self.forget()
        if self._flush_timer is not None:
            self._flush_timer.cancel()
        if self._settling is not None:
            self._settling.cancel()


def _wake_members(cohort: Cohort) -> None:
    for member in tuple(cohort.members):
        member.wake()


class Tails:
    """Every tail of this process, and the journal's follower. What readers get is counted in `counts`."""

    def __init__(self, journal: Journal, settings: Settings, counts: Counts | None = None) -> None:
        self.journal = journal
        self.settings = settings
        self.counts = counts or Counts()
        self.group_s = settings.group_ms / 1000
        self.held_bytes = 0
        self.pages = Pages(journal, self.counts)
        self._tails: dict[str, Tail] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False

    # Memory

    def hold(self, size: int) -> None:
        """Count bytes that a tail begins to hold, or holds no more."""
        self.held_bytes += size

    def make_room(self, newest: Tail) -> None:
        """Keep this process within its bound: tails that were quiet longest drop what they hold first, down
        to three quarters, so that this is rare. The batch that `newest` has just taken stays."""
        if self.held_bytes <= self.settings.rings_max_bytes:
            return
        for tail in sorted(self._tails.values(), key=lambda tail: tail.active_at):
            if tail is not newest:
                tail.forget()
            if self.held_bytes <= self.settings.rings_max_bytes * 3 // 4:
                return

    # Following

    def on_frames(self, stream: str, previous: Cursor, frames: Sequence[Frame]) -> None:
        """The journal's hint of an append."""
        tail = self._tails.get(stream)
        if tail is not None:
            tail.on_frames(previous, frames)

    def on_deleted(self, stream: str) -> None:
        """The journal's hint of a deletion. Who comes next gets a new tail."""
        tail = self._tails.pop(stream, None)
        if tail is not None:
            self.journal.unwatch(stream)
            tail.on_deleted()
            if not tail.readers:
                self._discard(tail)

    def on_sealed(self, stream: str) -> None:
        """The journal's hint that a stream was sealed."""
        tail = self._tails.get(stream)
        if tail is not None and not (tail.known and tail.sealed):
            tail.doubt_sealing()

    def on_doubt(self, stream: str) -> None:
        """The journal cannot promise that nothing was missed."""
        tail = self._tails.get(stream)
        if tail is not None:
            tail.doubt()

    async def check_quiet(self) -> None:
        """Compare streams that were quiet for a while with the journal: a lost hint shows here, and so does
        a tail that still waits to be told that it is followed. The longer one is quiet, the rarer it is."""
        now, quiet_s = self.now(), self.settings.quiet_check_s
        quiet = [
            tail for tail in self._tails.values() if tail.check_at <= now and tail.active_at <= now - quiet_s
        ]
        for first in range(0, len(quiet), ASKED_AT_ONCE):
            await self._check(quiet[first : first + ASKED_AT_ONCE])

    async def _check(self, quiet: Sequence[Tail]) -> None:
        now, longest_s = self.now(), self.settings.quiet_check_s * QUIET_CHECK_STRETCH
        for tail in quiet:
            tail.check_at = now + min(now - tail.active_at, longest_s)
        tops = await self.journal.tops([tail.stream for tail in quiet])
        for tail in quiet:
            if tail.active_at > now:
                continue
            top, sealed = tops.get(tail.stream, (ORIGIN, False))
            if not tail.known or top != tail.top:
                tail.doubt()
            elif sealed != tail.sealed:
                tail.doubt_sealing()

    # Holding

    def acquire(self, stream: str) -> Tail:
        """The stream's tail, kept until it is released as often as it was acquired."""
        tail = self._tails.get(stream)
        if tail is None:
            tail = self._make(stream)
        if tail.expected:
            tail.no_longer_expected()
        if tail.idle_timer is not None:
            tail.idle_timer.cancel()
            tail.idle_timer = None
        tail.readers += 1
        return tail

    def release(self, tail: Tail, sleeper: Sleeper) -> None:
        """Give a tail back; `sleeper` waited for it."""
        tail.stop_waiting(sleeper)
        tail.readers -= 1
        if tail.readers or self._closed:
            return
        if tail.deleted:
            self._discard(tail)
        elif self._tails.get(tail.stream) is tail:
            self._keep_idle(tail)

    def expect(self, stream: str) -> None:
        """A run is about to be opened here for somebody who will read it: follow its stream from now on, so
        that this takes no time of its own."""
        if stream not in self._tails:
            tail = self._make(stream)
            tail.expected = True
            self._keep_idle(tail)

    def opened(self, stream: str, started: Frame, sealed: bool) -> None:
        """The run was opened in a stream that was made with it: `started` is the stream's first frame."""
        tail = self._tails.get(stream)
        if tail is not None and tail.expected:
            tail.opened(started, sealed)

    def _make(self, stream: str) -> Tail:
        tail = self._tails[stream] = Tail(stream, self)
        tail.active_at = self.now()
        self.journal.watch(stream)
        return tail

    def _keep_idle(self, tail: Tail) -> None:
        tail.idle_timer = self.call_at(self.now() + LINGER_S, lambda: self._drop_idle(tail))

    def seen(self, stream: str) -> int:
        """Up to which seq a stream was seen here; 0 where nobody looks, or looked long ago."""
        tail = self._tails.get(stream)
        return 0 if tail is None else tail.top.seq

    def readers_of(self, stream: str) -> int:
        """How many readers of this process hold the stream."""
        tail = self._tails.get(stream)
        return 0 if tail is None else tail.readers

    def __len__(self) -> int:
        return len(self._tails)

    def _drop_idle(self, tail: Tail) -> None:
        if self._tails.get(tail.stream) is tail:
            del self._tails[tail.stream]
            self.journal.unwatch(tail.stream)
        self._discard(tail)

    def _discard(self, tail: Tail) -> None:
        if tail.idle_timer is not None:
            tail.idle_timer.cancel()
            tail.idle_timer = None
        tail.close()

    def close(self) -> None:
        """Drop every tail."""
        self._closed = True
        for tail in self._tails.values():
            self._discard(tail)
        self._tails.clear()

    # The loop

    def retry_ms(self) -> int:
        """How long a reader is told to wait before it comes back: jittered, so that not all come at once."""
        return round(self.settings.retry_ms * random.uniform(0.5, 1.5))

    def now(self) -> float:
        """Seconds on the loop's clock."""
        return self._running_loop().time()

    def call_at(self, when: float, callback: Callable[[], None]) -> asyncio.TimerHandle:
        """Call back at a time of the loop's clock."""
        return self._running_loop().call_at(when, callback)

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        # Kept, because before Python 3.12 asking for it is a system call, several times a frame.
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        return self._loop

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run a rare piece of work (never one per frame) beside the readers."""
        task = self._running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
