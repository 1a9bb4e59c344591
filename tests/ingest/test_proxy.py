"""The transparent proxy: what passes, what becomes a run, whose it is, and how long it lives."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import hashlib
import json
import signal
import threading
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from anybody import ANYBODY
from audience import Audience
from own_journal import own_journal
from raw_client import RawAnswer, RawClient
from reading import Reading
from redis_server import RedisServer
from relay_process import RelayProcess, eventually
from rewinding import rewinding
from run_record import run_of, whole_run
from scripted_upstream import Exchange, Gate, ScriptedUpstream

from relay.cursor import ORIGIN
from relay.errors import Busy, JournalUnavailable
from relay.ingest.owned import OwnedRuns
from relay.ingest.proxy import Call, Passed, Proxy, RunAnswer
from relay.ingest.upstream import Upstream
from relay.journal.base import Opened, RunOpening
from relay.settings import Settings


def ask(relay: RelayProcess, method: str, target: str, *headers: str, body: bytes = b"") -> RawAnswer:
    with RawClient(relay.port) as client:
        client.request(method, target, *headers, body=body)
        return client.answer(method)


def held_stream(upstream: ScriptedUpstream, path: str, first: bytes, rest: bytes) -> Gate:
    """A stream whose rest waits for the gate."""
    gate = upstream.gate()

    async def handler(exchange: Exchange) -> None:
        await exchange.head()
        if first:
            await exchange.chunk(first)
        await gate.wait()
        await exchange.chunk(rest)
        await exchange.end()

    upstream.on(path, handler)
    return gate


# --- what is not a stream passes untouched ------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND"])
def test_method_target_headers_and_body_reach_upstream_as_they_are(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str, method: str
) -> None:
    body = bytes(range(256))
    target = f"/{name}//a/../b%2Fc%20d;x=1?q=%C3%A9&q=[2]&empty=&r=a+b%2B"

    async def handler(exchange: Exchange) -> None:
        await exchange.answer("200 OK", exchange.received.body, "application/x-mine; a=b")

    upstream.on(target.partition("?")[0], handler)
    headers = ["Cookie: a=1; b=2", "X-Twice: 1", "X-Twice: 2", "Authorization: Bearer t", "X-Empty:"]
    answer = ask(relay, method, target, *headers, "User-Agent: me/1", "Content-Type: a/b", body=body)
    assert (answer.status, answer.body) == (200, body)
    assert answer.header("content-type") == "application/x-mine; a=b"
    received = upstream.received[-1]
    assert (received.method, received.target, received.body) == (method, target, body)
    sent = [header for header in received.headers if header[0] != "accept-encoding"]
    assert sorted(sent) == sorted(
        [
            ("host", "localhost"),
            ("cookie", "a=1; b=2"),
            ("x-twice", "1"),
            ("x-twice", "2"),
            ("authorization", "Bearer t"),
            ("x-empty", ""),
            ("user-agent", "me/1"),
            ("content-type", "a/b"),
            ("content-length", "256"),
        ]
    )


def test_a_request_without_a_body_gets_none(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    ask(relay, "GET", f"/{name}", "Idempotency-Key: k")
    received = upstream.received[-1]
    assert received.header("content-length") is None
    assert received.header("transfer-encoding") is None


def test_an_answer_that_is_no_stream_is_passed_on_as_it_comes(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    """Upstream sends its next piece only after the first one arrived, so nothing is held back."""

    async def handler(exchange: Exchange) -> None:
        await exchange.head("200 OK", "application/octet-stream")
        await exchange.chunk(b"\x00first")
        await gate.wait()
        await exchange.chunk(b"\xffsecond")
        await exchange.end()

    gate = upstream.gate()
    upstream.on(f"/{name}", handler)
    with RawClient(relay.port) as client:
        client.request("POST", f"/{name}", "Transfer-Encoding: chunked")
        client.send(b"3\r\nabc\r\n")
        client.send(b"2\r\nde\r\n0\r\n\r\n")
        client.read_until(b"\x00first")
        gate.open()
        client.read_until(b"\xffsecond")
    assert upstream.received[-1].body == b"abcde"


def test_a_large_body_arrives_whole(relay: RelayProcess, upstream: ScriptedUpstream, name: str) -> None:
    body = b"0123456789abcdef" * 500_000

    async def handler(exchange: Exchange) -> None:
        await exchange.answer("200 OK", exchange.received.body)

    upstream.on(f"/{name}", handler)
    answer = ask(relay, "POST", f"/{name}", body=body)
    assert hashlib.sha256(answer.body).digest() == hashlib.sha256(body).digest()


@pytest.mark.parametrize("framing", ["Content-Length: 8000000", "X-Framing: none", "chunked"])
def test_a_large_answer_arrives_whole_though_upstream_has_closed_long_before(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str, framing: str
) -> None:
    body = b"0123456789abcdef" * 500_000
    closed = threading.Event()

    async def handler(exchange: Exchange) -> None:
        if framing == "chunked":
            await exchange.head("200 OK", "text/plain", "Connection: close")
            await exchange.chunk(body)
            await exchange.end()
        else:
            await exchange.send(f"HTTP/1.1 200 OK\r\n{framing}\r\nConnection: close\r\n\r\n".encode() + body)
        exchange.writer.close()
        closed.set()

    upstream.on(f"/{name}", handler)
    answer = ask(relay, "GET", f"/{name}")
    assert answer.whole
    assert hashlib.sha256(answer.body).digest() == hashlib.sha256(body).digest()
    assert closed.wait(60)


@pytest.mark.parametrize(
    ("status", "body", "headers"),
    [
        ("200 OK", b'{"a": 1}', []),
        ("301 Moved", b"", ["Location: http://elsewhere.test/x"]),
        ("307 Temporary Redirect", b"", ["Location: /relative"]),
        ("401 Unauthorized", b'{"error": "no"}', ["WWW-Authenticate: Bearer"]),
        ("404 Not Found", b"<html>", []),
        ("429 Too Many Requests", b'{"error": {"message": "slow down"}}', ["Retry-After: 7"]),
        ("500 Internal Server Error", b'{"error": "boom"}', []),
        ("206 Partial Content", b"part", ["Content-Range: bytes 0-3/10", 'ETag: "x"']),
        ("200 OK", gzip.compress(b"text" * 50, mtime=0), ["Content-Encoding: gzip", "Vary: Accept-Encoding"]),
        ("200 OK", b"x", ["Set-Cookie: a=1", "Set-Cookie: b=2; Path=/", "Cache-Control: max-age=5"]),
        ("200 OK", b"x", ["X-Text: caf\u00e9"]),
    ],
)
def test_an_answer_that_is_no_stream_passes_untouched(
    relay: RelayProcess,
    upstream: ScriptedUpstream,
    name: str,
    status: str,
    body: bytes,
    headers: list[str],
) -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.answer(status, body, "application/json", *headers)

    upstream.on(f"/{name}", handler)
    answer = ask(relay, "GET", f"/{name}", "Range: bytes=0-3")
    expected = [tuple(line.split(": ", 1)) for line in headers]
    assert answer.status == int(status[:3])
    assert answer.body == body
    assert sorted(answer.headers) == sorted(
        [
            (key.lower(), value.encode().decode("latin-1"))
            for key, value in [
                ("Content-Type", "application/json"),
                ("Content-Length", str(len(body))),
                *expected,
            ]
        ]
    )
    assert upstream.received[-1].header("range") == "bytes=0-3"
    assert upstream.calls(f"/{name}") == 1


@pytest.mark.parametrize("status", ["204 No Content", "304 Not Modified"])
@pytest.mark.parametrize("content_type", ["application/json", "text/event-stream"])
def test_an_answer_without_a_body_passes_and_leaves_the_connection_usable(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str, status: str, content_type: str
) -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.send(
            f'HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nETag: "x"\r\n\r\n'.encode()
        )

    upstream.on(f"/{name}", handler)
    with RawClient(relay.port) as client:
        for _ in range(2):
            client.request("GET", f"/{name}")
            answer = client.answer()
            assert (answer.status, answer.header("etag")) == (int(status[:3]), '"x"')
            assert answer.header("relay-run") is None


@pytest.mark.parametrize("content_type", ["application/json", "text/event-stream"])
def test_head_passes_with_the_length_upstream_gave(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str, content_type: str
) -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.send(
            f"HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\nContent-Length: 12345\r\n\r\n".encode()
        )

    upstream.on(f"/{name}", handler)
    with RawClient(relay.port) as client:
        for _ in range(2):
            client.request("HEAD", f"/{name}")
            answer = client.answer("HEAD")
            assert (answer.status, answer.header("content-length")) == (200, "12345")
            assert answer.header("relay-run") is None


def test_what_is_no_stream_needs_no_journal_entry(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.answer("500 Internal Server Error", b"data: x\n\n", "text/event-stream")

    upstream.on(f"/{name}", handler)
    answer = ask(relay, "GET", f"/{name}", f"Relay-Stream: {name}")
    assert (answer.status, answer.header("relay-run")) == (500, None)
    assert relay.get(f"/relay/v1/streams/{name}")[0] == 404


# --- streams become runs ------------------------------------------------------------------------------


def test_an_event_stream_becomes_a_run_under_upstreams_status_and_headers(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.head(
            "201 Created",
            "text/event-stream; charset=utf-8",
            "X-Mine: 1",
            "Set-Cookie: a=1",
            "Set-Cookie: b=2",
            'ETag: "x"',
            "Vary: Origin",
            "Cache-Control: max-age=9",
            "Content-Digest: sha-256=:x:",
            "Relay-Run: forged",
            "Trailer: X-T",
            "Access-Control-Allow-Origin: *",
        )
        await exchange.chunk(b"event: delta\nid: up-1\nretry: 5\n: comment\ndata: a\ndata: b\n\n")
        await exchange.end()

    upstream.on(f"/{name}", handler)
    answer = ask(relay, "POST", f"/{name}", f"Relay-Stream: {name}", body=b"{}")
    assert answer.status == 201
    run = answer.header("relay-run")
    assert run != "forged"
    assert sorted(answer.headers) == sorted(
        [
            ("content-type", "text/event-stream; charset=utf-8"),
            ("x-mine", "1"),
            ("set-cookie", "a=1"),
            ("set-cookie", "b=2"),
            ("access-control-allow-origin", "*"),
            ("vary", "Origin, Last-Event-ID, Accept-Encoding"),
            ("cache-control", "no-cache, no-store, no-transform"),
            ("x-accel-buffering", "no"),
            ("transfer-encoding", "chunked"),
            ("relay-stream", name),
            ("relay-run", run),
            ("relay-cursor", "0-0"),
        ]
    )
    lines = answer.body.decode().split("\n")
    assert lines[0].startswith("id: rly.")
    assert lines[0].rpartition("-")[0].endswith(".2")  # the second frame, behind run.started
    assert lines[1:] == ["event: delta", "data: a", "data: b", "", ""]
    assert whole_run(relay, name).outcome == ("completed", "upstream_end")


@pytest.mark.parametrize(
    "content_type",
    ["application/x-ndjson", "application/jsonl", "application/stream+json", "Application/X-NDJSON; a=b"],
)
def test_lines_become_a_run_in_their_own_format(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str, content_type: str
) -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.head("200 OK", content_type)
        await exchange.chunk(b'{"a": 1}\r\n\n{"b": ')
        await exchange.chunk("2}\n{'é'}".encode())
        await exchange.end()

    upstream.on(f"/{name}", handler)
    answer = ask(relay, "POST", f"/{name}", f"Relay-Stream: {name}", body=b"{}")
    assert answer.header("content-type") == content_type
    assert answer.body.decode() == '{"a": 1}\n{"b": 2}\n{\'é\'}\n'
    assert answer.whole
    record = whole_run(relay, name)
    assert record.texts == ['{"a": 1}', '{"b": 2}', "{'é'}"]
    assert (record.ended["frames"], record.ended["text_bytes"]) == (3, 8 + 8 + 6)


def test_p9_events_arrive_as_the_standard_reads_them(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    upstream.on_stream(
        f"/{name}",
        [
            b"\xef\xbb\xbfdata: bom\r\n\r\n",
            b"event: e\rdata:no space\r\r",
            b"data\ndata: \n\n",
            b"event: lost\n\n",
            "data: \u00fc\U0001f600\n\n".encode(),
            b"data: bad \xff utf-8\n\n",
            b": only a comment\nid: 3\nretry: 1\n\n",
            b'data: {"a":\ndata:  1}\n\n',
            b"data: never dispatched",
        ],
    )
    expected = [
        ("", "bom"),
        ("e", "no space"),
        ("", "\n"),
        ("", "\u00fc\U0001f600"),
        ("", "bad \ufffd utf-8"),
        ("", '{"a":\n 1}'),
    ]
    with Reading(f"{relay.url}/{name}", Relay_Stream=name) as reading:
        assert [(block.event, block.data) for block in reading.frames()] == expected
    record = whole_run(relay, name)
    assert [(frame.event, frame.data) for frame in record.frames] == expected


def test_a_compressed_stream_is_decoded_event_by_event(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    gate = upstream.gate()

    async def handler(exchange: Exchange) -> None:
        packer = zlib.compressobj(wbits=31)
        await exchange.head("200 OK", "text/event-stream", "Content-Encoding: gzip")
        await exchange.chunk(packer.compress(b"data: one\n\n") + packer.flush(zlib.Z_SYNC_FLUSH))
        await gate.wait()
        await exchange.chunk(packer.compress(b"data: two\n\n") + packer.flush())
        await exchange.end()

    upstream.on(f"/{name}", handler)
    with Reading(f"{relay.url}/{name}", Accept_Encoding="br") as reading:
        assert "content-encoding" not in reading.headers
        assert reading.take(1)[0].data == "one"
        gate.open()
        assert reading.take(1)[0].data == "two"
        assert run_of(relay, reading).outcome == ("completed", "upstream_end")
    assert upstream.received[-1].header("accept-encoding") == "identity"


# --- leaving is not stopping --------------------------------------------------------------------------


def test_p7_a_client_that_leaves_does_not_stop_the_run(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    gate = held_stream(upstream, f"/{name}", b"data: one\n\n", b"data: two\n\n")
    with Reading(f"{relay.url}/{name}", Relay_Stream=name) as reading:
        reading.take(1)
    gate.open()
    record = whole_run(relay, name)
    assert record.texts == ["one", "two"]
    assert record.outcome == ("completed", "upstream_end")


def test_p7_a_client_that_leaves_before_upstreams_head_does_not_stop_the_run(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    gate = upstream.gate()

    async def handler(exchange: Exchange) -> None:
        await gate.wait()
        await exchange.stream([b"data: one\n\n"])

    upstream.on(f"/{name}", handler)
    with RawClient(relay.port) as client:
        client.request("POST", f"/{name}", f"Relay-Stream: {name}", body=b"{}")
        gate.await_arrival()
    gate.open()
    assert whole_run(relay, name).texts == ["one"]


def test_a_client_that_leaves_in_its_body_takes_the_call_with_it(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    """Upstream must not take the part for the whole."""
    before = len(upstream.received)
    with RawClient(relay.port) as client:
        client.request("POST", f"/{name}", "Content-Length: 100")
        client.send(b"half")
    with RawClient(relay.port) as client:
        client.request("POST", f"/{name}", "Transfer-Encoding: chunked")
        client.send(b"4\r\nhalf\r\n")
    assert ask(relay, "GET", f"/{name}/after").status == 404
    assert [received.target for received in upstream.received[before:]] == [f"/{name}/after"]


def test_a_client_that_leaves_an_answer_that_is_no_stream_closes_it(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    closed = threading.Event()

    async def handler(exchange: Exchange) -> None:
        await exchange.head("200 OK", "application/octet-stream")
        await exchange.chunk(b"some")
        await exchange.closed()
        closed.set()

    upstream.on(f"/{name}", handler)
    with RawClient(relay.port) as client:
        client.request("GET", f"/{name}")
        client.read_until(b"some")
    assert closed.wait(60)


# --- naming -------------------------------------------------------------------------------------------


def test_without_a_name_each_answer_has_a_sealed_stream_of_its_own(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    upstream.on_stream(f"/{name}", [b"data: one\n\n"])
    first, second = ask(relay, "GET", f"/{name}"), ask(relay, "GET", f"/{name}")
    stream = first.header("relay-stream")
    assert stream != second.header("relay-stream")
    assert relay.json(f"/relay/v1/streams/{stream}")["sealed"] is True


def test_upstreams_name_wins_over_the_callers_and_comes_with_metadata(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.head(
            "200 OK", "text/event-stream", f"Relay-Stream: {name}-up", 'Relay-Metadata: {"user": "u1"}'
        )
        await exchange.end()

    upstream.on(f"/{name}", handler)
    answer = ask(relay, "GET", f"/{name}", f"Relay-Stream: {name}-caller")
    assert answer.header("relay-stream") == f"{name}-up"
    assert answer.header("relay-metadata") is None
    run = relay.json(f"/relay/v1/streams/{name}-up/runs/{answer.header('relay-run')}")
    assert run["metadata"] == {"user": "u1"}


@pytest.mark.parametrize(
    "header", ["X-Forwarded-For: 10.0.0.1", "X-Forwarded-For:", "Forwarded: for=10.0.0.1"]
)
def test_a_caller_that_speaks_for_somebody_else_names_no_stream(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str, header: str
) -> None:
    upstream.on_stream(f"/{name}", [b"data: one\n\n"])
    answer = ask(relay, "GET", f"/{name}", f"Relay-Stream: {name}", header)
    assert answer.status == 200
    assert answer.header("relay-stream") != name
    assert relay.get(f"/relay/v1/streams/{name}")[0] == 404


def test_a_trusted_caller_with_a_name_that_is_none_is_refused_before_upstream_is_called(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    answer = ask(relay, "GET", f"/{name}", "Relay-Stream: a/b")
    assert (answer.status, answer.problem["code"]) == (400, "invalid_name")
    assert upstream.calls(f"/{name}") == 0


@pytest.mark.parametrize(
    "header", ["Relay-Stream: a/b", "Relay-Metadata: {", "Relay-Metadata: " + "1" * 17_000]
)
def test_an_answer_whose_name_or_metadata_is_none_is_invalid(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str, header: str
) -> None:
    closed = threading.Event()

    async def handler(exchange: Exchange) -> None:
        await exchange.head("200 OK", "text/event-stream", header)
        await exchange.closed()
        closed.set()

    upstream.on(f"/{name}", handler)
    answer = ask(relay, "GET", f"/{name}")
    assert (answer.status, answer.problem["code"]) == (502, "upstream_invalid")
    assert closed.wait(60)


# --- idempotency keys ---------------------------------------------------------------------------------


def test_p5_a_request_repeated_with_its_key_joins_the_run_and_upstream_is_called_once(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    gate = held_stream(upstream, f"/{name}", b"data: one\n\n", b"data: two\n\n")
    key = {"Idempotency_Key": name}
    with Reading(f"{relay.url}/{name}", "POST", b"{}", **key) as first:
        first.take(1)
        run = first.headers["relay-run"]
    with Reading(f"{relay.url}/{name}", "POST", b"{}", **key) as second:
        assert second.headers["relay-run"] == run
        seen = second.take(1)
        gate.open()
        assert [block.data for block in seen + second.take(1)] == ["one", "two"]
        assert list(second.blocks()) == []
    assert upstream.calls(f"/{name}") == 1


def test_a_client_gone_before_the_first_byte_gets_the_whole_answer_with_its_key(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    gate = upstream.gate()

    async def handler(exchange: Exchange) -> None:
        await gate.wait()
        await exchange.head("200 OK", "text/event-stream", "X-Mine: 1", "Set-Cookie: secret=1")
        await exchange.chunk(b"data: one\n\n")
        await exchange.end()

    upstream.on(f"/{name}", handler)
    headers = (f"Idempotency-Key: {name}", f"Relay-Stream: {name}")
    with RawClient(relay.port) as client:
        client.request("POST", f"/{name}", *headers, body=b"{}")
        gate.await_arrival()
    gate.open()
    whole_run(relay, name)
    answer = ask(relay, "POST", f"/{name}", *headers, body=b"{}")
    assert answer.status == 200
    assert b"data: one\n\n" in answer.body
    assert answer.whole
    assert answer.header("x-mine") == "1"
    assert answer.header("set-cookie") is None
    assert upstream.calls(f"/{name}") == 1


def test_requests_with_one_key_at_the_same_time_call_upstream_once(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    gate = upstream.gate()

    async def handler(exchange: Exchange) -> None:
        await gate.wait()
        await exchange.stream([b"data: one\n\n"])

    upstream.on(f"/{name}", handler)
    clients = [RawClient(relay.port) for _ in range(8)]
    for client in clients:
        client.request("POST", f"/{name}", f"Idempotency-Key: {name}", body=b"{}")
    gate.await_arrival()
    gate.open()
    answers = [client.answer() for client in clients]
    for client in clients:
        client.reset()
    assert {(answer.status, answer.header("relay-run"), answer.body) for answer in answers} == {
        (200, answers[0].header("relay-run"), answers[0].body)
    }
    assert upstream.calls(f"/{name}") == 1


def test_a_key_used_with_another_body_is_refused(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    upstream.on_stream(f"/{name}", [b"data: one\n\n"])
    ask(relay, "POST", f"/{name}", f"Idempotency-Key: {name}", body=b"one")
    answer = ask(relay, "POST", f"/{name}", f"Idempotency-Key: {name}", body=b"two")
    assert (answer.status, answer.problem["code"]) == (422, "idempotency_key_reused")
    assert upstream.calls(f"/{name}") == 1


@pytest.mark.parametrize(
    "other",
    [["Authorization: b"], ["Cookie: b"], ["Authorization: a", "Cookie: b"], ["Authorization: a", "Cookie:"]],
)
def test_another_callers_key_is_another_key(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str, other: list[str]
) -> None:
    upstream.on_stream(f"/{name}", [b"data: one\n\n"])
    key = f"Idempotency-Key: {name}"
    first = ask(relay, "POST", f"/{name}", key, "Authorization: a", body=b"{}")
    second = ask(relay, "POST", f"/{name}", key, *other, body=b"{}")
    assert first.header("relay-run") != second.header("relay-run")
    assert upstream.calls(f"/{name}") == 2


@pytest.mark.parametrize("change", ["method", "query", "stream"])
def test_the_same_key_elsewhere_is_another_key(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str, change: str
) -> None:
    upstream.on_stream(f"/{name}", [b"data: one\n\n"])
    key = f"Idempotency-Key: {name}"
    ask(relay, "POST", f"/{name}", key, body=b"{}")
    method = "PUT" if change == "method" else "POST"
    target = f"/{name}?q=1" if change == "query" else f"/{name}"
    more = [f"Relay-Stream: {name}"] if change == "stream" else []
    ask(relay, method, target, key, *more, body=b"{}")
    assert upstream.calls(f"/{name}") == 2


def test_an_answer_that_is_no_stream_releases_its_key(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    answers = iter(["500 Internal Server Error", "200 OK"])

    async def handler(exchange: Exchange) -> None:
        await exchange.answer(next(answers), b"{}")

    upstream.on(f"/{name}", handler)
    key = f"Idempotency-Key: {name}"
    assert ask(relay, "POST", f"/{name}", key, body=b"one").status == 500
    assert ask(relay, "POST", f"/{name}", key, body=b"another").status == 200


def test_a_key_whose_run_failed_without_a_frame_gives_no_empty_success(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.head()
        exchange.writer.close()

    upstream.on(f"/{name}", handler)
    headers = (f"Idempotency-Key: {name}", f"Relay-Stream: {name}")
    for _ in range(2):
        answer = ask(relay, "POST", f"/{name}", *headers, body=b"{}")
        assert (answer.status, answer.body, answer.whole) == (200, b"", False)
    assert whole_run(relay, name).outcome == ("failed", "upstream_truncated")
    assert upstream.calls(f"/{name}") == 1


@pytest.fixture(scope="module")
def small(fresh_journal: Callable[[], str], upstream: ScriptedUpstream) -> Iterator[RelayProcess]:
    """A relay whose bounds are small."""
    with RelayProcess.start(
        journal=fresh_journal(),
        upstream=upstream.url,
        buffered_body_max_bytes=1000,
        open_runs_max=2,
        abandon_s=0.5,
        stream_from=["path:/named/{stream}", "body:/id", "header:X-Chat"],
        passthrough=["/free/*"],
        resume_route="GET /named/{stream}/stream",
        stop_route="POST /named/{stream}/stop",
    ) as process:
        yield process


@pytest.fixture(scope="module")
def impatient(fresh_journal: Callable[[], str], upstream: ScriptedUpstream) -> Iterator[RelayProcess]:
    """A relay for an upstream that never answers: one that does may be too slow for it."""
    with RelayProcess.start(
        journal=fresh_journal(), upstream=upstream.url, upstream_header_timeout_s=0.3
    ) as process:
        yield process


def test_a_keyed_body_that_is_too_large_is_refused(
    small: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    answer = ask(small, "POST", f"/{name}", f"Idempotency-Key: {name}", body=b"x" * 1001)
    assert (answer.status, answer.problem["code"]) == (413, "body_too_large")
    assert upstream.calls(f"/{name}") == 0


def test_a_key_whose_run_is_gone_from_the_journal_is_said_to_be_gone(
    fresh_journal: Callable[[], str], upstream: ScriptedUpstream, name: str
) -> None:
    """Calling upstream again would do twice what the key promises to do once."""
    upstream.on_stream(f"/{name}", [b"data: one\n\n"])
    headers = (f"Idempotency-Key: {name}", f"Relay-Stream: {name}")
    with RelayProcess.start(journal=fresh_journal(), upstream=upstream.url, retention_s=1) as relay:
        assert ask(relay, "POST", f"/{name}", *headers, body=b"{}").status == 200
        eventually(lambda: relay.get(f"/relay/v1/streams/{name}")[0] == 404, "the stream is gone")
        answer = ask(relay, "POST", f"/{name}", *headers, body=b"{}")
    assert (answer.status, answer.problem["code"]) == (410, "resume_unknown")
    assert upstream.calls(f"/{name}") == 1


# --- bounds and settings ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "headers", "body"),
    [
        ("/named/{}", [], b"{}"),
        ("/x-{}", ["Content-Type: application/json"], b'{{"id": "{}"}}'),
        ("/x-{}", ["X-Chat: {}"], b"{}"),
    ],
)
def test_a_setting_names_the_stream_of_any_caller_and_wins_over_the_callers_header(
    small: RelayProcess, upstream: ScriptedUpstream, name: str, target: str, headers: list[str], body: bytes
) -> None:
    path = target.format(name)
    upstream.on_stream(path, [b"data: one\n\n"])
    given = [header.format(name) for header in headers]
    sent = body.decode().format(name).encode() if b"id" in body else body
    answer = ask(small, "POST", path, *given, "X-Forwarded-For: 10.0.0.1", "Relay-Stream: other", body=sent)
    assert answer.header("relay-stream") == name
    assert upstream.received[-1].body == sent


def test_a_setting_that_finds_no_name_stops_streams_only(
    small: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    """An endpoint that is no stream may have ids of its own kind where the setting looks."""

    async def echo(exchange: Exchange) -> None:
        await exchange.answer("200 OK", exchange.received.body)

    upstream.on(f"/{name}", echo)
    upstream.on_stream(f"/{name}-s", [b"data: one\n\n"])
    body = b'{"id": "someone@example.com"}'
    passed = ask(small, "POST", f"/{name}", "Content-Type: application/json", body=body)
    assert (passed.status, passed.body) == (200, body)
    stream = ask(small, "POST", f"/{name}-s", "Content-Type: application/json", body=body)
    assert (stream.status, stream.problem["code"]) == (400, "invalid_name")


def test_a_body_too_large_to_find_a_name_in_passes_whole(
    small: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    async def echo(exchange: Exchange) -> None:
        await exchange.answer("200 OK", exchange.received.body)

    upstream.on(f"/{name}", echo)
    body = b'{"id": "c1", "text": "' + b"x" * 100_000 + b'"}'
    answer = ask(small, "POST", f"/{name}", "Content-Type: application/json", body=body)
    assert (answer.status, answer.body) == (200, body)


def test_p7_a_raw_run_that_nobody_reads_is_abandoned_and_keeps_its_text(
    small: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    """Also one whose client left before upstream's head: that reader was gone before it began."""
    gate, closed = upstream.gate(), threading.Semaphore(0)

    async def read(exchange: Exchange) -> None:
        # In one piece: between a head and its first frame the run might be given up already.
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        await exchange.send(head + b"b\r\ndata: one\n\n\r\n")
        await exchange.closed()
        closed.release()

    async def unread(exchange: Exchange) -> None:
        await gate.wait()
        await read(exchange)

    upstream.on(f"/{name}/read", read)
    upstream.on(f"/{name}/unread", unread)
    with Reading(f"{small.url}/{name}/read", Relay_Stream=f"{name}-read") as reading:
        reading.take(1)
    with RawClient(small.port) as client:
        client.request("GET", f"/{name}/unread", f"Relay-Stream: {name}-unread")
        gate.await_arrival()
    gate.open()
    for _ in range(2):
        assert closed.acquire(timeout=60)
    for stream in (f"{name}-read", f"{name}-unread"):
        record = whole_run(small, stream)
        assert record.outcome == ("cancelled", "abandoned")
        assert record.texts == ["one"]


def test_p3_a_stream_that_never_stops_ends_by_max_run(
    fresh_journal: Callable[[], str], upstream: ScriptedUpstream, name: str
) -> None:
    closed = threading.Event()

    async def handler(exchange: Exchange) -> None:
        await exchange.head()
        try:
            while True:
                await exchange.chunk(b"data: " + b"x" * 2000 + b"\n\n")
                await asyncio.sleep(0.005)
        finally:
            closed.set()

    upstream.on(f"/{name}", handler)
    with RelayProcess.start(journal=fresh_journal(), upstream=upstream.url, max_run_s=0.5) as relay:
        answer = ask(relay, "GET", f"/{name}", f"Relay-Stream: {name}")
        assert not answer.whole
        run = relay.json(f"/relay/v1/streams/{name}/runs/{answer.header('relay-run')}")
    assert (run["status"], run["reason"]) == ("cancelled", "max_run")
    assert run["error"]
    assert closed.wait(60)


def test_more_runs_than_may_be_open_are_refused_and_their_upstream_closed(
    small: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    gates = [held_stream(upstream, f"/{name}/{n}", b"data: one\n\n", b"data: two\n\n") for n in range(2)]
    closed = threading.Event()

    async def third(exchange: Exchange) -> None:
        await exchange.head()
        await exchange.closed()
        closed.set()

    upstream.on(f"/{name}/2", third)
    with Reading(f"{small.url}/{name}/0") as first, Reading(f"{small.url}/{name}/1") as second:
        answer = ask(small, "GET", f"/{name}/2")
        assert (answer.status, answer.problem["code"]) == (503, "busy")
        assert answer.header("retry-after") is not None
        assert closed.wait(60)
        refused = ask(small, "GET", f"/{name}/2", "Accept: text/event-stream")
        assert (refused.status, refused.problem["code"]) == (503, "busy")
        assert upstream.calls(f"/{name}/2") == 1, "who can only want a stream is refused before"
        for gate, reading in zip(gates, (first, second), strict=True):
            gate.open()
            assert [block.data for block in reading.frames()] == ["one", "two"]


@pytest.mark.parametrize("when", ["before the head", "in the stream"])
def test_a_path_that_is_let_through_is_not_journaled_and_closed_with_its_client(
    small: RelayProcess, upstream: ScriptedUpstream, name: str, when: str
) -> None:
    gate, closed = upstream.gate(), threading.Event()

    async def handler(exchange: Exchange) -> None:
        if when == "in the stream":
            await exchange.head("200 OK", "text/event-stream", "X-Mine: 1")
            await exchange.chunk(b"id: up-1\ndata: one\n\n")
        gate.arrived.release()
        await exchange.closed()
        closed.set()

    upstream.on(f"/free/{name}", handler)
    with RawClient(small.port) as client:
        client.request("GET", f"/free/{name}", f"Relay-Stream: {name}")
        gate.await_arrival()
        if when == "in the stream":
            assert b"relay-run" not in client.read_until(b"id: up-1\ndata: one\n\n").lower()
    assert closed.wait(60)
    assert small.get(f"/relay/v1/streams/{name}")[0] == 404


def test_a_dead_holders_key_is_taken_over_after_its_lease(
    redis_server: object, upstream: ScriptedUpstream, name: str
) -> None:
    url: str = redis_server.url()  # type: ignore[attr-defined]
    gate = upstream.gate()

    async def handler(exchange: Exchange) -> None:
        if upstream.calls(f"/{name}") == 1:
            await gate.wait()
        await exchange.stream([b"data: one\n\n"])

    upstream.on(f"/{name}", handler)
    settings = {"journal": url, "upstream": upstream.url, "claim_lease_s": 0.5}
    start: Callable[..., RelayProcess] = RelayProcess.start
    with start(**settings) as survivor:
        holder = start(**settings)
        with RawClient(holder.port) as client:
            client.request("POST", f"/{name}", f"Idempotency-Key: {name}", body=b"{}")
            gate.await_arrival()
            with RawClient(survivor.port) as waiting:
                waiting.request("POST", f"/{name}", f"Idempotency-Key: {name}", body=b"{}")
                holder.kill()
                answer = waiting.answer()
        gate.open()
    assert answer.status == 200
    assert b"data: one" in answer.body
    assert upstream.calls(f"/{name}") == 2


def test_a_run_that_completed_without_text_is_counted(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    upstream.on_stream(f"/{name}", [])
    before = relay.metric("relay_runs_completed_without_text_total")
    ask(relay, "GET", f"/{name}", f"Relay-Stream: {name}")
    assert whole_run(relay, name).ended["text_bytes"] == 0
    eventually(
        # More than that, if another test's run is counted only now.
        lambda: relay.metric("relay_runs_completed_without_text_total") >= before + 1,
        "the run is counted",
    )
    assert json.loads(relay.get("/relay/healthz")[2])["status"] == "alive"


# --- stopped and replaced -----------------------------------------------------------------------------

CHUNK = b'data: {"object":"chat.completion.chunk","choices":[{"delta":{"content":"Hi"}}]}\n\n'


def endless(upstream: ScriptedUpstream, path: str, first: bytes) -> threading.Event:
    """An upstream that says something and then nothing, until it is closed: then the event is set."""
    closed = threading.Event()

    async def handler(exchange: Exchange) -> None:
        await exchange.head()
        await exchange.chunk(first)
        await exchange.closed()
        closed.set()

    upstream.on(path, handler)
    return closed


@pytest.fixture(scope="module")
def another(relay: RelayProcess, journal_url: str, upstream: ScriptedUpstream) -> Iterator[RelayProcess]:
    """Another relay on the same journal; SQLite's has one only."""
    if journal_url.startswith("sqlite"):
        yield relay
        return
    with RelayProcess.start(journal=journal_url, upstream=upstream.url) as process:
        yield process


@pytest.mark.parametrize(("first", "whole"), [(CHUNK, True), (b"data: one\n\n", False)])
def test_p7_a_cancel_anywhere_closes_upstream_and_ends_the_clients_answer_in_its_own_format(
    relay: RelayProcess,
    another: RelayProcess,
    upstream: ScriptedUpstream,
    name: str,
    first: bytes,
    whole: bool,
) -> None:
    closed = endless(upstream, f"/{name}", first)
    counted = 'relay_runs_ended_total{reason="client_cancel",status="cancelled"}'
    before = relay.metric(counted) + (another.metric(counted) if another is not relay else 0)
    with RawClient(relay.port) as client:
        client.request("POST", f"/{name}", f"Relay-Stream: {name}", body=b"{}")
        head = client.read_until(first)
        assert ask(another, "POST", f"/relay/v1/streams/{name}/cancel").status == 200
        assert closed.wait(60)
        rest = client.read_until(b"0\r\n\r\n") if whole else client.rest()
    assert b"relay-run" in head.lower()
    assert (b"\r\n0\r\n" in rest) == whole
    assert (b'"code":"client_cancel"' in rest) == whole, "its format says so, where it has a way to"
    record = whole_run(another, name)
    assert record.outcome == ("cancelled", "client_cancel")
    assert record.ended["frames"] == 1
    after = relay.metric(counted) + (another.metric(counted) if another is not relay else 0)
    assert after == before + 1, "counted once, by the relay that was asked"


def test_p7_a_cancel_before_upstreams_next_word_wins_over_a_terminal_marker(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    """Once it said its last word the run is over, and a cancel finds it so."""
    upstream.on_stream(f"/{name}", [CHUNK, b"data: [DONE]\n\n"])
    ask(relay, "POST", f"/{name}", f"Relay-Stream: {name}", body=b"{}")
    answer = ask(relay, "POST", f"/relay/v1/streams/{name}/cancel")
    assert (answer.status, json.loads(answer.body)["run"]) == (200, None)
    assert whole_run(relay, name).outcome == ("completed", "upstream_end")


def test_a_new_run_supersedes_the_latest_and_its_client_sees_its_end(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    closed = endless(upstream, f"/{name}/old", CHUNK)
    upstream.on_stream(f"/{name}/new", [b"data: two\n\n"])
    with RawClient(relay.port) as client:
        client.request("POST", f"/{name}/old", f"Relay-Stream: {name}", body=b"{}")
        client.read_until(CHUNK)
        answer = ask(relay, "POST", f"/{name}/new", f"Relay-Stream: {name}", "Relay-Supersedes: latest")
        assert (answer.status, answer.header("relay-frames-after")) == (200, "0")
        assert b'"code":"superseded"' in client.read_until(b"0\r\n\r\n")
    assert closed.wait(60)
    with Reading(f"{relay.url}/relay/v1/streams/{name}/events?run={answer.header('relay-run')}") as reading:
        assert [block.data for block in reading.frames()] == ["two"]
    received = upstream.received[-1]
    assert received.header("relay-supersedes") is None
    assert received.header("relay-stream") == name


@pytest.mark.parametrize("if_busy", ["supersede", "reject", "allow"])
def test_a_busy_stream_is_treated_as_the_request_says(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str, if_busy: str
) -> None:
    closed = endless(upstream, f"/{name}/old", b"data: one\n\n")
    upstream.on_stream(f"/{name}/new", [b"data: two\n\n"])
    with Reading(f"{relay.url}/{name}/old", Relay_Stream=name) as reading:
        reading.take(1)
        run = reading.headers["relay-run"]
        answer = ask(relay, "GET", f"/{name}/new", f"Relay-Stream: {name}", f"Relay-If-Busy: {if_busy}")
        status = relay.json(f"/relay/v1/streams/{name}/runs/{run}")["status"]
    if if_busy == "reject":
        assert (answer.status, answer.problem["code"]) == (409, "stream_busy")
        assert answer.problem["open_runs"] == [run]
        assert upstream.calls(f"/{name}/new") == 0, "the stream is known before upstream is called"
    else:
        assert answer.status == 200
    assert status == ("cancelled" if if_busy == "supersede" else "open")
    ask(relay, "POST", f"/relay/v1/streams/{name}/cancel")
    assert closed.wait(60)


@pytest.mark.parametrize(
    ("header", "status", "code", "called"),
    [
        ("Relay-If-Busy: perhaps", 400, "invalid_parameter", 0),
        ("Relay-Supersedes: ,", 400, "invalid_name", 0),
        ("Relay-Supersedes: current", 400, "invalid_name", 0),
        ("Relay-Supersedes: a b", 400, "invalid_name", 0),
        ("Relay-Supersedes: " + ",".join(["r"] * 101), 400, "invalid_parameter", 0),
        ("Relay-Supersedes: latest, nobody", 404, "unknown_run", 1),
        ("Relay-If-Busy: reject", 409, "stream_busy", 1),
    ],
)
def test_a_wish_that_cannot_be_met_is_refused_and_upstream_closed(
    relay: RelayProcess,
    upstream: ScriptedUpstream,
    name: str,
    header: str,
    status: int,
    code: str,
    called: int,
) -> None:
    """Here upstream names the stream, so that whether it is busy shows only when it has answered."""
    closed = threading.Event()

    async def handler(exchange: Exchange) -> None:
        await exchange.head("200 OK", "text/event-stream", f"Relay-Stream: {name}")
        await exchange.chunk(b"data: one\n\n")
        await exchange.closed()
        closed.set()

    upstream.on(f"/{name}/open", handler)
    upstream.on(f"/{name}", handler)
    with Reading(f"{relay.url}/{name}/open") as reading:
        reading.take(1)
        answer = ask(relay, "GET", f"/{name}", header)
        assert (answer.status, answer.problem["code"]) == (status, code)
        assert upstream.calls(f"/{name}") == called
        if called:
            assert closed.wait(60)
        assert relay.json(f"/relay/v1/streams/{name}")["runs"] == 1
    ask(relay, "POST", f"/relay/v1/streams/{name}/cancel")


# --- replaced before upstream is called ----------------------------------------------------------------


def unanswered(
    upstream: ScriptedUpstream, path: str, answer: Callable[[Exchange], Awaitable[None]]
) -> tuple[Gate, threading.Event]:
    """An upstream that says nothing until the gate opens. The event is set when it is closed before."""
    gate, closed = upstream.gate(), threading.Event()

    async def handler(exchange: Exchange) -> None:
        opened, left = asyncio.ensure_future(gate.wait()), asyncio.ensure_future(exchange.closed())
        await asyncio.wait((opened, left), return_when=asyncio.FIRST_COMPLETED)
        if left.done():
            opened.cancel()
            closed.set()
            return
        left.cancel()
        await asyncio.wait((left,))
        await answer(exchange)

    upstream.on(path, handler)
    return gate, closed


async def two_words(exchange: Exchange) -> None:
    await exchange.stream([b"data: one\n\n", b"data: two\n\n"])


def push(relay: RelayProcess, stream: str, *words: str) -> str:
    """A pushed run, left open; its name."""
    target = f"/relay/v1/streams/{stream}/runs"
    started = json.loads(ask(relay, "POST", target).body)
    for word in words:
        frames = json.dumps({"data": word}).encode()
        said = ask(
            relay, "POST", f"{target}/{started['run']}/frames", f"Relay-Writer: {started['writer']}",
            "Content-Type: application/json", body=frames,
        )  # fmt: skip
        assert said.status == 200
    return str(started["run"])


def journaled(tab: Reading, kind: str) -> list[str]:
    """What a tab is shown of the journal up to the next control frame of a kind: `type:run`, and data."""
    seen: list[str] = []
    while not seen or not seen[-1].startswith(f"{kind}:"):
        (block,) = tab.take(1)
        control = block.control
        if control is None:
            seen.append(block.data)
        elif "run" in control:
            seen.append(f"{control['type']}:{control['run']}")
    return seen


@pytest.mark.parametrize("wish", ["Relay-Supersedes: latest", "Relay-If-Busy: supersede"])
def test_p7_stop_right_after_a_regenerate_stops_the_new_run_before_upstream_has_answered(
    relay: RelayProcess, another: RelayProcess, upstream: ScriptedUpstream, name: str, wish: str
) -> None:
    """Tabs see the change of runs at once, and the answer that was stopped never comes."""
    gate, closed = unanswered(upstream, f"/{name}", two_words)
    old = push(relay, name, "old")
    request = ("POST", f"/{name}", f"Relay-Stream: {name}", f"Idempotency-Key: {name}", wish)
    with (
        Reading(f"{another.url}/relay/v1/streams/{name}/events") as tab,
        RawClient(relay.port) as client,
    ):
        journaled(tab, "run.started")
        client.request(*request, body=b"{}")
        seen = journaled(tab, "run.started")
        new = seen[-1].partition(":")[2]
        assert seen == ["old", f"run.superseded:{old}", f"run.ended:{old}", f"run.started:{new}"]
        gate.await_arrival()
        stopped = json.loads(ask(another, "POST", f"/relay/v1/streams/{name}/cancel").body)
        assert (stopped["run"], stopped["status"], stopped["reason"]) == (new, "cancelled", "client_cancel")
        assert closed.wait(60), "upstream works for nobody"
        answer = client.answer()
        assert journaled(tab, "run.ended") == [f"run.ended:{new}"]
    again = ask(relay, *request, body=b"{}")
    for told in (answer, again):
        assert (told.status, told.problem["code"]) == (409, "run_ended")
        assert (told.problem["stream"], told.problem["run"]) == (name, new)
        assert (told.problem["run_status"], told.problem["reason"]) == ("cancelled", "client_cancel")
        assert told.header("x-should-retry") == "false"
    assert upstream.calls(f"/{name}") == 1
    assert whole_run(another, name).texts == []
    assert json.loads(ask(relay, "POST", f"/relay/v1/streams/{name}/cancel").body)["run"] is None


def test_p7_a_regenerate_is_answered_as_any_other_request_when_upstream_answers(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    async def answer(exchange: Exchange) -> None:
        named = (f"Relay-Stream: {name}-other", "X-Mine: 1", "Set-Cookie: a=1", "ETag: x")
        await exchange.head("203 Mine", "text/event-stream", *named)
        await exchange.chunk(b"data: one\n\n")
        await rest.wait()
        await exchange.chunk(b"data: two\n\n")
        await exchange.end()

    gate, _ = unanswered(upstream, f"/{name}", answer)
    rest = upstream.gate()
    old = push(relay, name, "old")
    logged = len(relay.log)
    headers = (f"Relay-Stream: {name}", f"Relay-Supersedes: {old}", f"Idempotency-Key: {name}", "X-Mine: 2")
    with RawClient(relay.port) as client, RawClient(relay.port) as joiner:
        client.request("PUT", f"/{name}?q=%20", *headers, body=b"{}")
        gate.await_arrival()
        (new,) = relay.json(f"/relay/v1/streams/{name}")["open_runs"]
        joiner.request("PUT", f"/{name}?q=%20", *headers, body=b"{}")
        gate.open()
        read = client.read_until(b"data: one\n\n")
        cursor = next(line for line in read.decode().split("\n") if line.startswith("id: "))[4:]
        rest.open()
        joined = joiner.answer()
        head, _, body = (read + client.read_until(b"\r\n0\r\n\r\n")).partition(b"\r\n\r\n")
    lines = head.decode().lower().split("\r\n")
    assert lines[0].startswith("http/1.1 203")
    ours = [f"relay-stream: {name}", f"relay-run: {new.lower()}", "relay-frames-after: 0"]
    assert set(lines) > {"x-mine: 1", "set-cookie: a=1", *ours}
    assert not any(line.startswith("etag") for line in lines)
    assert (joined.status, joined.header("relay-run"), joined.whole) == (203, new, True)
    for whole in (body, joined.body):
        assert whole.index(b"data: one\n") < whole.index(b"data: two\n")
    received = upstream.received[-1]
    assert (received.method, received.target, received.body) == ("PUT", f"/{name}?q=%20", b"{}")
    assert (received.header("x-mine"), received.header("relay-supersedes")) == ("2", None)
    assert upstream.calls(f"/{name}") == 1
    assert whole_run(relay, name, old).outcome == ("cancelled", "superseded")
    assert whole_run(relay, name, new).outcome == ("completed", "upstream_end")
    with Reading(f"{relay.url}/elsewhere", Last_Event_ID=cursor) as resumed:
        assert (resumed.status, resumed.headers["x-mine"]) == (203, "1")
        assert [frame.data for frame in resumed.frames()] == ["two"]
    assert relay.get(f"/relay/v1/streams/{name}-other")[0] == 404
    relay.logged_line(f"{name}-other", since=logged)


def test_p7_a_regenerate_that_is_stopped_before_its_first_word_ends_in_the_format_its_head_promised(
    relay: RelayProcess, another: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    closed = threading.Event()

    async def handler(exchange: Exchange) -> None:
        await exchange.head()
        await exchange.closed()
        closed.set()

    path = f"/{name}/chat/completions"
    upstream.on(path, handler)
    push(relay, name)
    with Reading(f"{relay.url}{path}", "POST", b"{}", Relay_Stream=name, Relay_Supersedes="latest") as page:
        assert page.status == 200
        stopped = json.loads(ask(another, "POST", f"/relay/v1/streams/{name}/cancel").body)
        assert stopped["run"] == page.headers["relay-run"]
        (last,) = page.frames()
    assert json.loads(last.data)["error"]["code"] == "client_cancel"
    assert closed.wait(60)


def test_p7_a_client_that_leaves_its_regenerate_before_upstreams_head_does_not_stop_it(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    gate, _ = unanswered(upstream, f"/{name}", two_words)
    push(relay, name)
    with RawClient(relay.port) as client:
        client.request("GET", f"/{name}", f"Relay-Stream: {name}", "Relay-Supersedes: latest")
        gate.await_arrival()
    gate.open()
    record = whole_run(relay, name)
    assert (record.texts, record.outcome) == (["one", "two"], ("completed", "upstream_end"))


@contextlib.asynccontextmanager
async def proxy_of(
    journal: Any,
    owned: OwnedRuns,
    settings: Settings,
    upstream: ScriptedUpstream,
    audience: Audience | None = None,
) -> AsyncIterator[Proxy]:
    """A proxy in this process; its streams have no readers, unless an audience is given."""
    backend = Upstream(upstream.url, settings)
    await backend.start()
    proxy = Proxy(backend, journal, settings, owned, audience or Audience(0), lambda *_: None)
    yield proxy
    await proxy.drain()
    await backend.close()


def asking(name: str, if_busy: str = "supersede") -> Call:
    """A request for a stream of that name."""
    headers = [(b"relay-stream", name.encode()), (b"relay-if-busy", if_busy.encode())]
    return Call("GET", f"/{name}", f"/{name}", headers, None, ANYBODY)


@pytest.mark.parametrize("kind", ["sqlite", "redis"])
@pytest.mark.parametrize("if_busy", ["allow", "supersede"])
def test_who_waits_for_a_run_is_told_how_its_stream_begins(
    kind: str, if_busy: str, tmp_path: Path, redis_server: RedisServer, upstream: ScriptedUpstream, name: str
) -> None:
    """In a stream that is new; where others may be writing, only the journal knows."""

    async def check() -> None:
        upstream.on_stream(f"/{name}", [b"data: one\n\n"])
        settings, audience = Settings(drain_grace_s=60), Audience(1)
        owned = OwnedRuns(settings, lambda *_: None)
        async with (
            rewinding(kind, tmp_path, redis_server, owned) as journal,
            proxy_of(journal, owned, settings, upstream, audience) as proxy,
        ):
            assert isinstance(await proxy.open(asking(name, if_busy)), RunAnswer)
            started = (await journal.frames(name))[0]
            assert audience.told == [("expect", name), ("opened", name, started, False)]
            await proxy.open(asking(name, if_busy))
            assert audience.told[2:] == [("expect", name)]
            call = Call("GET", f"/{name}", f"/{name}", [], None, ANYBODY)
            unnamed = await proxy.open(call)
            assert isinstance(unnamed, RunAnswer)
            (started, *_) = await journal.frames(unnamed.stream)
            assert audience.told[-1] == ("opened", unnamed.stream, started, True)
            told = len(audience.told)
            call.headers.append((b"prefer", b"respond-async"))
            await proxy.open(call)
            assert len(audience.told) == told, "nobody waits for it"

    asyncio.run(check())


@pytest.mark.parametrize("kind", ["sqlite", "redis"])
def test_p7_a_regenerate_that_nobody_reads_is_abandoned_but_not_before_it_is_answered(
    kind: str, tmp_path: Path, redis_server: RedisServer, upstream: ScriptedUpstream, name: str
) -> None:
    async def answer(exchange: Exchange) -> None:
        await exchange.head()
        await exchange.closed()

    async def check() -> None:
        settings = Settings(abandon_s=0.001, drain_grace_s=0)
        owned = OwnedRuns(settings, lambda *_: None)
        gate, _ = unanswered(upstream, f"/{name}", answer)
        async with (
            rewinding(kind, tmp_path, redis_server, owned) as journal,
            proxy_of(journal, owned, settings, upstream) as proxy,
        ):
            opening = asyncio.create_task(proxy.open(asking(name)))
            await asyncio.to_thread(gate.await_arrival)
            (pump,) = proxy.pumps
            pump.read_at -= 1000
            await proxy.visit()
            gate.open()
            answered = await opening
            assert isinstance(answered, RunAnswer), "nobody could have read it"
            async with asyncio.timeout(60):
                while proxy.pumps:
                    await proxy.visit()
                    await asyncio.sleep(0.005)
            assert (await journal.run(name, answered.run)).reason == "abandoned"

    asyncio.run(check())


@pytest.mark.parametrize("kind", ["sqlite", "redis"])
@pytest.mark.parametrize("journal_down", ["fail", "passthrough"])
def test_a_regenerate_reaches_upstream_without_the_journal_only_where_the_setting_says_so(
    kind: str,
    journal_down: str,
    tmp_path: Path,
    redis_server: RedisServer,
    upstream: ScriptedUpstream,
    name: str,
) -> None:
    async def away(opening: RunOpening) -> Opened:
        raise JournalUnavailable("away")

    async def check() -> None:
        upstream.on_stream(f"/{name}", [b"data: one\n\n"])
        settings = Settings(journal_down=journal_down, drain_grace_s=0)
        owned = OwnedRuns(settings, lambda *_: None)
        async with (
            rewinding(kind, tmp_path, redis_server, owned) as journal,
            proxy_of(journal, owned, settings, upstream) as proxy,
        ):
            journal.inner.open_run = away
            if journal_down == "fail":
                with pytest.raises(JournalUnavailable):
                    await proxy.open(asking(name))
                assert upstream.calls(f"/{name}") == 0
                return
            passed = await proxy.open(asking(name))
            assert isinstance(passed, Passed)
            assert (b"relay-journal", b"down") in passed.headers
            assert b"".join([data async for data in passed.answer.body()]) == b"data: one\n\n"
            passed.answer.close()

    asyncio.run(check())


@pytest.mark.parametrize(
    ("status", "headers", "body", "outcome", "texts"),
    [
        ("401 No", ["Content-Type: application/json", "WWW-Authenticate: Bearer"], b'{"error": "who?"}',
         ("failed", "upstream_error"), []),
        ("429 Slow", ["Content-Type: text/plain", "Retry-After: 7", "X-Two: 1", "X-Two: 2"], b"",
         ("failed", "upstream_error"), []),
        ("500 Oops", ["Content-Type: text/plain", "Content-Encoding: gzip"], gzip.compress(b"why" * 50_000),
         ("failed", "upstream_error"), []),
        ("503 Oops", ["Content-Type: text/event-stream", "ETag: x"], b"data: x\n\n",
         ("failed", "upstream_error"), []),
        ("200 OK", ["Content-Type: application/json", "Set-Cookie: a=1"], b'{"a": 1}',
         ("completed", "upstream_end"), ['{"a": 1}']),
        ("200 OK", ["Content-Type: text/plain", "Content-Encoding: gzip"], gzip.compress(b"said"),
         ("completed", "upstream_end"), ["said"]),
        ("200 OK", ["Content-Type: text/plain", "Content-Encoding: gzip"], gzip.compress(b"x" * 2_000_000),
         ("failed", "upstream_error"), []),
        ("200 OK", ["Content-Type: image/png", "Content-Encoding: br"], b"\x89PNG",
         ("failed", "upstream_truncated"), []),
        ("204 None", [], b"", ("failed", "upstream_error"), []),
        ("307 Elsewhere", ["Location: /there"], b"", ("failed", "upstream_error"), []),
    ],
    ids=["401", "429", "500 coded", "503", "200", "200 coded", "too large", "unreadable", "204", "307"],
)  # fmt: skip
@pytest.mark.parametrize("chunked", [False, True])
def test_p3_an_answer_to_a_regenerate_that_is_no_stream_passes_unchanged_and_ends_the_run(
    relay: RelayProcess,
    upstream: ScriptedUpstream,
    name: str,
    status: str,
    headers: list[str],
    body: bytes,
    outcome: tuple[str, str],
    texts: list[str],
    chunked: bool,
) -> None:
    """As without the wish, and the key is free again."""

    async def handler(exchange: Exchange) -> None:
        framing = "Transfer-Encoding: chunked" if chunked and body else f"Content-Length: {len(body)}"
        await exchange.send("\r\n".join([f"HTTP/1.1 {status}", *headers, framing, "", ""]).encode())
        if chunked and body:
            await exchange.chunk(body)
            await exchange.end()
        else:
            await exchange.send(body)

    upstream.on(f"/{name}", handler)
    plain = ask(relay, "POST", f"/{name}", f"Relay-Stream: {name}", body=b"{}")
    old = push(relay, name)
    wishes = (f"Relay-Stream: {name}", "Relay-Supersedes: latest", f"Idempotency-Key: {name}")
    for times in (2, 3):
        answer = ask(relay, "POST", f"/{name}", *wishes, body=b"{}")
        assert answer == plain
        assert (answer.status, answer.body) == (int(status[:3]), body)
        assert upstream.calls(f"/{name}") == times
    assert whole_run(relay, name, old).outcome == ("cancelled", "superseded")
    record = whole_run(relay, name)
    assert (record.outcome, record.texts) == (outcome, texts)
    if status.startswith("401"):
        assert "who?" in record.ended["error"]


@pytest.mark.parametrize(
    ("status", "size", "sent"),
    [("200 OK", 2_000_000, 2_000_000), ("500 Oops", 2_000_000, 2_000_000), ("500 Oops", 100, 50)],
)
def test_p3_an_answer_to_a_regenerate_that_is_too_large_or_breaks_off_is_told_and_fails_the_run(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str, status: str, size: int, sent: int
) -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.send(f"HTTP/1.1 {status}\r\nContent-Length: {size}\r\n\r\n".encode() + b"x" * sent)
        exchange.writer.close()

    upstream.on(f"/{name}", handler)
    answer = ask(relay, "GET", f"/{name}", f"Relay-Stream: {name}", "Relay-If-Busy: supersede")
    assert (answer.status, answer.problem["code"]) == (502, "upstream_error")
    assert ("more than" in answer.problem["detail"]) == (sent == size)
    assert whole_run(relay, name).outcome[0] == "failed"


@pytest.mark.parametrize("refused", ["unknown_run", "stream_sealed", "body_too_large", "invalid_name"])
def test_a_regenerate_that_is_refused_never_reaches_upstream_and_changes_nothing(
    small: RelayProcess, upstream: ScriptedUpstream, name: str, refused: str
) -> None:
    run = push(small, name)
    stream = name if refused != "invalid_name" else "%40"
    if refused == "stream_sealed":
        assert ask(small, "POST", f"/relay/v1/streams/{name}/seal").status == 200
    before = small.json(f"/relay/v1/streams/{name}")
    wanted = "nobody" if refused == "unknown_run" else run
    size = 1001 if refused == "body_too_large" else 1000
    answer = ask(small, "POST", f"/named/{stream}", f"Relay-Supersedes: {wanted}", body=b"x" * size)
    assert answer.problem["code"] == refused
    assert upstream.calls(f"/named/{stream}") == 0
    assert small.json(f"/relay/v1/streams/{name}") == before
    assert before["open_runs"] == [run]
    ask(small, "POST", f"/relay/v1/streams/{name}/cancel")


def test_p3_a_regenerate_whose_upstream_cannot_be_reached_or_is_too_slow_is_told_so_and_fails(
    relay: RelayProcess, impatient: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    async def gone(exchange: Exchange) -> None:
        exchange.writer.close()

    unanswered(upstream, f"/{name}/slow", two_words)
    upstream.on(f"/{name}/gone", gone)
    for asked, path, status, code, reason in (
        (impatient, "slow", 504, "upstream_timeout", "upstream_timeout"),
        (relay, "gone", 502, "upstream_unreachable", "upstream_error"),
    ):
        stream = f"{name}-{path}"
        old = push(asked, stream)
        answer = ask(
            asked, "POST", f"/{name}/{path}", f"Relay-Stream: {stream}", "Relay-Supersedes: latest",
            body=b"{}",
        )  # fmt: skip
        assert (answer.status, answer.problem["code"]) == (status, code)
        assert whole_run(asked, stream).outcome == ("failed", reason)
        assert whole_run(asked, stream, old).outcome == ("cancelled", "superseded")


def test_head_replaces_nothing(relay: RelayProcess, upstream: ScriptedUpstream, name: str) -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.send(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")

    upstream.on(f"/{name}", handler)
    run = push(relay, name)
    assert ask(relay, "HEAD", f"/{name}", f"Relay-Stream: {name}", "Relay-Supersedes: latest").status == 200
    assert relay.json(f"/relay/v1/streams/{name}")["open_runs"] == [run]


# --- in flight when relay shuts down -------------------------------------------------------------------

WAITING = pytest.mark.parametrize("wish", ["X-No: wish", "Relay-Supersedes: latest", "Idempotency-Key: k"])


@WAITING
def test_p7_a_request_in_flight_when_relay_shuts_down_becomes_a_run_and_has_the_grace(
    fresh_journal: Callable[[], str], upstream: ScriptedUpstream, name: str, wish: str
) -> None:
    """In the midst of the grace upstream's head comes, then its frames."""
    journal, rest = fresh_journal(), upstream.gate()

    async def answer(exchange: Exchange) -> None:
        await exchange.head()
        await exchange.chunk(b"data: one\n\n")
        await rest.wait()
        await exchange.chunk(b"data: two\n\n")
        await exchange.end()

    gate, _ = unanswered(upstream, f"/{name}", answer)
    with RelayProcess.start(journal=journal, upstream=upstream.url, drain_grace_s=60) as relay:
        with RawClient(relay.port) as client:
            push(relay, name)
            client.request("POST", f"/{name}", f"Relay-Stream: {name}", wish, body=b"{}")
            gate.await_arrival()
            relay.process.send_signal(signal.SIGTERM)
            eventually(lambda: relay.json("/relay/v1/diagnostics")["draining"], "relay drains")
            refused = ask(relay, "POST", f"/{name}", body=b"{}")
            assert (refused.status, refused.problem["code"]) == (503, "busy")
            assert "shutting down" in refused.problem["detail"]
            gate.open()
            client.read_until(b"data: one\n\n")
            rest.open()
            assert b"data: two\n" in client.read_until(b"\r\n0\r\n\r\n")
        relay.process.wait(60)

    async def journaled() -> tuple[list[bytes], tuple[str, str]]:
        async with own_journal(journal, "relay") as opened:
            run = await opened.run(name, (await opened.describe(name)).latest_run)
            frames = (await opened.read(name, ORIGIN, 1000, 10**6)).frames
            return [frame.data for frame in frames if not frame.is_control], (run.status, run.reason)

    assert asyncio.run(journaled()) == ([b"one", b"two"], ("completed", "upstream_end"))


@WAITING
def test_a_request_in_flight_that_outlasts_the_grace_is_told_that_relay_shuts_down(
    fresh_journal: Callable[[], str], upstream: ScriptedUpstream, name: str, wish: str
) -> None:
    gate, closed = unanswered(upstream, f"/{name}", two_words)
    with RelayProcess.start(journal=fresh_journal(), upstream=upstream.url, drain_grace_s=0.2) as relay:
        with RawClient(relay.port) as client:
            client.request("POST", f"/{name}", f"Relay-Stream: {name}", wish, body=b"{}")
            gate.await_arrival()
            relay.process.send_signal(signal.SIGTERM)
            answer = client.answer()
            assert (answer.status, answer.problem["code"]) == (503, "busy")
            assert "shutting down" in answer.problem["detail"]
        relay.process.wait(60)
        assert relay.process.returncode == 0
    assert closed.wait(60)


@pytest.mark.parametrize("kind", ["sqlite", "redis"])
@pytest.mark.parametrize("if_busy", ["allow", "supersede"])
def test_when_the_grace_is_over_nobody_waits_for_upstream_any_more(
    kind: str, if_busy: str, tmp_path: Path, redis_server: RedisServer, upstream: ScriptedUpstream, name: str
) -> None:
    """Not only when the server breaks off what is left."""

    async def check() -> None:
        settings = Settings(drain_grace_s=0)
        owned = OwnedRuns(settings, lambda *_: None)
        gate, _ = unanswered(upstream, f"/{name}", two_words)
        async with (
            rewinding(kind, tmp_path, redis_server, owned) as journal,
            proxy_of(journal, owned, settings, upstream) as proxy,
        ):
            opening = asyncio.create_task(proxy.open(asking(name, if_busy)))
            await asyncio.to_thread(gate.await_arrival)
            await proxy.drain()
            assert opening.done()
            with pytest.raises(Busy, match="shutting down"):
                await opening

    asyncio.run(check())


# --- answered before upstream is called ----------------------------------------------------------------


def test_respond_async_answers_with_the_run_before_upstream_has_answered(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    gate = upstream.gate()

    async def handler(exchange: Exchange) -> None:
        await gate.wait()
        await exchange.stream([CHUNK, b"data: [DONE]\n\n"])

    upstream.on(f"/{name}", handler)
    headers = (f"Relay-Stream: {name}", "Prefer: respond-async, wait=5; x=1", "X-Mine: 1")
    answer = ask(relay, "POST", f"/{name}", *headers, body=b'{"a": 1}')
    started = json.loads(answer.body)
    assert (answer.status, answer.header("preference-applied")) == (202, "respond-async")
    assert started == {"stream": name, "run": answer.header("relay-run"), "cursor": "0-0"}
    gate.await_arrival()
    received = upstream.received[-1]
    assert (received.method, received.body, received.header("x-mine")) == ("POST", b'{"a": 1}', "1")
    assert received.header("prefer") == "wait=5; x=1"
    assert relay.json(f"/relay/v1/streams/{name}")["open_runs"] == [started["run"]]
    gate.open()
    record = whole_run(relay, name, started["run"])
    assert record.outcome == ("completed", "upstream_end")
    assert len(record.frames) == 2
    assert relay.json(f"/relay/v1/streams/{name}/runs/{started['run']}")["dialect"] == "openai-chat"


def test_without_a_name_an_async_run_has_a_sealed_stream_of_its_own(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    upstream.on_stream(f"/{name}", [b"data: one\n\n"])
    answer = ask(relay, "GET", f"/{name}", "Prefer: respond-async")
    assert whole_run(relay, answer.header("relay-stream") or "").texts == ["one"]
    assert relay.json(f"/relay/v1/streams/{answer.header('relay-stream')}")["sealed"] is True


def test_one_key_is_one_run_whether_or_not_it_is_waited_for(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    gate = held_stream(upstream, f"/{name}", b"data: one\n\n", b"data: two\n\n")
    key = (f"Idempotency-Key: {name}", f"Relay-Stream: {name}")
    first = ask(relay, "POST", f"/{name}", *key, "Prefer: respond-async", body=b"{}")
    again = ask(relay, "POST", f"/{name}", *key, "Prefer: respond-async", body=b"{}")
    assert (first.status, again.status) == (202, 202)
    assert first.body == again.body
    with Reading(f"{relay.url}/{name}", "POST", b"{}", Idempotency_Key=name, Relay_Stream=name) as waiting:
        assert waiting.status == 200
        assert waiting.take(1)[0].data == "one"
        gate.open()
        assert waiting.take(1)[0].data == "two"
        assert waiting.headers["relay-run"] == first.header("relay-run")
    assert upstream.calls(f"/{name}") == 1


@pytest.mark.parametrize(
    ("status", "content_type", "body", "outcome", "texts"),
    [
        ("200 OK", "application/json", b'{"a": 1}', ("completed", "upstream_end"), ['{"a": 1}']),
        ("201 Created", "text/plain", "\u00fc".encode(), ("completed", "upstream_end"), ["\u00fc"]),
        ("200 OK", "image/png", b"\x89PNG", ("failed", "upstream_error"), []),
        ("200 OK", "text/plain", b"x" * (1024 * 1024 + 1), ("failed", "upstream_error"), []),
        ("429 Too Many", "application/json", b'{"error": "slow down"}', ("failed", "upstream_error"), []),
        ("500 Oops", "text/event-stream", b"data: x\n\n", ("failed", "upstream_error"), []),
        ("401 No", "text/plain", b"", ("failed", "upstream_error"), []),
        ("307 Elsewhere", "text/plain", b"", ("failed", "upstream_error"), []),
        ("500 Oops", "text/plain", b"y" * 100_000, ("failed", "upstream_error"), []),
    ],
)
def test_p3_an_answer_that_is_no_stream_becomes_one_frame_or_the_runs_error(
    relay: RelayProcess,
    upstream: ScriptedUpstream,
    name: str,
    status: str,
    content_type: str,
    body: bytes,
    outcome: tuple[str, str],
    texts: list[str],
) -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.answer(status, body, content_type)

    upstream.on(f"/{name}", handler)
    assert ask(relay, "POST", f"/{name}", f"Relay-Stream: {name}", "Prefer: respond-async").status == 202
    record = whole_run(relay, name)
    assert (record.outcome, record.texts) == (outcome, texts)
    if outcome[0] == "failed":
        assert status[:3] in record.ended["error"]
        assert len(record.ended["error"].encode()) <= 4096
        if content_type == "application/json":
            assert "slow down" in record.ended["error"]


def test_p3_an_endless_answer_that_is_no_stream_is_cut_off(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    closed = threading.Event()

    async def handler(exchange: Exchange) -> None:
        await exchange.head("200 OK", "text/plain")
        try:
            while True:
                await exchange.chunk(b"x" * 60_000)
        finally:
            closed.set()

    upstream.on(f"/{name}", handler)
    ask(relay, "POST", f"/{name}", f"Relay-Stream: {name}", "Prefer: respond-async")
    assert whole_run(relay, name).outcome == ("failed", "upstream_error")
    assert closed.wait(60)


def test_p3_an_async_run_whose_upstream_cannot_be_reached_or_is_too_slow_fails(
    relay: RelayProcess, impatient: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    async def silent(exchange: Exchange) -> None:
        await exchange.closed()

    async def gone(exchange: Exchange) -> None:
        exchange.writer.close()

    upstream.on(f"/{name}/slow", silent)
    upstream.on(f"/{name}/gone", gone)
    for asked, path, reason in ((impatient, "slow", "upstream_timeout"), (relay, "gone", "upstream_error")):
        stream = f"{name}-{path}"
        answer = ask(
            asked, "POST", f"/{name}/{path}", "Prefer: respond-async", f"Relay-Stream: {stream}",
            f"Idempotency-Key: {name}", body=b"{}",
        )  # fmt: skip
        assert answer.status == 202
        assert whole_run(asked, stream).outcome == ("failed", reason)
        joined = ask(
            asked, "POST", f"/{name}/{path}", f"Relay-Stream: {stream}", f"Idempotency-Key: {name}",
            body=b"{}",
        )  # fmt: skip
        assert (joined.status, joined.problem["code"]) == (502, "upstream_error")
        # One that is given up so soon may not have reached upstream at all.
        assert upstream.calls(f"/{name}/{path}") in ((1,) if path == "gone" else (0, 1))


def test_p7_a_cancel_before_upstreams_head_aborts_the_call(
    relay: RelayProcess, another: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    gate, closed = upstream.gate(), threading.Event()

    async def handler(exchange: Exchange) -> None:
        gate.arrived.release()
        await exchange.closed()
        closed.set()

    upstream.on(f"/{name}", handler)
    ask(relay, "POST", f"/{name}", f"Relay-Stream: {name}", "Prefer: respond-async", body=b"{}")
    gate.await_arrival()
    assert ask(another, "POST", f"/relay/v1/streams/{name}/cancel").status == 200
    assert closed.wait(60)
    record = whole_run(relay, name)
    assert (record.outcome, record.texts) == (("cancelled", "client_cancel"), [])


def test_a_body_too_large_to_be_kept_is_not_answered_before_it_is_sent(
    small: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    answer = ask(small, "POST", f"/{name}", "Prefer: respond-async", body=b"x" * 1001)
    assert (answer.status, answer.problem["code"]) == (413, "body_too_large")
    assert upstream.calls(f"/{name}") == 0


def test_a_run_that_relay_is_asked_to_call_upstream_for(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    upstream.on_stream(f"/{name}", [b"data: one\n\n"])
    called = {
        "method": "PUT",
        "path": f"/{name}?q=%20",
        "headers": {"X-Mine": "1", "Relay-Stream": "other", "Connection": "x-drop", "X-Drop": "1"},
        "body": {"a": ["\u00fc"]},
    }
    document = {"run": "mine", "metadata": {"user": 1}, "upstream": called}
    answer = ask(
        relay, "POST", f"/relay/v1/streams/{name}/runs", "Content-Type: application/json",
        body=json.dumps(document).encode(),
    )  # fmt: skip
    assert answer.status == 202
    assert whole_run(relay, name, "mine").texts == ["one"]
    received = upstream.received[-1]
    assert (received.method, received.target) == ("PUT", f"/{name}?q=%20")
    assert received.body == '{"a":["\u00fc"]}'.encode()
    names = {key for key, _ in received.headers}
    assert names == {"host", "x-mine", "content-type", "content-length", "accept-encoding", "traceparent"}


# --- routes that a client calls already ---------------------------------------------------------------


def test_a_page_reloaded_gets_its_streams_current_answer_in_its_own_format_and_can_stop_it(
    small: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    path = f"/named/{name}"
    assert ask(small, "GET", f"{path}/stream").status == 204
    assert ask(small, "POST", f"{path}/stop", body=b"{}").status == 204
    closed = endless(upstream, path, CHUNK)
    with Reading(small.url + path, "POST", b"{}") as first, Reading(f"{small.url}{path}/stream") as second:
        assert second.headers["content-type"] == "text/event-stream"
        assert [block.data for block in second.take(1)] == [block.data for block in first.take(1)]
        stopped = ask(small, "POST", f"{path}/stop", body=b"{}")
        assert (stopped.status, json.loads(stopped.body)["reason"]) == (200, "client_cancel")
        for reading in (first, second):
            assert json.loads(reading.take(1)[0].data)["error"]["code"] == "client_cancel"
    assert closed.wait(60)
    assert ask(small, "GET", f"{path}/stream").status == 204
    assert ask(small, "POST", f"{path}/stop", body=b"{}").status == 204
    assert upstream.calls(f"{path}/stream") == upstream.calls(f"{path}/stop") == 0
    assert ask(small, "GET", "/named/a%2Fb/stream").problem["code"] == "invalid_name"
    assert ask(small, "PUT", f"{path}/stop").status == 404, "other methods are upstream's"
    assert upstream.calls(f"{path}/stop") == 1
