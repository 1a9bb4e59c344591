"""Every format through a real relay: how its run ends, what a client is told, and what is kept of it."""

from __future__ import annotations

from typing import Any

import pytest
from raw_client import RawClient
from reading import Reading
from recorded_answers import AG_UI, AI_SDK, ANSWERS, Answer, sse
from relay_process import RelayProcess
from run_record import RunRecord, whole_run
from scripted_upstream import Exchange, ScriptedUpstream

from relay.dialects.detect import BY_NAME
from relay.frame import Event
from relay.sse import EventStreamParser

each_answer = pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: answer.dialect)


def events_of(body: bytes) -> list[Event]:
    return [Event(name, data) for name, data, _ in EventStreamParser(2**20).feed(body)]


def ask(
    relay: RelayProcess,
    upstream: ScriptedUpstream,
    name: str,
    answer: Answer,
    events: list[bytes],
    *headers: str,
    broken: bool = False,
) -> tuple[list[Event], RunRecord]:
    """What a client saw of such an answer, and what was journaled."""

    async def handler(exchange: Exchange) -> None:
        await exchange.head("200 OK", "text/event-stream", *answer.headers, *headers)
        for event in events:
            await exchange.chunk(event)
        if broken:
            await exchange.send(b"fff\r\ndata: {")
            exchange.writer.close()
        else:
            await exchange.end()

    upstream.on(f"/{name}{answer.path}", handler)
    with RawClient(relay.port) as client:
        client.request("POST", f"/{name}{answer.path}", f"Relay-Stream: {name}", body=b"{}")
        received = client.answer()
    assert received.status == 200
    assert received.whole
    return events_of(received.body), whole_run(relay, name)


def transcript(relay: RelayProcess, name: str) -> dict[str, Any]:
    run = relay.json(f"/relay/v1/streams/{name}/runs")["runs"][0]["run"]
    document: dict[str, Any] = relay.json(f"/relay/v1/streams/{name}/runs/{run}/transcript")
    return document


@each_answer
def test_a_whole_answer_is_completed_and_nothing_is_added(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str, answer: Answer
) -> None:
    seen, record = ask(relay, upstream, name, answer, answer.events)
    assert seen == events_of(b"".join(answer.events))
    assert record.outcome == ("completed", "upstream_end")
    kept = transcript(relay, name)
    assert (kept["dialect"], kept["text"], kept["parts"]) == (answer.dialect, "Hello", answer.parts)


TRUNCATIONS = [
    pytest.param(answer, broken, id=f"{answer.dialect}-{'breaks' if broken else 'ends early'}")
    for answer in ANSWERS
    for broken in (False, True)
    if broken or BY_NAME[answer.dialect].needs_terminal
]


@pytest.mark.parametrize(("answer", "broken"), TRUNCATIONS)
def test_a_truncated_answer_ends_with_the_formats_own_error(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str, answer: Answer, broken: bool
) -> None:
    dialect = BY_NAME[answer.dialect]
    seen, record = ask(relay, upstream, name, answer, answer.events[: answer.shown], broken=broken)
    assert seen[:-1] == events_of(b"".join(answer.events[: answer.shown]))
    assert dialect.read(seen[-1]).error == record.ended["error"]
    assert record.outcome == ("failed", "upstream_truncated")
    assert transcript(relay, name)["text"] == "Hel"


@each_answer
def test_an_error_of_upstreams_is_passed_on_once(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str, answer: Answer
) -> None:
    sent = [*answer.events[: answer.shown], answer.error]
    seen, record = ask(relay, upstream, name, answer, [*sent, answer.events[answer.shown - 1]])
    assert seen == events_of(b"".join(sent))
    assert record.outcome == ("failed", "upstream_error")
    assert record.ended["error"] == "boom"


ENDINGS = [
    pytest.param(answer, last, outcome, id=f"{answer.dialect}-{number}-{outcome[1]}")
    for answer in ANSWERS
    for number, (last, outcome) in enumerate(answer.endings)
]


@pytest.mark.parametrize(("answer", "last", "outcome"), ENDINGS)
def test_another_last_word_is_another_ending(
    relay: RelayProcess,
    upstream: ScriptedUpstream,
    name: str,
    answer: Answer,
    last: list[bytes],
    outcome: tuple[str, str],
) -> None:
    sent = [*answer.events[: answer.shown], *last]
    seen, record = ask(relay, upstream, name, answer, sent)
    assert record.outcome == outcome
    if outcome[1] == "upstream_truncated":
        seen = seen[:-1]
    assert seen == events_of(b"".join(sent)), "what upstream told, relay does not tell again"


@each_answer
def test_a_cancel_tells_the_client_in_its_format_and_keeps_the_text(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str, answer: Answer
) -> None:
    gate = upstream.gate()

    async def handler(exchange: Exchange) -> None:
        await exchange.head("200 OK", "text/event-stream", *answer.headers)
        for event in answer.events[: answer.shown]:
            await exchange.chunk(event)
        await gate.wait()
        await exchange.closed()

    upstream.on(f"/{name}{answer.path}", handler)
    with RawClient(relay.port) as client, RawClient(relay.port) as another:
        client.request("POST", f"/{name}{answer.path}", f"Relay-Stream: {name}", body=b"{}")
        gate.await_arrival()
        await_frames(relay, name, answer.shown)
        another.request("POST", f"/relay/v1/streams/{name}/cancel", "Content-Length: 0")
        assert another.answer().status == 200
        received = client.answer()
    gate.open()
    assert received.whole
    signal = BY_NAME[answer.dialect].read(events_of(received.body)[-1])
    if answer is AI_SDK:
        assert signal.reason == "upstream_cancelled"  # an `abort` chunk, as its servers send it
    else:
        assert signal.error
    assert whole_run(relay, name).outcome == ("cancelled", "client_cancel")
    assert transcript(relay, name)["text"] == "Hel"


def await_frames(relay: RelayProcess, name: str, count: int) -> None:
    """Until so many frames of upstream's are journaled: the events route says when."""
    with Reading(f"{relay.url}/relay/v1/streams/{name}/events?wait=60&control=none") as reading:
        for number, _ in enumerate(reading.blocks(), 1):
            if number == count:
                return
    raise AssertionError("the stream ended")


def test_what_breaks_after_the_finish_is_whole(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    seen, record = ask(relay, upstream, name, AG_UI, AG_UI.events, broken=True)
    assert seen == events_of(b"".join(AG_UI.events))
    assert record.outcome == ("completed", "upstream_end")


@pytest.mark.parametrize("by", ["request", "upstream"])
def test_a_dialect_can_be_named(relay: RelayProcess, upstream: ScriptedUpstream, name: str, by: str) -> None:
    """What would be recognised as nothing is read as what it is said to be."""
    answered = ("Relay-Dialect: ai-sdk",) if by == "upstream" else ()
    asked = ("Relay-Dialect: ai-sdk",) if by == "request" else ()

    async def handler(exchange: Exchange) -> None:
        assert exchange.received.header("relay-dialect") is None
        await exchange.head("200 OK", "text/event-stream", *answered)
        await exchange.chunk(sse({"type": "start"}))
        await exchange.end()

    upstream.on(f"/{name}", handler)
    with RawClient(relay.port) as client:
        client.request("POST", f"/{name}", f"Relay-Stream: {name}", *asked, body=b"{}")
        received = client.answer()
    assert received.header("relay-dialect") is None
    assert whole_run(relay, name).outcome == ("failed", "upstream_truncated")


def test_a_dialect_that_is_none_is_refused(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    upstream.on_stream(f"/{name}", [sse({})])
    with RawClient(relay.port) as client:
        client.request("POST", f"/{name}", "Relay-Dialect: klingon", body=b"{}")
        refused = client.answer()
    assert (refused.status, refused.problem["code"]) == (400, "invalid_parameter")
    assert upstream.calls(f"/{name}") == 0


def test_a_dialect_of_upstreams_that_is_none_is_a_bad_answer(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.head("200 OK", "text/event-stream", "Relay-Dialect: klingon")
        await exchange.end()

    upstream.on(f"/{name}", handler)
    with RawClient(relay.port) as client:
        client.request("POST", f"/{name}", body=b"{}")
        refused = client.answer()
    assert (refused.status, refused.problem["code"]) == (502, "upstream_invalid")
