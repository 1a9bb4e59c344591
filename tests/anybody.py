"""A caller of the proxy that may name every stream, and waits for its answer."""

from __future__ import annotations


class Anybody:
    is_gone = False

    async def may_name(self, stream: str) -> bool:
        return True

    async def may(self, right: str, stream: str) -> bool:
        return True

    async def check_named(self, stream: str) -> None:
        pass


ANYBODY = Anybody()
