"""relay-stream.js in a real browser: coming and going, offline and online, tabs that share a connection."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import BrowserContext
from producing import Producer
from relay_process import RelayProcess
from scripted_upstream import ScriptedUpstream
from tcp_proxy import TcpProxy

from browser.chat_page import ONLINE_WHEN_THERE_IS_A_WAY, OWN_TIME, ChatPage, serve_chat_page
from browser.tab import RETRY_MS, first_bytes

CYCLES = 20


def words(first: int, count: int) -> list[str]:
    """Parts of an answer; some have several lines, or more than one byte a character."""
    return [f"{n}: wörd → 🙂\n\nline of {n}; " for n in range(first, first + count)]


@pytest.fixture
def pages(upstream: ScriptedUpstream, context: BrowserContext) -> Callable[..., ChatPage]:
    """Opens tabs of one profile."""
    serve_chat_page(upstream)
    return lambda relay, before="": ChatPage(context, relay.url, before)


@pytest.fixture
def quiet_relay(fresh_journal: Callable[[], str], upstream: ScriptedUpstream) -> Iterator[RelayProcess]:
    """A relay of this test's own, whose readers can be counted."""
    with RelayProcess.start(journal=fresh_journal(), upstream=upstream.url, retry_ms=RETRY_MS) as process:
        yield process


def test_twenty_fast_returns_to_one_answer_show_it_once(
    swift_relay: RelayProcess, pages: Callable[..., ChatPage], name: str
) -> None:
    """A view that unmounts and comes back, and a page that is reloaded: the text stays, and grows."""
    producer = Producer(swift_relay, name)
    page = pages(swift_relay)
    page.open(name)
    said = ""
    for cycle in range(CYCLES):
        more = words(cycle * 5, 5)
        producer.push(*more[:2])
        if cycle % 4 == 3:
            page.reload()
        else:
            page.close(name)
        producer.push(*more[2:])
        page.open(name)
        said += "".join(more)
        if cycle % 2:  # otherwise it is left again before it has everything
            page.await_text(name, said)
    producer.push(end="completed")
    page.await_(name, "chat.control.some(({ type }) => type === 'run.ended')")
    page.expect_whole(name, said)


@pytest.mark.parametrize("event_source", [False, True])
def test_a_page_cut_at_random_bytes_shows_each_frame_once_and_asks_no_more_after_the_end(
    swift_relay: RelayProcess,
    pages: Callable[..., ChatPage],
    name: str,
    dice: random.Random,
    event_source: bool,
) -> None:
    producer = Producer(swift_relay, name, seal=True)
    head = len(first_bytes(swift_relay, f"/relay/v1/streams/{name}/events", b"\r\n\r\n"))
    with TcpProxy.running(swift_relay.port) as proxy:
        page = pages(proxy, "Math.random = () => 0.01;")  # short pauses
        proxy.cut_all()
        first = proxy.connections
        cuts = [head + dice.randrange(800) for _ in range(CYCLES)]
        cuts[::7] = [dice.randrange(head) for _ in cuts[::7]]  # one in the head now and then
        proxy.plan = lambda number: cuts[number - first] if number - first < len(cuts) else None
        page.open(name, eventSource=event_source)
        said = ""
        for part in range(10):
            more = words(part * 10, 10)
            producer.push(*more)
            said += "".join(more)
            page.await_text(name, said)
        producer.push(end="completed")
        page.await_(name, "chat.end !== null")
        assert page.look(name, "end") == "ended"
        page.await_no_lock()
        asked = len(page.asked)
        proxy.plan = lambda number: None
        proxy.cut_all()  # connections that are kept have their plan still
        page.page.evaluate("fetch('/chats').then((answer) => answer.text())")
        assert len(page.asked) == asked > CYCLES / 2
        page.expect_whole(name, said)


def test_a_page_that_was_offline_is_back_at_once_when_it_is_online(
    relay: RelayProcess, pages: Callable[..., ChatPage], context: BrowserContext, name: str
) -> None:
    """Pauses never end here, so nothing but the event brings it back."""
    producer = Producer(relay, name)
    with TcpProxy.running(relay.port) as proxy:
        page = pages(proxy, OWN_TIME + ONLINE_WHEN_THERE_IS_A_WAY)
        page.open(name)
        producer.push("before, ")
        page.await_text(name, "before, ")
        context.set_offline(True)
        proxy.cut_all()
        page.await_(name, "chat.subscription.state === 'waiting'")
        producer.push("meanwhile, ")
        context.set_offline(False)
        page.await_text(name, "before, meanwhile, ")
        producer.push("after")
        page.expect_whole(name, "before, meanwhile, after")


def test_a_connection_that_may_have_died_unseen_is_made_anew_when_the_page_comes_online(
    relay: RelayProcess, pages: Callable[..., ChatPage], name: str
) -> None:
    producer = Producer(relay, name)
    page = pages(relay, OWN_TIME)
    page.open(name)
    producer.push("a")
    page.await_text(name, "a")
    page.page.evaluate("dispatchEvent(new Event('online'))")
    page.await_(name, "chat.control.filter(({ type }) => type === 'hello').length === 2")
    producer.push("b")
    page.expect_whole(name, "ab")


def test_a_page_that_the_browser_put_aside_holds_nothing_and_takes_up_where_it_was(
    quiet_relay: RelayProcess, pages: Callable[..., ChatPage], name: str
) -> None:
    """The events of Back and Forward; the browser's own cache is switched off where tests drive it."""
    producer = Producer(quiet_relay, name)
    page, other = pages(quiet_relay), pages(quiet_relay)
    page.open(name)
    producer.push("a")
    page.await_text(name, "a")
    page.page.evaluate("dispatchEvent(new PageTransitionEvent('pagehide', { persisted: true }))")
    assert page.look(name, "subscription.state") == "suspended"
    other.await_no_lock()
    other.await_readers(0)
    producer.push("b")
    page.page.evaluate("dispatchEvent(new PageTransitionEvent('pageshow', { persisted: true }))")
    page.await_text(name, "ab")
    producer.push("c")
    page.expect_whole(name, "abc")


def test_three_tabs_share_one_connection_and_a_late_one_misses_nothing(
    quiet_relay: RelayProcess, pages: Callable[..., ChatPage], name: str
) -> None:
    producer = Producer(quiet_relay, name, seal=True)
    first, second = pages(quiet_relay), pages(quiet_relay)
    tabs = [first, second]
    first.open(name)
    first.await_(name, "chat.subscription.role === 'leader'")
    second.open(name)
    said = words(0, 20)
    producer.push(*said)
    for tab in tabs:
        tab.await_text(name, "".join(said))
    third = pages(quiet_relay)
    third.open(name)
    tabs.append(third)
    third.await_text(name, "".join(said))
    for n in range(20, 60, 2):
        said += words(n, 2)
        producer.push(*words(n, 2))
    for tab in tabs:
        tab.await_text(name, "".join(said))
    first.await_readers(1)
    assert [tab.look(name, "subscription.role") for tab in tabs] == ["leader", "follower", "follower"]
    # The one that reads goes, in the midst of what is said.
    producer.push(*words(60, 3))
    first.page.close()
    producer.push(*words(63, 3))
    said += words(60, 6)
    for tab in (second, third):
        tab.await_text(name, "".join(said))
    second.await_readers(1)
    producer.push(end="completed")
    for tab in (second, third):
        tab.await_(name, "chat.end !== null")
    second.await_no_lock()
    asked = [len(tab.asked) for tab in (second, third)]
    for tab in (second, third):
        tab.page.evaluate("fetch('/chats').then((answer) => answer.text())")
        tab.expect_whole(name, "".join(said))
        assert tab.look(name, "error") is None
    assert [len(tab.asked) for tab in (second, third)] == asked
    # The one that took over asked once more; the other asked for what it missed at most.
    assert sum(asked) <= 3


def test_tabs_whose_browser_has_no_locks_read_each_for_itself(
    quiet_relay: RelayProcess, pages: Callable[..., ChatPage], name: str
) -> None:
    producer = Producer(quiet_relay, name)
    without = "Object.defineProperty(Navigator.prototype, 'locks', { value: undefined });"
    tabs = [pages(quiet_relay, without) for _ in range(2)]
    for tab in tabs:
        tab.open(name)
    producer.push("a", "b")
    for tab in tabs:
        tab.expect_whole(name, "ab")
        assert tab.look(name, "subscription.role") == "alone"
    tabs[0].await_readers(2)


def test_a_regenerate_is_seen_in_every_tab_and_stop_in_one_tab_stops_it_in_all(
    swift_relay: RelayProcess, pages: Callable[..., ChatPage], name: str
) -> None:
    old = Producer(swift_relay, name)
    tabs = [pages(swift_relay) for _ in range(3)]
    for tab in tabs:
        tab.open(name)
    old.push("the old answer ")
    for tab in tabs:
        tab.await_text(name, "the old answer ")
    new = Producer(swift_relay, name, supersedes="latest")
    new.push("the new answer")
    for tab in tabs:
        tab.await_text(name, "the old answer the new answer")
    tabs[2].page.evaluate("stream => chats[stream].subscription.cancel('enough')", name)
    for tab in tabs:
        tab.await_(name, "chat.control.filter(({ type }) => type === 'run.ended').length === 2")
        journaled = [
            (control["type"], control["run"], control.get("reason", control.get("by")))
            for control in tab.look(name, "control")
            if control["type"].startswith("run.")
        ]
        assert journaled == [
            ("run.started", old.run, None),
            ("run.superseded", old.run, new.run),
            ("run.ended", old.run, "superseded"),
            ("run.started", new.run, None),
            ("run.ended", new.run, "client_cancel"),
        ]
        tab.expect_whole(name, "the old answer the new answer")


def test_chats_that_take_turns_wait_for_answers_that_take_longer_than_a_turn(
    swift_relay: RelayProcess, pages: Callable[..., ChatPage], name: str
) -> None:
    """On a long way, a turn that began with the question would be over before the answer."""
    chats = [f"{name}-{n}" for n in range(12)]
    for chat in chats:
        Producer(swift_relay, chat, seal=True).push(f"hello from {chat}", end="completed")
    asked: list[int] = []
    with TcpProxy.running(swift_relay.port) as proxy:
        page = pages(proxy)

        def counted(data: bytes) -> bytes:
            asked.append(data.count(b"/events"))
            return data

        def delayed(data: bytes) -> bytes:
            if data.startswith(b"HTTP/1.1 "):
                time.sleep(0.8)  # the rest of the answer comes right behind
            return data

        proxy.to_server, proxy.to_client = counted, delayed
        for chat in chats:
            page.open(chat)
        for chat in chats:
            page.expect_whole(chat, f"hello from {chat}")
    assert sum(asked) <= len(chats) + 4, "one request a chat, but for a round of them that was held up"


def test_fifty_open_chats_all_get_their_answers_while_the_browser_holds_few_connections(
    quiet_relay: RelayProcess, pages: Callable[..., ChatPage], name: str
) -> None:
    """Browsers hold six HTTP/1.1 connections to a host, over all tabs: the chats take turns, and what the
    page itself asks for meanwhile is answered."""
    tabs = [pages(quiet_relay) for _ in range(5)]
    chats = [f"{name}-{n}" for n in range(50)]
    producers = [Producer(quiet_relay, chat) for chat in chats]
    for n, chat in enumerate(chats):
        tabs[n % len(tabs)].open(chat)
    for n, producer in enumerate(producers):
        producer.push(f"hello from {n}, ")
    for n, chat in enumerate(chats):
        tabs[n % len(tabs)].await_text(chat, f"hello from {n}, ")
    for n, producer in enumerate(producers):
        producer.push(f"goodbye from {n}", end="completed")
    most = 0
    for n, chat in enumerate(chats):
        most = max(most, int(quiet_relay.metric("relay_readers_open")))
        tab = tabs[n % len(tabs)]
        assert tab.page.evaluate("fetch('/relay/healthz').then((answer) => answer.ok)")
        tab.await_readers_at_most(4)
        tab.expect_whole(chat, f"hello from {n}, goodbye from {n}")
    assert most > 0
