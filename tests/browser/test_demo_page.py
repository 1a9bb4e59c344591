"""`relay demo` as its users run it: ask, cut, reload, open a second tab, stop, ask again."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple
from urllib.parse import urlsplit

import pytest
from held_port import held_port
from playwright.sync_api import BrowserContext, Locator, Page, Route, expect
from redis_server import RedisServer
from relay_process import RelayProcess
from tcp_proxy import TcpProxy

from relay.demo import ANSWER, ANSWERS, WORDS, words

# question, each word, done, run.started, run.ended
FRAMES = WORDS + 4

# So many words are not over before something was done to them, and so few soon.
LONG, SHORT = 5000, 60

# The countdown of a cut goes on when the test says so.
COUNTDOWN = """
const begin = setInterval;
window.setInterval = (callback, ms, ...rest) => {
    if (ms === 1000) [window.tick, callback] = [callback, () => {}];
    return begin(callback, ms, ...rest);
};
"""

# What browsers say of a connection that is cut or refused; it is no mistake of the page.
OF_THE_NETWORK = "Failed to load resource"


class Demo(NamedTuple):
    url: str
    """Which `relay demo` says to open."""
    agent: str
    """Where its sample agent listens."""
    process: subprocess.Popen[str]

    @classmethod
    @contextmanager
    def running(cls, journal: str) -> Iterator[Demo]:
        command = [sys.executable, "-W", "error", "-m", "relay", "demo", "--port", "0", "--journal", journal]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                urls = (found for line in process.stdout for found in re.findall(r"http://[^/\s]+\d", line))
                agent, url = next(urls, ""), next(urls, "")
                assert url, "relay demo did not start"
                yield cls(url, agent, process)
            finally:
                process.terminate()
            assert process.wait(60) == 0


@pytest.fixture
def demo(fresh_journal: Callable[[], str]) -> Iterator[Demo]:
    """A demo of this test's own, on each journal."""
    with Demo.running(fresh_journal()) as running:
        yield running


@pytest.fixture(scope="module")
def shared_demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    """One for tests of the page alone, which knows of no journal."""
    with Demo.running(f"sqlite:///{tmp_path_factory.mktemp('demo') / 'relay.db'}") as running:
        yield running


@pytest.fixture
def complaints(context: BrowserContext) -> Iterator[list[str]]:
    """What the browser finds wrong with the page; nothing, when the test is over."""
    said: list[str] = []
    context.on("weberror", lambda error: said.append(str(error.error)))
    context.on(
        "console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None
    )
    yield said
    assert [text for text in said if OF_THE_NETWORK not in text] == []


@pytest.fixture
def chat(complaints: list[str], page: Page) -> Page:
    """A tab whose complaints fail the test."""
    return page


def button(page: Page, name: str) -> Locator:
    return page.get_by_role("button", name=name)


def opened(page: Page, url: str) -> Page:
    """The page, when it follows its chat."""
    page.goto(url)
    expect(page.locator("#state")).to_have_text("live")
    return page


def asked(page: Page, url: str) -> Page:
    """The page, when its answer has begun."""
    opened(page, url)
    button(page, "Ask").click()
    await_frames(page, 10)
    return page


def second_tab(page: Page) -> Page:
    """What the button opens."""
    with page.context.expect_page() as other:
        button(page, "Second tab").click()
    expect(other.value.locator("#state")).to_have_text("live")
    return other.value


def ask_for(page: Page, count: int, pace_ms: int = 70, answer: str = ANSWER) -> str:
    """Have the agent say so many words to whatever is asked from now on, in all tabs; the text of it."""

    def continue_(route: Route) -> None:
        url = re.sub(r"pace_ms=\d+", f"pace_ms={pace_ms}&words={count}", route.request.url)
        route.continue_(url=url)

    page.context.unroute_all()
    page.context.route("**/agent/stream?*", continue_)
    return "".join(words(count, answer))


def await_frames(page: Page, least: int) -> None:
    page.wait_for_function(
        "least => Number(document.getElementById('frames').textContent) >= least", arg=least
    )


def await_written(page: Page, least: int) -> None:
    """Wait until the journal has so many frames of the page's chat."""
    page.evaluate(
        """async (least) => {
            for (let top = 0; top < least; ) {
                const answer = await fetch(`/relay/v1/streams/${location.hash.slice(1)}`);
                top = parseInt((await answer.json()).top);
            }
        }""",
        least,
    )


def answer(page: Page, state: str) -> Locator:
    return page.locator(f".answer[data-state={state}]")


def expect_whole(page: Page, text: str = ANSWER) -> None:
    """The page shows this answer once, as completed, and was handed each frame once."""
    expect(answer(page, "completed").locator(".state")).to_have_text("completed")
    assert answer(page, "completed").locator(".text").text_content() == text
    expect_nothing_lost(page)


def expect_nothing_lost(page: Page) -> None:
    expect(page.locator("#duplicates")).to_have_text("0")
    expect(page.locator("#gaps")).to_have_text("0")
    written = (page.locator("#seq").text_content(), page.locator("#frames").text_content())
    assert written[0] == written[1]


def test_an_answer_grows_and_the_instruments_tell(demo: Demo, chat: Page) -> None:
    said = ask_for(chat, SHORT)
    opened(chat, demo.url)
    for name in ("Stop", "Regenerate"):
        expect(button(chat, name)).to_be_disabled()
    chat.get_by_label("Your question").press("Enter")
    expect(answer(chat, "streaming").locator(".state")).to_have_text("streaming")
    for name in ("Stop", "Regenerate", "Cut"):
        expect(button(chat, name)).to_be_enabled()
    expect(button(chat, "Ask")).to_be_disabled()
    expect_whole(chat, said)
    expect(chat.locator("#notice")).to_have_text("The answer is completed.")
    assert chat.locator(".question").all_text_contents() == ["What does relay do?"]
    expect(chat.locator("#frames")).to_have_text(str(SHORT + 4))
    expect(chat.locator("#reconnects")).to_have_text("0")
    expect(chat.locator("#calls")).to_have_text("1")
    expect(chat.locator("#lag")).to_have_text(re.compile(r"^[0-9.]+ ms$"))
    events = chat.locator("#log .event span:nth-child(2)").all_text_contents()
    assert events == ["run.ended", "run.started", "live", "hello"]
    expect(button(chat, "Stop")).to_be_disabled()


def test_a_cut_loses_nothing_and_doubles_nothing(demo: Demo, chat: Page) -> None:
    chat.add_init_script(COUNTDOWN)
    with TcpProxy.running(urlsplit(demo.url).port or 0) as proxy:
        asked(chat, proxy.url)
        button(chat, "Cut").click()
        expect(chat.locator("#state")).to_have_text("offline")
        heard = chat.locator(".text").text_content() or ""
        await_written(chat, int(chat.locator("#seq").text_content() or 0) + 20)
        assert chat.locator(".text").text_content() == heard
        button(chat, "Reconnect").click()
        expect(chat.locator("#state")).to_have_text("live")
        expect(chat.locator("#notice")).to_have_text(re.compile(r"^Back\. \d\d+ frames"))
        caught_up = chat.locator(".caught-up").text_content() or ""
        assert ANSWER.startswith(heard + caught_up)
        assert len(caught_up.split()) >= 19
        proxy.cut_all()  # and one that nobody announced
        expect(chat.locator("#reconnects")).to_have_text("2")
        expect_whole(chat)
    expect(chat.locator("#reconnects")).to_have_text("2")
    expect(chat.locator("#calls")).to_have_text("1")


def test_a_cut_that_nobody_mends_is_over_after_a_moment(demo: Demo, chat: Page) -> None:
    chat.add_init_script(COUNTDOWN)
    said = ask_for(chat, SHORT)
    asked(chat, demo.url)
    button(chat, "Cut").click()
    for name in ("Ask", "Stop", "Regenerate"):
        expect(button(chat, name)).to_be_disabled()
    for left_s in ("6", "5", "4", "3", "2", "1"):
        expect(chat.locator("#left")).to_have_text(left_s)
        chat.evaluate("tick()")
    expect(chat.locator("#state")).to_have_text("live")
    expect_whole(chat, said)


def test_a_reload_and_a_second_tab_in_mid_answer_go_on_with_it(demo: Demo, chat: Page) -> None:
    asked(chat, demo.url)
    with chat.expect_event("load"):
        button(chat, "Reload").click()
    await_frames(chat, 20)
    other = second_tab(chat)
    await_frames(other, 20)
    assert other.url == chat.url
    button(chat, "Cut").click()  # of the tab that reads for both
    for tab in (chat, other):
        expect_whole(tab)
        expect(tab.locator("#frames")).to_have_text(str(FRAMES))
        expect(tab.locator("#calls")).to_have_text("1")
    late = opened(chat.context.new_page(), chat.url)
    expect_whole(late)


def test_stop_in_one_tab_stops_the_answer_in_all_and_keeps_what_was_said(demo: Demo, chat: Page) -> None:
    said = ask_for(chat, LONG)
    asked(chat, demo.url)
    other = second_tab(chat)
    await_frames(other, 20)
    button(other, "Stop").click()
    texts = set()
    for tab in (chat, other):
        expect(answer(tab, "stopped").locator(".state")).to_have_text("stopped")
        texts.add(tab.locator(".text").text_content() or "")
        expect_nothing_lost(tab)
        expect(button(tab, "Stop")).to_be_disabled()
    [text] = texts
    assert said.startswith(text)
    assert len(text.split()) >= 17


@pytest.mark.parametrize("when", ["while it is given", "when it is over"])
def test_an_answer_that_is_regenerated_is_replaced_in_all_tabs(demo: Demo, chat: Page, when: str) -> None:
    is_over = when == "when it is over"
    first = ask_for(chat, SHORT if is_over else LONG)
    asked(chat, demo.url)
    other = second_tab(chat)
    if is_over:
        expect_whole(chat, first)
    second = ask_for(chat, SHORT, answer=ANSWERS[1])
    button(other, "Regenerate").click()
    for tab in (chat, other):
        old = answer(tab, "replaced").locator(".text")
        expect(old).to_have_css("text-decoration-line", "line-through")
        assert first.startswith(old.text_content() or "-")
        expect_whole(tab, second)
        assert tab.locator(".question").all_text_contents() == ["What does relay do?"]
        assert tab.locator(".answer").evaluate_all("all => all.map(({ dataset }) => dataset.state)") == [
            "replaced", "completed",
        ]  # fmt: skip
        expect(tab.locator("#calls")).to_have_text("2")
    for tab in (opened(chat.context.new_page(), chat.url), chat):
        expect_whole(tab, second)
        expect(answer(tab, "replaced")).to_have_count(1)


def test_a_page_outlives_relay_and_says_what_became_of_the_answer(
    demo: Demo, chat: Page, fresh_journal: Callable[[], str]
) -> None:
    settings = {"journal": fresh_journal(), "upstream": demo.agent}
    with held_port() as port:
        with RelayProcess.start(**settings, port=port) as relay:
            said = ask_for(chat, LONG)
            asked(chat, relay.url)
            relay.kill()
            expect(chat.locator("#state")).to_have_text("reconnecting")
            expect(chat.locator("#notice")).to_have_text(re.compile("relay cannot be reached"))
            expect(button(chat, "Ask")).to_be_disabled()
        with RelayProcess.start(**settings, port=port):
            expect(chat.locator("#state")).to_have_text("live")
            expect(answer(chat, "broke-off").locator(".state")).to_have_text(re.compile("broke off: "))
            assert said.startswith(chat.locator(".text").text_content() or "-")
            said = ask_for(chat, SHORT, answer=ANSWERS[1])
            button(chat, "Regenerate").click()
            expect_whole(chat, said)
            assert demo.process.poll() is None


def test_a_page_whose_journal_is_gone_shows_the_one_that_is_there(
    demo: Demo, chat: Page, fresh_journal: Callable[[], str], redis_server: RedisServer
) -> None:
    journal = fresh_journal()
    ask_for(chat, LONG)
    with held_port() as port:
        with RelayProcess.start(journal=journal, upstream=demo.agent, port=port) as relay:
            asked(chat, relay.url)
            button(chat, "Stop").click()
            expect(answer(chat, "stopped")).to_have_count(1)
        said = ask_for(chat, SHORT)
        journal = fresh_journal() if journal.startswith("sqlite") else redis_server.url(db=1)
        with RelayProcess.start(journal=journal, upstream=demo.agent, port=port):
            expect(chat.locator("#notice")).to_have_text(re.compile("The journal was begun anew"))
            expect(chat.locator("#state")).to_have_text("live")
            expect(chat.locator(".answer")).to_have_count(0)
            chat.get_by_label("Your question").fill("Again?")
            chat.get_by_label("Your question").press("Enter")
            expect(answer(chat, "completed").locator(".text")).to_have_count(1)
            assert answer(chat, "completed").locator(".text").text_content() == said


def test_a_chat_that_was_deleted_has_ended(demo: Demo, chat: Page) -> None:
    opened(chat, demo.url)
    name = urlsplit(chat.url).fragment
    assert chat.request.delete(f"{demo.url}/relay/v1/streams/{name}").ok
    expect(chat.locator("#state")).to_have_text("ended")
    expect(chat.locator("#notice")).to_have_text("This chat is no more. Begin a new one.")
    expect(button(chat, "Ask")).to_be_disabled()


def test_the_page_counts_by_the_numbers_that_it_is_handed(shared_demo: Demo, chat: Page) -> None:
    opened(chat, shared_demo.url)
    # The last that the page itself is told; with it the page would put its own numbers back.
    expect(chat.locator("#log .event").first).to_contain_text("live")
    chat.evaluate(
        """async () => {
            const { Instruments } = await import("/demo-instruments.js");
            const instruments = new Instruments();
            for (const seq of [1, 2, 2, 3, 7, 8, 1]) instruments.frame(`${seq}-1`, true, false);
        }"""
    )
    for name, number in {"frames": 7, "duplicates": 2, "gaps": 1}.items():
        expect(chat.locator(f"#{name}")).to_have_text(str(number))
    expect(chat.locator("#duplicates")).to_have_class("bad")


def test_an_agent_that_is_down_is_told_in_the_chat(
    demo: Demo, chat: Page, fresh_journal: Callable[[], str]
) -> None:
    with RelayProcess.start(journal=fresh_journal(), upstream=demo.agent) as relay:
        opened(chat, relay.url)
        demo.process.terminate()
        demo.process.wait(60)
        button(chat, "Ask").click()
        expect(answer(chat, "broke-off").locator(".state")).to_have_text(re.compile(r"broke off: \w+"))
        expect(chat.locator("#state")).to_have_text("live")
        expect(chat.locator("#calls")).to_have_text("unknown")


def test_chats_are_kept_apart(shared_demo: Demo, chat: Page) -> None:
    asked(chat, shared_demo.url)
    former = chat.url
    with chat.expect_event("load"):  # what is live before is the former chat
        chat.get_by_role("link", name="New chat").click()
    expect(chat.locator("#state")).to_have_text("live")
    assert chat.url != former
    expect(chat.locator("#empty")).to_be_visible()
    expect(chat.locator(".answer")).to_have_count(0)
    expect(chat.locator("#calls")).to_have_text("0")


def test_a_page_with_nothing_to_hear_asks_for_nothing(shared_demo: Demo, chat: Page) -> None:
    chat.clock.install(time=0)
    chat.clock.pause_at(1000)
    opened(chat, shared_demo.url)
    expect(chat.locator("#calls")).to_have_text("0")
    requests: list[str] = []
    chat.on("request", lambda request: requests.append(request.url))
    chat.clock.run_for(40_000)  # heartbeats come in real time, and are missed after 45 s of the page's
    chat.evaluate("fetch('/relay/healthz').then((answer) => answer.text())")
    assert requests == [f"{shared_demo.url}/relay/healthz"]
    expect(chat.locator("#reconnects")).to_have_text("0")


def test_what_is_shown_is_text_and_never_markup(shared_demo: Demo, chat: Page) -> None:
    opened(chat, shared_demo.url)
    question = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    chat.get_by_label("Your question").fill(question)
    chat.get_by_label("Your question").press("Enter")
    expect(chat.locator(".question")).to_have_text(question)
    assert chat.locator("#conversation :is(img, script)").count() == 0


def test_the_page_runs_no_script_that_stands_in_it(shared_demo: Demo, page: Page) -> None:
    opened(page, shared_demo.url)
    page.evaluate(
        """() => {
            const script = document.createElement("script");
            script.textContent = "window.ran = true";
            document.head.append(script);
        }"""
    )
    assert page.evaluate("window.ran") is None


@pytest.mark.parametrize(("width", "height"), [(360, 740), (1280, 800)])
def test_the_page_fits_its_window(shared_demo: Demo, chat: Page, width: int, height: int) -> None:
    chat.add_init_script(COUNTDOWN)
    ask_for(chat, LONG, pace_ms=10)
    chat.set_viewport_size({"width": width, "height": height})
    opened(chat, shared_demo.url)
    expect_to_fit(chat, width, height)
    button(chat, "Ask").click()
    await_frames(chat, 100)
    expect_to_fit(chat, width, height)
    button(chat, "Cut").click()
    expect_to_fit(chat, width, height, "Reconnect")


def expect_to_fit(page: Page, width: int, height: int, cut: str = "Cut") -> None:
    """There is nothing to scroll to, and all that there is to press and to read is on the screen."""
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate("document.documentElement.scrollHeight") == height
    for name in ("Ask", "Stop", "Regenerate", cut, "Reload", "Second tab"):
        expect(button(page, name)).to_be_in_viewport(ratio=1)
    for instrument in ("state", "duplicates", "gaps", "calls", "lag", "frames", "reconnects", "seq"):
        expect(page.locator(f"#{instrument}")).to_be_in_viewport(ratio=1)
    overflowing = "all => all.filter((one) => one.scrollWidth > one.clientWidth).map((one) => one.id)"
    assert page.locator("button").evaluate_all(overflowing) == []


def test_the_log_is_a_click_away_where_there_is_no_room(shared_demo: Demo, chat: Page) -> None:
    chat.set_viewport_size({"width": 360, "height": 740})
    opened(chat, shared_demo.url)
    expect(chat.locator("#log")).not_to_be_visible()
    button(chat, "Events").click()
    expect(chat.locator("#log")).to_be_visible()
    expect(button(chat, "Events")).to_have_attribute("aria-expanded", "true")


# The contrast of each text with what is behind it, by WCAG 2.2.
CONTRASTS = """() => {
    const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const pixel = (color) => {
        canvas.clearRect(0, 0, 1, 1);
        canvas.fillStyle = color;
        canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const behind = (element) => {
        for (; element; element = element.parentElement) {
            const color = pixel(getComputedStyle(element).backgroundColor);
            if (color[3] === 255) return color;
        }
    };
    const linear = (value) => (value <= 10 ? value / 3294.6 : ((value / 255 + 0.055) / 1.055) ** 2.4);
    const luminance = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
    const isOwn = (node) => node.nodeType === Node.TEXT_NODE && node.data.trim();
    const ownText = (element) => [...element.childNodes].some(isOwn);
    return [...document.body.querySelectorAll("*")]
        .filter((element) => ownText(element) && element.checkVisibility())
        .map((element) => {
            const of = [pixel(getComputedStyle(element).color), behind(element)].map(luminance);
            return [element.textContent, (Math.max(...of) + 0.05) / (Math.min(...of) + 0.05)];
        });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read(shared_demo: Demo, chat: Page, scheme: str) -> None:
    chat.emulate_media(color_scheme=scheme, reduced_motion="reduce")  # type: ignore[arg-type]
    chat.add_init_script(COUNTDOWN)
    ask_for(chat, LONG)
    asked(chat, shared_demo.url)
    button(chat, "Regenerate").click()
    expect(answer(chat, "replaced")).to_have_count(1)
    button(chat, "Cut").click()
    await_written(chat, int(chat.locator("#seq").text_content() or 0) + 8)  # of the new answer's words too
    texts = chat.evaluate(CONTRASTS)
    button(chat, "Reconnect").click()
    expect(chat.locator(".caught-up")).not_to_be_empty()
    texts += chat.evaluate(CONTRASTS)
    button(chat, "Stop").click()
    expect(answer(chat, "stopped")).to_have_count(1)
    texts += chat.evaluate(CONTRASTS)
    assert len(texts) > 60
    assert [(text, contrast) for text, contrast in texts if contrast < 4.5] == []
