"""What relay knows of a payload format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from relay.frame import Event
from relay.lifecycle import Ending, Reason

REASONING = "reasoning"
"""The kind of a part that belongs to the answer, but not to its text."""


@dataclass(frozen=True, slots=True)
class Delta:
    """Text that one event adds to one part of the answer. `kind` is `text`, `refusal` or `reasoning`; `index`
    tells parts of a kind apart: a place, or the id that the format gives them. `text` is not empty, and can
    be encoded. `is_whole` says that it is the part's text so far, and not what is new of it."""

    kind: str
    index: int | str
    text: str
    is_whole: bool = False


class Signal(NamedTuple):
    """What one event means to its format: bytes of shown text (those of its `deltas`, without reasoning),
    whether it is the terminal marker, after which nothing counts, and the error it reports (None: none).

    `finished` is for formats whose last word may be followed by more: whether, from here on, the end of the
    body is the end of the answer and no truncation (None: as before). `reason` is why the answer ends when
    it ends with the terminal marker or finished, unless a later event says otherwise (None: as before).
    """

    text_bytes: int = 0
    terminal: bool = False
    error: str | None = None
    finished: bool | None = None
    reason: Reason | None = None


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
