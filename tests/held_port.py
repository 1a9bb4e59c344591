"""Ports that stay a test's own while nobody listens there: before a server starts, and while it restarts."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator


def hold_port() -> socket.socket:
    """A socket that holds a free port until it is closed. The system gives the port to nobody who asks for
    any, and refuses connections to it; who is told its number can listen there, as often as he likes, because
    servers set SO_REUSEADDR too."""
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    return holder


@contextlib.contextmanager
def held_port() -> Iterator[int]:
    """The number of a port that is held meanwhile."""
    with hold_port() as holder:
        yield holder.getsockname()[1]
