"""Servers that tests share: starting one costs more than a test. Tests are kept apart by stream name."""

from __future__ import annotations

import secrets
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from held_port import held_port
from hypothesis import HealthCheck, settings
from redis_server import RedisServer
from relay_process import RelayProcess
from scripted_upstream import ScriptedUpstream

NODE_MODULES = Path(__file__).parent / "js" / "node_modules"

# A shell that runs the tests in the background has them ignore Ctrl-C, and so would all that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes is said by the machine's other work, and not by the code that it tries.
settings.register_profile("relay", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("relay")


@pytest.fixture(scope="session")
def redis_server() -> Iterator[RedisServer]:
    """A redis-server shared by the tests of this process (each pytest-xdist worker has its own)."""
    server = RedisServer.start()
    yield server
    server.stop()


@pytest.fixture
def own_redis() -> Iterator[RedisServer]:
    """A redis-server of this test's own, which it may kill."""
    server = RedisServer.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def node_packages() -> Path:
    """Where the JavaScript packages of tests/js/package.json are."""
    if not (NODE_MODULES / "relay-stamp").is_file():
        pytest.fail("This test needs JavaScript packages. `python3 dev.py setup` installs them.")
    return NODE_MODULES


@pytest.fixture(scope="session")
def upstream() -> Iterator[ScriptedUpstream]:
    """An agent backend that all tests of a worker script, each under paths of its own."""
    with ScriptedUpstream.running() as server:
        yield server


@pytest.fixture(scope="session", params=["sqlite", "redis"])
def journal_url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A journal of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path_factory.mktemp('journal') / 'relay.db'}"
    server: RedisServer = request.getfixturevalue("redis_server")
    return server.url()


@pytest.fixture(scope="session")
def relay(journal_url: str, upstream: ScriptedUpstream) -> Iterator[RelayProcess]:
    """One relay a journal, with default settings, shared by all tests that need nothing else."""
    with RelayProcess.start(journal=journal_url, upstream=upstream.url) as process:
        yield process


@pytest.fixture(scope="session")
def fresh_journal(journal_url: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], str]:
    """Makes the URL of a journal of the same kind for one more relay; sqlite takes one process only."""

    def make() -> str:
        if journal_url.startswith("sqlite"):
            return f"sqlite:///{tmp_path_factory.mktemp('fresh') / 'relay.db'}"
        return journal_url

    return make


@pytest.fixture
def port() -> Iterator[int]:
    """A port for servers of this test alone, that is there for one after the other."""
    with held_port() as number:
        yield number


@pytest.fixture
def name() -> str:
    """A stream name, and a path segment, that no other test has."""
    return "t-" + secrets.token_hex(6)
