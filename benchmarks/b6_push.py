"""B6: push ingest on Redis: large batches into one stream, and many bodies that get a frame at a time."""

from __future__ import annotations

import socket
import time

import hiredis
import redis

from benchmarks.load.producers import DATA
from benchmarks.processes import Commands, Cpu, Lab, Missing, Server
from benchmarks.report import Report

TITLE = "push ingest, Redis"
BATCH = 100
CONNECTIONS = 4
"""Producers of one stream, each with a run of its own."""

BODIES = 1000
PACE = 25
FAST_PACE = 60
"""Frames a second and body: what must be carried, and more than is aimed at."""

BATCHED = 1.5
"""Frames an append from which on relay does not keep up frame by frame."""

BUSY = 0.9
"""Share of a core from which on the generator may be what bounds a figure."""

SINGLE = "relay, a frame a request, 1 connection"
PEER = "Durable Streams"

ADD_ALL = """
local first = tonumber(ARGV[1])
for i = 2, #ARGV do redis.call('XADD', KEYS[1], first + i - 2 .. '-1', 'r', 'run', 'e', '', 'd', ARGV[i]) end
"""


def run(lab: Lab, quick: bool) -> Report:
    """Measure B6."""
    report = Report("B6", TITLE)
    rounds, window_s, bodies = (1, 0.3, 20) if quick else (3, 3.0, BODIES)
    bare_store = lab.redis()
    bench = _Bench(lab, report, window_s)
    batches = f"relay, batches of {BATCH}, {{}}"
    one, few = batches.format("1 connection"), batches.format(f"{CONNECTIONS} connections")
    durable = None
    try:
        durable = lab.durable_streams()
    except Missing as missing:
        report.note(f"{missing}: no such row.")
    must, aim = (f"relay, {bodies} bodies, {pace}/s each" for pace in (PACE, FAST_PACE))
    for _ in range(rounds):
        report.add("bare XADD, pipelined by 100", _bare(bare_store, window_s / 3, by_script=False))
        report.add("bare script, 100 XADDs a call", _bare(bare_store, window_s / 3, by_script=True))
        bench.measure(one, "batches", 1, BATCH)
        bench.measure(few, "batches", CONNECTIONS, BATCH)
        bench.measure(SINGLE, "batches", 1, 1)
        bench.measure(must, "bodies", bodies, PACE)
        bench.measure(aim, "bodies", bodies, FAST_PACE)
        if durable is not None:
            for connections, size in ((CONNECTIONS, BATCH), (1, 1)):
                bench.measure_durable(durable, connections, size)

    best = max((one, few), key=lambda label: report.rows[label].median("frames_per_s"))
    report.judge(
        f"batches, frames/s, {best.rpartition(', ')[2]}",
        report.rows[best].median("frames_per_s"),
        150_000,
        aim=400_000,
        at_least=True,
    )
    in_bodies = report.rows[aim].median("frames_per_s")
    report.judge("bodies, frames/s", in_bodies, 25_000, aim=50_000, at_least=True)
    report.note(
        f"Frames of {len(DATA)} bytes, numbered by their producers; relay and Redis with default settings, "
        "so the batches reach the bound of retention and trimming is part of them. Each connection waits for "
        "the answer to a batch before it sends the next. The bare rows journal nothing but entries: no "
        "run, no duplicates, no fencing, no message to followers; one Python process with hiredis keeps two "
        "batches of 100 in flight, client_us is its own CPU. Durable Streams keeps what it takes in its own "
        "memory, and as it is used here it knows no duplicates."
    )
    report.note(
        "cpu_us and redis_us are CPU per frame, redis_calls commands per frame, those inside scripts "
        "counted. producers_cpu is the generator's share of a core, and late_ms how far it fell behind its "
        f"pace: as long as the one is below {BUSY:g}, and the other small, it is not what bounds a figure."
    )
    for label in (one, few, SINGLE, must, aim):
        share = report.rows[label].median("producers_cpu")
        if share > BUSY:
            report.note(f"{label}: the generator used {share:.2f} of a core, and may be what bounds it.")
    batched = report.rows[must].median("frames_per_append")
    if batched > BATCHED:
        report.note(f"{must}: relay was late and joined {batched:.1f} frames an append.")
    return report


class _Bench:
    def __init__(self, lab: Lab, report: Report, window_s: float) -> None:
        self._lab = lab
        self._report = report
        self._window_s = window_s
        self._store = lab.redis()
        self._relay = lab.relay(self._store.url, "http://127.0.0.1:9")

    def measure(self, label: str, way: str, connections: int, amount: int) -> None:
        """One window of one load, to the last answer. Every frame sent must have been appended."""
        producers = self._lab.program(
            "benchmarks.load.producers", self._relay.url, way, str(connections), str(amount)
        )
        producers.answer()
        watched = {"relay": self._relay, "redis": self._store, "producers": producers}
        commands, cpu = Commands(self._store), Cpu(watched)
        producers.ask("begin")
        time.sleep(self._window_s)
        done = producers.ask("end")
        used, calls = cpu.used_s(), commands.run()
        self._lab.stop(producers)
        if done["appended"] != done["sent"]:
            raise RuntimeError(f"{label}: {done['sent']} frames were sent, and {done['appended']} appended")
        frames, seconds = max(1, done["sent"]), done["seconds"]  # 0 where a quick run was held up
        figures = {
            "frames_per_s": frames / seconds,
            "cpu_us": used["relay"] / frames * 1e6,
            "redis_us": used["redis"] / frames * 1e6,
            "redis_calls": sum(calls.values()) / frames,
            "frames_per_append": frames / max(1, calls.get("publish", 0)),
            "producers_cpu": used["producers"] / seconds,
            "others_cpu": used["others"] / seconds,
        }
        if way == "bodies":
            figures["late_ms"] = done["late_ms"]
        self._report.add(label, figures)
        self._report.details[f"redis calls per frame: {label}"] = {
            name: round(count / frames, 3) for name, count in sorted(calls.items())
        }
        with redis.Redis(port=self._store.port) as client:
            client.flushall()

    def measure_durable(self, server: Server, connections: int, size: int) -> None:
        """The same batches into the peer, which keeps them in its memory."""
        arguments = (server.url, "durable-batches", str(connections), str(size))
        producers = self._lab.program("benchmarks.load.producers", *arguments)
        producers.answer()
        cpu = Cpu({"server": server, "producers": producers})
        producers.ask("begin")
        time.sleep(self._window_s)
        done = producers.ask("end")
        used = cpu.used_s()
        self._lab.stop(producers)
        what = "a frame a request" if size == 1 else f"batches of {size}"
        many = "1 connection" if connections == 1 else f"{connections} connections"
        self._report.add(
            f"{PEER}, {what}, {many}",
            {
                "frames_per_s": done["sent"] / done["seconds"],
                "cpu_us": used["server"] / done["sent"] * 1e6,
                "producers_cpu": used["producers"] / done["seconds"],
                "others_cpu": used["others"] / done["seconds"],
            },
        )


def _bare(store: Server, window_s: float, *, by_script: bool) -> dict[str, float]:
    """So many entries as one Python process gets into a Redis Stream, two batches in flight."""
    with redis.Redis(port=store.port) as client:
        client.flushall()
        sha = client.script_load(ADD_ALL)
    reader = hiredis.Reader()
    with socket.create_connection(("127.0.0.1", store.port), 10) as connection:
        cpu, own = Cpu({"redis": store}), time.process_time()
        began = time.monotonic()
        sent = answered = 0
        while answered < sent or time.monotonic() - began < window_s:
            while sent - answered < 2 * BATCH and time.monotonic() - began < window_s:
                connection.sendall(_batch(sent + 1, sha if by_script else None))
                sent += BATCH
            reader.feed(connection.recv(65536))
            while (reply := reader.gets()) is not False:
                if isinstance(reply, Exception):
                    raise reply
                answered += BATCH if by_script else 1
        seconds, own = time.monotonic() - began, time.process_time() - own
    return {
        "frames_per_s": answered / seconds,
        "redis_us": cpu.used_s()["redis"] / answered * 1e6,
        "client_us": own / answered * 1e6,
    }


def _batch(first: int, sha: str | None) -> bytes:
    if sha is not None:
        return hiredis.pack_command(("EVALSHA", sha, 1, "bare", first, *[DATA] * BATCH))  # type: ignore
    return b"".join(
        hiredis.pack_command(("XADD", "bare", b"%d-1" % seq, "r", "run", "e", "", "d", DATA))  # type: ignore
        for seq in range(first, first + BATCH)
    )
