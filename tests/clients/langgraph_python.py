"""The package `langgraph-sdk`, which comes back by itself to where the server's `Location` points."""

from __future__ import annotations

import langgraph_sdk
from recorded_answers import LANGGRAPH

from clients.notes import Kit, Notes, PythonClient, Wish


class RunsStream(PythonClient):
    """`runs.stream`. Some servers send `end`; of others the end of the stream is the end."""

    answer = LANGGRAPH

    def read(self, wish: Wish, notes: Notes) -> None:
        key = {"Idempotency-Key": wish.name}
        with langgraph_sdk.get_sync_client(url=wish.base, headers=key) as client:
            for part in client.runs.stream("th1", "agent", input={}, stream_mode=["values", "messages"]):
                if part.event == "messages/partial":
                    notes.show(part.data[0]["content"])
                if part.event == "error":
                    raise RuntimeError(part.data["message"])

    def come_back(self, kit: Kit, wish: Wish, cut: Notes) -> Notes:
        return cut
