"""Draw deploy/grafana/dashboard.png: every panel of the dashboard, from what a real Prometheus answers to its
queries while two relays are busy for a minute and a half. It looks like Grafana, and is not it.

PYTHONPATH=tests:. python -m deploy.picture
"""

from __future__ import annotations

import html
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from browser.conftest import CHROMIUM, FLAGS
from playwright.sync_api import sync_playwright

from deploy.dashboard import DASHBOARD, Panel, panels
from deploy.prometheus_process import Prometheus
from deploy.scene import Scene
from deploy.tools import found

PICTURE = DASHBOARD.parent.parent / "dashboard.png"

SECONDS = 90.0
STEP_S = 2.0
INTERVAL = "10s"
CELL, ROW = 38, 21
"""Pixels of a place of the dashboard's grid, across and down."""

COLOURS = ("#73bf69", "#f2cc0c", "#5794f2", "#ff780a", "#f2495c", "#b877d9", "#8ab8ff", "#fade2a", "#c4162a")
NAMED = {"green": "#299c46", "orange": "#d68910", "red": "#c4162a", "blue": "#3274d9"}

STYLE = """
body { margin: 0; background: #111217; color: #ccccdc; font: 11px system-ui, sans-serif; }
.panel { position: absolute; background: #181b1f; border: 1px solid #2c3036; overflow: hidden; }
.row { background: none; border: 0; }
.row b { padding: 1px 8px; }
b { display: block; padding: 5px 8px; font-weight: 500; white-space: nowrap; }
.value { position: absolute; inset: 0; display: grid; place-items: center; font-size: 24px; color: #fff; }
.stat b { position: relative; z-index: 1; color: #fff; }
.legend { padding: 2px 8px; white-space: nowrap; }
.legend span { margin-right: 10px; font-size: 10px; }
svg { shape-rendering: crispEdges; }
svg text { fill: #8e8e99; font-size: 10px; }
"""


def shown(value: float, unit: str) -> str:
    """A value as Grafana writes it, roughly."""
    if unit == "s":
        return f"{value * 1000:.3g} ms" if value < 1 else f"{value:.3g} s"
    if unit == "percentunit":
        return f"{value * 100:.3g}%"
    if unit in ("bytes", "Bps"):
        power = min(3, int(math.log(value, 1024))) if value >= 1 else 0
        return f"{value / 1024**power:.3g} {('B', 'KiB', 'MiB', 'GiB')[power]}" + (
            "/s" if unit == "Bps" else ""
        )
    return f"{value:.3g}" + {"cps": "/s", "reqps": " req/s"}.get(unit, "")


def stat(panel: Panel, prometheus: Prometheus) -> str:
    value = max(prometheus.await_values(panel.queries[0].put(INTERVAL)))
    colour = next(s["color"] for s in reversed(panel.steps) if s["value"] is None or value >= s["value"])
    text = "up" if panel.title == "Journal" and value else shown(value, panel.unit)
    return f'<div class="value" style="background: {NAMED[colour]}">{text}</div>'


def curves(panel: Panel, prometheus: Prometheus) -> Iterator[tuple[str, list[tuple[float, float]]]]:
    for query in panel.queries:
        for series in prometheus.curves(query.put(INTERVAL), SECONDS, STEP_S):
            points = [(at, float(value)) for at, value in series["values"]]
            yield query.name(series["metric"]), [(at, value) for at, value in points if value == value]


def chart(panel: Panel, prometheus: Prometheus, wide: int, high: int) -> str:
    drawn = [(name, points) for name, points in curves(panel, prometheus) if points]
    most = max((value for _, points in drawn for _, value in points), default=0.0) or 1.0
    now, left, below = time.time(), 60, high - 52
    lines = []
    for line in range(3):
        at = below - line * (below - 8) / 2
        lines.append(f'<path d="M{left} {at}H{wide - 8}" stroke="#2c3036"/>')
        lines.append(
            f'<text x="{left - 4}" y="{at + 3}" text-anchor="end">{shown(most * line / 2, panel.unit)}</text>'
        )
    legend = []
    for number, (name, points) in enumerate(drawn):
        colour = COLOURS[number % len(COLOURS)]
        across, up = (wide - left - 8) / SECONDS, (below - 8) / most
        path = " ".join(
            f"{left + (SECONDS - now + at) * across:.1f},{below - value * up:.1f}" for at, value in points
        )
        lines.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.3"/>')
        legend.append(f'<span><i style="color: {colour}">━</i> {html.escape(name)}</span>')
    svg = f'<svg width="{wide}" height="{high - 44}">{"".join(lines)}</svg>'
    return f'{svg}<div class="legend">{"".join(legend)}</div>'


def page(prometheus: Prometheus) -> str:
    """The dashboard as HTML."""
    drawn = []
    for panel in panels():
        place = panel.place
        wide, high = place["w"] * CELL - 6, place["h"] * ROW - 6
        body = f"<b>{html.escape(panel.title)}</b>"
        if panel.kind == "stat":
            body += stat(panel, prometheus)
        elif panel.queries:
            body += chart(panel, prometheus, wide, high)
        at = f"left: {place['x'] * CELL}px; top: {place['y'] * ROW}px; width: {wide}px; height: {high}px"
        drawn.append(f'<div class="panel {panel.kind}" style="{at}">{body}</div>')
    return f"<!doctype html><meta charset=utf-8><style>{STYLE}</style>{''.join(drawn)}"


def photograph(text: str, target: Path) -> None:
    """A page as a picture."""
    low: Any = max(panels(), key=lambda panel: panel.place["y"] + panel.place["h"]).place
    size = {"width": 24 * CELL, "height": (low["y"] + low["h"]) * ROW}
    program = next(program for name in CHROMIUM if (program := found(name)))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, headless=True, args=FLAGS)
        tab = browser.new_page(viewport=size)  # type: ignore[arg-type]
        tab.set_content(text)
        tab.screenshot(path=target)
        browser.close()


def main() -> None:
    program = found("prometheus")
    assert program, "Prometheus is not installed"
    with tempfile.TemporaryDirectory(prefix="relay-picture-") as directory:
        with Scene.open(program, Path(directory)) as scene, scene.busy():
            time.sleep(SECONDS)
            text = page(scene.prometheus)
        photograph(text, PICTURE)


if __name__ == "__main__":
    main()
