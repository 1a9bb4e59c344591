"""The readers of a proxy in the test's own process: so many of every stream, and they read nothing."""

from __future__ import annotations

from relay.frame import Frame


class Audience:
    """See `relay.ingest.proxy.Audience`. `told` holds what it was told of runs that are waited for."""

    def __init__(self, readers: int) -> None:
        self.readers = readers
        self.told: list[tuple[object, ...]] = []

    def readers_of(self, stream: str) -> int:
        return self.readers

    def expect(self, stream: str) -> None:
        self.told.append(("expect", stream))

    def opened(self, stream: str, started: Frame, sealed: bool) -> None:
        self.told.append(("opened", stream, started, sealed))
