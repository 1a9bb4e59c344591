"""Replay to one reader by the length of the stream, from 10,000 frames to 1,000,000: time and memory."""

from __future__ import annotations

import http.client
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import orjson

from benchmarks.load.reading import LAST_CHUNK, Connection
from benchmarks.memory import MIB, Growth
from benchmarks.processes import Commands, Cpu, Lab, Process, Server
from benchmarks.report import Report

TITLE = "replay of 10,000 to 1,000,000 frames to one reader"
FRAMES = (10_000, 100_000, 1_000_000)
LINES_A_CHUNK = 500
TEXT = "x" * 70
"""Makes data of about 100 bytes, as in B4."""

FRAME_MARK = b'data: {"t":'
GROWTH_MAX_MIB = 16


def run(lab: Lab, quick: bool) -> Report:
    """Measure the curve."""
    report = Report("scale_replay", TITLE)
    lengths, rounds = ((500, 2000), 1) if quick else (FRAMES, 3)
    upstream, store = lab.upstream(), lab.redis()
    unbounded = {"max_frames": 0, "max_bytes": 0}
    servers = {
        "Redis": lab.relay(store.url, upstream.url, **unbounded),
        "SQLite": lab.relay(lab.sqlite_url(), upstream.url, **unbounded),
    }
    for frames in lengths:
        for relay in servers.values():
            _push(relay, f"long-{frames}", frames)
    for _ in range(rounds):
        for frames in lengths:
            for journal, relay in servers.items():
                figures = _replay(relay, f"long-{frames}", frames, store if journal == "Redis" else None)
                report.add(_label(journal, frames), figures)
    short, long = lengths[0], lengths[-1]
    for journal in servers:
        long_row, short_row = (report.rows[_label(journal, frames)] for frames in (long, short))
        ratio = long_row.median("us_per_frame") / short_row.median("us_per_frame")
        report.judge(f"{journal}: time per frame of {long:,} against {short:,}", ratio, 1.5)
        worst = max(long_row.rounds["rss_growth_mib"])
        report.judge(f"{journal}: relay's peak memory over {long:,}, MiB", worst, GROWTH_MAX_MIB)
    report.note(
        "Frames of about 100 bytes, pushed as NDJSON into one run each. rss_growth_mib is relay's peak while "
        "it replayed, over what it held before. The reader is a blocking socket that counts frames and keeps "
        "nothing."
    )
    return report


def _label(journal: str, frames: int) -> str:
    return f"relay on {journal}, {frames:,} frames"


def _lines(frames: int) -> Iterator[bytes]:
    for first in range(1, frames + 1, LINES_A_CHUNK):
        numbers = range(first, min(frames + 1, first + LINES_A_CHUNK))
        data = [f'{{"t":0,"n":{n},"text":"{TEXT}"}}' for n in numbers]
        yield b"".join([b"%b\n" % orjson.dumps({"data": text}) for text in data])


def _push(relay: Server, stream: str, frames: int) -> None:
    """Journal a sealed stream of one run."""
    connection = http.client.HTTPConnection(urlsplit(relay.url).netloc)
    target = f"/relay/v1/streams/{stream}/runs?end=completed&seal=true"
    connection.request("POST", target, _lines(frames), {"Content-Type": "application/x-ndjson"})
    response = connection.getresponse()
    answered = response.read()
    connection.close()
    if response.status != 201:
        raise RuntimeError(f"{frames} frames were not taken: {answered!r}")


def _count(connection: Connection) -> tuple[float, int]:
    """Seconds until the answer was whole, and how many frames it held."""
    began = time.perf_counter()
    came, rest = 0, b""
    while not rest.endswith(LAST_CHUNK):
        data = connection.receive()
        if not data:
            raise RuntimeError(f"The answer broke off: {rest!r}")
        # What the last read cut in two stands at the seam; a mark that was whole before it is not counted
        # again, because what is kept of it is one byte short.
        data = rest[1 - len(FRAME_MARK) :] + data
        came += data.count(FRAME_MARK)
        rest = data[-len(FRAME_MARK) :]
    return time.perf_counter() - began, came


def _replay(relay: Server, stream: str, frames: int, store: Server | None) -> dict[str, float]:
    watched: dict[str, Process] = {"relay": relay}
    if store is not None:
        watched["redis"] = store
    growth = Growth(relay)
    commands = None if store is None else Commands(store)
    with Connection(relay.url) as connection:
        cpu = Cpu(watched)
        connection.send(f"/relay/v1/streams/{stream}/events")
        seconds, came = _count(connection)
        used = cpu.used_s()
    if came != frames:
        raise RuntimeError(f"{frames} frames were journaled, and {came} replayed")
    figures = {
        "seconds": seconds,
        "us_per_frame": seconds / frames * 1e6,
        "frames_per_s": frames / seconds,
        "cpu_us": used["relay"] / frames * 1e6,
        "rss_growth_mib": growth.peak_bytes() / MIB,
    }
    if commands is not None:
        figures["redis_us"] = used["redis"] / frames * 1e6
        figures["redis_calls"] = float(sum(commands.run().values()))
    return figures | {"others_cpu": used["others"] / seconds}
