"""Many producers in one process: raw connections that push prepared bytes into relay, and nothing else.

    python -m benchmarks.load.producers <base URL> batches <connections> <frames a batch>
        each sends a request with so many frames, and the next when it was answered
    python -m benchmarks.load.producers <base URL> durable-batches <connections> <frames a batch>
        the same into a server of the Durable Streams protocol
    python -m benchmarks.load.producers <base URL> bodies <connections> <frames a second and connection>
        each has one request whose body does not end, and writes one frame at a time into it

Prints a line once every connection may begin: `batches` all go into one stream, `bodies` into a stream each,
and each connection has a run of its own. Then on stdin: `begin` has them push, and `end` has them end, waits
for what is still under way, and is answered with what was sent, what the server says that it appended, and
how many seconds it took to the last answer.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import sys
import time
from typing import Any, cast
from urllib.parse import urlsplit

import orjson
import uvloop

DATA = b'{"n":1,"text":"Four score and seven years ago our fathers brought forth"}'
FRAME = orjson.dumps({"data": DATA.decode()})
TICK_S = 0.001
HEAD_END = b"\r\n\r\n"
LAST_CHUNK = b"\r\n0\r\n\r\n"


class Crowd:
    """What all connections do together."""

    def __init__(self, connections: int) -> None:
        self.waiting_for_run = connections
        self.under_way = 0
        self.pushing = False
        self.sent = 0
        self.appended = 0
        self.late_s = 0.0
        """How far behind its pace the process fell at the most."""
        self.changed = asyncio.Event()

    async def until_none(self, what: str) -> None:
        while getattr(self, what):
            self.changed.clear()
            await self.changed.wait()


class Producer(asyncio.Protocol):
    """One connection and its run."""

    def __init__(self, crowd: Crowd, host: str, stream: str) -> None:
        self._crowd = crowd
        self._host = host
        self._path = f"/relay/v1/streams/{stream}/runs"
        self._received = b""
        self._run = ""
        self.writer = ""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        body = b'{"dialect":"raw"}'
        head = f"POST {self._path} HTTP/1.1\r\nHost: {self._host}\r\nContent-Type: application/json\r\n"
        self.transport.write(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)

    def data_received(self, data: bytes) -> None:
        # Answers are JSON objects without an inner one, so they end with the first brace.
        received = self._received = self._received + data if self._received else data
        if not received.endswith(b"}"):
            return
        self._received = b""
        if not received.startswith(b"HTTP/1.1 20"):
            raise SystemExit(f"a producer was refused: {received!r}")
        answer = orjson.loads(received[received.index(HEAD_END) :])
        if self._run:
            self.answered(answer["appended"])
        else:
            self._run, self.writer = answer["run"], answer["writer"]
            self._crowd.waiting_for_run -= 1
            self._crowd.changed.set()

    def head(self, media_type: str, framing: str) -> bytes:
        """Of a request that appends, less its `Relay-Seq` and the blank line."""
        return (
            f"POST {self._path}/{self._run}/frames HTTP/1.1\r\nHost: {self._host}\r\n"
            f"Content-Type: {media_type}\r\n{framing}\r\nRelay-Writer: {self.writer}\r\n"
        ).encode()

    def begin(self) -> None:
        """Send the first request."""
        raise NotImplementedError

    def answered(self, appended: int) -> None:
        """A request was answered."""
        raise NotImplementedError

    def connection_lost(self, exc: Exception | None) -> None:
        if self._crowd.under_way:
            raise SystemExit("a producer's connection broke")


class Batches(Producer):
    """Sends batches, one at a time."""

    def __init__(self, crowd: Crowd, host: str, stream: str, size: int) -> None:
        super().__init__(crowd, host, stream)
        self._size = size
        self._body = b"[" + b",".join([FRAME] * size) + b"]"
        self._seq = 1

    def begin(self) -> None:
        self._head = self.head("application/json", f"Content-Length: {len(self._body)}")
        self._crowd.under_way += 1
        self._send()

    def _send(self) -> None:
        self.transport.write(self._head + b"Relay-Seq: %d\r\n\r\n" % self._seq + self._body)
        self._seq += self._size
        self._crowd.sent += self._size

    def answered(self, appended: int) -> None:
        crowd = self._crowd
        crowd.appended += appended
        if crowd.pushing:
            self._send()
        else:
            crowd.under_way -= 1
            crowd.changed.set()


class DurableBatches(Batches):
    """The same by the Durable Streams protocol, which knows no runs: an array is so many messages, and an
    answer without a body says that all of them were appended."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._body = b"[" + b",".join([DATA] * self._size) + b"]"
        stream = self._path.split("/")[4]
        head = f"/{stream} HTTP/1.1\r\nHost: {self._host}\r\nContent-Type: application/json\r\n".encode()
        length = b"Content-Length: %d\r\n\r\n"
        self._request = b"POST " + head + length % len(self._body) + self._body
        self.transport.write(b"PUT " + head + length % 0)

    def data_received(self, data: bytes) -> None:
        received = self._received = self._received + data
        if not received.endswith(LAST_CHUNK if b"\r\nTransfer-Encoding: chunked" in received else HEAD_END):
            return
        self._received = b""
        if not received.startswith(b"HTTP/1.1 20"):
            raise SystemExit(f"a producer was refused: {received!r}")
        if self._run:
            self.answered(self._size)
        else:
            self._run = "none"
            self._crowd.waiting_for_run -= 1
            self._crowd.changed.set()

    def begin(self) -> None:
        self._crowd.under_way += 1
        self._send()

    def _send(self) -> None:
        self.transport.write(self._request)
        self._crowd.sent += self._size


class Body(Producer):
    """Writes frames into one request."""

    CHUNK = b"%x\r\n%b\n\r\n" % (len(FRAME) + 1, FRAME)

    def begin(self) -> None:
        self._crowd.under_way += 1
        head = self.head("application/x-ndjson", "Transfer-Encoding: chunked")
        self.transport.write(head + b"Relay-Seq: 1\r\n\r\n")

    def write_frame(self) -> None:
        self.transport.write(self.CHUNK)
        self._crowd.sent += 1

    def end(self) -> None:
        self.transport.write(b"0\r\n\r\n")

    def answered(self, appended: int) -> None:
        self._crowd.appended += appended
        self._crowd.under_way -= 1
        self._crowd.changed.set()


async def pace(crowd: Crowd, bodies: list[Body], rate: float) -> None:
    """Have each body get its frames, spread evenly; a late tick is made up for, so that the rate holds."""
    loop = asyncio.get_running_loop()
    began, done = loop.time(), 0
    per_s = rate * len(bodies)
    while crowd.pushing:
        due = int((loop.time() - began) * per_s)
        crowd.late_s = max(crowd.late_s, (due - done) / per_s - TICK_S)
        for number in range(done, due):
            bodies[number % len(bodies)].write_frame()
        done = due
        await asyncio.sleep(TICK_S)
    for body in bodies:
        body.end()


async def main(base: str, way: str, connections: int, amount: int) -> None:
    loop = asyncio.get_running_loop()
    url = urlsplit(base)
    crowd = Crowd(connections)
    name = secrets.token_hex(4)
    producers: list[Producer] = []
    for number in range(connections):
        producer: Producer
        if way == "bodies":
            producer = Body(crowd, url.netloc, f"{name}-{number}")
        else:
            kind = {"batches": Batches, "durable-batches": DurableBatches}[way]
            producer = kind(crowd, url.netloc, name, amount)
        producers.append(producer)
        await loop.create_connection(lambda made=producer: made, str(url.hostname), url.port or 80)  # type: ignore[misc]
    await crowd.until_none("waiting_for_run")
    answer({"ready": connections})
    began = 0.0
    pacing: asyncio.Task[None] | None = None

    def begin() -> None:
        nonlocal began, pacing
        began = time.monotonic()
        crowd.pushing = True
        for producer in producers:
            producer.begin()
        if way == "bodies":
            pacing = loop.create_task(pace(crowd, cast(list[Body], producers), amount))

    async def end() -> None:
        crowd.pushing = False
        if pacing is not None:
            await pacing
        await crowd.until_none("under_way")
        seconds = time.monotonic() - began
        late_ms = crowd.late_s * 1000
        answer({"sent": crowd.sent, "appended": crowd.appended, "seconds": seconds, "late_ms": late_ms})

    def command() -> None:
        line = sys.stdin.readline()
        if line == "begin\n":
            begin()
            answer({})
        elif line == "end\n":
            tasks.add(loop.create_task(end()))
        elif not line:
            stopped.set()

    tasks: set[asyncio.Task[None]] = set()
    stopped = asyncio.Event()
    loop.add_reader(sys.stdin, command)
    await stopped.wait()


def answer(found: dict[str, Any]) -> None:
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
