"""AG-UI: `RUN_STARTED`, events, `RUN_FINISHED` or `RUN_ERROR`.

Source: the AG-UI documentation, "Events" and "Interrupts"; and the package `@ag-ui/client`, which reports
`RUN_ERROR` to `onRunErrorEvent`, and takes several runs after each other in one stream, as servers send them
that repeat a thread's history: hence `RUN_FINISHED` is a finish and not the terminal marker.
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
    "TEXT_MESSAGE_CONTENT": "text",
    "TEXT_MESSAGE_CHUNK": "text",
    "REASONING_MESSAGE_CONTENT": REASONING,
    "REASONING_MESSAGE_CHUNK": REASONING,
    "THINKING_TEXT_MESSAGE_CONTENT": REASONING,  # as it was called before 1.0
}

_REASONS = {"interrupt": Reason.INPUT_REQUIRED, "cancelled": Reason.UPSTREAM_CANCELLED}


def is_run_started(event: Event) -> bool:
    """Whether an event begins a run."""
    payload = json_object(event)
    return payload is not None and payload.get("type") == "RUN_STARTED" and is_text(payload.get("runId"))


class AGUI:
    """The event stream of AG-UI."""

    name = "ag-ui"
    needs_terminal = True

    def read(self, event: Event) -> Signal:
        """Text is that of text messages. `outcome` tells a run that waits for input, and one that was
        cancelled, from one that is done. An error of a subagent is none of the run."""
        payload = json_object(event)
        kind = None if payload is None else payload.get("type")
        if payload is None or not isinstance(kind, str):
            return Signal()
        if kind in ("TEXT_MESSAGE_CONTENT", "TEXT_MESSAGE_CHUNK"):
            delta = payload.get("delta")
            return Signal(byte_length(delta) if is_text(delta) else 0)
        if kind == "RUN_STARTED":
            return Signal(finished=False)
        if kind == "RUN_FINISHED":
            return Signal(finished=True, reason=_reason(payload.get("outcome")))
        if kind == "RUN_ERROR":
            return Signal(error=error_text(payload, event))
        return Signal()

    def text_bytes(self, events: Sequence[Event]) -> int:
        """Of each what `read` counts."""
        return sum([self.read(event).text_bytes for event in events])

    def deltas(self, event: Event) -> Sequence[Delta]:
        """The index is the message's id; all chunks without one are one part."""
        payload = json_object(event)
        if payload is None or not isinstance(payload.get("type"), str):
            return ()
        kind, text = _KINDS.get(payload["type"]), payload.get("delta")
        if kind is None or not is_text(text):
            return ()
        return (Delta(kind, place_of(payload.get("messageId")), str(text)),)

    def error_event(self, ending: Ending) -> Event | None:
        """`RUN_ERROR`, also of a run that was cancelled: `RUN_FINISHED` would need ids that relay has not."""
        error = {"type": "RUN_ERROR", "message": message_of(ending), "code": ending.reason}
        return Event("", orjson.dumps(error))


def _reason(outcome: Any) -> Reason:
    kind = outcome.get("type") if isinstance(outcome, dict) else outcome
    return _REASONS.get(kind, Reason.UPSTREAM_END) if isinstance(kind, str) else Reason.UPSTREAM_END
