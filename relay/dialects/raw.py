"""Events whose payload relay does not know: all data is text, and only the transport tells how it ended."""

from __future__ import annotations

from collections.abc import Sequence

from relay.dialects.base import Delta, Signal
from relay.frame import Event
from relay.lifecycle import Ending


class Raw:
    """The dialect of everything that is not recognised."""

    name = "raw"
    needs_terminal = False

    def read(self, event: Event) -> Signal:
        """Every byte counts as text."""
        return Signal(len(event.data))

    def text_bytes(self, events: Sequence[Event]) -> int:
        """All of their data."""
        return sum([len(event.data) for event in events])

    def deltas(self, event: Event) -> Sequence[Delta]:
        """All data is one text."""
        text = event.data.decode(errors="replace")
        return (Delta("text", 0, text),) if text else ()

    def error_event(self, ending: Ending) -> Event | None:
        """There is none: a broken raw answer is told by breaking the connection."""
        return None
