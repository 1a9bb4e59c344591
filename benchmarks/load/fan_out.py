"""The systems that B1 and B2 compare, and one window of one of them: a producer, an audience, every frame."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.processes import Cpu, Lab, Missing, Process, Server
from benchmarks.report import Report

ON_THEIR_WAY = 100
NO_UPSTREAM = "http://127.0.0.1:9"
"""Nothing listens there: all that is published is pushed."""


@dataclass(frozen=True)
class Kind:
    """How systems of a kind are published to (`publisher.SYSTEMS`), where a stream is read, and what a reader
    has when it misses nothing any more."""

    publisher: str
    target: str
    live: str


RELAY = Kind("relay", "/relay/v1/streams/{stream}/events", '"type":"live"')
CHANNEL = Kind("channel", "/events/{stream}", "\r\n\r\n")
DURABLE_STREAMS = Kind("durable-streams", "/{stream}?offset=-1&live=sse", "upToDate")


@dataclass
class System:
    """One that fans out, its producer, and its Redis."""

    label: str
    kind: Kind
    server: Server
    publisher: Process
    redis: Server | None = None


@dataclass
class Window:
    """What one window gave. CPU is in seconds, by process."""

    published: int
    delivered: int
    seconds: float
    acked: dict[str, Any]
    seen: dict[str, Any]
    cpu_s: dict[str, float]

    def cpu_figures(self) -> dict[str, float]:
        """What it cost a delivered event, and what share of a core the generators took."""
        figures = {"cpu_us": self.cpu_s["server"] / self.delivered * 1e6}
        if "redis" in self.cpu_s:
            figures["redis_us"] = self.cpu_s["redis"] / self.delivered * 1e6
        for name in ("server", "audience", "publisher", "others"):
            figures[f"{name}_cpu"] = self.cpu_s[name] / self.seconds
        return figures


class FanOut:
    """All systems, started; those that are missing are said in the report."""

    def __init__(self, lab: Lab, report: Report, readers: int, *, group_ms: float) -> None:
        self._lab = lab
        self._readers = readers
        self._streams = 0
        self.systems: list[System] = []
        for label, kind, start in (
            ("nchan", CHANNEL, lab.nchan),
            ("durable-streams", DURABLE_STREAMS, lab.durable_streams),
        ):
            try:
                self._add(label, kind, start())
            except Missing as missing:
                report.note(f"{missing}: no such row.")
        store = lab.redis()
        self._add("relay on Redis", RELAY, lab.relay(store.url, NO_UPSTREAM), store)
        self._add("relay on SQLite", RELAY, lab.relay(lab.sqlite_url(), NO_UPSTREAM))
        self._add("bare loop", CHANNEL, lab.bare_loop(group_ms))

    def _add(self, label: str, kind: Kind, server: Server, redis: Server | None = None) -> None:
        publisher = self._lab.program("benchmarks.load.publisher", kind.publisher, server.url)
        self.systems.append(System(label, kind, server, publisher, redis))

    def window(self, system: System, mode: str, publishing: str) -> Window:
        """Publish into a new stream, and wait until every reader had every frame."""
        self._streams += 1
        stream = f"fan-out-{self._streams}"
        system.publisher.ask(f"open {stream}")
        target = system.kind.target.replace("{stream}", stream)
        sizes = [str(self._readers), "1", str(ON_THEIR_WAY)]
        audience = self._lab.program(
            "benchmarks.load.audience", system.server.url, target, system.kind.live, *sizes
        )
        audience.answer()
        audience.ask(mode)
        watched: dict[str, Process] = {
            "server": system.server, "audience": audience, "publisher": system.publisher,
        }  # fmt: skip
        if system.redis is not None:
            watched["redis"] = system.redis
        cpu = Cpu(watched)
        acked = system.publisher.ask(publishing)
        seen = audience.ask(f"expect {acked['published']}")
        cpu_s = cpu.used_s() | {"audience": seen["cpu_s"]}
        expected = acked["published"] * self._readers
        if seen["received"] != expected or seen["out_of_order"]:
            raise RuntimeError(
                f"{system.label}: {expected} frames were to be delivered, and there came {seen}"
            )
        self._lab.stop(audience)
        system.publisher.ask("close")
        seconds = (seen["last_ns"] - acked["began_ns"]) / 1e9
        return Window(acked["published"], seen["received"], seconds, acked, seen, cpu_s)
