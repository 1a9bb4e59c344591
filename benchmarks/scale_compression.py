"""What compression saves on token streams, and what it costs, beside the same streams sent plain."""

from __future__ import annotations

import select
import socket
import time
import zlib

from benchmarks.load.reading import Connection, header
from benchmarks.processes import Cpu, Lab, Server
from benchmarks.report import Report

TITLE = "compression of one stream at 50 frames/s, to 100 readers"
READERS = 100
RATE = 50
SHAPES = ("raw", "openai")
FRAME_MARK = b'"t":'


def run(lab: Lab, quick: bool) -> Report:
    """Measure what compression does."""
    report = Report("compression", TITLE)
    readers, rounds, window_s = (3, 1, 0.5) if quick else (READERS, 3, 4.0)
    upstream, store = lab.upstream(), lab.redis()
    relay = lab.relay(store.url, upstream.url, compress="always")
    for _ in range(rounds):
        for shape in SHAPES:
            plain = _window(relay, shape, "identity", readers, window_s)
            gzip = _window(relay, shape, "gzip", readers, window_s)
            report.add(f"plain, {shape}", plain)
            saved = 1 - gzip["bytes_per_frame"] / plain["bytes_per_frame"]
            report.add(f"gzip, {shape}", gzip | {"saved": saved})
    report.note(
        "bytes_per_frame is of the response's body as it is on the wire, chunk lines and ids included, and "
        "saved what compression takes off it; cpu_us is relay's CPU per frame delivered, with all that comes "
        "before. Every reader of a window reads the same stream, live; what one of them got is "
        "unpacked to count the frames."
    )
    return report


def _window(relay: Server, shape: str, coding: str, readers: int, window_s: float) -> dict[str, float]:
    with Connection(relay.url) as first:
        first.send(f"/paced?rate={RATE}&shape={shape}")
        stream = header(first.read_until(b"\r\n\r\n"), "relay-stream")
        request = (
            f"GET /relay/v1/streams/{stream}/events?after=tail&control=none HTTP/1.1\r\nHost: localhost\r\n"
            f"Accept: text/event-stream\r\nAccept-Encoding: {coding}\r\n\r\n"
        ).encode()
        sockets = []
        for _ in range(readers):
            connection = socket.create_connection(("127.0.0.1", relay.port))
            connection.sendall(request)
            sockets.append(connection)
        try:
            received = {connection: [_body_begins(connection)] for connection in sockets}
            cpu = Cpu({"relay": relay})
            _read(received, window_s)
            used_s = cpu.used_s()["relay"]
        finally:
            for connection in sockets:
                connection.close()
    bodies = [b"".join(pieces) for pieces in received.values()]
    frames = _unpacked(bodies[0], coding).count(FRAME_MARK)
    return {
        "bytes_per_frame": sum(map(len, bodies)) / len(bodies) / frames,
        "cpu_us": used_s / (frames * readers) * 1e6,
    }


def _body_begins(connection: socket.socket) -> bytes:
    received = b""
    while b"\r\n\r\n" not in received:
        received += connection.recv(65536)
    return received.partition(b"\r\n\r\n")[2]


def _read(received: dict[socket.socket, list[bytes]], window_s: float) -> None:
    until = time.monotonic() + window_s
    while (left := until - time.monotonic()) > 0:
        for connection in select.select(list(received), [], [], left)[0]:
            received[connection].append(connection.recv(65536))


def _unpacked(body: bytes, coding: str) -> bytes:
    data = b""
    while body:
        size, _, body = body.partition(b"\r\n")
        data, body = data + body[: int(size, 16)], body[int(size, 16) + 2 :]
    return zlib.decompressobj(31).decompress(data) if coding == "gzip" else data
