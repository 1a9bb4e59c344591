"""relay.metrics: what is counted, under labels from closed sets."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client import values

from relay.lifecycle import Reason, ending
from relay.metrics import CONTENT_TYPE, Metrics, forget_gauges, share_metrics


def test_endings_are_counted_by_status_and_reason() -> None:
    metrics = Metrics()
    metrics.run_ended(ending(Reason.UPSTREAM_END), 5)
    metrics.run_ended(ending(Reason.UPSTREAM_END), 5)
    metrics.run_ended(ending(Reason.OWNER_LOST), 0)
    text = metrics.exposition().decode()
    assert 'relay_runs_ended_total{reason="upstream_end",status="completed"} 2.0\n' in text
    assert 'relay_runs_ended_total{reason="owner_lost",status="lost"} 1.0\n' in text
    assert "relay_runs_completed_without_text_total 0.0\n" in text


def test_a_completion_without_any_text_is_counted() -> None:
    metrics = Metrics()
    metrics.run_ended(ending(Reason.PRODUCER_END), 0)
    assert "relay_runs_completed_without_text_total 1.0\n" in metrics.exposition().decode()


def test_resumes_are_counted_by_their_outcome() -> None:
    metrics = Metrics()
    metrics.resumed("gap")
    assert 'relay_resumes_total{outcome="gap"} 1.0\n' in metrics.exposition().decode()


def test_two_relays_in_one_process_do_not_share_their_counts() -> None:
    first, second = Metrics(), Metrics()
    first.open_readers.set(3)
    assert "relay_readers_open 3.0\n" in first.exposition().decode()
    assert "relay_readers_open 0.0\n" in second.exposition().decode()
    assert CONTENT_TYPE.startswith("text/plain")


def worker(directory: Path, number: int) -> Metrics:
    """The metrics of a worker that has just started."""
    share_metrics(str(directory), number)
    metrics = Metrics(str(directory))
    metrics.started()
    return metrics


def test_workers_tell_the_totals_of_all_also_of_those_that_died(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "of somebody else")
    monkeypatch.setattr(values, "ValueClass", values.ValueClass)
    first, second = worker(tmp_path, 1), worker(tmp_path, 2)
    for metrics, runs, readers in ((first, 1, 10), (second, 2, 20)):
        for _ in range(runs):
            metrics.run_ended(ending(Reason.UPSTREAM_END), 0)
        metrics.open_readers.set(readers)
        metrics.journal_up.set(metrics is second)
    for metrics in (first, second):
        text = metrics.exposition().decode()
        assert 'relay_runs_ended_total{reason="upstream_end",status="completed"} 3.0\n' in text
        assert "relay_runs_completed_without_text_total 3.0\n" in text
        assert "relay_readers_open 30.0\n" in text
        assert "relay_journal_up 1.0\n" in text, "what was found out last"
        assert "relay_workers 2.0\n" in text
        assert "# HELP relay_readers_open Readers connected here.\n" in text
    forget_gauges(str(tmp_path), 1)
    text = second.exposition().decode()
    assert "relay_readers_open 20.0\n" in text
    assert "relay_workers 1.0\n" in text
    assert "relay_runs_completed_without_text_total 3.0\n" in text
    replaced = worker(tmp_path, 1)
    replaced.run_ended(ending(Reason.UPSTREAM_END), 0)
    text = second.exposition().decode()
    assert "relay_runs_completed_without_text_total 4.0\n" in text
    assert "relay_worker_starts_total 3.0\n" in text
    assert "relay_readers_open 20.0\n" in text
