"""Views: how a reader is shown frames. Pure, and equal views share what they encode."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple, Protocol

import orjson

from relay.cursor import RESUME_PREFIX, Cursor
from relay.frame import CONTROL_EVENT, Frame, control, frame_object, is_terminal
from relay.ndjson import NDJSON
from relay.sse import EVENT_STREAM, comment, encode_event


class Chunk(NamedTuple):
    """Encoded frames. `data` may be empty; `last` is the position after them; `terminal` is the terminal
    frame of the run the view is limited to, where the chunk stops, else None; `shown` is how many frames are
    shown."""

    data: bytes
    last: Cursor
    terminal: Frame | None
    shown: int


class View(Protocol):
    """How one kind of reader is shown a stream."""

    key: Hashable
    """Views with equal keys encode alike, so their chunks are shared."""
    run: str | None
    """The only run that is shown, or None for all."""
    media_type: str
    shows_control: bool
    """Whether journaled control frames count as shown: whether a reader's cursor moves past them."""
    tells_loss: bool
    """Whether `notice` can tell a reader of a gap or reset in band."""

    def encode(self, frames: Sequence[Frame], wires: Sequence[bytes]) -> bytes:
        """Encode frames, all of runs that are shown. `wires` are their `sse.encode_wire`."""

    def notice(self, kind: str, position: Cursor | None, **members: Any) -> bytes:
        """A control frame of this connection alone; its id is the position it establishes."""

    def heartbeat(self, position: Cursor) -> bytes:
        """What keeps an idle connection alive."""


def chunk(view: View, frames: Sequence[Frame], wires: Sequence[bytes]) -> Chunk:
    """What `view` shows of consecutive frames. Stops behind the terminal frame of the view's run."""
    last = frames[-1]
    terminal = None
    if view.run is not None:
        mine = [index for index, frame in enumerate(frames) if frame.run == view.run]
        if mine and is_terminal(frames[mine[-1]]):
            last = terminal = frames[mine[-1]]
        if len(mine) != len(frames):
            frames, wires = [frames[i] for i in mine], [wires[i] for i in mine]
    shown = len(frames)
    if not view.shows_control:
        shown = sum(frame.event != CONTROL_EVENT for frame in frames)
    return Chunk(view.encode(frames, wires) if frames else b"", last.id, terminal, shown)


def _without_control(frames: Sequence[Frame], wires: Sequence[bytes]) -> Sequence[bytes]:
    return [wire for frame, wire in zip(frames, wires, strict=True) if frame.event != CONTROL_EVENT]


class EventsView:
    """`text/event-stream` on the events route."""

    media_type = EVENT_STREAM

    def __init__(self, run: str | None, control: str, envelope: bool, heartbeat_event: bool) -> None:
        self.run = run
        self.shows_control = control == "events"
        self.tells_loss = control != "none"
        self.key: Hashable = ("events", run, control, envelope)
        self._control = control
        self._envelope = envelope
        self._heartbeat_event = heartbeat_event

    def encode(self, frames: Sequence[Frame], wires: Sequence[bytes]) -> bytes:
        """Blocks with `id: <cursor>`."""
        if self._envelope or self._control == "comments":
            return b"".join(self._block(frame, wire) for frame, wire in zip(frames, wires, strict=True))
        if self._control == "none":
            wires = _without_control(frames, wires)
        return b"id: " + b"id: ".join(wires) if wires else b""

    def _block(self, frame: Frame, wire: bytes) -> bytes:
        if frame.is_control and not self.shows_control:
            return _control_comment(frame.data, frame.id) if self._control == "comments" else b""
        if self._envelope:
            return encode_event(id=str(frame.id), event="", data=orjson.dumps(frame_object(frame)))
        return b"id: " + wire

    def notice(self, kind: str, position: Cursor | None, **members: Any) -> bytes:
        """An `event: relay` block, a comment, or nothing, as the reader asked."""
        retry_ms = members.get("retry_ms")
        data = control(kind, **members)
        if kind == "heartbeat" or self._control == "events":
            id_ = None if position is None else str(position)
            if self._envelope:
                return encode_event(id=id_, event="", data=_notice_object(data, position), retry_ms=retry_ms)
            return encode_event(id=id_, event=CONTROL_EVENT, data=data, retry_ms=retry_ms)
        retry = b"" if retry_ms is None else b"retry: %d\n\n" % retry_ms
        return retry + (_control_comment(data, position) if self._control == "comments" else b"")

    def heartbeat(self, position: Cursor) -> bytes:
        """A comment, or an event for scripts that asked to see it."""
        return self.notice("heartbeat", position) if self._heartbeat_event else comment(b"hb")


class NdjsonView:
    """`application/x-ndjson` on the events route: one frame object a line."""

    media_type = NDJSON

    def __init__(self, run: str | None, control: str, heartbeat_event: bool) -> None:
        self.run = run
        self.shows_control = self.tells_loss = control == "events"
        self.key: Hashable = ("ndjson", run, control)
        self._heartbeat_event = heartbeat_event

    def encode(self, frames: Sequence[Frame], wires: Sequence[bytes]) -> bytes:
        """One line a frame."""
        shown = (frame for frame in frames if self.shows_control or not frame.is_control)
        return b"".join(orjson.dumps(frame_object(frame)) + b"\n" for frame in shown)

    def notice(self, kind: str, position: Cursor | None, **members: Any) -> bytes:
        """A line whose `event` is `relay`."""
        if kind != "heartbeat" and not self.shows_control:
            return b""
        return _notice_object(control(kind, **members), position) + b"\n"

    def heartbeat(self, position: Cursor) -> bytes:
        """A blank line, or an object for scripts that asked to see it."""
        return self.notice("heartbeat", position) if self._heartbeat_event else b"\n"


class ProxiedSseView:
    """A run in upstream's own event-stream format: its events and nothing else, under resume ids."""

    shows_control = tells_loss = False

    def __init__(self, run: str, token: str, media_type: str) -> None:
        self.run: str | None = run
        self.media_type = media_type
        self.key: Hashable = ("proxied", token)
        self._prefix = b"id: %b%b." % (RESUME_PREFIX.encode(), token.encode())

    def encode(self, frames: Sequence[Frame], wires: Sequence[bytes]) -> bytes:
        """Blocks with `id: rly.<token>.<cursor>`."""
        wires = _without_control(frames, wires)
        return self._prefix + self._prefix.join(wires) if wires else b""

    def prime(self, retry_ms: int) -> bytes:
        """One named event with data, for a browser's EventSource: from now on it resumes this run."""
        return b"%b0-0\nretry: %d\nevent: relay\ndata: %b\n\n" % (self._prefix, retry_ms, control("hello"))

    def notice(self, kind: str, position: Cursor | None, **members: Any) -> bytes:
        """Nothing: an SDK may die of an event that upstream did not send."""
        return b""

    def heartbeat(self, position: Cursor) -> bytes:
        """A bare comment line: a blank line after it would make some SDKs dispatch an empty event."""
        return comment(b"hb")


class ProxiedNdjsonView:
    """A run in upstream's own line format, which has no place for an id."""

    shows_control = tells_loss = False

    def __init__(self, run: str, media_type: str) -> None:
        self.run: str | None = run
        self.media_type = media_type
        self.key: Hashable = ("lines", run)

    def encode(self, frames: Sequence[Frame], wires: Sequence[bytes]) -> bytes:
        """The lines upstream sent."""
        return b"".join(frame.data + b"\n" for frame in frames if not frame.is_control)

    def notice(self, kind: str, position: Cursor | None, **members: Any) -> bytes:
        """Nothing."""
        return b""

    def heartbeat(self, position: Cursor) -> bytes:
        """Nothing: not every reader of lines takes an empty one."""
        return b""


def _control_comment(data: bytes, position: Cursor | None) -> bytes:
    # An id in a block without data moves a standard client's cursor without an event.
    id_ = b"" if position is None else b"id: %b\n" % str(position).encode()
    return comment(CONTROL_EVENT.encode() + b" " + data) + id_ + b"\n"


def _notice_object(data: bytes, position: Cursor | None) -> bytes:
    return orjson.dumps(
        {
            "id": None if position is None else str(position),
            "event": CONTROL_EVENT,
            "data": data.decode(),
            "run": None,
            "at": None,
        }
    )
