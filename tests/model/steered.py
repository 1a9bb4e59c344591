"""What the model test steers: time, the journal's answers, and the journal's hints."""

from __future__ import annotations

import asyncio
import math
import random
import threading
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from relay.cursor import Cursor
from relay.errors import JournalUnavailable
from relay.frame import Frame
from relay.journal.base import Follower, Journal, Orphan, Page, RunInfo, RunOwner, StreamInfo, StreamTop

T = TypeVar("T")

DEADLINE_S = 60.0


class SteeredLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock stands until it is moved. What takes longer than the (real) deadline is
    cancelled."""

    def __init__(self) -> None:
        self._now = 1000.0
        super().__init__()
        self._running: asyncio.Task[Any] | None = None
        self._runs = 0
        self._over = threading.Event()
        self._guard = threading.Thread(target=self._watch, daemon=True)
        self._guard.start()

    def close(self) -> None:
        self._over.set()
        self._guard.join()
        super().close()

    def _watch(self) -> None:
        runs = -1
        while not self._over.wait(DEADLINE_S):
            task = self._running
            if task is not None and runs == self._runs:
                self.call_soon_threadsafe(task.cancel)
            runs = self._runs

    def time(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        self._now += seconds

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run to completion."""
        self._runs += 1
        self._running = self.create_task(work)
        try:
            result: T = self.run_until_complete(self._running)
            return result
        finally:
            self._running = None


class SteeredJournal:
    """A journal between relay and the real one. Reads fail or their answers are held back on demand, pages
    are short, and hints are kept until somebody decides what becomes of them."""

    def __init__(
        self,
        inner: Journal,
        page_max_frames: int,
        barrier: str,
        heard: Callable[[str, Sequence[Frame]], None],
    ) -> None:
        """`heard` is told of all frames that hints bring, before anybody else is."""
        self.inner = inner
        self.replaced_at = -math.inf
        self.failures = 0
        """So many of the next reads fail."""
        self.holds_reads = False
        self.holds_hints = False
        self.held_reads: list[asyncio.Future[None]] = []
        self.held_hints: list[Callable[[], None]] = []
        self.unconfirmed: set[str] = set()
        """Watched streams of which the journal has not yet said that it follows them."""
        self.barrier_seq = 0
        self.in_flight = 0
        self.activity = 0
        self.changed = asyncio.Event()
        self._turn = asyncio.Lock()
        """Reads are answered in the order in which they were asked, so that an example can be repeated."""
        self._page_max_frames = page_max_frames
        self._barrier = barrier
        self._heard = heard
        self._follower: Follower | None = None

    def note(self) -> None:
        """Something happened."""
        self.activity += 1
        self.changed.set()

    # Reads, as relay does them

    async def read(self, stream: str, after: Cursor, max_frames: int, max_bytes: int) -> Page:
        short = min(max_frames, self._page_max_frames)
        return await self._steered(lambda: self.inner.read(stream, after, short, max_bytes))

    async def describe(self, stream: str) -> StreamInfo:
        return await self._steered(lambda: self.inner.describe(stream))

    async def run(self, stream: str, run: str) -> RunInfo:
        return await self._steered(lambda: self.inner.run(stream, run))

    async def tops(self, streams: Sequence[str]) -> Mapping[str, StreamTop]:
        return await self._steered(lambda: self.inner.tops(streams))

    async def resolve_token(self, token: str) -> tuple[str, str] | None:
        return await self._steered(lambda: self.inner.resolve_token(token))

    async def _steered(self, call: Callable[[], Awaitable[T]]) -> T:
        self.note()
        if self.failures:
            self.failures -= 1
            raise JournalUnavailable("The test took the journal away.")
        try:
            async with self._turn:
                return await self.direct(call())
        finally:
            # An answer on its way grows old: this is where every race between a page and a hint is made.
            if self.holds_reads:
                held = asyncio.get_running_loop().create_future()
                self.held_reads.append(held)
                await held
            self.note()

    async def direct(self, call: Awaitable[T]) -> T:
        """An operation of the real journal that has to be over before the system is at rest."""
        self.in_flight += 1
        try:
            return await call
        finally:
            self.in_flight -= 1
            self.note()

    def release_reads(self, count: int, choice: random.Random) -> None:
        """Let some held answers arrive, in any order."""
        for _ in range(min(count, len(self.held_reads))):
            held = self.held_reads.pop(choice.randrange(len(self.held_reads)))
            if not held.done():
                held.set_result(None)

    # Hints

    async def start(self, follower: Follower, owner: RunOwner | None = None) -> Sequence[Orphan]:
        self._follower = follower
        return await self.inner.start(self, owner)

    @property
    def reconnects(self) -> int:
        return self.inner.reconnects

    async def close(self) -> None:
        await self.inner.close()

    def watch(self, stream: str) -> None:
        self.unconfirmed.add(stream)
        self.inner.watch(stream)

    def unwatch(self, stream: str) -> None:
        self.unconfirmed.discard(stream)
        self.inner.unwatch(stream)
        self.note()

    def on_frames(self, stream: str, previous: Cursor, frames: Sequence[Frame]) -> None:
        if stream == self._barrier:
            self.barrier_seq = frames[-1].seq
            self.note()
            return
        self._heard(stream, frames)
        follower = self._follower
        assert follower is not None
        self._hint(lambda: follower.on_frames(stream, previous, frames))

    def on_deleted(self, stream: str) -> None:
        follower = self._follower
        assert follower is not None
        self._hint(lambda: follower.on_deleted(stream))

    def on_sealed(self, stream: str) -> None:
        follower = self._follower
        assert follower is not None
        self._hint(lambda: follower.on_sealed(stream))

    def on_doubt(self, stream: str) -> None:
        self.unconfirmed.discard(stream)
        self.note()
        if stream != self._barrier:
            assert self._follower is not None
            self._follower.on_doubt(stream)

    def _hint(self, hint: Callable[[], None]) -> None:
        self.note()
        if self.holds_hints:
            self.held_hints.append(hint)
        else:
            hint()

    def release_hints(self, fate: str, choice: random.Random) -> None:
        """Decide on held hints: `deliver`, `shuffle` or `double` them, deliver `some` only, or `lose` all."""
        hints, self.held_hints = self.held_hints, []
        if fate == "shuffle":
            choice.shuffle(hints)
        elif fate == "double":
            hints = [hint for hint in hints for _ in range(2)] + hints
        elif fate == "some":
            hints = [hint for hint in hints if choice.random() < 0.5]
        elif fate == "lose":
            hints = []
        for hint in hints:
            hint()
