"""Upstreams and clients that do not keep to the rules: each gets its stated answer, and relay goes on."""

from __future__ import annotations

import gzip
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from producing import Producer
from raw_client import RawAnswer, RawClient
from reading import Reading
from relay_process import RelayProcess
from run_record import whole_run
from scripted_upstream import Exchange, ScriptedUpstream


@pytest.fixture(scope="module")
def hurried(upstream: ScriptedUpstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RelayProcess]:
    """A relay that does not wait long for a head."""
    journal = f"sqlite:///{tmp_path_factory.mktemp('hurried') / 'relay.db'}"
    with RelayProcess.start(journal=journal, upstream=upstream.url, upstream_header_timeout_s=0.3) as process:
        yield process


def ask(relay: RelayProcess, path: str, *headers: str) -> RawAnswer:
    with RawClient(relay.port) as client:
        client.request("GET", path, *headers)
        return client.answer()


@pytest.mark.parametrize("sent", [b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nContent-Type: text/ev"])
def test_a_head_that_does_not_end_is_a_timeout_and_closed(
    hurried: RelayProcess, upstream: ScriptedUpstream, name: str, sent: bytes
) -> None:
    closed = threading.Event()

    async def handler(exchange: Exchange) -> None:
        await exchange.send(sent)
        await exchange.closed()
        closed.set()

    upstream.on(f"/{name}", handler)
    answer = ask(hurried, f"/{name}")
    assert (answer.status, answer.problem["code"]) == (504, "upstream_timeout")
    assert closed.wait(60)


@pytest.mark.parametrize(
    "piece", [b"X-More: " + b"a" * 1000 + b"\r\n", b"a" * 1000], ids=["headers", "one line"]
)
def test_an_endless_head_is_refused_in_bounded_memory(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str, piece: bytes
) -> None:
    closed = threading.Event()

    async def handler(exchange: Exchange) -> None:
        await exchange.send(b"HTTP/1.1 200 OK\r\nX-First: ")
        try:
            while True:
                await exchange.send(piece)
        finally:
            closed.set()

    upstream.on(f"/{name}", handler)
    before = relay.rss_bytes()
    answer = ask(relay, f"/{name}")
    assert (answer.status, answer.problem["code"]) == (502, "upstream_invalid")
    assert closed.wait(60)
    assert relay.rss_bytes() - before < 32 * 1024 * 1024


@pytest.mark.parametrize(
    "head",
    [
        b"hello\r\n\r\n",
        b"HTTP/1.1 999 Odd\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 600 Odd\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: a\x01b\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
    ],
)
def test_a_head_that_cannot_be_passed_on_is_invalid(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str, head: bytes
) -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.send(head)
        exchange.writer.close()

    upstream.on(f"/{name}", handler)
    answer = ask(relay, f"/{name}")
    assert (answer.status, answer.problem["code"]) == (502, "upstream_invalid")


def test_a_length_beside_chunks_says_nothing(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.head("200 OK", "text/plain", "Content-Length: 3")
        await exchange.chunk(b"longer than three")
        await exchange.end()
        exchange.writer.close()

    upstream.on(f"/{name}", handler)
    answer = ask(relay, f"/{name}")
    if answer.status == 200:
        assert (answer.body, answer.whole) == (b"longer than three", True)
    else:
        assert answer.problem["code"] == "upstream_invalid"


def test_an_upstream_that_closes_without_a_word_is_unreachable(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    async def handler(exchange: Exchange) -> None:
        exchange.writer.close()

    upstream.on(f"/{name}", handler)
    answer = ask(relay, f"/{name}")
    assert (answer.status, answer.problem["code"]) == (502, "upstream_unreachable")


def test_an_upstream_that_is_not_there_is_unreachable_and_nothing_is_journaled(
    tmp_path_factory: pytest.TempPathFactory, name: str
) -> None:
    journal = f"sqlite:///{tmp_path_factory.mktemp('nobody') / 'relay.db'}"
    with RelayProcess.start(journal=journal, upstream="http://127.0.0.1:9") as relay:
        answer = ask(relay, "/x", f"Relay-Stream: {name}")
        assert (answer.status, answer.problem["code"]) == (502, "upstream_unreachable")
        assert relay.get(f"/relay/v1/streams/{name}")[0] == 404


def test_a_silent_stream_fails_by_its_setting(upstream: ScriptedUpstream, tmp_path: Path, name: str) -> None:
    closed = threading.Event()

    async def handler(exchange: Exchange) -> None:
        # At once with its head: a pause between the two would be one.
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        await exchange.send(head + b"b\r\ndata: one\n\n\r\n")
        await exchange.closed()
        closed.set()

    upstream.on(f"/{name}", handler)
    journal = f"sqlite:///{tmp_path / 'relay.db'}"
    with RelayProcess.start(journal=journal, upstream=upstream.url, upstream_idle_s=0.3) as relay:
        answer = ask(relay, f"/{name}", f"Relay-Stream: {name}")
        assert not answer.whole
        record = whole_run(relay, name)
        assert record.outcome == ("failed", "upstream_timeout")
        assert record.texts == ["one"]
        assert closed.wait(60)


def test_malformed_chunks_truncate_a_stream(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    gate = upstream.gate()

    async def handler(exchange: Exchange) -> None:
        await exchange.head()
        await exchange.chunk(b"data: one\n\n")
        await gate.wait()
        await exchange.send(b"zz\r\n")
        await exchange.closed()

    upstream.on(f"/{name}", handler)
    with RawClient(relay.port) as client:
        client.request("GET", f"/{name}", f"Relay-Stream: {name}")
        client.read_until(b"data: one\n\n")
        gate.open()
        assert client.rest().strip() == b""
    assert whole_run(relay, name).outcome == ("failed", "upstream_truncated")


@pytest.mark.parametrize("coding", ["br", "zstd", "gzip, br", "compress"])
def test_a_coding_that_relay_cannot_remove_is_invalid(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str, coding: str
) -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.head("200 OK", "text/event-stream", f"Content-Encoding: {coding}")
        await exchange.closed()

    upstream.on(f"/{name}", handler)
    answer = ask(relay, f"/{name}", f"Relay-Stream: {name}")
    assert (answer.status, answer.problem["code"]) == (502, "upstream_invalid")
    assert relay.get(f"/relay/v1/streams/{name}")[0] == 404


@pytest.mark.parametrize("body", [b"not gzip at all", gzip.compress(b"data: one\n\n", mtime=0)[:-4]])
def test_a_compressed_stream_that_cannot_be_read_is_truncated(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str, body: bytes
) -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.head("200 OK", "text/event-stream", "Content-Encoding: gzip")
        await exchange.chunk(body)
        await exchange.end()

    upstream.on(f"/{name}", handler)
    assert not ask(relay, f"/{name}", f"Relay-Stream: {name}").whole
    assert whole_run(relay, name).outcome == ("failed", "upstream_truncated")


@pytest.mark.parametrize("lines", ["one", "many"])
def test_a_compression_bomb_is_read_in_bounded_memory(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str, lines: str
) -> None:
    """64 MB from 300 KB: one endless line is too large a frame, comments are dropped piece by piece."""
    filler = b"x" * 65536 if lines == "one" else b": " + b"x" * 65533 + b"\n"
    bomb = gzip.compress(b"data: one\n\n" + filler * 1024, compresslevel=1, mtime=0)

    async def handler(exchange: Exchange) -> None:
        await exchange.head("200 OK", "text/event-stream", "Content-Encoding: gzip")
        await exchange.chunk(bomb)
        await exchange.end()

    upstream.on(f"/{name}", handler)
    before = relay.rss_bytes()
    ask(relay, f"/{name}", f"Relay-Stream: {name}")
    record = whole_run(relay, name)
    assert relay.rss_bytes() - before < 32 * 1024 * 1024
    assert record.texts == ["one"]
    assert record.outcome == (
        ("failed", "frame_too_large") if lines == "one" else ("completed", "upstream_end")
    )


@pytest.mark.parametrize("cut", range(0, 160, 13))
def test_a_client_may_leave_at_every_byte_of_its_request(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str, cut: int
) -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.stream([b"data: one\n\n"])

    upstream.on(f"/{name}", handler)
    head = f"POST /{name} HTTP/1.1\r\nHost: localhost\r\nRelay-Stream: {name}\r\nContent-Length: 60\r\n\r\n"
    logged = len(relay.log)
    with RawClient(relay.port) as client:
        client.send((head.encode() + b"x" * 60)[:cut])
    assert ask(relay, f"/{name}").status == 200
    assert not [line for line in relay.log[logged:] if "Traceback" in line]


@pytest.mark.parametrize("cut", range(0, 330, 19))
def test_a_producer_may_leave_at_every_byte_of_a_whole_run(relay: RelayProcess, name: str, cut: int) -> None:
    """What came whole is journaled and nothing else is; only a body that is complete completes its run."""
    path = f"/relay/v1/streams/{name}/runs?end=completed"
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
    head += "Content-Type: application/x-ndjson\r\n\r\n"
    lines = [b'{"data":"%d"}\n' % n for n in range(6)]
    request = head.encode() + b"".join(b"%x\r\n%b\r\n" % (len(line), line) for line in lines) + b"0\r\n\r\n"
    logged = len(relay.log)
    with RawClient(relay.port) as client:
        client.send(request[:cut])
        if cut >= len(request):
            assert client.answer("POST").status == 201
    # The client may be gone before its run is opened.
    if cut >= len(head) and relay.get(f"/relay/v1/streams/{name}")[0] == 200:
        record = whole_run(relay, name)
        assert record.texts == [str(n) for n in range(len(record.texts))]
        whole = cut >= len(request)
        assert record.outcome == (
            ("completed", "producer_end") if whole else ("failed", "upstream_truncated")
        )
    assert not [line for line in relay.log[logged:] if "Traceback" in line]


@pytest.mark.parametrize("framing", [b"zz\r\n", b"5\r\n{}\r\nxx\r\n", b"-1\r\n"])
def test_malformed_chunks_of_a_push_end_nothing_and_keep_what_came(
    relay: RelayProcess, name: str, framing: bytes
) -> None:
    producer = Producer(relay, name)
    with producer.body(query="?end=completed") as body:
        body.lines("one")
        with Reading(f"{relay.url}/relay/v1/streams/{name}/events?control=none") as reading:
            assert reading.take(1)[0].data == "one"
        body.send_raw(framing)
        assert body.answer().status == 400
    assert producer.push("two", end="completed", Relay_Seq="2").status == 200
    assert whole_run(relay, name).texts == ["one", "two"]
