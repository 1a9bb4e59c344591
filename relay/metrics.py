"""Metrics for Prometheus. Label values come from closed sets only.

Several workers of one port keep theirs in files of a directory that they share, by worker number: each of
them can tell all, and a worker that takes the place of a dead one counts on where that stopped.
"""

from __future__ import annotations

import os

from prometheus_client import CollectorRegistry, Counter, Gauge, values
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from relay.lifecycle import Ending, Status

CONTENT_TYPE = CONTENT_TYPE_LATEST


def share_metrics(directory: str, number: int) -> None:
    """Have all `Metrics` made from now on in this process kept where the other workers of its port see them;
    `number` is the worker's, which no other one has at the same time."""
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = directory
    values.ValueClass = values.MultiProcessValue(lambda: number)  # type: ignore[no-untyped-call]


def forget_gauges(directory: str, number: int) -> None:
    """A worker is dead: what it held open counts no more. What it counted stays."""
    mark_process_dead(number, directory)  # type: ignore[no-untyped-call]


class Metrics:
    """The metrics of one process, or of all workers of its port if `directory` is where they share them."""

    def __init__(self, directory: str = "") -> None:
        self.registry = CollectorRegistry()
        self._told = self.registry
        if directory:
            self._told = CollectorRegistry()
            MultiProcessCollector(self._told, directory)  # type: ignore[no-untyped-call]
        self.runs_ended = Counter(
            "relay_runs_ended", "Runs that ended here.", ["status", "reason"], registry=self.registry
        )
        self.completed_without_text = Counter(
            "relay_runs_completed_without_text",
            "Runs that completed without any text.",
            registry=self.registry,
        )
        self.open_runs = self._sum("relay_runs_open", "Runs whose upstream is read here.")
        self.open_readers = self._sum("relay_readers_open", "Readers connected here.")
        self.readers_ended = Counter(
            "relay_readers_ended", "Readers that ended here.", ["reason"], registry=self.registry
        )
        self.resumes = Counter(
            "relay_resumes", "Readers that came with a cursor.", ["outcome"], registry=self.registry
        )
        self.followed_streams = self._sum("relay_streams_followed", "Streams followed here.")
        self.ring_bytes = self._sum("relay_ring_bytes", "Recent frames held in memory.")
        self.journal_up = Gauge(
            "relay_journal_up", "Whether the journal answered when last asked.", registry=self.registry,
            multiprocess_mode="livemostrecent",
        )  # fmt: skip
        self.workers = self._sum("relay_workers", "Processes that serve the port.")
        self.worker_starts = Counter(
            "relay_worker_starts", "Times that one of them began to serve.", registry=self.registry
        )

    def _sum(self, name: str, meaning: str) -> Gauge:
        """A gauge whose values of all workers add up."""
        return Gauge(name, meaning, registry=self.registry, multiprocess_mode="livesum")

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

    def exposition(self) -> bytes:
        """The text that a scrape gets."""
        return generate_latest(self._told)
