"""An upstream that speaks numbered words at a pace, and knows what became of each of its connections."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Sequence

from scripted_upstream import Exchange, ScriptedUpstream

DEADLINE_S = 60

CHAT = "openai-chat"


class Turn:
    """One answer of an agent: what it said, and how its connection ended."""

    def __init__(self, number: int, dialect: str) -> None:
        self._number = number
        self._dialect = dialect
        self.said: list[str] = []
        self.finished = False
        """It said all it wanted to, and ended its answer."""
        self.closed = False
        """Relay closed the connection before that."""
        self.over = threading.Event()

    def say(self) -> bytes:
        """The next word, as a chunk."""
        text = f"word-{self._number}-{len(self.said)} "
        if self._dialect == CHAT:
            choice = {"index": 0, "delta": {"content": text}}
            text = json.dumps({"object": "chat.completion.chunk", "choices": [choice]})
        return self.add(text)

    def add(self, text: str) -> bytes:
        self.said.append(text.rstrip() if self._dialect == "raw" else text)
        return f"data: {self.said[-1]}\n\n".encode()

    async def await_over(self) -> None:
        """In a test: wait until the connection is at its end, whoever ended it."""
        assert await asyncio.to_thread(self.over.wait, DEADLINE_S), "upstream's connection is kept"


class Agent:
    """Speaks in one stream, a turn a request: `words` words, then waits for `end`, and ends its answer.

    `pace_s` lies between two words: an agent's pace, and time to strike at any of them."""

    def __init__(
        self,
        upstream: ScriptedUpstream,
        stream: str,
        *,
        words: int = 1_000_000,
        pace_s: float = 0.01,
        dialect: str = "raw",
    ) -> None:
        self.stream = stream
        self.dialect = dialect
        self.turns: list[Turn] = []
        self._words = words
        self._pace_s = pace_s
        self._loop = upstream.loop
        self._may_end = asyncio.Event()
        upstream.on(f"/{stream}", self._speak)

    @property
    def said(self) -> Sequence[str]:
        """All it said, turn by turn."""
        return [word for turn in self.turns for word in turn.said]

    def end(self) -> None:
        """In a test: let it end its answer as soon as it has said its words."""
        self._loop.call_soon_threadsafe(self._may_end.set)

    def stop_speaking(self) -> None:
        """In a test: let it end its answer after the word at hand."""
        self._words = 0
        self.end()

    async def _speak(self, exchange: Exchange) -> None:
        turn = Turn(len(self.turns), self.dialect)
        self.turns.append(turn)
        gone = asyncio.create_task(exchange.closed())
        ending = asyncio.create_task(self._may_end.wait())
        try:
            await exchange.head("200 OK", "text/event-stream", f"Relay-Stream: {self.stream}")
            while len(turn.said) < self._words and not gone.done():
                await exchange.chunk(turn.say())
                await asyncio.wait([gone], timeout=self._pace_s)
            await asyncio.wait([gone, ending], return_when=asyncio.FIRST_COMPLETED)
            if not gone.done():
                # Nothing of the next request on this connection may be taken for the end of this one.
                gone.cancel()
                await asyncio.gather(gone, return_exceptions=True)
                last = turn.add("[DONE]") if self.dialect == CHAT else b""
                if last:
                    await exchange.chunk(last)
                await exchange.end()
                turn.finished = True
        except ConnectionError:
            pass
        finally:
            gone.cancel()
            ending.cancel()
            await asyncio.gather(gone, ending, return_exceptions=True)
            turn.closed = not turn.finished
            turn.over.set()
