"""A FastAPI agent behind relay: what its README does, and its page in Chromium."""

from __future__ import annotations

import base64
import http.client
import json
import re
import secrets
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from itertools import takewhile
from typing import Any, NamedTuple

import pytest
from playwright.sync_api import BrowserContext, Page, expect
from reading import Block, Reading
from relay_process import RelayProcess
from run_record import whole_run

from examples.example import Example, body_of, once, posted, whole_events

COUNTED = " ".join(str(number) for number in range(1, 51))
LONG = " ".join(["o"] * 500)
"""A question, as long as they may be, whose answer is not over soon."""

SECRET = "whsec_" + base64.b64encode(secrets.token_bytes(24)).decode()


def answer_to(question: str) -> str:
    return f"You asked: {question} And so I count to fifty: {COUNTED}"


class Scene(NamedTuple):
    """The example, running."""

    example: Example
    relay: RelayProcess

    def ask(self, chat: str, question: str) -> Reading:
        body = json.dumps({"question": question}).encode()
        return Reading(f"{self.relay.url}/chat/{chat}", "POST", body, Content_Type="application/json")

    def counts(self) -> Any:
        return self.relay.json("/counts")

    def kept(self, chat: str, count: int = 1) -> Any:
        """What the agent kept of a chat, as soon as it is so many answers."""
        return once(lambda: len(found := self.relay.json(f"/chat/{chat}")) == count and found)


@pytest.fixture(scope="module")
def scene(copy: Callable[..., Example]) -> Iterator[Scene]:
    example = copy("fastapi-agent", 8000, 8080)
    with (
        example.server("uvicorn", 8000, RELAY_WEBHOOK_SECRET=SECRET, PACE_S="0.02"),
        example.relay(webhook_secret=SECRET) as relay,
    ):
        yield Scene(example, relay)


def text_of(frames: list[Block]) -> str:
    return "".join(frame.data for frame in frames)


def test_a_reader_that_leaves_and_comes_back_has_it_all_and_the_agent_noticed_nothing(
    scene: Scene, name: str
) -> None:
    before = scene.counts()
    with scene.ask(name, "hello") as reading:
        assert reading.headers["relay-stream"] == name
        shown = reading.take(5)
    with Reading(f"{scene.relay.url}/chat/{name}", Last_Event_ID=shown[-1].id) as reading:
        shown += reading.frames()
    assert text_of(shown) == answer_to("hello")
    assert scene.kept(name) == [{"status": "completed", "reason": "upstream_end", "text": answer_to("hello")}]
    assert scene.counts() == {"asked": before["asked"] + 1, "left": before["left"]}


def test_a_stop_reaches_the_agent_which_keeps_what_was_shown(scene: Scene, name: str) -> None:
    before = scene.counts()
    with scene.ask(name, LONG) as reading:
        shown = reading.take(5)
        assert posted(scene.example.command("/cancel").replace("demo", name))["reason"] == "client_cancel"
        with pytest.raises((ConnectionError, http.client.IncompleteRead)):  # "raw" has no other way
            reading.read()
    (kept,) = scene.kept(name)
    assert (kept["status"], kept["reason"]) == ("cancelled", "client_cancel")
    assert kept["text"].startswith(text_of(shown))
    assert answer_to(LONG).startswith(kept["text"])
    assert kept["text"] == text_of(whole_run(scene.relay, name).frames)
    once(lambda: scene.counts() == {"asked": before["asked"] + 1, "left": before["left"] + 1})


def test_what_relay_did_not_sign_is_not_kept(scene: Scene, name: str) -> None:
    forged = {"type": "run.ended", "data": {"run": name, "stream": name, "status": "completed", "text": "x"}}
    headers = {"webhook-id": name, "webhook-timestamp": "1", "webhook-signature": "v1,AAAA"}
    request = urllib.request.Request(
        f"{scene.relay.url}/on-run-end", json.dumps(forged).encode(), headers, method="POST"
    )
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=60)
    with refused.value:
        assert refused.value.code == 401
    assert scene.relay.json(f"/chat/{name}") == []


def test_the_commands_of_the_readme_do_what_it_says(copy: Callable[..., Example]) -> None:
    example = copy("fastapi-agent", 8000, 8080)
    with (
        example.server("uvicorn", 8000, RELAY_WEBHOOK_SECRET=SECRET, PACE_S="0.02"),
        example.relay(webhook_secret=SECRET, port=example.ports[8080]) as relay,
    ):
        asking = example.command("curl -iN").replace("-m 1", "-m 60")
        begun = whole_events(example.shell(f"{asking} | head -n 40"))
        assert "relay-stream: demo" in begun
        last = re.findall(r"^id: (\S+)$", begun, re.MULTILINE)[-1]
        rest = example.shell(example.command("Last-Event-ID").replace("ID: ID", f"ID: {last}"))
        words = re.findall(r"^data: (.*)$", begun + rest, re.MULTILINE)
        assert "".join(words) == answer_to("hello")
        with example.background(example.command("/events").replace("-m 5", "-m 60")) as following:
            assert following.stdout is not None
            followed = list(takewhile(lambda line: '"live"' not in line, following.stdout))
        assert "".join(followed).count('"run.ended"') == 1
        with example.background(example.command("and then?").replace("and then?", LONG)):
            once(lambda: relay.json("/relay/v1/streams/demo")["open_runs"])
            assert posted(example.command("sleep 1"))["reason"] == "client_cancel"
        once(lambda: json.loads(example.shell(example.command("/counts"))) == {"asked": 2, "left": 1})
        listing = [command for command in example.commands if command.endswith("/chat/demo")]
        once(lambda: len(json.loads(body_of(f"{relay.url}/chat/demo"))) == 2)
        kept = json.loads(example.shell(*listing))
        assert [answer["status"] for answer in kept] == ["completed", "cancelled"]


def test_a_page_that_is_reloaded_and_a_second_tab_show_every_word_once(
    scene: Scene, context: BrowserContext, page: Page, name: str
) -> None:
    before = scene.counts()
    page.goto(f"{scene.relay.url}/#{name}")
    page.get_by_role("button", name="Ask").click()
    expect(page.locator("dd")).to_contain_text("count")
    page.reload()
    other = context.new_page()
    other.goto(f"{scene.relay.url}/#{name}")
    for tab in (page, other):
        expect(tab.locator("dd[data-status=completed]")).to_have_count(1)
        assert tab.locator("dt").all_text_contents() == ["What is it like?"]
        assert tab.locator("dd").all_text_contents() == [answer_to("What is it like?")]
    assert scene.counts() == {"asked": before["asked"] + 1, "left": before["left"]}


def test_the_stop_of_the_page_stops_the_agent_in_every_tab(
    scene: Scene, context: BrowserContext, page: Page, name: str
) -> None:
    tabs = [page, context.new_page()]
    for tab in tabs:
        tab.goto(f"{scene.relay.url}/#{name}")
    page.get_by_label("Question").fill(LONG)
    page.get_by_role("button", name="Ask").click()
    expect(tabs[1].locator("dd")).to_contain_text("o o")
    tabs[1].get_by_role("button", name="Stop").click()
    for tab in tabs:
        expect(tab.locator("dd[data-status=cancelled]")).to_contain_text("(cancelled)")
    assert scene.kept(name)[0]["reason"] == "client_cancel"
