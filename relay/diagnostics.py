"""What this process holds open and how what it held ended: for the person who asks why.

Of several workers on one port any may be asked, and no caller chooses which. So they ask each other, each
over a socket that only they can reach, and any answers for all.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import orjson

from relay.errors import StartupError
from relay.frame import timestamp
from relay.ingest.pump import Pump
from relay.lifecycle import Ending
from relay.replay.reader import Reader, ReaderEnd

RECENT = 100
"""Endings remembered of each kind."""

LISTED = 100
"""Open runs and readers shown: the most silent, and those that are farthest behind."""

ANSWER_S = 1.0
"""A worker that takes longer to say what it holds is shown as one that does not answer."""


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


class Colleagues:
    """The workers of this port, as one of them sees them.

    `number` of `count` is this one; `directory` is shared by them and by nobody else. `report` says what this
    process holds, as `Diagnostics.report` does."""

    def __init__(self, number: int, count: int, directory: str, report: Callable[[], dict[str, Any]]) -> None:
        self._number = number
        self._count = count
        self._directory = Path(directory)
        self._report = report
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Answer the others. Raises `StartupError`."""
        path = self._socket(self._number)
        try:
            self._server = await asyncio.start_unix_server(self._answer, path)
        except OSError as error:
            raise StartupError(f"Workers cannot talk to each other by {path}: {error}. Set TMPDIR.") from None

    def close(self) -> None:
        """Answer no more."""
        if self._server is not None:
            self._server.close()

    def _socket(self, number: int) -> Path:
        return self._directory / f"worker-{number}.sock"

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(orjson.dumps(self._own()))
        writer.close()

    def _own(self) -> dict[str, Any]:
        return {"worker": self._number, "pid": os.getpid()} | self._report()

    async def report(self) -> dict[str, Any]:
        """What all of them hold: the same lists, in the same order and of the same length, as of one process.
        `workers` tells who answered."""
        numbers = range(1, self._count + 1)
        return merged(await asyncio.gather(*(self._ask(number) for number in numbers)))

    async def _ask(self, number: int) -> dict[str, Any]:
        if number == self._number:
            return self._own()
        try:
            async with asyncio.timeout(ANSWER_S):
                reader, writer = await asyncio.open_unix_connection(self._socket(number))
                try:
                    said: dict[str, Any] = orjson.loads(await reader.read())
                finally:
                    writer.close()
        except (OSError, orjson.JSONDecodeError):
            return {"worker": number}
        return said


def merged(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One report of several workers' own ones. One without a `pid` is of a worker that did not answer."""
    answered = [report for report in reports if "pid" in report]

    def of(kind: str) -> list[dict[str, Any]]:
        return [{"worker": report["worker"]} | entry for report in answered for entry in report[kind]]

    return {
        "draining": any(report["draining"] for report in answered),
        "workers": [
            {"worker": report["worker"], "pid": report.get("pid"), "answers": "pid" in report}
            for report in reports
        ],
        "open_runs": sorted(of("open_runs"), key=lambda run: -run["silent_s"])[:LISTED],
        "readers": sorted(of("readers"), key=lambda reader: -reader["lag"])[:LISTED],
        "ended_runs": sorted(of("ended_runs"), key=lambda run: run["at"])[-RECENT:],
        "ended_readers": sorted(of("ended_readers"), key=lambda reader: reader["at"])[-RECENT:],
    }
