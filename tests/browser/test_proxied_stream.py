"""A page with nothing but `new EventSource(url)`, pointed through relay at an agent's own path."""

from __future__ import annotations

import random

import pytest
from playwright.sync_api import Page
from relay_process import RelayProcess
from scripted_upstream import Exchange, ScriptedUpstream
from tcp_proxy import TcpProxy

from browser.agent_script import FRAMES, TEXT, event, in_parts, text_of_parts
from browser.tab import Tab, behind_content_type, first_bytes, one_answer_each, serve_reader_page

CUTS = 25
CUT_MAX_BYTES = 1500


@pytest.fixture
def answer(upstream: ScriptedUpstream, name: str) -> str:
    """The path of an agent's stream; the page that reads it is `/reader`."""
    serve_reader_page(upstream)
    return f"/{name}"


def test_an_event_source_cut_at_random_bytes_shows_the_text_once_and_stops(
    swift_relay: RelayProcess, upstream: ScriptedUpstream, answer: str, page: Page, dice: random.Random
) -> None:
    """Cuts begin behind the event that primes the browser. Before that it holds no id, and what it sends next
    is what a page sends that asks for the first time: nobody can tell the two apart."""
    upstream.on_stream(f"{answer}/probe", [b"data: x\n\n"])
    primed = len(first_bytes(swift_relay, f"{answer}/probe", b"\n\n"))
    typed = behind_content_type(swift_relay, f"{answer}/probe")
    gate = upstream.gate()
    upstream.on(answer, in_parts(gate))
    with TcpProxy.running(swift_relay.port, to_server=one_answer_each) as proxy:
        tab = Tab(page, f"{proxy.url}/reader")
        proxy.cut_all()  # a connection kept from the page would escape the plan
        first = proxy.connections
        cuts = [primed + 3 + dice.randrange(CUT_MAX_BYTES)]  # its chunk ends with two more bytes
        cuts += [typed + dice.randrange(CUT_MAX_BYTES) for _ in range(CUTS)]
        proxy.plan = lambda number: cuts[number - first] if number - first < len(cuts) else None
        tab.read(answer)
        tab.await_control("hello")
        for text in text_of_parts():
            gate.pass_one()
            tab.await_text(text)
        tab.await_closed()
    assert tab.text() == TEXT
    assert len(tab.frames()) == len(set(tab.frames())) == len(FRAMES)
    assert upstream.calls(answer) == 1
    assert tab.statuses == [200] * (len(tab.statuses) - 1) + [204]
    assert len(tab.statuses) > CUTS / 2


def test_an_event_source_cut_before_its_first_frame_comes_back_to_its_run(
    swift_relay: RelayProcess, upstream: ScriptedUpstream, answer: str, page: Page
) -> None:
    gate = upstream.gate()

    async def handler(exchange: Exchange) -> None:
        await exchange.head()
        await gate.wait()
        await exchange.chunk(event("the only frame"))
        await exchange.end()

    upstream.on(answer, handler)
    with TcpProxy.running(swift_relay.port) as proxy:
        tab = Tab(page, f"{proxy.url}/reader")
        tab.read(answer)
        for visit in range(1, 4):
            tab.await_control("hello", visit)  # primed again for as long as it has no frame
            proxy.cut_all()
        tab.await_control("hello", 4)
        gate.open()
        tab.await_closed()
    assert tab.text() == "the only frame"
    assert upstream.calls(answer) == 1
    assert tab.statuses == [200, 200, 200, 200, 204]


def test_an_event_source_cut_around_the_head_of_an_answer_comes_back(
    swift_relay: RelayProcess, upstream: ScriptedUpstream, answer: str, page: Page
) -> None:
    gate = upstream.gate()
    upstream.on(answer, in_parts(gate))
    upstream.on_stream(f"{answer}/probe", [b"data: x\n\n"])
    typed = behind_content_type(swift_relay, f"{answer}/probe")
    whole_head = len(first_bytes(swift_relay, f"{answer}/probe", b"\r\n\r\n"))
    offsets = [0, typed, typed + 1, (typed + whole_head) // 2, whole_head - 1, whole_head, whole_head + 1]
    with TcpProxy.running(swift_relay.port, to_server=one_answer_each) as proxy:
        tab = Tab(page, f"{proxy.url}/reader")
        proxy.cut_all()
        first = proxy.connections + 1
        proxy.plan = lambda number: dict(enumerate(offsets)).get(number - first)
        tab.read(answer)
        gate.pass_one()
        tab.await_text(next(iter(text_of_parts())))
        proxy.cut_all()
        gate.open()
        tab.await_closed()
        assert proxy.connections > first + len(offsets)
    assert tab.text() == TEXT
    assert upstream.calls(answer) == 1


def test_a_raw_answer_that_breaks_off_is_shown_once_and_the_browser_stops(
    swift_relay: RelayProcess, upstream: ScriptedUpstream, answer: str, page: Page
) -> None:
    gate = upstream.gate()

    async def handler(exchange: Exchange) -> None:
        await exchange.head()
        for frame in FRAMES[:3]:
            await exchange.chunk(event(frame))
        await gate.wait()
        half = event(FRAMES[3])
        await exchange.send(b"%x\r\n%b" % (len(half), half[:10]))
        exchange.writer.transport.abort()

    upstream.on(answer, handler)
    tab = Tab(page, f"{swift_relay.url}/reader")
    tab.read(answer)
    tab.await_text("".join(FRAMES[:3]))
    gate.open()
    tab.await_closed()
    assert tab.text() == "".join(FRAMES[:3])
    assert tab.statuses == [200, 204]
    assert upstream.calls(answer) == 1
    stream = tab.header(0, "relay-stream")
    run = swift_relay.json(f"/relay/v1/streams/{stream}/runs/{tab.header(0, 'relay-run')}")
    assert (run["status"], run["reason"]) == ("failed", "upstream_truncated")
