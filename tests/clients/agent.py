"""The agent that the clients ask."""

from __future__ import annotations

from typing import Any

from recorded_answers import Answer
from scripted_upstream import Exchange, Gate, ScriptedUpstream


async def say(
    exchange: Exchange,
    answer: Answer,
    events: list[bytes],
    gate: Gate | None = None,
    broken: bool = False,
    at: int | None = None,
) -> None:
    """Answer with these events, those behind "Hel", or from `at` on, when the gate lets it. `broken`: in
    mid-chunk, at last."""
    at = answer.shown if at is None else at
    for event in events[:at]:
        await exchange.chunk(event)
    if gate is not None:
        await gate.wait()
    for event in events[at:]:
        await exchange.chunk(event)
    if broken:
        await exchange.send(b"fff\r\ndata: {")
        exchange.writer.close()
    else:
        await exchange.end()


class Agent:
    """An upstream with one path, and one stream for what it answers there."""

    def __init__(self, upstream: ScriptedUpstream, name: str, answer: Answer) -> None:
        self.path = f"/{name}{answer.path}"
        self._upstream = upstream
        self._name = name
        self._answer = answer

    def say(self, events: list[bytes], gate: Gate | None = None, **how: Any) -> None:
        """Have it answer as `say` does."""

        async def handler(exchange: Exchange) -> None:
            named = [f"Relay-Stream: {self._name}", *self._answer.headers]
            if self._answer.dialect == "langgraph":  # where its clients come back to
                named.append(f"Location: /{self._name}/threads/th1/runs/run1/stream")
            await exchange.head("200 OK", "text/event-stream", *named)
            await say(exchange, self._answer, events, gate, **how)

        self._upstream.on(self.path, handler)

    @property
    def calls(self) -> int:
        return self._upstream.calls(self.path)
