"""A real Prometheus of a test's own, configured as deploy/ has it but for names, keys and times."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from held_port import held_port

from deploy.alerting import PROMETHEUS

DEADLINE_S = 60.0


class Prometheus:
    """One that answers on `url`."""

    def __init__(self, url: str) -> None:
        self.url = url

    @classmethod
    @contextlib.contextmanager
    def running(cls, program: str, directory: Path, key: str, targets: list[str]) -> Iterator[Prometheus]:
        """Scrapes every second; alerts that hold for long in deploy/ hold for two seconds."""
        config: Any = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
        (job,) = config["scrape_configs"]
        (directory / "key").write_text(key)
        job["authorization"]["credentials_file"] = str(directory / "key")
        job["static_configs"] = [{"targets": targets}]
        (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
        rules = (PROMETHEUS / "alerts.yml").read_text()
        (directory / "alerts.yml").write_text(re.sub(r"\bfor: \w+", "for: 2s", rules))
        with held_port() as port:
            command = [program, f"--config.file={directory / 'prometheus.yml'}"]
            command += [f"--storage.tsdb.path={directory / 'data'}", f"--web.listen-address=127.0.0.1:{port}"]
            with (directory / "log").open("wb") as log:
                process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=directory)
            found = cls(f"http://127.0.0.1:{port}")
            try:
                _until(found._is_ready, "Prometheus is ready", lambda: (directory / "log").read_text())
                yield found
            finally:
                process.terminate()
                process.wait(DEADLINE_S)

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=5):
                return True
        except OSError:
            return False

    def _ask(self, path: str, **query: object) -> Any:
        text = urllib.parse.urlencode(query)
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{text}", timeout=DEADLINE_S) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            with error:
                raise AssertionError(f"{query}: {error.read().decode()}") from None

    def values(self, expr: str) -> list[float]:
        """What an expression is now, of each series; what is no number is left out."""
        found = [float(series["value"][1]) for series in self._ask("query", query=expr)["result"]]
        return [value for value in found if value == value]

    def curves(self, expr: str, seconds: float, step_s: float) -> list[dict[str, Any]]:
        """What it was until now: `{metric, values: [[time, value], …]}` of each series."""
        now = time.time()
        query = {"query": expr, "start": now - seconds, "end": now, "step": step_s}
        curves: list[dict[str, Any]] = self._ask("query_range", **query)["result"]
        return curves

    def metrics(self) -> set[str]:
        """The names of all that was scraped."""
        return set(self._ask("label/__name__/values"))

    def firing(self) -> set[str]:
        """The alerts that fire now."""
        return {
            alert["labels"]["alertname"]
            for alert in self._ask("alerts")["alerts"]
            if alert["state"] == "firing"
        }

    def await_values(self, expr: str) -> list[float]:
        """What an expression is, once it is anything."""
        found: list[float] = []

        def is_anything() -> bool:
            found[:] = self.values(expr)
            return bool(found)

        _until(is_anything, expr)
        return found

    def await_silent(self, names: set[str]) -> None:
        """Wait until none of these fires."""
        _until(lambda: not names & self.firing(), f"{names} are silent", lambda: str(self.firing()))

    def await_firing(self, *names: str) -> None:
        """Wait until all of these fire."""
        _until(lambda: set(names) <= self.firing(), f"{names} fire", lambda: str(self.firing()))


def _until(holds: Callable[[], bool], what: str, more: Callable[[], str] = str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < deadline, f"not in time: {what}\n{more()}"
        time.sleep(0.1)
