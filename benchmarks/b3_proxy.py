"""B3: many paced streams through the proxy, end to end, on Redis and on SQLite, beside nginx, which journals
nothing, and a hand-written way."""

from __future__ import annotations

import time

from benchmarks.processes import Commands, Cpu, Lab, Missing, Process, Server
from benchmarks.report import Report

TITLE = "proxy, 200 streams x 50 frames/s, Redis, end to end"
STREAMS = 200
RATE = 50
SURVIVED_RATE = 10
"""Frames a second and stream that the hand-written way still carries."""

BATCHED = 1.5
"""Frames an append from which on relay is not keeping up frame by frame."""

NGINX_US = 7.8
"""What nginx took to pass a frame where the budgets were set: in this unit they are the same everywhere."""

CARRIED = 0.95
"""A system that delivers less of what was sent than this share does not carry the load."""


def run(lab: Lab, quick: bool) -> Report:
    """Measure B3."""
    report = Report("B3", TITLE)
    streams, rounds, window_s = (20, 1, 0.3) if quick else (STREAMS, 3, 4.0)
    bench = _Bench(lab, report, streams, window_s)
    upstream = bench.upstream
    relay_redis, peer_redis = lab.redis(), lab.redis()
    relay = lab.relay(relay_redis.url, upstream.url)
    embedded = lab.relay(lab.sqlite_url(), upstream.url)
    nginx = handwritten = None
    try:
        nginx = lab.nginx(upstream)
    except Missing as missing:
        report.note(f"{missing}: no such row.")
    try:
        handwritten = lab.handwritten(upstream.url, peer_redis.url)
    except Missing as missing:
        report.note(f"{missing}: no such row.")

    fast, slow = f"{streams}x{RATE}/s", f"{streams}x{SURVIVED_RATE}/s"
    for _ in range(rounds):
        bench.measure(f"direct, {fast}", upstream, RATE)
        if nginx is not None:
            bench.measure(f"nginx, {fast}", nginx, RATE)
        bench.measure(f"relay, {fast}", relay, RATE, redis=relay_redis)
        bench.measure(f"relay, openai-chat, {fast}", relay, RATE, redis=relay_redis, shape="openai")
        bench.measure(f"relay on SQLite, {fast}", embedded, RATE)
        bench.measure(f"relay, {slow}", relay, SURVIVED_RATE, redis=relay_redis)
        if handwritten is not None:
            bench.measure(f"hand-written, {slow}", handwritten, SURVIVED_RATE, redis=peer_redis)
    if handwritten is not None:
        # Last and once: what it could not take is still queued when the window is over.
        bench.measure(f"hand-written, {fast}", handwritten, RATE, redis=peer_redis, to_the_end=False)

    row = report.rows[f"relay, {fast}"]
    report.judge("p50_ms", row.median("p50_ms"), 3.0)
    report.judge("p99_ms", row.median("p99_ms"), 10.0)
    report.judge("relay CPU, µs per frame", row.median("cpu_us"), 60.0, aim=35.0)
    if nginx is not None:
        passed = max(report.rows[f"nginx, {fast}"].median("cpu_us"), 1.0)  # 0 in a quick run
        report.judge(
            "relay CPU per frame against nginx's", row.median("cpu_us") / passed, 60 / NGINX_US,
            aim=35 / NGINX_US,
        )  # fmt: skip
    batched = row.median("frames_per_append")
    if batched > BATCHED:
        report.note(
            f"relay was late and batched {batched:.1f} frames an append, which makes its CPU per frame look "
            "better than it is when it is on time: do not believe that figure."
        )
    report.note(
        "cpu_us is CPU of the system itself per delivered frame, redis_us that of its Redis; redis_calls are "
        "commands per frame, those inside scripts counted; frames_per_append tells how far a late loop "
        "batches (1 is not at all), which makes a frame cheaper and latency worse; upstream_cpu and "
        "viewers_cpu are the generators' share of one core, others_cpu that of everything else on the "
        "machine. `direct` shows what the generators alone add, and that they carry the load. nginx passes "
        "the same bytes and journals nothing: what is beyond it is the price of the journal, of being "
        "resumable and of Python; on SQLite the journal's CPU is in relay's, on Redis most is in Redis's."
    )
    if handwritten is not None:
        delivered = report.rows[f"hand-written, {fast}"].median("frames_per_s")
        if delivered < streams * RATE * CARRIED:
            report.note(
                f"The hand-written way does not carry {fast}; its row there is what it delivered while the "
                f"rest piled up. {slow} is a rate that it survives."
            )
    return report


class _Bench:
    def __init__(self, lab: Lab, report: Report, streams: int, window_s: float) -> None:
        self.upstream = lab.upstream()
        self._lab = lab
        self._report = report
        self._streams = streams
        self._window_s = window_s

    def measure(
        self,
        label: str,
        server: Server,
        rate: int,
        *,
        redis: Server | None = None,
        shape: str = "raw",
        to_the_end: bool = True,
    ) -> None:
        """One window of one system. Every frame sent must arrive, once and in order, when read to the end."""
        target = f"/paced?rate={rate}&shape={shape}"
        viewers = self._lab.program("benchmarks.load.viewers", server.url, target, str(self._streams))
        viewers.answer()
        time.sleep(self._window_s / 4)
        watched: dict[str, Process] = {"upstream": self.upstream, "viewers": viewers}
        if server is not self.upstream:
            watched["server"] = server
        if redis is not None:
            watched["redis"] = redis
        commands = None if redis is None else Commands(redis)
        cpu = Cpu(watched)
        viewers.ask("begin")
        time.sleep(self._window_s)
        seen = viewers.ask("end")
        used = cpu.used_s()
        calls = {} if commands is None else commands.run()
        sent = self.upstream.ask("end")["sent"]
        if to_the_end:
            whole = viewers.ask("finish")
            if whole["received"] != sent or whole["out_of_order"]:
                raise RuntimeError(f"{label}: {sent} frames were sent, and there came {whole}")
        self._lab.stop(viewers)

        frames, seconds = max(1, seen["frames"]), seen["seconds"]
        figures = {
            "frames_per_s": frames / seconds,
            "p50_ms": seen["p50_ms"],
            "p99_ms": seen["p99_ms"],
        }
        if "server" in used:
            figures["cpu_us"] = used["server"] / frames * 1e6
        if redis is not None:
            figures["redis_us"] = used["redis"] / frames * 1e6
            figures["redis_calls"] = sum(calls.values()) / frames
            figures["frames_per_append"] = frames / max(1, calls.get("publish", calls.get("xadd", 0)))
            self._report.details[f"redis calls per frame: {label}"] = {
                name: round(count / frames, 3) for name, count in sorted(calls.items())
            }
        figures["upstream_cpu"] = used["upstream"] / seconds
        figures["viewers_cpu"] = used["viewers"] / seconds
        figures["others_cpu"] = used["others"] / seconds
        self._report.add(label, figures)
