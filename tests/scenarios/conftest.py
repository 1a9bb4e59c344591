"""Relays with short leases and little patience, whose endings are handed over to a receiver."""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from redis_server import RedisServer
from relay_process import RelayProcess
from scripted_upstream import Exchange, Received, ScriptedUpstream
from standardwebhooks.webhooks import Webhook

SECRET = "whsec_" + base64.b64encode(b"scenario" * 4).decode()
DEADLINE_S = 60

LEASED = {"owner_lease_s": 0.9, "journal_timeout_s": 2.0}
"""A dead process is noticed after its lease, by who has been there for as long as the journal's timeout."""


class Receiver:
    """Where the transcripts of ended runs are posted to."""

    def __init__(self, upstream: ScriptedUpstream) -> None:
        self.settings: dict[str, Any] = {
            "webhook_url": f"{upstream.url}/scenarios-webhook",
            "webhook_secret": SECRET,
            "webhook_allow_private": True,
        }
        self._posted: dict[str, list[Received]] = {}
        self._news = threading.Condition()
        upstream.on("/scenarios-webhook", self._take)

    async def _take(self, exchange: Exchange) -> None:
        with self._news:
            received = exchange.received
            self._posted.setdefault(received.header("webhook-id") or "", []).append(received)
            self._news.notify_all()
        await exchange.answer("204 No Content", b"")

    def handed_over(self, run: str) -> Any:
        """What was posted of a run, under its name and a good signature."""
        with self._news:
            assert self._news.wait_for(lambda: run in self._posted, DEADLINE_S), f"{run} was not posted"
            received = self._posted[run][0]
        posted = Webhook(SECRET).verify(received.body, dict(received.headers))
        assert posted["type"] == "run.ended"
        return posted["data"]


@pytest.fixture(scope="session")
def receiver(upstream: ScriptedUpstream) -> Receiver:
    return Receiver(upstream)


@pytest.fixture(scope="session")
def pair(
    redis_server: RedisServer, upstream: ScriptedUpstream, receiver: Receiver
) -> Iterator[tuple[RelayProcess, RelayProcess]]:
    """Two relays on one Redis."""
    given = {"journal": redis_server.url(), "upstream": upstream.url} | LEASED | receiver.settings
    with RelayProcess.start(**given) as one, RelayProcess.start(**given) as other:
        yield one, other


@pytest.fixture(scope="session")
def leased(
    journal_url: str,
    fresh_journal: Callable[[], str],
    upstream: ScriptedUpstream,
    receiver: Receiver,
    request: pytest.FixtureRequest,
) -> Iterator[RelayProcess]:
    """A relay with a short lease."""
    if journal_url.startswith("redis"):
        yield request.getfixturevalue("pair")[0]
        return
    with RelayProcess.start(
        journal=fresh_journal(), upstream=upstream.url, **LEASED, **receiver.settings
    ) as process:
        yield process


@pytest.fixture(scope="session")
def instances(
    journal_url: str, leased: RelayProcess, request: pytest.FixtureRequest
) -> tuple[RelayProcess, RelayProcess]:
    """The relays of one journal: two on a Redis; SQLite has one, which stands for both."""
    if journal_url.startswith("redis"):
        two: tuple[RelayProcess, RelayProcess] = request.getfixturevalue("pair")
        return two
    return leased, leased


@pytest.fixture(scope="session")
def hurried(
    fresh_journal: Callable[[], str], upstream: ScriptedUpstream, receiver: Receiver
) -> Iterator[RelayProcess]:
    """A relay that goes on for nobody, and takes small frames only."""
    with RelayProcess.start(
        journal=fresh_journal(), upstream=upstream.url, abandon_s=0.3, frame_max_bytes=2000,
        **LEASED, **receiver.settings,
    ) as process:  # fmt: skip
        yield process
