"""Opens many connections at once and says what became of them.

    python3 tests/conformance/flood.py [connections] [most that relay serves]

starts a relay of its own and floods it: 10,000 against 2,000 unless told otherwise.
"""

from __future__ import annotations

import contextlib
import resource
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

SETTLE_S = 60.0


class Counted(NamedTuple):
    """`held` are open and may ask, `refused` were told 503 or closed, `failed` were not even opened."""

    held: int
    refused: int
    failed: int


def flood(port: int, count: int) -> Counted:
    """Open so many connections to a port of this machine, keep them all, and ask on each of them."""
    opened: list[socket.socket] = []
    failed = held = refused = 0
    try:
        for _ in range(count):
            try:
                opened.append(socket.create_connection(("127.0.0.1", port), timeout=SETTLE_S))
            except OSError:
                failed += 1
        for connection in opened:
            with contextlib.suppress(OSError):
                connection.sendall(b"GET /relay/healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        for connection in opened:
            try:
                answer = connection.recv(64)
            except OSError:
                answer = b""
            held += answer.startswith(b"HTTP/1.1 200")
            refused += not answer.startswith(b"HTTP/1.1 200")
    finally:
        for connection in opened:
            connection.close()
    return Counted(held, refused, failed)


def _main(count: int, most: int) -> None:
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from raw_client import RawClient
    from relay_process import RelayProcess

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with (
        tempfile.TemporaryDirectory() as directory,
        RelayProcess.start(journal=f"sqlite:///{directory}/relay.db", connections_max=most) as relay,
        RawClient(relay.port) as served,
    ):
        before = relay.rss_bytes()
        began = time.monotonic()
        counted = flood(relay.port, count)
        print(f"{count} connections in {time.monotonic() - began:.1f} s: {counted}")
        print(f"relay grew by {(relay.rss_bytes() - before) / 1e6:.1f} MB")
        served.request("GET", "/relay/healthz")
        print(f"one that was there before: {served.answer().status}")
        assert counted.held <= most


if __name__ == "__main__":
    _main(*(int(text) for text in (sys.argv[1:] + ["10000", "2000"][len(sys.argv) - 1 :])))
