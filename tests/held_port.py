"""Ports that stay a test's own while nobody listens there: before a server starts, and while it restarts."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator


def hold_port(most: int = 65_535) -> socket.socket:
    """A socket that holds a free port, `most` or lower, until it is closed. The system gives the port to
    nobody who asks for any, and refuses connections to it; who is told its number can listen there, as often
    as he likes, because servers set SO_REUSEADDR too."""
    with contextlib.ExitStack() as too_high:  # held meanwhile, so that they are not given again
        while True:
            holder = socket.socket()
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            holder.bind(("127.0.0.1", 0))
            if holder.getsockname()[1] <= most:
                return holder
            too_high.enter_context(holder)


@contextlib.contextmanager
def held_port() -> Iterator[int]:
    """The number of a port that is held meanwhile."""
    with hold_port() as holder:
        yield holder.getsockname()[1]
