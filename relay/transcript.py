"""The transcript: the text of a run that a reader could have been shown, whatever its ending.

It is put together from the journal's frames alone, so it is what was delivered and not what the producer
meant to deliver. Of a run whose frames are all there, the text has as many bytes as the run says it has.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from relay.cursor import Cursor
from relay.dialects.base import REASONING, Delta
from relay.dialects.detect import BY_NAME, RAW
from relay.errors import UnknownRun
from relay.frame import Event, Frame, timestamp
from relay.journal.base import Journal, Page, RunInfo
from relay.limits import PAGE_MAX_BYTES, PAGE_MAX_FRAMES


@dataclass(frozen=True, slots=True)
class Transcript:
    """What was shown of a run. `parts` come in the order in which they first appeared, and `text` is all
    their texts in that order, without reasoning. `truncated` says that text may be missing: frames of the
    run were trimmed away, or the text was larger than it may be."""

    stream: str
    info: RunInfo
    parts: Sequence[Delta]
    truncated: bool

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.parts if part.kind != REASONING)

    def document(self) -> dict[str, Any]:
        """The transcript as JSON. `first` and `last` are ids of the run's first and newest frame; `frames`
        counts the data frames of its producer."""
        info = self.info
        return {
            "stream": self.stream,
            "run": info.run,
            "status": info.status,
            "reason": info.reason or None,
            "error": info.error or None,
            "text": self.text,
            "parts": [{"kind": part.kind, "index": part.index, "text": part.text} for part in self.parts],
            "frames": info.frames,
            "first": str(Cursor(info.start.seq + 1, info.started_ms)),
            "last": str(info.last),
            "truncated": self.truncated,
            "dialect": info.dialect or None,
            "metadata": orjson.loads(info.metadata) if info.metadata else None,
            "superseded_by": info.superseded_by or None,
            "started": timestamp(info.started_ms),
            "ended": timestamp(info.ended_ms) if info.ended_ms else None,
        }


class Assembly:
    """Puts the transcript of a run together, page by page, as the journal knew the run in `info`."""

    def __init__(self, stream: str, info: RunInfo, max_bytes: int) -> None:
        self.position = info.start
        """The frames after this one are wanted next."""
        self.complete = False
        self._stream = stream
        self._info = info
        self._dialect = BY_NAME.get(info.dialect, RAW)
        self._room = max_bytes
        self._texts: dict[tuple[str, int | str], bytearray] = {}
        self._truncated = False

    def take(self, page: Page) -> None:
        """Take the page after `position`. Raises `UnknownRun` when it is of another life of the stream."""
        if page.extent.created_ms > self._info.started_ms:
            raise UnknownRun(f"The stream was made anew, and the run '{self._info.run}' is gone.")
        last = self._info.last.seq
        if self.position.seq < last and page.extent.earliest_seq > self.position.seq + 1:
            self._truncated = True
        for frame in page.frames:
            if frame.seq > last:
                break
            self._show(frame)
        if page.frames:
            self.position = page.frames[-1].id
        if not page.more or self.position.seq >= last:
            self.complete = True

    def transcript(self) -> Transcript:
        """What was taken so far."""
        parts = [
            # What was cut in the midst of a character ends before it.
            Delta(kind, index, text.decode(errors="ignore"))
            for (kind, index), text in self._texts.items()
        ]
        return Transcript(self._stream, self._info, [part for part in parts if part.text], self._truncated)

    def _show(self, frame: Frame) -> None:
        if frame.run != self._info.run or frame.is_control:
            return
        for delta in self._dialect.deltas(Event(frame.event, frame.data)):
            text = delta.text.encode()
            part = self._texts.setdefault((delta.kind, delta.index), bytearray())
            if delta.is_whole:
                self._room += len(part)
                part.clear()
            if len(text) > self._room:
                text = text[: self._room]
                self._truncated = self.complete = True
            self._room -= len(text)
            part.extend(text)


async def read_transcript(journal: Journal, stream: str, run: str, max_bytes: int) -> Transcript:
    """The transcript of a run as it stands now, with `max_bytes` of text at most. Holds a page of the journal
    at a time. Raises `UnknownStream`, `UnknownRun`, `JournalError`."""
    assembly = Assembly(stream, await journal.run(stream, run), max_bytes)
    while not assembly.complete:
        assembly.take(await journal.read(stream, assembly.position, PAGE_MAX_FRAMES, PAGE_MAX_BYTES))
    return assembly.transcript()
