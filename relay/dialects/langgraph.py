"""LangGraph Server: events named by stream mode, `error`, and from some servers `end`.

Source: `langgraph-api` 0.16 (`stream.py`, `worker.py`, `sse.py`), behind which tests/examples runs relay, and
0.2; and `langgraph-sdk`, which takes `end` and `error` for the last event. These servers end by closing the
stream, hence a clean end is no truncation. Messages that are streamed whole (`messages/partial`) hold all of
their text so far. An interrupt is in the modes `updates` and `values`, and in no other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from relay.dialects.base import REASONING, Delta, Signal
from relay.dialects.payload import byte_length, error_text, is_text, json_object, message_of, place_of
from relay.frame import Event
from relay.lifecycle import Ending, Reason

_OF_THE_MODEL = ("ai", "AIMessageChunk", "AIMessage")

_CANCELLED = ("UserInterrupt", "UserRollback")
"""Errors of a run that its caller cancelled, with and without keeping what it did. Older servers sent them
(0.2); newer ones end such a run's stream without a word, as if it were done (0.16)."""


def is_metadata(event: Event) -> bool:
    """Whether an event is the first of a run: `metadata`, with its id."""
    if event.event != "metadata":
        return False
    payload = json_object(event)
    return payload is not None and is_text(payload.get("run_id"))


class LangGraph:
    """The stream of a run of LangGraph Server."""

    name = "langgraph"
    needs_terminal = False

    def read(self, event: Event) -> Signal:
        """Text is that of the model's messages, in the modes `messages` and `messages-tuple`; of those that
        hold all of their text so far, each counts. A state with `__interrupt__` waits for input."""
        mode = event.event.partition("|")[0]  # behind it, the subgraph
        if event.event == "error":
            return _error(event)
        if event.event == "end":
            return Signal(terminal=True)
        if mode in ("updates", "values") and b"__interrupt__" in event.data:
            payload = json_object(event)
            return Signal(reason=Reason.INPUT_REQUIRED if payload and payload.get("__interrupt__") else None)
        deltas = self.deltas(event)
        return Signal(sum([byte_length(delta.text) for delta in deltas if delta.kind != REASONING]))

    def text_bytes(self, events: Sequence[Event]) -> int:
        """Of each what `read` counts."""
        return sum([self.read(event).text_bytes for event in events])

    def deltas(self, event: Event) -> Sequence[Delta]:
        """The index is the message's id."""
        mode = event.event.partition("|")[0]
        if mode not in ("messages", "messages/partial", "messages/complete"):
            return ()
        try:
            messages = orjson.loads(event.data)
        except orjson.JSONDecodeError:
            return ()
        if not isinstance(messages, list):
            return ()
        whole = mode != "messages"
        shown = messages if whole else messages[:1]  # of a tuple, the second is metadata
        return [
            Delta(kind, place_of(message.get("id")), text, whole)
            for message in shown
            if isinstance(message, dict) and message.get("type") in _OF_THE_MODEL
            for kind, text in _texts(message.get("content"))
        ]

    def error_event(self, ending: Ending) -> Event | None:
        """The event `error`: a code and a message, as the server sends them."""
        return Event("error", orjson.dumps({"error": ending.reason, "message": message_of(ending)}))


def _error(event: Event) -> Signal:
    payload = json_object(event)
    if payload is not None and payload.get("error") in _CANCELLED:
        return Signal(terminal=True, reason=Reason.UPSTREAM_CANCELLED)
    return Signal(error=error_text(payload, event))


def _texts(content: Any) -> Sequence[tuple[str, str]]:
    """Kind and text; content is a text or a list of blocks, each kind's put together."""
    if isinstance(content, str):
        return [("text", content)] if content else []
    texts = {"text": "", REASONING: ""}
    for block in content if isinstance(content, list) else ():
        if isinstance(block, str):
            texts["text"] += block
        elif isinstance(block, dict):
            for member, kind in (("text", "text"), ("thinking", REASONING), ("reasoning", REASONING)):
                if block.get("type") == member and isinstance(block.get(member), str):
                    texts[kind] += block[member]
    return [(kind, text) for kind, text in texts.items() if text]
