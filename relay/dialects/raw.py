"""Events whose payload relay does not know: all data is text, and only the transport tells how it ended."""

from __future__ import annotations

from relay.dialects.base import Signal
from relay.frame import Event
from relay.lifecycle import Ending


class Raw:
    """The dialect of everything that is not recognised."""

    name = "raw"
    needs_terminal = False

    def read(self, event: Event) -> Signal:
        """Every byte counts as text."""
        return Signal(text_bytes=len(event.data))

    def error_event(self, ending: Ending) -> Event | None:
        """There is none: a broken raw answer is told by breaking the connection."""
        return None
