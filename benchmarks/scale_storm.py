"""A storm of reconnects: all readers are cut at once and come back at once with their cursors, while frames
flow."""

from __future__ import annotations

import time

from benchmarks.load.crowd import connections_max
from benchmarks.load.reading import Connection
from benchmarks.memory import KIB, MIB, Growth
from benchmarks.processes import Commands, Cpu, Lab, Process, Server
from benchmarks.report import Report

TITLE = "5,000 readers cut at once come back while frames flow"
READERS = 5000
AT_ONCE = 500
"""Readers on their way at a time when they first come."""

STORM_AT_ONCE = 4000
"""Readers on their way at a time in the storm: as many as wait for relay to accept them. Of more, the kernel
would drop the first packet, and when they come would be up to its timers of seconds."""

STORM_MAX_S = 110.0

STREAMS = {1: 10, 100: 2}
"""Frames a second of each, by how many streams there are."""

AWAY_S = {"at once": 0.0, "after 7 s": 7.0}
"""How long all are gone. relay keeps the frames of a stream without readers in memory for 5 s; then who comes
back is served from the journal."""

WINDOW_S = 2.0


def run(lab: Lab, quick: bool) -> Report:
    """Measure the storm."""
    report = Report("scale_storm", TITLE)
    readers, rounds, window_s = (50, 1, 0.3) if quick else (READERS, 2, WINDOW_S)
    streams = {1: 10, 10: 2} if quick else STREAMS
    away_s = {"at once": 0.0} if quick else AWAY_S
    if readers > connections_max():
        report.note(f"The hard limit of open files forbids {readers:,} readers: not measured.")
        return report
    for _ in range(rounds):
        for count, rate in streams.items():
            for said, seconds in away_s.items():
                label = f"relay, {count} stream{'s' * (count > 1)}, back {said}"
                report.add(label, _storm(lab, readers, count, rate, seconds, window_s))
    report.note(
        f"{readers:,} readers; each stream has {' or '.join(map(str, streams.values()))} frames a second "
        "meanwhile. live_s is from the first reconnect until the last reader has all it missed and is told "
        "that it is live, live_p50_s the half of them; connect_s is how long the same took them when they "
        f"first came, {AT_ONCE} at a time. cpu_us and redis_calls are of one reader that comes back, "
        "rss_growth_mib is relay's peak over what it held with all of them connected. Every reader got every "
        "frame once and in order, or the run fails."
    )
    return report


def _storm(
    lab: Lab, readers: int, streams: int, rate: int, away_s: float, window_s: float
) -> dict[str, float]:
    upstream, store = lab.upstream(), lab.redis()
    relay = lab.relay(store.url, upstream.url)
    for number in range(streams):
        _begin(relay, f"storm-{number}", rate)
    crowd = lab.program("benchmarks.load.crowd", relay.url)
    rss_before = relay.rss_bytes()
    came = crowd.ask(f"come {readers} {streams} {AT_ONCE} /relay/v1/streams/storm-{{}}/events")
    time.sleep(window_s)
    rss_kib = (relay.rss_bytes() - rss_before) / readers / KIB

    growth = Growth(relay)
    crowd.ask("cut")
    time.sleep(away_s)
    watched: dict[str, Process] = {"relay": relay, "redis": store, "crowd": crowd}
    commands, cpu = Commands(store), Cpu(watched)
    back = crowd.ask(f"come_back {STORM_AT_ONCE}", STORM_MAX_S)
    used, calls = cpu.used_s(), commands.run()
    time.sleep(window_s)
    peak = growth.peak_bytes()

    sent = upstream.ask("end")["sent"]
    whole = crowd.ask("finish")
    if whole["out_of_order"] or whole["differ"] or whole["frames"] != sent:
        raise RuntimeError(f"{sent} frames were sent in {streams} streams, and the readers had {whole}")
    for process in (crowd, relay, store, upstream):
        lab.stop(process)
    return {
        "live_s": back["seconds"],
        "live_p50_s": back["median_s"],
        "connect_s": came["seconds"],
        "cpu_us": used["relay"] / readers * 1e6,
        "redis_us": used["redis"] / readers * 1e6,
        "redis_calls": sum(calls.values()) / readers,
        "pages": calls.get("xrange", 0) / readers,
        "rss_growth_mib": peak / MIB,
        "rss_kib_per_reader": rss_kib,
        "crowd_cpu": used["crowd"] / back["seconds"],
        "others_cpu": used["others"] / back["seconds"],
    }


def _begin(relay: Server, stream: str, rate: int) -> None:
    """Have relay itself call upstream for a run of a stream."""
    with Connection(relay.url) as connection:
        connection.send(f"/paced?rate={rate}&shape=raw", Relay_Stream=stream, Prefer="respond-async")
        answered = connection.read_until(b"\r\n\r\n")
    if b" 202 " not in answered.partition(b"\r\n")[0]:
        raise RuntimeError(f"no run was begun: {answered!r}")
