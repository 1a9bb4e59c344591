"""OpenAI responses: `response.*` events until the one that holds the whole response.

Source: the OpenAI API reference, "Responses / Streaming events"; and the OpenAI SDKs, which raise `APIError`
on an event whose data has a member `error`, and pass on the documented `error` event as any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from relay.dialects.base import REASONING, Delta, Signal
from relay.dialects.payload import byte_length, error_text, is_text, json_object, message_of, place_of
from relay.frame import Event
from relay.lifecycle import Ending, Reason

_KINDS = {
    "response.output_text.delta": "text",
    "response.refusal.delta": "refusal",
    "response.reasoning_summary_text.delta": REASONING,
    "response.reasoning_text.delta": REASONING,
}

_LAST = {"response.completed", "response.incomplete", "response.cancelled"}


def is_response_event(event: Event) -> bool:
    """Whether an event is one of a response's; a stream that is taken up again may begin with any."""
    payload = json_object(event)
    if payload is None or not isinstance(payload.get("type"), str):
        return False
    return payload["type"].startswith("response.") and "sequence_number" in payload


class OpenAIResponses:
    """The responses stream of OpenAI and of servers compatible with it."""

    name = "openai-responses"
    needs_terminal = True

    def read(self, event: Event) -> Signal:
        """Text is that of messages, refusals included; arguments of tools are none. A response that is
        incomplete (as many tokens as allowed) is a completed run. One that asks for the approval of a call
        waits for input."""
        payload = json_object(event)
        if payload is None:
            return Signal()
        if payload.get("error"):
            return Signal(error=error_text(payload["error"], event))
        kind = payload.get("type")
        if not isinstance(kind, str):
            return Signal()
        if kind == "error":
            return Signal(error=error_text(payload, event))
        if kind == "response.failed":
            return Signal(error=error_text(_response(payload).get("error"), event))
        if kind in _LAST:
            return Signal(terminal=True, reason=_reason(kind, _response(payload)))
        delta = payload.get("delta")
        if _KINDS.get(kind, REASONING) != REASONING and is_text(delta):
            return Signal(byte_length(delta))
        return Signal()

    def text_bytes(self, events: Sequence[Event]) -> int:
        """Of each what `read` counts."""
        return sum([self.read(event).text_bytes for event in events])

    def deltas(self, event: Event) -> Sequence[Delta]:
        """The index is that of the item in the response's output."""
        payload = json_object(event)
        if payload is None or payload.get("error") or not isinstance(payload.get("type"), str):
            return ()
        kind, text = _KINDS.get(payload["type"]), payload.get("delta")
        if kind is None or not is_text(text):
            return ()
        return (Delta(kind, place_of(payload.get("output_index")), str(text)),)

    def error_event(self, ending: Ending) -> Event | None:
        """The `error` event, with its members also in `error`, on which the SDKs raise. Its number in the
        sequence is nobody's."""
        said = {"code": ending.reason, "message": message_of(ending), "param": None}
        error = {"type": f"relay_{ending.status}", **said}
        return Event("error", orjson.dumps({"type": "error", "sequence_number": 0, **said, "error": error}))


def _response(payload: dict[str, Any]) -> dict[str, Any]:
    response = payload.get("response")
    return response if isinstance(response, dict) else {}


def _reason(kind: str, response: dict[str, Any]) -> Reason:
    if kind == "response.cancelled" or response.get("status") == "cancelled":
        return Reason.UPSTREAM_CANCELLED
    output = response.get("output")
    for item in output if isinstance(output, list) else ():
        if isinstance(item, dict) and item.get("type") == "mcp_approval_request":
            return Reason.INPUT_REQUIRED
    return Reason.UPSTREAM_END
