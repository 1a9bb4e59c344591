"""A crowd of readers in one process: non-blocking sockets under one epoll. Of each reader it keeps what a
client has, its cursor, and the number of the frame it had last, so that a missed or doubled one is seen.

    python -m benchmarks.load.crowd <base URL>

Commands on stdin, each answered with a line of JSON:

    come <readers> <streams> <at once> <target>
               so many connect, spread over so many streams, whose number replaces `{}` in the target; at most
               so many at a time are on their way, that is not yet told that they are live
    cut        all connections are closed at once
    come_back <at once>
               all connect again, each with its cursor, so many at a time on their way
    finish     waits until every reader saw its run end, and tells what came in all
"""

from __future__ import annotations

import json
import os
import re
import resource
import select
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import urlsplit

FRAME = re.compile(rb'id: (\d+-\d+)\n(?:event: relay\n)?data: \{(?:"type":"([a-z.]+)"|"t":\d+,"n":(\d+))')
"""A frame's id with its number, or with the type of a control frame."""

RECEIVE_BYTES = 256 * 1024
DEADLINE_S = 100.0

FILES_BESIDE = 100
"""Files that a process has open beside its connections."""


def connections_max() -> int:
    """How many connections this process, and each it starts from now on, may have open. Raises the soft limit
    of open files up to the hard one."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard - FILES_BESIDE


class Reader:
    """One client, and its connection while it has one."""

    __slots__ = ("connection", "cursor", "ended", "live", "n", "rest", "stream", "target")

    def __init__(self, stream: int, target: str) -> None:
        self.stream = stream
        self.target = target
        self.cursor = b""
        self.n = 0
        self.live = False
        self.ended = False
        self.rest = b""
        self.connection: socket.socket | None = None


class Crowd:
    """All readers, and what they saw."""

    def __init__(self, base: str) -> None:
        url = urlsplit(base)
        self._address = (str(url.hostname), url.port or 80)
        self._host = url.netloc
        self._epoll = select.epoll()
        self._readers: list[Reader] = []
        self._connected: dict[int, Reader] = {}
        self._live_at: list[float] = []
        self._ended = 0
        self._received = 0
        self._out_of_order = 0
        self._lines: deque[str] = deque()
        self._typed = b""
        self._over = False

    def run(self) -> None:
        """Obey until stdin ends."""
        commands: dict[str, Callable[..., dict[str, Any]]] = {
            "come": self._come,
            "cut": self._cut,
            "come_back": self._come_back,
            "finish": self._finish,
        }
        self._epoll.register(0, select.EPOLLIN)
        while True:
            self._turn(lambda: bool(self._lines) or self._over)
            if not self._lines:
                return
            name, *arguments = self._lines.popleft().split()
            print(json.dumps(commands[name](*arguments)), flush=True)

    # Commands

    def _come(self, readers: str, streams: str, at_once: str, target: str) -> dict[str, Any]:
        numbers = [k % int(streams) for k in range(int(readers))]
        new = [Reader(number, target.replace("{}", str(number))) for number in numbers]
        self._readers += new
        return self._until_live(new, int(at_once))

    def _cut(self) -> dict[str, Any]:
        for reader in list(self._connected.values()):
            self._close(reader)
        return {}

    def _come_back(self, at_once: str) -> dict[str, Any]:
        return self._until_live(self._readers, int(at_once))

    def _until_live(self, readers: Iterable[Reader], at_once: int) -> dict[str, Any]:
        began = time.monotonic()
        coming = deque(readers)
        all_of_them = len(coming)
        self._live_at = []

        def live() -> bool:
            while coming and all_of_them - len(coming) - len(self._live_at) < at_once:
                self._connect(coming.popleft())
            return len(self._live_at) >= all_of_them

        self._turn(live, "every reader is live")
        return {
            "seconds": self._live_at[-1] - began,
            "median_s": self._live_at[all_of_them // 2] - began,
        }

    def _finish(self) -> dict[str, Any]:
        self._turn(lambda: self._ended >= len(self._readers), "every reader saw its run end")
        last: dict[int, set[int]] = {}
        for reader in self._readers:
            last.setdefault(reader.stream, set()).add(reader.n)
        return {
            "received": self._received,
            "out_of_order": self._out_of_order,
            "differ": sum(len(numbers) > 1 for numbers in last.values()),
            "frames": sum(max(numbers) for numbers in last.values()),
        }

    # Connections

    def _turn(self, done: Callable[[], bool], awaited: str = "") -> None:
        """Serve connections until something is done, which with `awaited` must be within the deadline."""
        deadline = time.monotonic() + DEADLINE_S
        while not done():
            for fd, events in self._epoll.poll(1.0):
                if fd == 0:
                    self._read_commands()
                elif events == select.EPOLLOUT:
                    self._ask(fd)
                elif fd in self._connected:
                    self._receive(self._connected[fd])
            if awaited and time.monotonic() > deadline:
                raise RuntimeError(f"waited in vain until {awaited}: {len(self._live_at)} live")

    def _read_commands(self) -> None:
        data = os.read(0, 4096)
        self._over = not data
        *lines, self._typed = (self._typed + data).split(b"\n")
        self._lines += [line.decode() for line in lines]
        if self._over:
            self._epoll.unregister(0)

    def _connect(self, reader: Reader) -> None:
        connection = reader.connection = socket.socket()
        connection.setblocking(False)
        reader.live, reader.rest = False, b""
        connection.connect_ex(self._address)
        self._connected[connection.fileno()] = reader
        self._epoll.register(connection.fileno(), select.EPOLLOUT)

    def _ask(self, fd: int) -> None:
        reader = self._connected[fd]
        assert reader.connection is not None
        request = f"GET {reader.target} HTTP/1.1\r\nHost: {self._host}\r\nAccept: text/event-stream\r\n"
        if reader.cursor:
            request += f"Last-Event-ID: {reader.cursor.decode()}\r\n"
        reader.connection.send(request.encode() + b"\r\n")
        self._epoll.modify(fd, select.EPOLLIN)

    def _receive(self, reader: Reader) -> None:
        assert reader.connection is not None
        data = reader.connection.recv(RECEIVE_BYTES)
        if not data:
            raise RuntimeError(f"a connection ended after frame {reader.n}: {reader.rest[-500:]!r}")
        if reader.rest:
            data = reader.rest + data
        # An event is never spread over two chunks, so what ends a chunk can stand between events only.
        whole = data.rfind(b"\n\n") + 2
        reader.rest = data[whole:] if whole > 1 else data
        for cursor, control, number in FRAME.findall(data[:whole] if whole > 1 else b""):
            reader.cursor = cursor
            if number:
                self._received += 1
                n = int(number)
                self._out_of_order += n != reader.n + 1
                reader.n = n
            elif control == b"live" and not reader.live:
                reader.live = True
                self._live_at.append(time.monotonic())
            elif control == b"run.ended" and not reader.ended:
                reader.ended = True
                self._ended += 1

    def _close(self, reader: Reader) -> None:
        assert reader.connection is not None
        del self._connected[reader.connection.fileno()]
        reader.connection.close()
        reader.connection = None


if __name__ == "__main__":
    connections_max()
    Crowd(sys.argv[1]).run()
