"""Metrics for Prometheus. Label values come from closed sets only."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from relay.lifecycle import Ending, Status

CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """The metrics of one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.runs_ended = Counter(
            "relay_runs_ended", "Runs that ended here.", ["status", "reason"], registry=self.registry
        )
        self.completed_without_text = Counter(
            "relay_runs_completed_without_text",
            "Runs that completed without any text.",
            registry=self.registry,
        )
        self.open_runs = Gauge("relay_runs_open", "Runs whose upstream is read here.", registry=self.registry)
        self.open_readers = Gauge("relay_readers_open", "Readers connected here.", registry=self.registry)
        self.readers_ended = Counter(
            "relay_readers_ended", "Readers that ended here.", ["reason"], registry=self.registry
        )
        self.resumes = Counter(
            "relay_resumes", "Readers that came with a cursor.", ["outcome"], registry=self.registry
        )
        self.followed_streams = Gauge(
            "relay_streams_followed", "Streams followed here.", registry=self.registry
        )
        self.ring_bytes = Gauge("relay_ring_bytes", "Recent frames held in memory.", registry=self.registry)
        self.journal_up = Gauge(
            "relay_journal_up", "Whether the journal answered when last asked.", registry=self.registry
        )

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
        return generate_latest(self.registry)
