"""Errors that were swallowed, and turns that were left open for ever."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from producing import LongBody, Producer, ask
from raw_client import RawClient
from reading import Reading
from relay_process import RelayProcess
from run_record import whole_run
from scenarios.acting import DONE, agent, chunk_of, events_of, kinds, rest_of, text_of, transcript
from scenarios.conftest import LEASED, Receiver
from scripted_upstream import Exchange, ScriptedUpstream

from relay.lifecycle import ERROR_CUT_MARK, ERROR_MAX_BYTES

DEADLINE_S = 60


def refuse(upstream: ScriptedUpstream, path: str, status: str, body: bytes) -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.answer(status, body, "application/json", "Retry-After: 7")

    upstream.on(path, handler)


@pytest.mark.parametrize("status", ["401 Unauthorized", "429 Too Many Requests"])
def test_a_provider_error_swallowed_because_history_held_an_older_reply_reaches_the_client_as_it_is(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str, status: str
) -> None:
    Producer(relay, name).push("an older reply", end="completed")
    top = relay.json(f"/relay/v1/streams/{name}")["top"]
    refuse(upstream, f"/{name}/chat/completions", status, b'{"error": {"message": "no more"}}')
    with RawClient(relay.port) as client:
        client.request("POST", f"/{name}/chat/completions", f"Relay-Stream: {name}", body=b"{}")
        answer = client.answer("POST")
    assert str(answer.status) == status[:3]
    assert json.loads(answer.body) == {"error": {"message": "no more"}}
    assert answer.header("retry-after") == "7"
    assert relay.json(f"/relay/v1/streams/{name}")["top"] == top


@pytest.mark.parametrize("status", ["401 Unauthorized", "429 Too Many Requests"])
@pytest.mark.parametrize("asked", ["respond-async", "upstream"])
def test_a_provider_error_of_a_call_that_relay_makes_itself_reaches_the_reader_and_fails_that_run_alone(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str, status: str, asked: str
) -> None:
    older = Producer(relay, name)
    older.push("an older reply", end="completed")
    refuse(upstream, f"/{name}/chat/completions", status, b'{"error": {"message": "no more"}}')
    if asked == "respond-async":
        with RawClient(relay.port) as client:
            wish = (f"Relay-Stream: {name}", "Prefer: respond-async")
            client.request("POST", f"/{name}/chat/completions", *wish, body=b"{}")
            started = json.loads(client.answer("POST").body)
    else:
        called = {"method": "POST", "path": f"/{name}/chat/completions", "body": {}}
        started = ask(relay.port, "POST", f"{name}/runs", {"upstream": called}).json
    with events_of(relay, name, f"run={started['run']}") as tab:
        seen = rest_of(tab)
    ended = next(block.control for block in seen if block.control and block.control["type"] == "run.ended")
    assert (ended["status"], ended["reason"]) == ("failed", "upstream_error")
    assert status[:3] in ended["error"]
    assert "no more" in ended["error"]
    runs = {run["run"]: run["status"] for run in relay.json(f"/relay/v1/streams/{name}/runs")["runs"]}
    assert runs == {older.run: "completed", started["run"]: "failed"}
    assert transcript(relay, name, older.run)["text"] == "an older reply"
    assert transcript(relay, name, started["run"])["text"] == ""


def test_an_error_in_the_midst_of_a_stream_is_shown_and_fails_that_run_alone(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    Producer(relay, name).push("an older reply", end="completed")
    error = b'data: {"error": {"message": "overloaded", "code": 429}}\n\n'
    agent(upstream, f"/{name}/chat/completions", [chunk_of("part"), error], [DONE]).open()
    with Reading(f"{relay.url}/{name}/chat/completions", Relay_Stream=name) as page:
        shown = [block.data for block in rest_of(page)]
    record = whole_run(relay, name)
    assert record.outcome == ("failed", "upstream_error")
    assert record.ended["error"] == "overloaded"
    assert shown == record.texts
    assert shown[-1] == error.decode()[6:].strip()


@pytest.mark.parametrize("route", ["proxied", "pushed"])
def test_a_completion_without_any_text_is_counted(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str, route: str
) -> None:
    metric = "relay_runs_completed_without_text_total"
    before = relay.metric(metric)
    if route == "proxied":
        agent(upstream, f"/{name}/chat/completions", [chunk_of("")], [DONE]).open()
        with Reading(f"{relay.url}/{name}/chat/completions", Relay_Stream=name) as page:
            page.read()
    else:
        Producer(relay, name, dialect="openai-chat").push("[DONE]", end="completed")
    whole_run(relay, name)
    assert relay.metric(metric) == before + 1


# Runs that were left open


def test_p7_a_turn_left_open_after_the_consumer_broke_off_goes_on_to_its_end(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    gate = agent(upstream, f"/{name}", [b"data: one\n\n"], [b"data: two\n\n"])
    with Reading(f"{relay.url}/{name}", Relay_Stream=name) as page:
        page.take(1)
    gate.open()
    record = whole_run(relay, name)
    assert record.texts == ["one", "two"]
    assert record.outcome == ("completed", "upstream_end")


@pytest.mark.parametrize("named", [False, True])
def test_p3_a_turn_whose_producer_broke_off_in_the_midst_of_its_body_ends_once(
    relay: RelayProcess, name: str, named: bool
) -> None:
    """At once if nobody can go on with it, else when nobody did for its idle timeout."""
    query = "&run=mine&idle_timeout_s=0.3" if named else ""
    target = f"/relay/v1/streams/{name}/runs?end=completed{query}"
    with LongBody(relay.port, target, "application/x-ndjson") as body:
        body.send(b'{"data":"one"}\n{"data":"two"}\n')  # in one piece, so that nothing is late
        with events_of(relay, name) as tab:
            while "two" not in kinds(tab.take(1)):
                pass
    record = whole_run(relay, name)
    assert record.texts == ["one", "two"]
    assert record.outcome == (("lost", "idle_timeout") if named else ("failed", "upstream_truncated"))


@pytest.mark.parametrize("route", ["proxied", "one request"])
def test_p3_a_turn_left_streaming_for_ever_after_the_process_died_is_lost_within_the_lease(
    leased: RelayProcess,
    fresh_journal: Callable[[], str],
    upstream: ScriptedUpstream,
    receiver: Receiver,
    name: str,
    route: str,
) -> None:
    """Text that was delivered is in the transcript, which is handed over under the run's name."""
    url = fresh_journal()
    settings: dict[str, Any] = {"journal": url, "upstream": upstream.url} | LEASED | receiver.settings
    dying = RelayProcess.start(**settings)
    try:
        if route == "proxied":
            agent(upstream, f"/{name}/chat/completions", [chunk_of("one"), chunk_of(" two")])
            with Reading(f"{dying.url}/{name}/chat/completions", Relay_Stream=name) as page:
                run, dialect, shown = page.headers["relay-run"], "openai-chat", page.take(2)
                dying.kill()
        else:
            target = f"/relay/v1/streams/{name}/runs?end=completed"
            with LongBody(dying.port, target, "application/x-ndjson") as body:
                body.lines("one", " two")
                with events_of(dying, name, "control=none") as tab:
                    dialect, shown = "raw", tab.take(2)
                run = dying.json(f"/relay/v1/streams/{name}")["open_runs"][0]
                dying.kill()
    finally:
        dying.kill()
    surviving = leased if url.startswith("redis") else RelayProcess.start(**settings)
    try:
        record = whole_run(surviving, name)
        assert record.outcome == ("lost", "owner_lost")
        assert record.ended["error"]
        lost = transcript(surviving, name, run)
        assert lost["text"] == text_of(dialect, shown) == "one two"
        assert receiver.handed_over(run) == lost
    finally:
        if surviving is not leased:
            surviving.stop()


@pytest.mark.parametrize("error", ["", " \n\t ", None, "x" * 60_000, "é" * 1_000_000])
def test_p3_a_turn_left_open_because_the_error_text_was_blank_or_megabytes_long_has_a_bounded_one(
    relay: RelayProcess, name: str, error: str | None
) -> None:
    producer = Producer(relay, name)
    producer.push("one")
    answer = producer.ask("end", {"status": "failed", "error": error})
    assert answer.status == 200, answer
    ended = whole_run(relay, name).ended
    assert (ended["status"], ended["reason"]) == ("failed", "producer_failed")
    check_error(ended["error"], error or "")


@pytest.mark.parametrize("error", ["", " \n", "x" * 900_000, "é" * 2_000_000])
def test_p3_a_turn_whose_providers_error_was_blank_or_megabytes_long_has_a_bounded_one(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str, error: str
) -> None:
    refuse(upstream, f"/{name}", "500 Internal Server Error", error.encode())
    called = {"method": "POST", "path": f"/{name}", "body": {}}
    ask(relay.port, "POST", f"{name}/runs", {"upstream": called})
    ended = whole_run(relay, name).ended
    assert (ended["status"], ended["reason"]) == ("failed", "upstream_error")
    check_error(ended["error"], error)


def check_error(told: str, given: str) -> None:
    assert told.strip()
    assert len(told.encode()) <= ERROR_MAX_BYTES
    if len(given) > ERROR_MAX_BYTES:
        assert told.endswith(ERROR_CUT_MARK)
        assert given[:1000] in told


def test_p3_a_healthy_slow_turn_is_not_taken_for_one_that_was_left(
    leased: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    """Silent for several leases: an agent whose relay lives, a producer whose one request is open, and one
    that says now and then that it is there. A fourth falls silent, and is lost."""
    relay = leased

    def is_open(producer: Producer) -> bool:
        return bool(relay.json(f"/relay/v1/streams/{producer.stream}")["open_runs"])

    gate = agent(upstream, f"/{name}-a", [b"data: one\n\n"], [b"data: two\n\n"])
    target = f"/relay/v1/streams/{name}-b/runs?end=completed"
    with (
        Reading(f"{relay.url}/{name}-a", Relay_Stream=f"{name}-a") as page,
        LongBody(relay.port, target, "application/x-ndjson") as body,
    ):
        page.take(1)
        body.lines("one")
        waiting = Producer(relay, f"{name}-c", idle_timeout_s=2)
        waiting.push("one")
        began = time.monotonic()
        silent = [Producer(relay, f"{name}-d{n}", idle_timeout_s=0.9) for n in range(2)]
        while time.monotonic() - began < 3 * 0.9 or any(map(is_open, silent)):
            assert waiting.ask("heartbeat?wait=0.2").json["status"] == "open"
            assert time.monotonic() - began < DEADLINE_S, "who fell silent is not lost"
        for producer in silent:
            assert whole_run(relay, producer.stream).outcome == ("lost", "idle_timeout")
            assert waiting.ask("heartbeat").json["status"] == "open"
        gate.open()
        body.lines("two")
        assert body.finish().status == 201
        waiting.push("two", end="completed")
        rest_of(page)
    for letter in "abc":
        record = whole_run(relay, f"{name}-{letter}")
        assert record.texts == ["one", "two"]
        assert record.ended["status"] == "completed"
