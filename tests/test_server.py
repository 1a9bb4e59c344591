"""Connections: what a client may send, and what becomes of an answer when it or the client breaks off."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time

import pytest
from producing import Producer
from raw_client import RawClient
from relay_process import RelayProcess
from scripted_upstream import Exchange, ScriptedUpstream

from relay.server import HEAD_MAX_BYTES, Gate, in_chunk


async def echo(exchange: Exchange) -> None:
    await exchange.answer("200 OK", exchange.received.body, "application/octet-stream")


# --- heads --------------------------------------------------------------------------------------------


def test_a_large_head_that_fits_is_served(relay: RelayProcess, upstream: ScriptedUpstream, name: str) -> None:
    upstream.on(f"/{name}", echo)
    with RawClient(relay.port) as client:
        client.request("GET", f"/{name}", "X-Large: " + "a" * (HEAD_MAX_BYTES - 1000))
        assert client.answer().status == 200


@pytest.mark.parametrize("size", [HEAD_MAX_BYTES, 5 * HEAD_MAX_BYTES])
def test_a_head_that_is_too_large_is_431_and_never_reaches_upstream(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str, size: int
) -> None:
    upstream.on(f"/{name}", echo)
    with RawClient(relay.port) as client:
        client.request("GET", f"/{name}", "X-Large: " + "a" * size)
        answer = client.answer()
        assert (answer.status, answer.problem["code"]) == (431, "head_too_large")
        assert client.ended()
    assert upstream.calls(f"/{name}") == 0


def test_a_head_that_never_ends_is_cut_off(relay: RelayProcess, name: str) -> None:
    with RawClient(relay.port) as client:
        client.send(f"GET /{name} HTTP/1.1\r\n".encode())
        for _ in range(HEAD_MAX_BYTES // 1000 + 1):
            client.send(b"X-More: " + b"a" * 990 + b"\r\n")
        assert client.answer().problem["code"] == "head_too_large"
        assert client.ended()


@pytest.mark.parametrize("size", [HEAD_MAX_BYTES, 4 * HEAD_MAX_BYTES])
def test_a_large_body_in_one_piece_with_its_head_is_no_large_head(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str, size: int
) -> None:
    upstream.on(f"/{name}", echo)
    with RawClient(relay.port) as client:
        for _ in range(2):
            client.request("POST", f"/{name}", body=b"x" * size)
            assert client.answer().body == b"x" * size


def test_a_head_that_comes_byte_by_byte_is_read(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    upstream.on(f"/{name}", echo)
    with RawClient(relay.port) as client:
        for byte in f"GET /{name} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode():
            client.send(bytes([byte]))
        assert client.answer().status == 200


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"hello\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET http://other.test HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"POST / HTTP/1.1\r\nHost: [::1]\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1_0\r\n\r\n0123456789",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length : 3\r\n\r\nabc",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n Folded: 1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: a\x00b\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
    ],
)
def test_a_request_that_can_be_read_in_two_ways_is_refused(
    relay: RelayProcess, upstream: ScriptedUpstream, request_bytes: bytes
) -> None:
    """RFC 9112 section 11.2: what front and back may read differently is how requests are smuggled."""
    called = len(upstream.received)
    with RawClient(relay.port) as client:
        client.send(request_bytes)
        answer = client.answer()
        assert (answer.status, answer.problem["code"]) == (400, "malformed_request")
        assert client.ended()
    assert len(upstream.received) == called


def test_a_transfer_coding_that_would_be_lost_is_refused(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    upstream.on(f"/{name}", echo)
    with RawClient(relay.port) as client:
        client.request("POST", f"/{name}", "Transfer-Encoding: gzip, chunked")
        client.send(b"0\r\n\r\n")
        assert client.answer().problem["code"] == "bad_request"
    assert upstream.calls(f"/{name}") == 0


def test_a_chunked_body_that_is_malformed_is_refused(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    upstream.on(f"/{name}", echo)
    with RawClient(relay.port) as client:
        client.request("POST", f"/{name}", "Transfer-Encoding: chunked")
        client.send(b"3\r\nabc\r\nzz\r\n")
        assert client.answer().problem["code"] == "malformed_request"
        assert client.ended()


# --- one connection, several requests -----------------------------------------------------------------


def test_requests_sent_ahead_are_answered_in_order(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    upstream.on(f"/{name}", echo)
    with RawClient(relay.port) as client:
        for n in range(5):
            client.request("POST", f"/{name}", body=b"%d" % n)
        assert [client.answer().body for _ in range(5)] == [b"0", b"1", b"2", b"3", b"4"]


def test_a_request_sent_ahead_of_a_stream_that_breaks_off_is_not_answered(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    """The next answer would be taken for the rest of the one that broke."""
    gate = upstream.gate()

    async def handler(exchange: Exchange) -> None:
        await exchange.head()
        await exchange.chunk(b"data: one\n\n")
        await gate.wait()
        exchange.writer.close()

    upstream.on(f"/{name}", handler)
    with RawClient(relay.port) as client:
        client.request("GET", f"/{name}")
        client.request("GET", "/relay/healthz")
        client.read_until(b"data: one\n\n")
        gate.open()
        assert client.rest().strip() == b""


def test_rubbish_behind_a_request_breaks_its_answer_and_is_not_written_into_it(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    gate = upstream.gate()

    async def handler(exchange: Exchange) -> None:
        await exchange.head()
        await exchange.chunk(b"data: one\n\n")
        await gate.wait()
        await exchange.end()

    upstream.on(f"/{name}", handler)
    with RawClient(relay.port) as client:
        client.request("GET", f"/{name}")
        client.read_until(b"data: one\n\n")
        client.send(b"rubbish\r\n\r\n")
        assert client.rest().strip() == b""
    gate.open()


def test_a_connection_goes_on_after_an_error(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    upstream.on(f"/{name}", echo)
    with RawClient(relay.port) as client:
        client.request("GET", "/relay/no-such-route")
        assert client.answer().problem["code"] == "route_not_found"
        client.request("POST", f"/{name}", "Last-Event-ID: rly.forged", body=b"z" * 300_000)
        assert client.answer().problem["code"] == "resume_unknown"
        client.request("POST", f"/{name}", body=b"after")
        assert client.answer().body == b"after"


def test_a_client_that_waits_for_a_hundred_is_told_to_continue(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    upstream.on(f"/{name}", echo)
    with RawClient(relay.port) as client:
        client.request("POST", f"/{name}", "Expect: 100-continue", "Content-Length: 2")
        assert client.answer().status == 100
        client.send(b"hi")
        assert client.answer().body == b"hi"
    (received,) = upstream.requests(f"/{name}")
    assert received.header("expect") is None


def test_appends_sent_ahead_are_answered_in_order_and_the_connection_ends_when_its_client_says_so(
    relay: RelayProcess, name: str
) -> None:
    producer = Producer(relay, name)
    target = f"/relay/v1/streams/{name}/runs/{producer.run}/frames"
    headers = ("Content-Type: application/json", f"Relay-Writer: {producer.writer}")
    with RawClient(relay.port) as client:
        for n in range(1, 5):
            client.request("POST", target, *headers, f"Relay-Seq: {n}", body=b'{"data":"one"}')
        client.request("POST", target, *headers, "Connection: close", body=b'{"data":"one"}')
        answers = [client.answer() for _ in range(5)]
        assert [json.loads(answer.body)["next_seq"] for answer in answers] == [2, 3, 4, 5, 6]
        assert [answer.header("connection") for answer in answers] == [None, None, None, None, "close"]
        assert client.ended()


def test_a_producer_that_waits_for_a_hundred_is_told_to_continue(relay: RelayProcess, name: str) -> None:
    producer = Producer(relay, name)
    target = f"/relay/v1/streams/{name}/runs/{producer.run}/frames"
    headers = ("Content-Type: application/json", f"Relay-Writer: {producer.writer}")
    with RawClient(relay.port) as client:
        client.request("POST", target, *headers, "Expect: 100-continue", "Content-Length: 14")
        assert client.answer().status == 100
        client.send(b'{"data":"one"}')
        assert json.loads(client.answer().body)["appended"] == 1


# --- upgrades -----------------------------------------------------------------------------------------


def test_a_websocket_is_refused_as_not_supported(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    upstream.on(f"/{name}", echo)
    with RawClient(relay.port) as client:
        client.request(
            "GET",
            f"/{name}",
            "Connection: Upgrade",
            "Upgrade: websocket",
            "Sec-WebSocket-Version: 13",
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        )
        answer = client.answer()
        assert (answer.status, answer.problem["code"]) == (501, "upgrade_unsupported")
        assert client.ended()
    assert upstream.calls(f"/{name}") == 0


def test_a_wish_for_http2_is_ignored_and_stays_behind(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    upstream.on(f"/{name}", echo)
    wish = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABk")
    with RawClient(relay.port) as client:
        client.request("POST", f"/{name}", *wish, body=b"hello")
        assert client.answer().body == b"hello"
        client.request("POST", f"/{name}", *wish, "Transfer-Encoding: chunked")
        client.send(b"3\r\nhel\r\n")
        client.send(b"2\r\nlo\r\n0\r\n\r\n")
        assert client.answer().body == b"hello"
        client.request("GET", f"/{name}", *wish)
        assert client.answer().status == 200
    sent = dict(upstream.requests(f"/{name}")[-1].headers)
    assert not {"upgrade", "http2-settings"} & set(sent)


JSON = "Content-Type: application/json"


# --- streams ------------------------------------------------------------------------------------------


def test_a_client_of_http_1_0_gets_a_stream_without_chunks(relay: RelayProcess, name: str) -> None:
    Producer(relay, name).push("one", "two", end="completed")
    with RawClient(relay.port) as client:
        client.send(f"GET /relay/v1/streams/{name}/events?run=latest&control=none HTTP/1.0\r\n\r\n".encode())
        answer = client.answer()
        assert answer.status == 200
        assert answer.header("transfer-encoding") is None
        assert answer.header("connection") == "close"
        body = client.rest()
        assert body.startswith(b"retry: ")
        assert body.count(b"\ndata: ") == 2
        assert body.endswith(b"\n\n")


def test_what_is_sent_ahead_of_the_end_of_a_stream_is_answered_after_it(
    relay: RelayProcess, name: str
) -> None:
    producer = Producer(relay, name)
    with RawClient(relay.port) as client:
        client.request("GET", f"/relay/v1/streams/{name}/events?run=current", "X-First: " + "a" * 1000)
        client.request("POST", f"/relay/v1/streams/{name}-2/runs", JSON, body=b'{"run":"r"}')
        client.request("GET", f"/relay/v1/streams/{name}-2/runs/r", "X-Third: c")
        while not [one for one in relay.json("/relay/v1/diagnostics")["readers"] if one["stream"] == name]:
            time.sleep(0.01)  # it reads the run that is open now, and after the end there is none
        producer.push("one", end="completed")
        stream = client.answer()
        assert stream.body.count(b"data: one\n") == 1
        assert b'"reason":"ended"' in stream.body
        assert client.answer().status == 201
        run = client.answer()
        assert json.loads(run.body)["run"] == "r"


def test_gate_lets_through_whoever_waits_and_forgets_who_left() -> None:
    async def test() -> None:
        gate = Gate()
        assert not gate.is_set()
        waiting = [asyncio.create_task(gate.wait()) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[1].cancel()
        await asyncio.wait([waiting[1]])
        assert not waiting[0].done()
        gate.set()
        assert await waiting[0]
        assert await waiting[2]
        assert waiting[1].cancelled()
        assert await gate.wait()
        gate.clear()
        assert not gate.is_set()
        late = asyncio.create_task(gate.wait())
        await asyncio.sleep(0)
        assert not late.done()
        gate.set()
        assert await late

    asyncio.run(test())


def test_one_piece_of_data_is_put_into_a_chunk_once() -> None:
    data, other = b"x" * 300, bytes(b"x" * 299 + b"y")
    coded = in_chunk(data)
    assert coded == b"12c\r\n" + data + b"\r\n"
    assert in_chunk(data) is coded
    assert in_chunk(other) == b"12c\r\n" + other + b"\r\n"
    assert in_chunk(data) == coded


def test_a_process_lets_itself_have_the_connections_it_wants_as_far_as_it_may() -> None:
    script = (
        "import resource, sys\n"
        "from relay.server import SPARE_FILES, allow_connections\n"
        "hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (300, min(hard, 4000) if hard > 0 else 4000))\n"
        "print(allow_connections(100), allow_connections(1000), allow_connections(9000))\n"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE)[0], SPARE_FILES)\n"
    )
    printed = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    some, more, most, limit, spare = map(int, printed.stdout.split())
    assert (some, more, most, limit) == (100, 1000, 4000 - spare, 4000)
