"""The HTTP server: uvicorn, with what relay needs of a connection and does not get through ASGI."""

from __future__ import annotations

import asyncio
import logging
import resource
import sys
from collections.abc import Awaitable, Callable
from typing import Any, Literal

import httptools
import orjson
import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from relay.counts import Counts
from relay.headers import Headers
from relay.replay.response import CONNECTION
from relay.settings import Settings

log = logging.getLogger("relay.server")

HEAD_MAX_BYTES = 64 * 1024
"""Largest request head; llhttp itself has no bound."""

HEADERS_MAX = 500
"""Header fields of one request: each is looked at several times."""

PIPELINED_MAX = 100
"""Requests that a client may send ahead on one connection. One read holds thousands of small ones, and all of
them would be set up at once."""

REFUSED_MAX = 128
"""Connections over `connections_max` that are still told so; more are closed without a word."""

REFUSALS = ("busy", "request_timeout", "malformed_request", "head_too_large", "too_many_requests")
"""Codes of what is refused before there is a request."""

ABORT_AFTER_S = 10.0
"""A broken answer's connection is given so long to take the bytes that were written before."""

REFUSED_LINGER_S = 1.0
"""What a refused client still sends is read for so long: closing at once would reset the connection, and the
client would lose the answer (RFC 9112 section 9.6)."""


_last_chunk = (b"", b"")


def in_chunk(data: bytes) -> bytes:
    """Data in the chunked transfer coding. Readers of one stream are written the same one after the other, so
    that of the last one serves them all."""
    global _last_chunk
    last, coded = _last_chunk
    if data is not last:
        coded = b"%x\r\n%b\r\n" % (len(data), data)
        _last_chunk = data, coded
    return coded


VISIT_S = 2.0
"""How often connections are looked at, at least."""

SPARE_FILES = 256
"""Files that a process has open besides connections of clients and of upstream."""


class Gate:
    """What asyncio's `Event` is. A connection holds several of them for hours, and asyncio's own sets aside
    64 places for those who wait, though hardly ever anybody does."""

    __slots__ = ("_is_set", "_waiting")

    def __init__(self, is_set: bool = False) -> None:
        self._is_set = is_set
        self._waiting: list[asyncio.Future[None]] | None = None

    def is_set(self) -> bool:
        """Whether nobody has to wait."""
        return self._is_set

    def set(self) -> None:
        """Let everybody through, now and from now on."""
        self._is_set = True
        waiting, self._waiting = self._waiting, None
        for waiter in waiting or ():
            if not waiter.done():
                waiter.set_result(None)

    def clear(self) -> None:
        """Let nobody through."""
        self._is_set = False

    async def wait(self) -> Literal[True]:
        """Return once it was set."""
        if not self._is_set:
            waiter = asyncio.get_running_loop().create_future()
            self._waiting = [*(self._waiting or ()), waiter]
            await waiter
        return True


class Pipeline(list[Any]):
    """What uvicorn needs of a deque: requests that a client sent before the answer to the last one."""

    def appendleft(self, request: Any) -> None:
        """The newest goes to the front; the oldest is popped from the end."""
        self.insert(0, request)


class Exchange:
    """One request on a connection: what its response needs to know and do beyond ASGI.

    Of its own, and not the connection's, because a client may have sent its next request already."""

    __slots__ = ("_on_lost", "_protocol", "cycle", "is_read", "may_be_silent", "more_headers")

    def __init__(self, protocol: RelayProtocol, cycle: RequestResponseCycle) -> None:
        self.cycle = cycle
        self.is_read = False
        """Whether the answer is a reader's, who looks himself after how it is taken."""
        self.more_headers: Headers = []
        """What `answer` sends besides its own headers."""
        self.may_be_silent = False
        """Whether the request's body may pause for as long as it likes."""
        self._protocol = protocol
        self._on_lost: Callable[[], None] | None = None

    @property
    def lost(self) -> bool:
        """Whether the client is gone."""
        return self._protocol.lost

    @property
    def response_started(self) -> bool:
        """Whether a head was sent, so that no other answer is possible any more."""
        return self.cycle.response_started

    @property
    def on_lost(self) -> Callable[[], None] | None:
        """Called once when the client is gone; soon, if it is gone already."""
        return self._on_lost

    @on_lost.setter
    def on_lost(self, callback: Callable[[], None] | None) -> None:
        """Set it, or take it back with None."""
        self._on_lost = callback
        if callback is not None and self.lost:
            self._protocol.loop.call_soon(callback)

    @property
    def writable(self) -> bool:
        """Whether the connection takes what is written, without holding it for long."""
        return not self._protocol.flow.write_paused

    async def until_writable(self) -> None:
        """Wait for it; returns at once when the client is gone."""
        await self._protocol.flow.drain()

    def begin_stream(self) -> None:
        """A response begins that may last for hours: what was asked is forgotten."""
        self.is_read = True
        cycle, protocol = self.cycle, self._protocol
        scope = cycle.scope
        if protocol.headers is scope["headers"]:
            protocol.headers = []
        if scope["http_version"] == "1.0":  # which knows no chunks: the end of the connection ends the body
            cycle.chunked_encoding = False
        kept: Any = {name: scope[name] for name in ("type", "method", "extensions")}
        scope.clear()  # type: ignore[attr-defined]
        scope.update(kept)

    def write(self, data: bytes) -> bool:
        """A piece, not empty, of a stream whose head was sent. Whether the connection is writable then."""
        cycle, protocol = self.cycle, self._protocol
        in_chunks = cycle.chunked_encoding
        if cycle.disconnected or in_chunks is None:  # no body belongs to the answer to HEAD
            return True
        protocol.transport.write(in_chunk(data) if in_chunks else data)
        return not protocol.flow.write_paused

    async def answer(self, status: int, headers: Headers, body: bytes) -> None:
        """The whole response, in one write; through ASGI's `send` it takes two, which is felt where a request
        is small. `headers` say how long the body is. Not for HEAD, nor for a status without a body."""
        cycle, protocol = self.cycle, self._protocol
        await protocol.flow.drain()
        if cycle.disconnected:
            return
        cycle.response_started = cycle.response_complete = True
        cycle.waiting_for_100_continue = False
        parts = [STATUS_LINE[status]]
        for name, value in (*headers, *self.more_headers):
            parts += name, b": ", value, b"\r\n"
        parts += b"\r\n" if cycle.keep_alive else b"connection: close\r\n\r\n", body
        protocol.transport.write(b"".join(parts))
        cycle.message_event.set()
        if not cycle.keep_alive:
            protocol.transport.close()
        cycle.on_response()

    def abort(self) -> None:
        """Break the connection at once; what was not sent is dropped."""
        self._protocol.transport.abort()

    def finish_and_abort(self) -> None:
        """Send what was written, then end the connection without ending the response: it broke off."""
        self.cycle.response_complete = True  # uvicorn need not complain of it
        transport = self._protocol.transport
        transport.close()
        self._protocol.loop.call_later(ABORT_AFTER_S, transport.abort)


class NotServed(Exception):
    """Stops the parser at a request that was refused; it comes back by `send_400_response`."""


class RelayProtocol(HttpToolsProtocol):
    """uvicorn's protocol, which also bounds request heads, tells a response that its client left, and can
    break a connection without waiting for a client that does not read."""

    # Python 3.11 to 3.13 keep up to 30 attributes of an object in a compact way, and uvicorn uses 28 of them.
    __slots__ = (
        "_data", "_exchanges", "_head_bytes", "_heads", "_in_head", "_received", "_refused", "_resumes_body",
        "_stuck", "lost",
    )  # fmt: skip

    bounds = Settings()
    counts = Counts()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin without any request."""
        self._exchanges: list[Exchange] = []
        self._in_head = True
        self._heads = self._head_bytes = self._received = 0
        self._stuck: tuple[Any, float] | None = None
        """What the client keeps us waiting for, and since when."""
        self._data = b""
        self.lost = self._refused = self._resumes_body = False
        super().connection_made(transport)
        self.flow._is_writable_event = Gate(is_set=True)  # type: ignore[assignment]
        self.pipeline = Pipeline()  # type: ignore[assignment]
        if len(self.connections) > self.bounds.connections_max + REFUSED_MAX:
            self._refused = True
            self.transport.abort()
        elif len(self.connections) > self.bounds.connections_max:
            self._refuse(503, "Busy", "busy", "This relay has as many connections as it may.")

    def data_received(self, data: bytes) -> None:
        """Bound a head that does not end; one that ended is measured in `on_headers_complete`."""
        if self._refused:
            return
        was_in_head, heads = self._in_head, self._heads
        self._received += len(data)
        self._data = data
        super().data_received(data)
        self._data = b""
        # Only a read that lies within one head counts whole: others may hold much of a body too.
        if was_in_head and self._heads == heads:
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_MAX_BYTES and not self._refused:
                self._refuse_large_head()

    def on_message_begin(self) -> None:
        """A head begins, unless this parser only reads on in a body."""
        if not self._resumes_body:
            super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """A piece of the request target."""
        if not self._resumes_body:
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header field. Trailers are dropped: the parser tells them the same way, and they would be taken
        for headers that whoever stands before relay has let through (RFC 9110 section 6.5.1)."""
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is over; what follows is a body, and bounded elsewhere."""
        if self._resumes_body:
            return
        self._in_head = False
        self._head_bytes = 0
        self._heads += 1
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > HEAD_MAX_BYTES or len(self.headers) > HEADERS_MAX:
            self._refuse_large_head()
            raise NotServed
        if len(self.pipeline) >= PIPELINED_MAX:
            self._refuse(429, "Too Many Requests", "too_many_requests", "Too many requests were sent ahead.")
            raise NotServed
        super().on_headers_complete()
        self.cycle.message_event = Gate()  # type: ignore[assignment]
        exchange = Exchange(self, self.cycle)
        self._exchanges = [*self._under_way(), exchange]
        self.scope["extensions"] = {CONNECTION: exchange}  # type: ignore[dict-item]

    def on_message_complete(self) -> None:
        """The next byte begins another head."""
        self._in_head = True
        super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the responses that are under way; uvicorn tells the last request only."""
        self.lost = True
        self._disconnect()
        super().connection_lost(exc)
        for exchange in self._exchanges:
            if exchange.on_lost is not None:
                exchange.on_lost()
        # They know each other: only a full collection, which is kept rare, would find them.
        self._exchanges = []
        self.cycle = None  # type: ignore[assignment]

    def visit(self, now: float) -> None:
        """Part with a client that keeps us waiting: for the rest of a head, however slowly it comes; for more
        of a body; or until it takes more of an answer. Readers have a care of their own."""
        stage, longest_s = self._waits_for()
        if stage is None or self._refused:
            self._stuck = None
        elif self._stuck is None or self._stuck[0] != stage:
            self._stuck = stage, now
        elif now - self._stuck[1] >= longest_s:
            log.info("a client was too slow: %s", stage[0])
            if stage[0] == "write":
                self.transport.abort()
            else:
                self._refuse(408, "Request Timeout", "request_timeout", "The request did not come in time.")

    def _waits_for(self) -> tuple[tuple[str, int] | None, float]:
        """What the client has to do next, told apart from what it had to do before; and how long it may."""
        if self._in_head and (self._head_bytes or not self._heads):
            return ("head", self._heads), self.bounds.head_timeout_s
        if not self._exchanges:
            return None, 0.0
        newest = self._exchanges[-1]
        if newest.cycle.more_body and not newest.may_be_silent and not self.flow.read_paused:
            return ("body", self._received), self.bounds.body_timeout_s
        if self.flow.write_paused and not newest.is_read:
            return ("write", self.transport.get_write_buffer_size()), self.bounds.write_timeout_s
        return None, 0.0

    def send_400_response(self, msg: str) -> None:
        """A request that is not HTTP."""
        if not self._refused:
            self._refuse(400, "Bad Request", "malformed_request", msg)

    def _refuse_large_head(self) -> None:
        self._refuse(
            431, "Request Header Fields Too Large", "head_too_large", "The request head is too large."
        )

    def _refuse(self, status: int, title: str, code: str, detail: str) -> None:
        self._refused = True
        self.counts.refusals[code] += 1
        under_way = [exchange.cycle for exchange in self._under_way()]
        self._disconnect()
        # The refusal must not be taken for the answer to an earlier request, or for a piece of it.
        if any(cycle.response_started or not cycle.more_body for cycle in under_way):
            self.transport.close()
            return
        body = orjson.dumps({"title": title, "status": status, "code": code, "detail": detail})
        again = "retry-after: 1\r\n" if status == 503 else ""
        head = (
            f"HTTP/1.1 {status} {title}\r\ncontent-type: application/problem+json\r\n{again}"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.write_eof()
        self.loop.call_later(REFUSED_LINGER_S, self.transport.abort)

    def _under_way(self) -> list[Exchange]:
        return [exchange for exchange in self._exchanges if not exchange.cycle.response_complete]

    def _disconnect(self) -> None:
        for exchange in self._under_way():
            exchange.cycle.disconnected = True
            exchange.cycle.message_event.set()

    def _unsupported_upgrade_warning(self) -> None:
        # No reason for a warning. A WebSocket is answered 501 by the application, and what its client sends
        # next is not HTTP. Any other wish is ignored (RFC 9110 section 7.8), but the parser has stopped
        # before the body (the JDK's client asks for h2c with each request): another one reads on from there.
        if self._get_upgrade() == b"websocket":
            self.cycle.keep_alive = False
            self._refused = True
            return
        stopped_at: int = sys.exc_info()[1].args[0]  # type: ignore[union-attr]
        rest = self._data[stopped_at:]
        framing = [
            b"%b: %b\r\n" % header
            for header in self.headers
            if header[0] in (b"content-length", b"transfer-encoding")
        ]
        self.parser = httptools.HttpRequestParser(self)
        if framing:
            self._in_head = False
            self.cycle.more_body = True
            self.cycle.message_event.clear()
            self._resumes_body = True
            self.parser.feed_data(b"POST / HTTP/1.1\r\n" + b"".join(framing) + b"\r\n")
            self._resumes_body = False
        if rest:
            self.data_received(rest)


class RelayServer(uvicorn.Server):
    """uvicorn's server, which drains the application before it waits for connections to end."""

    def __init__(
        self, config: uvicorn.Config, drain: Callable[[], Awaitable[None]], bounds: Settings
    ) -> None:
        super().__init__(config)
        self._drain = drain
        shortest_s = min(bounds.head_timeout_s, bounds.body_timeout_s, bounds.write_timeout_s)
        self._pause_s = min(VISIT_S, shortest_s / 4)
        self.ready = asyncio.Event()

    async def startup(self, sockets: list[Any] | None = None) -> None:
        """Listen, and say so."""
        await super().startup(sockets)
        self._visiting = asyncio.create_task(self._visit())
        self.ready.set()

    async def _visit(self) -> None:
        """Look after connections, on a slow clock."""
        while True:
            await asyncio.sleep(self._pause_s)
            now = asyncio.get_running_loop().time()
            for connection in list(self.server_state.connections):
                connection.visit(now)  # type: ignore[union-attr]

    async def shutdown(self, sockets: list[Any] | None = None) -> None:
        """Let runs and readers end, then close."""
        await self._drain()
        await super().shutdown(sockets)
        self._visiting.cancel()


def allow_connections(wanted: int) -> int:
    """Let this process have so many connections open at once, or as many as it may; how many. Systems begin
    with 1024 files a process, for programs that count on it (select), and let each ask for more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = wanted + SPARE_FILES if hard == resource.RLIM_INFINITY else min(wanted + SPARE_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
        soft = allowed
    return wanted if soft == resource.RLIM_INFINITY else min(wanted, soft - SPARE_FILES)


def connections_allowed() -> int:
    """How many connections of clients and of upstream this process can have open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft - SPARE_FILES


def server(
    app: Any,
    drain: Callable[[], Awaitable[None]],
    settings: Settings,
    grace_s: float = 5.0,
    counts: Counts | None = None,
) -> RelayServer:
    """A server for one ASGI application; sockets are given to its `serve`. Connections that are still open
    after drain get `grace_s` to end. What it refuses by itself is counted in `counts`."""
    counted = counts or Counts()

    class Protocol(RelayProtocol):
        """With the bounds of these settings."""

        __slots__ = ()
        bounds = settings
        counts = counted

    config = uvicorn.Config(
        app,
        loop="uvloop",
        interface="asgi3",
        http=Protocol,
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
    return RelayServer(config, drain, settings)
