"""Memory and connect rate by the number of idle readers, from 1,000 to 15,000, beside nchan."""

from __future__ import annotations

import time
from typing import Any

import redis

from benchmarks.load.crowd import connections_max
from benchmarks.load.fan_out import CHANNEL, NO_UPSTREAM, ON_THEIR_WAY, RELAY, Kind
from benchmarks.processes import Cpu, Lab, Missing, Process, Server
from benchmarks.report import Report

TITLE = "1,000 to 15,000 idle readers of one stream"
READERS = (1000, 4000, 8000, 15_000)
WARM_UP = 50
"""Readers that are there before memory is looked at first."""

STREAM = "idle"
SETTLE_S = 1.0
IDLE_S = 3.0
KIB = 1024


def run(lab: Lab, quick: bool) -> Report:
    """Measure the curve."""
    report = Report("scale_readers", TITLE)
    sizes, rounds, settle_s, idle_s = ((50, 150), 1, 0.1, 0.1) if quick else (READERS, 2, SETTLE_S, IDLE_S)
    most = connections_max() - WARM_UP
    held = [readers for readers in sizes if readers <= most]
    if len(held) < len(sizes):
        report.note(f"The hard limit of open files allows {most:,} readers a process: no rows beyond.")
    climb = _Climb(lab, report, held, settle_s, idle_s)
    for _ in range(rounds):
        try:
            climb.measure("nchan", CHANNEL, lab.nchan())
        except Missing as missing:
            report.note(f"{missing}: no such row.")
        store = lab.redis()
        climb.measure("relay", RELAY, lab.relay(store.url, NO_UPSTREAM), store)
    rows = [report.rows[_label("relay", readers)] for readers in held]
    memory = [row.median("kib_per_reader") for row in rows]
    costs = [row.median("connect_us") for row in rows]
    report.judge(f"KiB per reader at {held[-1]:,}", memory[-1], 12, aim=8)
    report.judge(f"KiB per reader at {held[-1]:,} against {held[0]:,}", memory[-1] / memory[0], 1.5)
    report.judge(f"CPU per connect at {held[-1]:,} against {held[0]:,}", costs[-1] / costs[0], 1.5)
    report.judge("Redis connections of relay", max(max(row.rounds["redis_connections"]) for row in rows), 4)
    report.note(
        "Each row comes on top of the one before, in the same server. kib_per_reader is the growth of "
        f"resident memory from {WARM_UP} readers to all of the row's, for each; connects_per_s and "
        "connect_us are of those that the row adds, until all have what follows is live (of nchan: the "
        f"answer's head), {ON_THEIR_WAY} on their way at a time. idle_cpu is the server's share of a core "
        "while nothing happens, heartbeats included."
    )
    return report


def _label(system: str, readers: int) -> str:
    return f"{system}, {readers:,} readers"


class _Climb:
    def __init__(self, lab: Lab, report: Report, sizes: list[int], settle_s: float, idle_s: float) -> None:
        self._lab = lab
        self._report = report
        self._sizes = sizes
        self._settle_s = settle_s
        self._idle_s = idle_s

    def measure(self, system: str, kind: Kind, server: Server, store: Server | None = None) -> None:
        """One server from the least readers to the most."""
        publisher = self._lab.program("benchmarks.load.publisher", kind.publisher, server.url)
        publisher.ask(f"open {STREAM}")
        started: list[Process] = [server, publisher, self._come(kind, server, WARM_UP)[0]]
        time.sleep(self._settle_s)
        before = server.rss_bytes()
        there = 0
        for readers in self._sizes:
            cpu = Cpu({"server": server})
            audience, came = self._come(kind, server, readers - there)
            connecting_s = cpu.used_s()["server"]
            started.append(audience)
            time.sleep(self._settle_s)
            cpu = Cpu({"server": server})
            time.sleep(self._idle_s)
            figures = {
                "kib_per_reader": (server.rss_bytes() - before) / readers / KIB,
                "connects_per_s": (readers - there) / came["seconds"],
                "connect_us": connecting_s / (readers - there) * 1e6,
                "idle_cpu": cpu.used_s()["server"] / self._idle_s,
            }
            if store is not None:
                figures["redis_connections"] = _connections(store)
            self._report.add(_label(system, readers), figures)
            there = readers
        for process in reversed(started):
            self._lab.stop(process)

    def _come(self, kind: Kind, server: Server, readers: int) -> tuple[Process, dict[str, Any]]:
        target = kind.target.replace("{stream}", STREAM)
        sizes = [str(readers), "1", str(ON_THEIR_WAY)]
        audience = self._lab.program("benchmarks.load.audience", server.url, target, kind.live, *sizes)
        return audience, audience.answer()


def _connections(store: Server) -> int:
    with redis.Redis(port=store.port) as client:
        listed: list[dict[str, Any]] = client.client_list()
    return sum(client["cmd"] != "client|list" for client in listed)
