"""The keys of the journal in Redis, and its channels.

Every key of a stream carries its hash tag, and no script touches two streams, so that Redis Cluster stays
open. An entry of the Redis Stream is a frame and its id is the frame's id; everything else is derived:

    <prefix>:{<stream>}:frames     the frames: r run, e event, d data
    <prefix>:{<stream>}:meta       what stream.lua keeps of it
    <prefix>:{<stream>}:run:<run>  a run: status, writer, counters, how it ended
    <prefix>:{<stream>}:runs       every run by the seq before its first frame; `open` those not ended
    <prefix>:{<stream>}:index      sparse: cumulative data bytes up to a seq, for retention by bytes
    <prefix>:{<stream>}:undelivered  runs whose end is to be delivered and is not yet, as `runs`
    <prefix>:{<stream>}:tombstone  the last ms of a deleted stream, which its next life must exceed

Outside the tag, written by separate commands and never trusted without looking at the stream or run, which a
member "<stream> <run>" names:

    <prefix>:streams               names, for listing
    <prefix>:token:<token>         stream and run of a resume token
    <prefix>:owners                processes that may own runs
    <prefix>:owner:<name>          the lease of one: there while it lives
    <prefix>:owned:<name>          runs that it may own
    <prefix>:due                   other runs by when one has to look at them, in ms
    <prefix>:ended                 the newest ENDED_MAX endings by their ms: "<seq> <stream> <run>"
    <prefix>:deliveries            runs by when their end is next to be delivered, in ms

and alone, because nothing is derived from it:

    <prefix>:claim:<key>           who holds an idempotency key, and what it led to
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

KNOWN_STREAMS_MAX = 10_000
"""Streams whose keys, and largest frame, are remembered."""


class StreamKeys(NamedTuple):
    """The keys of one stream, and the channel of its followers."""

    frames: bytes
    meta: bytes
    byte_index: bytes
    open: bytes
    runs: bytes
    undelivered: bytes
    tombstone: bytes
    run_prefix: bytes
    channel: bytes

    def run(self, run: str) -> bytes:
        """The key of one run."""
        return self.run_prefix + run.encode()


class Keys:
    """The keys of one journal; `of` gives those of a stream. Channels are of one database, keys need not be
    told so."""

    def __init__(self, prefix: str, db: int) -> None:
        self._prefix = prefix
        self._db = db
        self.of = lru_cache(KNOWN_STREAMS_MAX)(self._of)
        self.streams = self._named("streams")
        self.owners = self._named("owners")
        self.due = self._named("due")
        self.ended = self._named("ended")
        self.deliveries = self._named("deliveries")

    def _of(self, stream: str) -> StreamKeys:
        names = ("frames", "meta", "index", "open", "runs", "undelivered", "tombstone", "run:")
        channel = f"{self._prefix}:{self._db}:follow:{{{stream}}}"
        return StreamKeys._make([*(self._named(f"{{{stream}}}:{name}") for name in names), channel.encode()])

    def owner(self, name: str) -> bytes:
        """A process's lease."""
        return self._named(f"owner:{name}")

    def owned(self, owner: str) -> bytes:
        """The runs that a process may own."""
        return self._named(f"owned:{owner}")

    def token(self, token: str) -> bytes:
        """Whose a resume token is."""
        return self._named(f"token:{token}")

    def claim(self, key: str) -> bytes:
        """Who holds an idempotency key."""
        return self._named(f"claim:{key}")

    def owner_channel(self, owner: str) -> bytes:
        """Where a process is told that a run of its own is over."""
        return f"{self._prefix}:{self._db}:owner:{owner}".encode()

    def _named(self, name: str) -> bytes:
        return f"{self._prefix}:{name}".encode()


def member_of(stream: str, run: str) -> str:
    """A run's name in an index of several streams."""
    return f"{stream} {run}"


def named_by(member: bytes) -> tuple[str, str]:
    """Stream and run of a member of such an index."""
    stream, _, run = member.decode().partition(" ")
    return stream, run
