"""A line on a terminal that says how far something is, for who waits; nothing where no terminal is."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TextIO

EVERY_S = 0.1
"""It is written over so often at most."""

_BACK = "\r\x1b[K"
"""To the beginning of the line, and erase it (ECMA-48)."""


class Progress:
    """Where a line is shown; `now` is a clock in seconds that does not jump."""

    def __init__(self, stream: TextIO, now: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream if stream.isatty() else None
        self._now = now
        self._shown_at = -EVERY_S
        self._is_shown = False

    def show(self, text: str) -> None:
        """Say this instead of what was said before, unless that was said just now."""
        now = self._now()
        if self._stream is not None and now - self._shown_at >= EVERY_S:
            self._shown_at, self._is_shown = now, True
            self._stream.write(_BACK + text)
            self._stream.flush()

    def clear(self) -> None:
        """Make room for something else, or be done."""
        if self._is_shown and self._stream is not None:
            self._is_shown = False
            self._stream.write(_BACK)
            self._stream.flush()


def size(count: int) -> str:
    """A number of bytes, in the unit that suits it."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
