"""B4: replay of a long stream to one reader, beside a bare XRANGE loop over the same Redis Stream."""

from __future__ import annotations

import time
from typing import Any

import redis

from benchmarks.load.reading import Connection, header
from benchmarks.processes import Cpu, Lab, Process, Server
from benchmarks.report import Report

TITLE = "replay of 100,000 frames to one reader"
FRAMES = 100_000
DATA_BYTES = 100
XRANGE_COUNT = 1000
FRAME_MARK = b'"t":'


def run(lab: Lab, quick: bool) -> Report:
    """Measure B4."""
    report = Report("B4", TITLE)
    frames, rounds = (2_000, 1) if quick else (FRAMES, 7)
    upstream, store = lab.upstream(), lab.redis()
    on_redis = lab.relay(store.url, upstream.url)
    on_sqlite = lab.relay(lab.sqlite_url(), upstream.url)
    redis_stream = _fill(on_redis, frames)
    sqlite_stream = _fill(on_sqlite, frames)
    for _ in range(rounds):
        report.add("bare XRANGE loop", _xrange(store, redis_stream, frames))
        report.add("relay on Redis", _replay(on_redis, redis_stream, frames, store))
        report.add("relay on SQLite", _replay(on_sqlite, sqlite_stream, frames))
    bare = report.rows["bare XRANGE loop"].median("frames_per_s")
    replayed = report.rows["relay on Redis"].median("frames_per_s")
    report.judge("relay on Redis against the bare loop", replayed / bare, 0.4, aim=0.7, at_least=True)
    report.note(
        f"Frames of about {DATA_BYTES} bytes. The bare loop is redis-py with hiredis, COUNT {XRANGE_COUNT}, "
        "entries parsed and thrown away; its cpu_us is of that loop. relay's reader is a blocking socket in "
        "the benchmark's own process, whose CPU is client_us; frames are counted after the clock stopped."
    )
    return report


def _fill(relay: Server, frames: int) -> str:
    """Journal a stream through the proxy; its name."""
    with Connection(relay.url) as connection:
        connection.send(f"/burst?frames={frames}&size={DATA_BYTES}")
        parts, _ = connection.read_to_the_end()
    return header(b"".join(parts[:2]), "relay-stream")


def _replay(relay: Server, stream: str, frames: int, store: Server | None = None) -> dict[str, float]:
    watched: dict[str, Process] = {"relay": relay}
    if store is not None:
        watched["redis"] = store
    with Connection(relay.url) as connection:
        cpu, own = Cpu(watched), time.process_time()
        connection.send(f"/relay/v1/streams/{stream}/events")
        parts, seconds = connection.read_to_the_end()
        client_s, used = time.process_time() - own, cpu.used_s()
    came = b"".join(parts).count(FRAME_MARK)
    if came != frames:
        raise RuntimeError(f"{frames} frames were journaled, and {came} replayed")
    figures = {"frames_per_s": frames / seconds, "cpu_us": used["relay"] / frames * 1e6}
    if store is not None:
        figures["redis_us"] = used["redis"] / frames * 1e6
    return figures | {"client_us": client_s / frames * 1e6}


def _xrange(store: Server, stream: str, frames: int) -> dict[str, float]:
    with redis.Redis(port=store.port) as client:
        client.ping()
        cpu, own = Cpu({"redis": store}), time.process_time()
        began = time.perf_counter()
        last, came = "-", 0
        while True:
            entries: Any = client.xrange(f"relay:{{{stream}}}:frames", min=last, count=XRANGE_COUNT)
            came += len(entries)
            if len(entries) < XRANGE_COUNT:
                break
            last = "(" + entries[-1][0].decode()
        seconds = time.perf_counter() - began
        own = time.process_time() - own
    if came != frames + 2:  # run.started and run.ended
        raise RuntimeError(f"the Redis Stream holds {came} entries")
    return {
        "frames_per_s": frames / seconds,
        "cpu_us": own / frames * 1e6,
        "redis_us": cpu.used_s()["redis"] / frames * 1e6,
    }
