"""A plain HTTP client that reads streams frame by frame and can leave at any moment."""

from __future__ import annotations

import http.client
import json
import socket
import zlib
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


class Body:
    """A body as it comes, decompressed where it is; one that ends before its framing, or its gzip member,
    does is broken. (`HTTPResponse.readline` takes a broken one for one that ended.)"""

    def __init__(self, response: http.client.HTTPResponse, is_gzip: bool) -> None:
        self._response = response
        self._member = zlib.decompressobj(31) if is_gzip else None
        self._held = bytearray()

    def readline(self) -> bytes:
        while b"\n" not in self._held and self._more():
            pass
        return self._take(self._held.find(b"\n") + 1 or len(self._held))

    def read(self) -> bytes:
        while self._more():
            pass
        return self._take(len(self._held))

    def _take(self, size: int) -> bytes:
        taken = bytes(self._held[:size])
        del self._held[:size]
        return taken

    def _more(self) -> bool:
        data = self._response.read1(65536)
        if self._member is None:
            self._held += data
            return bool(data)
        if not data and not self._member.eof:
            raise http.client.IncompleteRead(bytes(self._held))
        self._held += self._member.decompress(data)
        assert not self._member.unused_data
        return bool(data)


class Reading:
    """A request whose answer is read as it comes, every second one compressed if relay likes to. A use that
    waits longer than the deadline fails."""

    _count = 0

    def __init__(self, url: str, method: str = "GET", body: bytes | None = None, **headers: str) -> None:
        Reading._count += 1
        if Reading._count % 2:
            headers.setdefault("Accept_Encoding", "gzip")
        parts = urlsplit(url)
        assert parts.hostname is not None
        assert parts.port is not None
        self._connection = self._connect(parts.hostname, parts.port)
        target = parts.path + ("?" + parts.query if parts.query else "")
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        self._connection.request(method, target, body, names)
        self._response = self._connection.getresponse()
        self.status = self._response.status
        self.headers = {name.lower(): value for name, value in self._response.getheaders()}
        self.last_id = ""
        is_gzip = self.headers.get("content-encoding") == "gzip"
        self._body = Body(self._response, is_gzip)

    def _connect(self, host: str, port: int) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(host, port, timeout=DEADLINE_S)

    def lines(self) -> Iterator[str]:
        """Lines without their ends; a broken answer raises http.client.IncompleteRead or ConnectionError."""
        while line := self._body.readline():
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
        return self._body.read()

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
