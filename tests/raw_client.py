"""A client that sends and reads bytes as they are, for what no HTTP library would do."""

from __future__ import annotations

import contextlib
import json
import select
import socket
from typing import Any, NamedTuple, Self

from relay_process import RelayProcess

DEADLINE_S = 60


class RawAnswer(NamedTuple):
    """One answer as it was on the wire. `whole` says whether its framing was complete; header names are in
    lower case."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes
    whole: bool

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key == name), None)

    @property
    def problem(self) -> dict[str, Any]:
        assert self.header("content-type") == "application/problem+json"
        document: dict[str, Any] = json.loads(self.body)
        assert document["status"] == self.status
        return document


class RawClient:
    """A TCP connection to a relay."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S)
        self._file = self._socket.makefile("rb")

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def request(self, method: str, target: str, *headers: str, body: bytes = b"") -> None:
        lines = [f"{method} {target} HTTP/1.1", "Host: localhost", *headers]
        if body:
            lines.append(f"Content-Length: {len(body)}")
        self.send("\r\n".join([*lines, "", ""]).encode("latin-1") + body)

    def has_answer(self, longest_s: float) -> bool:
        """Whether something has come, or the connection has ended; waits for so long at most."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(longest_s * 1000))

    def answer(self, method: str = "GET") -> RawAnswer:
        """Read one answer, as far as it comes. Fails at an end before its head is complete."""
        status = int(self._line().split(" ")[1])
        headers = []
        while line := self._line():
            name, _, value = line.partition(":")
            headers.append((name.lower(), value.strip()))
        answer = RawAnswer(status, headers, b"", True)
        if method == "HEAD" or status in (204, 304):
            return answer
        if answer.header("transfer-encoding") == "chunked":
            body, whole = self._chunks()
        else:
            length = int(answer.header("content-length") or 0)
            body = self._file.read(length)
            whole = len(body) == length
        return answer._replace(body=body, whole=whole)

    def _line(self) -> str:
        line = self._file.readline()
        assert line.endswith(b"\r\n"), f"the answer ended in its head: {line!r}"
        return line[:-2].decode("latin-1")

    def _chunks(self) -> tuple[bytes, bool]:
        body = bytearray()
        with contextlib.suppress(ConnectionError):
            while size := self._file.readline().strip():
                body += self._file.read(int(size, 16))
                if self._file.readline() != b"\r\n":
                    break
                if int(size, 16) == 0:
                    return bytes(body), True
        return bytes(body), False

    def read_until(self, marker: bytes) -> bytes:
        """Bytes as they are, up to and with a marker that must come."""
        data = b""
        while not data.endswith(marker):
            byte = self._file.read(1)
            assert byte, f"the connection ended: {data!r}"
            data += byte
        return data

    def rest(self) -> bytes:
        """What comes until the server closes the connection."""
        data = b""
        with contextlib.suppress(ConnectionError):
            while more := self._file.read1(65536):
                data += more
        return data

    def ended(self) -> bool:
        """Whether the server closes the connection without another byte."""
        try:
            return self._file.read(1) == b""
        except ConnectionError:
            return True

    def reset(self) -> None:
        """Leave at once."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self._file.close()
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.reset()


def ask(relay: RelayProcess, method: str, target: str, *headers: str, body: bytes = b"") -> RawAnswer:
    """One request on a connection of its own."""
    with RawClient(relay.port) as client:
        client.request(method, target, *headers, body=body)
        return client.answer(method)
