"""The usual hand-written way to make a stream resumable, as a peer of relay.

    python -m benchmarks.peers.handwritten <upstream URL> <Redis URL>

Starlette on uvicorn (uvloop, httptools). A task reads upstream with httpx, line by line, and does one XADD a
frame; every viewer has a connection of its own with a blocking XREAD; frames go out as Server-Sent Events
through Starlette's StreamingResponse. It is what tutorials show, without sse-starlette's ping task, which
would only make it slower. It has no fencing, no endings of lost producers, no bounds and no cancel.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import sys
from collections.abc import AsyncIterator
from typing import Any

import httpx
import redis.asyncio
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

BLOCK_MS = 5000


class Handwritten:
    """The application."""

    def __init__(self, upstream: str, redis_url: str) -> None:
        self._http = httpx.AsyncClient(
            base_url=upstream, timeout=None, limits=httpx.Limits(max_connections=None)
        )
        self._redis = redis.asyncio.Redis.from_url(redis_url, max_connections=10_000)
        self._tasks: set[asyncio.Task[None]] = set()
        routes = [Route("/streams/{stream}", self.view), Route("/{path:path}", self.produce)]
        self.app = Starlette(routes=routes)

    async def produce(self, request: Request) -> StreamingResponse:
        """Call upstream, journal what it says, and show it from the journal."""
        stream = request.headers.get("relay-stream") or secrets.token_hex(16)
        run = secrets.token_hex(8)
        newest: Any = await self._redis.xrevrange(stream, count=1)
        target = f"{request.url.path}?{request.url.query}"
        task = asyncio.create_task(self._journal(target, stream, run))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return self._response(stream, newest[0][0] if newest else "0-0", run)

    async def view(self, request: Request) -> StreamingResponse:
        """Show a stream from an id on."""
        return self._response(request.path_params["stream"], request.headers.get("last-event-id", "0-0"))

    async def _journal(self, target: str, stream: str, run: str) -> None:
        async with self._http.stream("GET", target) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: "):
                    await self._redis.xadd(stream, {"data": line[6:]})
        await self._redis.xadd(stream, {"end": run})

    def _response(self, stream: str, after: str, run: str = "") -> StreamingResponse:
        return StreamingResponse(self._events(stream, after, run), media_type="text/event-stream")

    async def _events(self, stream: str, last: Any, run: str) -> AsyncIterator[str]:
        while True:
            answer: Any = await self._redis.xread({stream: last}, block=BLOCK_MS, count=100)
            for _, entries in answer:
                for last, fields in entries:
                    if b"data" in fields:
                        yield f"id: {last.decode()}\ndata: {fields[b'data'].decode()}\n\n"
                    elif fields[b"end"].decode() == run:
                        return


def main(upstream: str, redis_url: str) -> None:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(4096)
    print(f"ready on http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    config = uvicorn.Config(
        Handwritten(upstream, redis_url).app,
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="off",
        access_log=False,
        log_level="warning",
        timeout_graceful_shutdown=1,
    )
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
