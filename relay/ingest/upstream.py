"""The backend behind relay, spoken to as HTTP says and not more cleverly.

aiohttp's conveniences are turned off: no redirects, no cookies, no decompression, no re-quoting of URLs, no
total time limit.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import unquote

import aiohttp
import orjson
from multidict import CIMultiDict
from yarl import URL

from relay.errors import InvalidParameter, StartupError, UpstreamInvalid, UpstreamSlow, UpstreamUnreachable
from relay.headers import Headers, end_to_end, first_of
from relay.settings import Settings

log = logging.getLogger("relay.upstream")

READ_MAX_BYTES = 64 * 1024
"""Bytes read from upstream before the journal has taken them; also one piece of decompressed data."""

POOLED_S = 1.5
"""An idle connection is kept so long: shorter than servers keep it (gunicorn 2 s, uvicorn and Node 5 s), so
that a request is hardly ever sent on a connection that upstream is just closing."""

UPSTREAM_HEAD_MAX_BYTES = 64 * 1024
"""Longest line of upstream's head."""

# RFC 9110 sections 5.1 and 5.5. aiohttp reads answers leniently; what is passed on must be valid.
_FIELD_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_NOT_IN_VALUE = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")


class TruncatedBody(Exception):
    """Upstream's answer broke off."""


class IdleBody(Exception):
    """Upstream said nothing for too long."""


class UpstreamRequest(NamedTuple):
    """A request that can be sent without its client. `target` is the raw path and query; header names are in
    lower case."""

    method: str
    target: str
    headers: Headers
    body: bytes | None

    @property
    def path(self) -> str:
        """The path without its query."""
        return self.target.partition("?")[0]


_METHOD = re.compile(r"[A-Z][A-Z-]{0,31}", re.ASCII)
_TARGET = re.compile(r"/[!-~]*", re.ASCII)  # what can stand in a request line
_OF_THE_MESSAGE = (b"host", b"content-length", b"expect", b"accept-encoding", b"last-event-id")


def upstream_request(document: Any) -> UpstreamRequest:
    """Read `{"method", "path", "headers", "body"}`, of which only the path is needed.

    A body that is a string is sent as it is, any other as JSON. Headers of the connection, of the message
    and of relay are dropped. Raises `InvalidParameter`."""
    if not isinstance(document, dict) or set(document) - {"method", "path", "headers", "body"}:
        raise InvalidParameter("An upstream is an object of method, path, headers and body.")
    body, target = document.get("body"), document.get("path")
    method = document.get("method", "GET" if body is None else "POST")
    if not isinstance(method, str) or not _METHOD.fullmatch(method) or method in ("CONNECT", "HEAD"):
        raise InvalidParameter("An upstream's method is a word in capitals, not CONNECT or HEAD.")
    if not isinstance(target, str) or not _TARGET.fullmatch(target) or set(target) & set('#\\"<>^`{|}'):
        raise InvalidParameter("An upstream's path begins with / and is percent-encoded.")
    segments = unquote(unquote(target.partition("?")[0])).replace("\\", "/").split("/")
    if any(segment.partition(";")[0] in (".", "..") for segment in segments):
        raise InvalidParameter("An upstream's path cannot hold . and .. as segments.")
    headers = _request_headers(document.get("headers", {}))
    if body is None:
        return UpstreamRequest(method, target, headers, None)
    if isinstance(body, str):
        return UpstreamRequest(method, target, headers, body.encode(errors="replace"))
    if all(name != b"content-type" for name, _ in headers):
        headers.append((b"content-type", b"application/json"))
    try:
        return UpstreamRequest(method, target, headers, orjson.dumps(body))
    except TypeError as error:
        raise InvalidParameter(f"An upstream's body cannot be sent: {error}.") from None


def _request_headers(given: Any) -> Headers:
    if not isinstance(given, dict) or not all(isinstance(value, str) for value in given.values()):
        raise InvalidParameter("An upstream's headers are an object of strings.")
    headers = [
        (name.lower().encode(), value.strip(" \t").encode(errors="replace")) for name, value in given.items()
    ]
    for name, value in headers:
        if _FIELD_NAME.fullmatch(name) is None or _NOT_IN_VALUE.search(value):
            raise InvalidParameter(f"{name.decode()!r} is not a header that can be sent.")
    return [
        (name, value)
        for name, value in end_to_end(headers, *_OF_THE_MESSAGE)
        if not name.startswith(b"relay-")
    ]


class Answer:
    """The head of upstream's answer, and its body to be read once."""

    def __init__(self, response: aiohttp.ClientResponse, idle_s: float, asked_at: float = 0.0) -> None:
        """Raises `UpstreamInvalid` for a head that cannot be passed on."""
        self.status = response.status
        self.headers: Headers = [(name.lower(), value) for name, value in response.raw_headers]
        for name, value in self.headers:
            if _FIELD_NAME.fullmatch(name) is None or _NOT_IN_VALUE.search(value):
                raise UpstreamInvalid("Upstream's answer has a header that is not valid.")
        if not 200 <= self.status <= 599:
            raise UpstreamInvalid(f"Upstream's answer has the status {self.status}.")
        if first_of(self.headers, b"transfer-encoding"):
            # RFC 9112 section 6.3: a length beside it says nothing.
            self.headers = [(name, value) for name, value in self.headers if name != b"content-length"]
        self._response = response
        self.asked_at = asked_at
        """When upstream was asked, on the loop's clock."""
        self.idle_s = idle_s or None
        self._loop = asyncio.get_running_loop()
        self._now = self._loop.time
        self._waiting: tuple[float, int] | None = None
        """Since when the next piece is waited for, and how much had come then; if silence has a bound."""
        self._idle_timer: asyncio.TimerHandle | None = None
        connection = response.connection
        protocol = None if connection is None else connection.protocol
        self._closed = None if protocol is None else protocol.closed
        if self._closed is not None:
            self._closed.add_done_callback(self._connection_closed)

    @property
    def media_type(self) -> str:
        """The media type without parameters, in lower case."""
        return first_of(self.headers, b"content-type").partition(";")[0].strip().lower()

    async def read(self, idle_s: float | None = None) -> bytes:
        """What has come of the body since the last time, transfer coding removed; waits for something, and is
        empty at the end. Raises `TruncatedBody`, and `IdleBody` when nothing came for `idle_s`."""
        content = self._response.content
        try:
            if idle_s is None:
                return await content.readany()
            self._waiting = self._now(), content.total_bytes
            if self._idle_timer is None:
                self._idle_timer = self._loop.call_later(idle_s, self._look_whether_idle, idle_s)
            data = await content.readany()
            self._waiting = None
            return data
        except (aiohttp.ClientError, aiohttp.http.HttpProcessingError, OSError) as error:
            # aiohttp raises before it gives out what came before the break, and has no other way to it.
            received = content._read_nowait(-1)
            if received:
                return received  # the next time there is nothing
            log.info("upstream's answer broke off: %r", error)
            raise TruncatedBody("Upstream's answer broke off before its end.") from None

    def _look_whether_idle(self, idle_s: float) -> None:
        """One timer a body, which is put off here, and not with every piece that comes."""
        self._idle_timer = None
        content = self._response.content
        if self._waiting is None or self._waiting[1] != content.total_bytes:
            return  # nobody waits, which is no silence of upstream's; the next who does sets it again
        idle_at = self._waiting[0] + idle_s
        if self._now() >= idle_at:
            content.set_exception(IdleBody(f"Upstream was silent for {idle_s:g} s."))
        else:
            self._idle_timer = self._loop.call_at(idle_at, self._look_whether_idle, idle_s)

    async def body(self, idle_s: float | None = None) -> AsyncIterator[bytes]:
        """The body as it arrives; raises as `read`."""
        while data := await self.read(idle_s):
            yield data

    def decoded_reads(self) -> Callable[[], Awaitable[bytes]]:
        """Reads of a stream's body with its content coding removed, in pieces of bounded size. Each raises as
        `read`, for the configured silence."""
        encoding = first_of(self.headers, b"content-encoding").lower()
        if encoding in ("", "identity"):
            return partial(self.read, self.idle_s)
        return partial(anext, self._inflated(Inflater(encoding)), b"")

    async def _inflated(self, inflater: Inflater) -> AsyncIterator[bytes]:
        async for data in self.body(self.idle_s):
            for piece in inflater.feed(data):
                yield piece
        inflater.close()

    def decoded(self, body: bytes, most_bytes: int) -> bytes:
        """A body that was read whole, its content coding removed, cut at a size. Raises `TruncatedBody`."""
        encoding = first_of(self.headers, b"content-encoding").lower()
        if encoding in ("", "identity"):
            return body[:most_bytes]
        inflater = Inflater(encoding)
        data = bytearray()
        for piece in inflater.feed(body):
            data += piece
            if len(data) >= most_bytes:
                return bytes(data[:most_bytes])
        inflater.close()
        return bytes(data)

    async def finish(self, longest_s: float, max_bytes: int) -> None:
        """Read what still comes and drop it, until upstream has ended by itself or a bound is reached; then
        close. An upstream that has said its last word may have work left that a broken connection would
        cancel."""
        try:
            async with asyncio.timeout(longest_s):
                async for data in self.body():
                    max_bytes -= len(data)
                    if max_bytes < 0:
                        break
        except (TimeoutError, TruncatedBody):
            pass
        finally:
            self.close()

    def close(self) -> None:
        """Break the connection to upstream, unless the body was read to its end."""
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None
        if self._closed is not None:
            self._closed.remove_done_callback(self._connection_closed)
            self._closed = None
        self._response.close()

    def _connection_closed(self, closed: asyncio.Future[None]) -> None:
        # aiohttp closes the connection at malformed chunks and leaves the body waiting for ever.
        content = self._response.content
        if not content.is_eof() and content.exception() is None:
            content.set_exception(aiohttp.ClientPayloadError("its framing is malformed"))
        if not closed.cancelled():
            closed.exception()  # seen


class Inflater:
    """Removes a `gzip` or `deflate` coding; a bomb comes out in bounded pieces, one at a time."""

    CODINGS = ("gzip", "x-gzip", "deflate")

    def __init__(self, coding: str) -> None:
        self._window_bits = zlib.MAX_WBITS if coding == "deflate" else zlib.MAX_WBITS | 16
        self._stream = zlib.decompressobj(self._window_bits)

    def feed(self, data: bytes) -> Iterable[bytes]:
        """Pieces of at most `READ_MAX_BYTES`; raises `TruncatedBody` for data that is not so coded."""
        piece = b""
        try:
            # A piece of full size may have left output behind in zlib, even when all input is consumed.
            while data or len(piece) == READ_MAX_BYTES:
                if self._stream.eof:  # a gzip body may have several members (RFC 1952 section 2.2)
                    if not data:
                        return
                    self._stream = zlib.decompressobj(self._window_bits)
                piece = self._stream.decompress(data, READ_MAX_BYTES)
                data = self._stream.unconsumed_tail or self._stream.unused_data
                if piece:
                    yield piece
        except zlib.error as error:
            raise TruncatedBody(f"Upstream's compressed answer cannot be read: {error}") from None

    def close(self) -> None:
        """Raises `TruncatedBody` when the data broke off."""
        if not self._stream.eof:
            raise TruncatedBody("Upstream's compressed answer broke off.")


class _Upload:
    """A request's body on its way to upstream.

    While the client is waited for, upstream's time stands still. It can be sent once: aiohttp repeats some
    requests whose pooled connection turned out dead, and would repeat this one with the rest of its body."""

    def __init__(self, body: AsyncIterator[bytes], limit: asyncio.Timeout, limit_s: float) -> None:
        self.answered = False
        self._body = body
        self._limit = limit
        self._limit_s = limit_s
        self._begun = False

    def __aiter__(self) -> AsyncIterator[bytes]:
        if self._begun:
            raise aiohttp.ServerDisconnectedError
        self._begun = True
        return self._send()

    async def _send(self) -> AsyncIterator[bytes]:
        self._allow(None)
        async for data in self._body:
            self._allow(self._limit_s)
            yield data
            self._allow(None)
        self._allow(self._limit_s)

    def _allow(self, limit_s: float | None) -> None:
        if not self.answered:
            self._limit.reschedule(None if limit_s is None else asyncio.get_running_loop().time() + limit_s)


class Upstream:
    """One configured backend and the connections to it."""

    def __init__(self, base_url: str, settings: Settings) -> None:
        try:
            url = URL(base_url)
        except ValueError as error:
            raise StartupError(f"--upstream {base_url!r} is not a URL: {error}.") from None
        if url.scheme not in ("http", "https") or not url.host:
            raise StartupError(f"--upstream {base_url!r} is not an http:// or https:// URL.")
        if "?" in base_url or "#" in base_url:
            raise StartupError(f"--upstream {base_url!r} has a query or fragment, which it cannot have.")
        self._base = base_url.rstrip("/")
        # A backend of ours has to know by which name it was asked for; somebody else's goes by its own.
        self.host = settings.upstream_host or (
            str(url.host_port_subcomponent) if url.scheme == "https" else ""
        )
        """What upstream is told as its name; "" for what the client said."""
        self._settings = settings
        self._session: aiohttp.ClientSession | None = None

    async def start(self) -> None:
        """Make the session; connects to nothing yet."""
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=POOLED_S),
            timeout=aiohttp.ClientTimeout(
                total=None, sock_connect=self._settings.upstream_connect_timeout_s, sock_read=None
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            requote_redirect_url=False,
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
            max_line_size=UPSTREAM_HEAD_MAX_BYTES,
            max_field_size=UPSTREAM_HEAD_MAX_BYTES,
            read_bufsize=READ_MAX_BYTES,
        )

    async def close(self) -> None:
        """Break every connection."""
        if self._session is not None:
            await self._session.close()

    async def call(
        self, method: str, target: str, headers: Headers, body: AsyncIterator[bytes] | bytes | None
    ) -> Answer:
        """Send a request; `target` is its path and query as the client wrote them.

        Raises `UpstreamUnreachable`, `UpstreamSlow` (no head within the header timeout, which begins anew
        with every piece of the body), `UpstreamInvalid`.
        """
        assert self._session is not None
        fields: CIMultiDict[str] = CIMultiDict()
        for name, value in headers:
            fields.add(name.decode("latin-1"), _text(value))
        fields["Accept-Encoding"] = "identity"
        if self.host:
            fields["Host"] = self.host
        limit_s = self._settings.upstream_header_timeout_s
        upload = None
        asked_at = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(limit_s) as limit:
                if body is not None and not isinstance(body, bytes):
                    upload = _Upload(body, limit, limit_s)
                response = await self._session.request(
                    method,
                    URL(self._base + target, encoded=True),
                    headers=fields,
                    data=upload or body,
                    allow_redirects=False,
                )
        except aiohttp.ConnectionTimeoutError:
            raise UpstreamUnreachable("Upstream did not take the connection in time.") from None
        except TimeoutError:
            raise UpstreamSlow("Upstream did not send the head of its answer in time.") from None
        except aiohttp.ClientConnectorError as error:
            raise UpstreamUnreachable(f"Cannot connect to upstream: {_reason(error)}.") from None
        except aiohttp.ClientResponseError as error:
            reason = error.message.partition("\n")[0].rstrip(":")
            raise UpstreamInvalid(f"Upstream's answer is not valid HTTP: {reason}") from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            log.info("upstream gave no answer: %r", error)
            raise UpstreamUnreachable("Upstream closed the connection before it answered.") from None
        finally:
            if upload is not None:
                upload.answered = True
        try:
            return Answer(response, self._settings.upstream_idle_s, asked_at)
        except UpstreamInvalid:
            response.close()
            raise


def _reason(error: aiohttp.ClientConnectorError) -> str:
    number = error.os_error.errno
    return os.strerror(number).lower() if number is not None and number > 0 else str(error.os_error)


def _text(value: bytes) -> str:
    # aiohttp writes headers as UTF-8, so only what is read as UTF-8 passes byte for byte.
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")
