"""A real Chromium, the system's own, driven by Playwright; and relays whose browsers come back at once."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright
from relay_process import RelayProcess
from scripted_upstream import ScriptedUpstream

from browser.tab import RETRY_MS

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
DEADLINE_MS = 60_000

expect.set_options(timeout=DEADLINE_MS)


# Of the package and not of the session: while Playwright's sync API runs, it holds this thread's event loop,
# and tests elsewhere use asyncio.run.
@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """One browser a worker, with a fresh profile. Nothing is ever downloaded."""
    program = next((found for name in CHROMIUM if (found := shutil.which(name))), None)
    if program is None:
        pytest.fail(
            f"These tests need a browser: none of {', '.join(CHROMIUM)} is on the PATH. "
            "`python3 dev.py setup` installs one."
        )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, headless=True, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    """A profile of the test's own."""
    context = browser.new_context()
    context.set_default_timeout(DEADLINE_MS)
    yield context
    context.close()


@pytest.fixture
def page(context: BrowserContext) -> Page:
    """A tab."""
    return context.new_page()


@pytest.fixture(scope="session")
def swift_relay(fresh_journal: Callable[[], str], upstream: ScriptedUpstream) -> Iterator[RelayProcess]:
    """A relay a journal that lets browsers come back at once, shared by the tests of this folder. It sends
    plain bytes, so that a cut can be anywhere in them."""
    with RelayProcess.start(
        journal=fresh_journal(), upstream=upstream.url, retry_ms=RETRY_MS, compress="never"
    ) as process:
        yield process


@pytest.fixture(scope="session")
def packing_relay(
    upstream: ScriptedUpstream, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RelayProcess]:
    """One that compresses."""
    journal = f"sqlite:///{tmp_path_factory.mktemp('packing') / 'relay.db'}"
    with RelayProcess.start(
        journal=journal, upstream=upstream.url, retry_ms=RETRY_MS, compress="always"
    ) as process:
        yield process


@pytest.fixture
def dice() -> random.Random:
    """Randomness that a failure can be repeated with."""
    seed = int(os.environ.get("BROWSER_SEED") or random.SystemRandom().randrange(2**32))
    print(f"BROWSER_SEED={seed} repeats this")
    return random.Random(seed)
