"""What this process holds open and how what it held ended: for the person who asks why."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

from relay.frame import timestamp
from relay.ingest.pump import Pump
from relay.lifecycle import Ending
from relay.replay.reader import Reader, ReaderEnd

RECENT = 100
"""Endings remembered of each kind."""

LISTED = 100
"""Open runs and readers shown: the most silent, and those that are farthest behind."""


class Diagnostics:
    """The recent endings of runs and readers in this process, newest last."""

    def __init__(self) -> None:
        self._runs: deque[dict[str, Any]] = deque(maxlen=RECENT)
        self._readers: deque[dict[str, Any]] = deque(maxlen=RECENT)

    def run_ended(self, stream: str, run: str, end: Ending, at_ms: int) -> None:
        """This process ended a run; `at_ms` is on its wall clock."""
        self._runs.append(
            {
                "at": timestamp(at_ms),
                "stream": stream,
                "run": run,
                "status": end.status,
                "reason": end.reason,
                "error": end.error or None,
            }
        )

    def reader_ended(self, reader: Reader, end: ReaderEnd, at_ms: int) -> None:
        """A reader of this process ended."""
        self._readers.append(
            {
                "at": timestamp(at_ms),
                "stream": reader.stream,
                "run": reader.view.run,
                "reason": end,
                "cursor": str(reader.position),
            }
        )

    def report(self, pumps: Iterable[Pump], readers: Iterable[Reader], now: float) -> dict[str, Any]:
        """Open runs by silence, readers by lag, recent endings. `now` is on the loop's clock."""
        runs = [
            {
                "stream": pump.writer.stream,
                "run": pump.writer.run,
                "dialect": None if pump.dialect is None else pump.dialect.name,
                "age_s": round(now - pump.started_at, 3),
                "silent_s": round(now - pump.writer.heard_at, 3),
            }
            for pump in sorted(pumps, key=lambda pump: pump.writer.heard_at)[:LISTED]
        ]
        lagging = [
            {
                "stream": reader.stream,
                "run": reader.view.run,
                "cursor": str(reader.position),
                "lag": reader.lag,
                "blocked_s": 0 if reader.blocked_since is None else round(now - reader.blocked_since, 3),
            }
            for reader in sorted(readers, key=lambda reader: -reader.lag)[:LISTED]
        ]
        return {
            "open_runs": runs,
            "readers": lagging,
            "ended_runs": list(self._runs),
            "ended_readers": list(self._readers),
        }
