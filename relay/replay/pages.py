"""Pages of the journal, read and encoded once for all readers that ask for the same at the same time.

When a server in front of relay restarts, thousands of readers come back with the same cursor.
"""

from __future__ import annotations

import asyncio
from collections.abc import Hashable

from relay.counts import Counts
from relay.cursor import Cursor, Standing, judge
from relay.journal.base import Journal, Page
from relay.replay.view import Chunk, View, chunk
from relay.sse import encode_wire

PAGES_AT_ONCE = 32
"""Journal pages read at the same time by this process, so that a storm of reconnects stays in bounds."""


class SharedPage(Page):
    """A page that knows how it was shown."""

    _chunks: dict[Hashable, Chunk]

    def chunk(self, view: View) -> Chunk:
        """All its frames, of which there must be some, as a view shows them."""
        chunks = self.__dict__.setdefault("_chunks", {})
        found: Chunk | None = chunks.get(view.key)
        if found is None:
            found = chunks[view.key] = chunk(view, self.frames, [encode_wire(frame) for frame in self.frames])
        return found


class Pages:
    """The way of a process to its journal's pages."""

    def __init__(self, journal: Journal, counts: Counts | None = None) -> None:
        self._counts = counts or Counts()
        self.slots = asyncio.Semaphore(PAGES_AT_ONCE)
        self._journal = journal
        self._under_way: dict[Hashable, asyncio.Task[SharedPage]] = {}

    async def read(self, stream: str, after: Cursor, max_frames: int, max_bytes: int) -> SharedPage:
        """As `Journal.read`. What was asked by somebody else before may be older than what the caller knows;
        then it is asked again."""
        question = (stream, after, max_frames, max_bytes)
        under_way = self._under_way.get(question)
        if under_way is not None:
            page = await asyncio.shield(under_way)
            if judge(after, page.extent, page.anchor_ms) is Standing.HERE:
                return page
        asked = self._under_way.get(question)
        if asked is None or asked is under_way:
            asked = self._under_way[question] = asyncio.create_task(self.read_anew(*question))
            asked.add_done_callback(lambda task: self._done(question, task))
        return await asyncio.shield(asked)

    async def read_anew(self, stream: str, after: Cursor, max_frames: int, max_bytes: int) -> SharedPage:
        """As `Journal.read`, asked now, whoever is asking for the same."""
        async with self.slots:
            self._counts.journal_pages += 1
            return SharedPage._make(await self._journal.read(stream, after, max_frames, max_bytes))

    def _done(self, question: Hashable, task: asyncio.Task[SharedPage]) -> None:
        if self._under_way.get(question) is task:
            del self._under_way[question]
        if not task.cancelled():
            task.exception()  # whoever asked may be gone
