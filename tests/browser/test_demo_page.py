"""`relay demo` as its users run it: ask, cut, reload, open a second tab."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import BrowserContext, Page, expect
from tcp_proxy import TcpProxy

from browser.conftest import DEADLINE_MS
from relay.demo import ANSWER, WORDS

expect.set_options(timeout=DEADLINE_MS)

# question, each word, done, run.started, run.ended
FRAMES = WORDS + 4


@pytest.fixture
def demo(fresh_journal: Callable[[], str]) -> Iterator[str]:
    """The URL that `relay demo` says to open."""
    command = [sys.executable, "-W", "error", "-m", "relay", "demo", "--port", "0"]
    with subprocess.Popen(
        [*command, "--journal", fresh_journal()], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        said = ""
        for line in process.stdout:
            said += line
            if found := re.search(r"Open (http://\S+)", line):
                yield found[1]
                break
        else:
            pytest.fail(f"relay demo did not start: {said}")
        process.terminate()
        assert process.wait(60) == 0


def await_frames(page: Page, least: int) -> None:
    page.wait_for_function("least => seen.frames >= least", arg=least)


def expect_whole(page: Page) -> None:
    """The page shows the whole answer once, and has seen that it is over."""
    expect(page.locator(".ending")).to_have_text("completed")
    assert page.locator(".question").all_text_contents() == ["What do you do?"]
    assert page.locator(".answer").all_text_contents() == [ANSWER]
    assert page.locator("#duplicates").text_content() == "0"
    assert page.locator("#holes").text_content() == "0"
    assert page.locator("#frames").text_content() == str(FRAMES)
    expect(page.locator("#calls")).to_have_text("1")


def test_the_demo_survives_a_cut_a_reload_and_a_second_tab(demo: str, context: BrowserContext) -> None:
    page = context.new_page()
    errors: list[str] = []
    context.on("weberror", lambda error: errors.append(str(error.error)))
    with TcpProxy.running(urlsplit(demo).port or 0) as proxy:
        page.goto(proxy.url)
        page.get_by_role("button", name="Ask").click()
        await_frames(page, 10)
        page.get_by_role("button", name="Cut").click()
        expect(page.locator("#connections")).to_have_text("2")
        await_frames(page, 20)
        with page.expect_event("load"):
            page.get_by_role("button", name="Reload").click()
        await_frames(page, 20)
        with context.expect_page() as opened:
            page.get_by_role("button", name="Second tab").click()
        second = opened.value
        second.wait_for_load_state()
        await_frames(second, 20)
        proxy.cut_all()  # and one that nobody announced
        for tab in (page, second):
            expect_whole(tab)
    # Over is over: a late tab, too, gets the same.
    late = context.new_page()
    late.goto(f"{demo}#{urlsplit(page.url).fragment}")
    expect_whole(late)
    assert errors == []


@pytest.mark.parametrize("width", [390, 1280])
def test_the_demo_page_fits_its_window(demo: str, page: Page, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 800})
    page.goto(demo)
    page.get_by_role("button", name="Ask").click()
    await_frames(page, 10)
    assert page.evaluate("document.documentElement.scrollWidth") == width
