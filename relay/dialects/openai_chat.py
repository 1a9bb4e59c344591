"""OpenAI chat completions: `chat.completion.chunk` objects, then `[DONE]`.

Source: the OpenAI API reference, "Chat / Streaming", and the OpenAI Python SDK, which raises `APIError`
on an event whose data has a member `error`; and for reasoning the documentation of DeepSeek, "Thinking Mode",
and of vLLM, "Reasoning Outputs".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from relay.dialects.base import REASONING, Delta, Signal
from relay.dialects.payload import error_text, json_object, message_of
from relay.frame import Event
from relay.lifecycle import Ending

_DONE = b"[DONE]"


def is_chunk(event: Event) -> bool:
    """Whether an event is a chat completion chunk."""
    payload = json_object(event)
    return payload is not None and payload.get("object") == "chat.completion.chunk"


class OpenAIChat:
    """The chat completions stream of OpenAI and of the many servers compatible with it."""

    name = "openai-chat"
    needs_terminal = True

    def read(self, event: Event) -> Signal:
        """Text is every choice's `delta.content` and `delta.refusal`; `error` is an object or a string."""
        if event.data.startswith(_DONE):  # as the SDK looks for it
            return Signal(terminal=True)
        payload = json_object(event)
        if payload is None:
            return Signal()
        if payload.get("error"):
            return Signal(error=error_text(payload["error"], event))
        text_bytes = 0
        for kind, _, text in _shown(payload):
            if kind != REASONING:
                text_bytes += len(text) if text.isascii() else len(text.encode())
        return Signal(text_bytes)

    def text_bytes(self, events: Sequence[Event]) -> int:
        """Of each what `read` counts."""
        return sum([self.read(event).text_bytes for event in events])

    def deltas(self, event: Event) -> Sequence[Delta]:
        """`text` is content and `refusal` is refusal, `reasoning` what compatible servers add as
        `reasoning_content` or `reasoning`; the index is the choice's."""
        payload = None if event.data.startswith(_DONE) else json_object(event)
        if payload is None or payload.get("error"):
            return ()
        return [Delta(kind, _index(payload, place), text) for kind, place, text in _shown(payload)]

    def error_event(self, ending: Ending) -> Event | None:
        """`{"error": {…}}`, on which the SDKs raise."""
        error = {
            "message": message_of(ending),
            "type": f"relay_{ending.status}",
            "param": None,
            "code": ending.reason,
        }
        return Event("", orjson.dumps({"error": error}))


def _shown(payload: dict[str, Any]) -> Sequence[tuple[str, int, str]]:
    """Kind, place in the list of choices, and text."""
    shown = []
    choices = payload.get("choices")
    for place, choice in enumerate(choices if isinstance(choices, list) else ()):
        delta = choice.get("delta") if isinstance(choice, dict) else None
        if isinstance(delta, dict):
            reasoning = delta.get("reasoning_content") or delta.get("reasoning")
            if reasoning and isinstance(reasoning, str):
                shown.append((REASONING, place, reasoning))
            text, refusal = delta.get("content"), delta.get("refusal")
            if text and isinstance(text, str):
                shown.append(("text", place, text))
            if refusal and isinstance(refusal, str):
                shown.append(("refusal", place, refusal))
    return shown


def _index(payload: dict[str, Any], place: int) -> int:
    index = payload["choices"][place].get("index")
    return index if type(index) is int else place
