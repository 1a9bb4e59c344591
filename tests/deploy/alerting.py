"""The alerts of deploy/, and for each of them series of a relay in the trouble it is about.

Series are in promtool's notation, a sample each `STEP`: `5x240` stays, `0+2x240` grows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import yaml

PROMETHEUS = Path(__file__).parent.parent.parent / "deploy" / "prometheus"

STEP = "30s"
AT_MINUTE = 30
"""When it is asked which alerts fire; in health, at every minute until then."""

_OF = 'instance="a:9464", job="relay"'


class Alert(NamedTuple):
    """A rule as the file has it."""

    name: str
    expr: str
    hold: str
    labels: dict[str, str]
    annotations: dict[str, str]


def alerts() -> list[Alert]:
    """All of them."""
    document: Any = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())
    return [
        Alert(rule["alert"], rule["expr"], rule.get("for", "0s"), rule["labels"], rule["annotations"])
        for group in document["groups"]
        for rule in group["rules"]
    ]


def series(metric: str, **labels: str) -> str:
    """The name of a series of one relay."""
    more = [f'{name}="{value}"' for name, value in labels.items()]
    return f"{metric}{{{', '.join([_OF, *more])}}}"


def spread(metric: str, fast: str, slow: str, bound: str) -> dict[str, str]:
    """A histogram: `fast` values below `bound`, `slow` ones beyond it, each growing so by step."""
    return {
        series(f"{metric}_bucket", le=bound): f"0+{fast}x240",
        series(f"{metric}_bucket", le="300.0"): f"0+{int(fast) + int(slow)}x240",
        series(f"{metric}_bucket", le="+Inf"): f"0+{int(fast) + int(slow)}x240",
    }


def ended(status: str, reason: str) -> str:
    return series("relay_runs_ended_total", status=status, reason=reason)


def readers_ended(reason: str) -> str:
    return series("relay_readers_ended_total", reason=reason)


def refused(code: str) -> str:
    return series("relay_refusals_total", code=code)


def resumes(outcome: str) -> str:
    return series("relay_resumes_total", outcome=outcome)


HEALTHY: dict[str, str] = {
    series("up"): "1x240",
    series("relay_workers"): "1x240",
    series("relay_worker_starts_total"): "1x240",
    series("relay_draining"): "0x20 1x3 0x217",  # a roll-out
    series("process_start_time_seconds"): "1000x22 5000x178",
    series("process_cpu_seconds_total"): "0+24x240",  # 0.8 of a core
    series("process_open_fds"): "7000x240",
    series("process_max_fds"): "10000x240",
    series("relay_journal_up"): "1x240",
    series("relay_journal_reconnects_total"): "0x40 2x140",
    series("relay_journal_rewinds_total"): "3x240",  # long ago
    **spread("relay_append_duration_seconds", "1000", "5", "0.25"),
    series("relay_redis_memory_bytes"): "700x240",
    series("relay_redis_memory_max_bytes"): "1000x240",
    series("relay_redis_evicted_keys"): "12x240",
    ended("completed", "upstream_end"): "0+100x240",
    ended("failed", "upstream_error"): "0+8x240",
    ended("cancelled", "client_cancel"): "0+30x240",
    ended("lost", "owner_lost"): "4x240",
    series("relay_runs_completed_without_text_total"): "0+4x240",
    series("relay_longest_silence_seconds"): "500x240",
    **spread("relay_upstream_first_frame_seconds", "100", "4", "30.0"),
    **spread("relay_cancel_to_end_seconds", "100", "4", "1.0"),
    series("relay_fenced_appends_total"): "0x20 8x160",
    **spread("relay_delivery_delay_seconds", "1000", "5", "1.0"),
    resumes("resumed"): "0+50x240",
    resumes("gap"): "0x50 4x130",
    readers_ended("ended"): "0+100x240",
    readers_ended("slow"): "0+8x240",
    series("relay_reader_lag_frames"): "9000x240",
    refused("busy"): "0+2x240",
    refused("unknown_stream"): "0+500x240",
    refused("unauthorized"): "0+20x240",
    series("relay_webhook_backlog_age_seconds"): "500x240",
    series("relay_webhook_deliveries_total", outcome="given_up"): "2x240",
}

TROUBLED: dict[str, dict[str, str | None]] = {
    "RelayDown": {series("up"): "1x50 0x130"},
    "RelayMissing": {series("up"): None},
    "RelayRestarts": {series("process_start_time_seconds"): "1000x45 2000x2 3000x2 4000x130"},
    "RelayDrainsLong": {series("relay_draining"): "0x50 1x130"},
    "RelayBusy": {series("process_cpu_seconds_total"): "0+28x240"},
    "RelayFilesShort": {series("process_open_fds"): "9000x240"},
    "RelayJournalDown": {series("relay_journal_up"): "1x50 0x130"},
    "RelayJournalReconnects": {series("relay_journal_reconnects_total"): "0x40 2x5 8x135"},
    "RelayJournalRewound": {series("relay_journal_rewinds_total"): "3x50 4x130"},
    "RelayAppendsSlow": dict(spread("relay_append_duration_seconds", "1000", "20", "0.25")),
    "RelayRedisMemoryHigh": {series("relay_redis_memory_bytes"): "850x240"},
    "RelayRedisEvicts": {series("relay_redis_evicted_keys"): "12x50 13x130"},
    "RelayRunsFail": {ended("failed", "upstream_error"): "0+20x240"},
    "RelayRunsLost": {ended("lost", "owner_lost"): "4x50 5x130"},
    "RelayRunsEmpty": {series("relay_runs_completed_without_text_total"): "0+6x240"},
    "RelayRunSilent": {series("relay_longest_silence_seconds"): "700x240"},
    "RelayFirstFrameSlow": dict(spread("relay_upstream_first_frame_seconds", "100", "10", "30.0")),
    "RelayCancelsSlow": dict(spread("relay_cancel_to_end_seconds", "100", "10", "1.0")),
    "RelayStaleWriters": {series("relay_fenced_appends_total"): "0x45 20x135"},
    "RelayDeliverySlow": dict(spread("relay_delivery_delay_seconds", "1000", "20", "1.0")),
    "RelayReadersReset": {resumes("gap"): "0x50 10x130"},
    "RelayReadersCut": {readers_ended("slow"): "0+20x240"},
    "RelayReadersBehind": {series("relay_reader_lag_frames"): "20000x240"},
    "RelayRefuses": {refused("busy"): "0+5x240"},
    "RelayRefusesStrangers": {refused("unauthorized"): "0+50x240"},
    "RelayWebhookBehind": {series("relay_webhook_backlog_age_seconds"): "700x240"},
    "RelayWebhookGivenUp": {series("relay_webhook_deliveries_total", outcome="given_up"): "2x50 3x130"},
}


def rule_test() -> dict[str, Any]:
    """What promtool is given: no alert fires in health, and in each trouble the one about it, alone."""
    cases: list[tuple[dict[str, str | None], list[str]]] = [({}, [])]
    cases += [(trouble, [name]) for name, trouble in TROUBLED.items()]
    return {
        "rule_files": [str(PROMETHEUS / "alerts.yml")],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": STEP,
                "input_series": [
                    {"series": name, "values": values}
                    for name, values in (HEALTHY | trouble).items()
                    if values is not None
                ],
                "promql_expr_test": [
                    {
                        "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                        "eval_time": f"{minute}m",
                        "exp_samples": [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in firing],
                    }
                    for minute in ([AT_MINUTE] if trouble else range(AT_MINUTE + 1))
                ],
            }
            for trouble, firing in cases
        ],
    }
