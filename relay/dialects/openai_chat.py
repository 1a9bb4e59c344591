"""OpenAI chat completions: `chat.completion.chunk` objects, then `[DONE]`.

Source: the OpenAI API reference, "Chat / Streaming", and the OpenAI Python SDK, which raises `APIError`
on an event whose data has a member `error`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from relay.dialects.base import Delta, Signal
from relay.frame import Event
from relay.lifecycle import Ending

_DONE = b"[DONE]"


def is_chunk(event: Event) -> bool:
    """Whether an event is a chat completion chunk."""
    payload = _payload(event)
    return payload is not None and payload.get("object") == "chat.completion.chunk"


class OpenAIChat:
    """The chat completions stream of OpenAI and of the many servers compatible with it."""

    name = "openai-chat"
    needs_terminal = True

    def read(self, event: Event) -> Signal:
        """Text is every choice's `delta.content` and `delta.refusal`; `error` is an object or a string."""
        if event.data.startswith(_DONE):  # as the SDK looks for it
            return Signal(terminal=True)
        payload = _payload(event)
        if payload is None:
            return Signal()
        if payload.get("error"):
            return Signal(error=_error_text(payload["error"], event))
        text_bytes = 0
        for _, _, text in _shown(payload):
            text_bytes += len(text) if text.isascii() else len(text.encode())
        return Signal(text_bytes)

    def text_bytes(self, events: Sequence[Event]) -> int:
        """Of each what `read` counts."""
        return sum([self.read(event).text_bytes for event in events])

    def deltas(self, event: Event) -> Sequence[Delta]:
        """`text` is content and `refusal` is refusal; the index is the choice's."""
        payload = None if event.data.startswith(_DONE) else _payload(event)
        if payload is None or payload.get("error"):
            return ()
        return [Delta(kind, _index(payload, place), text) for kind, place, text in _shown(payload)]

    def error_event(self, ending: Ending) -> Event | None:
        """`{"error": {…}}`, on which the SDKs raise."""
        message = ending.error or f"The answer was {ending.status}: {ending.reason}."
        error = {"message": message, "type": f"relay_{ending.status}", "param": None, "code": ending.reason}
        return Event("", orjson.dumps({"error": error}))


def _payload(event: Event) -> dict[str, Any] | None:
    try:
        payload = orjson.loads(event.data)
    except orjson.JSONDecodeError:
        return None
    return payload if isinstance(payload, dict) else None


def _error_text(error: Any, event: Event) -> str:
    message = error.get("message") if isinstance(error, dict) else error
    if isinstance(message, str) and message.strip():
        return message
    # Encoded again it could be refused: orjson writes less deep nesting than it reads.
    return event.data.decode(errors="replace")


def _shown(payload: dict[str, Any]) -> Sequence[tuple[str, int, str]]:
    """Kind, place in the list of choices, and text."""
    shown = []
    choices = payload.get("choices")
    for place, choice in enumerate(choices if isinstance(choices, list) else ()):
        delta = choice.get("delta") if isinstance(choice, dict) else None
        if isinstance(delta, dict):
            text, refusal = delta.get("content"), delta.get("refusal")
            if text and isinstance(text, str):
                shown.append(("text", place, text))
            if refusal and isinstance(refusal, str):
                shown.append(("refusal", place, refusal))
    return shown


def _index(payload: dict[str, Any], place: int) -> int:
    index = payload["choices"][place].get("index")
    return index if type(index) is int else place
