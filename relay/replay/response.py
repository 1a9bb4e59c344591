"""The last step of the main path: a reader's bytes as an HTTP response."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv6Address, ip_address
from typing import Any

import orjson

from relay.errors import RelayError, RunEnded
from relay.headers import Headers, all_of
from relay.replay.reader import LossUntold, Reader, ReaderEnd, Readers
from relay.replay.sink import GzipSink, Sink, accepts_gzip

log = logging.getLogger("relay.reader")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

CONNECTION = "relay.connection"
"""The ASGI extension that is a reader's sink, past ASGI's own `send`, which costs a coroutine and copies for
each write to each reader; it also tells a response of a lost client, and breaks its connection at once."""

ANSWER = "relay.answer"
"""Where in the scope a route leaves its `StreamAnswer`, past Starlette's router."""

STREAMING_HEADERS: Headers = [
    (b"cache-control", b"no-cache, no-store, no-transform"),
    (b"x-accel-buffering", b"no"),
    (b"vary", b"Last-Event-ID, Accept-Encoding"),
]


@dataclass(slots=True)
class StreamAnswer:
    """A response that is a reader's.

    Routes return it, so that what they needed to find it is gone while it lasts, which may be hours. `prime`
    is written first. `whole`, asked when the reader ended, says whether the answer may be closed as a
    complete one; otherwise the connection is broken, so that no client takes the part for the whole.
    `released` is called when it is over.
    """

    reader: Reader
    status: int
    headers: Headers
    prime: bytes = b""
    whole: Callable[[Reader], Awaitable[bool]] | None = None
    released: Callable[[], None] | None = None


async def serve_reader(
    answer: StreamAnswer, readers: Readers, scope: Scope, send: Send, gzip: bool = False
) -> ReaderEnd:
    """Serve one reader, compressed or not, to its end and say how it ended."""
    reader, whole, headers = answer.reader, answer.whole, answer.headers
    connection = scope["extensions"][CONNECTION]
    sink: Sink = connection
    if gzip:
        sink = GzipSink(connection)
        headers = [*headers, (b"content-encoding", b"gzip")]
    readers.add(reader, connection.abort)
    connection.on_lost = partial(reader.leave, ReaderEnd.CLIENT_CLOSED)
    try:
        connection.begin_stream()
        await send({"type": "http.response.start", "status": answer.status, "headers": headers})
        del headers
        if answer.prime:
            sink.write(answer.prime)
        try:
            end = await reader.run(sink)
            complete = whole is None or (end is ReaderEnd.ENDED and await whole(reader))
        except LossUntold:
            end, complete = ReaderEnd.ERROR, False
        if complete:
            if isinstance(sink, GzipSink):
                sink.finish()
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        else:
            connection.finish_and_abort()
    finally:
        connection.on_lost = None
        readers.discard(reader)
        if answer.released is not None:
            answer.released()
    log.info(
        "reader ended stream=%s reason=%s cursor=%s run=%s frames=%d duration_s=%.3f client=%s",
        reader.stream, end, reader.position, reader.view.run, reader.passed, reader.lasted_s, reader.client,
    )  # fmt: skip
    return end


def takes_gzip(scope: Scope, compress: str) -> bool:
    """Whether an answer goes out compressed: if its client accepts it, and, of those that are not `always`
    served so, if it is on another machine (a proxy on this one compresses better where it has to)."""
    if compress == "never":
        return False
    if not accepts_gzip(",".join(all_of(scope["headers"], b"accept-encoding"))):
        return False
    return compress == "always" or not _is_local(scope["client"])


def _is_local(client: tuple[str, int] | None) -> bool:
    if client is None:  # a Unix socket
        return True
    address = ip_address(client[0].partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return (mapped or address).is_loopback


async def send_whole(status: int, headers: Headers, body: bytes, send: Send) -> None:
    """A response in one piece."""
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def send_no_content(send: Send, media_type: str = "") -> None:
    """204: nothing remains and nothing more will come, so an EventSource stops for good. `media_type` is that
    of an answer which its reader has whole: clients that look for it whatever the status (httpx-sse, the
    Python SDK of LangGraph) take this for its end then, and for an error without."""
    headers = [(b"cache-control", b"no-store"), (b"vary", b"Last-Event-ID")]
    if media_type:
        headers.append((b"content-type", media_type.encode("latin-1")))
    await send_whole(204, headers, b"", send)


async def send_problem(error: RelayError, send: Send) -> None:
    """An error as `application/problem+json`."""
    body = orjson.dumps(error.problem())
    headers = [
        (b"content-type", b"application/problem+json"),
        (b"content-length", b"%d" % len(body)),
        (b"cache-control", b"no-store"),
    ]
    if error.status == 405:
        headers.append((b"allow", error.extra["allow"].encode()))
    if isinstance(error, RunEnded):
        # SDKs of the Stainless kind repeat a request at any 409, and would begin anew what was stopped.
        headers.append((b"x-should-retry", b"false"))
    if error.status == 401:
        headers.append((b"www-authenticate", b'Bearer realm="relay"'))
    if error.status in (429, 503):
        headers.append((b"retry-after", b"1"))
    await send_whole(error.status, headers, body, send)
