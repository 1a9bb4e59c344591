"""The benchmarks run and say what they promise to say. What they measure is nobody's business here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Of each benchmark: a row, figures it must have, and the words with which its verdicts begin.
PROMISED: dict[str, tuple[str, set[str], list[str]]] = {
    "b1": (
        "relay on SQLite",
        {"events_per_s", "publishes_per_s", "cpu_us", "audience_cpu", "publisher_cpu"},
        ["relay on Redis against nchan", "relay on SQLite against nchan"],
    ),
    "b2": (
        "relay on Redis",
        {"p50_ms", "p99_ms", "cpu_us", "redis_us", "audience_cpu", "publisher_cpu"},
        ["p99 of relay on Redis", "p99 of relay on SQLite"],
    ),
    "b3": (
        "relay, 20x50/s",
        {"frames_per_s", "p50_ms", "p99_ms", "cpu_us", "redis_us", "redis_calls", "upstream_cpu"},
        ["p50_ms", "p99_ms", "relay CPU"],
    ),
    "b4": ("relay on Redis", {"frames_per_s", "cpu_us", "redis_us"}, ["relay on Redis against"]),
    "b5": (
        "relay on Redis, 1 stream",
        {"kib_per_reader", "connects_per_s", "redis_connections", "wake_ms"},
        ["KiB per idle reader, Redis", "KiB per idle reader, SQLite", "Redis connections"],
    ),
    "b6": (
        "relay, batches of 100, 4 connections",
        {"frames_per_s", "cpu_us", "redis_us", "redis_calls", "frames_per_append", "producers_cpu"},
        ["batches, frames/s", "bodies, frames/s"],
    ),
    "b7": ("relay", {"rss_growth_mib", "redis_buffers_mib", "cut"}, ["relay's RSS", "Redis's client"]),
    "b8": ("relay on SQLite", {"p50_ms", "p99_ms", "added_p99_ms"}, ["added at p99", "added at p99"]),
}

BESIDE_NCHAN = {"b1", "b2"}
"""Their verdicts are comparisons with nchan, which need not be installed."""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("name", PROMISED)
def test_a_quick_run_measures_relay_and_a_peer_and_judges_them(name: str, tmp_path: Path) -> None:
    label, figures, verdicts = PROMISED[name]
    out = tmp_path / "results.json"
    outcome = run(name, "--quick", "--out", str(out))
    assert outcome.returncode == 0, outcome.stderr
    results: dict[str, Any] = json.loads(out.read_text())
    assert results["quick"] is True
    assert {"date", "cpu", "cores", "python", "redis"} <= results["machine"].keys()
    found = results["benchmarks"][name]
    rows = {row["what"]: row["figures"] for row in found["rows"]}
    assert figures <= rows[label].keys()
    assert all({"median", "min", "max", "rounds"} <= figure.keys() for figure in rows[label].values())
    assert any("relay" not in what for what in rows), "there is no peer"
    if name in BESIDE_NCHAN and "nchan" not in rows:
        verdicts = []
    if any(what.startswith("nginx, ") for what in rows):
        verdicts = [*verdicts, "relay CPU per frame against nginx's"]
    assert len(found["verdicts"]) == len(verdicts)
    for verdict, start in zip(found["verdicts"], verdicts, strict=True):
        assert verdict["what"].startswith(start)
        assert isinstance(verdict["met"], bool)
    assert f"| {name.upper()} " in outcome.stdout


def test_every_benchmark_is_run_here() -> None:
    found = {path.name.partition("_")[0] for path in (ROOT / "benchmarks").glob("b[0-9]*_*.py")}
    assert found == set(PROMISED)


def test_an_unknown_benchmark_is_refused_with_the_names_there_are() -> None:
    outcome = run("b99")
    assert outcome.returncode == 2
    assert "no such benchmark: b99" in outcome.stderr
