"""B2: how old a frame is when each of 500 readers of one stream has it, at 50 frames/s, beside nchan."""

from __future__ import annotations

from benchmarks.load.fan_out import FanOut
from benchmarks.processes import Lab
from benchmarks.report import Report

TITLE = "fan-out, 1 stream, 500 readers, 50 frames/s"
READERS = 500
RATE = 50


def run(lab: Lab, quick: bool) -> Report:
    """Measure B2."""
    report = Report("B2", TITLE)
    readers, rounds, window_s = (20, 1, 0.3) if quick else (READERS, 3, 4.0)
    fan_out = FanOut(lab, report, readers, group_ms=0.0)
    for _ in range(rounds):
        for system in fan_out.systems:
            window = fan_out.window(system, "time", f"paced {window_s} {RATE}")
            figures = {name: window.seen[name] for name in ("p50_ms", "p99_ms", "max_ms")}
            figures["ack_p50_ms"] = window.acked["p50_ms"]
            report.add(system.label, figures | window.cpu_figures())
    if "nchan" in report.rows:
        peer = report.rows["nchan"].median("p99_ms")
        for journal in ("Redis", "SQLite"):
            measured = report.rows[f"relay on {journal}"].median("p99_ms")
            report.judge(f"p99 of relay on {journal} against nchan's", measured / peer, 1, aim=0.5)
    report.note(
        "Latency is from before the publish is sent to the client's read, over all frames and readers of a "
        "window; all readers are in one process, and read one after the other. cpu_us and redis_us are CPU "
        "of the server and of its Redis per delivered event. Every reader had every frame once and in "
        "order, or the run fails."
    )
    report.note(
        "`bare loop` journals nothing and writes each frame as it comes: the least that a process of this "
        "kind, the generators and the kernel can have."
    )
    return report
