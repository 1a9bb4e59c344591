"""A real Prometheus watches two relays: each panel of the dashboard has something to show, alerts fire."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from deploy.alerting import alerts
from deploy.dashboard import document, panels
from deploy.picture import page
from deploy.scene import Scene
from deploy.tools import tool

INTERVAL = "10s"
"""A rate's, which is long in scrapes of a second."""


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    with Scene.open(tool("prometheus"), tmp_path_factory.mktemp("prometheus")) as scene:
        yield scene


def test_every_panel_has_something_to_show(scene: Scene) -> None:
    asked = [(panel.title, query.put(INTERVAL)) for panel in panels() for query in panel.queries]
    assert len(asked) > 40
    with scene.busy():
        for title, expr in asked:
            assert "$" not in expr, title
            assert scene.prometheus.await_values(expr), title
        drawn = page(scene.prometheus)
    assert drawn.count('class="value"') == sum(panel.kind == "stat" for panel in panels())
    assert drawn.count("<polyline") >= sum(panel.kind == "timeseries" for panel in panels())


def test_what_panels_and_alerts_ask_for_is_what_relay_tells(scene: Scene) -> None:
    asked = [query.expr for panel in panels() for query in panel.queries] + [alert.expr for alert in alerts()]
    asked += [found["expr"] for found in document()["annotations"]["list"]]
    named = {name for expr in asked for name in re.findall(r"\b(?:relay|process)_[a-z_]+\b", expr)}
    assert len(named) > 30
    assert named <= scene.prometheus.metrics()


def test_alerts_fire_when_what_they_are_about_is_done_to_relay(scene: Scene) -> None:
    """In an order in which one trouble leaves the next one possible."""
    prometheus, redis = scene.prometheus, scene.redis
    serious = {"RelayDown", "RelayJournalDown", "RelayRunsLost", "RelayRedisMemoryHigh", "RelayRedisEvicts"}
    prometheus.await_silent(serious)

    assert scene.ask(0, "PUT", "short", {"max_frames": 10}).status in (200, 201)
    for _ in range(15):
        scene.push("short")
        scene.fail()
        scene.say_nothing()
        scene.resume_after_a_gap("short")
    prometheus.await_firing("RelayRunsFail", "RelayRunsEmpty", "RelayReadersReset", "RelayStaleWriters")

    for _ in range(400):
        assert scene.ask(0, "GET", "nothing", Authorization="Bearer of-somebody-else").status == 401
    prometheus.await_firing("RelayRefusesStrangers")

    with redis.client() as client:
        client.config_set("maxmemory", int(client.info("memory")["used_memory"] * 1.1))
        prometheus.await_firing("RelayRedisMemoryHigh")
        client.config_set("maxmemory", "64mb")

    redis.pause()
    try:
        prometheus.await_firing("RelayJournalDown")
    finally:
        redis.resume()

    with scene.reading(1, "/endless") as reading:
        reading.take(5)
        scene.relays[1].kill()
    prometheus.await_firing("RelayDown", "RelayRunsLost")

    with redis.client() as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
        client.config_set("maxmemory", int(client.info("memory")["used_memory"] * 0.9))
        client.set("one more", "makes room")
        prometheus.await_firing("RelayRedisEvicts")
