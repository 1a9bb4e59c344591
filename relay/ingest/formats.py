"""The formats of pushed frames: what a producer may send, as events.

A frame is an object `{event?, data}`, or an event of a `text/event-stream`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgpack  # type: ignore[import-untyped]
import orjson

from relay.errors import CallerError, FrameTooLarge, InvalidEvent
from relay.frame import Event, check_event_name
from relay.ndjson import NDJSON, LineParser
from relay.sse import EVENT_STREAM, EventStreamParser

MSGPACK = "application/msgpack"

# The six characters of \u0041 may stand for one byte.
_ESCAPED = 6

# A number takes 9 bytes in MessagePack, and fewer as text.
_PACKED = 2

_FEED_BYTES = 64 * 1024

_make = tuple.__new__
"""What `Event()` calls, without the call."""


class FrameParser:
    """Turns the pieces of a body into events.

    What is wrong with the body is kept in `error`, and found behind the events that came before it. It names
    the frame by its number in the body, from 1. After it nothing more may be fed.
    """

    def __init__(self, max_bytes: int) -> None:
        self.error: CallerError | None = None
        self._max_bytes = max_bytes
        self._number = 0

    def feed(self, data: bytes, last: bool) -> list[Event]:
        """The events that this piece completes."""
        events: list[Event] = []
        try:
            for item in self._items(data, last):
                self._number += 1
                events.append(event_of(item, self._number, self._max_bytes))
        except CallerError as error:
            self.error = error
        return events

    def _items(self, data: bytes, last: bool) -> Iterator[Any]:
        raise NotImplementedError


class Lines(FrameParser):
    """`application/x-ndjson`: one object a line."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__(max_bytes)
        self._parser = LineParser(max_bytes * _ESCAPED)

    def _items(self, data: bytes, last: bool) -> Iterator[Any]:
        lines = self._parser.feed(data)
        if last and self._parser.overflow is None:
            lines += self._parser.close()
        for line in lines:
            try:
                item = orjson.loads(line)
            except orjson.JSONDecodeError as error:
                raise _invalid(self._number + 1, f"is not JSON: {error}") from None
            yield item
        if self._parser.overflow is not None:
            raise _too_large(self._number + 1, self._max_bytes)


class Packed(FrameParser):
    """`application/msgpack`: one map after another."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__(max_bytes)
        self._item_max_bytes = max_bytes * _PACKED
        self._unpacker = msgpack.Unpacker(max_buffer_size=self._item_max_bytes + _FEED_BYTES)
        self._fed = 0
        self._unpacked = 0

    def _items(self, data: bytes, last: bool) -> Iterator[Any]:
        for begin in range(0, len(data), _FEED_BYTES):
            piece = data[begin : begin + _FEED_BYTES]
            try:
                self._unpacker.feed(piece)
            except msgpack.BufferFull:
                raise _too_large(self._number + 1, self._max_bytes) from None
            self._fed += len(piece)
            yield from self._unpack()
            # What an unfinished map has brought so far is no longer in the unpacker's buffer.
            if self._fed - self._unpacked > self._item_max_bytes:
                raise _too_large(self._number + 1, self._max_bytes)
        if last and self._unpacked < self._fed:
            raise _invalid(self._number + 1, "is cut: the body ends within it.")

    def _unpack(self) -> Iterator[Any]:
        while True:
            try:
                item = next(self._unpacker)
            except StopIteration:
                return
            except (ValueError, TypeError) as error:
                raise _invalid(self._number + 1, f"is not MessagePack: {error}") from None
            self._unpacked = self._unpacker.tell()
            yield item


class ServerSentEvents(FrameParser):
    """`text/event-stream`. Ids, retries and comments are dropped. The end of the body ends its last event:
    that the body is whole, HTTP has said."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__(max_bytes)
        self._parser = EventStreamParser(max_bytes)

    def feed(self, data: bytes, last: bool) -> list[Event]:
        """The events that this piece completes."""
        events: list[Event] = []
        try:
            for event, text, _ in self._parser.feed(data + b"\n\n" if last else data):
                self._number += 1
                events.append(Event(_event_name(event, self._number), text))
            if self._parser.overflow is not None:
                raise _too_large(self._number + 1, self._max_bytes)
        except CallerError as error:
            self.error = error
        return events


FORMATS: dict[str, type[FrameParser]] = {NDJSON: Lines, EVENT_STREAM: ServerSentEvents, MSGPACK: Packed}
"""What is journaled while it arrives, by media type."""


def events_of_json(body: bytes, max_bytes: int) -> list[Event]:
    """The events of one object, or of an array of them: all, or none. Raises `InvalidEvent`,
    `FrameTooLarge`."""
    try:
        items = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise InvalidEvent(f"The body is not JSON: {error}") from None
    if not isinstance(items, list):
        items = [items]
    return [event_of(item, number, max_bytes) for number, item in enumerate(items, 1)]


def event_of(item: Any, number: int, max_bytes: int) -> Event:
    """The event that an object `{event?, data}` stands for; other members are left alone. Data that is no
    string is journaled as compact JSON."""
    if type(item) is not dict:
        raise _invalid(number, "is not an object.")
    data = item.get("data")
    if type(data) is str:
        text = data.encode()
    elif data is None:
        raise _invalid(number, "has no data.")
    else:
        try:
            text = orjson.dumps(data)
        except TypeError as error:
            raise _invalid(number, f"has data that cannot be written as JSON: {error}") from None
    if len(text) > max_bytes:
        raise _too_large(number, max_bytes)
    event = item.get("event")
    if not event:
        if event is None or event == "":
            return _make(Event, ("", text))
        raise _invalid(number, "has an event name that is not a string.")
    if type(event) is not str:
        raise _invalid(number, "has an event name that is not a string.")
    if len(event) > max_bytes:
        raise _too_large(number, max_bytes)
    return Event(_event_name(event, number), text)


def _event_name(event: str, number: int) -> str:
    try:
        return check_event_name(event)
    except InvalidEvent as error:
        raise InvalidEvent(f"Frame {number}: {error.detail}", frame=number) from None


def _invalid(number: int, what: str) -> InvalidEvent:
    return InvalidEvent(f"Frame {number} {what}", frame=number)


def _too_large(number: int, max_bytes: int) -> FrameTooLarge:
    return FrameTooLarge(f"Frame {number} is larger than {max_bytes} bytes.", frame=number, limit=max_bytes)
