"""The AI SDK's UI message stream: chunks told apart by `type`, `finish`, then `[DONE]`.

Source: the AI SDK documentation, "Stream Protocols / Data Stream Protocol"; and the package `ai`, whose chat
throws on an `error` chunk, and that refuses chunks that are not in its schema. `[DONE]` it does not ask for,
and servers written by hand leave it out: after `finish` (or `abort`) the end of the body will do.
"""

from __future__ import annotations

from collections.abc import Sequence

import orjson

from relay.dialects.base import REASONING, Delta, Signal
from relay.dialects.payload import byte_length, error_text, is_text, json_object, message_of, place_of
from relay.frame import Event
from relay.lifecycle import Ending, Reason

HEADER = b"x-vercel-ai-ui-message-stream"
"""The response header that says that a stream is one."""

_STOPPED = (Reason.CLIENT_CANCEL, Reason.SUPERSEDED)

_SAID = {
    "finish": Signal(finished=True),
    "abort": Signal(finished=True, reason=Reason.UPSTREAM_CANCELLED),
    "tool-approval-request": Signal(reason=Reason.INPUT_REQUIRED),
}


def is_start(event: Event) -> bool:
    """Whether an event is a `start` chunk with the id of its message; without, it could be anyone's."""
    payload = json_object(event)
    return payload is not None and payload.get("type") == "start" and is_text(payload.get("messageId"))


class AISDK:
    """The stream that `useChat` reads."""

    name = "ai-sdk"
    needs_terminal = True

    def read(self, event: Event) -> Signal:
        """Text is every `text-delta`. A stream that asked for a tool's approval waits for input."""
        if event.data == b"[DONE]":
            return Signal(terminal=True)
        payload = json_object(event)
        kind = None if payload is None else payload.get("type")
        if payload is None or not isinstance(kind, str):
            return Signal()
        if kind == "text-delta":
            delta = payload.get("delta")
            return Signal(byte_length(delta) if is_text(delta) else 0)
        if kind == "error":
            return Signal(error=error_text(payload.get("errorText"), event))
        return _SAID.get(kind, Signal())

    def text_bytes(self, events: Sequence[Event]) -> int:
        """Of each what `read` counts."""
        return sum([self.read(event).text_bytes for event in events])

    def deltas(self, event: Event) -> Sequence[Delta]:
        """The index is the part's id, which a later step may use again."""
        payload = json_object(event)
        if payload is None or payload.get("type") not in ("text-delta", "reasoning-delta"):
            return ()
        if not is_text(payload.get("delta")):
            return ()
        kind = "text" if payload["type"] == "text-delta" else REASONING
        return (Delta(kind, place_of(payload.get("id")), payload["delta"]),)

    def error_event(self, ending: Ending) -> Event | None:
        """An `error` chunk; `abort`, as servers send it, where somebody stopped the answer on purpose."""
        if ending.reason in _STOPPED:
            return Event("", orjson.dumps({"type": "abort", "reason": message_of(ending)}))
        return Event("", orjson.dumps({"type": "error", "errorText": message_of(ending)}))
