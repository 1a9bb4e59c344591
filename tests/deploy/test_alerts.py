"""Alerts: each fires in the trouble it is about, alone, and none when all is well; each has its runbook."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from deploy.alerting import PROMETHEUS, TROUBLED, alerts, rule_test
from deploy.tools import tool

RUNBOOK = PROMETHEUS.parent / "RUNBOOK.md"
ALERTS = {alert.name: alert for alert in alerts()}


def promtool(*arguments: str, cwd: Path = PROMETHEUS) -> None:
    outcome = subprocess.run([tool("promtool"), *arguments], cwd=cwd, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr


def test_promtool_takes_the_rules_and_the_configuration() -> None:
    promtool("check", "rules", "--lint=all", "--lint-fatal", "alerts.yml")
    promtool("check", "config", "--syntax-only", "prometheus.yml")


def test_each_alert_fires_in_its_trouble_alone_and_none_in_health(tmp_path: Path) -> None:
    assert TROUBLED.keys() == ALERTS.keys()
    (tmp_path / "troubles.yml").write_text(yaml.safe_dump(rule_test(), sort_keys=False))
    promtool("test", "rules", "troubles.yml", cwd=tmp_path)


@pytest.mark.parametrize("name", ALERTS)
def test_an_alert_says_how_urgent_it_is_and_leads_to_its_runbook(name: str) -> None:
    alert = ALERTS[name]
    assert alert.labels["severity"] in ("page", "ticket")
    path, _, anchor = alert.annotations["runbook_url"].partition("#")
    assert (PROMETHEUS.parent.parent / path) == RUNBOOK
    headings = re.findall(r"^### (\w+)\n\n`(\w+)`\. \S", RUNBOOK.read_text(), re.MULTILINE)
    assert [urgency for heading, urgency in headings if heading.lower() == anchor] == [
        alert.labels["severity"]
    ]


def test_the_runbook_has_no_alert_that_is_gone() -> None:
    headings = re.findall(r"^### (\w+)$", RUNBOOK.read_text(), re.MULTILINE)
    assert headings == list(ALERTS)
    mentioned = re.findall(r"\bRelay[A-Z][A-Za-z]+\b", RUNBOOK.read_text())
    assert set(mentioned) <= ALERTS.keys()
