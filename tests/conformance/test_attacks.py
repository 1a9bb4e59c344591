"""Attacks, and what they meet. SECURITY.md has the table of them; those that a module's own tests make are
only named there."""

from __future__ import annotations

import ast
import base64
import contextlib
import gzip
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack  # type: ignore[import-untyped]
import pytest
from conformance.attacks import SECRET_TEXT, Victim, dispatched, leaks
from conformance.flood import flood
from guarded import ADMIN_KEY, PRODUCER_KEY, SECRET, SETTINGS, ask, asked_too_often, bearer, token
from producing import Producer
from raw_client import RawClient
from reading import Reading
from relay_process import RelayProcess
from run_record import whole_run
from scripted_upstream import Exchange, ScriptedUpstream

ROOT = Path(__file__).parent.parent.parent

JSON = {"Content_Type": "application/json"}


@pytest.fixture(scope="module")
def guarded(fresh_journal: Callable[[], str], upstream: ScriptedUpstream) -> Iterator[RelayProcess]:
    """A relay with keys and tokens, whose upstream has chats."""
    with RelayProcess.start(
        journal=fresh_journal(), upstream=upstream.url, stream_from="path:/chats/{stream}", **SETTINGS
    ) as relay:
        yield relay


@pytest.fixture
def victim(guarded: RelayProcess, name: str) -> Victim:
    return Victim.of(guarded, name)


@pytest.fixture(scope="module")
def asking(fresh_journal: Callable[[], str], upstream: ScriptedUpstream) -> Iterator[RelayProcess]:
    """A relay that knows no credentials itself and asks the application, which knows its cookie."""

    async def may(exchange: Exchange) -> None:
        known = exchange.received.header("cookie") == "session=1"
        await exchange.answer("204 No Content" if known else "401 Unauthorized", b"", "text/plain")

    upstream.on("/may-attack", may)
    with RelayProcess.start(
        journal=fresh_journal(), upstream=upstream.url, auth_url=f"{upstream.url}/may-attack", cors_origin="*"
    ) as relay:
        yield relay


def own_text(relay: RelayProcess, stream: str) -> bytes:
    """The whole of an ended stream's events, as they are on the wire."""
    with RawClient(relay.port) as client:
        client.request("GET", f"/relay/v1/streams/{stream}/events?run=latest")
        return client.answer().body


# --- another's stream ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wish",
    [
        {"Prefer": "respond-async"},
        {"Prefer": "wait=1, Respond-Async"},
        {"Relay_Supersedes": "latest"},
        {"Relay_Supersedes": "r"},
        {"Relay_If_Busy": "supersede"},
        {"Relay_If_Busy": "reject"},
        {"Prefer": "respond-async", "Idempotency_Key": "k"},
        {"Relay_Supersedes": "latest", "Idempotency_Key": "k"},
    ],
    ids=str,
)
def test_nothing_happens_in_a_chat_of_others_before_upstream_has_said_whose_it_is(
    guarded: RelayProcess, upstream: ScriptedUpstream, victim: Victim, wish: dict[str, str]
) -> None:
    """A request names its stream by its path, so anybody can name anybody's."""

    async def refuse(exchange: Exchange) -> None:
        await exchange.answer("403 Forbidden", b"not yours", "text/plain")

    upstream.on(f"/chats/{victim.stream}", refuse)
    mine = {"Relay_Authorization": f"Bearer {token('mine', scope='read write cancel')}"}
    for credential in ({}, mine, {"Cookie": f"relay_token={token('mine', scope='read write cancel')}"}):
        answer = ask(guarded.url, "POST", f"/chats/{victim.stream}", b"{}", **wish, **credential)
        assert answer.status == 403
        assert not leaks(answer)
    victim.assert_untouched()


def test_who_has_the_right_still_replaces_a_run_before_upstream_has_answered(
    guarded: RelayProcess, upstream: ScriptedUpstream, victim: Victim
) -> None:
    gate = upstream.gate()

    async def slow(exchange: Exchange) -> None:
        await gate.wait()
        await exchange.stream([b"data: x\n\n"])

    upstream.on(f"/chats/{victim.stream}", slow)
    runs = f"/relay/v1/streams/{victim.stream}/runs"
    may_cancel = token(victim.stream, scope="cancel")
    with RawClient(guarded.port) as client:
        client.request(
            "POST", f"/chats/{victim.stream}", "Relay-Supersedes: latest",
            f"Relay-Authorization: Bearer {may_cancel}", body=b"{}",
        )  # fmt: skip
        gate.await_arrival()
        old = json.loads(ask(guarded.url, "GET", f"{runs}/r", **bearer(PRODUCER_KEY)).body)
        assert (old["status"], old["reason"]) == ("cancelled", "superseded")
        gate.open()
        assert client.answer().status == 200


def test_a_key_of_a_caller_with_credentials_elsewhere_joins_nothing(
    guarded: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    """Model APIs take their keys in headers of their own."""
    upstream.on_stream(f"/{name}", [b"data: secret\n\n"])
    runs = set()
    for who in ({"X_Api_Key": "one"}, {"X_Api_Key": "two"}, {"Api_Key": "one"}, {"X_Goog_Api_Key": "one"}):
        with Reading(f"{guarded.url}/{name}", "POST", b"{}", Idempotency_Key="1", **who) as reading:
            runs.add(reading.headers["relay-run"])
            reading.frames()
    assert upstream.calls(f"/{name}") == len(runs) == 4


def test_a_producers_key_is_its_own_whatever_host_it_names(guarded: RelayProcess, name: str) -> None:
    runs = f"/relay/v1/streams/{name}/runs"
    opened = [
        ask(guarded.url, "POST", runs, b"{}", Idempotency_Key="1", **JSON, **who)
        for who in (
            {"Relay_Authorization": f"Bearer {PRODUCER_KEY}"},
            {"Relay_Authorization": f"Bearer {token(name, scope='write')}"},
            {"Authorization": f"Bearer {PRODUCER_KEY}"},
        )
    ]
    assert [answer.status for answer in opened] == [201] * 3
    assert len({json.loads(answer.body)["run"] for answer in opened}) == 3
    again = ask(
        guarded.url, "POST", runs, b"{}", Idempotency_Key="1", Host="h/relay/v1/streams/other/runs?x=",
        **JSON, **bearer(PRODUCER_KEY),
    )  # fmt: skip
    assert (again.status, json.loads(again.body)["run"]) == (200, json.loads(opened[2].body)["run"])


def test_a_resume_id_is_not_guessed(guarded: RelayProcess, upstream: ScriptedUpstream, name: str) -> None:
    upstream.on_stream(f"/{name}", [b"data: secret\n\n"])
    with Reading(f"{guarded.url}/{name}") as reading:
        mine = reading.frames()[0].id
    _, secret, cursor = mine.split(".")
    assert len(base64.urlsafe_b64decode(secret)) >= 24
    for guess in (
        f"rly.{secret[:-1]}.{cursor}", f"rly.{secret[:-1]}*.{cursor}", f"rly.{secret.swapcase()}.{cursor}",
        f"rly..{cursor}", f"rly.*.{cursor}", f"rly.{'A' * 32}.0-0", f"rly.{secret}.0-1", f"rly.{secret}.",
        f"rly.{secret}.{cursor}.{cursor}", f"rly.{secret[:16]}:{secret[16:]}.0-0", "rly.",
    ):  # fmt: skip
        answer = ask(guarded.url, "GET", f"/{name}", Last_Event_ID=guess)
        assert (answer.status, answer.code) == (410, "resume_unknown"), guess
    assert upstream.calls(f"/{name}") == 1


# --- tokens -------------------------------------------------------------------------------------------


def test_no_credential_is_ever_logged(fresh_journal: Callable[[], str], name: str) -> None:
    """Whatever goes wrong with a request: neither by relay, nor by the server, nor in a traceback."""
    reads, key = token(name), PRODUCER_KEY
    with RelayProcess.start(journal=fresh_journal(), upstream="http://127.0.0.1:9", **SETTINGS) as relay:
        for target in (f"/relay/v1/streams/{name}/events", "/relay/none", f"/{name}", "/relay/v1/session"):
            for method in ("GET", "POST", "DELETE"):
                for query in (f"?token={reads}", f"?token={reads}x", f"?x=%0d%0a&token={key}"):
                    ask(relay.url, method, target + query)
                for headers in (
                    bearer(reads), bearer(reads + "x"), {"Relay_Authorization": f"Bearer {key}"},
                    {"Relay_Authorization": key}, {"Cookie": f"relay_token={reads}; relay_token={key}"},
                ):  # fmt: skip
                    ask(relay.url, method, target, **headers)
        for rubbish in (
            f"GET /?token={reads} HTTP/9.9\r\n\r\n",
            f"GET /relay/v1/x?token={reads} HTTP/1.1\r\nHost: h\r\nAuthorization : Bearer {key}\r\n\r\n",
            f"POST / HTTP/1.1\r\nAuthorization: Bearer {key}\r\nTransfer-Encoding: chunked\r\n\r\nzz",
            f"GET /?token={reads}\xff HTTP/1.1\r\nHost: h\r\n\r\n",
        ):
            with RawClient(relay.port) as client:
                client.send(rubbish.encode("latin-1"))
                client.rest()
        ask(relay.url, "PUT", f"/relay/v1/streams/{name}", **bearer(key))
        with Reading(f"{relay.url}/relay/v1/streams/{name}/events?token={reads}") as reading:
            reading.take(1)
        relay.logged_line(f"reader ended stream={name}")
        relay.stop()
        signature = reads.rpartition(".")[2]
        for line in relay.log:
            assert not any(secret in line for secret in (signature, key, ADMIN_KEY, SECRET)), line


# --- paths --------------------------------------------------------------------------------------------

OWN_PATHS = [
    # what is relay's, and does not exist or needs a credential
    ("/relay/v1/streams/{}/../{}", 404),
    ("/relay/v1/streams/..%2f{}", 404),
    ("/relay/v1/streams/%2e%2e/{}", 404),
    ("/relay/../relay/v1/streams/{}", 404),
    ("/relay/%2e%2e/relay/v1/streams/{}", 404),
    ("/relay//v1/streams/{}", 404),
    ("/relay/v1//streams/{}", 404),
    ("/relay/v1/streams/{}/", 404),
    ("/relay/v1/streams/{};x=1", 400),
    ("/relay/v1/streams/{}%00", 400),
    ("/relay/v1/streams/{}%0a", 400),
    ("/relay/v1/streams/{}/runs%0a", 401),
    ("/relay/v1/streams/%252e%252e", 400),
    ("/%72elay/v1/streams/{}", 401),
    ("/relay%2fv1/streams/{}", 401),
    ("/relay/v1/streams/{}%2fevents", 401),
    ("/relay/v1/streams%2f{}%2fruns", 401),
    ("/relay/v1/streams/{}?%2f..", 401),
    ("/relay/v1/streams/{}#events", 401),
    ("http://elsewhere.example/relay/v1/streams/{}", 401),
    ("/relay/static/../v1/streams/{}", 404),
    ("/relay/static/..%2f..%2fsettings.py", 404),
    ("/relay/static/%2e%2e/settings.py", 404),
    ("/relay", 404),
    ("/relay/", 404),
    ("/relay/v1/Streams/{}", 404),
    ("/relay/healthz/../v1/streams/{}", 404),
    ("/relay/v1/streams%0a", 401),
]

UPSTREAMS_PATHS = [
    "//relay/v1/streams/{}",
    "/%2frelay/v1/streams/{}",
    "/./relay/v1/streams/{}",
    "/x/../relay/v1/streams/{}",
    "/x/%2e%2e/relay/v1/streams/{}",
    "/RELAY/v1/streams/{}",
    "/relay;x/v1/streams/{}",
    "/relay%3bx/v1/streams/{}",
    "/relay%00/v1/streams/{}",
    "/relay%20/v1/streams/{}",
    "/relayed/v1/streams/{}",
    "/%252frelay/v1/streams/{}",
    "/\\relay/v1/streams/{}",
    "/relay\\v1/streams/{}",
    "//evil.example/{}",
    "/@evil.example/{}",
    "/{}/%0d%0aX:y",
    "/.evil.example/{}",
]


def get(relay: RelayProcess, target: str, *headers: str) -> Any:
    with RawClient(relay.port) as client:
        client.request("GET", target, *headers)
        return client.answer()


@pytest.mark.parametrize(("target", "status"), OWN_PATHS)
def test_no_spelling_of_a_path_opens_a_guarded_route_or_reaches_upstream(
    guarded: RelayProcess, upstream: ScriptedUpstream, victim: Victim, target: str, status: int
) -> None:
    called = len(upstream.received)
    answer = get(guarded, target.format(victim.stream, victim.stream))
    assert answer.status == status
    assert SECRET_TEXT.encode() not in answer.body
    assert b"class Settings" not in answer.body
    assert len(upstream.received) == called


@pytest.mark.parametrize("target", UPSTREAMS_PATHS)
def test_a_path_that_only_looks_like_relays_is_upstreams_byte_for_byte(
    guarded: RelayProcess, upstream: ScriptedUpstream, victim: Victim, target: str
) -> None:
    """What is decided and what is sent on are the same bytes; nothing is resolved in between."""
    target = target.format(victim.stream)
    called = len(upstream.received)
    answer = get(guarded, target, "Authorization: Bearer the-application's")
    assert answer.status == 404
    assert answer.body == b'{"error": "not scripted"}'
    (received,) = upstream.received[called:]
    assert received.target == target
    assert received.header("host") == "localhost"  # as ever the client's


@pytest.mark.parametrize("request_line", ["OPTIONS * HTTP/1.1", "CONNECT evil.example:443 HTTP/1.1"])
def test_a_target_that_is_no_path_goes_nowhere(
    relay: RelayProcess, upstream: ScriptedUpstream, request_line: str
) -> None:
    called = len(upstream.received)
    with RawClient(relay.port) as client:
        client.send(f"{request_line}\r\nHost: localhost\r\n\r\n".encode())
        assert client.answer().status == 400
    assert len(upstream.received) == called


def test_an_absolute_target_goes_to_the_configured_upstream(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    upstream.on_stream(f"/{name}", [b"data: x\n\n"])
    assert get(relay, f"http://user:pw@evil.example:81/{name}").status == 200
    (received,) = upstream.requests(f"/{name}")
    assert received.header("host") == "localhost"


# --- HTTP ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("presented", "status"),
    [
        (b"1" * 1_000_000, 431),
        (b"1" * 60_000, 400),
        (b"rly." + b"A" * 60_000, 400),
        (b"1-1\x00", 400),
        (b"1-1\x01", 400),
        (b"1\t-1", 400),
        (b"\xff\xfe", 400),
        ("1-1\u2028".encode(), 400),
        ("\ufeff1-1".encode(), 400),
        ("\u0661-\u0661".encode(), 400),
        (b"9" * 400 + b"-" + b"9" * 100, 400),
        (b"1-1, 2-2", 400),
        (b"-1--1", 400),
    ],
    ids=lambda value: repr(value[:12]) if isinstance(value, bytes) else str(value),
)
def test_a_cursor_that_is_none_is_refused(
    relay: RelayProcess, name: str, presented: bytes, status: int
) -> None:
    Producer(relay, name)
    with RawClient(relay.port) as client:
        head = f"GET /relay/v1/streams/{name}/events HTTP/1.1\r\nHost: localhost\r\nLast-Event-ID: "
        client.send(head.encode())
        with contextlib.suppress(ConnectionError):  # it need not be taken to its end
            client.send(presented + b"\r\n\r\n")
        answer = client.answer()
        assert answer.status == status
        assert answer.problem["code"] in ("head_too_large", "malformed_cursor", "malformed_request")


SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.mark.parametrize(
    "head",
    [
        b"Content-Length: 4\r\nContent-Length: 4\r\n",
        b"Content-Length: 4, 4\r\n",
        b"Content-Length: +4\r\n",
        b"Content-Length: 0x4\r\n",
        b"Content-Length:\r\n",
        b"Content-Length: 99999999999999999999999\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n",
        b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: xchunked\r\n",
        b"Transfer-Encoding: identity\r\n",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n",
        b"Transfer-Encoding:\x0bchunked\r\n",
        b"Transfer-Encoding : chunked\r\n",
        b"Transfer-Encoding\r\n : chunked\r\n",
        b"X: y\nTransfer-Encoding: chunked\r\n",
        b"X: y\rTransfer-Encoding: chunked\r\n",
        b"X:\r\n Transfer-Encoding: chunked\r\n",
        b"X\x00: y\r\n",
        b": y\r\n",
    ],
    ids=repr,
)
def test_what_can_be_read_in_two_ways_smuggles_nothing(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str, head: bytes
) -> None:
    """Refused, or one request with one body: whatever is behind it never becomes a request of its own to
    upstream within that one's body, and relay passes no line on as another one."""
    called = len(upstream.received)
    with RawClient(relay.port) as client:
        client.send(f"POST /{name} HTTP/1.1\r\nHost: localhost\r\n".encode() + head + b"\r\n" + SMUGGLED)
        answer = client.answer()
        assert answer.status in (400, 404)
        if answer.status == 400:
            assert client.ended()
            assert len(upstream.received) == called
            return
    received = upstream.received[called]
    assert received.target == f"/{name}"
    assert b"smuggled" not in received.body
    assert received.header("transfer-encoding") is None
    assert all("\n" not in value and "\r" not in value for _, value in received.headers)


def test_trailers_are_not_taken_for_headers(
    guarded: RelayProcess, upstream: ScriptedUpstream, victim: Victim, name: str
) -> None:
    """Also when they come at once with the head, before anybody has looked at it."""

    async def echo(exchange: Exchange) -> None:
        await exchange.answer("200 OK", exchange.received.body)

    upstream.on(f"/{name}", echo)
    trailers = (
        f"Authorization: Bearer {PRODUCER_KEY}\r\nRelay-Stream: other\r\nX-Forwarded-For: 192.0.2.1\r\n"
        f"Cookie: relay_token={token(name)}\r\nLast-Event-ID: rly.x\r\n" + "X: y\r\n" * 1000
    )
    for method, target, status in (("POST", f"/{name}", 200), ("DELETE", f"/relay/v1/streams/{name}", 401)):
        with RawClient(guarded.port) as client:
            head = f"{method} {target} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
            client.send(f"{head}3;a=b\r\nabc\r\n0\r\n{trailers}\r\n".encode())
            assert client.answer().status == status
            client.request("GET", "/relay/healthz")
            assert client.answer().status == 200
    (received,) = upstream.requests(f"/{name}")
    assert received.body == b"abc"
    passed = {header for header, _ in received.headers}
    assert passed == {"host", "accept-encoding", "transfer-encoding"}
    victim.assert_untouched()


def test_a_chunk_extension_does_not_reach_upstream(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    async def echo(exchange: Exchange) -> None:
        await exchange.answer("200 OK", exchange.received.body)

    upstream.on(f"/{name}", echo)
    for extension in (b";a=b", b";a", b';a="\\";b"', b";" + b"a" * 100_000):
        with RawClient(relay.port) as client:
            client.request("POST", f"/{name}", "Transfer-Encoding: chunked")
            client.send(b"3" + extension + b"\r\nabc\r\n0\r\n\r\n")
            assert client.answer().body == b"abc"
    for extension in (b" ;a=b\n", b";a\n", b";a\r", b"\n", b" 3"):
        with RawClient(relay.port) as client:
            client.request("POST", f"/{name}", "Transfer-Encoding: chunked")
            client.send(b"3" + extension + b"\r\nabc\r\n0\r\n\r\n")
            assert client.answer().problem["code"] == "malformed_request"


def test_a_request_behind_a_refused_one_is_not_served(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    called = len(upstream.received)
    for refused in (
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX : y\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 70_000 + b"\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ):
        with RawClient(relay.port) as client:
            client.send(refused + SMUGGLED)
            assert client.answer().status in (400, 431)
            assert client.ended()
    assert not [request for request in upstream.received[called:] if request.target == "/smuggled"]


def test_too_many_header_fields_are_too_large_a_head(relay: RelayProcess) -> None:
    assert get(relay, "/relay/healthz", *(f"X-{n}: y" for n in range(400))).status == 200
    assert get(relay, "/relay/healthz", *("a:" for _ in range(15_000))).status == 431


def test_thousands_of_requests_in_one_read_are_not_taken(relay: RelayProcess) -> None:
    """Each would be set up at once, and nobody else served meanwhile."""
    with RawClient(relay.port) as client:
        client.send(b"GET /relay/healthz HTTP/1.1\r\nHost: localhost\r\n\r\n" * 90)
        assert {client.answer().status for _ in range(90)} == {200}
    with RawClient(relay.port) as client:
        with contextlib.suppress(ConnectionError):  # it need not be taken to its end
            client.send(b"GET /relay/healthz HTTP/1.1\r\nHost: localhost\r\n\r\n" * 2000)
        assert client.rest().count(b"HTTP/1.1 200") <= 101
    assert get(relay, "/relay/healthz").status == 200


def test_a_flood_of_connections_is_bounded_and_those_that_are_served_stay_so(
    fresh_journal: Callable[[], str],
) -> None:
    """500 here; `python3 tests/conformance/flood.py` makes 10,000."""
    with RelayProcess.start(journal=fresh_journal(), connections_max=100) as relay:
        with RawClient(relay.port) as served:
            served.request("GET", "/relay/healthz")
            assert served.answer().status == 200
            counted = flood(relay.port, 500)
            assert counted.held <= 100
            assert counted.refused >= 400
            served.request("GET", "/relay/healthz")
            assert served.answer().status == 200
        deadline = time.monotonic() + 60
        while get_or_none(relay.port) != 200:  # as soon as those are gone
            assert time.monotonic() < deadline


def get_or_none(port: int) -> int | None:
    try:
        with RawClient(port) as client:
            client.request("GET", "/relay/healthz")
            return client.answer().status
    except (AssertionError, ConnectionError, IndexError):
        return None


# --- bodies -------------------------------------------------------------------------------------------


def test_a_compressed_request_is_not_decompressed(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    """relay's own routes take it for what it is, and upstream gets it as it is."""
    bomb = gzip.compress(b" " * 50_000_000 + b"{}", mtime=0)
    before = relay.rss_bytes()
    headers = JSON | {"Content_Encoding": "gzip"}
    own = ask(relay.url, "POST", f"/relay/v1/streams/{name}/runs", bomb, **headers)
    assert (own.status, own.code) == (400, "invalid_parameter")

    async def length(exchange: Exchange) -> None:
        await exchange.answer("200 OK", b"%d" % len(exchange.received.body))

    upstream.on(f"/{name}", length)
    assert ask(relay.url, "POST", f"/{name}", bomb, **headers).body == b"%d" % len(bomb)
    assert relay.rss_bytes() - before < 32 * 1024 * 1024


DEEP = b"[" * 100_000
NESTED = b"[" * 600 + b"]" * 600


@pytest.mark.parametrize(
    "body",
    [
        DEEP,
        b'{"data":' + DEEP,
        b'{"data":' + NESTED + b"}",
        b'{"data":"x","data":' + NESTED + b"}",
        b'{"data":1e999999999}',
        b'{"data":NaN}',
        b'{"data":"\\ud800"}',
        b'{"event":{"relay":1},"data":1}',
        b'{"event":"x","event":"relay","data":1}',
    ],
    ids=lambda body: repr(body[:20]),
)
def test_json_made_to_break_its_reader_is_an_invalid_event(
    relay: RelayProcess, name: str, body: bytes
) -> None:
    producer = Producer(relay, name)
    for media_type in ("application/json", "application/x-ndjson"):
        answer = producer.ask("frames", body, Content_Type=media_type)
        assert answer.problem in ((400, "invalid_event"), (413, "frame_too_large"))
    assert producer.push("one", end="completed").status == 200
    assert whole_run(relay, name).texts == ["one"]


@pytest.mark.parametrize(
    "members",
    [
        b'"metadata":' + NESTED,
        b'"upstream":{"path":"/x","body":' + NESTED + b"}",
        b'"upstream":' + NESTED,
        b'"idle_timeout_s":1e400',
        b'"idle_timeout_s":' + b"9" * 5000,
        b'"run":"a","run":"../b"',
        b'"supersedes":' + NESTED,
        b'"seal":1',
    ],
    ids=lambda body: repr(body[:30]),
)
def test_wishes_made_to_break_their_reader_are_invalid(
    relay: RelayProcess, name: str, members: bytes
) -> None:
    logged = len(relay.log)
    answer = ask(relay.url, "POST", f"/relay/v1/streams/{name}/runs", b"{" + members + b"}", **JSON)
    assert (answer.status, answer.code) in ((400, "invalid_parameter"), (400, "invalid_name"))
    assert not [line for line in relay.log[logged:] if "Traceback" in line]


@pytest.mark.parametrize(
    "bomb",
    [
        b"\x81\xa4data" + b"\xdd\x00\x1f\xff\xff" * 2000,
        b"\x81\xa4data" + b"\xdf\x00\x0f\xff\xff\xa1a" * 2000,
        b"\x81\xa4data" + b"\x91" * 100_000,
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\xc9\xff\xff\xff\xff\x01",
        b"\x81\xa4data\xd6\xff\x00\x00\x00\x00",
        b"\x81\xa4data\xcb\x7f\xf0\x00\x00\x00\x00\x00\x00\xc1",
    ],
    ids=lambda bomb: repr(bomb[:14]),
)
def test_a_messagepack_bomb_is_refused_in_bounded_memory(relay: RelayProcess, name: str, bomb: bytes) -> None:
    """Headers that promise millions of members, one within the other."""
    producer = Producer(relay, name)
    before = relay.rss_bytes()
    answer = producer.ask("frames", bomb, Content_Type="application/msgpack")
    assert answer.problem in ((400, "invalid_event"), (413, "frame_too_large"))
    assert relay.rss_bytes() - before < 64 * 1024 * 1024


# --- forged frames ------------------------------------------------------------------------------------

ENDS = [
    "\n",
    "\r",
    "\r\n",
    "\n\n",
    "\r\r",
    "\0",
    "\u2028",
    "\u2029",
    "\x85",
    "\x0b",
    "\x0c",
    "\x1e",
    "\ufeff",
]
FORGED_ID = "9999-9999"
"""No stream here has so many frames, and nothing else that has an id ends in this: a time may hold `9999`."""

FORGED = f"id: {FORGED_ID}" + "{end}event: relay{end}data: {{}}{end}{end}retry: 1{end}{end}"


def pushed(relay: RelayProcess, stream: str, data: str, event: str | None, form: str) -> int:
    """Push one frame and end the run; the status."""
    producer = Producer(relay, stream)
    frame = {"data": data} | ({} if event is None else {"event": event})
    bodies: dict[str, Callable[[], bytes]] = {
        "application/json": lambda: json.dumps(frame).encode(),
        "application/x-ndjson": lambda: json.dumps(frame).encode() + b"\n",
        "application/msgpack": lambda: msgpack.packb(frame),
    }
    answer = producer.ask("frames", bodies[form](), Content_Type=form)
    assert producer.ask("end", {"status": "completed"}).status == 200
    return answer.status


@pytest.mark.parametrize("form", ["application/json", "application/x-ndjson", "application/msgpack"])
@pytest.mark.parametrize("end", ENDS, ids=repr)
def test_no_data_forges_a_frame(relay: RelayProcess, name: str, end: str, form: str) -> None:
    """Whatever its data, a frame is one event with one id, in every form that it is read in."""
    data = "x" + end + FORGED.format(end=end)
    assert pushed(relay, name, data, None, form) == 200
    path = f"/relay/v1/streams/{name}/events"
    for query in ("run=latest", "run=latest&envelope=json", "run=latest&control=comments"):
        with RawClient(relay.port) as client:
            client.request("GET", f"{path}?{query}")
            seen = dispatched(client.answer().body)
        assert not [block for block in seen if FORGED_ID in block.id]
        frames = [block for block in seen if block.data.startswith("x") or '"data":"x' in block.data]
        assert len(frames) == 1
        assert frames[0].event == ""
        controls = [json.loads(block.data)["type"] for block in seen if block.event == "relay"]
        assert set(controls) <= {"hello", "live", "run.started", "run.ended", "bye"}
    with RawClient(relay.port) as client:
        client.request("GET", f"{path}?run=latest", "Accept: application/x-ndjson")
        lines = [json.loads(line) for line in client.answer().body.split(b"\n") if line]
    assert [line["data"] for line in lines if line["event"] == ""] == [data]


@pytest.mark.parametrize("form", ["application/json", "application/x-ndjson", "application/msgpack"])
@pytest.mark.parametrize("end", ENDS, ids=repr)
def test_no_event_name_forges_a_frame(relay: RelayProcess, name: str, end: str, form: str) -> None:
    status = pushed(relay, name, "text", "a" + end + FORGED.format(end=end), form)
    assert status == (400 if "\n" in end or "\r" in end else 200)
    seen = dispatched(own_text(relay, name))
    assert not [block for block in seen if FORGED_ID in block.id]
    assert [block.data for block in seen if block.event.startswith("a")] == ["text"] * (status == 200)


@pytest.mark.parametrize(
    "event", ["relay", "relay ", " relay", "Relay", "relay\0", "\ufeffrelay", "rel\u00ady"]
)
def test_no_event_name_passes_for_relays(relay: RelayProcess, name: str, event: str) -> None:
    """`relay` alone is relay's; readers compare it exactly, as EventSource does."""
    status = pushed(relay, name, '{"type":"run.ended","status":"completed"}', event, "application/json")
    assert (status == 400) is (event == "relay")
    seen = [block.event for block in dispatched(own_text(relay, name)) if "run.ended" in block.data]
    assert seen.count("relay") == 1
    assert whole_run(relay, name).ended["frames"] == (0 if event == "relay" else 1)


@pytest.mark.parametrize("end", ENDS, ids=repr)
def test_no_metadata_and_no_error_text_forges_a_frame(relay: RelayProcess, name: str, end: str) -> None:
    forged = "x" + end + FORGED.format(end=end)
    producer = Producer(relay, name, metadata={"title": forged, forged: 1})
    assert producer.ask("end", {"status": "failed", "error": forged}).status == 200
    for query in ("", "&control=comments", "&envelope=json"):
        with RawClient(relay.port) as client:
            client.request("GET", f"/relay/v1/streams/{name}/events?run=latest{query}")
            answer = client.answer()
        assert not [block for block in dispatched(answer.body) if FORGED_ID in block.id]
        lines = re.split(r"[\r\n]", answer.body.decode())
        assert not [line for line in lines if line.startswith(f"id: {FORGED_ID}")]
    started = [block for block in dispatched(own_text(relay, name)) if "run.started" in block.data]
    assert json.loads(started[0].data)["metadata"]["title"] == forged
    cancelled = Producer(relay, f"{name}-2")
    assert cancelled.ask("cancel", {"reason": forged}).status == 200
    assert not [block for block in dispatched(own_text(relay, f"{name}-2")) if FORGED_ID in block.id]


@pytest.mark.parametrize(
    "head",
    [
        'Relay-Metadata: {"a": "x\\r\\nid: 9999-9999\\r\\n\\r\\n"}',
        "Relay-Stream: a\tb",
        "Relay-Stream: ../x",
        "Relay-Stream: \xe9",
        "Relay-Metadata: " + "[" * 600 + "]" * 600,
        "Relay-Metadata: nonsense",
        "Relay-Dialect: evil",
        "Content-Type: text/event-stream; x=\x85",
    ],
    ids=lambda head: repr(head[:40]),
)
def test_upstreams_head_forges_nothing(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str, head: str
) -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n")
        if not head.startswith("Content-Type"):
            await exchange.send(b"Content-Type: text/event-stream\r\n")
        await exchange.send(head.encode("latin-1") + b"\r\n\r\n")
        await exchange.chunk(b"data: one\n\n")
        await exchange.end()

    upstream.on(f"/{name}", handler)
    logged = len(relay.log)
    answer = get(relay, f"/{name}", f"Relay-Stream: {name}")
    assert answer.status in (200, 502)
    if answer.status == 200:
        assert FORGED_ID not in "".join(value for _, value in answer.headers)
        assert not [block for block in dispatched(own_text(relay, name)) if FORGED_ID in block.id]
    else:
        assert answer.problem["code"] == "upstream_invalid"
    assert not [line for line in relay.log[logged:] if "Traceback" in line]


@pytest.mark.parametrize("end", ENDS, ids=repr)
def test_no_upstream_event_forges_an_id(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str, end: str
) -> None:
    """Its own ids are dropped, so a client never presents one for relay's."""
    upstream.on_stream(
        f"/{name}",
        [
            b"\xef\xbb\xbf",
            ("data: x" + end + f"id: rly.{'A' * 32}.1-1{end}id: 9999-9999{end}{end}").encode(),
            b"\n\n",
        ],
    )
    with RawClient(relay.port) as client:
        client.request("GET", f"/{name}", f"Relay-Stream: {name}")
        body = client.answer().body
    seen = dispatched(body)
    assert len(seen) == 1
    assert seen[0].id.startswith("rly.")
    assert "A" * 32 not in seen[0].id
    assert FORGED_ID not in seen[0].id


@pytest.mark.parametrize(
    "name_of_it",
    [
        "a%0d%0aX-Evil:%20y",
        "a%00b",
        "a%20b",
        "a%E2%80%A8b",
        "%7bx%7d",
        "a%22b",
        "a'b",
        "a*b",
        "a%25b",
        "a[b",
        "a%3fb",
    ],
)
def test_no_name_gets_into_a_head(relay: RelayProcess, name: str, name_of_it: str) -> None:
    for path in (name_of_it, f"{name}/runs/{name_of_it}"):
        answer = ask(relay.url, "GET", f"/relay/v1/streams/{path}")
        assert (answer.status, answer.code) == (400, "invalid_name")
        assert "x-evil" not in answer.headers
    opened = ask(relay.url, "POST", f"/relay/v1/streams/{name}/runs", b'{"run":"a\\r\\nX-Evil: y"}', **JSON)
    assert opened.code == "invalid_name"


# --- where relay calls --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "//evil.example/x", "/@evil.example/x", "/:80@evil.example", "/.evil.example",
        "/x?u=http://evil.example",
        "/x;y", "/%2f%2fevil.example", "/x/..;/y", "/x/%2e%2e/y", "/x/%252e%252e/y", "/x/../y",
        "/\\evil.example",
        "\\\\evil.example", "@evil.example", "http://evil.example/", "evil.example", "",
        "/x\r\nHost: evil.example",
        "/x HTTP/1.1", "/x\0", "/é", "/x#y", "*",
    ],
)  # fmt: skip
def test_a_run_is_asked_of_the_configured_upstream_alone(
    relay: RelayProcess, upstream: ScriptedUpstream, name: str, path: str
) -> None:
    called = len(upstream.received)
    wishes = {
        "upstream": {
            "path": path,
            "headers": {
                "Host": "evil.example", "Relay-Stream": "other", "Transfer-Encoding": "chunked",
                "Content-Length": "999", "Connection": "x-secret", "X-Secret": "y",
                "Proxy-Authorization": "Basic eA==",
            },
            "body": {"a": 1},
        }
    }  # fmt: skip
    answer = ask(relay.url, "POST", f"/relay/v1/streams/{name}/runs", json.dumps(wishes).encode(), **JSON)
    if answer.status != 202:
        assert answer.code == "invalid_parameter"
        assert len(upstream.received) == called
        return
    whole_run(relay, name)
    (received,) = upstream.received[called:]
    assert received.target == path
    names = [header for header, _ in received.headers]
    assert received.header("host") == upstream.url.removeprefix("http://")
    assert names.count("content-length") == 1
    assert not {"relay-stream", "x-secret", "proxy-authorization", "transfer-encoding"} & set(names)


@pytest.mark.parametrize("header", ["X\r\nHost", "", "a b", "X:", "Hôst"])
def test_no_header_of_a_run_is_two(relay: RelayProcess, name: str, header: str) -> None:
    for headers in ({header: "x"}, {"X": "y\r\nHost: evil.example"}, {"X": "y\nZ: z"}, {"X": "\0"}):
        wishes = {"upstream": {"path": "/x", "headers": headers}}
        answer = ask(relay.url, "POST", f"/relay/v1/streams/{name}/runs", json.dumps(wishes).encode(), **JSON)
        assert (answer.status, answer.code) == (400, "invalid_parameter")


# --- names --------------------------------------------------------------------------------------------

# Names that would meet in one key, channel, pattern or row, if they were put together carelessly.
NEIGHBOURS = [
    ("{}", "{}:run:r", "{}:frames", "{}:meta", "{}:runs", "{}:index"),
    ("{}:run:r:x", "{}:run", "{}:follow:", "{}.r", "{}:r"),
    ("{}-A", "{}-a", "{}_", "{}~", "{}-", "{}..", "{}:"),
]


def filled(prefix: str, name: str, with_: str) -> str:
    """A name of 200 characters."""
    begin = prefix.format(name)
    return begin + with_ * (200 - len(begin))


@pytest.mark.parametrize("group", NEIGHBOURS)
def test_no_name_meets_another_in_the_journal(relay: RelayProcess, name: str, group: tuple[str, ...]) -> None:
    names = [template.format(name) for template in group]
    names += [filled(template, name, letter) for template in group[:3] for letter in "~:._-"]
    assert len(set(names)) == len(names)
    for number, stream in enumerate(names):
        for run in ("r", "r:x", "frames"):
            Producer(relay, stream, run=run).push(f"{number} {run}", end="completed")
    for number, stream in enumerate(names):
        page = json.loads(
            ask(
                relay.url, "GET", f"/relay/v1/streams/{stream}/events?control=none", Accept="application/json"
            ).body
        )
        assert [frame["data"] for frame in page["frames"] if frame["event"] != "relay"] == [
            f"{number} {run}" for run in ("r", "r:x", "frames")
        ]
    assert ask(relay.url, "DELETE", f"/relay/v1/streams/{names[0]}").status == 204
    for stream in names[1:]:
        known = json.loads(ask(relay.url, "GET", f"/relay/v1/streams/{stream}").body)
        assert known["runs"] == 3, stream


# --- browsers -----------------------------------------------------------------------------------------

CHANGES = [
    ("POST", "/cancel"),
    ("POST", "/runs/r/cancel"),
    ("PUT", ""),
    ("POST", "/runs"),
    ("POST", "/runs/r/frames"),
    ("POST", "/runs/r/end"),
    ("POST", "/runs/r/heartbeat"),
    ("POST", "/runs/r/writer"),
    ("POST", "/seal"),
    ("DELETE", ""),
]
FOREIGN = [
    {"Origin": "https://evil.example"},
    {"Origin": "https://evil.example", "Sec_Fetch_Site": "cross-site"},
    {"Origin": "https://neighbour.localhost", "Sec_Fetch_Site": "same-site"},
    {"Origin": "null"},
    {"Sec_Fetch_Site": "cross-site", "Content_Type": "text/plain"},
]


@pytest.mark.parametrize(("method", "path"), CHANGES)
def test_a_foreign_page_changes_nothing_with_relays_cookie(
    guarded: RelayProcess, victim: Victim, method: str, path: str
) -> None:
    cookie = f"relay_token={token(victim.stream, scope='read write cancel')}"
    for headers in FOREIGN:
        answer = ask(
            guarded.url, method, f"/relay/v1/streams/{victim.stream}{path}", Cookie=cookie, **headers
        )
        assert (answer.status, answer.code) == (403, "cross_origin")
    victim.assert_untouched()


@pytest.mark.parametrize("query", ["", "?token=x", "?token=x&token=", "?token="])
@pytest.mark.parametrize(("method", "path"), CHANGES)
def test_a_foreign_page_changes_nothing_with_the_applications_cookie(
    asking: RelayProcess, name: str, method: str, path: str, query: str
) -> None:
    """Not by a token in the URL either, which any page can write, and though every origin may read without
    cookies (`--cors-origin *`)."""
    own = {"Cookie": "session=1", "Sec_Fetch_Site": "same-origin"}
    assert ask(asking.url, "PUT", f"/relay/v1/streams/{name}", **own).status in (200, 201)
    for headers in FOREIGN:
        answer = ask(
            asking.url, method, f"/relay/v1/streams/{name}{path}{query}", Cookie="session=1", **headers
        )
        assert (answer.status, answer.code) == (403, "cross_origin"), headers
    known = ask(asking.url, "GET", f"/relay/v1/streams/{name}", **own)
    assert (known.status, json.loads(known.body)["sealed"]) == (200, False)
    assert "access-control-allow-credentials" not in known.headers


def test_a_page_of_this_very_relay_may_with_the_same_cookie(asking: RelayProcess, name: str) -> None:
    for headers in ({"Sec_Fetch_Site": "same-origin"}, {"Origin": asking.url}):
        answer = ask(asking.url, "PUT", f"/relay/v1/streams/{name}", Cookie="session=1", **headers)
        assert answer.status in (200, 201)


def test_a_cookie_tossed_in_beside_ours_is_not_taken_for_it(guarded: RelayProcess, victim: Victim) -> None:
    """A page of a neighbouring host can set one for the whole site."""
    mine, tossed = token(victim.stream), token("the-attackers")
    path = f"/relay/v1/streams/{victim.stream}"
    for cookies in (f"relay_token={tossed}; relay_token={mine}", f"relay_token={mine}; relay_token={tossed}"):
        answer = ask(guarded.url, "GET", path, Cookie=cookies)
        assert (answer.status, answer.code) == (401, "unauthorized")
    assert ask(guarded.url, "GET", path, Cookie=f"relay_token={mine}; relay_token={mine}").status == 200
    assert ask(guarded.url, "GET", path, Cookie=f"relay_token={tossed}", **bearer(mine)).status == 200


def test_nobody_is_given_a_cookie_by_a_page_that_cannot_send_a_header(
    guarded: RelayProcess, name: str
) -> None:
    """A form or an image of a foreign page fixes no session: the token has to stand in a header."""
    made = token(name)
    for target in ("/relay/v1/session", f"/relay/v1/session?token={made}"):
        for headers in ({}, {"Cookie": f"relay_token={made}"}, {"Content_Type": "text/plain"}):
            answer = ask(guarded.url, "POST", target, f"token={made}".encode(), **headers)
            assert answer.status == 401
            assert "set-cookie" not in answer.headers


def test_a_token_brings_no_attributes_into_its_cookie(guarded: RelayProcess, name: str) -> None:
    for more in ("; Domain=evil.example", "; Max-Age=99999999", ";;", "=; Path=/x"):
        answer = ask(guarded.url, "POST", "/relay/v1/session", **bearer(token(name) + more))
        assert answer.status == 401
        assert "set-cookie" not in answer.headers


def test_what_others_wrote_is_never_a_page_of_relays(guarded: RelayProcess, victim: Victim) -> None:
    victim.say("<script>alert(1)</script>")
    reads = bearer(token(victim.stream))
    for path in ("", "/runs", "/runs/r", "/runs/r/transcript"):
        answer = ask(guarded.url, "GET", f"/relay/v1/streams/{victim.stream}{path}", **reads)
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["cache-control"] == "no-store"
    with Reading(f"{guarded.url}/relay/v1/streams/{victim.stream}/events", **reads) as reading:
        assert reading.headers["x-content-type-options"] == "nosniff"
        assert "no-store" in reading.headers["cache-control"]


# --- who counts as whom -------------------------------------------------------------------------------


def test_a_made_up_address_is_not_another_client(fresh_journal: Callable[[], str]) -> None:
    with RelayProcess.start(journal=fresh_journal(), client_requests_per_s=1.0) as relay:
        answers = asked_too_often(
            relay,
            lambda number: {
                "X_Forwarded_For": f"192.0.2.{number % 256}",
                "Forwarded": f"for=192.0.2.{number % 256}",
                "X_Real_IP": f"192.0.2.{number % 256}",
            },
        )
        assert len(answers) > 10
    with RelayProcess.start(
        journal=fresh_journal(), client_requests_per_s=1.0, trusted_proxy="127.0.0.1"
    ) as relay:
        # What the client wrote itself stands before what the proxy added.
        asked_too_often(relay, lambda number: {"X_Forwarded_For": f"192.0.2.{number % 256}, 203.0.113.9"})


# --- the table ----------------------------------------------------------------------------------------


def test_every_attack_in_the_table_names_tests_that_exist() -> None:
    text = (ROOT / "SECURITY.md").read_text()
    rows = [row for row in text.splitlines() if row.startswith("| ") and "test_" in row]
    assert len(rows) >= 40
    defined = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if node.name.startswith("test_"):
                defined.add(f"{path.relative_to(ROOT)}::{node.name}")
    named = re.findall(r"`([a-z/_]+/test_[a-z_0-9]+\.py)::(test_[a-z_0-9]+)`", text)
    assert len(named) >= len(rows)
    assert [f"{file}::{test}" for file, test in named if f"{file}::{test}" not in defined] == []
    tests_here = {entry.partition("::")[2] for entry in defined if "conformance/test_attacks.py" in entry}
    told = {test for _, test in named}
    assert tests_here - told <= {"test_every_attack_in_the_table_names_tests_that_exist"}
