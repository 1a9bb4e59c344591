"""Over is over: clients that come back by themselves ask for nothing more once an answer has ended."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser.conftest import DEADLINE_MS
from playwright.sync_api import Browser, Page, TimeoutError
from raw_client import RawClient
from recorded_answers import AI_SDK
from relay_process import RelayProcess
from run_record import whole_run
from scripted_upstream import Exchange, Gate, ScriptedUpstream
from tcp_proxy import TcpProxy

from clients import chromium, httpx_sse_python, node_program
from clients.agent import Agent, say
from clients.conftest import LazyKit
from clients.notes import DEADLINE_S, Client, Notes, Wish
from clients.relay_client import Subscribe

QUIET_S = 30
"""What is required: so long, and not a request. No client waits longer before it comes back after a cut."""

ENDINGS = ("completed", "cancelled", "failed")

CLIENTS: dict[str, Client] = {
    "eventsource-chromium": chromium.EventSourceInChromium(),
    "eventsource-chromium-events": chromium.EventSourceInChromiumOnEvents(),
    "eventsource-node": node_program.EventSourceInNode(),
    "eventsource-node-events": node_program.EventSourceInNodeOnEvents(),
    "relay-stream-chromium": chromium.RelayStreamInChromium(),
    "relay-stream-node": node_program.RelayStreamInNode(),
    "httpx-sse": httpx_sse_python.Recipe(),
    "relay-client": Subscribe(),
}

TRANSPORTS = {"use-chat": "default", "use-chat-relay": "relay"}

USE_CHAT = Path(__file__).resolve().parent.parent / "js" / "use_chat_page.jsx"
USE_CHAT_PAGE = b"""<!doctype html>
<html lang="en"><meta charset="utf-8"><link rel="icon" href="data:,">
<body><script type="module" src="use-chat.js"></script></html>"""


@pytest.fixture
def chat_relay(upstream: ScriptedUpstream, tmp_path: Path) -> Iterator[RelayProcess]:
    """A relay with default settings, and with what `useChat` needs."""
    with RelayProcess.start(
        journal=f"sqlite:///{tmp_path / 'relay.db'}",
        upstream=upstream.url,
        stream_from="body:/id",
        resume_route="GET /api/chat/{stream}/stream",
    ) as process:
        yield process


@pytest.fixture
def use_chat(upstream: ScriptedUpstream, node_packages: Path, tmp_path: Path) -> None:
    """Upstream serves a page with `useChat`."""
    script = tmp_path / "use-chat.js"
    command = [
        str(node_packages / ".bin" / "esbuild"), str(USE_CHAT), "--bundle", "--format=esm", "--jsx=automatic",
        "--external:/relay/*", "--log-level=warning", f"--outfile={script}",
    ]  # fmt: skip
    outcome = subprocess.run(
        command, cwd=USE_CHAT.parent, timeout=DEADLINE_S, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert outcome.returncode == 0, outcome.stdout

    async def page(exchange: Exchange) -> None:
        await exchange.answer("200 OK", USE_CHAT_PAGE, "text/html")

    async def module(exchange: Exchange) -> None:
        await exchange.answer("200 OK", script.read_bytes(), "text/javascript")

    upstream.on("/use-chat", page)
    upstream.on("/use-chat.js", module)


class ChatNotes(Notes):
    """What a page with `useChat` shows of the answer."""

    def __init__(self, page: Page) -> None:
        super().__init__()
        self._page = page

    def await_text(self, text: str) -> None:
        # Reasoning stands before it.
        shown = "text => document.querySelector('[data-role=assistant]')?.textContent.endsWith(text)"
        try:
            self._page.wait_for_function(shown, arg=text)
        except TimeoutError as error:
            raise AssertionError(f"the page shows {self._page.inner_text('body')!r}") from error

    def await_end(self) -> str:
        self._page.wait_for_function("['ready', 'error'].includes(chat.status)")
        return str(self._page.evaluate("chat.status"))


class ChatAgent:
    """The backend of `useChat`: a chat's answer is as it was told to be."""

    def __init__(self, upstream: ScriptedUpstream) -> None:
        self._upstream = upstream
        self._expected: dict[str, tuple[Gate, bool]] = {}
        upstream.on("/api/chat", self._answer)

    def expect(self, chat: str, *, broken: bool) -> Gate:
        """The gate at which this chat's answer waits before it goes on, or breaks."""
        gate = self._upstream.gate()
        self._expected[chat] = gate, broken
        return gate

    async def _answer(self, exchange: Exchange) -> None:
        gate, broken = self._expected[json.loads(exchange.received.body)["id"]]
        await exchange.head("200 OK", "text/event-stream", *AI_SDK.headers)
        await say(exchange, AI_SDK, AI_SDK.events[: AI_SDK.shown if broken else None], gate, broken)


class Overheard:
    """What goes through a proxy to relay."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def hear(self, data: bytes) -> bytes:
        self.sent.append(data)
        return data

    def naming(self, stream: str) -> list[bytes]:
        """Requests, or pieces of them, that name a stream."""
        return [data for data in self.sent if stream.encode() in data]


class Ask:
    """One answer that is being read: its stream, and what lets it go on to its ending."""

    def __init__(self, stream: str, ending: str, gate: Gate, notes: Notes) -> None:
        self.stream = stream
        self._ending = ending
        self._gate = gate
        self._notes = notes

    def await_begun(self) -> None:
        self._notes.await_text("Hel")

    def let_end(self, relay: RelayProcess) -> None:
        if self._ending == "cancelled":
            with RawClient(relay.port) as another:
                another.request("POST", f"/relay/v1/streams/{self.stream}/cancel", "Content-Length: 0")
                assert another.answer().status == 200
        self._gate.open()

    def await_end(self) -> None:
        """Until its client knows."""
        self._notes.await_end()

    def expect_ending(self, relay: RelayProcess) -> None:
        assert whole_run(relay, self.stream).outcome[0] == self._ending


@pytest.mark.usefixtures("use_chat")
def test_no_client_asks_for_anything_in_the_30_s_after_an_end_of_any_kind(
    chat_relay: RelayProcess,
    upstream: ScriptedUpstream,
    browser: Browser,
    request: pytest.FixtureRequest,
    name: str,
) -> None:
    overheard = Overheard()
    with contextlib.ExitStack() as stack:
        proxy = stack.enter_context(TcpProxy.running(chat_relay.port, to_server=overheard.hear))
        asked = []
        for key, client in CLIENTS.items():
            kit = stack.enter_context(contextlib.closing(LazyKit(request)))
            for ending in ENDINGS:
                stream = f"{name}.{key}.{ending}"
                gate = upstream.gate()
                agent = Agent(upstream, stream, client.answer)
                events = client.answer.events
                if ending == "failed":
                    events = events[: client.answer.shown]
                agent.say(events, gate, broken=ending == "failed")
                asked.append(Ask(stream, ending, gate, client.ask(kit, Wish(proxy.url, stream))))
        chats = ChatAgent(upstream)
        for key, transport in TRANSPORTS.items():
            context = stack.enter_context(contextlib.closing(browser.new_context()))
            context.set_default_timeout(DEADLINE_MS)
            for ending in ENDINGS:
                stream = f"{name}.{key}.{ending}"
                gate = chats.expect(stream, broken=ending == "failed")
                page = context.new_page()
                page.goto(f"{proxy.url}/use-chat?chat={stream}&transport={transport}")
                page.wait_for_function("window.chat !== undefined")
                page.evaluate("() => { chat.sendMessage({ text: 'Hi' }); }")
                asked.append(Ask(stream, ending, gate, ChatNotes(page)))
        for ask in asked:
            ask.await_begun()
        before = {}
        for some in (asked[at : at + len(ENDINGS)] for at in range(0, len(asked), len(ENDINGS))):
            for ask in some:
                ask.let_end(chat_relay)
            for ask in some:
                ask.await_end()
                before[ask.stream] = overheard.naming(ask.stream)
        sent = len(overheard.sent)
        time.sleep(QUIET_S)
        assert {ask.stream: overheard.naming(ask.stream) for ask in asked} == before
        assert overheard.sent[sent:] == []
    assert all(before.values())
    for ask in asked:
        ask.expect_ending(chat_relay)
