"""B1: one stream to 500 readers, one frame a publish, as fast as publishes are acknowledged, beside nchan."""

from __future__ import annotations

from benchmarks.load.fan_out import FanOut
from benchmarks.processes import Lab
from benchmarks.report import Report

TITLE = "fan-out, 1 stream, 500 readers, one frame a publish"
READERS = 500
GROUP_MS = 3.0
"""The bare loop groups over as long as relay does by default."""


def run(lab: Lab, quick: bool) -> Report:
    """Measure B1."""
    report = Report("B1", TITLE)
    readers, rounds, window_s = (20, 1, 0.3) if quick else (READERS, 3, 2.0)
    fan_out = FanOut(lab, report, readers, group_ms=GROUP_MS)
    for _ in range(rounds):
        for system in fan_out.systems:
            window = fan_out.window(system, "count", f"flat {window_s}")
            figures = {
                "events_per_s": window.delivered / window.seconds,
                "publishes_per_s": window.published / window.seconds,
                "ack_p50_ms": window.acked["p50_ms"],
                "drain_ms": (window.seconds - window.acked["seconds"]) * 1000,
            }
            report.add(system.label, figures | window.cpu_figures())
    if "nchan" in report.rows:
        peer = report.rows["nchan"].median("events_per_s")
        for journal in ("Redis", "SQLite"):
            measured = report.rows[f"relay on {journal}"].median("events_per_s")
            report.judge(f"relay on {journal} against nchan", measured / peer, 4, aim=10, at_least=True)
    report.note(
        "events_per_s is what all readers together were delivered, from the first publish until the last "
        "reader had the last frame; drain_ms is how long that was after the last answer to a publish. cpu_us "
        "and redis_us are CPU of the server and of its Redis per delivered event; server_cpu, audience_cpu "
        "and publisher_cpu are shares of one core. Every reader had every frame once and in order, or the "
        "run fails."
    )
    report.note(
        "The audience looks for what has come every 10 ms, so that it takes little from the server it "
        f"shares the machine with. `bare loop` answers a publish at once, groups over {GROUP_MS:g} ms and "
        "journals nothing: as long as it is far above the others, the generators bound none of them."
    )
    return report
