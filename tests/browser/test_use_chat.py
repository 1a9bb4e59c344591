"""The AI SDK's own `useChat` in a real browser, of two majors: with its default transport, where relay has
the routes that it calls and the page has no code of relay's; and with relay's transport."""

from __future__ import annotations

import json
import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import BrowserContext, Page, Request, Response, TimeoutError
from recorded_answers import chunk
from relay_process import RelayProcess
from run_record import whole_run
from scripted_upstream import Exchange, ScriptedUpstream
from tcp_proxy import TcpProxy

PAGE = Path(__file__).resolve().parent.parent / "js" / "use_chat_page.jsx"
HTML = b"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>chat</title><link rel="icon" href="data:,"></head>
<body><script type="module" src="page.js"></script></body></html>"""
ALIASES = {"ai-7": [], "ai-6": ["--alias:ai=ai-6", "--alias:@ai-sdk/react=ai-sdk-react-3"]}
DEADLINE_S = 120
TEN_MINUTES_MS = 600_000
RESUMED = re.compile(r"/api/chat/[^/]+/stream$|/relay/v1/streams/[^/]+/events\?run=current$")

GREETING = "Hello!"
PARTS = [f"{n}: wörd → 🙂\n\nline of {n}; " * 20 for n in range(6)]


class Agent:
    """A backend that greets, and then gives an answer whose parts wait at the gate. Before the last part it
    does what the test says."""

    def __init__(self, upstream: ScriptedUpstream) -> None:
        self.gate = upstream.gate()
        self.asked: list[dict[str, Any]] = []
        self.left = threading.Event()
        self.before_last: Callable[[Exchange], Any] | None = None
        upstream.on("/api/chat", self._answer)

    async def _answer(self, exchange: Exchange) -> None:
        self.asked.append(json.loads(exchange.received.body))
        await exchange.head("200 OK", "text/event-stream", "x-vercel-ai-ui-message-stream: v1")
        # Its id is the server's, as of `toUIMessageStream({ generateMessageId })`.
        await exchange.chunk(chunk("start", messageId=f"answer-{len(self.asked)}") + chunk("start-step"))
        await exchange.chunk(chunk("text-start", id="t"))
        for part in PARTS if len(self.asked) > 1 else [GREETING]:
            if part is PARTS[-1] and self.before_last:
                await self.before_last(exchange)
                return
            if part is not GREETING:
                await self.gate.wait()
            for n in range(0, len(part), 10):
                await exchange.chunk(chunk("text-delta", id="t", delta=part[n : n + 10]))
        await exchange.chunk(chunk("text-end", id="t") + chunk("finish-step") + chunk("finish"))
        await exchange.chunk(b"data: [DONE]\n\n")
        await exchange.end()

    async def is_left(self, exchange: Exchange) -> None:
        """Say nothing more until relay hangs up."""
        await exchange.closed()
        self.left.set()


class ChatTab:
    """A tab with the page, and what it asked for."""

    def __init__(self, context: BrowserContext, url: str) -> None:
        self.page: Page = context.new_page()
        self.requests: list[str] = []
        self.statuses: list[tuple[str, int]] = []
        self.mistakes: list[str] = []
        self.page.on("request", self._requested)
        self.page.on("response", self._answered)
        self.page.on("pageerror", lambda error: self.mistakes.append(str(error)))
        self.page.goto(url)
        self._await_page()

    def _requested(self, request: Request) -> None:
        self.requests.append(f"{request.method} {request.url}")

    def _answered(self, response: Response) -> None:
        path = response.url.partition("?")[0].split("/", 3)[3]
        self.statuses.append((f"{response.request.method} /{path}", response.status))

    def _await_page(self) -> None:
        self.page.wait_for_function("window.chat !== undefined")

    def reload(self) -> None:
        """As a person does."""
        self.page.reload()
        self._await_page()

    def ask(self, text: str) -> None:
        self.page.evaluate("text => { chat.sendMessage({ text }); }", text)

    def shown(self) -> list[str]:
        """The text of each message."""
        return self.page.locator("p").all_text_contents()

    def await_shown(self, *texts: str) -> None:
        """Wait until these messages are shown, and nothing else. What was kept over a reload is there at
        once, and then drawn anew from its beginning: for a moment it is shorter again."""
        try:
            self.page.wait_for_function(
                """texts => {
                    const shown = [...document.querySelectorAll("p")].map(({ textContent }) => textContent);
                    return shown.length === texts.length && shown.every((text, n) => text === texts[n]);
                }""",
                arg=list(texts),
            )
        except TimeoutError as error:
            raise AssertionError(f"{self.shown()} {self.error()} {self.statuses}") from error

    def await_status(self, status: str) -> None:
        """Wait until `useChat` says so."""
        self.page.wait_for_function("status => chat.status === status", arg=status)

    def error(self) -> str:
        return self.page.locator("strong").text_content() or ""


@pytest.fixture(scope="module")
def chat_relay(fresh_journal: Callable[[], str], upstream: ScriptedUpstream) -> Iterator[RelayProcess]:
    """A relay with what the AI SDK needs."""
    with RelayProcess.start(
        journal=fresh_journal(),
        upstream=upstream.url,
        stream_from="body:/id",
        resume_route="GET /api/chat/{stream}/stream",
        stop_route="POST /api/chat/{stream}/stop",
    ) as process:
        yield process


@pytest.fixture(scope="module", params=ALIASES)
def major(request: pytest.FixtureRequest) -> str:
    """Which AI SDK is in the page."""
    return str(request.param)


@pytest.fixture(scope="module")
def page_source(major: str, node_packages: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The page's script."""
    script = tmp_path_factory.mktemp("page") / "page.js"
    outcome = subprocess.run(
        [
            node_packages / ".bin" / "esbuild", PAGE, "--bundle", "--format=esm", "--jsx=automatic",
            "--external:/relay/*", "--log-level=warning", *ALIASES[major], f"--outfile={script}",
        ],
        cwd=PAGE.parent, timeout=DEADLINE_S, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert outcome.returncode == 0, outcome.stdout
    return script.read_bytes()


@pytest.fixture
def agent(upstream: ScriptedUpstream, page_source: bytes) -> Agent:
    """The backend, which serves the page too."""

    async def page(exchange: Exchange) -> None:
        await exchange.answer("200 OK", HTML, "text/html")

    async def script(exchange: Exchange) -> None:
        await exchange.answer("200 OK", page_source, "text/javascript")

    upstream.on("/page", page)
    upstream.on("/page.js", script)
    return Agent(upstream)


each_transport = pytest.mark.parametrize("transport", ["default", "relay"])


@each_transport
def test_an_answer_survives_a_reload_is_followed_by_a_second_tab_and_stopped_in_both(
    chat_relay: RelayProcess, agent: Agent, context: BrowserContext, name: str, transport: str
) -> None:
    agent.before_last = agent.is_left
    url = f"{chat_relay.url}/page?chat={name}&transport={transport}"
    first = ChatTab(context, url)
    first.ask("Hi")
    first.await_shown("Hi", GREETING)
    first.await_status("ready")

    first.ask("Go on")
    before = ("Hi", GREETING, "Go on")
    agent.gate.pass_one()
    first.await_shown(*before, PARTS[0])
    first.reload()
    first.await_shown(*before, PARTS[0])
    agent.gate.pass_one()
    first.await_shown(*before, "".join(PARTS[:2]))

    second = ChatTab(context, url)
    second.await_shown(*before, "".join(PARTS[:2]))
    agent.gate.pass_one()
    for tab in (first, second):
        tab.await_shown(*before, "".join(PARTS[:3]))

    second.page.evaluate("chat.stop()")
    second.await_status("ready")
    agent.gate.pass_one()
    first.await_shown(*before, "".join(PARTS[:4]))
    assert second.shown() == [*before, "".join(PARTS[:3])]
    assert not agent.left.is_set(), "stop() only leaves"
    second.page.evaluate("void chat.resumeStream()")
    agent.gate.pass_one()
    for tab in (first, second):
        tab.await_shown(*before, "".join(PARTS[:5]))

    second.page.evaluate("stopAnswer()")
    kept = "".join(PARTS[:5])
    for tab in (first, second):
        tab.await_status("ready")
    assert agent.left.wait(DEADLINE_S), "the backend is not hung up on"
    assert whole_run(chat_relay, name).outcome == ("cancelled", "client_cancel")
    assert chat_relay.json(f"/relay/v1/streams/{name}/runs/latest/transcript")["text"] == kept
    assert [asked["id"] for asked in agent.asked] == [name] * 2
    for tab in (first, second):
        assert tab.error() == ""
        assert tab.mistakes == []
        expect_nothing_more(tab, *before, kept)


def expect_nothing_more(tab: ChatTab, *texts: str) -> None:
    """After a reload the tab shows these messages, hears that nothing is to be resumed, and asks no more."""
    tab.page.clock.install()
    with tab.page.expect_response(RESUMED) as answer:
        tab.reload()
    assert answer.value.status == 204
    tab.await_shown(*texts)
    tab.await_status("ready")
    asked = len(tab.requests)
    tab.page.clock.run_for(TEN_MINUTES_MS)
    tab.page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    tab.page.clock.run_for(TEN_MINUTES_MS)
    tab.page.evaluate(
        "fetch('/page').then((answer) => answer.text())"
    )  # what is asked behind it, was before it
    assert tab.shown() == list(texts)
    assert len(tab.requests) == asked + 1


@pytest.mark.parametrize("journal_url", ["redis"], indirect=True)
@each_transport
def test_what_a_cut_connection_missed_is_shown_once(
    chat_relay: RelayProcess, agent: Agent, context: BrowserContext, name: str, major: str, transport: str
) -> None:
    """relay's transport comes back by itself. `useChat` with its own one is in error until the page is looked
    at again."""
    if (major, transport) == ("ai-6", "default"):
        # Its `useChat` hides from its chat that the transport replays, and the text would be shown twice.
        transport = "default-in-own-chat"
    with TcpProxy.running(chat_relay.port) as proxy:
        tab = ChatTab(context, f"{proxy.url}/page?chat={name}&transport={transport}")
        tab.ask("Hi")
        tab.await_shown("Hi", GREETING)
        tab.await_status("ready")
        tab.ask("Go on")
        for part in range(1, 4):
            agent.gate.pass_one()
            tab.await_shown("Hi", GREETING, "Go on", "".join(PARTS[:part]))
            proxy.cut_all()
            if transport != "relay":
                tab.await_status("error")
                tab.page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
                tab.await_status("streaming")  # or the answer might be over before it is asked for
        agent.gate.open()
        tab.await_shown("Hi", GREETING, "Go on", "".join(PARTS))
        tab.await_status("ready")
    assert tab.error() == ""
    assert tab.mistakes == []
    assert len(agent.asked) == 2


@pytest.mark.parametrize("journal_url", ["sqlite"], indirect=True)
@each_transport
def test_an_answer_that_broke_off_is_an_error_and_nothing_to_resume(
    chat_relay: RelayProcess, agent: Agent, context: BrowserContext, name: str, transport: str
) -> None:
    agent.before_last = Exchange.end
    url = f"{chat_relay.url}/page?chat={name}&transport={transport}"
    tabs = [ChatTab(context, url)]
    tabs[0].ask("Hi")
    tabs[0].await_shown("Hi", GREETING)
    tabs[0].await_status("ready")
    tabs[0].ask("Go on")
    agent.gate.pass_one()
    tabs[0].await_shown("Hi", GREETING, "Go on", PARTS[0])
    tabs.append(ChatTab(context, url))
    tabs[1].await_status("streaming")
    agent.gate.open()
    for tab in tabs:
        tab.await_status("error")
        assert tab.error() == "Upstream ended without its terminal marker."
        tab.await_shown("Hi", GREETING, "Go on", "".join(PARTS[:5]))
    assert whole_run(chat_relay, name).outcome == ("failed", "upstream_truncated")
    expect_nothing_more(tabs[1], "Hi", GREETING, "Go on", "".join(PARTS[:5]))
