"""A page with an EventSource on relay's own events route: journaled streams read, resumed and followed."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
from held_port import held_port
from playwright.sync_api import BrowserContext, Page
from reading import Reading
from relay_process import RelayProcess
from scripted_upstream import ScriptedUpstream
from tcp_proxy import TcpProxy

from browser.agent_script import FRAMES, TEXT, event, in_parts, text_of_parts
from browser.tab import RETRY_MS, Tab, behind_content_type, one_answer_each, serve_reader_page

CUTS = 20
CUT_MAX_BYTES = 1500
COMPRESSED_CUT_MAX_BYTES = 300


@pytest.fixture
def agent(upstream: ScriptedUpstream, name: str) -> str:
    """The path of an agent; the page that reads streams is `/reader`."""
    serve_reader_page(upstream)
    return f"/{name}"


def begin_answer(relay: RelayProcess, path: str, **headers: str) -> str:
    """Ask the agent, leave at once, and return the name of the stream that the answer goes to."""
    with Reading(relay.url + path, **headers) as asking:
        assert asking.status == 200
        return asking.headers["relay-stream"]


def events_of(stream: str, query: str = "") -> str:
    return f"/relay/v1/streams/{stream}/events?{query}"


def read_through_cuts(
    relay: RelayProcess,
    upstream: ScriptedUpstream,
    agent: str,
    page: Page,
    lengths: Sequence[int],
    control: str,
) -> None:
    """An EventSource whose connections are cut so many bytes behind their content type reads a whole answer.
    The stream is sealed with its run, so its end is an end for good."""
    gate = upstream.gate()
    upstream.on(agent, in_parts(gate))
    events = events_of(begin_answer(relay, agent), f"control={control}")
    typed = behind_content_type(relay, events)
    with TcpProxy.running(relay.port, to_server=one_answer_each) as proxy:
        tab = Tab(page, f"{proxy.url}/reader")
        proxy.cut_all()
        first = proxy.connections
        proxy.plan = lambda number: typed + lengths[number - first] if number - first < len(lengths) else None
        tab.read(events)
        for text in text_of_parts():
            gate.pass_one()
            tab.await_text(text)
        tab.await_closed()
    assert tab.text() == TEXT
    assert len(tab.frames()) == len(set(tab.frames())) == len(FRAMES)
    assert tab.statuses == [200] * (len(tab.statuses) - 1) + [204]
    assert len(tab.statuses) > len(lengths) / 2
    shown = [type_ for type_ in tab.control() if type_.startswith("run.")]
    assert shown == (["run.started", "run.ended"] if control == "events" else [])
    assert upstream.calls(agent) == 1


@pytest.mark.parametrize("control", ["events", "comments", "none"])
def test_an_event_source_cut_at_random_bytes_gets_each_frame_once_and_stops(
    swift_relay: RelayProcess,
    upstream: ScriptedUpstream,
    agent: str,
    page: Page,
    dice: random.Random,
    control: str,
) -> None:
    lengths = [dice.randrange(CUT_MAX_BYTES) for _ in range(CUTS)]
    read_through_cuts(swift_relay, upstream, agent, page, lengths, control)


def test_an_event_source_cut_at_random_bytes_of_a_compressed_stream_gets_each_frame_once(
    packing_relay: RelayProcess, upstream: ScriptedUpstream, agent: str, page: Page, dice: random.Random
) -> None:
    lengths = [dice.randrange(COMPRESSED_CUT_MAX_BYTES) for _ in range(CUTS)]
    read_through_cuts(packing_relay, upstream, agent, page, lengths, "events")


@pytest.mark.parametrize("control", ["events", "comments", "none"])
def test_a_browser_is_told_its_pause_before_anything_else(
    swift_relay: RelayProcess, upstream: ScriptedUpstream, agent: str, control: str
) -> None:
    """A cut comes without a goodbye; Chromium would wait for 3 s then, Firefox for 5."""
    upstream.on_stream(agent, [event("x")])
    stream = begin_answer(swift_relay, agent)
    with Reading(swift_relay.url + events_of(stream, f"control={control}")) as reading:
        field, _, value = next(reading.lines()).partition(": ")
    assert field == "retry"
    assert 0 < int(value) < 2 * RETRY_MS


def test_a_page_reloaded_in_the_middle_gets_this_answer_from_its_start_and_goes_on_live(
    swift_relay: RelayProcess, upstream: ScriptedUpstream, agent: str, page: Page, name: str
) -> None:
    """All that the page keeps is the stream's name, in its URL; an earlier answer is not shown again."""
    upstream.on_stream(f"{agent}/earlier", [event("an earlier answer")])
    with Reading(f"{swift_relay.url}{agent}/earlier", Relay_Stream=name) as earlier:
        earlier.frames()
    gate = upstream.gate()
    upstream.on(agent, in_parts(gate))
    assert begin_answer(swift_relay, agent, Relay_Stream=name) == name
    tab = Tab(page, f"{swift_relay.url}/reader?read={events_of(name, 'run=current')}")
    *texts, last = text_of_parts()
    for text in texts:
        gate.pass_one()
        tab.await_text(text)
        page.reload()
        tab.await_text(text)
        assert tab.text() == text
    gate.pass_one()
    tab.await_text(last)
    tab.await_closed()
    assert tab.text() == TEXT
    assert upstream.calls(agent) == 1


def test_an_answer_that_ended_while_the_browser_was_away_is_still_shown_to_its_end(
    swift_relay: RelayProcess, upstream: ScriptedUpstream, agent: str, page: Page, name: str
) -> None:
    """A browser asks for `run=current` again after a cut, though by then this answer is current no more."""
    gate = upstream.gate()
    upstream.on(agent, in_parts(gate))
    with (
        TcpProxy.running(swift_relay.port) as proxy,
        Reading(swift_relay.url + agent, Relay_Stream=name) as asking,
    ):
        tab = Tab(page, f"{proxy.url}/reader?read={events_of(name, 'run=current')}")
        gate.pass_one()
        tab.await_text(next(text_of_parts()))
        proxy.refusing = True
        proxy.cut_all()
        gate.open()
        asking.frames()
        proxy.refusing = False
        tab.await_closed()
    assert tab.text() == TEXT


def test_two_tabs_one_late_and_one_cut_often_show_the_same(
    swift_relay: RelayProcess,
    upstream: ScriptedUpstream,
    agent: str,
    context: BrowserContext,
    dice: random.Random,
) -> None:
    gate = upstream.gate()
    upstream.on(agent, in_parts(gate))
    events = events_of(begin_answer(swift_relay, agent))
    typed = behind_content_type(swift_relay, events)
    with TcpProxy.running(swift_relay.port, to_server=one_answer_each) as proxy:
        first = Tab(context.new_page(), f"{proxy.url}/reader")
        proxy.cut_all()
        proxy.plan = lambda number: typed + dice.randrange(CUT_MAX_BYTES) if number < 2 * CUTS else None
        first.read(events)
        parts = text_of_parts()
        for _ in range(3):
            gate.pass_one()
            first.await_text(next(parts))
        second = Tab(context.new_page(), f"{swift_relay.url}/reader?read={events}")
        for text in parts:
            gate.pass_one()
            first.await_text(text)
            second.await_text(text)
        for tab in (first, second):
            tab.await_closed()
            assert tab.text() == TEXT
        assert first.frames() == second.frames()
        assert len(first.statuses) > len(second.statuses) == 2
    assert upstream.calls(agent) == 1


def test_a_browser_on_an_idle_stream_survives_a_restart_of_relay(
    fresh_journal: Callable[[], str], upstream: ScriptedUpstream, agent: str, page: Page, name: str
) -> None:
    """SIGTERM, then another process on the same port and journal: the browser is back by itself, has nothing
    twice, and gets what comes next. It is back so soon that the one that ends may send it away once more."""
    upstream.on_stream(f"{agent}/before", [event("before "), event("the restart, ")])
    upstream.on_stream(f"{agent}/after", [event("after "), event("it")])
    settings = {"journal": fresh_journal(), "upstream": upstream.url, "retry_ms": RETRY_MS}
    with held_port() as port:
        with RelayProcess.start(**settings, port=port) as relay:
            with Reading(f"{relay.url}{agent}/before", Relay_Stream=name) as asking:
                asking.frames()
            tab = Tab(page, f"{relay.url}/reader?read={events_of(name)}")
            tab.await_control("live")
            assert tab.text() == "before the restart, "
        tab.await_control("bye")
        with RelayProcess.start(**settings, port=port) as again:
            tab.await_control("live", 2)
            with Reading(f"{again.url}{agent}/after", Relay_Stream=name) as asking:
                asking.frames()
            tab.await_control("run.ended", 2)
            assert tab.text() == "before the restart, after it"
            control = tab.control()
            assert control == [
                "hello", "run.started", "run.ended", "live", *["bye"] * control.count("bye"),
                "hello", "live", "run.started", "run.ended",
            ]  # fmt: skip
            page.close()
