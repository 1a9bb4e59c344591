"""CPU per frame and throughput by the number of worker processes on one port."""

from __future__ import annotations

import os
import time
from pathlib import Path

from benchmarks.processes import Commands, Cpu, Lab, Process, Server, cpu_s
from benchmarks.report import Report

TITLE = "proxy over 1 and 2 workers on one port, Redis"
WORKERS = (1, 2)
STREAMS = 200
RATE = 50
SATURATING_STREAMS = 64
FRAME_BYTES = 60
ENDLESS = 10**9
"""Frames of an answer that nobody waits for the end of."""


def run(lab: Lab, quick: bool) -> Report:
    """Measure both loads for each number of workers."""
    report = Report("scale_workers", TITLE)
    streams, saturating, rounds, window_s = STREAMS, SATURATING_STREAMS, 2, 4.0
    if quick:
        streams, saturating, rounds, window_s = 20, 8, 1, 0.3
    for _ in range(rounds):
        for workers in WORKERS:
            _measure(lab, report, workers, f"{streams}x{RATE}/s", streams, window_s)
            _measure(lab, report, workers, "as fast as it goes", saturating, window_s)
    few, many = (report.rows[_label(workers, f"{streams}x{RATE}/s")].median("cpu_us") for workers in WORKERS)
    report.note(
        f"At {streams}x{RATE}/s, CPU per frame of {WORKERS[-1]} workers is {many / few:.2f} of one's. cpu_us "
        "is that of all workers, but also falls where they are late and batch (frames_per_append), so "
        "compare it where that is alike. most_loaded and least_loaded are cores used by a worker: how evenly "
        "connections were dealt. `as fast as it goes` is upstreams that write what is taken; its latency is "
        "that of full buffers and not shown."
    )
    cores = len(os.sched_getaffinity(0))
    busy = WORKERS[-1] + 3
    if cores < busy:
        report.note(
            f"Here {WORKERS[-1]} workers, Redis and the generators of load share {cores} cores. What this "
            "can show is what the same frames cost with more workers, and how they are dealt; how far "
            f"throughput grows shows only where each process has a core, {busy} in all."
        )
    return report


def _label(workers: int, load: str) -> str:
    return f"{workers} worker{'s' if workers > 1 else ''}, {load}"


def _measure(lab: Lab, report: Report, workers: int, load: str, streams: int, window_s: float) -> None:
    upstream, store = lab.upstream(), lab.redis()
    relay = lab.relay(store.url, upstream.url, workers=workers)
    is_paced = load.endswith("/s")
    target = f"/paced?rate={RATE}&shape=raw" if is_paced else f"/burst?frames={ENDLESS}&size={FRAME_BYTES}"
    viewers = lab.program("benchmarks.load.viewers", relay.url, target, str(streams))
    viewers.answer()
    time.sleep(window_s / 4)
    watched: dict[str, Process] = {"upstream": upstream, "viewers": viewers, "redis": store}
    pids = _serving(relay, workers)
    commands, cpu = Commands(store), Cpu(watched)
    before = [cpu_s(pid) for pid in pids]
    viewers.ask("begin")
    time.sleep(window_s)
    seen = viewers.ask("end")
    used, calls = cpu.used_s(), commands.run()
    by_worker = [cpu_s(pid) - was for pid, was in zip(pids, before, strict=True)]
    if is_paced:
        sent = upstream.ask("end")["sent"]
        whole = viewers.ask("finish")
        if whole["received"] != sent or whole["out_of_order"]:
            raise RuntimeError(f"{workers} workers: {sent} frames were sent, and there came {whole}")
    for process in (upstream, viewers, relay, store):
        lab.stop(process)

    frames, seconds = max(1, seen["frames"]), seen["seconds"]
    figures = {
        "frames_per_s": frames / seconds,
        "cpu_us": sum(by_worker) / frames * 1e6,
        "most_loaded": max(by_worker) / seconds,
        "least_loaded": min(by_worker) / seconds,
        "redis_us": used["redis"] / frames * 1e6,
        "frames_per_append": frames / max(1, calls.get("publish", 0)),
    }
    if is_paced:
        figures |= {"p50_ms": seen["p50_ms"], "p99_ms": seen["p99_ms"]}
    figures |= {
        "redis_cpu": used["redis"] / seconds,
        "upstream_cpu": used["upstream"] / seconds,
        "viewers_cpu": used["viewers"] / seconds,
        "others_cpu": max(0.0, used["others"] - sum(by_worker)) / seconds,
    }
    report.add(_label(workers, load), figures)


def _serving(relay: Server, workers: int) -> list[int]:
    """The processes that serve: relay's own, or the children of the one that watches over them."""
    if workers == 1:
        return [relay.pid]
    children = Path(f"/proc/{relay.pid}/task/{relay.pid}/children").read_text().split()
    return [int(child) for child in children]
