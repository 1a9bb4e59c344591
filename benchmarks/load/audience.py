"""An audience in one process: raw non-blocking sockets under one epoll, that count what they are told.

    python -m benchmarks.load.audience <base URL> <target> <wanted> <readers> <streams> <on their way>

So many readers connect, spread over so many streams, whose number replaces `{}` in the target; so many at
most at a time are on their way, which means that what is wanted has not come yet. Prints a line of JSON when
all have it. Then on stdin, each answered with a line of JSON:

    count          begin to count. What has come is looked for every few milliseconds only: a read then takes
                   what was written in many, and the audience stays cheap under any load
    time           begin to note when everything comes, at once; it is looked at when all have come
    expect <n>     wait until every reader has n frames (or nothing has come for a while), and tell what came

A frame holds when it was sent ("t", nanoseconds of the monotonic clock, which all processes of a machine
share) and its number in its stream ("n"), as `publisher` writes them. When timed, every number must be the
one after the last. When counted, so must the last of every read, with those in between counted; and of one
reader in ten everything is kept, and looked at frame by frame when the clock has stopped.
"""

from __future__ import annotations

import json
import os
import re
import select
import socket
import sys
import time
from array import array
from collections import deque
from typing import Any
from urllib.parse import urlsplit

from benchmarks.load.publisher import NUMBER_DIGITS

FRAME = re.compile(rb'"t":"(\d+)","n":"(\d+)"')
NUMBER_MARK = b'","n":"'
BOUNDARY = re.compile(rb"\r\n[0-9a-fA-F]+\r\n")
"""Between two chunks. No frame of the benchmarks holds CR LF, so it can be cut out before parsing."""

RECEIVE_BYTES = 256 * 1024
TIMED_RECEIVE_BYTES = 16 * 1024
"""Less, because it is allocated for every read."""

PAUSE_S = 0.01
"""Between two looks while counting."""

KEPT_EVERY = 10
LULL_S = 0.2
"""Nothing came for so long: it may be all."""

SILENCE_S = 5.0
"""Nothing came for so long: what is missing will not come."""


class Reader:
    """One connection and what it had."""

    __slots__ = ("kept", "n", "receive", "rest", "socket", "waiting")

    def __init__(self, connection: socket.socket, kept: list[bytes] | None) -> None:
        self.socket = connection
        self.receive = connection.recv
        self.rest = b""
        self.n = 0
        self.waiting = True
        self.kept = kept


class Audience:
    """All readers, and what they saw together."""

    def __init__(self, base: str, target: str, wanted: bytes) -> None:
        url = urlsplit(base)
        self._address = (str(url.hostname), url.port or 80)
        self._request = f"GET {target} HTTP/1.1\r\nHost: {url.netloc}\r\nAccept: text/event-stream\r\n\r\n"
        self._wanted = wanted
        self._epoll = select.epoll()
        self._readers: dict[int, Reader] = {}
        self._buffer = bytearray(RECEIVE_BYTES)
        self._typed = b""
        self._expected: int | None = None
        self._timed = False
        self._noted: list[tuple[int, int, bytes]] = []
        self._delays_ns = array("q")
        self._received = 0
        self._out_of_order = 0
        self._last_ns = 0
        self._cpu_before_s = 0.0

    def come(self, readers: int, streams: int, on_their_way: int) -> dict[str, Any]:
        """Connect all, and wait until all have what is wanted."""
        began = time.monotonic()
        waiting: deque[int] = deque(range(readers))
        coming = 0
        while waiting or coming:
            while waiting and coming < on_their_way:
                self._connect(waiting.popleft(), streams)
                coming += 1
            for fd, _ in self._epoll.poll():
                reader = self._readers[fd]
                data = reader.socket.recv(RECEIVE_BYTES)
                if not data:
                    raise RuntimeError(f"A reader was sent away: {reader.rest[-500:]!r}")
                if reader.kept is not None:
                    reader.kept.append(data)
                reader.rest += data
                if reader.waiting and self._wanted in reader.rest:
                    reader.waiting = False
                    reader.rest = b""
                    coming -= 1
        return {"seconds": time.monotonic() - began}

    def _connect(self, number: int, streams: int) -> None:
        # Connected and written to while blocking: on loopback neither waits for the server's process.
        connection = socket.create_connection(self._address)
        connection.sendall(self._request.replace("{}", str(number % streams)).encode())
        connection.setblocking(False)
        kept: list[bytes] | None = [] if number % KEPT_EVERY == 0 else None
        self._readers[connection.fileno()] = Reader(connection, kept)
        self._epoll.register(connection.fileno(), select.EPOLLIN | select.EPOLLET)

    def serve(self) -> None:
        """Read, and do as told on stdin, until it ends."""
        stdin = sys.stdin.fileno()
        self._epoll.register(stdin, select.EPOLLIN)
        while True:
            ready = self._epoll.poll(LULL_S, maxevents=len(self._readers) + 1)
            read = self._note if self._timed else self._count
            for fd, _ in ready:
                if fd != stdin:
                    read(fd)
                elif not self._typed_more(os.read(stdin, 4096)):
                    return
            if self._timed:
                if not ready:
                    self._look_at_noted()
            elif ready:
                time.sleep(PAUSE_S)
            if self._expected is not None:
                silent = time.monotonic_ns() - self._last_ns > SILENCE_S * 1e9
                if silent or self._received >= self._expected * len(self._readers):
                    self._tell()

    def _note(self, fd: int) -> None:
        receive = self._readers[fd].receive
        while True:
            try:
                data = receive(TIMED_RECEIVE_BYTES)
            except BlockingIOError:
                return
            self._noted.append((time.monotonic_ns(), fd, data))
            if len(data) < TIMED_RECEIVE_BYTES:  # else there may be more, and no edge to tell it
                return

    def _look_at_noted(self) -> None:
        began_s = time.process_time()
        for now, fd, data in self._noted:
            reader = self._readers[fd]
            data = reader.rest + data
            whole = max(0, data.rfind(b"\n\n"))
            reader.rest = data[whole:]
            for t, n in FRAME.findall(data, 0, whole):
                self._delays_ns.append(now - int(t))
                self._received += 1
                self._last_ns = now
                reader.n += 1
                self._out_of_order += int(n) != reader.n
        self._noted.clear()
        self._cpu_before_s += time.process_time() - began_s  # it is no part of reading

    def _count(self, fd: int) -> None:
        reader = self._readers[fd]
        taken = RECEIVE_BYTES
        while taken == RECEIVE_BYTES:
            try:
                taken = reader.socket.recv_into(self._buffer)
            except BlockingIOError:
                return
            data = bytes(memoryview(self._buffer)[:taken])
            if reader.kept is not None:
                reader.kept.append(data)
            data = reader.rest + data
            whole = max(0, data.rfind(b"\n\n"))
            reader.rest = data[whole:]
            came = data.count(NUMBER_MARK, 0, whole)
            if not came:
                continue
            at = data.rfind(NUMBER_MARK, 0, whole) + len(NUMBER_MARK)
            n = int(data[at : at + NUMBER_DIGITS])
            self._out_of_order += n != reader.n + came
            reader.n = n
            self._received += came
            self._last_ns = time.monotonic_ns()

    def _typed_more(self, data: bytes) -> bool:
        *lines, self._typed = (self._typed + data).split(b"\n")
        for line in lines:
            command, _, argument = line.decode().partition(" ")
            if command == "expect":
                self._expected = int(argument)
                self._last_ns = self._last_ns or time.monotonic_ns()
            else:
                self._timed = command == "time"
                self._cpu_before_s = time.process_time()
                answer({})
        return bool(data)

    def _tell(self) -> None:
        cpu_s = time.process_time() - self._cpu_before_s
        expected, self._expected = self._expected, None
        delays = sorted(self._delays_ns)

        def percentile_ms(share: float) -> float:
            return delays[min(len(delays) - 1, int(len(delays) * share))] / 1e6 if delays else 0.0

        if not self._timed:
            kept = [reader.kept for reader in self._readers.values() if reader.kept is not None]
            self._out_of_order += sum(not _is_whole(data, expected or 0) for data in kept)
        answer(
            {
                "received": self._received,
                "last_ns": self._last_ns,
                "out_of_order": self._out_of_order,
                "cpu_s": cpu_s,
                "p50_ms": percentile_ms(0.5),
                "p99_ms": percentile_ms(0.99),
                "max_ms": percentile_ms(1.0),
            }
        )


def _is_whole(data: list[bytes], frames: int) -> bool:
    found = FRAME.findall(BOUNDARY.sub(b"", b"".join(data)))
    return [int(n) for _, n in found] == list(range(1, frames + 1))


def answer(found: dict[str, Any]) -> None:
    print(json.dumps(found), flush=True)


def main(base: str, target: str, wanted: str, *sizes: str) -> None:
    audience = Audience(base, target, wanted.encode())
    answer(audience.come(*map(int, sizes)))
    audience.serve()


if __name__ == "__main__":
    main(*sys.argv[1:])
