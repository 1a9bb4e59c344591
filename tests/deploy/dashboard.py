"""The dashboard of deploy/, and what its panels ask Prometheus."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

DASHBOARD = Path(__file__).parent.parent.parent / "deploy" / "grafana" / "dashboards" / "relay.json"


class Query(NamedTuple):
    """What a panel asks, and what it calls each series of the answer."""

    expr: str
    legend: str

    def put(self, interval: str) -> str:
        """The expression as Grafana sends it, of all relays."""
        return self.expr.replace("$__rate_interval", interval).replace("$instance", ".*")

    def name(self, labels: dict[str, str]) -> str:
        """What a series of these labels is called."""
        return re.sub(r"{{(\w+)}}", lambda found: labels.get(found[1], ""), self.legend)


class Panel(NamedTuple):
    """A panel, or a row's title, which asks nothing."""

    title: str
    kind: str
    unit: str
    place: dict[str, int]
    queries: list[Query]
    steps: list[dict[str, Any]]


def document() -> dict[str, Any]:
    """The file."""
    found: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return found


def panels() -> list[Panel]:
    """All of them, from above."""
    return [
        Panel(
            panel["title"],
            panel["type"],
            panel.get("fieldConfig", {}).get("defaults", {}).get("unit", ""),
            panel["gridPos"],
            [Query(target["expr"], target["legendFormat"]) for target in panel.get("targets", [])],
            panel.get("fieldConfig", {}).get("defaults", {}).get("thresholds", {}).get("steps", []),
        )
        for panel in document()["panels"]
    ]
