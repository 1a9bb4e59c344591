"""The runs this process owns, and how it learns that one of them is over, or was forgotten.

A run of ours can end without us: cancelled, superseded, deleted, taken over, reaped while this process was
paused. The journal tells so at once, by a hint that may be lost; so whatever was silent is asked for at every
renewal of the lease. The same question finds out about frames that the journal lost, and from time to time
about runs that the journal takes for ours and nobody here knows.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Sequence
from typing import NamedTuple

from relay.counts import Counts
from relay.cursor import ORIGIN, Cursor
from relay.dialects.detect import error_events
from relay.errors import CallerError, Diverged, JournalError, Rewound, UnknownRun, UnknownStream
from relay.ingest.writer import HeldMemory, RunWriter
from relay.journal.base import Journal, RunInfo, RunState
from relay.lifecycle import Ending, Reason, Status, ending
from relay.settings import Settings

log = logging.getLogger("relay.owned")

ASKED_AT_ONCE = 500
"""Runs asked for in one question to the journal."""

COMPARED_EVERY = 10
"""After so many checks this process compares its runs with those that the journal takes for its own."""

ORPHANS_MAX = 1000
"""Orphans ended in one comparison."""

PUT_BACK_PAUSE_S = 0.1
"""Pause before frames are put back that wait for others' frames."""


class Facts(NamedTuple):
    """What is known of a run that ended: frames of its producer, and how long it was open."""

    frames: int
    duration_s: float

    @staticmethod
    def of(info: RunInfo) -> Facts:
        """As the journal has them."""
        return Facts(info.frames, max(0, info.ended_ms - info.started_ms) / 1000)


OnEnded = Callable[[str, str, Ending, int, Facts | None], None]
"""Told of a run that this process ended: stream, run, ending, bytes of shown text, what else is known."""


class _Run:
    """A run in this process's hands. `over` is None once it ended here: then it is held only because the
    journal may lose its ending."""

    __slots__ = ("over", "seen", "until", "writer")

    def __init__(self, writer: RunWriter, over: Callable[[], None]) -> None:
        self.writer = writer
        self.over: Callable[[], None] | None = over
        self.seen = ORIGIN
        self.until = 0.0


class OwnedRuns:
    """The registry of this process's runs, and the journal's `RunOwner`.

    Make it in the process that serves, after every fork: two processes of one name would take each other's
    runs for their own. `on_ended` is told of every run ended here; `seen` is as for `HeldMemory`; what is
    done with runs is counted in `counts`.
    """

    def __init__(
        self,
        settings: Settings,
        on_ended: OnEnded,
        seen: Callable[[str], int] = lambda stream: 0,
        counts: Counts | None = None,
    ) -> None:
        self.name = secrets.token_urlsafe(16)
        self.counts = counts or Counts()
        self.memory = HeldMemory(settings.held_total_max_bytes, seen)
        self._settings = settings
        self._on_ended = on_ended
        self._runs: dict[tuple[str, str], Sequence[_Run]] = {}
        """By stream and run. Mostly one: who opens a run under a name that is taken holds it too, until the
        journal has said so."""
        self._putting_back: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._checks_to_comparison = COMPARED_EVERY
        self._doubtful = False

    def add(self, writer: RunWriter, on_over: Callable[[], None]) -> None:
        """Hold a run, before it is opened. `on_over` is called when somebody else ended it or took it over,
        perhaps more than once, perhaps for an ending that this process is only just writing itself; it must
        not block or raise."""
        key = writer.stream, writer.run
        self._runs[key] = (*self._runs.get(key, ()), _Run(writer, on_over))

    def discard(self, writer: RunWriter) -> None:
        """The run is over for this process: its ending is journaled, or somebody else's."""
        held = [run for run in self._runs.get((writer.stream, writer.run), ()) if run.writer is writer]
        if held and writer.ended is not None and not writer.lost:
            held[0].over = None
            held[0].until = _now() + self._settings.held_s
        else:
            self._forget(writer)

    def _forget(self, writer: RunWriter) -> None:
        key = writer.stream, writer.run
        others = tuple(run for run in self._runs.get(key, ()) if run.writer is not writer)
        if others:
            self._runs[key] = others
        else:
            self._runs.pop(key, None)
        writer.release()

    def on_run_over(self, stream: str, run: str) -> None:
        """As `RunOwner` says."""
        for held in self._runs.get((stream, run), ()):
            if held.over is not None:
                held.over()

    def doubt(self) -> None:
        """The journal was away: what it knows of our runs may be old."""
        self._doubtful = True

    async def check(self, journal: Journal) -> None:
        """Ask what became of the runs that were silent since the last check. Raises `JournalError`."""
        try:
            keys = list(self._runs)
            for first in range(0, len(keys), ASKED_AT_ONCE):
                asked = self._silent(keys[first : first + ASKED_AT_ONCE])
                states = await journal.states([key for key, _, _ in asked])
                for (key, run, acknowledged), state in zip(asked, states, strict=True):
                    await self._judge(journal, key, run, acknowledged, state)
            self._checks_to_comparison -= 1
            if self._doubtful or self._checks_to_comparison <= 0:
                await self._end_orphans(journal)
                self._doubtful = False
                self._checks_to_comparison = COMPARED_EVERY
        except JournalError:
            self._doubtful = True
            raise

    def _silent(self, keys: Sequence[tuple[str, str]]) -> Sequence[tuple[tuple[str, str], _Run, Cursor]]:
        """Those of some runs of which nothing was heard, with the newest frame that their writers know."""
        now = _now()
        silent = []
        for key, run in [(name, run) for name in keys for run in self._runs.get(name, ())]:
            acknowledged = run.writer.acknowledged
            if run.over is None and now >= run.until:
                self._forget(run.writer)
            elif run.over is not None and acknowledged != run.seen:
                run.seen = acknowledged
                run.writer.expire(now)
            elif acknowledged != ORIGIN or run.writer.lost:
                run.writer.expire(now)
                silent.append((key, run, acknowledged))
        return silent

    async def _judge(
        self, journal: Journal, key: tuple[str, str], run: _Run, acknowledged: Cursor, state: RunState | None
    ) -> None:
        if state is not None and (state.status is not Status.OPEN or state.writer != run.writer.token):
            if run.over is not None:
                run.over()
                await journal.file_ending(*key)
            return
        last_seq = 0 if state is None else state.last.seq
        behind = last_seq < acknowledged.seq or run.over is None or run.writer.lost
        if behind and key not in self._putting_back:
            task = asyncio.create_task(self._put_back(journal, key, run, last_seq))
            self._putting_back[key] = task
            task.add_done_callback(lambda _: self._putting_back.pop(key, None))

    async def _put_back(self, journal: Journal, key: tuple[str, str], run: _Run, last_seq: int) -> None:
        """Give the journal back what it lost of a silent run, or end the run."""
        try:
            while True:
                try:
                    await run.writer.put_back(last_seq)
                    return
                except Diverged as error:
                    await self._end(journal, key, ending(Reason.JOURNAL_LOST, str(error)))
                    break
                except Rewound:
                    await asyncio.sleep(PUT_BACK_PAUSE_S)
        except JournalError:
            return  # the next check finds the run as this one did
        except CallerError as error:
            log.warning("nothing put back stream=%s run=%s: %s", *key, error.code)
        if run.over is not None:
            run.over()
        else:
            self._forget(run.writer)

    async def _end_orphans(self, journal: Journal) -> None:
        """End runs that the journal takes for ours and that nobody here holds: it lost their ending, or
        their opening was never followed by anything."""
        listed = await journal.owned(self.name, len(self._runs) + ORPHANS_MAX)
        for key in listed:
            if key not in self._runs:
                try:
                    await self._end(journal, key, ending(Reason.OWNER_LOST, "No process reads this run."))
                except (UnknownStream, UnknownRun):
                    pass
                await journal.file_ending(*key)

    async def _end(self, journal: Journal, key: tuple[str, str], end: Ending) -> None:
        ended = await journal.end_run(*key, end, error_events(end), owner=self.name)
        if ended.by_this:
            self.counts.orphans_reaped += end.reason is Reason.OWNER_LOST
            self._on_ended(*key, end, ended.text_bytes, None)


def _now() -> float:
    return asyncio.get_running_loop().time()
