"""A journal's follower that hears nothing, for tests of what is written."""

from __future__ import annotations

from collections.abc import Sequence

from relay.cursor import Cursor
from relay.frame import Frame


class DeafFollower:
    """Follows nothing."""

    def on_frames(self, stream: str, previous: Cursor, frames: Sequence[Frame]) -> None:
        pass

    def on_deleted(self, stream: str) -> None:
        pass

    def on_sealed(self, stream: str) -> None:
        pass

    def on_doubt(self, stream: str) -> None:
        pass
