"""A producer that pushes to a relay over plain HTTP, one connection a request, and one that sends its body
bit by bit."""

from __future__ import annotations

import http.client
import json
from typing import Any, NamedTuple, Self

from raw_client import RawAnswer, RawClient
from relay_process import RelayProcess

DEADLINE_S = 60


class Answer(NamedTuple):
    """A whole answer; header names are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def problem(self) -> tuple[int, str]:
        """The status and code of a problem document."""
        assert self.headers["content-type"] == "application/problem+json", self.body
        assert self.json["status"] == self.status
        return self.status, self.json["code"]


def ask(port: int, method: str, path: str, body: Any = None, **headers: str) -> Answer:
    """One request under `/relay/v1/streams/`. A body that is not bytes is sent as JSON."""
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    if body is not None and not isinstance(body, bytes):
        body = json.dumps(body).encode()
        names.setdefault("Content-Type", "application/json")
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S)
    try:
        connection.request(method, f"/relay/v1/streams/{path}", body, names)
        response = connection.getresponse()
        got = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, got, response.read())
    finally:
        connection.close()


class Producer:
    """A pushed run. `port` is where its requests go: a relay, or something in between."""

    def __init__(self, relay: RelayProcess, stream: str, **wishes: Any) -> None:
        self.port = relay.port
        self.stream = stream
        self.opened = ask(self.port, "POST", f"{stream}/runs", wishes)
        assert self.opened.status in (200, 201), self.opened
        self.run = self.opened.json["run"]
        self.writer = self.opened.json["writer"]

    def ask(self, what: str, body: Any = None, **headers: str) -> Answer:
        """One request of the run's writer."""
        path = f"{self.stream}/runs/{self.run}/{what}"
        return ask(self.port, "POST", path, body, **({"Relay_Writer": self.writer} | headers))

    def push(self, *data: Any, end: str = "", **headers: str) -> Answer:
        """Frames without event names, as JSON."""
        query = f"?end={end}" if end else ""
        return self.ask(f"frames{query}", [{"data": item} for item in data], **headers)

    def body(self, media_type: str = "application/x-ndjson", query: str = "", *headers: str) -> LongBody:
        """A body to be sent bit by bit."""
        target = f"/relay/v1/streams/{self.stream}/runs/{self.run}/frames{query}"
        return LongBody(self.port, target, media_type, f"Relay-Writer: {self.writer}", *headers)


class LongBody:
    """A request whose chunked body is sent as the test says."""

    def __init__(self, port: int, target: str, media_type: str, *headers: str) -> None:
        self._client = RawClient(port)
        framing = (f"Content-Type: {media_type}", "Transfer-Encoding: chunked")
        self._client.request("POST", target, *framing, *headers)

    def send(self, data: bytes) -> None:
        self._client.send(b"%x\r\n%b\r\n" % (len(data), data))

    def send_raw(self, data: bytes) -> None:
        """Bytes without the framing of a chunk."""
        self._client.send(data)

    def lines(self, *data: Any) -> None:
        for item in data:
            self.send(json.dumps({"data": item}).encode() + b"\n")

    def finish(self) -> RawAnswer:
        self._client.send(b"0\r\n\r\n")
        return self.answer()

    def answer(self) -> RawAnswer:
        return self._client.answer()

    def cut(self) -> None:
        """Leave in the midst."""
        self._client.reset()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.cut()
