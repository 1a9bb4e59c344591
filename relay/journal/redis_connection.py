"""Connections to Redis: few, shared by everybody in the process, and always being brought back.

redis-py makes each connection (URL, TLS, AUTH, SELECT); once it stands, its transport gets a protocol of
ours, because the cost per reply and per message decides how many streams one process can follow. redis-py
has no public way to that transport, so two of its private attributes are used, in `_stream_of` alone.

A `Lane` multiplexes commands over one connection: what is submitted while a batch is in flight goes out
in the next write. A `FollowLink` listens to Pub/Sub channels.

The links of one `Address` all speak to one primary. Every connection is verified to lead to a primary before
it is used, and asked for anew, of the sentinels if there are any, whenever it has to be opened. A primary
that was demoted says so to the first write, which costs all links their connections: what a replica still
answers may be old.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from math import inf
from typing import Any, Final
from urllib.parse import parse_qsl, urlencode, urlsplit

import hiredis
import redis
from redis.asyncio.connection import AbstractConnection, Connection, parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff
from redis.exceptions import ReadOnlyError, RedisError

from relay.errors import JournalError, JournalRefused, JournalUnavailable, StartupError

log = logging.getLogger("relay.redis")

WAITING_MAX = 10_000
"""Commands one lane holds that were not sent yet; one more is refused at once."""

BATCH_MAX_BYTES = 1024 * 1024
"""A batch is closed by the command that reaches this."""

BATCHES_IN_FLIGHT_MAX = 2
"""Redis works on one while the next is packed."""

RECONNECT_MAX_S = 1.0
RECONNECT_FIRST_S = 0.02

FOLLOW_PING_S = 5.0
"""Silence after which the follow connection is asked whether it is alive."""

SUBSCRIBE_MAX = 1000
"""Channels of one SUBSCRIBE command."""

_INCOMPLETE: Final = object()

# The server cannot serve this connection as things are; another attempt may meet a server that can.
_UNAVAILABLE = ("LOADING", "READONLY", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "NOAUTH")
_BUSY = ("BUSY", "UNKILLABLE", "EXECABORT")


def pack(*args: str | bytes | int) -> bytes:
    """One command in the Redis protocol."""
    packed: bytes = hiredis.pack_command(args)  # type: ignore[arg-type]  # its stub knows tuples of one
    return packed


def error_names(reply: Exception, *codes: str) -> bool:
    """Whether an error reply has one of these codes. Redis 6.2 reports what a script met as
    `ERR … -CODE message`, later versions as `CODE message`."""
    text = str(reply)
    return text.startswith(codes) or (text.startswith("ERR ") and any(f" -{code} " in text for code in codes))


def as_journal_error(reply: Exception) -> JournalError:
    """What an error reply means to the caller of a journal."""
    if error_names(reply, *_UNAVAILABLE, *_BUSY):
        return JournalUnavailable(f"Redis cannot serve now: {reply}")
    return JournalRefused(f"Redis refused: {reply}")


_REDIS_PATH = re.compile(r"/?|/[0-9]{1,5}", re.ASCII)
_SENTINEL_PATH = re.compile(r"/([^/]+)(/[0-9]{1,5})?", re.ASCII)
_SENTINEL_PORT = 26379


class Address:
    """Where a Redis is and how to speak to it, from a redis://, rediss:// or unix:// URL, or one that names
    sentinels: redis+sentinel://host:port,host:port/service/db (rediss+sentinel for TLS).

    Knows the links that use it."""

    def __init__(self, url: str) -> None:
        """Raises `ValueError`, and `StartupError` when the installed redis-py is not one we can use."""
        self.primary = ""
        """Which life of which primary was found last."""
        self.replaced_at = -inf
        """When it was found to be another than before, on the loop's clock."""
        self._links: list[Link] = []
        self._sentinels: Sequence[tuple[str, int]] = ()
        self._sentinel_options: dict[str, Any] = {}
        self._service = ""
        where = ""
        if urlsplit(url).scheme.endswith("+sentinel"):
            url, where = self._of_sentinels(url)
        if url.startswith("redis") and not _REDIS_PATH.fullmatch(urlsplit(url).path):
            raise ValueError("the path is a database number")  # redis-py would take database 0 instead
        options: dict[str, Any] = dict(parse_url(url))
        self._connection_class: type[AbstractConnection] = options.pop("connection_class", Connection)
        options.pop("max_connections", None)
        options.pop("timeout", None)
        options["db"] = self.db = int(options.get("db", 0))
        if self._connection_class is not Connection and self._sentinels:
            tls = {name: value for name, value in options.items() if name.startswith("ssl_")}
            self._sentinel_options |= tls | {"ssl": True}
        # Pub/Sub and our reply reader want RESP2 and bytes, whatever the URL asks for.
        self._options = options | {"protocol": 2, "decode_responses": False, "health_check_interval": 0}
        where = (
            where or options.get("path") or f"{options.get('host', 'localhost')}:{options.get('port', 6379)}"
        )
        self.name = f"{where}/{self.db}"
        _stream_of(self.connection("check", 1.0))  # an unknown option is a ValueError here

    def _of_sentinels(self, url: str) -> tuple[str, str]:
        """Take note of the sentinels; the URL of the server they are to find, its host left open, and their
        names."""
        parts = urlsplit(url)
        path = _SENTINEL_PATH.fullmatch(parts.path)
        if path is None:
            raise ValueError("behind the sentinels stands /service or /service/database")
        user, at, hosts = parts.netloc.rpartition("@")
        places = [urlsplit(f"//{host}") for host in hosts.split(",")]
        if not all(place.hostname for place in places):
            raise ValueError("a sentinel has no host")
        self._sentinels = [(place.hostname or "", place.port or _SENTINEL_PORT) for place in places]
        self._service = path[1]
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        for option in ("username", "password"):
            if f"sentinel_{option}" in query:
                self._sentinel_options[option] = query.pop(f"sentinel_{option}")
        scheme = parts.scheme.removesuffix("+sentinel")
        return f"{scheme}://{user}{at}sentinel{path[2] or ''}?{urlencode(query)}", f"{hosts}/{self._service}"

    def connection(
        self, role: str, timeout_s: float, server: tuple[str, int] | None = None
    ) -> AbstractConnection:
        """A connection not yet opened, to `server` if the URL does not say. `timeout_s` bounds each step of
        opening it."""
        bounds = {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s}
        options = {"client_name": f"relay-{role}"} | self._options | bounds
        if server is not None:
            options["host"], options["port"] = server
        try:
            return self._connection_class(**options)
        except TypeError as error:
            raise ValueError(f"an option of the URL is not known: {error}") from None

    async def connect(self, role: str, timeout_s: float) -> AbstractConnection:
        """An open connection. Raises `RedisError`, `OSError` or `TimeoutError`."""
        async with asyncio.timeout(timeout_s):
            server = await self._ask_sentinels(timeout_s) if self._sentinels else None
            connection = self.connection(role, timeout_s, server)
            try:
                await connection.connect()  # type: ignore[no-untyped-call]
            except BaseException:
                await connection.disconnect(nowait=True)
                raise
            return connection

    async def _ask_sentinels(self, timeout_s: float) -> tuple[str, int]:
        """Where the primary is."""
        one_s = timeout_s / (len(self._sentinels) + 1)  # so that one which hangs leaves time to ask the next
        bounds = {"socket_timeout": one_s, "socket_connect_timeout": one_s}
        once = {"retry": Retry(NoBackoff(), 0), "protocol": 2}
        options = once | bounds | self._sentinel_options
        sentinels = Sentinel(self._sentinels, sentinel_kwargs=options)  # type: ignore[no-untyped-call]
        try:
            host, port = await sentinels.discover_master(self._service)
        finally:
            for sentinel in sentinels.sentinels:
                await sentinel.aclose()
        return str(host), int(port)

    def join(self, link: Link) -> None:
        """Let a link hear of what the others find out about the primary."""
        self._links.append(link)

    def agree(self, link: Link) -> None:
        """A link found its primary: those that speak to another one look again."""
        if self.primary and self.primary != link.primary:
            self.replaced_at = asyncio.get_running_loop().time()
        self.primary = link.primary
        for other in self._links:
            if other.primary != link.primary:
                other.leave()

    def demoted(self) -> None:
        """The primary is one no more: every link looks again."""
        for link in self._links:
            link.leave()


def _stream_of(connection: AbstractConnection) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
    """The asyncio streams of a connection, None while it has none. Raises `StartupError`.

    Private to redis-py (checked with 6.4 and 8.1). Public are only `send_command` and `read_response`, which
    cost six times as much a message as a protocol of our own, and take one caller at a time."""
    try:
        reader, writer = connection._reader, connection._writer
    except AttributeError as error:
        raise StartupError(
            f"The installed redis-py ({redis.__version__}) keeps a connection's streams elsewhere than the "
            f"versions relay was tested with: {error}. Install one that relay's requirements allow."
        ) from None
    return None if reader is None or writer is None else (reader, writer)


class _Wire(asyncio.Protocol):
    """One life of a connection: parses replies, hands each on, says once when it ends."""

    def __init__(self, transport: asyncio.WriteTransport, receive: Callable[[Any], None]) -> None:
        self.transport = transport
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._receive: Callable[[Any], None] | None = receive
        self._reader = hiredis.Reader(notEnoughData=_INCOMPLETE)

    def data_received(self, data: bytes) -> None:
        reader = self._reader
        try:
            reader.feed(data)
            while (reply := reader.gets()) is not _INCOMPLETE:
                if self._receive is None:
                    return
                self._receive(reply)
        except hiredis.ProtocolError:
            self.end()

    def connection_lost(self, error: Exception | None) -> None:
        self.end()

    def end(self) -> None:
        """Close at once; nothing is handed on after this."""
        self._receive = None
        self.transport.abort()
        if not self.lost.done():
            self.lost.set_result(None)


class Link:
    """A connection that is opened again, with jittered backoff, whenever it ends."""

    def __init__(self, address: Address, role: str, timeout_s: float) -> None:
        self._address = address
        self._role = role
        self._timeout_s = timeout_s
        self.primary = ""
        """Which life of which primary this link speaks to, or spoke to last."""
        self._loop = asyncio.get_running_loop()
        """Kept, because asking for it is a system call."""
        self._wire: _Wire | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._connected = asyncio.Event()
        self._useful = False
        """Whether this life of the connection has served anybody."""
        self.lives = 0
        """How often the connection stood."""
        address.join(self)

    async def open(self) -> None:
        """Begin, and wait up to `timeout_s` for the first connection. Raises `TimeoutError`."""
        self._keeper = asyncio.create_task(self._keep(), name=f"relay-redis-{self._role}")
        async with asyncio.timeout(self._timeout_s):
            await self._connected.wait()

    async def lost(self) -> None:
        """Return once there is no connection."""
        if self._wire is not None:
            await asyncio.shield(self._wire.lost)

    async def close(self) -> None:
        """End the connection, and open no other."""
        keeper, self._keeper = self._keeper, None
        while keeper is not None and not keeper.done():
            # Again, if need be: opening a connection may take a cancellation for its own timeout.
            keeper.cancel()
            await asyncio.wait([keeper], timeout=CANCEL_AGAIN_S)

    async def _keep(self) -> None:
        backoff_s = RECONNECT_FIRST_S
        while True:
            try:
                connection = await self._address.connect(self._role, self._timeout_s)
                try:
                    self.primary = await _primary_of(connection, self._timeout_s)
                    self._useful = False
                    await self._live(connection)
                    # One that opens only to refuse (LOADING, READONLY) is not tried again at once.
                    if self._useful:
                        backoff_s = RECONNECT_FIRST_S
                finally:
                    await connection.disconnect(nowait=True)
            except (RedisError, OSError, TimeoutError):
                pass
            except Exception:
                # Whatever it is: without this task the process would be without its journal for ever.
                log.exception("a connection to Redis failed (%s)", self._role)
            await asyncio.sleep(backoff_s * random.uniform(0.5, 1.0))
            backoff_s = min(RECONNECT_MAX_S, backoff_s * 2)

    async def _live(self, connection: AbstractConnection) -> None:
        stream = _stream_of(connection)
        if stream is None:
            return
        reader, transport = stream[0], stream[1].transport
        if reader.at_eof() or transport.is_closing():
            return  # it ended after its last reply, before our protocol could be told
        wire = self._wire = _Wire(transport, self._on_reply)
        transport.set_protocol(wire)
        try:
            self._address.agree(self)
            self.lives += 1
            self._on_connected()
            self._connected.set()
            await wire.lost
        finally:
            self._wire = None
            self._connected.clear()
            wire.end()
            self._on_lost()

    def leave(self) -> None:
        """Give this life of the connection up; `_keep` begins the next."""
        if self._wire is not None:
            wire, self._wire = self._wire, None
            wire.end()

    def _on_connected(self) -> None:
        raise NotImplementedError

    def _on_lost(self) -> None:
        raise NotImplementedError

    def _on_reply(self, reply: Any) -> None:
        raise NotImplementedError


READ_FIRST_S = 0.01
"""When a wait is over, what has come is read before it is judged: uvloop calls timers before it reads, so
that after this process stood still for as long the answer may be here, unread."""

CANCEL_AGAIN_S = 0.1
"""Pause before a task that did not heed its cancellation is cancelled once more."""


class _Call:
    """Consecutive commands with one future: the reply if it is one command, a list of replies if more."""

    __slots__ = ("answer", "deadline", "packed", "replies", "wanted")

    def __init__(self, packed: bytes, wanted: int, answer: asyncio.Future[Any], deadline: float) -> None:
        self.packed = packed
        self.wanted = wanted
        self.answer = answer
        self.deadline = deadline
        self.replies: list[Any] = []


class _Batch:
    __slots__ = ("calls", "deadline")

    def __init__(self, calls: deque[_Call], deadline: float) -> None:
        self.calls = calls
        self.deadline = deadline


class Lane(Link):
    """Commands of many callers over one connection, answered in order.

    No task, timer or connection belongs to a single command: one timer watches the oldest one."""

    def __init__(self, address: Address, role: str, timeout_s: float) -> None:
        super().__init__(address, role, timeout_s)
        self._waiting: deque[_Call] = deque()
        self._sent: deque[_Batch] = deque()
        self._send_scheduled = False
        self._watchdog: asyncio.TimerHandle | None = None
        self._closed = False

    def submit(self, packed: bytes, replies: int = 1) -> asyncio.Future[Any]:
        """Send `packed`, which is `replies` commands. Error replies are results (`hiredis.ReplyError`).
        The future, or this call, fails with `JournalUnavailable`."""
        if self._closed or len(self._waiting) >= WAITING_MAX:
            raise JournalUnavailable("Too many commands wait for Redis." if not self._closed else "Closed.")
        loop = self._loop
        call = _Call(packed, replies, loop.create_future(), loop.time() + self._timeout_s)
        self._waiting.append(call)
        if not self._send_scheduled and self._wire is not None and len(self._sent) < BATCHES_IN_FLIGHT_MAX:
            self._send_scheduled = True
            loop.call_soon(self._send)
        if self._watchdog is None:
            self._watchdog = loop.call_at(call.deadline, self._check_deadlines)
        return call.answer

    async def close(self) -> None:
        self._closed = True
        await super().close()
        self._fail(self._waiting, "The journal was closed.")
        if self._watchdog is not None:
            self._watchdog.cancel()
            self._watchdog = None

    def _send(self) -> None:
        self._send_scheduled = False
        if self._wire is not None and self._wire.transport.is_closing():
            self.leave()  # it ended, and has not said so yet: what waits is for the next one
        while self._wire is not None and self._waiting and len(self._sent) < BATCHES_IN_FLIGHT_MAX:
            calls: deque[_Call] = deque()
            packed: list[bytes] = []
            size = 0
            while self._waiting and size < BATCH_MAX_BYTES:
                call = self._waiting.popleft()
                if call.answer.done():  # its caller was cancelled and it was never sent
                    continue
                calls.append(call)
                packed.append(call.packed)
                size += len(call.packed)
                call.packed = b""
            if calls:
                deadline = self._loop.time() + self._timeout_s
                self._sent.append(_Batch(calls, deadline))
                self._wire.transport.write(b"".join(packed))

    def _on_connected(self) -> None:
        self._send()

    def _on_lost(self) -> None:
        while self._sent:
            self._fail(self._sent.popleft().calls, "The connection to Redis broke: the outcome is not known.")

    def _on_reply(self, reply: Any) -> None:
        if not self._sent:  # nobody asked: this is not the conversation we think it is
            self.leave()
            return
        if isinstance(reply, hiredis.ReplyError) and error_names(reply, *_UNAVAILABLE):
            self.leave()
            self._on_lost()
            if error_names(reply, "READONLY"):
                self._address.demoted()
            return
        self._useful = self._useful or not isinstance(reply, hiredis.ReplyError)
        batch = self._sent[0]
        call = batch.calls[0]
        if call.wanted > 1:
            call.replies.append(reply)
            if len(call.replies) < call.wanted:
                return
            reply = call.replies
        batch.calls.popleft()
        if not call.answer.done():
            call.answer.set_result(reply)
        if not batch.calls:
            self._sent.popleft()
            if self._waiting and not self._send_scheduled:
                self._send_scheduled = True
                self._loop.call_soon(self._send)

    def _check_deadlines(self, has_read: bool = False) -> None:
        now = self._loop.time()
        if self._sent and self._sent[0].deadline <= now:
            if not has_read:
                self._watchdog = self._loop.call_later(READ_FIRST_S, self._check_deadlines, True)
                return
            self.leave()
            self._on_lost()
        while self._waiting and (self._waiting[0].deadline <= now or self._waiting[0].answer.done()):
            self._fail([self._waiting.popleft()], "Redis cannot be reached.")
        pending = [deadlines[0].deadline for deadlines in (self._sent, self._waiting) if deadlines]
        self._watchdog = self._loop.call_at(min(pending), self._check_deadlines) if pending else None

    @staticmethod
    def _fail(calls: Iterable[_Call], detail: str) -> None:
        for call in calls:
            if not call.answer.done():
                call.answer.set_exception(JournalUnavailable(detail))


class FollowLink(Link):
    """Listens to channels. Wishes are batched; `on_subscribed` confirms each, also after a reconnect."""

    def __init__(
        self,
        address: Address,
        timeout_s: float,
        on_message: Callable[[bytes, bytes], None],
        on_subscribed: Callable[[bytes], None],
    ) -> None:
        super().__init__(address, "follow", timeout_s)
        self._on_message = on_message
        self._on_subscribed = on_subscribed
        self._wanted: set[bytes] = set()
        self._changed: set[bytes] = set()
        self._change_scheduled = False
        self._heard_at = 0.0
        self._pinged = False
        self._watchdog: asyncio.TimerHandle | None = None

    def subscribe(self, channel: bytes) -> None:
        """Listen; subscribing again only asks for another confirmation."""
        self._wanted.add(channel)
        self._change(channel)

    def unsubscribe(self, channel: bytes) -> None:
        """Listen no more; a message under way may still come."""
        self._wanted.discard(channel)
        self._change(channel)

    def _change(self, channel: bytes) -> None:
        if self._wire is None:
            return  # everything wanted is subscribed on connecting
        self._changed.add(channel)
        if not self._change_scheduled:
            self._change_scheduled = True
            self._loop.call_soon(self._apply_changes)

    def _apply_changes(self) -> None:
        self._change_scheduled = False
        changed, self._changed = self._changed, set()
        self._command(b"UNSUBSCRIBE", changed - self._wanted)
        self._command(b"SUBSCRIBE", changed & self._wanted)

    def _command(self, name: bytes, channels: set[bytes]) -> None:
        if self._wire is None:
            return
        ordered = sorted(channels)
        for start in range(0, len(ordered), SUBSCRIBE_MAX):
            self._wire.transport.write(pack(name, *ordered[start : start + SUBSCRIBE_MAX]))

    def _on_connected(self) -> None:
        self._changed.clear()
        self._command(b"SUBSCRIBE", self._wanted)
        self._heard_at = self._loop.time()
        self._pinged = False
        self._watch_silence(FOLLOW_PING_S)

    def _on_lost(self) -> None:
        if self._watchdog is not None:
            self._watchdog.cancel()
            self._watchdog = None

    def _watch_silence(self, delay_s: float) -> None:
        self._watchdog = self._loop.call_later(delay_s, self._check_silence)

    def _check_silence(self, has_read: bool = False) -> None:
        silent_s = self._loop.time() - self._heard_at
        if self._wire is None:
            return
        if silent_s < FOLLOW_PING_S:
            self._watch_silence(FOLLOW_PING_S - silent_s)
        elif not self._pinged:
            self._pinged = True
            self._wire.transport.write(pack(b"PING"))
            self._watch_silence(self._timeout_s)
        elif not has_read:
            self._watchdog = self._loop.call_later(READ_FIRST_S, self._check_silence, True)
        else:
            self.leave()

    def _on_reply(self, reply: Any) -> None:
        self._heard_at = self._loop.time()
        self._pinged = False
        if not isinstance(reply, list):
            if isinstance(reply, hiredis.ReplyError):
                self.leave()
            return
        self._useful = True
        kind = reply[0]
        if kind == b"message":
            self._on_message(reply[1], reply[2])
        elif kind == b"subscribe" and reply[1] in self._wanted:
            self._on_subscribed(reply[1])


async def fetch_info(address: Address, timeout_s: float) -> dict[str, str]:
    """INFO of the server, over a connection of its own. Raises `RedisError`, `OSError` or `TimeoutError`."""
    connection = await address.connect("check", timeout_s)
    try:
        return await _info(connection, timeout_s)
    finally:
        await connection.disconnect(nowait=True)


async def _primary_of(connection: AbstractConnection, timeout_s: float) -> str:
    """What tells this life of this primary from another; raises `RedisError` for a replica."""
    info = await _info(connection, timeout_s, "replication")
    if info.get("role") == "slave":
        raise ReadOnlyError("This is a replica.")
    return info.get("master_replid", "")


async def _info(connection: AbstractConnection, timeout_s: float, *sections: str) -> dict[str, str]:
    async with asyncio.timeout(timeout_s):
        await connection.send_command("INFO", *sections)
        return parse_info(await connection.read_response())


def parse_info(text: bytes) -> dict[str, str]:
    """What the answer to INFO says, by name."""
    return dict(line.split(":", 1) for line in text.decode().splitlines() if ":" in line)
