"""B7: readers that stopped reading, while their stream grows: what relay and Redis hold for them."""

from __future__ import annotations

import re
import threading
import time
from typing import Any

import redis

from benchmarks.load.reading import Connection
from benchmarks.processes import Lab, Missing, Server
from benchmarks.report import Report

TITLE = "10 stalled readers while 40 MB is appended"
READERS = 10
FRAME_BYTES = 2000
FRAMES = 20_000
QUICK_FRAMES = 2_500
"""More than the kernel takes for a reader that does not read, or nobody stalls."""

RECEIVE_BUFFER_BYTES = 4096
WRITE_TIMEOUT_S = 5.0
CUT_GRACE_S = 5.0
SAMPLE_S = 0.02
MIB = 2**20
STREAM = "stalled"


def run(lab: Lab, quick: bool) -> Report:
    """Measure B7."""
    report = Report("B7", TITLE)
    rounds, frames = (1, QUICK_FRAMES) if quick else (2, FRAMES)
    # Who has the frames appended reads them, and must not be cut where it is held up for a moment itself.
    write_timeout_s = 1.0 if quick else WRITE_TIMEOUT_S
    upstream = lab.upstream()
    for _ in range(rounds):
        # Processes of their own for every round: memory once taken is not always given back.
        store = lab.redis()
        relay = lab.relay(store.url, upstream.url, write_timeout_s=write_timeout_s)
        events = f"/relay/v1/streams/{STREAM}/events"
        report.add("relay", _stall(relay, store, events, frames, write_timeout_s))
        store = lab.redis()
        try:
            peer = lab.handwritten(upstream.url, store.url)
        except Missing as missing:
            report.note(f"{missing}: no such row.")
        else:
            report.add("hand-written", _stall(peer, store, f"/streams/{STREAM}", frames, None))
    row = report.rows["relay"]
    report.judge("relay's RSS growth, MiB", max(row.rounds["rss_growth_mib"]), 16, aim=8)
    report.judge("Redis's client buffers, MiB", max(row.rounds["redis_buffers_mib"]), 16, aim=8)
    report.note(
        f"Frames of {FRAME_BYTES} bytes. Growth is from before the append to the highest of samples every "
        f"{SAMPLE_S * 1000:g} ms until the readers are gone (--write-timeout-s {WRITE_TIMEOUT_S:g}) or, of "
        "the hand-written way, which never cuts them, the append is over. redis_buffers_mib is the highest "
        "sum of tot-mem less the idle one over Redis's clients (CLIENT LIST), redis_omem_mib of output "
        "buffers alone; the worst round is what counts. cut is how many stalled readers were cut."
    )
    return report


def _stall(
    server: Server, store: Server, events: str, frames: int, cut_after_s: float | None
) -> dict[str, float]:
    with redis.Redis(port=store.port) as client:
        _append(server, 10)
        readers = [Connection(server.url, RECEIVE_BUFFER_BYTES) for _ in range(READERS)]
        for reader in readers:
            reader.send(events)
            reader.read_until(b'"n":10,')
        sampler = _Sampler(server, client)
        began = time.monotonic()
        _append(server, frames)
        append_s = time.monotonic() - began
        cut = 0.0
        if cut_after_s is not None:
            deadline = time.monotonic() + cut_after_s * 2 + CUT_GRACE_S
            while (cut := _cut(server)) < READERS and time.monotonic() < deadline:
                time.sleep(0.1)
        sampler.stop()
        for reader in readers:
            reader.close()
    return {
        "rss_growth_mib": sampler.rss_growth / MIB,
        "rss_before_mib": sampler.rss_before / MIB,
        "redis_buffers_mib": sampler.buffers / MIB,
        "redis_omem_mib": sampler.omem / MIB,
        "append_s": append_s,
        "cut": cut,
    }


def _append(server: Server, frames: int) -> None:
    with Connection(server.url) as connection:
        connection.send(f"/burst?frames={frames}&size={FRAME_BYTES}", Relay_Stream=STREAM)
        parts, _ = connection.read_to_the_end()
    came = b"".join(parts).count(b'"t":')
    if came < frames:
        raise RuntimeError(f"{frames} frames were sent, and {came} came")


def _cut(relay: Server) -> float:
    with Connection(relay.url) as connection:
        connection.send("/relay/metrics", Connection="close")
        text = b""
        while data := connection.receive():
            text += data
    found = re.search(rb'relay_readers_ended_total\{reason="slow"\} ([0-9.]+)', text)
    return float(found[1]) if found else 0.0


class _Sampler:
    """Watches memory from another thread until it is stopped."""

    def __init__(self, server: Server, client: redis.Redis) -> None:
        self.rss_before = server.rss_bytes()
        self.rss_growth = 0
        self.buffers = 0
        self.omem = 0
        self._server = server
        self._client = client
        self._buffers_before = self._client_memory()[0]
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(SAMPLE_S):
            self.rss_growth = max(self.rss_growth, self._server.rss_bytes() - self.rss_before)
            memory, omem = self._client_memory()
            self.buffers = max(self.buffers, memory - self._buffers_before)
            self.omem = max(self.omem, omem)

    def _client_memory(self) -> tuple[int, int]:
        listed: list[dict[str, Any]] = self._client.client_list()
        others = [client for client in listed if client["cmd"] != "client|list"]
        return sum(int(client["tot-mem"]) for client in others), sum(int(client["omem"]) for client in others)
