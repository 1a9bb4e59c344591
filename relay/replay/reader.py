"""A reader: one cursor that moves through a stream, from the journal's pages into the tail.

There is no handover between replay and live. Each turn of the loop asks the tail for what comes after the
cursor, and the journal where the tail does not hold it; waiting happens only when neither has anything. A
reader that waits so follows the tail, which writes to it what comes and lets its task sleep; only something
else than that wakes it.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from enum import StrEnum
from typing import NamedTuple, TypeVar

from relay.cursor import Cursor, Standing, judge
from relay.errors import CursorGone, JournalError, ResumeUnknown, UnknownRun, UnknownStream
from relay.frame import Frame
from relay.journal.base import Page, RunInfo
from relay.limits import PAGE_MAX_FRAMES
from relay.replay.pages import SharedPage
from relay.replay.sink import Sink
from relay.replay.tail import WRITE_MAX_BYTES, Cohort, Patience, Tail, Tails
from relay.replay.view import Chunk, View

Found = TypeVar("Found")

JOURNAL_RETRY_S = 0.25
"""Pause of a reader whose journal is away."""


class ReaderEnd(StrEnum):
    """Why a reader ended."""

    ENDED = "ended"
    CLIENT_CLOSED = "client_closed"
    SLOW = "slow"
    DRAIN = "drain"
    ROTATE = "rotate"
    REVOKED = "revoked"
    DELETED = "deleted"
    ERROR = "error"


class Lease(NamedTuple):
    """How long a reader may go on, on the loop's clock, and how it ends then."""

    until: float
    end: ReaderEnd


class Reader:
    """One subscribed client. A cursor, not a queue: it holds nothing but the write that is under way.

    `position` is the last id it has; `resumed` says whether the client presented it; `page` is what the
    journal said of it, None for a position that relay itself has just established. `ended_at` is the seq of
    the terminal frame of a run that has ended already.
    `lease` is None for one that cannot come back. `client` is the address of who reads.
    """

    def __init__(
        self,
        tails: Tails,
        stream: str,
        view: View,
        position: Cursor,
        page: SharedPage | None,
        *,
        resumed: bool = False,
        ended_at: int | None = None,
        lease: Lease | None = None,
        client: str = "",
    ) -> None:
        self.lease = lease
        self.client = client
        self.stream = stream
        self.view = view
        self.cohort: Cohort | None = None
        self.terminal: Frame | None = None
        self.heartbeat_due = False
        self.blocked_since: float | None = None
        self._position = position
        self._began_at_seq = position.seq
        self._written_at = self._began_at = tails.now()
        self._tails = tails
        self._tail: Tail | None = None
        self._page: SharedPage | None = page
        self._resumed = resumed
        self._ended_at = ended_at
        self._run_unsure = False  # whether the run's terminal frame may be among what was lost
        self._generation = 0
        self._told_live = False
        self._connected = False
        self._leaving: ReaderEnd | None = None
        self._sleep: asyncio.Future[None] | None = None
        self._sink: Sink | None = None
        self._patience = Patience(tails)

    @property
    def position(self) -> Cursor:
        """The id of the last frame it passed on, or over."""
        return self._position if self.cohort is None else self.cohort.position

    @property
    def written_at(self) -> float:
        """When something was written to it last, on the loop's clock."""
        return self._written_at if self.cohort is None else max(self._written_at, self.cohort.written_at)

    @property
    def lag(self) -> int:
        """How many frames of the stream, as far as this process knows it, come after the position."""
        return 0 if self._tail is None else max(0, self._tail.top.seq - self.position.seq)

    @property
    def passed(self) -> int:
        """How many frames it passed on, or over."""
        return max(0, self.position.seq - self._began_at_seq)

    @property
    def lasted_s(self) -> float:
        """How long ago it began."""
        return self._tails.now() - self._began_at

    # From outside

    def wake(self) -> None:
        """There may be something to do."""
        self._unfollow()
        if self._sleep is not None and not self._sleep.done():
            self._sleep.set_result(None)

    def leave(self, end: ReaderEnd) -> None:
        """End as soon as the write under way is over."""
        if self._leaving is None:
            self._leaving = end
        self.wake()

    # The loop

    async def run(self, sink: Sink) -> ReaderEnd:
        """Write everything from the cursor on until an end."""
        tail = self._tail = self._tails.acquire(self.stream)
        self._generation = tail.generation
        self._sink = sink
        try:
            end = await self._serve(tail, sink)
            self._say_goodbye(end)
            await self._until_taken(sink)
        finally:
            self._tails.release(tail, self)
        return end

    async def _serve(self, tail: Tail, sink: Sink) -> ReaderEnd:
        if self._page is not None:
            await self._say_hello(self._page)
            await self._show()
        self._connected = True
        while True:
            await self._until_taken(sink)
            if self._leaving is not None:
                return self._leaving
            if self.heartbeat_due:
                self.heartbeat_due = False
                self._write(self.view.heartbeat(self.position))
            if self._run_unsure:
                await self._find_run_again(tail)
                continue
            if self._ended_at is not None and self.position.seq >= self._ended_at:
                return ReaderEnd.ENDED
            if tail.generation == self._generation:
                found = tail.next_chunk(self.view, self.position)
                if found is not None:
                    self._tails.counts.ring_hits += 1
                    self._pass_on(found)
                    continue
                if tail.deleted:
                    return ReaderEnd.DELETED
                if tail.known and tail.top == self.position:
                    if tail.finished and self.view.run is None:
                        return ReaderEnd.ENDED
                    if not self._say_live():
                        await self._follow(tail, sink)
                    continue
            if tail.deleted:
                return ReaderEnd.DELETED
            try:
                generation = tail.generation
                page = await self._read_page()
            except UnknownStream:
                if self._waits_while(tail, True):
                    await self._wait(tail, JOURNAL_RETRY_S)
                    continue
                return ReaderEnd.DELETED
            except JournalError:
                await self._wait(tail, JOURNAL_RETRY_S)
                continue
            standing = self._standing(page)
            if self._waits_while(tail, standing is Standing.AHEAD):
                await self._wait(tail, JOURNAL_RETRY_S)
                continue
            self._generation = generation
            if page.frames or standing is not Standing.HERE:
                self._page = page
                del page  # or it would be held as long as the client does not take what is written of it
                await self._show()
                continue
            if page.extent.top.seq == self.position.seq:
                # After a loss the position has the right seq only; the tail goes by the exact id.
                self._position = page.extent.top
            if tail.generation != self._generation or tail.next_chunk(self.view, self.position) is not None:
                continue
            if not tail.known:
                if not self._say_live():
                    await self._wait(tail)
            elif tail.top != self.position:
                tail.doubt()
                await self._wait(tail, JOURNAL_RETRY_S)

    async def _read_page(self) -> SharedPage:
        return await self._tails.pages.read(self.stream, self.position, PAGE_MAX_FRAMES, WRITE_MAX_BYTES)

    def _waits_while(self, tail: Tail, behind: bool) -> bool:
        # A tail that began a new generation meanwhile has waited for the journal already.
        return self._patience.waits_while(behind and tail.generation == self._generation)

    async def _show(self) -> None:
        """Write the page read last, and before it what was lost, if anything was."""
        page, self._page = self._page, None
        assert page is not None
        standing = self._standing(page)
        if standing is not Standing.HERE:
            await self._say_loss(standing, page)
        # After a reset the page does not hold what comes next; the next turn reads it.
        if page.frames and page.frames[0].seq == self.position.seq + 1:
            found = page.chunk(self.view)
            del page  # a stalled client holds the bytes written, not the frames they were made of
            self._pass_on(found)

    def _pass_on(self, found: Chunk) -> None:
        if found.data:
            self._write(found.data)
            self._tails.counts.frames_delivered += found.shown
            self._tails.counts.delivered_bytes += len(found.data)
        self._position = found.last
        if found.terminal is not None:
            self.terminal = found.terminal
            self._ended_at = found.terminal.seq

    def _standing(self, page: Page) -> Standing:
        return judge(self.position, page.extent, page.anchor_ms)

    # Control frames of this connection

    async def _say_hello(self, page: Page) -> None:
        extent = page.extent
        hello = self.view.notice(
            "hello",
            self.position,
            stream=self.stream,
            cursor=str(self.position),
            earliest=await self._earliest(page),
            top=str(extent.top),
            resumed=self._resumed and self._standing(page) is Standing.HERE,
        )
        self._write(hello)

    async def _say_loss(self, standing: Standing, page: Page) -> None:
        if not self.view.tells_loss:
            raise LossUntold
        position = page.extent.before_earliest
        if standing is Standing.GAP:
            notice = self.view.notice(
                "gap", position, requested=str(self.position), earliest=await self._earliest(page)
            )
        else:
            # A cursor that this connection established can only be ahead of a journal that was rewound.
            rewound = standing is Standing.AHEAD and self._connected
            reason = Standing.DIVERGED if rewound else standing
            notice = self.view.notice("reset", position, reason=reason.value)
            self._told_live = False
        self._write(notice)
        self._position = position
        self._run_unsure = self.view.run is not None

    async def _find_run_again(self, tail: Tail) -> None:
        """After a loss, learn whether the run's terminal frame is still to come."""
        assert self.view.run is not None
        try:
            info = await self._tails.journal.run(self.stream, self.view.run)
            self._ended_at = ended_at(info)
        except (UnknownStream, UnknownRun):
            self._ended_at = 0
        except JournalError:
            await self._wait(tail, JOURNAL_RETRY_S)
            return
        self._run_unsure = False

    async def _earliest(self, page: Page) -> str | None:
        """The id of the earliest frame held; None when none is held, or the journal is away."""
        extent = page.extent
        if not self.view.tells_loss or extent.earliest_seq > extent.top.seq:
            return None
        if extent.earliest_seq == extent.top.seq:
            return str(extent.top)
        frames = page.frames
        if not frames or frames[0].seq != extent.earliest_seq:
            try:
                frames = (await self._tails.pages.read(self.stream, extent.before_earliest, 1, 1)).frames
            except (JournalError, UnknownStream):
                return None
        # It may have been trimmed since the page was read: then nothing is said, rather than of two times.
        return str(frames[0].id) if frames and frames[0].seq == extent.earliest_seq else None

    def _say_live(self) -> bool:
        """Say once that replay has caught up; True when it was said now, and there may be news since."""
        if self._told_live:
            return False
        self._told_live = True
        self._write(self.view.notice("live", self.position, cursor=str(self.position)))
        return True

    def _say_goodbye(self, end: ReaderEnd) -> None:
        retry_ms = self._tails.retry_ms()
        self._write(self.view.notice("bye", self.position, reason=end.value, retry_ms=retry_ms))

    # Following, writing and waiting

    async def _follow(self, tail: Tail, sink: Sink) -> None:
        """Have the tail pass on what comes, until there is something else to do."""
        if self._leaving is not None:
            return
        self._sleep = asyncio.get_running_loop().create_future()
        tail.follow(self, self.view, self._position, sink)
        try:
            await self._sleep
        finally:
            self._sleep = None
            self._unfollow()

    def _unfollow(self) -> None:
        if self.cohort is not None:
            self._position, self._written_at = self.position, self.written_at
            assert self._tail is not None
            self._tail.unfollow(self)

    def _write(self, data: bytes) -> None:
        assert self._sink is not None
        if data:
            self._sink.write(data)
            self._written_at = self._tails.now()

    async def _until_taken(self, sink: Sink) -> None:
        """Wait until the client has taken what was written, or nearly: no more is read for it before."""
        if not sink.writable:
            self.blocked_since = self._tails.now()
            await sink.until_writable()
            self.blocked_since = None

    async def _wait(self, tail: Tail, longest_s: float | None = None) -> None:
        if self._leaving is not None or tail.deleted:
            return
        loop = asyncio.get_running_loop()
        self._sleep = loop.create_future()
        timer = None if longest_s is None else loop.call_later(longest_s, self.wake)
        tail.wait(self)
        try:
            await self._sleep
        finally:
            self._sleep = None
            if timer is not None:
                timer.cancel()


class Readers:
    """Every open reader of this process. Visited on a slow clock, never on an append."""

    def __init__(self, heartbeat_s: float, write_timeout_s: float) -> None:
        self._heartbeat_s = heartbeat_s
        self._write_timeout_s = write_timeout_s
        self._open: dict[Reader, Callable[[], None]] = {}
        self.of_stream: Counter[str] = Counter()
        self.of_client: Counter[str] = Counter()
        """How many readers each has; none that has none."""
        self._callers: set[Callable[[], None]] = set()
        self._draining = False

    def __len__(self) -> int:
        return len(self._open) + len(self._callers)

    def __iter__(self) -> Iterator[Reader]:
        return iter(self._open)

    def add(self, reader: Reader, abort: Callable[[], None]) -> None:
        """Look after a reader; `abort` breaks its connection at once."""
        self._open[reader] = abort
        self.of_stream[reader.stream] += 1
        self.of_client[reader.client] += 1
        if self._draining and reader.lease is not None:  # it was let in before, and the journal took its time
            reader.leave(ReaderEnd.DRAIN)

    def discard(self, reader: Reader) -> None:
        """The reader has ended."""
        if self._open.pop(reader, None) is not None:
            for counts, key in ((self.of_stream, reader.stream), (self.of_client, reader.client)):
                counts[key] -= 1
                if not counts[key]:
                    del counts[key]

    def expect(self, give_up: Callable[[], None]) -> None:
        """Count a client that waits for its stream to be created; `give_up` ends the wait."""
        self._callers.add(give_up)

    def expected(self, give_up: Callable[[], None]) -> None:
        """The wait is over."""
        self._callers.discard(give_up)

    def visit(self, now: float) -> None:
        """Cut readers that take nothing, rotate those that are old, send heartbeats to idle ones."""
        # Not the items: a tuple a reader, every second, had the collector visit all there is every few.
        for reader in list(self._open):
            if reader.blocked_since is not None:
                if now - reader.blocked_since > self._write_timeout_s:
                    abort = self._open[reader]
                    reader.leave(ReaderEnd.SLOW)
                    abort()
            elif reader.lease is not None and now >= reader.lease.until:
                reader.leave(reader.lease.end)
            elif now - reader.written_at >= self._heartbeat_s:
                reader.heartbeat_due = True
                reader.wake()

    def drain(self) -> None:
        """Send away everyone who can come back to another instance, and who begins from now on."""
        self._draining = True
        for reader in self._open:
            if reader.lease is not None:
                reader.leave(ReaderEnd.DRAIN)
        for give_up in self._callers:
            give_up()


class LossUntold(Exception):
    """Frames were lost to a reader that cannot be shown so in band: its connection must end."""


async def find(tails: Tails, look: Callable[[], Awaitable[tuple[Found, bool]]]) -> Found:
    """What `look` finds of something that its client knows to be there. It looks again while it finds less
    than the client was shown, which it says of what it found, or while a journal that was replaced just now
    knows nothing of it: writers may put that back. Raises what `look` does."""
    patience = Patience(tails)
    while True:
        try:
            found, behind = await look()
        except (UnknownStream, UnknownRun, ResumeUnknown):
            if not patience.waits_while(lately_replaced(tails)):
                raise
        else:
            if not patience.waits_while(behind):
                return found
        await asyncio.sleep(JOURNAL_RETRY_S)


def lately_replaced(tails: Tails) -> bool:
    """Whether writers may still put back whole runs into the journal."""
    return tails.now() - tails.journal.replaced_at < tails.settings.rewind_grace_s


def ended_at(info: RunInfo) -> int | None:
    """The seq of a run's terminal frame, None while it is open."""
    return info.last.seq if info.ended_ms else None


def cursor_gone(standing: Standing, page: Page) -> CursorGone:
    """The error of a reader that lost frames and cannot be told so in band."""
    return CursorGone(
        "The journal does not hold what comes after this cursor.",
        reason=standing.value,
        earliest_seq=page.extent.earliest_seq,
        top=str(page.extent.top),
        cursor=str(page.extent.before_earliest),  # from where it can go on, for one who takes the loss
    )
