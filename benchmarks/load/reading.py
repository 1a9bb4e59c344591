"""One plain HTTP client over a blocking socket, as lean as Python allows."""

from __future__ import annotations

import re
import socket
import time
from typing import Self
from urllib.parse import urlsplit

RECEIVE_BYTES = 256 * 1024
LAST_CHUNK = b"\r\n0\r\n\r\n"
TIMEOUT_S = 60.0


class Connection:
    """A connection that sends a request at a time. `receive_buffer_bytes` bounds what the kernel takes for a
    client that does not read."""

    def __init__(self, base: str, receive_buffer_bytes: int | None = None) -> None:
        url = urlsplit(base)
        self._host = url.netloc
        self._socket = socket.socket()
        self._socket.settimeout(TIMEOUT_S)
        if receive_buffer_bytes is not None:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        self._socket.connect((url.hostname, url.port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def send(self, target: str, **headers: str) -> None:
        """Send a GET request."""
        lines = [f"GET {target} HTTP/1.1", f"Host: {self._host}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        self._socket.sendall("\r\n".join([*lines, "", ""]).encode())

    def receive(self) -> bytes:
        return self._socket.recv(RECEIVE_BYTES)

    def read_until(self, wanted: bytes) -> bytes:
        """Everything up to and beyond the first `wanted`."""
        received = b""
        while wanted not in received:
            data = self.receive()
            if not data:
                raise RuntimeError(f"The answer ended before {wanted!r} came: {received[-500:]!r}")
            received += data
        return received

    def read_to_the_end(self) -> tuple[list[bytes], float]:
        """A chunked answer as it was received, and how many seconds it took. It must end as a whole one."""
        began = time.perf_counter()
        parts = [self.receive()]
        while not parts[-1].endswith(LAST_CHUNK):
            parts.append(self.receive())
            if not parts[-1]:
                raise RuntimeError(f"The answer broke off: {b''.join(parts[-3:])[-500:]!r}")
            if len(parts[-1]) < len(LAST_CHUNK):  # it may have come in two pieces
                parts[-2:] = [parts[-2] + parts[-1]]
        return parts, time.perf_counter() - began


def header(received: bytes, name: str) -> str:
    """A header of an answer."""
    head = received.partition(b"\r\n\r\n")[0] + b"\r"
    found = re.search(rb"(?im)^%b:[ ]*([^\r]*)\r$" % name.encode(), head)
    if found is None:
        raise RuntimeError(f"no {name} in {received[:500]!r}")
    return found[1].decode()
