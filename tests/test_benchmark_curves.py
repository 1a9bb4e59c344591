"""The benchmarks of scale run and say what they promise. What they measure is nobody's business here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Of each benchmark: a row of relay, figures it must have, and the words with which its verdicts begin.
PROMISED = {
    "scale_streams": (
        "relay, 20 open",
        {"cpu_us", "redis_us", "redis_calls", "silent_cpu", "rss_kib", "viewers_cpu"},
        ["CPU per frame"],
    ),
    "scale_readers": (
        "relay, 150 readers",
        {"kib_per_reader", "connects_per_s", "connect_us", "redis_connections"},
        ["KiB per reader", "KiB per reader", "CPU per connect", "Redis connections"],
    ),
    "scale_replay": (
        "relay on Redis, 2,000 frames",
        {"us_per_frame", "rss_growth_mib", "redis_calls"},
        ["Redis: time", "Redis: relay's peak", "SQLite: time", "SQLite: relay's peak"],
    ),
    "scale_storm": (
        "relay, 10 streams, back at once",
        {"live_s", "rss_growth_mib", "redis_calls", "pages", "crowd_cpu"},
        [],
    ),
    "scale_compression": ("gzip, openai", {"bytes_per_frame", "saved", "cpu_us"}, []),
    "scale_workers": ("2 workers, 20x50/s", {"frames_per_s", "cpu_us", "frames_per_append"}, []),
}


@pytest.mark.parametrize("name", PROMISED)
def test_a_quick_run_draws_the_curve_and_judges_it(name: str, tmp_path: Path) -> None:
    label, figures, verdicts = PROMISED[name]
    out = tmp_path / "results.json"
    command = [sys.executable, "-m", "benchmarks", name, "--quick", "--out", str(out)]
    outcome = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert outcome.returncode == 0, outcome.stderr
    results: dict[str, Any] = json.loads(out.read_text())
    found = results["benchmarks"][name]
    rows = {row["what"]: row["figures"] for row in found["rows"]}
    assert figures <= rows[label].keys()
    assert len(rows) > 1, "a curve has more than one point"
    assert len(found["verdicts"]) == len(verdicts)
    for verdict, start in zip(found["verdicts"], verdicts, strict=True):
        assert verdict["what"].startswith(start)


def test_every_benchmark_of_scale_is_run_here() -> None:
    assert {path.stem for path in (ROOT / "benchmarks").glob("scale_*.py")} == set(PROMISED)
