"""The agent backend of the benchmarks: an asyncio protocol that writes prepared chunks and nothing else.

    /paced?rate=50&shape=raw     frames at a steady rate until told to end; shapes: raw, openai
    /burst?frames=1000&size=100  so many frames as fast as they are taken
    /first                       a frame at once, another 5 ms later, the end

Every frame holds when it was written ("t", nanoseconds of the monotonic clock, which all processes of a
machine share) and its number in its stream ("n"). On stdin, `end` ends all paced streams and is answered
with how many frames they had in all; `hold` makes them silent until `go on`.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from typing import cast
from urllib.parse import parse_qsl, urlsplit

import uvloop

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"
TICK_S = 0.001
BURST_STEP = 50
"""Frames written at once by a burst, before the connection's buffer is looked at."""

RAW = b'data: {"t":%d,"n":%d,"text":"Four score and seven years ago our fathers brought forth"}\n\n'
OPENAI = (
    b'data: {"id":"chatcmpl-8Xk2","object":"chat.completion.chunk","created":1763726400,"model":"m-1",'
    b'"t":%d,"n":%d,"choices":[{"index":0,"delta":{"content":" fathers"},"finish_reason":null}]}\n\n'
)
SHAPES = {"raw": (RAW, b""), "openai": (OPENAI, b"e\r\ndata: [DONE]\n\n\r\n")}


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


class Exchange(asyncio.Protocol):
    """One connection, one request at a time; requests have no bodies."""

    def __init__(self, pacer: Pacer) -> None:
        self._pacer = pacer
        self._received = b""
        self._writable = asyncio.Event()
        self._writable.set()
        self._burst: asyncio.Task[None] | None = None
        self.template, self.last = SHAPES["raw"]
        self.n = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._pacer.discard(self)
        if self._burst is not None:
            self._burst.cancel()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def data_received(self, data: bytes) -> None:
        self._received += data
        while b"\r\n\r\n" in self._received:
            head, _, self._received = self._received.partition(b"\r\n\r\n")
            self._answer(head.split(b" ", 2)[1].decode())

    def _answer(self, target: str) -> None:
        parts = urlsplit(target)
        query = dict(parse_qsl(parts.query))
        self.n = 0
        if parts.path == "/paced":
            self.template, self.last = SHAPES[query["shape"]]
            self.transport.write(HEAD)
            self._pacer.add(self, float(query["rate"]))
        elif parts.path == "/burst":
            self._burst = asyncio.create_task(self._write_burst(int(query["frames"]), int(query["size"])))
        elif parts.path == "/first":
            self.template, self.last = SHAPES["raw"]
            self.transport.write(HEAD + self._frame())
            asyncio.get_running_loop().call_later(0.005, self._write_second)
        else:
            self.transport.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")

    def _frame(self) -> bytes:
        self.n += 1
        return chunk(self.template % (time.monotonic_ns(), self.n))

    def write_frame(self) -> None:
        self.transport.write(self._frame())

    def end(self) -> None:
        self.transport.write(self.last + END)

    def _write_second(self) -> None:
        self.transport.write(self._frame() + END)

    async def _write_burst(self, frames: int, size: int) -> None:
        self.transport.write(HEAD)
        self.template = b'data: {"t":%d,"n":%d,"text":"' + b"x" * size + b'"}\n\n'
        while self.n < frames:
            step = min(BURST_STEP, frames - self.n)
            self.transport.write(b"".join([self._frame() for _ in range(step)]))
            await self._writable.wait()
        self.transport.write(END)


class Pacer:
    """Writes a frame to every paced stream once a period, the streams spread evenly over it."""

    def __init__(self) -> None:
        self._buckets: dict[float, list[list[Exchange]]] = {}
        self._places: dict[Exchange, list[Exchange]] = {}
        self._sent = 0
        self._ticks = 0
        self._began = 0.0
        self._ticking = False
        self._held = False

    def add(self, exchange: Exchange, rate: float) -> None:
        buckets = self._buckets.setdefault(rate, [[] for _ in range(round(1 / rate / TICK_S))])
        place = min(buckets, key=len)
        place.append(exchange)
        self._places[exchange] = place
        self.hold(self._held)

    def hold(self, held: bool) -> dict[str, int]:
        self._held = held
        if not self._ticking and not held:
            self._ticking = True
            self._began = asyncio.get_running_loop().time()
            self._ticks = 0
            self._tick()
        return {"streams": len(self._places)}

    def discard(self, exchange: Exchange) -> None:
        place = self._places.pop(exchange, None)
        if place is not None:
            place.remove(exchange)
            self._sent += exchange.n

    def end_all(self) -> int:
        for exchange in list(self._places):
            exchange.end()
            self.discard(exchange)
        sent, self._sent = self._sent, 0
        return sent

    def _tick(self) -> None:
        if not self._places or self._held:
            self._ticking = False
            return
        loop = asyncio.get_running_loop()
        due = int((loop.time() - self._began) / TICK_S)
        while self._ticks < due:  # a late tick is made up for, so that the rate holds
            self._ticks += 1
            for buckets in self._buckets.values():
                for exchange in buckets[self._ticks % len(buckets)]:
                    exchange.write_frame()
        # Not at the tick's own time: uvloop's timers have whole milliseconds, and what is due in less than
        # half of one is called at once, again and again, which took more of a core than the writing.
        loop.call_later(TICK_S, self._tick)


async def main() -> None:
    loop = asyncio.get_running_loop()
    pacer = Pacer()
    server = await loop.create_server(lambda: Exchange(pacer), "127.0.0.1", 0, backlog=4096)
    print(f"ready on http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)

    def command() -> None:
        line = sys.stdin.readline()
        if line == "end\n":
            print(json.dumps({"sent": pacer.end_all()}), flush=True)
        elif line in ("hold\n", "go on\n"):
            print(json.dumps(pacer.hold(line == "hold\n")), flush=True)
        elif not line:
            stopped.set()

    stopped = asyncio.Event()
    loop.add_reader(sys.stdin, command)
    await stopped.wait()


if __name__ == "__main__":
    uvloop.run(main())
