"""Pages of a relay with authentication: tokens in a header, renewed over reconnects, and in the cookie."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest
from guarded import PRODUCER_KEY, SETTINGS, ask, bearer, token
from playwright.sync_api import BrowserContext, Page
from relay_process import RelayProcess
from scripted_upstream import ScriptedUpstream

from browser.chat_page import ChatPage, serve_chat_page
from browser.tab import RETRY_MS, Tab, serve_reader_page

JSON = {"Content_Type": "application/json"}


@pytest.fixture
def guarded(fresh_journal: Callable[[], str], upstream: ScriptedUpstream) -> Iterator[RelayProcess]:
    with RelayProcess.start(
        journal=fresh_journal(), upstream=upstream.url, retry_ms=RETRY_MS, **SETTINGS
    ) as process:
        yield process


class Pushing:
    """A producer with its key."""

    def __init__(self, relay: RelayProcess, stream: str) -> None:
        self._relay = relay
        self._runs = f"/relay/v1/streams/{stream}/runs"
        opened = ask(relay.url, "POST", self._runs, b'{"seal": true}', **JSON, **bearer(PRODUCER_KEY))
        self._run = json.loads(opened.body)

    def push(self, text: str, query: str = "") -> None:
        frames = f"{self._runs}/{self._run['run']}/frames{query}"
        body = json.dumps([{"data": text}]).encode()
        answer = ask(
            self._relay.url, "POST", frames, body,
            Relay_Writer=self._run["writer"], **JSON, **bearer(PRODUCER_KEY),
        )  # fmt: skip
        assert answer.status == 200, answer


def test_a_page_whose_tokens_expire_brings_a_new_one_each_time_and_misses_nothing(
    guarded: RelayProcess, upstream: ScriptedUpstream, context: BrowserContext, name: str
) -> None:
    """`headers` is a function, which is asked anew for each request."""
    serve_chat_page(upstream)
    producer = Pushing(guarded, name)
    page = ChatPage(context, guarded.url)
    given: list[str] = []

    def fresh() -> str:
        given.append(token(name, life_s=1))
        return given[-1]

    page.page.expose_function("freshToken", fresh)
    page.page.evaluate(
        """stream => open(stream, {
          headers: async () => ({ Authorization: `Bearer ${await freshToken()}` }),
        })""",
        name,
    )
    said = ""
    for number in range(2):  # each part under another token
        producer.push(f"part {number}; ")
        said += f"part {number}; "
        page.await_text(name, said)
        byes = f"chat.control.filter(({{ reason }}) => reason === 'revoked').length > {number}"
        page.await_(name, byes)
    producer.push("end", "?end=completed")
    page.await_(name, "chat.end === 'ended'")
    assert page.look(name, "text") == said + "end"
    assert len(given) >= 3


def test_a_page_whose_token_is_refused_is_told_and_asks_no_more(
    guarded: RelayProcess, upstream: ScriptedUpstream, context: BrowserContext, name: str
) -> None:
    serve_chat_page(upstream)
    Pushing(guarded, name)
    page = ChatPage(context, guarded.url)
    page.open(name, headers={"Authorization": f"Bearer {token(name, life_s=-60)}"})
    page.await_(name, "chat.error !== null")
    assert page.look(name, "error").startswith("unauthorized")
    assert len(page.asked) == 1


def test_the_browsers_own_event_source_reads_with_the_session_cookie(
    guarded: RelayProcess, upstream: ScriptedUpstream, page: Page, name: str
) -> None:
    serve_reader_page(upstream)
    producer = Pushing(guarded, name)
    tab = Tab(page, f"{guarded.url}/reader")
    url = f"/relay/v1/streams/{name}/events?run=latest"
    made = token(name, scope="read cancel")
    opened = page.evaluate(
        """async token => (await fetch("/relay/v1/session", {
          method: "POST", headers: { Authorization: `Bearer ${token}` },
        })).status""",
        made,
    )
    assert opened == 204
    assert page.evaluate("document.cookie") == ""  # no script sees it
    tab.read(url)
    producer.push("one ")
    tab.await_text("one ")
    assert tab.header(0, "content-type").startswith("text/event-stream")
    cancelled = page.evaluate(
        f"fetch('/relay/v1/streams/{name}/cancel', {{ method: 'POST' }}).then((answer) => answer.status)"
    )
    assert cancelled == 200  # of this very origin, with the cookie
    tab.await_closed()
    assert tab.text() == "one "
    assert (
        page.evaluate("fetch('/relay/v1/session', { method: 'DELETE' }).then(({ status }) => status)") == 204
    )
    refused = page.evaluate("url => fetch(url).then((answer) => answer.status)", url)
    assert refused == 401
