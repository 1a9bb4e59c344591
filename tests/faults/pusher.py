"""A producer that goes on pushing whatever dies."""

from __future__ import annotations

import asyncio
import secrets
from typing import Any

import aiohttp
from faults.listener import DEADLINE_S


class Pusher:
    """Pushes numbered frames until it is told to finish, and asks again, at the other relay, until it is
    answered. With `beats`, it is silent between its frames but for heartbeats."""

    def __init__(
        self, sessions: aiohttp.ClientSession, urls: tuple[str, ...], beats: int, **wishes: Any
    ) -> None:
        self.stream = f"p-{secrets.token_hex(6)}"
        self.said: list[str] = []
        self.accepted = 0
        self._sessions = sessions
        self._urls = list(urls)
        self._beats = beats
        self._wishes = wishes
        self._finishing = False
        self._news = asyncio.Event()

    async def open(self) -> None:
        opened = await self._ask("runs", self._wishes | {"run": "turn"})
        self._writer = opened["writer"]

    async def push(self) -> None:
        """One frame after the other, then the end."""
        while not self._finishing:
            self.said.append(f"pushed-{len(self.said)}")
            headers = {"Relay-Seq": str(len(self.said))}
            await self._ask("runs/turn/frames", [{"data": self.said[-1]}], headers)
            self.accepted += 1
            self._news.set()
            for _ in range(self._beats):
                await asyncio.sleep(0.05)
                assert (await self._ask("runs/turn/heartbeat", {}))["status"] == "open"
            await asyncio.sleep(0.05)
        await self._ask("runs/turn/end", {"status": "completed"})

    def finish(self) -> None:
        self._finishing = True

    async def has(self, count: int) -> None:
        """Wait until so many frames were accepted."""
        async with asyncio.timeout(DEADLINE_S):
            while self.accepted < count:
                self._news.clear()
                await self._news.wait()

    async def _ask(self, what: str, body: Any, headers: dict[str, str] | None = None) -> Any:
        writer = {"Relay-Writer": self._writer} if hasattr(self, "_writer") else {}
        async with asyncio.timeout(DEADLINE_S):
            while True:
                url = f"{self._urls[0]}/relay/v1/streams/{self.stream}/{what}"
                try:
                    async with self._sessions.post(url, json=body, headers=writer | (headers or {})) as got:
                        if got.status < 300:
                            return await got.json()
                        assert got.status == 503, await got.text()
                except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError):
                    pass
                self._urls.append(self._urls.pop(0))
                await asyncio.sleep(0.02)
