"""The HTTP server: uvicorn, with what relay needs of a connection and does not get through ASGI."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from relay.replay.response import CONNECTION

HEAD_MAX_BYTES = 64 * 1024
"""Largest request head; llhttp itself has no bound."""

ABORT_AFTER_S = 1.0
"""A broken answer's connection is given so long to take the bytes that were written before."""


class RelayProtocol(HttpToolsProtocol):
    """uvicorn's protocol, which also bounds request heads, tells a response that its client left, and can
    break a connection without waiting for a client that does not read."""

    on_lost: Callable[[], None] | None = None
    _in_head = True
    _head_bytes = 0

    def data_received(self, data: bytes) -> None:
        """Count the bytes of a head that is not complete."""
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_MAX_BYTES and (len(data) > HEAD_MAX_BYTES or b"\r\n\r\n" not in data):
                self._refuse(431, "head_too_large", "The request head is too large.")
                return
        super().data_received(data)

    def on_message_begin(self) -> None:
        """Give the application this connection."""
        super().on_message_begin()
        self.scope["extensions"] = {CONNECTION: self}  # type: ignore[dict-item]

    def on_headers_complete(self) -> None:
        """The head is over; what follows is a body, and bounded elsewhere."""
        self._in_head = False
        self._head_bytes = 0
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The next byte begins another head."""
        self._in_head = True
        super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the response that is under way."""
        super().connection_lost(exc)
        if self.on_lost is not None:
            self.on_lost()

    def abort(self) -> None:
        """Break the connection at once; what was not sent is dropped."""
        self.transport.abort()

    def finish_and_abort(self) -> None:
        """Send what was written, then end the connection without ending the response: it broke off."""
        self.cycle.response_complete = True  # uvicorn need not complain of it
        self.transport.close()
        self.loop.call_later(ABORT_AFTER_S, self.transport.abort)

    def send_400_response(self, msg: str) -> None:
        """A request that is not HTTP."""
        self._refuse(400, "malformed_request", msg)

    def _refuse(self, status: int, code: str, detail: str) -> None:
        body = orjson.dumps({"title": "Bad request", "status": status, "code": code, "detail": detail})
        head = (
            f"HTTP/1.1 {status} Bad Request\r\ncontent-type: application/problem+json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()

    def _unsupported_upgrade_warning(self) -> None:
        # The application answers 501; a client's choice is no reason for a warning.
        pass


class RelayServer(uvicorn.Server):
    """uvicorn's server, which drains the application before it waits for connections to end."""

    def __init__(self, config: uvicorn.Config, drain: Callable[[], Awaitable[None]]) -> None:
        super().__init__(config)
        self._drain = drain
        self.ready = asyncio.Event()

    async def startup(self, sockets: list[Any] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        self.ready.set()

    async def shutdown(self, sockets: list[Any] | None = None) -> None:
        """Let runs and readers end, then close."""
        await self._drain()
        await super().shutdown(sockets)


def server(app: Any, drain: Callable[[], Awaitable[None]], grace_s: float = 5.0) -> RelayServer:
    """A server for one ASGI application; sockets are given to its `serve`. Connections that are still open
    after drain get `grace_s` to end."""
    config = uvicorn.Config(
        app,
        loop="uvloop",
        http=RelayProtocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=max(1, round(grace_s)),
        backlog=4096,
    )
    return RelayServer(config, drain)
