"""Cursors: where a reader stands in a stream, and whether the journal still agrees.

A frame's id is `<seq>-<ms>`. `seq` is contiguous, so a hole is seen; `ms` makes the id
self-checking: a cursor whose exact id is not in the journal where it should be was given out in
another life of the stream (recreated, failed over, restored).
"""

from __future__ import annotations

import enum
import re
from typing import NamedTuple

from relay.errors import MalformedCursor, ResumeUnknown

# Redis Stream ids are two unsigned 64-bit numbers; 18 digits always fit a signed one, which SQLite needs.
_CURSOR = re.compile(r"(0|[1-9][0-9]{0,17})-(0|[1-9][0-9]{0,17})", re.ASCII)
_RESUME_ID = re.compile(r"rly\.([A-Za-z0-9_-]{22,64})\.(\S+)", re.ASCII)

RESUME_PREFIX = "rly."


class Cursor(NamedTuple):
    """The id of the last frame a reader has: `seq` counts frames from 1, `ms` is the journal's clock."""

    seq: int
    ms: int

    def __str__(self) -> str:
        return f"{self.seq}-{self.ms}"


ORIGIN = Cursor(0, 0)
"""Before the first frame."""


def parse_cursor(text: str) -> Cursor:
    """Read `<seq>-<ms>`; raises `MalformedCursor`."""
    match = _CURSOR.fullmatch(text)
    if match is None:
        raise MalformedCursor("A cursor is <seq>-<ms>, as in 42-1763726400860.")
    cursor = Cursor(int(match[1]), int(match[2]))
    if cursor.seq == 0 and cursor != ORIGIN:
        raise MalformedCursor("The only cursor before the first frame is 0-0.")
    return cursor


class ResumeId(NamedTuple):
    """`rly.<token>.<seq>-<ms>`: the id a proxied frame carries. The token is a secret of the run."""

    token: str
    cursor: Cursor


def parse_resume_id(text: str) -> ResumeId:
    """Read a resume id; raises `ResumeUnknown`, never falls back to a new answer."""
    match = _RESUME_ID.fullmatch(text)
    if match is None:
        raise ResumeUnknown("This is not a resume id that relay gave out.")
    try:
        return ResumeId(match[1], parse_cursor(match[2]))
    except MalformedCursor:
        raise ResumeUnknown("This is not a resume id that relay gave out.") from None


class Extent(NamedTuple):
    """What a journal holds of one stream: frames `earliest_seq`..`top.seq`, none when `earliest_seq` is past
    the top. `created_ms` is when this life of the stream began, on the journal's clock."""

    created_ms: int
    earliest_seq: int
    top: Cursor

    @property
    def before_earliest(self) -> Cursor:
        """The position from which the earliest frame is the next one."""
        if self.earliest_seq <= 1:
            return ORIGIN
        return Cursor(self.earliest_seq - 1, self.created_ms)


class Standing(enum.Enum):
    """What the journal says of a cursor."""

    HERE = "here"
    """Everything after it is still held."""
    GAP = "gap"
    """Frames after it were trimmed away."""
    RECREATED = "recreated"
    """It is from before this life of the stream."""
    DIVERGED = "diverged"
    """The journal holds another frame in its place: it was rewound and written on."""
    AHEAD = "ahead"
    """The journal does not reach so far."""

    @property
    def same_life(self) -> bool:
        """Whether the cursor was given out in this life of the stream, even if frames after it are gone."""
        return self in (Standing.HERE, Standing.GAP)


def judge(cursor: Cursor, extent: Extent, anchor_ms: int | None) -> Standing:
    """Judge a cursor. `anchor_ms` is the `ms` of the frame held at `cursor.seq`, None where none is held."""
    if cursor.seq == 0:
        return Standing.HERE if extent.earliest_seq <= 1 else Standing.GAP
    if anchor_ms == cursor.ms:
        return Standing.HERE
    if cursor.ms < extent.created_ms:
        return Standing.RECREATED
    if cursor.seq > extent.top.seq:
        return Standing.AHEAD
    if anchor_ms is not None:
        return Standing.DIVERGED
    if cursor.seq == extent.top.seq and cursor.ms not in (extent.top.ms, extent.created_ms):
        return Standing.DIVERGED  # all frames are trimmed, but the last id is known
    return Standing.HERE if cursor.seq == extent.earliest_seq - 1 else Standing.GAP
