"""What the dialects of JSON payloads share."""

from __future__ import annotations

from typing import Any, TypeGuard

import orjson

from relay.frame import Event
from relay.lifecycle import Ending


def json_object(event: Event) -> dict[str, Any] | None:
    """An event's data, if it is a JSON object."""
    try:
        payload = orjson.loads(event.data)
    except orjson.JSONDecodeError:
        return None
    return payload if isinstance(payload, dict) else None


def error_text(error: Any, event: Event) -> str:
    """What an error says: its `message`, or itself if it is text, or else all of the event. Not empty."""
    message = error.get("message") if isinstance(error, dict) else error
    if isinstance(message, str) and message.strip():
        return message
    # Encoded again it could be refused: orjson writes less deep nesting than it reads.
    return event.data.decode(errors="replace") or "error"


def message_of(ending: Ending) -> str:
    """An ending in words. Not empty."""
    return ending.error or f"The answer was {ending.status}: {ending.reason}."


def byte_length(text: str) -> int:
    """The length of text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


def is_text(value: Any) -> TypeGuard[str]:
    """Whether a value is text, and not empty."""
    return isinstance(value, str) and value != ""


def place_of(value: Any) -> int | str:
    """A value as the index of a part: an integer or text; else 0."""
    return value if type(value) is int or type(value) is str else 0
