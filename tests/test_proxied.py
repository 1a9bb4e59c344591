"""Upstream's paths: resume ids, wire discipline, browsers, a journal away."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from raw_client import ask
from reading import Reading
from redis_server import RedisServer
from relay_process import RelayProcess
from scripted_upstream import Exchange, ScriptedUpstream

BROWSER = ("Accept: text/event-stream", "Sec-Fetch-Dest: empty")


# --- resume ids ---------------------------------------------------------------------------------------


def test_p9_any_request_with_a_resume_id_resumes_its_run_and_never_reaches_upstream(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    upstream.on_stream(f"/{name}", [b"data: %d\n\n" % n for n in range(5)])
    with Reading(f"{relay.url}/{name}") as reading:
        blocks = reading.frames()
    for position, block in enumerate(blocks[:-1]):
        for method, path in (("GET", f"/{name}"), ("POST", "/somewhere/else")):
            answer = ask(relay, method, path, f"Last-Event-ID: {block.id}")
            assert re.findall(rb"data: (\d)", answer.body) == [b"%d" % n for n in range(position + 1, 5)]
            assert answer.whole
    assert ask(relay, "GET", f"/{name}", f"Last-Event-ID: {blocks[-1].id}").status == 204
    assert upstream.calls(f"/{name}") == 1
    assert upstream.calls("/somewhere/else") == 0


@pytest.mark.parametrize(
    "resume_id",
    [
        "rly.",
        "rly.x",
        "rly.{}",
        "rly.{}.",
        "rly.{}.1",
        "rly.{}.1-2-3",
        "rly.{}.01-2",
        "rly.{}.-1-2",
        "rly.{}.\xff",
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_forged_resume_id_is_never_a_new_answer(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str, resume_id: str, method: str
) -> None:
    upstream.on_stream(f"/{name}", [b"data: one\n\n"])
    forged = resume_id.format("A" * 32)
    answer = ask(relay, method, f"/{name}", f"Last-Event-ID: {forged}")
    assert (answer.status, answer.problem["code"]) == (410, "resume_unknown")
    well_formed = ask(relay, method, f"/{name}", f"Last-Event-ID: rly.{'A' * 32}.1-2")
    assert (well_formed.status, well_formed.problem["code"]) == (410, "resume_unknown")
    assert upstream.calls(f"/{name}") == 0


def test_an_expired_resume_id_is_said_to_be_unknown(
    fresh_journal: Callable[[], str], upstream: ScriptedUpstream, name: str
) -> None:
    upstream.on_stream(f"/{name}", [b"data: one\n\n", b"data: two\n\n"])
    with RelayProcess.start(journal=fresh_journal(), upstream=upstream.url, retention_s=1) as relay:
        with Reading(f"{relay.url}/{name}") as reading:
            cursor = reading.take(1)[0].id
            stream = reading.headers["relay-stream"]
        relay.until(lambda: relay.get(f"/relay/v1/streams/{stream}")[0] == 404, "the stream is dropped")
        answer = ask(relay, "GET", f"/{name}", f"Last-Event-ID: {cursor}")
    assert (answer.status, answer.problem["code"]) == (410, "resume_unknown")
    assert upstream.calls(f"/{name}") == 1


@pytest.mark.parametrize("last_event_id", ["42", "42-1763726400860", "rly", "RLY.x.1-2", "msg_rly.x"])
def test_another_last_event_id_is_upstreams_business(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str, last_event_id: str
) -> None:
    upstream.on_stream(f"/{name}", [b"data: one\n\n"])
    answer = ask(relay, "GET", f"/{name}", f"Last-Event-ID: {last_event_id}")
    assert b"data: one" in answer.body
    (received,) = upstream.requests(f"/{name}")
    assert received.header("last-event-id") == last_event_id


# --- wire discipline ----------------------------------------------------------------------------------


@contextmanager
def beating(journal: str, upstream: ScriptedUpstream) -> Iterator[RelayProcess]:
    with RelayProcess.start(journal=journal, upstream=upstream.url, heartbeat_s=0.05) as relay:
        yield relay


def test_a_heartbeat_is_one_bare_comment_line_and_no_event_is_added(
    fresh_journal: Callable[[], str], upstream: ScriptedUpstream, name: str
) -> None:
    gate = upstream.gate()

    async def handler(exchange: Exchange) -> None:
        await exchange.head()
        await exchange.chunk(b"data: one\n\n")
        await gate.wait()
        await exchange.chunk(b"event: e\ndata: two\n\n")
        await exchange.end()

    upstream.on(f"/{name}", handler)
    with beating(fresh_journal(), upstream) as relay, Reading(f"{relay.url}/{name}") as reading:
        lines = []
        for line in reading.lines():
            lines.append(line)
            if lines[-2:] == [": hb", ": hb"]:
                gate.open()
    shown = [re.sub(r"^id: rly\..*", "id", line) for line in lines if line != ": hb"]
    assert shown == ["id", "data: one", "", "id", "event: e", "data: two", ""]


# --- browsers -----------------------------------------------------------------------------------------


def test_a_browsers_event_source_is_primed_before_upstreams_first_event(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    gate = upstream.gate()

    async def handler(exchange: Exchange) -> None:
        await exchange.head()
        await gate.wait()
        await exchange.chunk(b"data: one\n\n")
        await exchange.end()

    upstream.on(f"/{name}", handler)
    with Reading(f"{relay.url}/{name}", Accept="text/event-stream", Sec_Fetch_Dest="empty") as reading:
        (prime,) = reading.take(1)
    assert re.fullmatch(r"rly\.[\w-]+\.0-0", prime.id)
    assert prime.event
    assert prime.data
    gate.open()
    with Reading(
        f"{relay.url}/{name}", Accept="text/event-stream", Sec_Fetch_Dest="empty", Last_Event_ID=prime.id
    ) as reading:
        assert [block.data for block in reading.frames()] == ["one"]
    assert upstream.calls(f"/{name}") == 1


@pytest.mark.parametrize(
    ("method", "headers"),
    [
        ("GET", ["Accept: text/event-stream"]),
        ("GET", ["Sec-Fetch-Dest: empty"]),
        ("GET", ["Accept: application/json, text/event-stream", "Sec-Fetch-Dest: empty"]),
        ("POST", [*BROWSER]),
    ],
)
def test_nothing_else_is_primed(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str, method: str, headers: list[str]
) -> None:
    upstream.on_stream(f"/{name}", [b"data: one\n\n"])
    answer = ask(relay, method, f"/{name}", *headers)
    assert answer.body.count(b"id: ") == answer.body.count(b"data: ") == 1


# --- a journal away -----------------------------------------------------------------------------------


def test_a_stream_that_begins_while_the_journal_is_away_is_refused_and_upstream_closed(
    own_redis: RedisServer, upstream: ScriptedUpstream, name: str
) -> None:
    closed = threading.Event()

    async def handler(exchange: Exchange) -> None:
        await exchange.head()
        await exchange.closed()
        closed.set()

    async def plain(exchange: Exchange) -> None:
        await exchange.answer("200 OK", b"{}")

    upstream.on(f"/{name}", handler)
    upstream.on(f"/{name}/plain", plain)
    with RelayProcess.start(
        journal=own_redis.url(), upstream=upstream.url, journal_timeout_s=1, journal_deadline_s=1
    ) as relay:
        own_redis.kill()
        answer = ask(relay, "POST", f"/{name}", body=b"{}")
        assert (answer.status, answer.problem["code"]) == (503, "journal_unavailable")
        assert answer.header("retry-after") is not None
        assert closed.wait(60)
        keyed = ask(relay, "POST", f"/{name}", "Idempotency-Key: k", body=b"{}")
        assert keyed.problem["code"] == "journal_unavailable"
        assert ask(relay, "GET", f"/{name}/plain").status == 200
        browser = ask(relay, "GET", f"/{name}", *BROWSER)
        assert browser.status == 200
        assert re.fullmatch(rb"retry: \d+\n\n", browser.body)
        assert browser.whole
        own_redis.restart()


def test_a_stream_that_begins_while_the_journal_is_away_may_pass_unjournaled_and_says_so(
    own_redis: RedisServer, upstream: ScriptedUpstream, name: str
) -> None:
    upstream.on_stream(f"/{name}", [b"id: up-1\ndata: one\n\n"])
    with RelayProcess.start(
        journal=own_redis.url(), upstream=upstream.url, journal_timeout_s=1, journal_down="passthrough"
    ) as relay:
        own_redis.kill()
        for key in ([], ["Idempotency-Key: k"]):
            answer = ask(relay, "POST", f"/{name}", *key, body=b"{}")
            assert (answer.status, answer.header("relay-journal")) == (200, "down")
            assert answer.body == b"id: up-1\ndata: one\n\n"
            assert answer.whole
        own_redis.restart()
