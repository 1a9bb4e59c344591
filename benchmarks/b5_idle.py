"""B5: what 8,000 readers cost that wait for something to happen, beside nchan."""

from __future__ import annotations

import resource
import time
from typing import Any

import redis

from benchmarks.load.fan_out import CHANNEL, NO_UPSTREAM, ON_THEIR_WAY, RELAY, Kind
from benchmarks.load.publisher import Connection
from benchmarks.processes import Cpu, Lab, Missing, Process, Server
from benchmarks.report import Report

TITLE = "8,000 idle readers"
READERS = 8_000
WARM_UP = 50
"""Readers that are there before memory is looked at first."""

FILES_BESIDE = 200
"""Open files of a server that are no reader's."""

COMING_MAX_S = 180.0
SETTLE_S = 1.0
IDLE_S = 2.0
KIB = 1024
STREAM = "idle"
EACH = "idle-{}"


def run(lab: Lab, quick: bool) -> Report:
    """Measure B5."""
    report = Report("B5", TITLE)
    readers, rounds, settle_s, idle_s = (100, 1, 0.1, 0.1) if quick else (READERS, 2, SETTLE_S, IDLE_S)
    # What is started from here on inherits it.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard < readers + WARM_UP + FILES_BESIDE:
        report.note(f"A process may open {hard} files here, which are too few: not measured.")
        return report
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    idle = _Idle(lab, report, readers, settle_s, idle_s)
    for streams in (*[1] * rounds, readers):
        # Processes of their own every time: memory once taken is not always given back.
        try:
            idle.measure("nchan", CHANNEL, lab.nchan(), streams)
        except Missing as missing:
            report.note(f"{missing}: no such row.")
        store = lab.redis()
        idle.measure("relay on Redis", RELAY, lab.relay(store.url, NO_UPSTREAM), streams, store)
        idle.measure("relay on SQLite", RELAY, lab.relay(lab.sqlite_url(), NO_UPSTREAM), streams)
    for journal in ("Redis", "SQLite"):
        row = report.rows[f"relay on {journal}, 1 stream"]
        report.judge(f"KiB per idle reader, {journal}", row.median("kib_per_reader"), 12, aim=8)
    connections = [max(row.rounds.get("redis_connections", [0])) for row in report.rows.values()]
    report.judge("Redis connections of relay", max(connections), 4)
    report.note(
        f"kib_per_reader is the growth of resident memory from {WARM_UP} readers to {readers} more, after "
        "they have settled; the kernel's part of a connection is in no process. connects_per_s is from the "
        f"first connection until all have what follows is live (of nchan: the answer's head), {ON_THEIR_WAY} "
        "on their way at a time; connect_us is the server's CPU of one. idle_cpu is its share of a core "
        "while nothing happens. wake_ms is until the last reader has one frame that is then published. "
        "redis_connections are all that its Redis has (CLIENT LIST) but the benchmark's own."
    )
    return report


class _Idle:
    def __init__(self, lab: Lab, report: Report, readers: int, settle_s: float, idle_s: float) -> None:
        self._lab = lab
        self._report = report
        self._readers = readers
        self._settle_s = settle_s
        self._idle_s = idle_s

    def measure(
        self, label: str, kind: Kind, server: Server, streams: int, store: Server | None = None
    ) -> None:
        """A crowd of one system comes, waits, and is told something."""
        started: list[Process] = [server] if store is None else [store, server]
        publisher = None
        stream = EACH
        if streams == 1:
            stream = STREAM
            publisher = self._lab.program("benchmarks.load.publisher", kind.publisher, server.url)
            publisher.ask(f"open {stream}")
            started.append(publisher)
        elif kind is RELAY:
            _create(server, streams)
        target = kind.target.replace("{stream}", stream)
        started.append(self._audience(server, target, kind, WARM_UP, streams)[0])
        time.sleep(self._settle_s)
        before, cpu = server.rss_bytes(), Cpu({"server": server})
        audience, came = self._audience(server, target, kind, self._readers, streams)
        started.append(audience)
        connecting_s = cpu.used_s()["server"]
        time.sleep(self._settle_s)
        cpu = Cpu({"server": server})
        time.sleep(self._idle_s)
        figures = {
            "kib_per_reader": (server.rss_bytes() - before) / self._readers / KIB,
            "connects_per_s": self._readers / came["seconds"],
            "connect_us": connecting_s / self._readers * 1e6,
            "idle_cpu": cpu.used_s()["server"] / self._idle_s,
        }
        if store is not None:
            figures["redis_connections"] = _connections(store)
        if publisher is not None:
            figures["wake_ms"] = self._wake(label, publisher, audience)
        self._report.add(f"{label}, {'1 stream' if streams == 1 else 'a stream each'}", figures)
        for process in reversed(started):
            self._lab.stop(process)

    def _audience(
        self, server: Server, target: str, kind: Kind, readers: int, streams: int
    ) -> tuple[Process, dict[str, Any]]:
        sizes = [str(readers), str(streams), str(ON_THEIR_WAY)]
        audience = self._lab.program("benchmarks.load.audience", server.url, target, kind.live, *sizes)
        return audience, audience.answer(COMING_MAX_S)

    def _wake(self, label: str, publisher: Process, audience: Process) -> float:
        audience.ask("time")
        publisher.ask("paced 0.001 1")
        seen = audience.ask("expect 1")
        if seen["received"] != self._readers or seen["out_of_order"]:
            raise RuntimeError(f"{label}: one frame was published to {self._readers} readers: {seen}")
        return float(seen["max_ms"])


def _create(relay: Server, streams: int) -> None:
    connection = Connection(relay.url)
    for number in range(streams):
        connection.ask(connection.request("PUT", f"/relay/v1/streams/{EACH.format(number)}", b"{}"))
    connection.close()


def _connections(store: Server) -> int:
    with redis.Redis(port=store.port) as client:
        listed: list[dict[str, Any]] = client.client_list()
    return sum(client["cmd"] != "client|list" for client in listed)
