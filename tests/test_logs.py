"""relay.logs: lines for people and lines for machines."""

from __future__ import annotations

import io
import json
import logging
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from producing import DEADLINE_S, Producer, ask
from reading import Reading
from relay_process import RelayProcess
from run_record import whole_run
from scripted_upstream import Exchange, ScriptedUpstream

from relay.logs import JsonLines, TextLines, set_up
from relay.trace import TRACE_ID, trace_id_of

TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
TRACEPARENT = f"00-{TRACE}-00f067aa0ba902b7-01"


def record(message: str, *arguments: Any) -> logging.LogRecord:
    return logging.LogRecord("relay.run", logging.WARNING, __file__, 1, message, arguments, None)


def as_json(message: str, *arguments: Any) -> dict[str, Any]:
    """What a line says beside its time, level and logger."""
    document = json.loads(JsonLines().format(record(message, *arguments)))
    assert TIME.fullmatch(document.pop("time"))
    assert (document.pop("level"), document.pop("logger")) == ("warning", "relay.run")
    return document


@pytest.mark.parametrize(
    ("message", "arguments", "told"),
    [
        ("nothing else", (), {"message": "nothing else"}),
        ("run ended stream=%s run=%s", ("s", "r"), {"message": "run ended", "stream": "s", "run": "r"}),
        ("waited s=%.1f times=%d", (1.26, 3), {"message": "waited", "s": 1.3, "times": 3}),
        ("away run=%s: %s", ("r", "why"), {"message": "away: why", "run": "r"}),
        ("stream=%s is sealed", ("s",), {"message": "is sealed", "stream": "s"}),
        ("run=%s of nobody", (None,), {"message": "of nobody"}),
        ("%d of %s at=%s", (3, "four", "5-1"), {"message": "3 of four", "at": "5-1"}),
        ("100%% of x=%s", ("y",), {"message": "100% of", "x": "y"}),
        ("a percent % sign", (), {"message": "a percent % sign"}),
        ("it failed: %r", ("a=%s",), {"message": "it failed: 'a=%s'"}),
        ("message=%s level=%s", ("m", "l"), {"message": ""}),
    ],
)  # fmt: skip
def test_what_a_message_names_becomes_members(
    message: str, arguments: tuple[Any, ...], told: dict[str, Any]
) -> None:
    found = as_json(message, *arguments)
    assert found == told


def test_what_is_logged_cannot_pretend_to_be_another_line() -> None:
    forged = "x\n2026-01-01 INFO relay.run run ended\x1b[2J\x85"
    line = TextLines().format(record("told: %s", forged))
    assert len(line.splitlines()) == 1
    assert "\x1b" not in line
    assert r"x\x0a2026" in line
    assert "\n" not in JsonLines().format(record("told: %s", forged))
    assert as_json("told: %s", forged)["message"] == f"told: {forged}"


def failed() -> logging.LogRecord:
    try:
        raise ValueError("of the test")
    except ValueError:
        return logging.LogRecord("relay.app", logging.ERROR, "", 1, "care failed", (), sys.exc_info())


def test_a_traceback_is_kept_whole() -> None:
    document = json.loads(JsonLines(worker=3).format(failed()))
    assert (document["message"], document["worker"]) == ("care failed", 3)
    assert document["exception"].splitlines()[-1] == "ValueError: of the test"
    text = TextLines(worker=3).format(failed())
    assert "ERROR relay.app worker=3 care failed\nTraceback" in text
    assert text.splitlines()[-1] == "ValueError: of the test"


def test_a_line_tells_the_trace_that_it_is_of() -> None:
    assert "trace_id" not in as_json("said")
    told = TRACE_ID.set(TRACE)
    try:
        assert as_json("said")["trace_id"] == TRACE
        assert TextLines().format(record("said")).endswith(f"said trace_id={TRACE}")
    finally:
        TRACE_ID.reset(told)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def root_logger() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers[:] = []
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.usefixtures("root_logger")
@pytest.mark.parametrize(
    ("wanted", "stream", "is_json"),
    [
        ("auto", Terminal(), False),
        ("auto", io.StringIO(), True),
        ("json", Terminal(), True),
        ("text", io.StringIO(), False),
    ],
)
def test_lines_are_for_people_where_people_look(
    monkeypatch: pytest.MonkeyPatch, wanted: str, stream: io.StringIO, is_json: bool
) -> None:
    monkeypatch.setattr(sys, "stderr", stream)
    assert set_up(wanted) is is_json
    logging.getLogger("relay.test").info("said")
    assert stream.getvalue().startswith("{") is is_json
    assert stream.getvalue().count("\n") == 1


# A running relay


def lines_of(relay: RelayProcess, message: str, **members: Any) -> list[dict[str, Any]]:
    """Lines of the log with this message and these members."""
    lines = [json.loads(line) for line in relay.log]
    return [line for line in lines if line["message"] == message and members.items() <= line.items()]


def line_of(relay: RelayProcess, message: str, **members: Any) -> dict[str, Any]:
    """The one such line, which comes when it comes."""
    deadline = time.monotonic() + DEADLINE_S
    while not (found := lines_of(relay, message, **members)):
        assert time.monotonic() < deadline, relay.log
        time.sleep(0.01)
    (line,) = found
    return line


@pytest.fixture(scope="module")
def telling(fresh_journal: Callable[[], str], upstream: ScriptedUpstream) -> Iterator[RelayProcess]:
    """A relay whose log is JSON, as it is without a terminal."""
    with RelayProcess.start(
        journal=fresh_journal(), upstream=upstream.url, log_format="auto", redis_prefix="telling"
    ) as process:
        yield process


def test_an_answer_is_told_with_its_trace_from_upstream_to_its_end(
    telling: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.head()
        await exchange.chunk(b"data: a secret word\n\ndata: another\n\n")
        await exchange.end()

    upstream.on(f"/{name}", handler)
    with Reading(f"{telling.url}/{name}?token=hidden", Relay_Stream=name, traceparent=TRACEPARENT) as answer:
        run = answer.headers["relay-run"]
        answer.read()
    (received,) = upstream.requests(f"/{name}")
    assert received.header("traceparent") == TRACEPARENT
    ended = line_of(telling, "run ended", stream=name)
    assert TIME.fullmatch(ended.pop("time"))
    assert 0 <= ended.pop("duration_s") < 60
    assert ended == {
        "level": "info", "logger": "relay.app", "message": "run ended", "stream": name, "run": run,
        "status": "completed", "reason": "upstream_end", "frames": 2, "trace_id": TRACE,
    }  # fmt: skip
    left = line_of(telling, "reader ended", stream=name)
    assert (left["reason"], left["run"], left["frames"]) == ("ended", run, 4)
    assert (left["client"], left["trace_id"]) == ("127.0.0.1", TRACE)
    assert left["cursor"].startswith("4-")
    assert not [line for line in telling.log if "secret" in line or "hidden" in line]


def test_every_ending_is_told_once_however_it_came_about(telling: RelayProcess, name: str) -> None:
    whole, failed_one, stopped, replaced = (Producer(telling, name) for _ in range(4))
    whole.push("one", "two", end="completed")
    failed_one.ask("end", {"status": "failed", "error": "secret"})
    ask(telling.port, "POST", f"{name}/runs/{stopped.run}/cancel")
    replaced.push("one")
    last = Producer(telling, name, supersedes=replaced.run)
    ask(telling.port, "DELETE", name)
    endings = {
        run.run: line_of(telling, "run ended", run=run.run)
        for run in (whole, failed_one, stopped, replaced, last)
    }
    told = {run: (line["level"], line["reason"], line.get("frames")) for run, line in endings.items()}
    assert told[whole.run] == ("info", "producer_end", 2)
    assert told[failed_one.run] == ("warning", "producer_failed", 0)
    assert told[stopped.run] == ("info", "client_cancel", 0)
    assert told[replaced.run][:2] == ("info", "superseded")
    assert told[last.run] == ("info", "stream_deleted", None)
    assert not [line for line in telling.log if "secret" in line or whole.writer in line]


def test_a_run_that_relay_calls_for_is_of_its_callers_trace_or_of_one_of_its_own(
    telling: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.head()
        await exchange.end()

    upstream.on(f"/{name}", handler)
    given = f"00-{TRACE[::-1]}-00f067aa0ba902b7-00"
    for headers, own in (
        ({"traceparent": TRACEPARENT}, {}),
        ({"traceparent": TRACEPARENT}, {"traceparent": given}),
        ({"traceparent": "nonsense"}, {}),
        ({}, {}),
    ):
        body = {"upstream": {"path": f"/{name}", "headers": own}}
        started = ask(telling.port, "POST", f"{name}/runs", body, **headers)
        whole_run(telling, name, started.json["run"])
        trace_id = line_of(telling, "run ended", run=started.json["run"])["trace_id"]
        assert trace_id_of(upstream.requests(f"/{name}")[-1].header("traceparent") or "") == trace_id
    sent = [received.header("traceparent") for received in upstream.requests(f"/{name}")]
    assert sent[:2] == [TRACEPARENT, given]
    assert len(set(sent)) == 4


def test_the_first_line_says_where_relay_serves(telling: RelayProcess) -> None:
    ready = [line for line in map(json.loads, telling.log) if "is ready on" in line["message"]]
    assert [telling.url in line["message"] for line in ready] == [True]


def test_workers_say_which_of_them_speaks(redis_server: Any, name: str) -> None:
    with RelayProcess.start(
        journal=redis_server.url(), redis_prefix=name, workers=2, log_format="json"
    ) as pair:
        run = Producer(pair, name)
        run.push(end="completed")
        assert line_of(pair, "run ended", run=run.run)["worker"] in (1, 2)


def test_a_format_that_is_none_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "relay", "serve", "--log-format", "xml"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == 2
