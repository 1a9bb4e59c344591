"""The seam between relay and Redis, where single replies can be lost and connections cut at any byte."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import hiredis
from tcp_proxy import TcpProxy

Loses = Callable[[bytes, bytes, bytes], bool]
TO_CLIENT, TO_SERVER = 0, 1


class RedisSeam(TcpProxy):
    """A proxy in front of a Redis that understands what a follow connection is sent.

    `loses` is asked with kind, channel and payload of each Pub/Sub reply whether it is to vanish; `lost`
    counts those that did. Replies of other kinds pass untouched.
    """

    def __init__(self, target_port: int) -> None:
        super().__init__(target_port)
        self.loses: Loses = lambda kind, channel, payload: False
        self.lost = 0
        self.to_client = self._without_lost
        self._of_connection = threading.local()  # each direction of a connection has a thread of its own

    def redis_url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def _without_lost(self, data: bytes) -> bytes:
        mine = self._of_connection
        if not hasattr(mine, "pending"):
            mine.pending, mine.follows = b"", False
        data, mine.pending = mine.pending + data, b""
        kept = bytearray()
        while data:
            if not mine.follows and not data.startswith(b"*3\r\n$9\r\nsubscribe\r\n"):
                # Before it subscribes a connection has handshake replies, whole in one read each.
                return bytes(kept) + data
            mine.follows = True
            size, reply = _first_reply(data)
            if not size:
                mine.pending = data
                break
            if len(reply) == 3 and self.loses(reply[0], reply[1], _payload(reply)):  # a pong has two
                self.lost += 1
            else:
                kept += data[:size]
            data = data[size:]
        return bytes(kept)

    def cut_at_random(self, seed: int, cuts: int, mean_bytes: int) -> None:
        """Reset every connection now, and the next `cuts` after a random number of bytes of one direction,
        `mean_bytes` on average towards Redis."""
        first = self.connections

        def plan(direction: int) -> Callable[[int], int | None]:
            def bytes_of(number: int) -> int | None:
                if number - first >= cuts:
                    return None
                chance = random.Random(f"{seed} {number - first}")
                size = chance.expovariate(1 / mean_bytes)
                # Replies are about a tenth as long as commands, and a lost reply is the harder case.
                size = 1 + int(size if direction == TO_SERVER else size / 10)
                return size if chance.randrange(2) == direction else None

            return bytes_of

        self.plan, self.plan_to_server = plan(TO_CLIENT), plan(TO_SERVER)
        self.cut_all()


def _payload(reply: list[Any]) -> bytes:
    return reply[2] if isinstance(reply[2], bytes) else b""


def _first_reply(data: bytes) -> tuple[int, Any]:
    """How many bytes the first reply takes, and the reply; (0, None) while it is not complete.

    What a follow connection is sent is an array of bulk strings and integers, or one line for an error."""
    reader = hiredis.Reader()
    end, wanted = 0, 1
    while wanted:
        line_end = data.find(b"\r\n", end)
        if line_end < 0:
            return 0, None
        kind, number = data[end : end + 1], data[end + 1 : line_end]
        end = line_end + 2
        wanted -= 1
        if kind == b"*":
            wanted += int(number)
        elif kind == b"$":
            end += int(number) + 2
        if end > len(data):
            return 0, None
    reader.feed(data[:end])
    return end, reader.gets()
