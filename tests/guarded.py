"""A relay with authentication, and the credentials for it."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import jwt
from relay_process import RelayProcess

PRODUCER_KEY = "producer-key-0123456789"
ADMIN_KEY = "admin-key-0123456789"
SECRET = "a secret of thirty-two bytes or more"

SETTINGS: dict[str, Any] = {"producer_key": PRODUCER_KEY, "admin_key": ADMIN_KEY, "jwt_secret": SECRET}

DEADLINE_S = 60


class Answer(NamedTuple):
    """A whole answer; header names are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def code(self) -> str:
        """Of a problem document."""
        assert self.headers["content-type"] == "application/problem+json", self.body
        return str(json.loads(self.body)["code"])


def token(*streams: str, scope: str = "read", life_s: float = 600, **claims: Any) -> str:
    """A token as a backend makes it."""
    given = {"aud": "relay", "exp": time.time() + life_s, "scope": scope, "streams": streams} | claims
    return jwt.encode(given, SECRET, "HS256")


def bearer(credential: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {credential}"}


def ask(url: str, method: str, path: str, body: bytes | None = None, **headers: str) -> Answer:
    """One request, its whole answer."""
    at = urlsplit(url)
    connection = http.client.HTTPConnection(at.hostname or "", at.port, timeout=DEADLINE_S)
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        connection.request(method, path, body, names)
        response = connection.getresponse()
        got = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, got, response.read())
    finally:
        connection.close()


def asked_too_often(relay: RelayProcess, headers: Callable[[int], dict[str, str]]) -> list[Answer]:
    """The answers to requests as fast as they can be made, each with headers of its number, up to the first
    that is refused as one too many. A pause that the system makes lets more of them in."""
    answers: list[Answer] = []
    while not answers or answers[-1].status == 200:
        assert len(answers) < 1000, "whoever asks too often is let in"
        answers.append(ask(relay.url, "GET", "/relay/healthz", **headers(len(answers))))
    assert answers[-1].status == 429
    return answers
