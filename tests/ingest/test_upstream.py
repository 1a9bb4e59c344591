from __future__ import annotations

import asyncio
import gzip
import random
import socket
import zlib
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import aiohttp
import pytest
from aiohttp.base_protocol import BaseProtocol
from hypothesis import given
from hypothesis import strategies as st
from relay_process import RelayProcess
from scripted_upstream import Exchange, ScriptedUpstream

from relay.errors import InvalidParameter, StartupError, UpstreamSlow, UpstreamUnreachable
from relay.ingest.upstream import (
    READ_MAX_BYTES,
    Answer,
    IdleBody,
    Inflater,
    TruncatedBody,
    Upstream,
    upstream_request,
)
from relay.settings import Settings


def inflate(coding: str, pieces: list[bytes]) -> bytes:
    inflater = Inflater(coding)
    out = []
    for piece in pieces:
        for data in inflater.feed(piece):
            assert 0 < len(data) <= READ_MAX_BYTES
            out.append(data)
    inflater.close()
    return b"".join(out)


# --- compression --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, READ_MAX_BYTES - 1, READ_MAX_BYTES, READ_MAX_BYTES + 1])
@pytest.mark.parametrize("more", range(0, 3 * 258, 37))
def test_output_that_ends_near_a_full_piece_is_not_held_back(size: int, more: int) -> None:
    """zlib may have consumed all its input and still owe output."""
    text = b"a" * (size + more)
    assert inflate("gzip", [gzip.compress(text)]) == text


@given(st.binary(max_size=3000), st.integers(1, 50))
def test_any_cut_of_the_input_gives_the_same_output(text: bytes, step: int) -> None:
    packed = gzip.compress(text)
    assert inflate("gzip", [packed[n : n + step] for n in range(0, len(packed), step)]) == text


def test_deflate_is_read_with_its_zlib_header() -> None:
    assert inflate("deflate", [zlib.compress(b"hello")]) == b"hello"


def test_a_body_of_several_members_is_one_text() -> None:
    assert inflate("x-gzip", [gzip.compress(b"one") + gzip.compress(b"two")]) == b"onetwo"


@pytest.mark.parametrize("cut", [1, 5, 12])
def test_compressed_data_that_breaks_off_is_truncated(cut: int) -> None:
    with pytest.raises(TruncatedBody, match="broke off"):
        inflate("gzip", [gzip.compress(b"hello")[:-cut]])


def test_data_that_is_not_compressed_is_truncated() -> None:
    with pytest.raises(TruncatedBody, match="cannot be read"):
        inflate("gzip", [b"data: hello\n\n"])


def test_what_was_flushed_is_there_before_the_end() -> None:
    packer = zlib.compressobj(wbits=31)
    noise = random.Random(1).randbytes(READ_MAX_BYTES * 2)
    packed = packer.compress(noise) + packer.flush(zlib.Z_SYNC_FLUSH)
    assert b"".join(Inflater("gzip").feed(packed)) == noise


# --- settings and connections -------------------------------------------------------------------------


@pytest.mark.parametrize("url", ["", "localhost:9000", "ftp://host", "http://", "/path"])
def test_a_base_url_that_is_none_stops_the_start(url: str) -> None:
    with pytest.raises(StartupError):
        Upstream(url, Settings())


@pytest.mark.parametrize(
    ("url", "wish", "host"),
    [
        ("http://127.0.0.1:9000", "", ""),
        ("https://api.example/base", "", "api.example"),
        ("https://api.example:8443", "", "api.example:8443"),
        ("http://127.0.0.1:9000", "api.example", "api.example"),
        ("https://api.example", "other.example", "other.example"),
    ],
)
def test_an_upstream_over_tls_is_asked_for_by_its_own_name(url: str, wish: str, host: str) -> None:
    assert Upstream(url, Settings(upstream_host=wish)).host == host


def test_upstream_is_told_the_name_that_the_client_asked_for(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    upstream.on_stream(f"/{name}", [b"data: hello\n\n"])
    assert relay.get(f"/{name}", Host="app.localhost:80")[0] == 200
    told = [received.header("host") for received in upstream.received if received.target == f"/{name}"]
    assert told == ["app.localhost:80"]


def test_upstream_is_told_the_name_that_is_set_and_its_own_path_before_every_target(
    upstream: ScriptedUpstream, tmp_path: Path, name: str
) -> None:
    upstream.on_stream(f"/{name}/base/x", [b"data: hello\n\n"])
    with RelayProcess.start(
        journal=f"sqlite:///{tmp_path / 'relay.db'}",
        upstream=f"{upstream.url}/{name}/base/",
        upstream_host="api.example:81",
    ) as relay:
        assert relay.get("/x?q=1", Host="app.localhost:80")[0] == 200
    assert [
        (received.target, received.header("host"))
        for received in upstream.received
        if name in received.target
    ] == [(f"/{name}/base/x?q=1", "api.example:81")]


def test_an_upstream_that_takes_no_connection_is_unreachable() -> None:
    async def check(port: int) -> None:
        backend = Upstream(f"http://127.0.0.1:{port}", Settings(upstream_connect_timeout_s=0.2))
        await backend.start()
        with pytest.raises(UpstreamUnreachable, match="in time"):
            await backend.call("GET", "/x", [], None)
        await backend.close()

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = listener.getsockname()
        filling = [socket.socket() for _ in range(4)]  # the queue of connections nobody accepts
        try:
            for waiting in filling:
                waiting.setblocking(False)
                waiting.connect_ex(address)
            asyncio.run(check(address[1]))
        finally:
            for waiting in filling:
                waiting.close()


# --- silence ------------------------------------------------------------------------------------------


class Clocked(asyncio.SelectorEventLoop):
    """A loop whose clock is moved by the test."""

    now = 1000.0

    def time(self) -> float:
        return self.now


IDLE_S = 10.0


def with_body(check: Callable[[Clocked, Answer, aiohttp.StreamReader], Coroutine[Any, Any, None]]) -> None:
    """Run a check with an answer and what feeds its body."""
    loop = Clocked()

    async def run() -> None:
        protocol = BaseProtocol(loop)
        protocol.transport = asyncio.Transport()
        body = aiohttp.StreamReader(protocol, READ_MAX_BYTES, loop=loop)
        response = SimpleNamespace(
            status=200, raw_headers=(), connection=None, content=body, close=lambda: None
        )
        answer = Answer(cast(aiohttp.ClientResponse, response), IDLE_S)
        try:
            await asyncio.wait_for(check(loop, answer, body), 1000 * IDLE_S)
        finally:
            answer.close()

    try:
        loop.run_until_complete(run())
    finally:
        loop.close()


async def settled() -> None:
    """Let everything happen that is due by now."""
    for _ in range(5):
        await asyncio.sleep(0)


def test_a_body_is_idle_when_nothing_came_for_so_long_since_its_last_piece() -> None:
    async def check(loop: Clocked, answer: Answer, body: aiohttp.StreamReader) -> None:
        for _ in range(5):
            reading = asyncio.create_task(answer.read(IDLE_S))
            await settled()
            loop.now += IDLE_S * 0.7
            await settled()
            body.feed_data(b"piece")
            assert await reading == b"piece"
        reading = asyncio.create_task(answer.read(IDLE_S))
        await settled()
        loop.now += IDLE_S * 0.9
        await settled()
        assert not reading.done()
        loop.now += IDLE_S * 0.2
        with pytest.raises(IdleBody, match="silent for 10 s"):
            await reading

    with_body(check)


def test_silence_counts_while_somebody_waits_and_what_has_come_by_then_is_none() -> None:
    async def check(loop: Clocked, answer: Answer, body: aiohttp.StreamReader) -> None:
        body.feed_data(b"one")
        assert await answer.read(IDLE_S) == b"one"
        loop.now += 3 * IDLE_S  # the journal is slow
        await settled()
        reading = asyncio.create_task(answer.read(IDLE_S))
        await settled()
        body.feed_data(b"two")
        loop.now += 3 * IDLE_S  # and so is the loop
        assert await reading == b"two"
        reading = asyncio.create_task(answer.read(IDLE_S))
        await settled()
        loop.now += 2 * IDLE_S
        with pytest.raises(IdleBody):
            await reading

    with_body(check)


def test_what_came_before_a_break_is_given_first() -> None:
    async def check(loop: Clocked, answer: Answer, body: aiohttp.StreamReader) -> None:
        body.feed_data(b"one")
        body.set_exception(aiohttp.ClientPayloadError("broken"))
        assert await answer.read(IDLE_S) == b"one"
        for _ in range(2):
            with pytest.raises(TruncatedBody):
                await answer.read(IDLE_S)

    with_body(check)


def test_a_slow_upload_does_not_use_up_upstreams_time(upstream: ScriptedUpstream, name: str) -> None:
    """While the client is waited for, the header timeout stands still; it begins anew with the body's end."""
    limit_s, called = 10.0, upstream.gate()

    async def echo(exchange: Exchange) -> None:
        await exchange.answer("200 OK", exchange.received.body)

    async def silent(exchange: Exchange) -> None:
        called.arrived.release()
        await exchange.closed()

    async def body(loop: Clocked) -> AsyncIterator[bytes]:
        for piece in (b"a", b"b"):
            loop.now += 10 * limit_s
            await settled()
            yield piece

    async def check() -> None:
        loop = cast(Clocked, asyncio.get_running_loop())
        backend = Upstream(upstream.url, Settings(upstream_header_timeout_s=limit_s))
        await backend.start()
        answer = await backend.call("POST", f"/{name}", [], body(loop))
        assert b"".join([data async for data in answer.body()]) == b"ab"
        answer.close()
        asked = asyncio.create_task(backend.call("POST", f"/{name}/silent", [], body(loop)))
        await asyncio.to_thread(called.await_arrival)
        loop.now += limit_s * 0.9
        await settled()
        assert not asked.done()
        loop.now += limit_s * 0.2
        with pytest.raises(UpstreamSlow):
            await asked
        await backend.close()

    upstream.on(f"/{name}", echo)
    upstream.on(f"/{name}/silent", silent)
    with asyncio.Runner(loop_factory=Clocked) as runner:
        runner.run(check())


# --- requests of relay's own --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("document", "request_"),
    [
        ({"path": "/a"}, ("GET", "/a", [], None)),
        ({"path": "/a", "body": None}, ("GET", "/a", [], None)),
        ({"path": "/a?x=%2F..", "body": "text"}, ("POST", "/a?x=%2F..", [], b"text")),
        (
            {"path": "/a", "body": {"b": 1}},
            ("POST", "/a", [(b"content-type", b"application/json")], b'{"b":1}'),
        ),
        (
            {"method": "PATCH", "path": "//a/...", "headers": {"Content-Type": "a/b"}, "body": []},
            ("PATCH", "//a/...", [(b"content-type", b"a/b")], b"[]"),
        ),
        (
            {
                "path": "/",
                "headers": {
                    "Host": "h", "Connection": "x-a", "X-A": "1", "Relay-If-Busy": "reject", "TE": "trailers",
                    "Content-Length": "9", "X-B": " b\u00fc ",
                },
            },
            ("GET", "/", [(b"x-b", "b\u00fc".encode())], None),
        ),
    ],
)  # fmt: skip
def test_a_request_of_relays_own_is_read(document: Any, request_: tuple[Any, ...]) -> None:
    assert tuple(upstream_request(document)) == request_


@pytest.mark.parametrize(
    "document",
    [
        None,
        [],
        "/a",
        {},
        {"path": 1},
        {"path": ""},
        {"path": "a"},
        {"path": "http://elsewhere.test/"},
        {"path": "/a b"},
        {"path": "/a#b"},
        {"path": "/a\\b"},
        {"path": "/a\r\nX: 1"},
        {"path": "/caf\u00e9"},
        {"path": "/.."},
        {"path": "/a/../../b"},
        {"path": "/a/./b"},
        {"path": "/a/%2e%2E/b"},
        {"path": "/a%2f..%2fb"},
        {"path": "/a/%252e%252e/b"},
        {"path": "/a/..;x=1/b"},
        {"path": "/a%5c..%5cb"},
        {"path": "/a", "method": ""},
        {"path": "/a", "method": "post it"},
        {"path": "/a", "method": "CONNECT"},
        {"path": "/a", "method": "HEAD"},
        {"path": "/a", "method": 1},
        {"path": "/a", "headers": []},
        {"path": "/a", "headers": {"a": 1}},
        {"path": "/a", "headers": {"a b": "c"}},
        {"path": "/a", "headers": {"": "c"}},
        {"path": "/a", "headers": {"a": "b\r\nc: d"}},
        {"path": "/a", "headers": {"a": "b\n"}},
        {"path": "/a", "headers": {"caf\u00e9": "b"}},
        {"path": "/a", "url": "http://elsewhere.test/"},
    ],
)
def test_a_request_that_could_reach_anything_but_upstream_is_refused(document: Any) -> None:
    with pytest.raises(InvalidParameter):
        upstream_request(document)
