"""The package `httpx-sse`, with the reconnection that its documentation gives."""

from __future__ import annotations

import time
from collections.abc import Iterator

import httpx
import httpx_sse
import stamina
from recorded_answers import RAW

from clients.notes import Kit, Notes, PythonClient, Wish


def events(client: httpx.Client, url: str, **headers: str) -> Iterator[httpx_sse.ServerSentEvent]:
    """The recipe of its README, "Handling reconnections", with the other error of a cut connection: its
    `ReadError` is a reset."""
    last_event_id, pause_s = "", 0.0

    @stamina.retry(on=(httpx.ReadError, httpx.RemoteProtocolError))
    def reading() -> Iterator[httpx_sse.ServerSentEvent]:
        nonlocal last_event_id, pause_s
        time.sleep(pause_s)
        resume = {"Last-Event-ID": last_event_id} if last_event_id else {}
        with httpx_sse.connect_sse(client, "GET", url, headers=headers | resume) as source:
            for event in source.iter_sse():
                last_event_id = event.id
                if event.retry is not None:
                    pause_s = event.retry / 1000
                yield event

    yield from reading()


class Recipe(PythonClient):
    """It reads what a GET to the backend answers."""

    answer = RAW
    raises = "SSEError: "
    tells = False

    def read(self, wish: Wish, notes: Notes) -> None:
        with httpx.Client() as client:
            for event in events(client, wish.base + self.answer.path, **{"Idempotency-Key": wish.name}):
                notes.say(event.data)

    def come_back(self, kit: Kit, wish: Wish, cut: Notes) -> Notes:
        return cut
