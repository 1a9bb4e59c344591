"""relay.metrics: what is counted, under labels from closed sets."""

from __future__ import annotations

from relay.lifecycle import Reason, ending
from relay.metrics import CONTENT_TYPE, Metrics


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
