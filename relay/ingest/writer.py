"""The writer: one run's way into the journal, through outages, retries and journals that forget."""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

import orjson

from relay.counts import PROXIED, Counts
from relay.cursor import ORIGIN, Cursor
from relay.errors import Diverged, Fenced, JournalError, Rewound, RunEnded
from relay.frame import CONTROL_EVENT, Event, Frame, run_started
from relay.journal.base import Append, Appended, Held, Journal, Opened, RunOpening
from relay.lifecycle import Ending
from relay.settings import Settings

log = logging.getLogger("relay.writer")

RETRY_FIRST_S = 0.05
RETRY_MOST_S = 1.0

TURN_WAIT_S = 0.25
TURN_PAUSE_S = 0.005
"""How long, and how often, a writer that puts frames back looks for those of another process that come
before. Runs that took turns when they wrote take turns again, frame by frame."""

HELD_FRAME_BYTES = 256
"""What a held frame counts beside its data, so that many small ones are bounded too."""

# A held append is one plain tuple of plain values: the seq of the run's frame before it, the id of its last
# frame, the producer sequence, the bytes of text, its size, when it was accepted, then event names and data
# in turn. The collector forgets such tuples, where it would visit named ones again and again.
_BEFORE, _LAST_SEQ, _MS, _PRODUCER_SEQ, _TEXT_BYTES, _SIZE, _AT, _EVENTS = range(8)


class HeldMemory:
    """What all writers of a process hold together, and may hold; and which of them hold something.

    `seen` says up to which seq this process has seen a stream, whoever wrote it."""

    def __init__(self, max_bytes: int, seen: Callable[[str], int] = lambda stream: 0) -> None:
        self.max_bytes = max_bytes
        self.seen = seen
        self.bytes = 0
        self._writers: dict[str, list[RunWriter]] = {}

    def writers(self, stream: str) -> Sequence[RunWriter]:
        """The writers that may hold frames of a stream."""
        return tuple(self._writers.get(stream, ()))

    def add(self, writer: RunWriter) -> None:
        """It begins to hold."""
        self._writers.setdefault(writer.stream, []).append(writer)

    def discard(self, writer: RunWriter) -> None:
        """It is done."""
        writers = self._writers.get(writer.stream, [])
        if writer in writers:
            writers.remove(writer)
            if not writers:
                del self._writers[writer.stream]


class RunWriter:
    """Appends to one open run.

    Numbers its frames, so that every append can be repeated after an unknown outcome and is journaled once.
    If the run has an owner, it holds what was accepted last, and puts it back under the same ids into a
    journal that lost it. The producer of a run without one still has what it sent.

    `acknowledged` is the id of the run's newest frame as far as the journal told, `ended` the ending it took.
    A writer that does not begin its run is told where the run stands by setting `next_seq` and
    `acknowledged`. `release` it in the end. What it does is counted as of `source`.
    """

    def __init__(
        self,
        journal: Journal,
        opening: RunOpening,
        settings: Settings,
        memory: HeldMemory,
        counts: Counts | None = None,
        source: str = PROXIED,
    ) -> None:
        self.stream = opening.stream
        self.run = opening.run
        self.next_seq = 1
        self.acknowledged = ORIGIN
        # Not asked for with every frame: `get_running_loop` is a system call.
        self._now = asyncio.get_running_loop().time
        self.heard_at = self._now()
        """When the journal last took something of the run, on the loop's clock."""
        self.ended: Ending | None = None
        self.lost = False
        self._journal = journal
        self._opening = opening
        self._settings = settings
        self._memory = memory
        self.counts = counts or Counts()
        self._source = source
        self._held: deque[tuple[Any, ...]] = deque()
        self._held_bytes = 0
        self._last_words: Event | None = None
        self._rewound_at: float | None = None

    @property
    def token(self) -> str:
        """The fencing token."""
        return self._opening.writer

    def opened(self, opened: Opened) -> Frame | None:
        """The run was opened. The frame that says so, unless others came with it of which only the journal
        knows what they say."""
        self.acknowledged = opened.last
        if self._opening.owner:
            self._memory.add(self)
        if opened.last != opened.first:
            return None
        opening = self._opening
        metadata = orjson.loads(opening.metadata) if opening.metadata else None
        data = run_started(opening.run, opening.dialect or None, metadata)
        self._hold(0, opened.last, 0, (Event(CONTROL_EVENT, data),), 0, 0)
        return Frame(*opened.first, opening.run, CONTROL_EVENT, data)

    async def append(
        self,
        events: Sequence[Event],
        text_bytes: int = 0,
        dialect: str = "",
        ending: Ending | None = None,
        error_event: Event | None = None,
        answer: str = "",
    ) -> Appended:
        """Journal events, and the run's ending with them if one is given; the rest is as in `Append`.

        While the journal is away this waits and tries again, which holds upstream back too. After the
        deadline the last `JournalError` is raised; `Fenced` and `RunEnded` at once. `Diverged` says that the
        journal lost frames which cannot be put back: then nothing is taken any more but an ending.
        """
        pause_s = RETRY_FIRST_S
        deadline: float | None = None
        again = False
        began = perf_counter()
        while True:
            batch = self._batch(events, text_bytes, dialect, ending, error_event, answer)
            try:
                try:
                    appended = await self._journal.append(batch)
                except Rewound as rewound:
                    appended = await self._append_behind(batch, rewound)
                self._note(batch, appended, again)
                self.counts.appended(self._source, events, appended.appended, perf_counter() - began)
                return appended
            except Diverged:
                raise
            except Rewound:
                pass  # for how long is `put_back`'s to say
            except (Fenced, RunEnded):
                self.counts.fenced_appends += 1
                raise
            except JournalError as error:
                again = True
                now = self._now()
                if deadline is None:
                    deadline = now + self._settings.journal_deadline_s
                    log.warning("journal away stream=%s run=%s: %s", self.stream, self.run, error)
                if now >= deadline:
                    raise
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(pause_s * 2, RETRY_MOST_S)

    async def append_once(
        self,
        events: Sequence[Event],
        text_bytes: int = 0,
        dialect: str = "",
        ending: Ending | None = None,
        error_event: Event | None = None,
        answer: str = "",
    ) -> Appended:
        """Try once. After a `JournalError` the same events must be given again, before any others."""
        batch = self._batch(events, text_bytes, dialect, ending, error_event, answer)
        began = perf_counter()
        try:
            appended = await self._journal.append(batch)
        except Rewound as rewound:
            appended = await self._append_behind(batch, rewound)
        self._note(batch, appended, again=False)
        self.counts.appended(self._source, events, appended.appended, perf_counter() - began)
        return appended

    def _batch(
        self,
        events: Sequence[Event],
        text_bytes: int,
        dialect: str,
        ending: Ending | None,
        error_event: Event | None,
        answer: str,
    ) -> Append:
        if self.lost and events:
            raise Diverged("The journal lost frames of this run before.")
        return Append(
            self.stream, self.run, self._opening.writer, self.next_seq, events, text_bytes, dialect, ending,
            error_event, answer, self.acknowledged,
        )  # fmt: skip

    async def _append_behind(self, batch: Append, rewound: Rewound) -> Appended:
        """Append once more, behind what the journal lost."""
        await self.put_back(rewound.extra["last_seq"])
        return await self._journal.append(batch)

    def _note(self, batch: Append, appended: Appended, again: bool) -> None:
        """The journal has it. `again` says that it may have had it from an earlier try."""
        self._rewound_at = None
        if batch.dialect and batch.dialect != self._opening.dialect:
            self._opening = replace(self._opening, dialect=batch.dialect)
        if batch.answer:
            self._opening = replace(self._opening, answer=batch.answer)
        before = self.acknowledged.seq
        self.acknowledged, count, _, self.next_seq = appended
        own = 0
        if batch.ending is not None:
            self.ended = batch.ending
            self._last_words = batch.error_event
            own = 1 if batch.error_event is None else 2
        events = batch.events
        if count == len(events) or (again and not count):
            if before and (events or own):
                self._hold(before, appended.last, batch.producer_seq, events, batch.text_bytes, own)
        else:
            self._let_go()  # it is not known under which ids the duplicates stand

    # What is held

    def _hold(
        self,
        before: int,
        last: Cursor,
        producer_seq: int,
        events: Sequence[Event],
        text_bytes: int,
        own: int,
    ) -> None:
        """Keep an append of which `own` frames, behind its events, are relay's."""
        if not self._opening.owner:
            return
        size = HELD_FRAME_BYTES * (len(events) + own)
        flat: list[Any] = []
        for event in events:
            size += len(event.data)
            flat += event
        now = self.heard_at = self._now()
        self._held.append((before, *last, producer_seq, text_bytes, size, now, *flat))
        self._held_bytes += size
        self._memory.bytes += size
        self.expire(now)

    def expire(self, now: float) -> None:
        """Let go what is held beyond a bound; `now` is on the loop's clock."""
        held, settings, memory = self._held, self._settings, self._memory
        while held and (
            self._held_bytes > settings.held_max_bytes
            or memory.bytes > memory.max_bytes
            or now - held[0][_AT] >= settings.held_s
        ):
            size = held.popleft()[_SIZE]
            self._held_bytes -= size
            memory.bytes -= size

    def release(self) -> None:
        """Hold nothing any more: the writer is done."""
        self._memory.discard(self)
        self._let_go()

    def _let_go(self) -> None:
        self._held.clear()
        self._memory.bytes -= self._held_bytes
        self._held_bytes = 0

    async def put_back(self, last_seq: int) -> None:
        """Put back what the journal lost of this run, which is everything after its frame `last_seq`, and
        what other writers here hold of its stream: what is appended later takes the place of nothing then.

        Raises `Rewound` while frames of other runs in between are missing: try again. Raises `Diverged` when
        it cannot be done, or not in time; then this writer takes nothing more but an ending. Raises
        `JournalError`, `Fenced`, `RunEnded` too."""
        now = self._now()
        if self._rewound_at is None:
            self._rewound_at = now
            self.counts.journal_rewinds += 1
            log.warning("journal rewound stream=%s run=%s seq=%d", self.stream, self.run, last_seq)
        lost = [kept for kept in self._held if kept[_LAST_SEQ] > last_seq]
        if lost and lost[0][_BEFORE] <= last_seq:
            try:
                await self._restore(lost)
            except Diverged:
                pass
            except Rewound:
                if now - self._rewound_at < self._settings.rewind_grace_s:
                    raise
            else:
                self._rewound_at = None
                log.warning("frames put back stream=%s run=%s", self.stream, self.run)
                return
        self.lost = True
        self.next_seq = 0
        self.acknowledged = ORIGIN
        self._let_go()
        raise Diverged("The journal lost frames that it had accepted.", last_seq=last_seq)

    async def _restore(self, lost: Sequence[tuple[Any, ...]]) -> None:
        top = (await self._journal.tops([self.stream])).get(self.stream)
        beyond = 0 if top is None else top.id.seq
        pieces = [(self, kept) for kept in lost]
        for writer in self._memory.writers(self.stream):
            if writer is not self:
                pieces += [(writer, kept) for kept in writer._held if kept[_LAST_SEQ] > beyond]
        pieces.sort(key=lambda piece: piece[1][_LAST_SEQ])
        for writer, kept in pieces:
            try:
                await self._restore_in_turn(writer._opening, writer._as_held(kept))
            except (Diverged, Fenced, RunEnded):
                if writer is self:
                    raise  # the others find out by themselves
        await self._let_others_finish()

    async def _restore_in_turn(self, opening: RunOpening, held: Held) -> None:
        until = self._now() + TURN_WAIT_S
        while True:
            try:
                await self._journal.restore(opening, held)
                return
            except Diverged:
                raise
            except Rewound:
                if self._now() >= until:
                    raise
            await asyncio.sleep(TURN_PAUSE_S)

    async def _let_others_finish(self) -> None:
        """Wait for frames of other processes that were seen here and are missing behind ours, as long as they
        may come back: what is appended before would take their place."""
        pause_s = TURN_PAUSE_S
        while self._rewound_at is not None and self._now() - self._rewound_at < self._settings.rewind_grace_s:
            top = (await self._journal.tops([self.stream])).get(self.stream)
            if top is not None and top.id.seq >= self._memory.seen(self.stream):
                return
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, TURN_WAIT_S)

    def _as_held(self, kept: tuple[Any, ...]) -> Held:
        values = iter(kept[_EVENTS:])
        events = [Event(event, data) for event, data in zip(values, values, strict=True)]
        ending = self.ended if kept[_LAST_SEQ] == self.acknowledged.seq else None
        last_words = None if ending is None else self._last_words
        frames = len(events) + (ending is not None) + (last_words is not None)
        first = Cursor(kept[_LAST_SEQ] - frames + 1, kept[_MS])
        return Held(first, kept[_PRODUCER_SEQ], events, kept[_TEXT_BYTES], last_words, ending)
