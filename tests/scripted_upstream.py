"""An agent backend whose every byte the test decides, and that remembers how it was called."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field

DEADLINE_S = 60


@dataclass
class Received:
    """A request as upstream saw it. Header names are in lower case."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes = b""

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key == name), None)


class Exchange:
    """One request under way, for a handler: what was received, and the raw bytes to answer with."""

    def __init__(
        self, received: Received, writer: asyncio.StreamWriter, reader: asyncio.StreamReader
    ) -> None:
        self.received = received
        self.writer = writer
        self._reader = reader

    async def send(self, data: bytes) -> None:
        """Raw bytes on the wire."""
        self.writer.write(data)
        await self.writer.drain()

    async def head(self, status: str = "200 OK", content_type: str = "text/event-stream", *more: str) -> None:
        """A chunked answer's head."""
        lines = [f"HTTP/1.1 {status}", f"Content-Type: {content_type}", "Transfer-Encoding: chunked", *more]
        await self.send("\r\n".join([*lines, "", ""]).encode())

    async def chunk(self, data: bytes) -> None:
        await self.send(b"%x\r\n%b\r\n" % (len(data), data))

    async def end(self) -> None:
        await self.send(b"0\r\n\r\n")

    async def answer(
        self, status: str, body: bytes, content_type: str = "application/json", *more: str
    ) -> None:
        """A whole answer with a length."""
        lines = [f"HTTP/1.1 {status}", f"Content-Type: {content_type}", f"Content-Length: {len(body)}", *more]
        await self.send("\r\n".join([*lines, "", ""]).encode() + body)

    async def stream(self, chunks: Iterable[bytes]) -> None:
        """A whole chunked event stream."""
        await self.head()
        for data in chunks:
            await self.chunk(data)
        await self.end()

    async def closed(self) -> None:
        """Wait until relay closes the connection."""
        with contextlib.suppress(ConnectionError):
            while await self._reader.read(65536):
                pass


Handler = Callable[[Exchange], Awaitable[None]]


class Gate:
    """Holds a handler until the test opens it. Each `pass_one` lets one `wait` through; `open` lets all."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._free = asyncio.Semaphore(0)
        self._opened = False
        self.arrived = threading.Semaphore(0)

    async def wait(self) -> None:
        """In a handler: wait to be let through."""
        self.arrived.release()
        if not self._opened:
            await asyncio.wait_for(self._free.acquire(), DEADLINE_S)

    def pass_one(self) -> None:
        self._loop.call_soon_threadsafe(self._free.release)

    def open(self) -> None:
        def let_all() -> None:
            self._opened = True
            for _ in range(1000):
                self._free.release()

        self._loop.call_soon_threadsafe(let_all)

    def await_arrival(self) -> None:
        """In a test: wait until a handler waits at the gate."""
        assert self.arrived.acquire(timeout=DEADLINE_S), "no handler came to the gate"


@dataclass
class ScriptedUpstream:
    """A raw HTTP/1.1 server in a thread. `on(path, handler)` scripts a path (query not included); `received`
    holds every request."""

    received: list[Received] = field(default_factory=list)
    url: str = ""

    @classmethod
    @contextlib.contextmanager
    def running(cls) -> Iterator[ScriptedUpstream]:
        upstream = cls()
        upstream.start()
        try:
            yield upstream
        finally:
            upstream.stop()

    def start(self) -> None:
        self._handlers: dict[str, Handler] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        started = threading.Event()

        async def serve() -> None:
            self.loop = asyncio.get_running_loop()
            self._stopping = asyncio.Event()
            server = await asyncio.start_server(self._connection, "127.0.0.1", 0, limit=2**20)
            self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            started.set()
            await self._stopping.wait()
            server.close()
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

        self._thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
        self._thread.start()
        assert started.wait(DEADLINE_S)

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(DEADLINE_S)

    def gate(self) -> Gate:
        return Gate(self.loop)

    def on(self, path: str, handler: Handler) -> None:
        self._handlers[path] = handler

    def on_stream(self, path: str, chunks: Iterable[bytes]) -> None:
        """Answer a path with a chunked event stream."""
        kept = list(chunks)

        async def handler(exchange: Exchange) -> None:
            await exchange.stream(kept)

        self.on(path, handler)

    def requests(self, path: str) -> list[Received]:
        """What a path was asked; of all else that is received something may still come of an earlier test."""
        return [request for request in self.received if request.target.partition("?")[0] == path]

    def calls(self, path: str) -> int:
        """How often a path was requested."""
        return len(self.requests(path))

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            while True:
                received = await self._request(reader)
                if received is None:
                    return
                self.received.append(received)
                handler = self._handlers.get(received.target.partition("?")[0])
                exchange = Exchange(received, writer, reader)
                if handler is None:
                    await exchange.answer("404 Not Found", b'{"error": "not scripted"}')
                else:
                    await handler(exchange)
                if writer.is_closing():
                    return
        except (ConnectionError, asyncio.CancelledError, asyncio.IncompleteReadError):
            pass
        finally:
            self._tasks.discard(task)
            writer.close()

    async def _request(self, reader: asyncio.StreamReader) -> Received | None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        except asyncio.IncompleteReadError:
            return None
        first, *lines = head.split("\r\n")[:-2]
        method, target, _ = first.split(" ", 2)
        headers = [
            (name.lower(), value.strip()) for name, _, value in (line.partition(":") for line in lines)
        ]
        received = Received(method, target, headers)
        if received.header("transfer-encoding") == "chunked":
            async for data in _chunks(reader):
                received.body += data
        elif received.header("content-length"):
            received.body = await reader.readexactly(int(received.header("content-length") or 0))
        return received


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while True:
        size = int((await reader.readline()).strip(), 16)
        data = await reader.readexactly(size)
        await reader.readexactly(2)
        if not size:
            return
        yield data
