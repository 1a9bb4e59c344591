"""Anthropic messages: `message_start`, content blocks, `message_stop`.

Source: the Claude API documentation, "Streaming Messages" and "Errors"; and the Anthropic SDKs, which raise
`APIStatusError` on an event named `error`, and leave out events without a name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from relay.dialects.base import REASONING, Delta, Signal
from relay.dialects.payload import byte_length, error_text, is_text, json_object, message_of, place_of
from relay.frame import Event
from relay.lifecycle import Ending

# Member of a block's start or delta -> the kind of part that it adds to.
_KINDS = {"text": "text", "thinking": REASONING}


def is_message_start(event: Event) -> bool:
    """Whether an event begins a message."""
    payload = json_object(event)
    return (
        payload is not None
        and payload.get("type") == "message_start"
        and isinstance(payload.get("message"), dict)
    )


class Anthropic:
    """The messages stream of Anthropic and of servers compatible with it."""

    name = "anthropic"
    needs_terminal = True

    def read(self, event: Event) -> Signal:
        """Text is that of text blocks. Whatever the `stop_reason`, a message that stopped is complete: the
        calls of tools are for the client to make."""
        payload = json_object(event)
        if event.event == "error" or (payload is not None and payload.get("type") == "error"):
            return Signal(error=error_text(payload and payload.get("error"), event))
        if payload is None:
            return Signal()
        if payload.get("type") == "message_stop":
            return Signal(terminal=True)
        kind, text = _shown(payload)
        return Signal(byte_length(text) if kind != REASONING else 0)

    def text_bytes(self, events: Sequence[Event]) -> int:
        """Of each what `read` counts."""
        return sum([self.read(event).text_bytes for event in events])

    def deltas(self, event: Event) -> Sequence[Delta]:
        """The index is the content block's."""
        payload = None if event.event == "error" else json_object(event)
        if payload is None:
            return ()
        kind, text = _shown(payload)
        return (Delta(kind, place_of(payload.get("index")), text),) if text else ()

    def error_event(self, ending: Ending) -> Event | None:
        """`api_error` is the documented type of what went wrong on the way."""
        error = {"type": "api_error", "message": message_of(ending), "code": ending.reason}
        return Event("error", orjson.dumps({"type": "error", "error": error}))


def _shown(payload: dict[str, Any]) -> tuple[str, str]:
    """Kind and text; a block may begin with some already."""
    kind = payload.get("type")
    if kind == "content_block_delta":
        part = payload.get("delta")
    elif kind == "content_block_start":
        part = payload.get("content_block")
    else:
        return "text", ""
    if isinstance(part, dict) and part.get("type") in ("text", "text_delta", "thinking", "thinking_delta"):
        member = part["type"].removesuffix("_delta")
        if is_text(part.get(member)):
            return _KINDS[member], part[member]
    return "text", ""
