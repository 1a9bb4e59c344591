"""A producer: one kept-alive connection, one frame a request, the next one when the last was answered.

    python -m benchmarks.load.publisher <system> <base URL>

The systems are those of `SYSTEMS`. Commands on stdin, each answered with a line of JSON:

    open <stream>            get ready to publish into a new stream
    flat <seconds>           publish as fast as it is answered
    paced <seconds> <rate>   publish so many a second
    close                    this stream is done
"""

from __future__ import annotations

import json
import re
import socket
import sys
import time
from array import array
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

NUMBER_DIGITS = 8
PAYLOAD = b'{"t":"%018d","n":"%08d","text":"Four score and seven years ago our fathers"}'
"""About 90 bytes, always as many: when it was sent, and its number in its stream."""

HEAD_END = b"\r\n\r\n"
CONTENT_LENGTH = re.compile(rb"(?i)\r\ncontent-length: *(\d+)\r\n")
NO_BODY = b"HTTP/1.1 204"


class Connection:
    """One request at a time; what is answered must have a length, or no body."""

    def __init__(self, base: str) -> None:
        url = urlsplit(base)
        self.host = url.netloc
        self._socket = socket.create_connection((str(url.hostname), url.port or 80))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def ask(self, request: bytes) -> bytes:
        """Send a request; the body of its answer."""
        self._socket.sendall(request)
        received = self._receive()
        while (end := received.find(HEAD_END)) < 0:
            received += self._receive()
        if not received.startswith(b"HTTP/1.1 2"):
            raise RuntimeError(f"refused: {received[:1000]!r}")
        if received.startswith(NO_BODY):
            return b""
        found = CONTENT_LENGTH.search(received, 0, end + 2)
        # Of an answer in chunks only the creation of a stream has one, and its body is empty.
        whole = end + len(HEAD_END) + int(found[1]) if found else end + len(HEAD_END) + len(b"0\r\n\r\n")
        while len(received) < whole:
            received += self._receive()
        return received[end + len(HEAD_END) :]

    def _receive(self) -> bytes:
        data = self._socket.recv(65536)
        if not data:
            raise RuntimeError("The server closed the connection.")
        return data

    def close(self) -> None:
        self._socket.close()

    def request(self, method: str, target: str, body: bytes = b"", **headers: str) -> bytes:
        """A request as bytes."""
        lines = [f"{method} {target} HTTP/1.1", f"Host: {self.host}", "Content-Type: application/json"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


class Relay:
    """A run, numbered as by any producer that may have to repeat a request."""

    def __init__(self, connection: Connection, stream: str) -> None:
        runs = f"/relay/v1/streams/{stream}/runs"
        begun = json.loads(connection.ask(connection.request("POST", runs, b"{}")))
        run, writer = f"{runs}/{begun['run']}", begun["writer"]
        self._connection = connection
        self._end = connection.request("POST", f"{run}/end", b'{"status":"completed"}', Relay_Writer=writer)
        body = b'{"data":%b}' % PAYLOAD
        # Its length with its numbers in it, and then the places for them again.
        sized = connection.request("POST", f"{run}/frames", body % (0, 0), Relay_Writer=writer)
        head = sized.partition(HEAD_END)[0].replace(b"%", b"%%")
        self._template = head + b"\r\nRelay-Seq: %d" + HEAD_END + body

    def frame(self, n: int) -> bytes:
        return self._template % (n, time.monotonic_ns(), n)

    def close(self) -> None:
        self._connection.ask(self._end)


class Channel:
    """A channel of nchan, and of the bare loop, which takes the same."""

    def __init__(self, connection: Connection, stream: str) -> None:
        sized = connection.request("POST", f"/publish/{stream}", PAYLOAD % (0, 0))
        self._template = sized.partition(HEAD_END)[0].replace(b"%", b"%%") + HEAD_END + PAYLOAD

    def frame(self, n: int) -> bytes:
        return self._template % (time.monotonic_ns(), n)

    def close(self) -> None:
        pass


class DurableStream:
    """A JSON stream of the Durable Streams protocol."""

    def __init__(self, connection: Connection, stream: str) -> None:
        connection.ask(connection.request("PUT", f"/{stream}"))
        sized = connection.request("POST", f"/{stream}", PAYLOAD % (0, 0))
        self._template = sized.partition(HEAD_END)[0].replace(b"%", b"%%") + HEAD_END + PAYLOAD

    def frame(self, n: int) -> bytes:
        return self._template % (time.monotonic_ns(), n)

    def close(self) -> None:
        pass


SYSTEMS: dict[str, Callable[[Connection, str], Relay | Channel | DurableStream]] = {
    "relay": Relay,
    "channel": Channel,
    "durable-streams": DurableStream,
}


class Publisher:
    """A stream after the other, each over a connection of its own."""

    def __init__(self, system: str, base: str) -> None:
        self._system = SYSTEMS[system]
        self._base = base
        self._n = 0

    def open(self, stream: str) -> dict[str, Any]:
        self._connection = Connection(self._base)
        self._stream = self._system(self._connection, stream)
        self._n = 0
        return {}

    def flat(self, seconds: str) -> dict[str, Any]:
        return self._publish(float(seconds), 0.0)

    def paced(self, seconds: str, rate: str) -> dict[str, Any]:
        return self._publish(float(seconds), 1 / float(rate))

    def close(self) -> dict[str, Any]:
        self._stream.close()
        self._connection.close()
        return {}

    def _publish(self, window_s: float, period_s: float) -> dict[str, Any]:
        ask, frame = self._connection.ask, self._stream.frame
        taken_ns = array("q")
        began = sent = time.monotonic_ns()
        until = began + int(window_s * 1e9)
        while sent < until:
            self._n += 1
            ask(frame(self._n))
            answered = time.monotonic_ns()
            taken_ns.append(answered - sent)
            sent = answered
            if period_s:
                due = began + int(len(taken_ns) * period_s * 1e9)
                time.sleep(max(0, due - answered) / 1e9)
                sent = time.monotonic_ns()
        ordered = sorted(taken_ns)
        return {
            "published": self._n,
            "began_ns": began,
            "seconds": (time.monotonic_ns() - began) / 1e9,
            "p50_ms": ordered[len(ordered) // 2] / 1e6,
            "p99_ms": ordered[int(len(ordered) * 0.99)] / 1e6,
        }


def main(system: str, base: str) -> None:
    publisher = Publisher(system, base)
    commands: dict[str, Callable[..., dict[str, Any]]] = {
        "open": publisher.open,
        "flat": publisher.flat,
        "paced": publisher.paced,
        "close": publisher.close,
    }
    for line in sys.stdin:
        command, *arguments = line.split()
        print(json.dumps(commands[command](*arguments)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
