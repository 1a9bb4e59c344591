"""relay.metrics: what is counted, under labels from closed sets."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from producing import DEADLINE_S, Producer, ask
from prometheus_client import values
from reading import Reading
from redis_server import RedisServer
from relay_process import RelayProcess
from run_record import whole_run
from scripted_upstream import Exchange, ScriptedUpstream

from relay.counts import PROXIED, Counts
from relay.frame import Event
from relay.journal.base import Condition
from relay.lifecycle import Reason, ending
from relay.metrics import CONTENT_TYPE, Metrics, forget_gauges, refusal_codes, share_metrics


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


NAMES = re.compile(r"\| `(\w+)` \| (\w+) \| ([^|]*) \| (.+) \|")
DOCUMENT = Path(__file__).parent.parent / "docs" / "metrics.md"


def families(metrics: Metrics) -> dict[str, tuple[str, set[str], str]]:
    """Type, labels and help of every metric, by the name that a query uses."""
    return {
        family.name + ("_total" if family.type == "counter" else ""): (
            family.type,
            {label for sample in family.samples for label in sample.labels if label != "le"},
            family.documentation,
        )
        for family in metrics.registry.collect()
    }


def test_docs_list_every_metric_with_its_type_labels_and_meaning() -> None:
    listed = {
        name: (kind, set(re.findall(r"`(\w+)`", labels)), meaning)
        for name, kind, labels, meaning in NAMES.findall(DOCUMENT.read_text())
    }
    assert listed == families(Metrics(journal="redis"))


def test_without_redis_nothing_is_told_of_it() -> None:
    assert families(Metrics(journal="redis")).keys() - families(Metrics()).keys() == {
        "relay_redis_memory_bytes", "relay_redis_memory_max_bytes", "relay_redis_evicted_keys",
    }  # fmt: skip


@pytest.mark.parametrize(
    "series",
    [
        'relay_runs_started_total{source="proxied"}',
        'relay_runs_ended_total{reason="owner_lost",status="lost"}',
        'relay_refusals_total{code="journal_unavailable"}',
        'relay_refusals_total{code="head_too_large"}',
        'relay_resumes_total{outcome="gap"}',
        'relay_readers_ended_total{reason="slow"}',
        'relay_webhook_deliveries_total{outcome="given_up"}',
    ],
)
def test_a_series_is_there_before_its_first_event(series: str) -> None:
    assert f"{series} 0.0\n" in Metrics().exposition().decode()


def test_every_code_of_an_error_is_one_of_the_refusals() -> None:
    codes = refusal_codes()
    assert {"internal", "fenced", "auth_unavailable", "busy", "too_many_requests"} <= set(codes)
    assert "startup" not in codes
    assert len(codes) == len(set(codes)) < 60


def counted() -> Counts:
    """One of each thing."""
    counts = Counts()
    counts.journaled[PROXIED].runs += 1
    counts.appended(PROXIED, [Event("", b"four"), Event("", b"five!")], 1, 0.003)
    for name in (
        "frames_delivered", "delivered_bytes", "orphans_reaped", "fenced_appends", "journal_reconnects",
        "journal_rewinds", "ring_hits", "journal_pages",
    ):  # fmt: skip
        setattr(counts, name, 7)
    counts.webhook_deliveries["retried"] += 2
    counts.refusals["busy"] += 3
    counts.delivery_delay.observe(0.0)
    counts.replay_frames.observe(12)
    counts.upstream_first_frame.observe(1e6)
    counts.cancel_to_end.observe(0.02)
    return counts


TAKEN = {
    'relay_runs_started_total{source="proxied"}': 1,
    'relay_frames_journaled_total{source="proxied"}': 1,
    'relay_journaled_bytes_total{source="proxied"}': 5,
    'relay_frames_journaled_total{source="pushed"}': 0,
    "relay_duplicates_suppressed_total": 1,
    "relay_frames_delivered_total": 7,
    "relay_delivered_bytes_total": 7,
    "relay_orphans_reaped_total": 7,
    "relay_fenced_appends_total": 7,
    "relay_journal_reconnects_total": 7,
    "relay_journal_rewinds_total": 7,
    "relay_ring_hits_total": 7,
    "relay_journal_pages_total": 7,
    'relay_webhook_deliveries_total{outcome="retried"}': 2,
    'relay_refusals_total{code="busy"}': 3,
    'relay_append_duration_seconds_bucket{le="0.0025"}': 0,
    'relay_append_duration_seconds_bucket{le="0.005"}': 1,
    "relay_append_duration_seconds_count": 1,
    "relay_append_duration_seconds_sum": 0.003,
    'relay_delivery_delay_seconds_bucket{le="0.0005"}': 1,
    'relay_replay_frames_bucket{le="10.0"}': 0,
    'relay_replay_frames_bucket{le="30.0"}': 1,
    'relay_upstream_first_frame_seconds_bucket{le="300.0"}': 0,
    'relay_upstream_first_frame_seconds_bucket{le="+Inf"}': 1,
    "relay_cancel_to_end_seconds_sum": 0.02,
}


def told(metrics: Metrics) -> dict[str, float]:
    """Every series and its value."""
    lines = metrics.exposition().decode().splitlines()
    return {
        name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")
    }


def test_what_was_counted_is_moved_into_the_metrics_once() -> None:
    metrics, counts = Metrics(), counted()
    metrics.take(counts)
    metrics.take(counts)
    assert {series: told(metrics)[series] for series in TAKEN} == TAKEN


def test_what_workers_counted_adds_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "of somebody else")
    monkeypatch.setattr(values, "ValueClass", values.ValueClass)
    first, second = worker(tmp_path, 1), worker(tmp_path, 2)
    first.take(counted())
    second.take(counted())
    first.reader_lag.set(5)
    second.reader_lag.set(3)
    both = told(second)
    assert {series: both[series] for series in TAKEN} == {
        series: 2 * value for series, value in TAKEN.items()
    }
    assert both["relay_reader_lag_frames"] == 5, "the largest"
    assert both['relay_build_info{journal="sqlite",version="0.1.0"}'] == 1
    assert both["process_resident_memory_bytes"] > 2 * 2**20
    assert both["process_cpu_seconds_total"] > 0
    assert both["process_start_time_seconds"] < 2 * 10**9, "of one of them"


def test_the_journals_condition_is_told() -> None:
    metrics = Metrics(journal="redis")
    details = {"memory_bytes": 5_000, "memory_max_bytes": 0, "evicted_keys": 2}
    metrics.journal_is(Condition("redis", "7.0.15", 90_500, 60_000, details))
    now = told(metrics)
    assert now["relay_journal_up"] == 1
    assert now["relay_webhook_backlog_age_seconds"] == 30.5
    assert (now["relay_redis_memory_bytes"], now["relay_redis_evicted_keys"]) == (5_000, 2)
    metrics.journal_is(Condition("redis", "7.0.15", 90_500, 0, details))
    assert told(metrics)["relay_webhook_backlog_age_seconds"] == 0
    metrics.journal_is(None)
    assert told(metrics)["relay_journal_up"] == 0


def test_prometheus_finds_nothing_to_complain_of(relay: RelayProcess, name: str) -> None:
    """promtool checks the exposition of a running relay: format, names and units."""
    Producer(relay, name).push("word", end="completed")
    assert relay.get("/relay/v1/streams/nobody")[0] == 404
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=relay.get("/relay/metrics")[2], capture_output=True
    )
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, b"")


def risen(relay: RelayProcess, series: str) -> float:
    """The value of a series once it is not 0."""
    deadline = time.monotonic() + DEADLINE_S
    while not (value := relay.metric(series)):
        assert time.monotonic() < deadline, f"{series} stays 0"
    return value


@pytest.fixture(scope="module")
def counting(fresh_journal: Callable[[], str], upstream: ScriptedUpstream) -> Iterator[RelayProcess]:
    """A relay of these tests alone: in one that all share, runs of earlier tests still end by and by."""
    with RelayProcess.start(
        journal=fresh_journal(), upstream=upstream.url, redis_prefix="counting"
    ) as process:
        yield process


class Change:
    """How much metrics of a relay have grown."""

    def __init__(self, relay: RelayProcess) -> None:
        self._relay = relay
        self._before = self._now()

    def _now(self) -> dict[str, float]:
        lines = self._relay.get("/relay/metrics")[2].decode().splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line[0] != "#"}

    def of(self, series: str) -> float:
        return self._now()[series] - self._before[series]


def test_a_pushed_run_is_counted_from_its_start_to_its_reader(counting: RelayProcess, name: str) -> None:
    change = Change(counting)
    producer = Producer(counting, name)
    producer.push("one", "two")
    producer.push("two", "three", Relay_Seq="2", end="completed")
    assert producer.push("late", Relay_Seq="4").problem == (409, "run_ended")
    with Reading(f"{counting.url}/relay/v1/streams/{name}/events?run={producer.run}&control=none") as reading:
        assert [frame.data for frame in reading.frames()] == ["one", "two", "three"]
    assert change.of('relay_runs_started_total{source="pushed"}') == 1
    assert change.of('relay_frames_journaled_total{source="pushed"}') == 3
    assert change.of('relay_journaled_bytes_total{source="pushed"}') == 11
    assert change.of("relay_duplicates_suppressed_total") == 1
    assert change.of("relay_fenced_appends_total") == 1
    assert change.of('relay_refusals_total{code="run_ended"}') == 1
    assert change.of("relay_append_duration_seconds_count") == 2
    assert change.of("relay_frames_delivered_total") == 3
    assert change.of("relay_journal_pages_total") >= 1
    assert change.of("relay_replay_frames_sum") == 5, "the three, and relay's own two"


def test_a_proxied_run_is_counted_from_upstream_to_its_readers(
    counting: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    gate = upstream.gate()

    async def handler(exchange: Exchange) -> None:
        await exchange.head()
        await gate.wait()
        await exchange.chunk(b"data: one\n\ndata: two\n\n")
        await exchange.end()

    upstream.on(f"/{name}", handler)
    change = Change(counting)
    with Reading(f"{counting.url}/{name}", Relay_Stream=name) as asked, ExitStack() as open_tabs:
        current = f"{counting.url}/relay/v1/streams/{name}/events?run=current&control=none"
        tabs = [open_tabs.enter_context(Reading(current, Accept_Encoding="identity")) for _ in range(3)]
        assert counting.metric("relay_oldest_open_run_seconds") > 0
        gate.open()
        assert [frame.data for frame in asked.frames()] == ["one", "two"]
        for tab in tabs:
            assert [frame.data for frame in tab.frames()] == ["one", "two"]
    assert change.of('relay_runs_started_total{source="proxied"}') == 1
    assert change.of('relay_frames_journaled_total{source="proxied"}') == 2
    assert change.of("relay_upstream_first_frame_seconds_count") == 1
    assert change.of("relay_frames_delivered_total") == 8
    assert change.of("relay_delivery_delay_seconds_count") >= 1
    assert change.of("relay_ring_hits_total") >= 1


def test_a_cancel_is_timed_once(counting: RelayProcess, name: str) -> None:
    change, producer = Change(counting), Producer(counting, name)
    for _ in range(2):
        ask(counting.port, "POST", f"{name}/runs/{producer.run}/cancel")
    assert change.of("relay_cancel_to_end_seconds_count") == 1


def test_a_deletion_counts_each_run_that_it_ended_once(counting: RelayProcess, name: str) -> None:
    change = Change(counting)
    Producer(counting, name).push(end="completed")
    Producer(counting, name)
    with ThreadPoolExecutor(4) as pool:
        for answer in pool.map(lambda _: ask(counting.port, "DELETE", name), range(4)):
            assert answer.status == 204
    assert change.of('relay_runs_ended_total{reason="stream_deleted",status="cancelled"}') == 1


def test_what_a_dead_process_left_is_counted_when_its_end_is_told(
    fresh_journal: Callable[[], str], upstream: ScriptedUpstream, name: str
) -> None:
    gate = upstream.gate()

    async def handler(exchange: Exchange) -> None:
        await exchange.head()
        await exchange.chunk(b"data: one\n\n")
        await gate.wait()

    upstream.on(f"/{name}", handler)
    journal = fresh_journal()
    first = RelayProcess.start(journal=journal, upstream=upstream.url, redis_prefix=name, owner_lease_s=0.5)
    with first, Reading(f"{first.url}/{name}", Relay_Stream=name) as reading:
        reading.take(1)
        first.kill()
    with RelayProcess.start(journal=journal, redis_prefix=name, owner_lease_s=0.5) as successor:
        whole_run(successor, name)
        # The end is in the journal a moment before it is counted.
        ended = 'relay_runs_ended_total{reason="owner_lost",status="lost"}'
        assert risen(successor, ended) == 1
        assert successor.metric("relay_orphans_reaped_total") == 1
        assert [entry["run"] for entry in successor.json("/relay/v1/diagnostics")["ended_runs"]]


def test_connections_to_redis_that_were_opened_again_are_counted() -> None:
    server = RedisServer.start()
    try:
        with RelayProcess.start(journal=server.url()) as relay:
            assert relay.metric("relay_journal_reconnects_total") == 0
            assert relay.metric("relay_redis_memory_bytes") > 0
            with server.client() as client:
                client.client_kill_filter(_type="pubsub")
            assert risen(relay, "relay_journal_reconnects_total") == 1
    finally:
        server.stop()
