"""`relay.client`, which reads the events route."""

from __future__ import annotations

import asyncio

from recorded_answers import RAW

from clients.events_route import EventsRouteClient
from clients.notes import Kit, Notes, Wish, in_thread
from relay.client import subscribe


class Subscribe(EventsRouteClient):
    """`subscribe`."""

    answer = RAW

    def join(self, kit: Kit, wish: Wish) -> Notes:
        return in_thread(lambda notes: asyncio.run(self._read(wish, notes)))

    async def _read(self, wish: Wish, notes: Notes) -> None:
        async for frame in subscribe(wish.url, wish.name, run="latest", control="events"):
            if frame.control is None:
                notes.say(frame.data)
            elif frame.control["type"] == "run.ended" and frame.control["status"] != "completed":
                raise RuntimeError(frame.control.get("error") or frame.control["reason"])
