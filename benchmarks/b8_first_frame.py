"""B8: how much later the first frame comes through the proxy than directly."""

from __future__ import annotations

import statistics
import time

from benchmarks.load.reading import LAST_CHUNK, Connection
from benchmarks.processes import Lab, Missing
from benchmarks.report import Report

TITLE = "first frame through the proxy against direct"
REQUESTS = 300
WARM_UP = 30
FIRST_FRAME = b'"n":1,'


def run(lab: Lab, quick: bool) -> Report:
    """Measure B8."""
    report = Report("B8", TITLE)
    rounds, requests, warm_up = (1, 20, 2) if quick else (3, REQUESTS, WARM_UP)
    upstream, store, peer_store = lab.upstream(), lab.redis(), lab.redis()
    servers = {
        "direct": upstream,
        "relay on Redis": lab.relay(store.url, upstream.url),
        "relay on SQLite": lab.relay(lab.sqlite_url(), upstream.url),
    }
    try:
        servers["nginx"] = lab.nginx(upstream)
    except Missing as missing:
        report.note(f"{missing}: no such row.")
    try:
        servers["hand-written"] = lab.handwritten(upstream.url, peer_store.url)
    except Missing as missing:
        report.note(f"{missing}: no such row.")
    connections = {name: Connection(server.url) for name, server in servers.items()}
    try:
        for _ in range(warm_up):
            _turn(connections)
        for _ in range(rounds):
            _round(report, connections, requests)
    finally:
        for connection in connections.values():
            connection.close()
    for journal in ("Redis", "SQLite"):
        added = report.rows[f"relay on {journal}"].median("added_p99_ms")
        report.judge(f"added at p99, ms, {journal}", added, 5.0, aim=2.0)
    report.note(
        f"{requests} sequential requests a round over connections kept alive, each system in turn; the time "
        "is from sending the request to the first frame. added_* are percentiles of the differences to the "
        "direct request of the same turn."
    )
    return report


def _round(report: Report, connections: dict[str, Connection], requests: int) -> None:
    times: dict[str, list[float]] = {name: [] for name in connections}
    for _ in range(requests):
        for name, seconds in _turn(connections).items():
            times[name].append(seconds * 1000)
    for name, taken in times.items():
        figures = {"p50_ms": statistics.median(taken), "p99_ms": _p99(taken)}
        if name != "direct":
            added = [through - direct for through, direct in zip(taken, times["direct"], strict=True)]
            figures |= {"added_p50_ms": statistics.median(added), "added_p99_ms": _p99(added)}
        report.add(name, figures)


def _turn(connections: dict[str, Connection]) -> dict[str, float]:
    return {name: _first_frame_s(connection) for name, connection in connections.items()}


def _first_frame_s(connection: Connection) -> float:
    began = time.perf_counter()
    connection.send("/first")
    received = connection.read_until(FIRST_FRAME)
    seconds = time.perf_counter() - began
    while not received.endswith(LAST_CHUNK):
        received += connection.receive()
    return seconds


def _p99(values: list[float]) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
