"""relay's write routes as a producer meets them: every input, every answer."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from producing import DEADLINE_S, Answer, Producer, ask
from reading import Reading
from relay_process import RelayProcess
from run_record import whole_run
from scripted_upstream import Exchange, ScriptedUpstream

from relay.limits import METADATA_MAX_BYTES, OPTIONS_MAX_BYTES, RETENTION_MAX_S
from relay.settings import NUMBER_MAX

OPENED = ["run", "stream", "status", "reason", "cursor", "next_seq", "writer"]


def on_runs(relay: RelayProcess, name: str, body: Any = None, **headers: str) -> Answer:
    return ask(relay.port, "POST", f"{name}/runs", body, **headers)


def info(relay: RelayProcess, name: str, run: str) -> Any:
    return relay.json(f"/relay/v1/streams/{name}/runs/{run}")


def controls(relay: RelayProcess, name: str, run: str) -> list[Any]:
    """The journaled control frames of a run that has ended."""
    with Reading(f"{relay.url}/relay/v1/streams/{name}/events?run={run}") as reading:
        said = [block.control for block in reading.blocks() if block.control is not None]
    return [frame for frame in said if frame["type"].startswith("run.")]


class Waiting:
    """A heartbeat that waits, in a relay where nothing else follows a stream."""

    def __init__(self, relay: RelayProcess, producer: Producer) -> None:
        self._answers: list[Answer] = []
        self._thread = threading.Thread(
            target=lambda: self._answers.append(producer.ask("heartbeat?wait=60"))
        )
        self._thread.start()
        deadline = time.monotonic() + DEADLINE_S
        while not relay.metric("relay_streams_followed"):
            assert time.monotonic() < deadline

    def answer(self) -> Answer:
        """The answer, which has to come before the wait is over."""
        self._thread.join(30)
        assert not self._thread.is_alive()
        return self._answers[0]


# --- streams ----------------------------------------------------------------------------------------------


def test_put_creates_a_stream_and_changes_what_it_names(relay: RelayProcess, name: str) -> None:
    created = ask(relay.port, "PUT", name)
    assert created.status == 201
    assert created.json == relay.json(f"/relay/v1/streams/{name}")
    default = created.json["retention"]
    assert ask(relay.port, "PUT", name).status == 200
    changed = ask(relay.port, "PUT", name, {"max_frames": 7, "metadata": {"chat": [1]}, "max_bytes": None})
    assert changed.status == 200
    assert changed.json["retention"] == default | {"max_frames": 7}
    assert changed.json["metadata"] == {"chat": [1]}
    again = ask(relay.port, "PUT", name, {"retention_s": 60, "max_bytes": 0})
    assert again.json["retention"] == {"max_frames": 7, "max_bytes": 0, "retention_s": 60}
    assert again.json["metadata"] == {"chat": [1]}
    first = ask(relay.port, "PUT", name + "-2", {"max_frames": 3.0})  # a whole number, to JSON
    assert (first.status, first.json["retention"]) == (201, default | {"max_frames": 3})


def test_a_sealed_stream_takes_no_further_run_but_lets_the_open_one_end(
    relay: RelayProcess, name: str
) -> None:
    producer = Producer(relay, name)
    for _ in range(2):
        sealed = ask(relay.port, "POST", f"{name}/seal")
        assert (sealed.status, sealed.json["sealed"]) == (200, True)
    assert on_runs(relay, name).problem == (409, "stream_sealed")
    assert producer.push("one", end="completed").status == 200
    with Reading(f"{relay.url}/relay/v1/streams/{name}/events") as reading:
        assert [block.data for block in reading.frames()] == ["one"]  # and the answer ends


def test_delete_removes_a_stream_and_is_the_same_again(relay: RelayProcess, name: str) -> None:
    producer = Producer(relay, name)
    producer.push("one")
    metric = 'relay_runs_ended_total{reason="stream_deleted",status="cancelled"}'
    before = relay.metric(metric)
    for _ in range(2):
        deleted = ask(relay.port, "DELETE", name)
        assert (deleted.status, deleted.body) == (204, b"")
    assert relay.metric(metric) == before + 1
    assert relay.get(f"/relay/v1/streams/{name}")[0] == 404
    assert producer.push("two").problem == (404, "unknown_stream")


# --- opening ----------------------------------------------------------------------------------------------


def test_a_run_is_opened_with_all_that_is_asked_of_it(relay: RelayProcess, name: str) -> None:
    wishes = {
        "run": "turn-1", "dialect": "raw", "metadata": {"user": "é"}, "idle_timeout_s": 12.5, "seal": True,
        "if_busy": "reject", "supersedes": None,
    }  # fmt: skip
    opened = on_runs(relay, name, wishes)
    assert opened.status == 201
    assert list(opened.json) == OPENED
    assert {key: opened.json[key] for key in OPENED[:-1]} == {
        "run": "turn-1", "stream": name, "status": "open", "reason": None, "cursor": "0-0", "next_seq": 1,
    }  # fmt: skip
    kept = info(relay, name, "turn-1")
    assert (kept["dialect"], kept["metadata"], kept["idle_timeout_s"]) == ("raw", {"user": "é"}, 12.5)
    assert relay.json(f"/relay/v1/streams/{name}")["sealed"] is True


def test_the_cursor_of_a_run_shows_it_from_its_first_frame(relay: RelayProcess, name: str) -> None:
    Producer(relay, name).push("before", end="completed")
    producer = Producer(relay, name)
    producer.push("one", end="completed")
    after = producer.opened.json["cursor"]
    with Reading(f"{relay.url}/relay/v1/streams/{name}/events?run={producer.run}&after={after}") as reading:
        shown = list(reading.blocks())
    kinds = [block.data if block.control is None else block.control["type"] for block in shown]
    assert kinds == ["hello", "run.started", "one", "run.ended", "live", "bye"] or kinds == [
        *("hello", "run.started", "one", "run.ended", "bye"),
    ]


def test_opening_the_same_run_again_takes_it_over(relay: RelayProcess, name: str) -> None:
    first = Producer(relay, name, run="mine")
    first.push("one", "two")
    second = Producer(relay, name, run="mine", metadata="is not changed")
    assert (second.opened.status, second.opened.json["next_seq"]) == (200, 3)
    assert second.opened.json["cursor"] == first.opened.json["cursor"]
    assert second.writer != first.writer
    assert first.push("late").problem == (409, "fenced")
    second.push("three", end="completed")
    assert whole_run(relay, name).texts == ["one", "two", "three"]


def test_a_busy_stream_can_refuse_a_run_or_let_it_supersede_the_others(
    relay: RelayProcess, name: str
) -> None:
    first = Producer(relay, name)
    refused = on_runs(relay, name, {"if_busy": "reject"})
    assert refused.problem == (409, "stream_busy")
    assert refused.json["open_runs"] == [first.run]
    second = Producer(relay, name, if_busy="supersede")
    assert second.opened.json["superseded"] == [first.run]
    assert whole_run(relay, name, first.run).outcome == ("cancelled", "superseded")
    assert first.push("late").problem == (409, "run_ended")


@pytest.mark.parametrize("given", ["latest", ["latest"], "{0}", ["{0}"]])
def test_supersedes_ends_the_run_in_every_open_tab_and_says_what_stays(
    relay: RelayProcess, name: str, given: str | list[str]
) -> None:
    """Regenerate: the old answer ends, the new one begins, in one step."""
    other = Producer(relay, name)
    old = Producer(relay, name)
    old.push("old")
    other.push("stays")
    logged = len(relay.log)
    supersedes: Any = json.loads(json.dumps(given).replace("{0}", old.run))
    new = Producer(relay, name, supersedes=supersedes)
    assert new.opened.json["superseded"] == [old.run]
    assert new.opened.json["frames_after"] == 1
    assert controls(relay, name, old.run)[1:] == [
        {"type": "run.superseded", "run": old.run, "by": new.run},
        {
            "type": "run.ended", "run": old.run, "status": "cancelled", "reason": "superseded", "frames": 1,
            "text_bytes": 3,
        },
    ]  # fmt: skip
    assert relay.metric('relay_runs_ended_total{reason="superseded",status="cancelled"}') > 0
    warning = relay.logged_line(f"run={new.run} supersedes", since=logged)
    assert "WARNING" in warning
    assert f"supersedes {old.run}: 1 frames of other runs ({other.run}) stand at or after" in warning
    assert "not rolled back" in warning
    after = Producer(relay, name, supersedes=[new.run])
    assert after.opened.json["superseded"] == [new.run]
    assert info(relay, name, new.run)["superseded_by"] == after.run


def test_superseding_a_run_of_another_stream_is_refused_and_opens_nothing(
    relay: RelayProcess, name: str
) -> None:
    elsewhere = Producer(relay, name + "-2")
    Producer(relay, name)
    assert on_runs(relay, name, {"supersedes": elsewhere.run}).problem == (404, "unknown_run")
    assert relay.json(f"/relay/v1/streams/{name}")["runs"] == 1
    assert elsewhere.push("goes on").status == 200


def test_relay_calls_upstream_for_a_run(relay: RelayProcess, upstream: ScriptedUpstream, name: str) -> None:
    bodies = []

    async def handler(exchange: Exchange) -> None:
        bodies.append(exchange.received.body)
        await exchange.head()
        await exchange.chunk(b"data: one\n\n")
        await exchange.end()

    upstream.on(f"/{name}", handler)
    wishes = {"upstream": {"method": "POST", "path": f"/{name}", "body": {"q": 1}}, "run": "mine"}
    started = on_runs(relay, name, wishes)
    assert started.status == 202
    assert (started.json["run"], started.json["stream"], started.json["cursor"]) == ("mine", name, "0-0")
    record = whole_run(relay, name, "mine")
    assert (record.texts, record.outcome) == (["one"], ("completed", "upstream_end"))
    again = on_runs(relay, name, wishes)
    assert (again.status, again.json["run"], again.json["status"]) == (202, "mine", "completed")
    keyed = [on_runs(relay, name, {"upstream": {"path": f"/{name}"}}, Idempotency_Key="k") for _ in range(2)]
    assert keyed[0].json["run"] == keyed[1].json["run"]
    whole_run(relay, name, keyed[0].json["run"])
    assert len(bodies) == 2
    assert json.loads(bodies[0]) == {"q": 1}
    for wrong in ({"path": "no"}, {"path": "/x", "other": 1}, [], "x"):
        assert on_runs(relay, name, {"upstream": wrong}).problem == (400, "invalid_parameter")


# --- endings and cancel -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "ended", "error"),
    [
        ({"status": "completed"}, ("completed", "producer_end"), None),
        ({"status": "completed", "reason": "producer_end"}, ("completed", "producer_end"), None),
        ({"status": "completed", "reason": "input_required"}, ("completed", "input_required"), None),
        ({"status": "failed"}, ("failed", "producer_failed"), "producer failed"),
        ({"status": "failed", "error": "boom"}, ("failed", "producer_failed"), "boom"),
        ({"status": "failed", "error": "  "}, ("failed", "producer_failed"), "producer failed"),
    ],
)
def test_p3_a_producer_ends_its_run_once_and_may_say_so_again(
    relay: RelayProcess, name: str, body: Any, ended: tuple[str, str], error: str | None
) -> None:
    producer = Producer(relay, name)
    producer.push("one")
    for _ in range(2):
        answer = producer.ask("end", body)
        assert (answer.status, answer.json["status"], answer.json["reason"]) == (200, *ended)
        assert answer.json["next_seq"] == 2
    other = producer.ask("end", {"status": "failed" if ended[0] == "completed" else "completed"})
    assert other.problem == (409, "run_ended")
    assert (other.json["run_status"], other.json["reason"]) == ended
    assert ask(relay.port, "POST", f"{name}/runs/{producer.run}/writer").problem == (409, "run_ended")
    record = whole_run(relay, name)
    assert record.outcome == ended
    assert record.ended.get("error") == error


def test_an_error_text_is_cut_at_4_kib_with_a_mark(relay: RelayProcess, name: str) -> None:
    producer = Producer(relay, name)
    assert producer.ask("end", {"status": "failed", "error": "é" * 1_000_000}).status == 200
    error = whole_run(relay, name).ended["error"]
    assert len(error.encode()) <= 4096
    assert error.endswith(" [cut]")


def test_cancel_ends_a_run_keeps_its_text_and_says_the_same_again(relay: RelayProcess, name: str) -> None:
    producer = Producer(relay, name)
    producer.push("partial")
    path = f"{name}/runs/{producer.run}/cancel"
    first = ask(relay.port, "POST", path, {"reason": "the user pressed Stop"})
    assert first.status == 200
    assert (first.json["status"], first.json["reason"]) == ("cancelled", "client_cancel")
    assert first.json["error"] == "the user pressed Stop"
    assert ask(relay.port, "POST", path).json == first.json == info(relay, name, producer.run)
    refused = producer.push("late")
    assert refused.problem == (409, "run_ended")
    assert (refused.json["run_status"], refused.json["reason"]) == ("cancelled", "client_cancel")
    record = whole_run(relay, name)
    assert (record.texts, record.outcome) == (["partial"], ("cancelled", "client_cancel"))


def test_cancel_of_a_stream_ends_the_run_that_a_reader_calls_current(relay: RelayProcess, name: str) -> None:
    older, newer = Producer(relay, name), Producer(relay, name)
    for producer in (newer, older):
        answer = ask(relay.port, "POST", f"{name}/cancel")
        assert (answer.json["run"], answer.json["status"]) == (producer.run, "cancelled")
    none = ask(relay.port, "POST", f"{name}/cancel")
    assert (none.status, none.json) == (200, {"stream": name, "run": None})


def test_a_cancel_stops_a_proxied_run(relay: RelayProcess, upstream: ScriptedUpstream, name: str) -> None:
    closed = threading.Event()

    async def handler(exchange: Exchange) -> None:
        await exchange.head()
        await exchange.chunk(b"data: one\n\n")
        await exchange.closed()
        closed.set()

    upstream.on(f"/{name}", handler)
    with Reading(f"{relay.url}/{name}", Relay_Stream=name) as answer:
        answer.take(1)
        assert ask(relay.port, "POST", f"{name}/cancel").json["status"] == "cancelled"
        assert closed.wait(60)
    assert whole_run(relay, name).outcome == ("cancelled", "client_cancel")


# --- heartbeats -------------------------------------------------------------------------------------------


def test_a_heartbeat_tells_how_a_run_stands(relay: RelayProcess, name: str) -> None:
    producer = Producer(relay, name)
    producer.push("one")
    assert producer.ask("heartbeat").json == {"status": "open", "reason": None, "next_seq": 2}
    assert producer.ask("heartbeat?wait=0.05").json["status"] == "open"
    producer.ask("end", {"status": "completed"})
    ended = {"status": "completed", "reason": "producer_end", "next_seq": 2}
    assert producer.ask("heartbeat").json == ended
    assert producer.ask("heartbeat?wait=60").json == ended


@pytest.mark.parametrize("path", ["{name}/cancel", "{name}/runs/{run}/cancel"])
def test_a_waiting_heartbeat_answers_at_once_when_the_run_is_cancelled(
    fresh_journal: Callable[[], str], name: str, path: str
) -> None:
    with RelayProcess.start(journal=fresh_journal()) as relay:
        producer = Producer(relay, name)
        waiting = Waiting(relay, producer)
        producer.push("one", "two")  # news of the stream that are none of the run's end
        ask(relay.port, "POST", path.format(name=name, run=producer.run))
        assert waiting.answer().json == {"status": "cancelled", "reason": "client_cancel", "next_seq": 3}


def test_a_waiting_heartbeat_answers_when_the_stream_is_deleted(
    fresh_journal: Callable[[], str], name: str
) -> None:
    with RelayProcess.start(journal=fresh_journal()) as relay:
        waiting = Waiting(relay, Producer(relay, name))
        ask(relay.port, "DELETE", name)
        assert waiting.answer().problem == (404, "unknown_stream")


def test_a_waiting_heartbeat_is_answered_by_a_relay_that_shuts_down(
    fresh_journal: Callable[[], str], name: str
) -> None:
    with RelayProcess.start(journal=fresh_journal()) as relay:
        waiting = Waiting(relay, Producer(relay, name))
        relay.stop()
        assert waiting.answer().json["status"] == "open"


def test_a_waiting_heartbeat_keeps_a_run_alive_that_may_not_be_silent_so_long(
    fresh_journal: Callable[[], str], name: str
) -> None:
    # Others would find the run silent while this relay, which hears of it, is held up.
    with RelayProcess.start(journal=fresh_journal(), redis_prefix=name, owner_lease_s=1.5) as relay:
        producer = Producer(relay, name, idle_timeout_s=1)
        assert producer.ask("heartbeat?wait=2.5").json["status"] == "open"


# --- wrong input ------------------------------------------------------------------------------------------

BODIES: list[tuple[Any, int, str]] = [
    (b"{", 400, "invalid_parameter"),
    (b"\xff", 400, "invalid_parameter"),
    ([], 400, "invalid_parameter"),
    ("text", 400, "invalid_parameter"),
    (7, 400, "invalid_parameter"),
    ({"unknown": 1}, 400, "invalid_parameter"),
]
TOO_LARGE = b'{"x":"' + b"x" * OPTIONS_MAX_BYTES + b'"}'


@pytest.mark.parametrize(("body", "status", "code"), [*BODIES, (TOO_LARGE, 413, "body_too_large")])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("PUT", "{name}"),
        ("POST", "{name}/runs"),
        ("POST", "{name}/seal"),
        ("POST", "{name}/cancel"),
        ("POST", "{name}/runs/{run}/heartbeat"),
        ("POST", "{name}/runs/{run}/writer"),
        ("POST", "{name}/runs/{run}/cancel"),
    ],
)
def test_a_body_that_is_not_what_a_route_takes_is_refused_and_changes_nothing(
    relay: RelayProcess, name: str, method: str, path: str, body: Any, status: int, code: str
) -> None:
    producer = Producer(relay, name)
    place = path.format(name=name, run=producer.run)
    headers = {"Relay_Writer": producer.writer, "Content_Type": "application/json"}
    before = info(relay, name, producer.run)
    refused = ask(relay.port, method, place, body, **headers)
    if path == "{name}/runs" and body is TOO_LARGE:  # what upstream is asked may be as large
        status, code = 400, "invalid_parameter"
    assert refused.problem == (status, code)
    if isinstance(body, dict):
        assert refused.json["parameters"] == list(body)
    headers["Content_Type"] = "text/plain"
    assert ask(relay.port, method, place, b"{}", **headers).problem == (415, "unsupported_media_type")
    after = info(relay, name, producer.run)
    assert before == after
    stream = relay.json(f"/relay/v1/streams/{name}")
    assert (stream["runs"], stream["sealed"]) == (1, False)
    assert producer.push("goes on").status == 200


@pytest.mark.parametrize(
    ("wishes", "code"),
    [
        ({"run": ""}, "invalid_name"), ({"run": "a/b"}, "invalid_name"), ({"run": "latest"}, "invalid_name"),
        ({"run": "x" * 201}, "invalid_name"), ({"run": 7}, "invalid_parameter"),
        ({"dialect": "other"}, "invalid_parameter"), ({"dialect": 7}, "invalid_parameter"),
        ({"if_busy": "maybe"}, "invalid_parameter"), ({"if_busy": True}, "invalid_parameter"),
        ({"idle_timeout_s": 0}, "invalid_parameter"), ({"idle_timeout_s": -1}, "invalid_parameter"),
        ({"idle_timeout_s": 1e9}, "invalid_parameter"), ({"idle_timeout_s": "7"}, "invalid_parameter"),
        ({"idle_timeout_s": True}, "invalid_parameter"), ({"seal": 1}, "invalid_parameter"),
        ({"seal": "true"}, "invalid_parameter"), ({"supersedes": 7}, "invalid_parameter"),
        ({"supersedes": [7]}, "invalid_parameter"), ({"supersedes": ""}, "invalid_name"),
        ({"supersedes": "current"}, "invalid_name"), ({"supersedes": {"a": 1}}, "invalid_parameter"),
        ({"supersedes": [f"r{n}" for n in range(101)]}, "invalid_parameter"),
        ({"metadata": "x" * METADATA_MAX_BYTES}, "invalid_parameter"),
        ({"Run": "x"}, "invalid_parameter"), ({"supercedes": "latest"}, "invalid_parameter"),
    ],
)  # fmt: skip
def test_a_wish_that_cannot_be_granted_opens_no_run(
    relay: RelayProcess, name: str, wishes: dict[str, Any], code: str
) -> None:
    assert on_runs(relay, name, wishes).problem == (400, code)
    assert relay.get(f"/relay/v1/streams/{name}")[0] == 404


def test_metadata_nested_too_deep_is_refused(relay: RelayProcess, name: str) -> None:
    body = b'{"metadata":' + b"[" * 500 + b"]" * 500 + b"}"
    refused = on_runs(relay, name, body, Content_Type="application/json")
    assert refused.problem == (400, "invalid_parameter")


@pytest.mark.parametrize(
    "change",
    [
        {"max_frames": -1}, {"max_frames": 1.5}, {"max_bytes": "1"}, {"retention_s": True},
        {"max_frames": 2**53 + 1}, {"metadata": "x" * METADATA_MAX_BYTES}, {"sealed": True},
        {"retention_s": RETENTION_MAX_S + 1},
    ],
)  # fmt: skip
def test_a_stream_is_not_made_of_wrong_numbers(
    relay: RelayProcess, name: str, change: dict[str, Any]
) -> None:
    assert ask(relay.port, "PUT", name, change).problem == (400, "invalid_parameter")
    assert relay.get(f"/relay/v1/streams/{name}")[0] == 404


def test_a_stream_of_the_largest_numbers_works(relay: RelayProcess, name: str) -> None:
    largest = {"max_frames": NUMBER_MAX, "max_bytes": NUMBER_MAX, "retention_s": RETENTION_MAX_S}
    assert ask(relay.port, "PUT", name, largest).status == 201
    assert Producer(relay, name).push("x" * 100_000, end="completed").status == 200
    assert ask(relay.port, "PUT", name, largest).status == 200
    assert relay.json(f"/relay/v1/streams/{name}")["retention"] == largest


@pytest.mark.parametrize(
    "body",
    [
        {}, {"status": "open"}, {"status": "lost"}, {"status": 7}, {"status": "completed", "reason": "x"},
        {"status": "completed", "reason": "producer_failed"}, {"status": "failed", "reason": "owner_lost"},
        {"status": "cancelled", "reason": "client_cancel"}, {"status": "failed", "error": 7},
        {"status": "completed", "error": "x"}, {"status": ["completed"]}, [], "completed",
        {"status": "completed", "unknown": 1},
    ],
)  # fmt: skip
def test_an_ending_that_a_producer_cannot_give_ends_nothing(
    relay: RelayProcess, name: str, body: Any
) -> None:
    producer = Producer(relay, name)
    assert producer.ask("end", body).problem == (400, "invalid_parameter")
    assert producer.push("goes on").status == 200


@pytest.mark.parametrize(
    ("what", "headers", "status", "code"),
    [
        ("frames", {"Relay_Writer": ""}, 400, "missing_writer"),
        ("end", {"Relay_Writer": " "}, 400, "missing_writer"),
        ("heartbeat", {"Relay_Writer": ""}, 400, "missing_writer"),
        ("frames", {"Relay_Writer": "wrong"}, 409, "fenced"),
        ("frames", {"Relay_Writer": "\xff"}, 409, "fenced"),
        ("frames", {"Relay_Seq": "0"}, 400, "invalid_parameter"),
        ("frames", {"Relay_Seq": "-1"}, 400, "invalid_parameter"),
        ("frames", {"Relay_Seq": "1.0"}, 400, "invalid_parameter"),
        ("frames", {"Relay_Seq": "\xb2"}, 400, "invalid_parameter"),
        ("frames", {"Relay_Seq": "9" * 16}, 400, "invalid_parameter"),
        ("frames", {"Relay_Seq": "9" * 5000}, 400, "invalid_parameter"),
        ("frames", {"Relay_Seq": str(2**53)}, 409, "sequence_gap"),
        ("frames", {"Content_Type": "text/plain"}, 415, "unsupported_media_type"),
        ("frames?end=lost", {}, 400, "invalid_parameter"),
        ("frames?end=", {}, 400, "invalid_parameter"),
        ("heartbeat?wait=61", {}, 400, "invalid_parameter"),
        ("heartbeat?wait=nan", {}, 400, "invalid_parameter"),
    ],
)
def test_a_wrong_header_or_parameter_is_refused_and_appends_nothing(
    relay: RelayProcess, name: str, what: str, headers: dict[str, str], status: int, code: str
) -> None:
    producer = Producer(relay, name)
    body = [{"data": "x"}] if what.startswith("frames") else {"status": "completed"}
    if what.startswith("heartbeat"):
        body = {}
    assert producer.ask(what, body, **headers).problem == (status, code)
    assert producer.push("one", end="completed", Relay_Seq="1").json["next_seq"] == 2
    assert whole_run(relay, name).texts == ["one"]


def test_a_body_larger_than_relay_buffers_is_refused(fresh_journal: Callable[[], str], name: str) -> None:
    with RelayProcess.start(journal=fresh_journal(), buffered_body_max_bytes=1000) as relay:
        producer = Producer(relay, name)
        assert producer.push("x" * 1000).problem == (413, "body_too_large")
        lines = b'{"data":"' + b"x" * 2000 + b'"}\n'
        done = producer.ask("frames", lines, Content_Type="application/x-ndjson")
        assert (done.status, done.json["appended"]) == (200, 1)  # it is not kept in memory whole


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("PUT", "a%2Fb", 404, "route_not_found"),
        ("POST", "a%2Fruns", 400, "invalid_name"),
        ("POST", "a%2fcancel", 400, "invalid_name"),
        ("POST", "a/runs/b%2Fcancel", 400, "invalid_name"),
        ("DELETE", "a%2Fb", 404, "route_not_found"),
        ("PUT", "a%20b", 400, "invalid_name"),
        ("PUT", "..%00", 400, "invalid_name"),
        ("PUT", "x" * 201, 400, "invalid_name"),
        ("POST", "a b/runs".replace(" ", "%20"), 400, "invalid_name"),
        ("POST", "{name}/runs/latest/cancel", 400, "invalid_name"),
        ("POST", "{name}/runs/x/nothing", 404, "route_not_found"),
        ("POST", "{name}/cancel", 404, "unknown_stream"),
        ("POST", "{name}/seal", 404, "unknown_stream"),
        ("POST", "{name}/runs/x/cancel", 404, "unknown_stream"),
        ("POST", "{name}/runs/x/writer", 404, "unknown_stream"),
        ("POST", "{name}/runs/x/frames", 404, "unknown_stream"),
        ("POST", "{name}/runs/x/heartbeat", 404, "unknown_stream"),
    ],
)
def test_a_wrong_name_or_place_is_told_so(
    relay: RelayProcess, name: str, method: str, path: str, status: int, code: str
) -> None:
    headers = {"Relay_Writer": "w"} if "/runs/" in path else {}
    assert ask(relay.port, method, path.format(name=name), **headers).problem == (status, code)


def test_an_unknown_run_is_told_so(relay: RelayProcess, name: str) -> None:
    Producer(relay, name)
    for what in ("frames", "heartbeat", "cancel", "writer"):
        answer = ask(relay.port, "POST", f"{name}/runs/nobody/{what}", Relay_Writer="w")
        assert answer.problem == (404, "unknown_run")


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("PATCH", "{name}", "DELETE, GET, HEAD, PUT"),
        ("PUT", "{name}/runs", "GET, HEAD, POST"),
        ("GET", "{name}/runs/x/frames", "POST"),
        ("POST", "{name}/events", "GET"),
    ],
)
def test_another_method_is_told_those_that_there_are(
    relay: RelayProcess, name: str, method: str, path: str, allow: str
) -> None:
    refused = ask(relay.port, method, path.format(name=name))
    assert refused.problem == (405, "method_not_allowed")
    assert refused.headers["allow"] == refused.json["allow"] == allow


@pytest.mark.parametrize(
    ("query", "headers", "status", "code"),
    [
        ("", {}, 400, "invalid_parameter"),
        ("?end=lost", {}, 400, "invalid_parameter"),
        ("?end=completed&seal=yes", {}, 400, "invalid_parameter"),
        ("?end=completed&idle_timeout_s=x", {}, 400, "invalid_parameter"),
        ("?end=completed&idle_timeout_s=0", {}, 400, "invalid_parameter"),
        ("?end=completed&dialect=x", {}, 400, "invalid_parameter"),
        ("?end=completed&run=a/b", {}, 400, "invalid_name"),
        ("?end=completed&metadata=%7B", {}, 400, "invalid_parameter"),
        ("?end=completed&supersedes=nobody", {}, 404, "unknown_run"),
        ("?end=completed", {"Relay_Seq": "1"}, 400, "invalid_parameter"),
        ("?end=completed", {"Content_Type": "application/json"}, 415, "unsupported_media_type"),
    ],
)
def test_a_whole_run_that_is_asked_for_wrongly_is_not_opened(
    relay: RelayProcess, name: str, query: str, headers: dict[str, str], status: int, code: str
) -> None:
    headers = {"Content_Type": "application/x-ndjson"} | headers
    refused = ask(relay.port, "POST", f"{name}/runs{query}", b'{"data":"x"}\n', **headers)
    assert refused.problem == (status, code)
    assert relay.get(f"/relay/v1/streams/{name}")[0] == 404


def test_a_whole_run_supersedes_as_its_query_says(relay: RelayProcess, name: str) -> None:
    first, second = Producer(relay, name), Producer(relay, name)
    query = f"?end=failed&supersedes={first.run},{second.run}&supersedes=latest&idle_timeout_s=5"
    line = b'{"data":"x"}\n'
    done = ask(relay.port, "POST", f"{name}/runs{query}", line, Content_Type="application/x-ndjson")
    assert (done.status, done.json["status"], done.json["reason"]) == (201, "failed", "producer_failed")
    assert set(done.json["superseded"]) == {first.run, second.run}
    assert relay.json(f"/relay/v1/streams/{name}")["open_runs"] == []


def test_a_run_in_one_request_refuses_what_it_does_not_know(relay: RelayProcess, name: str) -> None:
    """A misspelt wish would pass for none."""
    refused = ask(
        relay.port, "POST", f"{name}/runs?end=completed&supersede=latest", b'{"data":"a"}\n',
        Content_Type="application/x-ndjson",
    )  # fmt: skip
    assert refused.problem == (400, "invalid_parameter")
    assert refused.json["parameters"] == ["supersede"]
    assert ask(relay.port, "GET", name).status == 404


def test_two_sequence_numbers_are_none(relay: RelayProcess, name: str) -> None:
    producer = Producer(relay, name)
    refused = producer.ask("frames", {"data": "a"}, Relay_Seq="1,2")
    assert refused.problem == (400, "invalid_parameter")
    assert producer.push("a").json["first"].startswith("2-")


def test_a_run_is_found_by_what_it_is_of_its_stream(relay: RelayProcess, name: str) -> None:
    def found(run: str, *, suffix: str = "") -> Any:
        answer = ask(relay.port, "GET", f"{name}/runs/{run}{suffix}")
        return answer.json["run"] if answer.status == 200 else answer.problem

    assert found("latest") == (404, "unknown_stream")
    older, newer = Producer(relay, name), Producer(relay, name)
    assert (found("current"), found("latest")) == (newer.run, newer.run)
    newer.push("done", end="completed")
    assert (found("current"), found("latest")) == (older.run, newer.run)
    assert found("latest", suffix="/transcript") == newer.run
    older.push(end="completed")
    assert (found("current"), found("latest")) == ((404, "unknown_run"), newer.run)


def test_what_upstream_is_asked_may_be_large(relay: RelayProcess, upstream: Any, name: str) -> None:
    upstream.on_stream(f"/{name}", [b"data: read\n\n"])
    asked = {"method": "POST", "path": f"/{name}", "body": {"history": "x" * 200_000}}
    started = ask(relay.port, "POST", f"{name}/runs", {"upstream": asked})
    assert started.status == 202
    assert whole_run(relay, name).texts == ["read"]
