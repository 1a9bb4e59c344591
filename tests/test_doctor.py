"""relay.doctor: what will hurt, and whether it is found."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from guarded import ADMIN_KEY, SETTINGS
from held_port import held_port
from redis_server import RedisServer
from relay_process import RelayProcess
from scripted_upstream import ScriptedUpstream
from tcp_proxy import TcpProxy

from relay import doctor as examining
from relay.doctor import (
    SLOW_ANSWER_S,
    Finding,
    Level,
    examine,
    judge,
    judge_disk,
    judge_journal,
    judge_relay,
    judge_upstream,
)

DEADLINE_S = 120

REDIS: dict[str, Any] = {
    "answers": True, "kind": "redis", "server": "redis", "version": "7.0.15", "answered_in_s": 0.001,
    "clock_ahead_s": 0.0, "memory_bytes": 2**20, "memory_max_bytes": 2**30, "memory_policy": "noeviction",
    "evicted_keys": 0, "aof": True, "aof_last_write_ok": True, "rdb_last_save_ok": True,
    "rdb_changes_since_save": 0, "rdb_last_save_ms": 0, "uptime_s": 10, "role": "master", "replicas": 0,
}  # fmt: skip
SQLITE: dict[str, Any] = {
    "answers": True, "kind": "sqlite", "version": "3.40.1", "answered_in_s": 0.001, "clock_ahead_s": 0.0,
    "file_bytes": 1, "log_bytes": 0, "disk_free_bytes": 2**34, "synchronous": "normal",
}  # fmt: skip
RELAY: dict[str, Any] = {
    "version": "0.1.0", "authentication": True, "connections_allowed": 40_000, "connections_wanted": 30_000,
}  # fmt: skip


def levels(findings: Any) -> dict[str, Level]:
    """How each subject was judged; what is not well has its advice."""
    found = list(findings)
    assert all(finding.advice for finding in found if finding.level is not Level.OK), found
    assert len({finding.subject for finding in found}) == len(found)
    return {finding.subject: finding.level for finding in found}


@pytest.mark.parametrize("journal", [REDIS, SQLITE])
def test_what_is_well_is_said_to_be(journal: dict[str, Any]) -> None:
    upstream = {"place": "agent:9000", "reachable": True, "connected_in_s": 0.001}
    found = judge({"draining": False, "relay": RELAY, "journal": journal, "upstream": upstream})
    assert set(levels(found).values()) == {Level.OK}
    assert {"relay", "journal", "restart", "upstream"} <= levels(found).keys()


@pytest.mark.parametrize(
    ("what", "subject", "level"),
    [
        ({"answers": False, "error": "away"}, "journal", Level.FAIL),
        ({"answered_in_s": 0.2}, "journal", Level.WARN),
        ({"clock_ahead_s": 4.0}, "clock", Level.WARN),
        ({"clock_ahead_s": -4.0}, "clock", Level.WARN),
        ({"clock_ahead_s": 4.0, "answered_in_s": 4.0}, "clock", Level.OK),
        ({"role": "slave"}, "role", Level.FAIL),
        ({"memory_policy": "allkeys-lru"}, "eviction", Level.FAIL),
        ({"memory_policy": None}, "eviction", Level.WARN),
        ({"evicted_keys": 1}, "eviction", Level.WARN),
        ({"memory_max_bytes": 0}, "memory", Level.WARN),
        ({"memory_bytes": int(0.8 * 2**30)}, "memory", Level.WARN),
        ({"memory_bytes": int(0.96 * 2**30)}, "memory", Level.FAIL),
        ({"aof": False}, "restart", Level.WARN),
        ({"aof": False, "rdb_last_save_ok": False}, "restart", Level.FAIL),
        ({"aof_last_write_ok": False}, "restart", Level.FAIL),
    ],
)
def test_what_is_wrong_with_redis_is_said(what: dict[str, Any], subject: str, level: Level) -> None:
    assert levels(judge_journal(REDIS | what))[subject] is level


@pytest.mark.parametrize(
    ("free", "level"), [(2**34, Level.OK), (2**29, Level.WARN), (2**20, Level.FAIL), (0, Level.FAIL)]
)
def test_a_disk_that_fills_is_said(free: int, level: Level) -> None:
    assert levels([judge_disk(free)]) == {"disk": level}
    assert levels(judge_journal(SQLITE | {"disk_free_bytes": free}))["disk"] is level


@pytest.mark.parametrize(
    ("what", "subject", "level"),
    [
        ({"relay": RELAY | {"authentication": False}}, "access", Level.WARN),
        ({"relay": RELAY | {"connections_allowed": 1000}}, "files", Level.WARN),
        (
            {"workers": [{"worker": 1, "answers": True}, {"worker": 2, "answers": False}]},
            "workers",
            Level.FAIL,
        ),
    ],
)
def test_what_is_wrong_with_a_process_is_said(what: dict[str, Any], subject: str, level: Level) -> None:
    assert levels(judge_relay({"draining": False, "relay": RELAY} | what))[subject] is level


def test_a_relay_that_shuts_down_is_no_failure() -> None:
    (finding,) = judge_relay({"draining": True, "relay": RELAY})
    assert finding.level is Level.WARN
    assert "shutting down" in finding.said


def test_an_upstream_that_cannot_be_reached_is_said() -> None:
    away = {"place": "agent:9000", "reachable": False, "error": "connection refused"}
    assert levels([judge_upstream(away)]) == {"upstream": Level.FAIL}
    assert levels([judge_upstream(None)]) == {"upstream": Level.OK}


def test_a_finding_is_a_line_and_its_advice_another() -> None:
    assert list(Finding(Level.OK, "clock", "even").lines()) == ["ok    clock      even"]
    said, advice = Finding(Level.FAIL, "eviction", "it may", "forbid it").lines()
    assert said == "fail  eviction   it may"
    assert advice.strip() == "→ forbid it"


# From the command line


def doctor(*arguments: str, code: int = 0) -> dict[str, str]:
    """What `relay doctor` finds: the level of each subject. A journal that answers is "ok", however slowly it
    does on this machine: that this is said is seen to here."""
    outcome = subprocess.run(
        [sys.executable, "-W", "error", "-m", "relay", "doctor", *arguments],
        capture_output=True, text=True, timeout=DEADLINE_S,
    )  # fmt: skip
    assert outcome.returncode == code, outcome
    assert outcome.stderr == ""
    lines = [line for line in outcome.stdout.splitlines() if not line.startswith(" ")]
    found = {subject: level for level, subject, *_ in map(str.split, lines)}
    for took in re.findall(r"^\w+ +journal .* answers in (\S+) ms$", outcome.stdout, re.MULTILINE):
        assert float(took) == SLOW_ANSWER_S * 1000 or found["journal"] == (
            "warn" if float(took) > SLOW_ANSWER_S * 1000 else "ok"
        )
        found["journal"] = "ok"
    return found


def test_a_running_relay_is_looked_at(relay: RelayProcess) -> None:
    found = doctor("--url", relay.url)
    assert (found["relay"], found["journal"], found["upstream"]) == ("ok", "ok", "ok")
    assert found["delivery"] == "ok"
    assert found["access"] == "warn"
    assert "fail" not in found.values()
    next_ones = relay.json("/relay/v1/streams?after=relay-doctor-&limit=1")["streams"]
    assert not [stream for stream in next_ones if stream["stream"].startswith("relay-doctor-")]


class Gathering:
    """What a proxy passes that gathers what a stream brings: its head, and then nothing."""

    def __init__(self) -> None:
        self._begun = False

    def __call__(self, data: bytes) -> bytes:
        if self._begun:
            return b""
        head, end, _ = data.partition(b"\r\n\r\n")
        self._begun = b"text/event-stream" in head
        return head + end if self._begun else data


def test_a_proxy_that_gathers_writes_is_found(relay: RelayProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examining, "PATIENCE_S", 0.5)
    with TcpProxy.running(relay.port, to_client=Gathering()) as gathering:
        found = levels(asyncio.run(examine(relay.url, relay.url, gathering.url, "")))
    assert found["delivery"] is Level.FAIL
    with TcpProxy.running(relay.port) as passing:
        assert doctor("--url", relay.url, "--public-url", passing.url)["delivery"] == "ok"


def test_a_public_address_that_leads_elsewhere_is_found(
    relay: RelayProcess, upstream: ScriptedUpstream
) -> None:
    assert doctor("--url", relay.url, "--public-url", upstream.url, code=1)["delivery"] == "fail"
    assert doctor("--url", relay.url, "--public-url", "http://127.0.0.1:1", code=1)["delivery"] == "fail"


def test_nothing_that_answers_is_a_failure(upstream: ScriptedUpstream) -> None:
    assert doctor("--url", "http://127.0.0.1:1", code=1) == {"relay": "fail"}
    assert doctor("--url", upstream.url, code=1)["relay"] == "fail"


def test_a_key_is_asked_for(fresh_journal: Any) -> None:
    with RelayProcess.start(journal=fresh_journal(), **SETTINGS) as guarded:
        assert doctor("--url", guarded.url, code=1) == {"relay": "fail", "delivery": "fail"}
        found = doctor("--url", guarded.url, "--token", ADMIN_KEY)
        assert (found["relay"], found["delivery"], "access" in found) == ("ok", "ok", False)


def test_administration_is_looked_for_where_it_is(fresh_journal: Any) -> None:
    with RelayProcess.start(journal=fresh_journal(), admin_addr="127.0.0.1:0") as relay:
        there = relay.logged_line("relay's administration is on ").rpartition(" ")[2]
        assert doctor("--url", relay.url, code=1) == {"relay": "fail", "delivery": "ok"}
        assert doctor("--url", relay.url, "--admin-url", there)["relay"] == "ok"


def test_a_redis_that_relay_would_refuse_is_found_before_relay_is_started() -> None:
    evicting = RedisServer.start("--maxmemory", "50mb", "--maxmemory-policy", "allkeys-lru")
    try:
        assert doctor("--journal", evicting.url(), code=1) == {"journal": "fail"}
        with evicting.client() as client:
            client.config_set("maxmemory-policy", "noeviction")
        found = doctor("--journal", evicting.url())
        assert (found["journal"], found["eviction"], found["memory"]) == ("ok", "ok", "ok")
        assert found["restart"] == "warn"
    finally:
        evicting.stop()


def test_settings_are_looked_at_without_a_relay(tmp_path: Path, upstream: ScriptedUpstream) -> None:
    file = f"sqlite:///{tmp_path / 'relay.db'}"
    assert doctor("--journal", file, "--upstream", upstream.url) == {"disk": "ok", "upstream": "ok"}
    with held_port() as port:
        closed = f"http://127.0.0.1:{port}"
        assert doctor("--journal", file, "--upstream", closed, code=1)["upstream"] == "fail"
    assert not list(tmp_path.iterdir()), "it is only looked at"
    nowhere = f"sqlite:///{tmp_path / 'nowhere' / 'relay.db'}"
    assert doctor("--journal", nowhere, code=1) == {"journal": "fail"}


def test_what_is_well_with_a_journal_is_told_by_both_kinds(relay: RelayProcess) -> None:
    told = relay.json("/relay/v1/diagnostics")
    assert told["journal"]["answers"] is True
    assert told["journal"]["kind"] in ("redis", "sqlite")
    assert told["upstream"]["reachable"] is True
    assert told["relay"]["version"]
