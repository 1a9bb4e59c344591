"""The least that a fan-out in Python can be, to show that the generators carry more than any system gives.

    python -m benchmarks.load.bare_loop <ms>

An asyncio protocol on uvloop. Whoever GETs is written what anybody POSTs, which is answered at once; what is
POSTed within so many milliseconds is written together. It knows one stream, keeps nothing, resumes nothing
and parses no more of HTTP than it must.
"""

from __future__ import annotations

import asyncio
import re
import sys
from typing import cast

import uvloop

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
ACCEPTED = b"HTTP/1.1 204 No Content\r\n\r\n"
LENGTH = re.compile(rb"(?i)\r\ncontent-length: *(\d+)\r\n")


class Loop:
    """The readers, what waits for them, and whose answer waits because a reader is slow."""

    def __init__(self, group_s: float) -> None:
        self.group_s = group_s
        self.readers: set[Exchange] = set()
        self.slow: set[Exchange] = set()
        self._waiting: list[bytes] = []
        self._unanswered: list[asyncio.Transport] = []

    def publish(self, body: bytes, producer: asyncio.Transport) -> None:
        self._waiting.append(b"data: %b\n\n" % body)
        if not self.group_s:
            self._write()
        elif len(self._waiting) == 1:
            asyncio.get_running_loop().call_later(self.group_s, self._write)
        self._unanswered.append(producer)
        self.answer()

    def answer(self) -> None:
        """Let the producer go on, unless a reader is behind: nothing here bounds what waits for it."""
        if not self.slow:
            for producer in self._unanswered:
                producer.write(ACCEPTED)
            self._unanswered.clear()

    def _write(self) -> None:
        data = b"".join(self._waiting)
        self._waiting.clear()
        chunk = b"%x\r\n%b\r\n" % (len(data), data)
        for reader in self.readers:
            reader.transport.write(chunk)


class Exchange(asyncio.Protocol):
    """A reader's connection or a producer's."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._loop.readers.discard(self)
        self.resume_writing()

    def pause_writing(self) -> None:
        self._loop.slow.add(self)

    def resume_writing(self) -> None:
        self._loop.slow.discard(self)
        self._loop.answer()

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, end, body = self._received.partition(b"\r\n\r\n")
        if not end:
            return
        if head.startswith(b"GET "):
            self.transport.write(HEAD)
            self._loop.readers.add(self)
            self._received = b""
            return
        found = LENGTH.search(head + b"\r\n")
        if found is not None and len(body) == int(found[1]):
            self._received = b""
            self._loop.publish(body, self.transport)


async def main(group_ms: float) -> None:
    loop = Loop(group_ms / 1000)
    server = await asyncio.get_running_loop().create_server(
        lambda: Exchange(loop), "127.0.0.1", 0, backlog=4096
    )
    print(f"ready on http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(float(sys.argv[1])))
