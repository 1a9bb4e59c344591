"""What a benchmark found: rows of figures over several rounds, what the budget asks, and the machine."""

from __future__ import annotations

import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


@dataclass
class Row:
    """One system under one load. A figure's unit ends its name; each has one value a round."""

    label: str
    rounds: dict[str, list[float]] = field(default_factory=dict)

    def median(self, figure: str) -> float:
        return statistics.median(self.rounds[figure])


@dataclass
class Verdict:
    """A figure that the budget bounds. `bound` is read as at most, or with `at_least` as at least."""

    what: str
    measured: float
    must: float
    aim: float | None = None
    at_least: bool = False

    def meets(self, bound: float) -> bool:
        return self.measured >= bound if self.at_least else self.measured <= bound


@dataclass
class Report:
    """All that one benchmark found."""

    budget: str
    title: str
    rows: dict[str, Row] = field(default_factory=dict)
    verdicts: list[Verdict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    def add(self, label: str, figures: Mapping[str, float]) -> None:
        """Add a round to a row."""
        row = self.rows.setdefault(label, Row(label))
        for name, value in figures.items():
            row.rounds.setdefault(name, []).append(value)

    def judge(
        self, what: str, measured: float, must: float, *, aim: float | None = None, at_least: bool = False
    ) -> None:
        """Hold a figure against the budget."""
        self.verdicts.append(Verdict(what, measured, must, aim, at_least))

    def note(self, text: str) -> None:
        """Say something once that the figures do not."""
        if text not in self.notes:
            self.notes.append(text)

    def as_object(self) -> dict[str, Any]:
        """For results.json: of every figure its median, least, most and all rounds."""
        return {
            "title": self.title,
            "rows": [
                {
                    "what": row.label,
                    "figures": {
                        name: {
                            "median": statistics.median(values),
                            "min": min(values),
                            "max": max(values),
                            "rounds": values,
                        }
                        for name, values in row.rounds.items()
                    },
                }
                for row in self.rows.values()
            ],
            "verdicts": [
                {
                    "what": verdict.what,
                    "measured": verdict.measured,
                    "must": verdict.must,
                    "aim": verdict.aim,
                    "at_least": verdict.at_least,
                    "met": verdict.meets(verdict.must),
                }
                for verdict in self.verdicts
            ],
            "notes": self.notes,
            "details": self.details,
        }


def table(reports: Sequence[Report]) -> str:
    """Everything as one Markdown table, the budgets as another, then the notes."""
    found = [
        (report.budget, row.label, " · ".join(f"{name} {shown(row.median(name))}" for name in row.rounds))
        for report in reports
        for row in report.rows.values()
    ]
    judged = [
        (
            report.budget,
            verdict.what,
            shown(verdict.measured),
            ("≥ " if verdict.at_least else "≤ ") + shown(verdict.must),
            "" if verdict.aim is None else shown(verdict.aim),
            "met" if verdict.meets(verdict.must) else "MISSED",
        )
        for report in reports
        for verdict in report.verdicts
    ]
    parts = [_markdown(("budget", "what", "medians"), found)]
    if judged:
        parts.append(_markdown(("budget", "figure", "measured", "must", "aim", ""), judged))
    parts += [f"{report.budget}: {note}" for report in reports for note in report.notes]
    return "\n\n".join(parts)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[column]) for line in (head, *rows)) for column in range(len(head) - 1)]
    lines = [
        "| " + " | ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[-1]])
        for line in (head, ["-" * width for width in widths] + ["---"], *rows)
    ]
    return "\n".join(line + " |" for line in lines)


def shown(value: float) -> str:
    """Three digits that matter."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def machine() -> dict[str, Any]:
    """What the figures were measured on, and how busy it was with other things."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_mib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "redis": _first_line("redis-server", "--version"),
        "nginx": _first_line("nginx", "-v"),
        "load_average_at_start": os.getloadavg()[0],
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _first_line(*command: str) -> str | None:
    try:
        outcome = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except FileNotFoundError:
        return None
    return outcome.stdout.splitlines()[0] if outcome.stdout else None
