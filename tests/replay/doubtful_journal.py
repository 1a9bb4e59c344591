"""A real journal whose hints and reads the test holds in its hand: faults at the seam readers stand on."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from relay.cursor import ORIGIN, Cursor
from relay.errors import JournalUnavailable
from relay.frame import Event, Frame
from relay.journal.base import Append, Follower, Opened, Page, RunOpening, StreamInfo, StreamTop
from relay.journal.sqlite import SqliteJournal
from relay.lifecycle import Reason, ending
from relay.limits import Retention
from relay.replay.tail import Tails
from relay.settings import Settings

DEADLINE_S = 60


class DoubtfulJournal:
    """A `SqliteJournal` with these differences: while `withheld` is a list, hints are put there instead of
    being told; `failing` counts down reads that fail; reads wait while `gate` is closed, before they ask or,
    with `answer_first`, after. `reads` counts pages and descriptions asked for. While `lost_after` is an id,
    the journal reads as if it had lost every frame behind that one."""

    def __init__(self, path: Path) -> None:
        # No two things happen in the same millisecond, so that no two lives have ids in common by chance.
        self.real = SqliteJournal(path, clock_ms=itertools.count(1_763_726_400_000).__next__)
        self.withheld: list[tuple[str, Cursor, Sequence[Frame]]] | None = None
        self.failing = 0
        self.reads = 0
        self.lost_after: Cursor | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.answer_first = False
        self.arrived = asyncio.Event()
        """Set when a read stands at the closed gate."""

    async def start(self, follower: Follower) -> None:
        self.follower = follower
        await self.real.start(self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def on_frames(self, stream: str, previous: Cursor, frames: Sequence[Frame]) -> None:
        if self.withheld is None:
            self.follower.on_frames(stream, previous, frames)
        else:
            self.withheld.append((stream, previous, frames))

    def on_deleted(self, stream: str) -> None:
        self.follower.on_deleted(stream)

    def on_sealed(self, stream: str) -> None:
        self.follower.on_sealed(stream)

    def on_doubt(self, stream: str) -> None:
        self.follower.on_doubt(stream)

    def tell(self, *hints: tuple[str, Cursor, Sequence[Frame]]) -> None:
        for hint in hints:
            self.follower.on_frames(*hint)

    async def _pass_gate(self) -> None:
        if not self.gate.is_set():
            self.arrived.set()
            await self.gate.wait()

    def close_gate(self) -> None:
        self.gate.clear()
        self.arrived.clear()

    async def _asked(self, question: Any) -> Any:
        self.reads += 1
        if self.failing:
            self.failing -= 1
            raise JournalUnavailable("The test wants it so.")
        if not self.answer_first:
            await self._pass_gate()
        answer = await question()
        if self.answer_first:
            await self._pass_gate()
        return answer

    async def read(self, stream: str, after: Cursor, max_frames: int, max_bytes: int) -> Page:
        page: Page = await self._asked(lambda: self.real.read(stream, after, max_frames, max_bytes))
        lost_after = self.lost_after
        if lost_after is None:
            return page
        return page._replace(
            extent=page.extent._replace(top=lost_after),
            anchor_ms=page.anchor_ms if after.seq <= lost_after.seq else None,
            frames=[frame for frame in page.frames if frame.seq <= lost_after.seq],
        )

    async def describe(self, stream: str) -> StreamInfo:
        info: StreamInfo = await self._asked(lambda: self.real.describe(stream))
        return (
            info
            if self.lost_after is None
            else replace(info, extent=info.extent._replace(top=self.lost_after))
        )


class Stage:
    """A journal, the tails above it, and one open run a stream to speak in."""

    def __init__(self, journal: DoubtfulJournal, tails: Tails) -> None:
        self.journal = journal
        self.tails = tails
        self._next: dict[tuple[str, str], int] = {}

    async def open(self, stream: str = "s", run: str = "r", *, seal: bool = False) -> Opened:
        opened: Opened = await self.journal.open_run(
            RunOpening(stream, run, "writer", f"token-{stream}-{run}", Retention(), seal=seal)
        )
        self._next[stream, run] = 1
        return opened

    async def say(self, *words: str, stream: str = "s", run: str = "r", end: bool = False) -> None:
        """One append, so one hint."""
        seq = self._next[stream, run]
        self._next[stream, run] += len(words)
        await self.journal.append(
            Append(
                stream,
                run,
                "writer",
                seq,
                [Event("", word.encode()) for word in words],
                ending=ending(Reason.PRODUCER_END) if end else None,
            )
        )

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something that the loop's other tasks bring about."""
        while not condition():
            await self.journal.real.tops([])

    async def settled(self, stream: str = "s") -> None:
        """Wait until the tail agrees with the journal."""
        tail = self.tails.acquire(stream)
        try:
            while True:
                top = (await self.journal.real.tops([stream])).get(stream, StreamTop(ORIGIN, False)).id
                if tail.known and tail.top == top and tail._settling is None:
                    return
        finally:
            self.tails.release(tail, Nobody())


class Nobody:
    """A sleeper that is never asleep."""

    def wake(self) -> None:
        pass


@contextlib.asynccontextmanager
async def staged(path: Path, **settings: Any) -> AsyncIterator[Stage]:
    """A stage with settings of `Tails`."""
    journal = DoubtfulJournal(path / "relay.db")
    tails = Tails(journal, Settings(**settings))
    await journal.start(tails)
    try:
        async with asyncio.timeout(DEADLINE_S):
            yield Stage(journal, tails)
    finally:
        tails.close()
        await journal.close()
