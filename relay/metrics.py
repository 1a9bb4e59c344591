"""Metrics for Prometheus. Label values come from closed sets only, and every one of them is there from the
start, at 0: a rate over a series that begins with its first event misses that event.

What happens often is counted in `relay.counts` and moved here by `take`. Several workers of one port keep
theirs in files of a directory that they share, by worker number: each of them can tell all, and a worker that
takes the place of a dead one counts on where that stopped.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    values,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from relay.counts import DELIVERY_OUTCOMES, SOURCES, Counts, Distribution
from relay.cursor import Standing
from relay.errors import RelayError, StartupError
from relay.journal.base import Condition
from relay.lifecycle import STATUS_OF, Ending, Status
from relay.replay.reader import ReaderEnd
from relay.server import REFUSALS

CONTENT_TYPE = CONTENT_TYPE_LATEST

# Twice as many series, and Prometheus takes nothing from them in this format.
disable_created_metrics()  # type: ignore[no-untyped-call]

VERSION = version("relay-sidecar")

RESUME_OUTCOMES = (
    "resumed",
    "ended",
    *(standing.value for standing in Standing if standing is not Standing.HERE),
)

PROCESS_EVERY_S = 5.0
"""How often a worker looks at what the system says of it, which takes a while with many connections."""


def share_metrics(directory: str, number: int) -> None:
    """Have all `Metrics` made from now on in this process kept where the other workers of its port see them;
    `number` is the worker's, which no other one has at the same time."""
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = directory
    values.ValueClass = values.MultiProcessValue(lambda: number)  # type: ignore[no-untyped-call]


def forget_gauges(directory: str, number: int) -> None:
    """A worker is dead: what it held open counts no more. What it counted stays."""
    mark_process_dead(number, directory)  # type: ignore[no-untyped-call]


def refusal_codes() -> tuple[str, ...]:
    """Every code that a refused request may be given."""

    def below(error: type[RelayError]) -> Iterable[type[RelayError]]:
        yield error
        for kind in error.__subclasses__():
            yield from below(kind)

    # Others (of tests, of the command line) are no answers of a relay.
    own = {kind.code for kind in below(RelayError) if kind.__module__ == RelayError.__module__}
    return tuple(sorted((own | set(REFUSALS)) - {StartupError.code}))


class Spread(Histogram):
    """A histogram that takes many values at once."""

    def take(self, values: Distribution) -> None:
        """Count these values, which are then forgotten."""
        for bucket, count in zip(self._buckets, values.counts, strict=True):
            if count:
                bucket.inc(count)
        self._sum.inc(values.total)
        values.clear()


class Metrics:
    """The metrics of one process, or of all workers of its port if `directory` is where they share them.
    `journal` is the kind of its journal."""

    def __init__(self, directory: str = "", journal: str = "sqlite") -> None:
        self.registry = CollectorRegistry()
        self._told = self.registry
        if directory:
            self._told = CollectorRegistry()
            MultiProcessCollector(self._told, directory)  # type: ignore[no-untyped-call]

        self.runs_started = self._counter(
            "relay_runs_started", "Runs begun here, by who produces their frames.", "source"
        )
        self.runs_ended = self._counter("relay_runs_ended", "Runs ended here.", "status", "reason")
        self.completed_without_text = self._counter(
            "relay_runs_completed_without_text", "Runs that completed without any text."
        )
        self.frames_journaled = self._counter(
            "relay_frames_journaled", "Frames of producers that the journal accepted.", "source"
        )
        self.journaled_bytes = self._counter("relay_journaled_bytes", "Their data.", "source")
        self.frames_delivered = self._counter(
            "relay_frames_delivered", "Frames written to readers, each counted once a reader."
        )
        self.delivered_bytes = self._counter(
            "relay_delivered_bytes", "What was written to readers for them, before compression."
        )
        self.resumes = self._counter("relay_resumes", "Readers that came with a cursor.", "outcome")
        self.readers_ended = self._counter("relay_readers_ended", "Readers that ended here.", "reason")
        self.duplicates_suppressed = self._counter(
            "relay_duplicates_suppressed", "Frames sent again that the journal had already."
        )
        self.orphans_reaped = self._counter(
            "relay_orphans_reaped", "Runs ended here because their process or their producer was gone."
        )
        self.fenced_appends = self._counter(
            "relay_fenced_appends", "Appends that came too late: the run had ended, or another writer had it."
        )
        self.journal_reconnects = self._counter(
            "relay_journal_reconnects", "Connections to the journal that were opened again."
        )
        self.journal_rewinds = self._counter(
            "relay_journal_rewinds", "Runs of which the journal had lost accepted frames (failover, restore)."
        )
        self.ring_hits = self._counter("relay_ring_hits", "Times a reader was given frames from memory.")
        self.journal_pages = self._counter(
            "relay_journal_pages", "Pages of frames read from the journal for readers."
        )
        self.webhook_deliveries = self._counter(
            "relay_webhook_deliveries", "Tries to deliver a run's end, by what came of them.", "outcome"
        )
        self.refusals = self._counter("relay_refusals", "Requests answered with a problem.", "code")
        self.worker_starts = self._counter("relay_worker_starts", "Times that a process began to serve.")

        self.append_duration = self._spread(
            "relay_append_duration_seconds",
            "From an append's first try until the journal had taken it.",
            "append_duration",
        )
        self.delivery_delay = self._spread(
            "relay_delivery_delay_seconds",
            "From the journal's clock to the write to readers, of the oldest frame of each write.",
            "delivery_delay",
        )
        self.replay_frames = self._spread(
            "relay_replay_frames", "Frames that a reader was behind when it began.", "replay_frames"
        )
        self.upstream_first_frame = self._spread(
            "relay_upstream_first_frame_seconds",
            "From asking upstream to its first event.",
            "upstream_first_frame",
        )
        self.cancel_to_end = self._spread(
            "relay_cancel_to_end_seconds",
            "From a request to cancel until the run's end was journaled.",
            "cancel_to_end",
        )

        self.open_runs = self._gauge("relay_runs_open", "Runs whose upstream is read here.")
        self.open_readers = self._gauge("relay_readers_open", "Readers connected here.")
        self.followed_streams = self._gauge("relay_streams_followed", "Streams followed here.")
        self.ring_bytes = self._gauge("relay_ring_bytes", "Recent frames held in memory.")
        self.reader_lag = self._gauge(
            "relay_reader_lag_frames", "Frames that the reader farthest behind is behind.", "livemax"
        )
        self.oldest_open_run = self._gauge(
            "relay_oldest_open_run_seconds", "Age of the oldest run whose upstream is read here.", "livemax"
        )
        self.longest_silence = self._gauge(
            "relay_longest_silence_seconds", "Silence of the most silent such run.", "livemax"
        )
        self.webhook_backlog_age = self._gauge(
            "relay_webhook_backlog_age_seconds",
            "How long ago the run ended whose delivery waits longest.",
            "livemostrecent",
        )
        self.draining = self._gauge("relay_draining", "Whether a process is shutting down.", "livemax")
        self.journal_up = self._gauge(
            "relay_journal_up", "Whether the journal answered when last asked.", "livemostrecent"
        )
        self.workers = self._gauge("relay_workers", "Processes that serve the port.")
        self.build_info = Gauge(
            "relay_build_info", "Which relay this is, on what kind of journal.", ["version", "journal"],
            registry=self.registry, multiprocess_mode="livemax",
        )  # fmt: skip
        self.build_info.labels(VERSION, journal).set(1)
        self._redis = (
            {
                "memory_bytes": self._gauge(
                    "relay_redis_memory_bytes", "Memory that Redis uses.", "livemostrecent"
                ),
                "memory_max_bytes": self._gauge(
                    "relay_redis_memory_max_bytes",
                    "Memory that Redis may use; 0 is no bound.",
                    "livemostrecent",
                ),
                "evicted_keys": self._gauge(
                    "relay_redis_evicted_keys",
                    "Keys that Redis evicted since it was started.",
                    "livemostrecent",
                ),
            }
            if journal == "redis"
            else {}
        )
        self._process = OwnProcess(self.registry) if directory else None
        if not directory:
            ProcessCollector(registry=self.registry)

        for source in SOURCES:
            for counter in (self.runs_started, self.frames_journaled, self.journaled_bytes):
                counter.labels(source)
        for reason, status in STATUS_OF.items():
            self.runs_ended.labels(status, reason)
        for counter, known in (
            (self.resumes, RESUME_OUTCOMES),
            (self.readers_ended, ReaderEnd),
            (self.webhook_deliveries, DELIVERY_OUTCOMES),
            (self.refusals, refusal_codes()),
        ):
            for value in known:
                counter.labels(value)

    def _counter(self, name: str, meaning: str, *labels: str) -> Counter:
        return Counter(name, meaning, labels, registry=self.registry)

    def _spread(self, name: str, meaning: str, counted: str) -> Spread:
        """A histogram of what `Counts` has under the name `counted`."""
        bounds = getattr(Counts(), counted).bounds
        return Spread(name, meaning, registry=self.registry, buckets=bounds)

    def _gauge(self, name: str, meaning: str, of_workers: Any = "livesum") -> Gauge:
        """A gauge; `of_workers` says what its values of several workers make together."""
        return Gauge(name, meaning, registry=self.registry, multiprocess_mode=of_workers)

    def started(self) -> None:
        """This process serves."""
        self.workers.set(1)
        self.worker_starts.inc()

    def run_ended(self, ending: Ending, text_bytes: int) -> None:
        """Count a run that this process ended."""
        self.runs_ended.labels(ending.status, ending.reason).inc()
        if ending.status is Status.COMPLETED and not text_bytes:
            self.completed_without_text.inc()

    def resumed(self, outcome: str) -> None:
        """Count a reader that came with a cursor: `resumed` is one that was honoured."""
        self.resumes.labels(outcome).inc()

    def take(self, counts: Counts) -> None:
        """Move what was counted here; the counts begin anew."""
        for source, journaled in counts.journaled.items():
            self.runs_started.labels(source).inc(journaled.runs)
            self.frames_journaled.labels(source).inc(journaled.frames)
            self.journaled_bytes.labels(source).inc(journaled.bytes)
            journaled.runs = journaled.frames = journaled.bytes = 0
        for name in _PLAIN:
            getattr(self, name).inc(getattr(counts, name))
            setattr(counts, name, 0)
        for name in _LABELLED:
            counter, by_label = getattr(self, name), getattr(counts, name)
            for label, count in by_label.items():
                counter.labels(label).inc(count)
            by_label.clear()
        for name in _SPREAD:
            getattr(self, name).take(getattr(counts, name))
        if self._process is not None:
            self._process.look()

    def journal_is(self, condition: Condition | None) -> None:
        """What the journal says of itself; None when it does not answer."""
        self.journal_up.set(condition is not None)
        if condition is None:
            return
        waiting_ms = condition.now_ms - condition.waiting_since_ms if condition.waiting_since_ms else 0
        self.webhook_backlog_age.set(max(0, waiting_ms) / 1000)
        for name, gauge in self._redis.items():
            value = condition.details.get(name)
            if isinstance(value, int):
                gauge.set(value)

    def exposition(self) -> bytes:
        """The text that a scrape gets."""
        return generate_latest(self._told)


_PLAIN = (
    "frames_delivered", "delivered_bytes", "duplicates_suppressed", "orphans_reaped", "fenced_appends",
    "journal_reconnects", "journal_rewinds", "ring_hits", "journal_pages",
)  # fmt: skip
_LABELLED = ("webhook_deliveries", "refusals")
_SPREAD = ("append_duration", "delivery_delay", "replay_frames", "upstream_first_frame", "cancel_to_end")


class OwnProcess:
    """What the system says of this process, under the names that prometheus-client gives it, in metrics that
    add up over workers: its own collector tells of one process only."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._collector = ProcessCollector(registry=None)
        self._looked_at = -PROCESS_EVERY_S
        self._cpu_s = 0.0
        self._gauges: dict[str, Gauge] = {}
        self._cpu: Counter | None = None
        for family in self._collector.collect():
            if family.type == "counter":
                self._cpu = Counter(family.name, family.documentation, registry=registry)
            else:
                mode: Any = "livemin" if family.name.endswith("start_time_seconds") else "livesum"
                self._gauges[family.name] = Gauge(
                    family.name, family.documentation, registry=registry, multiprocess_mode=mode
                )

    def look(self) -> None:
        """Note what the system says, if it was not asked just now."""
        now = time.monotonic()
        if now - self._looked_at < PROCESS_EVERY_S:
            return
        self._looked_at = now
        for family in self._collector.collect():
            value = family.samples[0].value
            if family.name in self._gauges:
                self._gauges[family.name].set(value)
            elif self._cpu is not None:
                self._cpu.inc(value - self._cpu_s)
                self._cpu_s = value
