"""Frames: what is journaled, and the control frames relay journals itself."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, NamedTuple

import orjson

from relay.cursor import Cursor
from relay.errors import InvalidEvent
from relay.lifecycle import Ending

CONTROL_EVENT = "relay"
"""The reserved event name of control frames; a producer that uses it is refused."""


class Event(NamedTuple):
    """What a producer says: an event name (may be empty) and UTF-8 text."""

    event: str
    data: bytes


class Frame(NamedTuple):
    """One journaled frame. `data` is valid UTF-8; `ms` is the journal's clock, in milliseconds."""

    seq: int
    ms: int
    run: str
    event: str
    data: bytes

    @property
    def id(self) -> Cursor:
        return Cursor(self.seq, self.ms)

    @property
    def is_control(self) -> bool:
        return self.event == CONTROL_EVENT


def check_event_name(event: str) -> str:
    """Return a producer's event name unchanged; raises `InvalidEvent` if it cannot go on an SSE line."""
    if event == CONTROL_EVENT:
        raise InvalidEvent(f"The event name '{CONTROL_EVENT}' is reserved for relay's control frames.")
    if "\r" in event or "\n" in event:
        raise InvalidEvent("An event name cannot hold CR or LF.")
    return event


def timestamp(ms: int) -> str:
    """RFC 3339, UTC, with milliseconds."""
    at = datetime.fromtimestamp(ms / 1000, UTC)
    return f"{at:%Y-%m-%dT%H:%M:%S}.{ms % 1000:03d}Z"


def frame_object(frame: Frame) -> dict[str, Any]:
    """The NDJSON and JSON shape of a frame."""
    return {
        "id": str(frame.id),
        "event": frame.event,
        "data": frame.data.decode(),
        "run": frame.run,
        "at": timestamp(frame.ms),
    }


def control(kind: str, **members: Any) -> bytes:
    """The data of a control frame: `{"type": kind, …}`, members that are None left out."""
    return orjson.dumps({"type": kind} | {key: value for key, value in members.items() if value is not None})


def is_opening(frame: Frame) -> bool:
    """Whether a frame is the first of its run."""
    return frame.event == CONTROL_EVENT and frame.data.startswith(b'{"type":"run.started"')


def is_terminal(frame: Frame) -> bool:
    """Whether a frame is the last of its run."""
    return frame.event == CONTROL_EVENT and frame.data.startswith(b'{"type":"run.ended"')


def run_started(run: str, dialect: str | None, metadata: Any) -> bytes:
    """The data of the frame that opens a run."""
    return control("run.started", run=run, dialect=dialect, metadata=metadata)


def run_superseded(run: str, by: str) -> bytes:
    """The data of the frame that says which run replaces another one."""
    return control("run.superseded", run=run, by=by)


def run_ended(run: str, ending: Ending, frames: int, text_bytes: int) -> bytes:
    """The data of a run's terminal frame: how it ended, how many data frames and bytes of text it holds."""
    return control(
        "run.ended",
        run=run,
        status=ending.status,
        reason=ending.reason,
        error=ending.error or None,
        frames=frames,
        text_bytes=text_bytes,
    )
