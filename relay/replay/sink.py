"""Where a reader's bytes go, plain or compressed.

Deflate (RFC 1951) is a sequence of blocks, and a block refers back to nothing but what its own compressor has
seen. So what is written to one reader alone is compressed by itself, and what is written to many at once is
compressed once: they differ in what they got before, which the blocks they share never refer to.
"""

from __future__ import annotations

import struct
import zlib
from typing import Protocol

LEVEL = 6

WINDOW_BITS = 12
MEMORY_LEVEL = 5
"""4 KiB to refer back to, and 32 KiB of memory for it (zlib.h): as much as a few dozen tokens need, and
little enough for thousands of streams."""

_GZIP_HEAD = b"\x1f\x8b\x08\0\0\0\0\0\0\xff"
_LAST_BLOCK = b"\x03\x00"


class Sink(Protocol):
    """Where a reader's bytes go."""

    @property
    def writable(self) -> bool:
        """Whether what was written is taken, or nearly. Who writes before holds more for a slow client."""

    async def until_writable(self) -> None:
        """Wait for it; returns at once when the client is gone."""

    def write(self, data: bytes) -> bool:
        """Send something not empty, which is dropped when the client is gone; whether it is writable then.
        Tells nobody, while it lasts, that the client left."""


class Deflater:
    """Compresses one piece after the other, each to its end, so that a client has it at once."""

    def __init__(self) -> None:
        self._stream = zlib.compressobj(LEVEL, zlib.DEFLATED, -WINDOW_BITS, MEMORY_LEVEL)

    def deflate(self, data: bytes) -> bytes:
        """Blocks that refer back to the pieces before."""
        return self._stream.compress(data) + self._stream.flush(zlib.Z_SYNC_FLUSH)


class GzipSink:
    """A sink in front of another, which gets a gzip member (RFC 1952)."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._begun = False
        self._crc = 0
        self._size = 0

    @property
    def writable(self) -> bool:
        """As the other's."""
        return self._sink.writable

    async def until_writable(self) -> None:
        """As the other's."""
        await self._sink.until_writable()

    def write(self, data: bytes) -> bool:
        """Send something to this reader alone."""
        return self.write_deflated(Deflater().deflate(data), data)

    def write_deflated(self, blocks: bytes, data: bytes) -> bool:
        """Send blocks that were made of data, and refer back to nothing that was not sent here."""
        self._crc = zlib.crc32(data, self._crc)
        self._size += len(data)
        if not self._begun:
            self._begun = True
            blocks = _GZIP_HEAD + blocks
        return self._sink.write(blocks)

    def finish(self) -> None:
        """End a member that is whole."""
        end = _LAST_BLOCK + struct.pack("<LL", self._crc, self._size & 0xFFFFFFFF)
        self._sink.write(end if self._begun else _GZIP_HEAD + end)


def accepts_gzip(accept_encoding: str) -> bool:
    """Whether an `Accept-Encoding` takes gzip (RFC 9110 section 12.5.3)."""
    weights: dict[str, bool] = {}
    for item in accept_encoding.lower().split(","):
        coding, _, parameters = item.partition(";")
        name, _, weight = parameters.strip().partition("=")
        weights[coding.strip()] = name.strip() != "q" or weight.strip().rstrip("0") not in ("", ".", "0.")
    return weights.get("gzip", weights.get("x-gzip", weights.get("*", False)))
