"""The whole application at its edges: a journal away, error shapes, compression."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from producing import Producer
from raw_client import RawClient, ask
from reading import Reading
from redis_server import RedisServer
from relay_process import RelayProcess
from run_record import whole_run
from scripted_upstream import Exchange, ScriptedUpstream
from tcp_proxy import TcpProxy

# --- a journal away -----------------------------------------------------------------------------------


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
