"""A plain HTTP client that reads streams frame by frame and can leave at any moment."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import urlsplit

DEADLINE_S = 60


class Block(NamedTuple):
    """One dispatched event as a simple reader of the standard sees it. `comments` came before it."""

    id: str
    event: str
    data: str
    comments: tuple[str, ...] = ()

    @property
    def control(self) -> dict[str, Any] | None:
        """The control frame in it, or None."""
        return json.loads(self.data) if self.event == "relay" else None


class Reading:
    """A request whose answer is read as it comes. A use that waits longer than the deadline fails."""

    def __init__(self, url: str, method: str = "GET", body: bytes | None = None, **headers: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        self._connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=DEADLINE_S)
        target = parts.path + ("?" + parts.query if parts.query else "")
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        self._connection.request(method, target, body, names)
        self._response = self._connection.getresponse()
        self.status = self._response.status
        self.headers = {name.lower(): value for name, value in self._response.getheaders()}
        self.last_id = ""

    def lines(self) -> Iterator[str]:
        """Lines without their ends; a broken answer raises http.client.IncompleteRead or ConnectionError."""
        while line := self._response.readline():
            yield line.decode().removesuffix("\n")

    def blocks(self) -> Iterator[Block]:
        """Events as they are dispatched."""
        event, data, comments, id_ = "", [], [], self.last_id
        for line in self.lines():
            field, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if not line:
                self.last_id = id_
                if data:
                    yield Block(id_, event, "\n".join(data), tuple(comments))
                event, data, comments = "", [], []
            elif line.startswith(":"):
                comments.append(value)
            elif field == "id":
                id_ = value
            elif field == "event":
                event = value
            elif field == "data":
                data.append(value)

    def frames(self) -> list[Block]:
        """Every event to the end of the answer, control frames left out."""
        return [block for block in self.blocks() if block.event != "relay"]

    def take(self, count: int) -> list[Block]:
        """The next events, control frames included. Further calls go on behind them."""
        if not hasattr(self, "_blocks"):
            self._blocks = self.blocks()
        return [next(self._blocks) for _ in range(count)]

    def read(self) -> bytes:
        """The rest of the answer."""
        return self._response.read()

    def cut(self) -> None:
        """Leave, with a reset."""
        if self._connection.sock is not None:
            self._connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self._response.close()
        self._connection.close()

    def __enter__(self) -> Reading:
        return self

    def __exit__(self, *exc: object) -> None:
        self.cut()
