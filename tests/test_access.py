"""Who may do what at a relay with authentication; what a page of another site may not; limits of clients."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from guarded import ADMIN_KEY, PRODUCER_KEY, SECRET, SETTINGS, ask, asked_too_often, bearer, token
from raw_client import RawClient
from reading import Reading
from relay_process import RelayProcess
from scripted_upstream import Exchange, ScriptedUpstream

from relay.access import Access, Rate, without_cookie, without_own_cookie
from relay.errors import StartupError, TooManyRequests
from relay.settings import Settings

APP = "https://app.example"


@pytest.fixture(scope="module")
def guarded(fresh_journal: Callable[[], str], upstream: ScriptedUpstream) -> Iterator[RelayProcess]:
    with RelayProcess.start(
        journal=fresh_journal(),
        upstream=upstream.url,
        cors_origin=APP,
        stream_from="path:/chats/{stream}",
        resume_route="GET /chats/{stream}/stream",
        stop_route="POST /chats/{stream}/stop",
        **SETTINGS,
    ) as relay:
        yield relay


@pytest.fixture
def stream(guarded: RelayProcess, name: str) -> str:
    """A stream with an open run of one frame."""
    put(guarded, name)
    return name


def put(relay: RelayProcess, name: str) -> None:
    path = f"/relay/v1/streams/{name}/runs"
    opened = ask(
        relay.url, "POST", path, b'{"run": "r"}', Content_Type="application/json", **bearer(PRODUCER_KEY)
    )
    assert opened.status == 201, opened
    writer = json.loads(opened.body)["writer"]
    frames = ask(
        relay.url, "POST", f"{path}/r/frames", b'{"data": "secret"}',
        Content_Type="application/json", Relay_Writer=writer, **bearer(PRODUCER_KEY),
    )  # fmt: skip
    assert frames.status == 200, frames


OF_A_STREAM = [
    ("GET", "", "read"),
    ("GET", "/events", "read"),
    ("GET", "/runs", "read"),
    ("GET", "/runs/r", "read"),
    ("GET", "/runs/r/transcript", "read"),
    ("POST", "/cancel", "cancel"),
    ("POST", "/runs/r/cancel", "cancel"),
    ("PUT", "", "write"),
    ("POST", "/runs", "write"),
    ("POST", "/runs/r/frames", "write"),
    ("POST", "/runs/r/end", "write"),
    ("POST", "/runs/r/heartbeat", "write"),
    ("POST", "/runs/r/writer", "write"),
    ("POST", "/seal", "write"),
    ("DELETE", "", "write"),
]
OF_ALL = [
    ("GET", "/relay/v1/streams"),
    ("DELETE", "/relay/v1/streams?prefix=none-such"),
    ("GET", "/relay/v1/runs"),
    ("GET", "/relay/v1/diagnostics"),
    ("GET", "/relay/metrics"),
]
OPEN = [
    ("GET", "/relay/openapi.json"),
    ("GET", "/relay/healthz"),
    ("GET", "/relay/readyz"),
    ("GET", "/relay/static/relay-stream.js"),
]


def test_every_route_is_known_to_these_tests(guarded: RelayProcess) -> None:
    """A new route without a rule would be an open door."""
    from relay.app import App
    from relay.cli import open_journal

    settings = Settings()
    app = App(settings, open_journal(settings))
    known = {
        (method, f"/relay/v1/streams/{{stream}}{path}".replace("/r/", "/{run}/"))
        for method, path, _ in OF_A_STREAM
    }
    known = {
        (method, path.removesuffix("/r") + "/{run}" if path.endswith("/r") else path)
        for method, path in known
    }
    known |= {(method, path.partition("?")[0]) for method, path in [*OF_ALL, *OPEN]}
    known |= {("POST", "/relay/v1/session"), ("DELETE", "/relay/v1/session")}
    routes = {
        (method, route.path)
        for route in app._api._router.routes
        for method in (getattr(route, "methods", None) or ())
        if method != "HEAD"
    }
    assert {(method, path) for method, path in routes if not path.startswith("/relay/static/")} <= known


@pytest.mark.parametrize(("method", "path", "right"), OF_A_STREAM)
def test_nobody_does_anything_without_a_credential(
    guarded: RelayProcess, name: str, method: str, path: str, right: str
) -> None:
    answer = ask(guarded.url, method, f"/relay/v1/streams/{name}{path}")
    assert (answer.status, answer.code) == (401, "unauthorized")
    assert answer.headers["www-authenticate"] == 'Bearer realm="relay"'


@pytest.mark.parametrize(("method", "path"), OF_ALL)
def test_what_concerns_all_streams_needs_the_admin_key(guarded: RelayProcess, method: str, path: str) -> None:
    assert ask(guarded.url, method, path).status == 401
    for credential in (PRODUCER_KEY, token("*", scope="read write cancel")):
        answer = ask(guarded.url, method, path, **bearer(credential))
        assert (answer.status, answer.code) == (403, "forbidden")
    for credential in (ADMIN_KEY, token("*", scope="admin")):
        assert ask(guarded.url, method, path, **bearer(credential)).status == 200


@pytest.mark.parametrize(("method", "path"), OPEN)
def test_health_and_the_browser_client_are_open(guarded: RelayProcess, method: str, path: str) -> None:
    assert ask(guarded.url, method, path).status == 200


@pytest.mark.parametrize(("method", "path", "right"), OF_A_STREAM)
def test_each_route_needs_its_right_and_no_other(
    guarded: RelayProcess, name: str, method: str, path: str, right: str
) -> None:
    put(guarded, name)
    others = " ".join({"read", "write", "cancel", "admin"} - {right})
    target = f"/relay/v1/streams/{name}{path}"
    answer = ask(guarded.url, method, target, **bearer(token(name, scope=others)))
    assert (answer.status, answer.code) == (403, "forbidden")
    if path == "/events":
        target += "?after=tail&run=none-such"  # or the answer would not end
    allowed = ask(guarded.url, method, target, **bearer(token(name, scope=right)))
    assert allowed.status not in (401, 403), allowed


@pytest.mark.parametrize(("method", "path", "right"), [row for row in OF_A_STREAM if row[2] != "write"])
def test_anothers_stream_answers_as_one_that_does_not_exist(
    guarded: RelayProcess, stream: str, method: str, path: str, right: str
) -> None:
    mine = token("mine-*", scope="read cancel write")
    answers = [
        ask(guarded.url, method, f"/relay/v1/streams/{of}{path}", **bearer(mine))
        for of in (stream, "no-such-stream", "mine-no-such-stream")
    ]
    for answer, of in zip(answers, (stream, "no-such-stream", "mine-no-such-stream"), strict=True):
        assert (answer.status, answer.code) == (404, "unknown_stream")
        assert answer.body.replace(of.encode(), b"") == answers[0].body.replace(stream.encode(), b"")
        assert {name: answer.headers[name] for name in answer.headers if name != "content-length"} == {
            name: answers[0].headers[name] for name in answers[0].headers if name != "content-length"
        }


@pytest.mark.parametrize(("method", "path", "right"), [row for row in OF_A_STREAM if row[2] == "write"])
def test_anothers_stream_cannot_be_written_whether_it_exists_or_not(
    guarded: RelayProcess, stream: str, method: str, path: str, right: str
) -> None:
    mine = token("mine-*", scope="read cancel write")
    answers = [
        ask(guarded.url, method, f"/relay/v1/streams/{of}{path}", **bearer(mine))
        for of in (stream, "no-such-stream")
    ]
    assert [(answer.status, answer.code) for answer in answers] == [(403, "forbidden")] * 2
    assert answers[0].body == answers[1].body


def test_anothers_cursor_opens_nothing(guarded: RelayProcess, stream: str) -> None:
    page = ask(
        guarded.url,
        "GET",
        f"/relay/v1/streams/{stream}/events",
        Accept="application/json",
        **bearer(token(stream)),
    )
    cursor = json.loads(page.body)["cursor"]
    for headers in ({"Last_Event_ID": cursor}, {}):
        answer = ask(
            guarded.url,
            "GET",
            f"/relay/v1/streams/{stream}/events?after={cursor}",
            **bearer(token("mine")),
            **headers,
        )
        assert (answer.status, answer.code) == (404, "unknown_stream")


def test_a_resume_id_opens_its_own_run_alone(
    guarded: RelayProcess, upstream: ScriptedUpstream, stream: str, name: str
) -> None:
    upstream.on_stream(f"/{name}", [b"data: mine\n\n"])
    with Reading(f"{guarded.url}/{name}") as reading:
        resume_id = reading.frames()[0].id
    answer = ask(
        guarded.url,
        "GET",
        f"/relay/v1/streams/{stream}/events",
        Last_Event_ID=resume_id,
        **bearer(token(stream)),
    )
    assert (answer.status, answer.code) == (410, "resume_unknown")


# Where a credential may stand


def events(relay: RelayProcess, stream: str, query: str = "", **headers: str) -> Reading:
    return Reading(f"{relay.url}/relay/v1/streams/{stream}/events{query}", **headers)


def bye_of(reading: Reading) -> str:
    """Why an answer that has an end was ended."""
    last = list(reading.blocks())[-1].control
    assert last is not None
    assert last["type"] == "bye"
    return str(last["reason"])


def test_a_token_is_taken_from_either_header_the_cookie_and_the_url(
    guarded: RelayProcess, stream: str
) -> None:
    reads = token(stream)
    for headers, query in (
        ({"Authorization": f"Bearer {reads}"}, ""),
        ({"Authorization": f"bearer  {reads}"}, ""),
        ({"Relay_Authorization": f"Bearer {reads}"}, ""),
        ({"Relay_Authorization": f"Bearer {reads}", "Authorization": "Bearer the-application's"}, ""),
        ({"Cookie": f"a=b; relay_token={reads}; c=d"}, ""),
        ({}, f"?token={reads}"),
        ({}, f"?run=latest&token={reads}"),
    ):
        with events(guarded, stream, query, **headers) as reading:
            assert reading.status == 200, (headers, query)
            assert [block.data for block in reading.take(3) if not block.event] == ["secret"]


def test_a_wrong_credential_in_a_better_place_is_not_made_up_for(guarded: RelayProcess, stream: str) -> None:
    reads, wrong = token(stream), token(stream, aud="another")
    for headers, query in (
        ({"Relay_Authorization": f"Bearer {wrong}", "Authorization": f"Bearer {reads}"}, ""),
        ({"Relay_Authorization": reads, "Cookie": f"relay_token={reads}"}, ""),
        ({"Authorization": f"Bearer {wrong}", "Cookie": f"relay_token={reads}"}, ""),
        ({"Cookie": f"relay_token={wrong}"}, f"?token={reads}"),
    ):
        with events(guarded, stream, query, **headers) as reading:
            assert reading.status == 401, (headers, query)


def test_a_token_that_can_do_more_than_read_does_not_stand_in_a_url(
    guarded: RelayProcess, stream: str
) -> None:
    for made in (token(stream, scope="read cancel"), token(stream, life_s=86400), PRODUCER_KEY, ADMIN_KEY):
        with events(guarded, stream, f"?token={made}") as reading:
            assert reading.status == 401


def test_a_token_in_a_url_is_not_logged(guarded: RelayProcess, stream: str) -> None:
    reads = token(stream)
    with events(guarded, stream, f"?token={reads}") as reading:
        reading.take(1)
    with events(guarded, stream, f"?token={reads}x") as reading:
        assert reading.status == 401
    guarded.logged_line(f"reader ended stream={stream}")
    assert not any(reads[-20:] in line or PRODUCER_KEY in line or "token=" in line for line in guarded.log)


def test_a_token_is_exchanged_for_a_cookie_that_no_script_sees(guarded: RelayProcess, stream: str) -> None:
    reads = token(stream, scope="read cancel")
    opened = ask(guarded.url, "POST", "/relay/v1/session", **bearer(reads))
    assert opened.status == 204
    cookie, *attributes = opened.headers["set-cookie"].split("; ")
    assert cookie == f"relay_token={reads}"
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= set(attributes)
    assert "Secure" not in attributes  # on this machine
    elsewhere = ask(guarded.url, "POST", "/relay/v1/session", Host="relay.example", **bearer(reads))
    assert "Secure" in elsewhere.headers["set-cookie"].split("; ")
    with events(guarded, stream, Cookie=cookie) as reading:
        assert reading.status == 200
    closed = ask(guarded.url, "DELETE", "/relay/v1/session", Cookie=cookie)
    assert "Max-Age=0" in closed.headers["set-cookie"]


def test_nothing_but_a_token_becomes_a_cookie(guarded: RelayProcess, stream: str) -> None:
    assert ask(guarded.url, "POST", "/relay/v1/session").status == 401
    for credential in (ADMIN_KEY, PRODUCER_KEY, token(stream, life_s=-60), "x; Path=/"):
        assert ask(guarded.url, "POST", "/relay/v1/session", **bearer(credential)).status == 401
    in_cookie = ask(guarded.url, "POST", "/relay/v1/session", Cookie=f"relay_token={token(stream)}")
    assert in_cookie.status == 401


# The time of a token


def test_a_reader_whose_token_expires_is_told_and_not_let_in_again(
    guarded: RelayProcess, stream: str
) -> None:
    # It has expired, by less than clocks may be apart: it is taken for four seconds more.
    reads = token(stream, life_s=-1)
    with events(guarded, stream, **bearer(reads)) as reading:
        assert bye_of(reading) == "revoked"
    expired = token(stream, life_s=-60)
    answer = ask(guarded.url, "GET", f"/relay/v1/streams/{stream}/events", **bearer(expired))
    assert (answer.status, answer.code) == (401, "unauthorized")
    metrics = ask(guarded.url, "GET", "/relay/metrics", **bearer(ADMIN_KEY)).body
    assert b'relay_readers_ended_total{reason="revoked"} 1.0\n' in metrics


# Proxied paths


def test_upstream_sees_its_own_credentials_and_none_of_relays(
    guarded: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    upstream.on_stream(f"/{name}", [b"data: x\n\n"])
    with Reading(
        f"{guarded.url}/{name}",
        Authorization="Bearer the-application's",
        Relay_Authorization=f"Bearer {PRODUCER_KEY}",
        Cookie=f"session=1; relay_token={token(name)}; theme=dark",
    ) as reading:
        reading.frames()
    (received,) = upstream.requests(f"/{name}")
    seen = dict(received.headers)
    assert seen["authorization"] == "Bearer the-application's"
    assert seen["cookie"] == "session=1; theme=dark"
    assert not any(header.startswith("relay-") for header in seen)


def test_a_proxied_answer_brings_a_token_for_its_own_stream(
    guarded: RelayProcess, upstream: ScriptedUpstream, stream: str, name: str
) -> None:
    gate = upstream.gate()

    async def handler(exchange: Exchange) -> None:
        await exchange.head("200 OK", "text/event-stream")
        await exchange.chunk(b"data: mine\n\n")
        await gate.wait()
        await exchange.end()

    upstream.on(f"/{name}", handler)
    with Reading(f"{guarded.url}/{name}") as reading:
        brought, mine = reading.headers["relay-token"], reading.headers["relay-stream"]
        assert reading.take(1)[0].data == "mine"
        with events(guarded, mine, **bearer(brought)) as again:
            assert again.status == 200
        assert ask(guarded.url, "POST", f"/relay/v1/streams/{mine}/seal", **bearer(brought)).status == 403
        assert ask(guarded.url, "GET", f"/relay/v1/streams/{stream}", **bearer(brought)).status == 404
        cancelled = ask(guarded.url, "POST", f"/relay/v1/streams/{mine}/cancel", **bearer(brought))
        assert json.loads(cancelled.body)["status"] == "cancelled"
        gate.open()


def test_upstream_cannot_make_a_client_believe_in_a_token(
    guarded: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.head("200 OK", "text/event-stream", "Relay-Token: upstream's")
        await exchange.chunk(b"data: x\n\n")
        await exchange.end()

    upstream.on(f"/{name}", handler)
    with Reading(f"{guarded.url}/{name}") as reading:
        assert reading.headers["relay-token"].count(".") == 2
        reading.frames()


def test_only_who_may_write_a_stream_names_it_for_the_answer(
    guarded: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    upstream.on_stream(f"/{name}", [b"data: x\n\n"])
    for headers, is_named in (
        ({}, False),
        ({"Relay_Authorization": f"Bearer {token(name)}"}, False),
        ({"Relay_Authorization": f"Bearer {token('mine-*', scope='write')}"}, False),
        ({"Authorization": f"Bearer {PRODUCER_KEY}"}, False),  # which is upstream's
        ({"Relay_Authorization": f"Bearer {token(name, scope='write')}"}, True),
    ):
        with Reading(f"{guarded.url}/{name}", Relay_Stream=name, **headers) as reading:
            assert (reading.headers["relay-stream"] == name) is is_named, headers
            reading.frames()


def test_resume_and_stop_routes_ask_for_a_credential(
    guarded: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    gate = upstream.gate()

    async def handler(exchange: Exchange) -> None:
        await exchange.head("200 OK", "text/event-stream")
        await exchange.chunk(b"data: x\n\n")
        await gate.wait()
        await exchange.end()

    upstream.on(f"/chats/{name}", handler)
    with Reading(f"{guarded.url}/chats/{name}", "POST", b"{}") as asking:
        asking.take(1)
        mine = {"Relay_Authorization": f"Bearer {asking.headers['relay-token']}"}
        others = {"Relay_Authorization": f"Bearer {token('another', scope='read cancel')}"}
        for method, path in (("GET", "stream"), ("POST", "stop")):
            target = f"/chats/{name}/{path}"
            assert ask(guarded.url, method, target).status == 401
            assert ask(guarded.url, method, target, **others).status == 204  # as for a chat without an answer
        with Reading(f"{guarded.url}/chats/{name}/stream", **mine) as resumed:
            assert resumed.take(1)[0].data == "x"
        stopped = ask(guarded.url, "POST", f"/chats/{name}/stop", **mine)
        assert json.loads(stopped.body)["status"] == "cancelled"
        gate.open()


def test_an_idempotency_key_of_another_caller_joins_nothing(
    guarded: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    upstream.on_stream(f"/{name}", [b"data: secret\n\n"])
    seen = set()
    for who in (
        {"Authorization": "Bearer one"},
        {"Authorization": "Bearer two"},
        {"Cookie": "session=1"},
        {"Relay_Authorization": f"Bearer {token('x')}"},
        {},
    ):
        for _ in range(2):
            with Reading(f"{guarded.url}/{name}", "POST", b"{}", Idempotency_Key="k", **who) as reading:
                seen.add(reading.headers["relay-run"])
                reading.frames()
    assert upstream.calls(f"/{name}") == len(seen) == 5


# Other sites


@pytest.mark.parametrize(
    ("headers", "allowed"),
    [
        ({"Origin": "https://evil.example"}, False),
        ({"Origin": "null"}, False),
        ({"Sec_Fetch_Site": "cross-site"}, False),
        ({"Sec_Fetch_Site": "same-site", "Origin": "https://evil.example"}, False),
        ({}, False),
        ({"Sec_Fetch_Site": "same-origin"}, True),
        ({"Sec_Fetch_Site": "none"}, True),
        ({"Origin": APP, "Sec_Fetch_Site": "cross-site"}, True),
    ],
    ids=str,
)
def test_a_cookie_changes_nothing_for_a_page_of_another_site(
    guarded: RelayProcess, stream: str, headers: dict[str, str], allowed: bool
) -> None:
    cookie = f"relay_token={token(stream, scope='read cancel')}"
    answer = ask(guarded.url, "POST", f"/relay/v1/streams/{stream}/cancel", Cookie=cookie, **headers)
    assert (answer.status == 200) is allowed
    if not allowed:
        assert answer.code == "cross_origin"


def test_a_cookie_with_the_origin_of_relay_itself_is_taken(guarded: RelayProcess, stream: str) -> None:
    cookie = f"relay_token={token(stream, scope='read cancel')}"
    answer = ask(guarded.url, "POST", f"/relay/v1/streams/{stream}/cancel", Cookie=cookie, Origin=guarded.url)
    assert answer.status == 200


def test_without_authentication_a_page_of_another_site_changes_nothing_either(
    relay: RelayProcess, name: str
) -> None:
    """It could reach what listens on loopback; a page of this machine, or no browser at all, may."""
    for headers, status in (
        ({"Origin": "https://evil.example"}, 403),
        ({"Sec_Fetch_Site": "cross-site"}, 403),
        ({"Origin": relay.url}, 201),
        ({}, 200),
    ):
        assert ask(relay.url, "PUT", f"/relay/v1/streams/{name}", **headers).status == status, headers


def test_pages_of_allowed_origins_see_answers_and_relays_headers(guarded: RelayProcess, stream: str) -> None:
    asked = {
        "Access_Control_Request_Method": "GET",
        "Access_Control_Request_Headers": "authorization,last-event-id",
    }
    events_path = f"/relay/v1/streams/{stream}/events"
    preflight = ask(guarded.url, "OPTIONS", events_path, Origin=APP, **asked)
    assert preflight.status == 204
    allowed = preflight.headers["access-control-allow-headers"].lower().split(", ")
    assert {"authorization", "last-event-id", "relay-authorization"} <= set(allowed)
    assert "POST" in preflight.headers["access-control-allow-methods"]
    with events(guarded, stream, Origin=APP, **bearer(token(stream))) as reading:
        assert reading.headers["access-control-allow-origin"] == APP
        assert reading.headers["access-control-allow-credentials"] == "true"
        assert "Relay-Token" in reading.headers["access-control-expose-headers"]
    refused = ask(guarded.url, "GET", events_path, Origin=APP)
    assert (refused.status, refused.headers["access-control-allow-origin"]) == (401, APP)


def test_pages_of_other_origins_see_nothing(guarded: RelayProcess, stream: str) -> None:
    evil = "https://evil.example"
    path = f"/relay/v1/streams/{stream}/events"
    preflight = ask(guarded.url, "OPTIONS", path, Origin=evil, Access_Control_Request_Method="GET")
    assert (preflight.status, preflight.code) == (403, "cross_origin")
    for origin in (evil, APP + ".evil.example", "null"):
        with events(guarded, stream, Origin=origin, **bearer(token(stream))) as reading:
            assert not [header for header in reading.headers if header.startswith("access-control-")]


def test_any_origin_is_let_see_without_cookies() -> None:
    access = Access(Settings(cors_origin=("*",)))
    headers = dict(access.cors({"headers": [(b"origin", b"https://a.example")]}))
    assert headers[b"access-control-allow-origin"] == b"*"
    assert b"access-control-allow-credentials" not in headers


@pytest.mark.parametrize("origin", ["app.example", "https://app.example/", "https://", "https://a.example/b"])
def test_an_origin_that_no_browser_sends_stops_relay(origin: str) -> None:
    with pytest.raises(StartupError):
        Access(Settings(cors_origin=(origin,)))


# Hosts


@pytest.mark.parametrize("host", ["https://a.example", "a.example:80", "", "*", "a b", "*.*.example"])
def test_a_host_that_no_request_asks_for_stops_relay(host: str) -> None:
    with pytest.raises(StartupError):
        Access(Settings(allowed_host=(host,)))


def host_answer(relay: RelayProcess, *hosts: str) -> int:
    with RawClient(relay.port) as client:
        lines = ["GET /relay/healthz HTTP/1.1", *(f"Host: {host}" for host in hosts), "", ""]
        client.send("\r\n".join(lines).encode())
        return client.answer().status


def test_a_name_led_to_this_machine_by_somebody_else_is_not_served(relay: RelayProcess) -> None:
    for host in (
        "127.0.0.1",
        "localhost",
        "localhost:8080",
        "[::1]:80",
        "app.localhost",
        "LOCALHOST",
        "10.0.0.7:80",
    ):
        assert host_answer(relay, host) == 200, host
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "evil.example:127", ""):
        assert host_answer(relay, host) == 421, host
    assert host_answer(relay, "localhost", "evil.example") in (400, 421)


def test_hosts_can_be_named(fresh_journal: Callable[[], str]) -> None:
    with RelayProcess.start(
        journal=fresh_journal(), allowed_host=["relay.example", "*.apps.example"], **SETTINGS
    ) as relay:
        for host, status in (
            ("relay.example", 200),
            ("Relay.Example:443", 200),
            ("a.apps.example", 200),
            ("127.0.0.1", 200),
            ("apps.example", 421),
            ("localhost", 200),
            ("other.example", 421),
        ):
            assert host_answer(relay, host) == status, host


# Forward-auth


@pytest.fixture(scope="module")
def asking(fresh_journal: Callable[[], str], upstream: ScriptedUpstream) -> Iterator[RelayProcess]:
    """A relay that asks the application, at `/may`: its users are called by their session, and own the
    streams whose names begin with theirs."""

    async def may(exchange: Exchange) -> None:
        headers = dict(exchange.received.headers)
        user = headers.get("cookie", "").removeprefix("session=")
        status = "401 Unauthorized" if not user else "403 Forbidden"
        if user and headers["relay-stream"].startswith(user):
            status = "204 No Content"
        await exchange.answer(status, b"", "text/plain")

    upstream.on("/may", may)
    with RelayProcess.start(
        journal=fresh_journal(),
        upstream=upstream.url,
        auth_url=f"{upstream.url}/may",
        auth_recheck_s=2,
        auth_cache_s=0,
        stream_from="path:/talks/{stream}",
        admin_key=ADMIN_KEY,
    ) as relay:
        yield relay


def test_the_application_decides_who_reads(
    asking: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    assert ask(asking.url, "PUT", f"/relay/v1/streams/{name}", **bearer(ADMIN_KEY)).status == 201
    path = f"/relay/v1/streams/{name}"
    assert ask(asking.url, "GET", path, Cookie=f"session={name}").status == 200
    assert ask(asking.url, "GET", path, Cookie="session=other").code == "unknown_stream"
    assert ask(asking.url, "GET", path).status == 401
    assert ask(asking.url, "GET", "/relay/v1/streams", Cookie=f"session={name}").status == 401
    own = {"Sec_Fetch_Site": "same-origin"}
    assert ask(asking.url, "POST", f"{path}/cancel", Cookie=f"session={name}", **own).status == 200
    foreign = ask(
        asking.url, "POST", f"{path}/cancel", Cookie=f"session={name}", Origin="https://evil.example"
    )
    assert foreign.code == "cross_origin"


def test_a_reader_that_the_application_let_in_is_asked_for_again(asking: RelayProcess, name: str) -> None:
    ask(asking.url, "PUT", f"/relay/v1/streams/{name}", **bearer(ADMIN_KEY))
    with events(asking, name, Cookie=f"session={name}") as reading:
        assert bye_of(reading) == "rotate"


def test_a_chat_that_is_not_the_callers_gets_no_answer_of_theirs(
    asking: RelayProcess, upstream: ScriptedUpstream, name: str
) -> None:
    upstream.on_stream(f"/talks/{name}", [b"data: x\n\n"])
    assert ask(asking.url, "POST", f"/talks/{name}", b"{}", Cookie="session=other").status == 403
    assert ask(asking.url, "POST", f"/talks/{name}", b"{}").status == 401
    assert upstream.calls(f"/talks/{name}") == 0
    answered = ask(
        asking.url, "POST", f"/talks/{name}", b"{}", Cookie=f"session={name}", Sec_Fetch_Site="same-origin"
    )
    assert (answered.status, answered.headers["relay-stream"]) == (200, name)


# The administration's own listener


def test_administration_moves_to_its_own_address(fresh_journal: Callable[[], str]) -> None:
    with RelayProcess.start(journal=fresh_journal(), admin_addr="127.0.0.1:0", **SETTINGS) as relay:
        line = relay.logged_line("relay's administration is on ")
        there = line.rpartition(" ")[2]
        for method, path in OF_ALL:
            assert ask(relay.url, method, path, **bearer(ADMIN_KEY)).status in (404, 405), path
            assert ask(there, method, path).status == 401
            assert ask(there, method, path, **bearer(ADMIN_KEY)).status == 200, path
        assert ask(there, "GET", "/relay/healthz").status == 200
        assert ask(there, "GET", "/relay/v1/streams/x", **bearer(ADMIN_KEY)).code == "route_not_found"
        assert ask(there, "GET", "/elsewhere").code == "route_not_found"


# Limits


def test_a_client_that_asks_too_often_is_told_to_wait() -> None:
    now = [0.0]
    rate = Rate(2.0, lambda: now[0])
    for _ in range(20):
        rate.take("a")
    with pytest.raises(TooManyRequests):
        rate.take("a")
    rate.take("b")
    now[0] = 0.5
    rate.take("a")
    with pytest.raises(TooManyRequests):
        rate.take("a")
    now[0] = 100.0
    for _ in range(20):
        rate.take("a")


def test_a_network_of_ipv6_is_one_client() -> None:
    """Each customer has 2^64 addresses."""
    rate = Rate(1.0, lambda: 0.0)
    for number in range(10):
        rate.take(f"2001:db8:1:2::{number:x}")
    for same in ("2001:db8:1:2:ffff::1", "2001:db8:1:2::1%eth0"):
        with pytest.raises(TooManyRequests):
            rate.take(same)
    rate.take("2001:db8:1:3::1")
    for number in range(10):
        rate.take(f"::ffff:192.0.2.{number}")
    rate.take("192.0.2.1")
    rate.take("a Unix socket")


def test_limits_of_requests_and_readers_hold_for_each_client_and_stream(
    fresh_journal: Callable[[], str], name: str
) -> None:
    with RelayProcess.start(
        journal=fresh_journal(),
        trusted_proxy="127.0.0.0/8",
        client_requests_per_s=1.0,
        client_readers_max=2,
        stream_readers_max=3,
    ) as relay:
        assert ask(relay.url, "PUT", f"/relay/v1/streams/{name}", X_Forwarded_For="192.0.2.250").status == 201

        def read(client: str, **headers: str) -> Reading:
            return events(relay, name, X_Forwarded_For=client, **headers)

        open_readers = [read("192.0.2.1"), read("192.0.2.1")]
        with read("192.0.2.1") as third:  # told in band: a browser would give up on anything but 200
            assert third.status == 200
            assert bye_of(third) == "busy"
        with read("192.0.2.1", Accept="application/json") as page:
            assert page.status == 200  # which holds nothing
        open_readers.append(read("192.0.2.2"))
        with read("192.0.2.3") as fourth:
            assert bye_of(fourth) == "busy"
        for reading in open_readers:
            assert reading.status == 200
            reading.cut()
        answers = asked_too_often(relay, lambda number: {"X_Forwarded_For": "192.0.2.9"})
        assert len(answers) > 10
        assert answers[-1].code == "too_many_requests"
        assert int(answers[-1].headers["retry-after"]) >= 1
        assert ask(relay.url, "GET", "/relay/healthz", X_Forwarded_For="192.0.2.10").status == 200


def test_an_address_is_believed_of_a_trusted_proxy_alone() -> None:
    def client(address: str, forwarded: str, *proxies: str) -> str:
        scope: Any = {"client": (address, 1), "headers": [(b"x-forwarded-for", forwarded.encode())]}
        return Access(Settings(trusted_proxy=proxies)).client(scope)

    assert client("192.0.2.1", "203.0.113.5") == "192.0.2.1"
    assert client("192.0.2.1", "203.0.113.5", "10.0.0.0/8") == "192.0.2.1"
    assert client("10.0.0.1", "203.0.113.5", "10.0.0.0/8") == "203.0.113.5"
    assert client("10.0.0.1", "1.2.3.4, 203.0.113.5, 10.0.0.9", "10.0.0.0/8") == "203.0.113.5"
    assert client("10.0.0.1", "", "10.0.0.0/8") == "10.0.0.1"
    with pytest.raises(StartupError):
        client("10.0.0.1", "", "nonsense")


def test_connections_are_bounded(fresh_journal: Callable[[], str]) -> None:
    with RelayProcess.start(journal=fresh_journal(), connections_max=3) as relay:
        held = [RawClient(relay.port) for _ in range(3)]
        for client in held:
            client.request("GET", "/relay/healthz")
            assert client.answer().status == 200
        with RawClient(relay.port) as client:
            refused = client.answer()
        assert (refused.status, refused.problem["code"], refused.header("retry-after")) == (503, "busy", "1")
        for client in held:
            client.reset()


@pytest.mark.parametrize("trickle", [False, True])
def test_a_head_that_does_not_come_to_its_end_is_refused(
    fresh_journal: Callable[[], str], trickle: bool
) -> None:
    with RelayProcess.start(journal=fresh_journal(), head_timeout_s=0.5) as relay:
        with RawClient(relay.port) as client:
            client.send(b"GET / HTTP/1.1\r\n")
            while trickle and not client.has_answer(0.05):
                client.send(b"X: y\r\n")
            assert client.answer().problem["code"] == "request_timeout"
        with RawClient(relay.port) as silent:
            assert silent.answer().status == 408


def test_a_body_that_stops_coming_is_refused_but_pushed_frames_may_pause(
    fresh_journal: Callable[[], str], upstream: ScriptedUpstream, name: str
) -> None:
    runs = f"/relay/v1/streams/{name}/runs"
    one, two = b'{"data": "one"}\n', b'{"data": "two"}\n'
    with (
        RelayProcess.start(journal=fresh_journal(), upstream=upstream.url, body_timeout_s=0.5) as relay,
        RawClient(relay.port) as pushing,
    ):
        opened = json.loads(ask(relay.url, "POST", runs, b"{}", Content_Type="application/json").body)
        pushing.request(
            "POST", f"{runs}/{opened['run']}/frames", f"Relay-Writer: {opened['writer']}",
            "Content-Type: application/x-ndjson", f"Content-Length: {len(one + two)}",
        )  # fmt: skip
        pushing.send(one)
        for target in (f"/relay/v1/streams/{name}", f"/{name}"):
            with RawClient(relay.port) as client:
                client.request("PUT", target, "Content-Type: application/json", "Content-Length: 9")
                client.send(b"{")
                assert client.answer().problem["code"] == "request_timeout"
        pushing.send(two)
        receipt = pushing.answer()
        assert (receipt.status, json.loads(receipt.body)["appended"]) == (200, 2)


def test_who_does_not_take_an_answer_is_cut(
    fresh_journal: Callable[[], str], upstream: ScriptedUpstream, name: str
) -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.answer("200 OK", b"x" * 20_000_000, "text/plain")

    upstream.on(f"/{name}", handler)
    with RelayProcess.start(journal=fresh_journal(), upstream=upstream.url, write_timeout_s=0.5) as relay:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", relay.port))
        connection.sendall(f"GET /{name} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        relay.logged_line("a client was too slow: write")
        connection.close()


# Cookies


@pytest.mark.parametrize(
    ("given", "left"),
    [
        ("a=b; relay_token=x; c=d", "a=b; c=d"),
        ("relay_token=x", ""),
        ("relay_token=x; relay_token=y", ""),
        ("not_relay_token=x", "not_relay_token=x"),
        ("a=relay_token=x", "a=relay_token=x"),
        ("a=b;relay_token = x;c=d", "a=b; c=d"),
    ],
)
def test_relays_cookie_is_taken_out(given: str, left: str) -> None:
    assert without_cookie(given) == left
    kept = without_own_cookie([(b"x", b"y"), (b"cookie", given.encode())])
    assert kept == [(b"x", b"y"), *([(b"cookie", left.encode())] if left else [])]


def test_the_secret_of_these_tests_is_long_enough() -> None:
    assert len(SECRET) >= 32
