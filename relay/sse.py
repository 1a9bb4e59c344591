"""Server-sent events, both ways: what upstream and producers send us, and what readers get from us.

Section numbers are those of the WHATWG HTML standard, "Server-sent events" (9.2). The parser works on
bytes, line by line. That reads the same as decoding the whole body first: CR, LF, `:` and space are never
part of a longer UTF-8 sequence, so a sequence cut short by one of them is one U+FFFD either way.
"""

from __future__ import annotations

from typing import NamedTuple

from relay.errors import FrameTooLarge
from relay.frame import Frame

_BOM = b"\xef\xbb\xbf"
_LF = 0x0A
_CR = 0x0D

EVENT_STREAM = "text/event-stream"
"""The format's media type."""

LINE_OVERHEAD_BYTES = 1024
"""A line may be this much longer than an event's data: room for a field name, or for a comment."""

RETRY_MAX_DIGITS = 18
"""A longer `retry` is ignored: no wait is that long, and Python's `int` refuses more than 4300 digits."""


class ServerSentEvent(NamedTuple):
    """One dispatched event. `event` is "" when none was named; `data` is valid UTF-8."""

    event: str
    data: bytes
    last_event_id: str


class EventStreamParser:
    """Turns the chunks of a `text/event-stream` body into events, by the rules of 9.2.5 and 9.2.6.

    An event of more than `max_data_bytes` (counted as it would be dispatched), or a line of any kind of more
    than `max_data_bytes + LINE_OVERHEAD_BYTES`, ends the parse: `feed` returns the events that were complete
    before it and sets `overflow`; every later `feed` raises it. So a caller writes::

        for event in parser.feed(chunk):
            ...
        if parser.overflow is not None:
            raise parser.overflow

    Where an overflow is found does not depend on how the body was cut into chunks. There is no `close`:
    an event without its blank line at the end of the body is discarded (9.2.6).

    `last_event_id` is that of the last blank line seen, `retry_ms` the last valid `retry` or None.
    """

    def __init__(self, max_data_bytes: int) -> None:
        self.last_event_id = ""
        self.retry_ms: int | None = None
        self.overflow: FrameTooLarge | None = None
        self._max_data_bytes = max_data_bytes
        self._max_line_bytes = max_data_bytes + LINE_OVERHEAD_BYTES
        self._started = False  # past the place where a byte order mark can stand
        self._after_cr = False  # a LF that comes next belongs to the line end already seen
        self._partial = bytearray()  # the line whose end has not come yet
        self._event = ""
        self._data: bytes | bytearray | None = None  # bytes for one line, grown in place from the second on
        self._id = ""
        self._between_events = False  # nothing is begun, and no line end waits for its second half

    def lone(self, chunk: bytes) -> bytes | None:
        """The data of a chunk that is one event of one line, without a name, as most are that a producer
        sends as it makes them; it is fed then. None, and nothing done, for any other chunk."""
        if (
            self._between_events
            and chunk[:6] == b"data: "
            and chunk[-2:] == b"\n\n"
            and chunk.count(b"\n") == 2
            and b"\r" not in chunk
            and chunk.isascii()
            and len(chunk) <= self._max_data_bytes
        ):
            self.last_event_id = self._id
            return chunk[6:-2]
        return None

    def feed(self, chunk: bytes) -> list[ServerSentEvent]:
        """The events that `chunk` completes; raises `FrameTooLarge` only after `overflow` was set."""
        if self.overflow is not None:
            raise self.overflow
        if not self._started:
            chunk = self._skip_byte_order_mark(chunk)
        if self._after_cr and chunk:
            self._after_cr = False
            chunk = chunk.removeprefix(b"\n")
        if not chunk:
            return []
        return self._read_lines(self._split(chunk))

    def _skip_byte_order_mark(self, chunk: bytes) -> bytes:
        # Holds back at most two bytes, and only those which may become the mark: no line end waits for them.
        self._partial += chunk
        head = bytes(self._partial)
        if len(head) < len(_BOM) and _BOM.startswith(head):
            return b""
        self._started = True
        self._partial.clear()
        return head.removeprefix(_BOM)

    def _split(self, chunk: bytes) -> list[bytes]:
        # The lines that end in this chunk; the rest is kept. `bytes.splitlines` knows CR, LF and CRLF only.
        lines = chunk.splitlines()
        last = chunk[-1]
        tail = b"" if last in (_LF, _CR) else lines.pop()
        # A CR ends its line now, not when it is known what follows: the event would be late by a chunk.
        self._after_cr = last == _CR
        if lines and self._partial:
            self._partial += lines[0]
            lines[0] = bytes(self._partial)
            self._partial.clear()
        self._partial += tail
        return lines

    def _read_lines(self, lines: list[bytes]) -> list[ServerSentEvent]:
        events: list[ServerSentEvent] = []
        max_line_bytes = self._max_line_bytes
        event, data = self._event, self._data
        for line in lines:
            if not line:
                self.last_event_id = self._id
                if data is not None:
                    events.append(ServerSentEvent(event, bytes(data), self._id))
                    data = None
                event = ""
                continue
            if len(line) > max_line_bytes:
                self._overflow("A line", max_line_bytes)
                return events
            # A comment has the empty field name, a line without a colon the empty value.
            name, _, value = line.partition(b":")
            if value.startswith(b" "):
                value = value[1:]
            if name == b"data":
                if not value.isascii():
                    value = value.decode(errors="replace").encode()
                if data is None:
                    data = value
                else:
                    if isinstance(data, bytes):
                        data = bytearray(data)
                    data += b"\n"
                    data += value
                if len(data) > self._max_data_bytes:
                    self._overflow("An event's data", self._max_data_bytes)
                    return events
            elif name == b"event":
                event = value.decode(errors="replace")
            elif name == b"id":
                if b"\0" not in value:
                    self._id = value.decode(errors="replace")
            elif name == b"retry" and value.isdigit() and len(value) <= RETRY_MAX_DIGITS:
                self.retry_ms = int(value)
        self._event, self._data = event, data
        self._between_events = not (event or data is not None or self._partial or self._after_cr)
        if len(self._partial) > max_line_bytes:
            self._overflow("A line", max_line_bytes)
        return events

    def _overflow(self, what: str, max_bytes: int) -> None:
        self.overflow = FrameTooLarge(f"{what} is longer than {max_bytes} bytes.")
        self._between_events = False
        self._partial.clear()
        self._data = None


def encode_wire(frame: Frame) -> bytes:
    """A frame's SSE block from its id's value on: `<seq>-<ms>`, event and data lines, blank line.

    Made once per frame and shared: `b"id: " + wire` is the block of the events route,
    `b"id: rly.<token>." + wire` that of the proxied one, `prefix + prefix.join(wires)` a batch of them.
    """
    seq, ms, _, event, data = frame
    if b"\n" in data or b"\r" in data:
        data = _continue_lines(data, b"data: ")
    if event:
        return b"%d-%d\nevent: %b\ndata: %b\n\n" % (seq, ms, event.encode(), data)
    return b"%d-%d\ndata: %b\n\n" % (seq, ms, data)


def encode_event(*, id: str | None, event: str, data: bytes, retry_ms: int | None = None) -> bytes:
    """A whole SSE block, for the control frames that are made per connection. `id` and `event` hold no line
    end; `id` None and `event` "" leave the line out."""
    block = bytearray()
    if id is not None:
        block += b"id: %b\n" % id.encode()
    if retry_ms is not None:
        block += b"retry: %d\n" % retry_ms
    if event:
        block += b"event: %b\n" % event.encode()
    block += b"data: %b\n\n" % _continue_lines(data, b"data: ")
    return bytes(block)


def comment(text: bytes) -> bytes:
    """A comment line without a blank line after it: some SDKs dispatch an event at every blank line."""
    return b": %b\n" % _continue_lines(text, b": ")


def _continue_lines(text: bytes, prefix: bytes) -> bytes:
    # Every line end of the format starts a new line, and all of them are read back as LF (9.2.6).
    return text.replace(b"\r\n", b"\n").replace(b"\r", b"\n").replace(b"\n", b"\n" + prefix)
