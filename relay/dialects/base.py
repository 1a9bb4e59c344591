"""What relay knows of a payload format."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from relay.frame import Event
from relay.lifecycle import Ending


class Signal(NamedTuple):
    """What one event means to its format: bytes of shown text, whether it is the terminal marker,
    and the error it reports (None: none)."""

    text_bytes: int = 0
    terminal: bool = False
    error: str | None = None


class Dialect(Protocol):
    """One payload format. Stateless and pure."""

    name: str
    needs_terminal: bool
    """Whether an end without a terminal marker is a truncation."""

    def read(self, event: Event) -> Signal:
        """What this event means. Never raises, whatever the bytes."""

    def error_event(self, ending: Ending) -> Event | None:
        """The format's own way to say that the answer broke off; None where it has none."""
