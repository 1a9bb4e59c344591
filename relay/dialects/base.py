"""What relay knows of a payload format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from relay.frame import Event
from relay.lifecycle import Ending


@dataclass(frozen=True, slots=True)
class Delta:
    """Text that one event adds to one part of the answer. `kind` is `text` or `refusal`; `index` tells parts
    of a kind apart. `text` is not empty, and can be encoded."""

    kind: str
    index: int
    text: str


class Signal(NamedTuple):
    """What one event means to its format: bytes of shown text (those of its `deltas`), whether it is the
    terminal marker, and the error it reports (None: none)."""

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

    def text_bytes(self, events: Sequence[Event]) -> int:
        """The bytes of shown text in events together, as `read` counts them."""

    def deltas(self, event: Event) -> Sequence[Delta]:
        """The text that this event shows, by part. Never raises, whatever the bytes."""

    def error_event(self, ending: Ending) -> Event | None:
        """The format's own way to say that the answer broke off; None where it has none."""
