"""Readers that stall and readers in great number cost relay and Redis no more than was promised."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faults.listener import DEADLINE_S, Listener, all_of, assert_heard_once, session
from reading import Reading
from redis_server import RedisServer
from relay_process import RelayProcess
from scripted_upstream import Exchange, ScriptedUpstream

MIB = 1024 * 1024
_ID = re.compile(rb"^id: (\d+)-(\d+)\n", re.MULTILINE)


class Watch:
    """Watches what Redis says of relay's connections, as fast as it answers, from a thread."""

    def __init__(self, server: RedisServer) -> None:
        self.most_connections = 0
        self.most_output_bytes = 0
        self.seen: set[str] = set()
        """The ids of all connections that relay had."""
        self._server = server
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        with self._server.client() as client:
            while not self._over.is_set():
                clients = [c for c in client.client_list() if c["name"].startswith("relay-")]
                self.most_connections = max(self.most_connections, len(clients))
                output = sum(int(c["omem"]) for c in clients)
                self.most_output_bytes = max(self.most_output_bytes, output)
                self.seen.update(c["id"] for c in clients)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._over.set()
        self._thread.join()


class Peak:
    """How much a process's resident memory grew at most since this was made."""

    def __init__(self, relay: RelayProcess) -> None:
        self._process = Path(f"/proc/{relay.pid}")
        (self._process / "clear_refs").write_text("5")  # proc(5): resets the high-water mark
        self._before = self._high_water()

    def _high_water(self) -> int:
        found = re.search(r"^VmHWM:\s+(\d+) kB", (self._process / "status").read_text(), re.MULTILINE)
        assert found is not None
        return int(found[1]) * 1024

    def growth_bytes(self) -> int:
        return self._high_water() - self._before


def stalled_reader(relay: RelayProcess, target: str) -> socket.socket:
    """Asks, and reads nothing: into the smallest buffer the system allows."""
    stalled = socket.socket()
    stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    stalled.settimeout(DEADLINE_S)
    stalled.connect(("127.0.0.1", relay.port))
    stalled.sendall(f"GET {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    return stalled


def received(stalled: socket.socket) -> bytes:
    """What had reached it of its answer's body before it was cut, chunked coding removed."""
    raw = bytearray()
    with contextlib.suppress(ConnectionError), stalled:
        while data := stalled.recv(65536):
            raw += data
    body, _, rest = bytearray(), *bytes(raw).partition(b"\r\n\r\n")[1:]
    while (line_end := rest.find(b"\r\n")) > 0:
        size = int(rest[:line_end], 16)
        body += rest[line_end + 2 : line_end + 2 + size]
        rest = rest[line_end + 2 + size + 2 :]
    return bytes(body)


def whole_frames(body: bytes) -> list[tuple[int, int]]:
    """The ids of the frames that arrived whole."""
    return [(int(seq), int(ms)) for seq, ms in _ID.findall(body[: body.rfind(b"\n\n") + 2])]


@pytest.fixture
def relay_with_little_patience(
    fresh_journal: Callable[[], str], upstream: ScriptedUpstream
) -> Iterator[RelayProcess]:
    with RelayProcess.start(journal=fresh_journal(), upstream=upstream.url, write_timeout_s=2) as relay:
        yield relay


def test_p6_readers_that_stall_while_40_mb_pass_are_cut_and_can_resume(
    relay_with_little_patience: RelayProcess,
    redis_server: RedisServer,
    upstream: ScriptedUpstream,
    name: str,
    soak: bool,
) -> None:
    """They cost relay at most 16 MiB and Redis no more, and miss nothing when they come back."""
    relay, frames, stalled_count = relay_with_little_patience, 10_000, 10
    begun = upstream.gate()
    piece = b"".join(b"data: " + b"x" * 4090 + b"\n\n" for _ in range(10))

    async def handler(exchange: Exchange) -> None:
        await exchange.head("200 OK", "text/event-stream", f"Relay-Stream: {name}")
        await exchange.chunk(piece)
        await begun.wait()
        for _ in range(frames // 10 - 1):
            await exchange.chunk(piece)
        await exchange.end()

    upstream.on(f"/{name}", handler)
    target = f"/relay/v1/streams/{name}/events?run=latest&control=none"
    with Reading(f"{relay.url}/{name}", "POST") as first:
        first.take(1)
    stalled = [stalled_reader(relay, target) for _ in range(stalled_count)]
    await_metric(relay, "relay_readers_open", stalled_count)

    peak = Peak(relay)
    with Watch(redis_server) as watch:
        begun.open()
        await_metric(relay, 'relay_runs_ended_total{reason="upstream_end"', 1)
        await_metric(relay, 'relay_readers_ended_total{reason="slow"}', stalled_count)
    growth = peak.growth_bytes()
    print(f"RSS grew {growth / MIB:.1f} MiB, Redis held {watch.most_output_bytes / MIB:.2f} MiB for relay")
    assert growth <= 16 * MIB
    assert watch.most_output_bytes <= 16 * MIB

    bodies = [received(each) for each in stalled]
    for body in bodies if soak else bodies[:2]:
        had = whole_frames(body)
        assert 0 < len(had) < frames
        seq, ms = had[-1]
        with Reading(relay.url + target, Last_Event_ID=f"{seq}-{ms}") as rest:
            had += whole_frames(rest.read())
        assert [seq for seq, _ in had] == list(range(2, frames + 2))  # the first frame is run.started


def await_metric(relay: RelayProcess, line_start: str, value: float) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while relay.metric(line_start) < value:
        assert time.monotonic() < deadline, f"{line_start} is never {value}"


def test_500_readers_of_50_streams_share_four_connections_and_get_every_frame(
    redis_server: RedisServer, upstream: ScriptedUpstream, name: str, soak: bool
) -> None:
    """Also while every connection that relay has to Redis is killed, more than once."""
    streams, readers_each, kills = [f"{name}-{n}" for n in range(50)], 10, 20 if soak else 3
    words = [f"word-{n}" for n in range(20)]
    gates = [upstream.gate() for _ in range(kills + 1)]

    def script(stream: str) -> None:
        async def handler(exchange: Exchange) -> None:
            await exchange.head("200 OK", "text/event-stream", f"Relay-Stream: {stream}")
            for n, gate in enumerate(gates):
                await gate.wait()
                for word in words:
                    await exchange.chunk(f"data: {n} {word}\n\n".encode())
            await exchange.end()

        upstream.on(f"/{stream}", handler)

    for stream in streams:
        script(stream)
    own = RedisServer.start()

    async def scenario(relay: RelayProcess) -> None:
        async with session() as sessions:
            for stream in streams:
                async with sessions.post(f"{relay.url}/{stream}") as response:
                    assert response.status == 200
            readers = [
                Listener(sessions, f"{relay.url}/relay/v1/streams/{stream}/events?run=latest")
                for stream in streams
                for _ in range(readers_each)
            ]
            tasks = [asyncio.create_task(reader.listen()) for reader in readers]
            for reader in readers:
                await reader.until(lambda reader=reader: "live" in reader.types())  # type: ignore[misc]
            with own.client() as client:
                for n, gate in enumerate(gates):
                    gate.open()
                    for reader in readers[:: readers_each * 7]:
                        await reader.has(n * len(words) + 5)
                    if n < kills:
                        for kind in ("normal", "pubsub"):
                            client.client_kill_filter(_type=kind, skipme=True)
            await all_of(tasks)
            said = [f"{n} {word}" for n in range(len(gates)) for word in words]
            for reader in readers:
                assert_heard_once(reader, said)

    try:
        with RelayProcess.start(journal=own.url(), upstream=upstream.url) as relay, Watch(own) as watch:
            asyncio.run(scenario(relay))
        print(f"{len(streams) * readers_each} readers, {watch.most_connections} connections at most")
        assert watch.most_connections <= 4
        assert len(watch.seen) >= 6, "the connections were not killed"
    finally:
        own.stop()
