"""Many clients in one process: raw connections that note when each frame arrived, and nothing else.

    python -m benchmarks.load.viewers <base URL> <target> <connections>

Prints a line once every connection has had a frame. Then on stdin: `begin` begins a window, `end` ends it
and is answered with its figures, `finish` waits for every connection's answer to end and tells what came
in all.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from array import array
from typing import Any, cast
from urllib.parse import urlsplit

import uvloop

FRAME = re.compile(rb'"t":(\d+),"n":(\d+)')
BOUNDARY = re.compile(rb"\r\n[0-9a-fA-F]+\r\n")
"""Between two chunks. No frame of the benchmarks holds CR LF, so it can be cut out before parsing."""

LAST_CHUNK = b"\r\n0\r\n\r\n"


class Crowd:
    """What all connections see together."""

    def __init__(self, connections: int) -> None:
        self.waiting_for_first = connections
        self.open = connections
        self.received = 0
        self.out_of_order = 0
        self.delays_ns = array("q")
        self.began = 0.0
        self.changed = asyncio.Event()

    def begin(self) -> dict[str, Any]:
        self.delays_ns = array("q")
        self.began = time.monotonic()
        return {}

    def end(self) -> dict[str, Any]:
        seconds = time.monotonic() - self.began
        delays = sorted(self.delays_ns)

        def percentile_ms(share: float) -> float:
            return delays[min(len(delays) - 1, int(len(delays) * share))] / 1e6 if delays else 0.0

        return {
            "frames": len(delays),
            "seconds": seconds,
            "p50_ms": percentile_ms(0.5),
            "p99_ms": percentile_ms(0.99),
            "max_ms": percentile_ms(1.0),
        }

    async def finish(self) -> dict[str, Any]:
        while self.open:
            self.changed.clear()
            await self.changed.wait()
        return {"received": self.received, "out_of_order": self.out_of_order}


class Viewer(asyncio.Protocol):
    """One connection and its one request."""

    def __init__(self, crowd: Crowd, request: bytes) -> None:
        self._crowd = crowd
        self._request = request
        self._rest = b""
        self._n = 0
        self._over = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic_ns()
        crowd = self._crowd
        data = self._rest + data
        whole = data.rfind(b"\n\n") + 2
        if whole > 1:
            self._rest = data[whole:]
            for t, n in FRAME.findall(BOUNDARY.sub(b"", data[:whole])):
                crowd.delays_ns.append(now - int(t))
                crowd.received += 1
                if int(n) != self._n + 1:
                    crowd.out_of_order += 1
                if self._n == 0:
                    crowd.waiting_for_first -= 1
                    crowd.changed.set()
                self._n = int(n)
        else:
            self._rest = data
        if self._rest.endswith(LAST_CHUNK):
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._crowd.open -= 1
        self._crowd.changed.set()


async def main(base: str, target: str, connections: int) -> None:
    loop = asyncio.get_running_loop()
    url = urlsplit(base)
    request = f"GET {target} HTTP/1.1\r\nHost: {url.netloc}\r\nAccept: text/event-stream\r\n\r\n".encode()
    crowd = Crowd(connections)
    for _ in range(connections):
        await loop.create_connection(lambda: Viewer(crowd, request), str(url.hostname), url.port or 80)
    while crowd.waiting_for_first:
        crowd.changed.clear()
        await crowd.changed.wait()
    answer({"ready": connections})

    async def finish() -> None:
        answer(await crowd.finish())

    def command() -> None:
        line = sys.stdin.readline()
        if line == "begin\n":
            answer(crowd.begin())
        elif line == "end\n":
            answer(crowd.end())
        elif line == "finish\n":
            tasks.add(asyncio.create_task(finish()))
        elif not line:
            stopped.set()

    tasks: set[asyncio.Task[None]] = set()
    stopped = asyncio.Event()
    loop.add_reader(sys.stdin, command)
    await stopped.wait()


def answer(found: dict[str, Any]) -> None:
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
