"""A port to which a server may come back."""

from __future__ import annotations

import contextlib
import random
import socket

# Below those that a system gives to whoever does not care which one it has. One of these nobody takes while
# its server is away: not even a client that goes on trying to reach it, and would in the end reach itself.
_PORTS = range(20_000, 32_000)


def steady_port() -> int:
    """One that is free now, and stays so."""
    while True:
        port = random.SystemRandom().choice(_PORTS)
        with contextlib.closing(socket.socket()) as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port
