"""A relay for real clients, and what they run in."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
from browser.conftest import DEADLINE_MS, browser  # noqa: F401
from browser.tab import RETRY_MS
from playwright.sync_api import BrowserContext
from relay_process import RelayProcess
from scripted_upstream import ScriptedUpstream

from clients.chromium import ClientsPage, serve_clients_page
from clients.node_program import NodeProgram

RESUME_ROUTES = ["GET /{stream}/answer", "GET /{stream}/api/chat/c/stream"]


@pytest.fixture(scope="session")
def beating(fresh_journal: Callable[[], str], upstream: ScriptedUpstream) -> Iterator[RelayProcess]:
    """A relay a journal, whose clients come back at once, and that sends heartbeats all the time."""
    with RelayProcess.start(
        journal=fresh_journal(),
        upstream=upstream.url,
        heartbeat_s=0.05,
        retry_ms=RETRY_MS,
        resume_route=RESUME_ROUTES,
    ) as process:
        yield process


@pytest.fixture(scope="session")
def programs() -> Iterator[Callable[[str], NodeProgram]]:
    """Starts a Node program once a worker."""
    running: dict[str, NodeProgram] = {}
    with contextlib.ExitStack() as stack:

        def program(name: str) -> NodeProgram:
            if name not in running:
                running[name] = stack.enter_context(NodeProgram.running(name))
            return running[name]

        yield program


class LazyKit:
    """Starts what is asked for."""

    def __init__(self, request: pytest.FixtureRequest) -> None:
        self._request = request
        self._context: BrowserContext | None = None

    def program(self, name: str) -> NodeProgram:
        self._request.getfixturevalue("node_packages")
        program: NodeProgram = self._request.getfixturevalue("programs")(name)
        return program

    def open_page(self, url: str) -> ClientsPage:
        if self._context is None:
            serve_clients_page(self._request.getfixturevalue("upstream"))
            self._context = self._request.getfixturevalue("browser").new_context()
            self._context.set_default_timeout(DEADLINE_MS)
        return ClientsPage(self._context, url)

    def close(self) -> None:
        if self._context is not None:
            self._context.close()


@pytest.fixture
def kit(request: pytest.FixtureRequest) -> Iterator[LazyKit]:
    """What the clients of one test run in; the browser's profile is the test's own."""
    kit = LazyKit(request)
    yield kit
    kit.close()
