"""Newline-delimited JSON bodies, cut into lines. What a line means is its dialect's business, not ours."""

from __future__ import annotations

from relay.errors import FrameTooLarge

_BLANK = b" \t\r"  # the white space of JSON (RFC 8259 section 2) that can stand within a line

NDJSON = "application/x-ndjson"
"""The media type that relay serves lines as; others name the same format."""


class LineParser:
    """Turns the chunks of an NDJSON body into its lines: without LF or CRLF, blank ones skipped, valid UTF-8.

    A line of more than `max_data_bytes` (counted as it would be returned) ends the parse: the call that finds
    it returns the lines before it and sets `overflow`; every later call raises it. So a caller checks
    `overflow` after it has used the lines of each call, as with `relay.sse.EventStreamParser`. Where an
    overflow is found does not depend on how the body was cut into chunks.
    """

    def __init__(self, max_data_bytes: int) -> None:
        self.overflow: FrameTooLarge | None = None
        self._max_data_bytes = max_data_bytes
        self._partial = bytearray()  # the line whose LF has not come yet

    def feed(self, chunk: bytes) -> list[bytes]:
        """The lines that `chunk` completes; raises `FrameTooLarge` only after `overflow` was set."""
        if self.overflow is not None:
            raise self.overflow
        pieces = chunk.split(b"\n")
        tail = pieces.pop()
        if pieces and self._partial:
            self._partial += pieces[0]
            pieces[0] = bytes(self._partial)
            self._partial.clear()
        self._partial += tail
        lines = self._read(pieces)
        # One byte more than a line may hold: the last one may be the CR of a CRLF.
        if len(self._partial) > self._max_data_bytes + 1:
            self._set_overflow()
        return lines

    def close(self) -> list[bytes]:
        """The last line, if the body did not end with LF; may set `overflow` as `feed` does."""
        if self.overflow is not None:
            raise self.overflow
        last = bytes(self._partial)
        self._partial.clear()
        return self._read([last])

    def _read(self, pieces: list[bytes]) -> list[bytes]:
        lines: list[bytes] = []
        for piece in pieces:
            line = piece.removesuffix(b"\r")
            if not line.isascii():
                line = line.decode(errors="replace").encode()
            if len(line) > self._max_data_bytes:
                self._set_overflow()
                break
            if line.strip(_BLANK):
                lines.append(line)
        return lines

    def _set_overflow(self) -> None:
        if self.overflow is None:
            self.overflow = FrameTooLarge(f"A line is longer than {self._max_data_bytes} bytes.")
        self._partial.clear()
