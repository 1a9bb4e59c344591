"""The writer: one run's way into the journal, through outages and retries."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Sequence

from relay.errors import JournalError
from relay.frame import Event
from relay.journal.base import Append, Journal
from relay.lifecycle import Ending

log = logging.getLogger("relay.writer")

RETRY_FIRST_S = 0.05
RETRY_MOST_S = 1.0


class RunWriter:
    """Appends to one open run. Numbers its frames, so that every append can be repeated after an unknown
    outcome and is journaled once."""

    def __init__(self, journal: Journal, stream: str, run: str, writer: str, deadline_s: float) -> None:
        self.stream = stream
        self.run = run
        self.next_seq = 1
        self._journal = journal
        self._writer = writer
        self._deadline_s = deadline_s

    async def append(
        self, events: Sequence[Event], text_bytes: int = 0, dialect: str = "", ending: Ending | None = None
    ) -> None:
        """Journal events, and the run's ending with them if one is given.

        While the journal is away this waits and tries again, which holds upstream back too. After the
        deadline the last `JournalError` is raised; `Fenced` and `RunEnded` at once.
        """
        pause_s = RETRY_FIRST_S
        deadline: float | None = None
        while True:
            try:
                return await self.append_once(events, text_bytes, dialect, ending)
            except JournalError as error:
                now = asyncio.get_running_loop().time()
                if deadline is None:
                    deadline = now + self._deadline_s
                    log.warning("journal away stream=%s run=%s: %s", self.stream, self.run, error)
                if now >= deadline:
                    raise
                await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
                pause_s = min(pause_s * 2, RETRY_MOST_S)

    async def append_once(
        self, events: Sequence[Event], text_bytes: int, dialect: str, ending: Ending | None
    ) -> None:
        """Try once. After a `JournalError` the same events must be given again, before any others."""
        appended = await self._journal.append(
            Append(self.stream, self.run, self._writer, self.next_seq, events, text_bytes, dialect, ending)
        )
        self.next_seq = appended.next_seq
