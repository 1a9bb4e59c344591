"""CPU per frame by the number of open streams, at one and the same rate of frames in all."""

from __future__ import annotations

import time

from benchmarks.load.crowd import connections_max
from benchmarks.processes import Commands, Cpu, Lab, Process
from benchmarks.report import Report

TITLE = "2,000 frames/s over 10 to 5,000 open streams, proxied, Redis"
FRAMES_PER_S = 2000
"""In all: well below saturation, so that frames are not batched."""

STREAMS: tuple[int, ...] = (10, 100, 1000, 5000)
WINDOW_S = 5.0
"""Twice the time between two frames of one of 5,000 streams."""

OPENING_MAX_S = 180.0

CONNECTIONS_A_STREAM = 2
"""relay's own: the client's and the one to upstream."""


def run(lab: Lab, quick: bool) -> Report:
    """Measure the curve."""
    report = Report("scale_streams", TITLE)
    sizes, frames_per_s, rounds, window_s = STREAMS, FRAMES_PER_S, 2, WINDOW_S
    if quick:
        sizes, frames_per_s, rounds, window_s = (2, 20), 200, 1, 0.3
    held = [size for size in sizes if size * CONNECTIONS_A_STREAM <= connections_max()]
    for size in sizes:
        if size not in held:
            report.note(f"The hard limit of open files forbids {size:,} streams: no such row.")
    for _ in range(rounds):
        for size in held:
            _measure(lab, report, size, frames_per_s / size, window_s)
    few, many = (report.rows[_label(size)].median("cpu_us") for size in (held[0], held[-1]))
    report.judge(f"CPU per frame at {held[-1]:,} streams against {held[0]:,}", many / few, 1.5)
    report.note(
        f"{frames_per_s:,} frames/s in all, one reader a stream. cpu_us and redis_us hold all that the "
        "process did in the window, its background too: the lease, checks of quiet streams, the collector. "
        "silent_cpu, silent_redis_cpu (cores) and silent_calls_per_s are that background alone, with the "
        "same streams open and not one frame; more streams are quiet then, so it is no part of cpu_us that "
        "could be subtracted. rss_kib is relay's growth for each stream with its reader, opening_s the time "
        "from the first request until all have a frame."
    )
    return report


def _label(streams: int) -> str:
    return f"relay, {streams:,} open"


def _measure(lab: Lab, report: Report, streams: int, rate: float, window_s: float) -> None:
    upstream, store = lab.upstream(), lab.redis()
    relay = lab.relay(store.url, upstream.url)
    rss_before = relay.rss_bytes()
    target = f"/paced?rate={rate}&shape=raw"
    viewers = lab.program("benchmarks.load.viewers", relay.url, target, str(streams))
    began = time.monotonic()
    viewers.answer(OPENING_MAX_S)
    opening_s = time.monotonic() - began
    watched: dict[str, Process] = {
        "upstream": upstream, "viewers": viewers, "relay": relay, "redis": store,
    }  # fmt: skip
    time.sleep(window_s / 5)

    commands, cpu = Commands(store), Cpu(watched)
    viewers.ask("begin")
    time.sleep(window_s)
    seen = viewers.ask("end")
    used, calls = cpu.used_s(), commands.run()
    rss = relay.rss_bytes() - rss_before

    upstream.ask("hold")
    time.sleep(window_s / 2)  # by then every stream counts as quiet
    commands, cpu = Commands(store), Cpu(watched)
    began = time.monotonic()
    time.sleep(window_s)
    silent_s = time.monotonic() - began
    silent, silent_calls = cpu.used_s(), commands.run()

    sent = upstream.ask("end")["sent"]
    whole = viewers.ask("finish")
    if whole["received"] != sent or whole["out_of_order"]:
        raise RuntimeError(f"{streams} streams: {sent} frames were sent, and there came {whole}")
    for process in (viewers, relay, store, upstream):
        lab.stop(process)

    frames, seconds = max(1, seen["frames"]), seen["seconds"]
    report.add(
        _label(streams),
        {
            "frames_per_s": frames / seconds,
            "cpu_us": used["relay"] / frames * 1e6,
            "redis_us": used["redis"] / frames * 1e6,
            "redis_calls": sum(calls.values()) / frames,
            "frames_per_append": frames / max(1, calls.get("publish", 0)),
            "p50_ms": seen["p50_ms"],
            "p99_ms": seen["p99_ms"],
            "silent_cpu": silent["relay"] / silent_s,
            "silent_redis_cpu": silent["redis"] / silent_s,
            "silent_calls_per_s": sum(silent_calls.values()) / silent_s,
            "rss_kib": rss / streams / 1024,
            "opening_s": opening_s,
            "upstream_cpu": used["upstream"] / seconds,
            "viewers_cpu": used["viewers"] / seconds,
            "others_cpu": used["others"] / seconds,
        },
    )
    report.details[f"redis calls per frame: {_label(streams)}"] = {
        name: round(count / frames, 3) for name, count in sorted(calls.items())
    }
    report.details[f"redis calls a second, all silent: {_label(streams)}"] = {
        name: round(count / silent_s, 1) for name, count in sorted(silent_calls.items())
    }
