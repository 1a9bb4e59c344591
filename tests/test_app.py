"""The whole application at its edges: resume ids, browsers, wire discipline, error shapes, a journal away."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from producing import Producer
from raw_client import RawAnswer, RawClient
from reading import Reading
from redis_server import RedisServer
from relay_process import RelayProcess
from run_record import whole_run
from scripted_upstream import Exchange, ScriptedUpstream
from tcp_proxy import TcpProxy

BROWSER = ("Accept: text/event-stream", "Sec-Fetch-Dest: empty")


def ask(relay: RelayProcess, method: str, target: str, *headers: str, body: bytes = b"") -> RawAnswer:
    with RawClient(relay.port) as client:
        client.request(method, target, *headers, body=body)
        return client.answer(method)


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


@pytest.fixture
def own_redis() -> Iterator[RedisServer]:
    server = RedisServer.start()
    yield server
    server.stop()


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


def test_readers_hear_heartbeats_while_the_journal_gives_no_answer(
    own_redis: RedisServer, upstream: ScriptedUpstream, name: str
) -> None:
    gate = upstream.gate()

    async def handler(exchange: Exchange) -> None:
        await exchange.head()
        await exchange.chunk(b"data: one\n\n")
        await gate.wait()
        await exchange.end()

    upstream.on(f"/{name}", handler)
    with RelayProcess.start(
        journal=own_redis.url(), upstream=upstream.url, heartbeat_s=0.05, quiet_check_s=0.05,
        journal_timeout_s=600,
    ) as relay, Reading(f"{relay.url}/{name}") as reading:  # fmt: skip
        heartbeats = (line for line in reading.lines() if line == ": hb")
        next(heartbeats)
        own_redis.pause()
        for _ in range(20):  # far more than until the quiet stream is looked at, which waits for an answer
            next(heartbeats)
        own_redis.resume()
        gate.open()
        for _ in heartbeats:
            pass  # to the end of an answer that is whole


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


def test_p3_a_run_whose_opening_was_not_answered_ends_when_the_journal_is_back(
    own_redis: RedisServer, upstream: ScriptedUpstream, name: str
) -> None:
    """The journal took the opening, relay did not learn of it."""
    upstream.on_stream(f"/{name}", [b"data: one\n\n"])
    muted = threading.Event()

    def command(data: bytes) -> bytes:
        # Not sooner: what else is asked of Redis would wait in vain first, and no opening be sent at all.
        if name.encode() in data and b"run.started" in data:
            muted.set()
        return data

    def reply(data: bytes) -> bytes:
        return b"" if muted.is_set() else data

    with (
        TcpProxy.running(own_redis.port, to_client=reply) as proxy,
        RelayProcess.start(
            journal=f"redis://127.0.0.1:{proxy.port}/0", upstream=upstream.url, journal_timeout_s=1
        ) as relay,
    ):
        assert ask(relay, "GET", f"/{name}").status == 200  # Redis knows the scripts from now on
        proxy.to_server = command
        answer = ask(relay, "POST", f"/{name}", f"Relay-Stream: {name}", body=b"{}")
        assert answer.problem["code"] == "journal_unavailable"
        assert muted.is_set()
        proxy.to_server = bytes
        proxy.cut_all()  # or what comes next would be taken for the replies that were swallowed
        muted.clear()
        record = whole_run(relay, name)
    assert record.outcome == ("lost", "journal_lost")
    assert record.texts == []


@pytest.mark.parametrize("held", ["held", "not held"])
def test_p3_a_run_whose_journal_was_rewound_goes_on_with_all_its_frames_or_ends(
    own_redis: RedisServer, upstream: ScriptedUpstream, name: str, held: str
) -> None:
    """What the journal had accepted is gone from it, as after a failover to a replica that was behind."""
    gate = upstream.gate()

    async def handler(exchange: Exchange) -> None:
        await exchange.head()
        for word in (b"one", b"two"):
            await gate.wait()
            await exchange.chunk(b"data: " + word + b"\n\n")
        await exchange.end()

    upstream.on(f"/{name}", handler)
    settings = {} if held == "held" else {"held_max_bytes": 0}
    with (
        RelayProcess.start(journal=own_redis.url(), upstream=upstream.url, **settings) as relay,
        RawClient(relay.port) as client,
        own_redis.client() as redis,
    ):
        client.request("GET", f"/{name}", f"Relay-Stream: {name}")
        client.read_until(b"\r\n\r\n")
        before = {key: redis.dump(key) for key in redis.scan_iter(f"relay:{{{name}}}:*")}
        gate.pass_one()
        client.read_until(b"data: one\n\n")
        with redis.pipeline(transaction=True) as rewind:  # in between there would be no such stream
            for key in redis.scan_iter(f"relay:{{{name}}}:*"):
                rewind.delete(key)
            for key, value in before.items():
                rewind.restore(key, 0, value)
            rewind.execute()
        gate.pass_one()
        if held == "held":
            assert b"data: one" not in client.read_until(b"data: two\n\n")
        record = whole_run(relay, name)
    if held == "held":
        assert record.outcome == ("completed", "upstream_end")
        assert record.texts == ["one", "two"]
    else:
        assert record.outcome == ("lost", "journal_lost")


# --- error shapes -------------------------------------------------------------------------------------


def test_every_refusal_is_a_problem_document_with_its_code(relay: RelayProcess, name: str) -> None:
    refused = {
        (answer.status, answer.problem["code"])
        for answer in (
            ask(relay, "GET", "/relay/none"),
            ask(relay, "POST", "/relay/v1/streams"),
            ask(relay, "GET", f"/relay/v1/streams/{name}"),
            ask(relay, "GET", f"/{name}", "Relay-Stream: ..", body=b""),
            ask(relay, "GET", f"/{name}", "Last-Event-ID: rly.x"),
            ask(relay, "OPTIONS", "*"),
        )
    }
    assert refused == {
        (404, "route_not_found"),
        (405, "method_not_allowed"),
        (404, "unknown_stream"),
        (400, "invalid_name"),
        (410, "resume_unknown"),
        (400, "bad_request"),
    }


def test_without_an_upstream_only_relays_own_routes_exist(fresh_journal: Callable[[], str]) -> None:
    with RelayProcess.start(journal=fresh_journal()) as relay:
        answer = ask(relay, "GET", "/x")
        assert (answer.status, answer.problem["code"]) == (404, "route_not_found")
        assert ask(relay, "GET", "/relay/healthz").status == 200


# --- compression --------------------------------------------------------------------------------------


def test_streams_are_compressed_for_who_accepts_it_and_nobody_else(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    upstream.on_stream(f"/{name}", [b"data: one\n\n", b"data: two\n\n"])
    for accepted, coding in (("gzip", "gzip"), ("identity", None), ("gzip;q=0", None)):
        with Reading(f"{relay.url}/{name}", Accept_Encoding=accepted) as proxied:
            assert proxied.headers.get("content-encoding") == coding
            assert [block.data for block in proxied.frames()] == ["one", "two"]
            stream, last_id = proxied.headers["relay-stream"], proxied.last_id
        with Reading(
            f"{relay.url}/relay/v1/streams/{stream}/events?run=latest", Accept_Encoding=accepted
        ) as events:
            assert events.headers.get("content-encoding") == coding
            assert [block.data for block in events.frames()] == ["one", "two"]
        first = last_id.replace(last_id.split(".")[-1], "0-0")
        with Reading(f"{relay.url}/{name}", Last_Event_ID=first, Accept_Encoding=accepted) as resumed:
            assert resumed.headers.get("content-encoding") == coding
            assert [block.data for block in resumed.frames()] == ["one", "two"]


def test_unless_told_so_relay_compresses_nothing_for_its_own_machine(tmp_path: Path) -> None:
    relay = RelayProcess.start(journal=f"sqlite:///{tmp_path}/relay.db", compress="remote")
    try:
        Producer(relay, "s").push("one", end="completed")
        url = f"{relay.url}/relay/v1/streams/s/events?run=latest"
        with Reading(url, Accept_Encoding="gzip") as events:
            assert "content-encoding" not in events.headers
            assert [block.data for block in events.frames()] == ["one"]
    finally:
        relay.stop()
