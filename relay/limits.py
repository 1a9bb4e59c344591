"""Every bound of the product that is not a setting, and the names that are allowed."""

from __future__ import annotations

import re
from typing import NamedTuple

from relay.errors import InvalidName

_NAME = re.compile(r"[A-Za-z0-9._~:-]{1,200}", re.ASCII)


class Retention(NamedTuple):
    """What a stream keeps. A bound of 0 is none. `retention_s` counts from the last append. A journal may
    keep a hundredth more than 10,000 frames or 6.25 MiB and up, to drop what is too much at once."""

    max_frames: int = 200_000
    max_bytes: int = 64 * 1024 * 1024
    retention_s: int = 24 * 3600


_DOTS = (".", "..")  # clients and proxies resolve these in a path

RUN_WORDS = ("current", "latest")
"""What `run=` understands beside names."""

FRAME_MAX_BYTES = 1024 * 1024
"""Default bound of one frame's data."""

PAGE_MAX_FRAMES = 1000
"""Frames of one journal page; also the largest `limit` of a JSON page."""

PAGE_MAX_BYTES = 4 * FRAME_MAX_BYTES
"""Data bytes after which a journal page is full. The frame that fills it is in it, so a page moves on."""

RETENTION_MAX_S = 100 * 365 * 24 * 3600
"""Longest retention: what comes of it in milliseconds, every journal can still hold as a time."""

WAIT_MAX_S = 60
"""Longest `wait` for a stream that does not exist yet."""

METADATA_MAX_BYTES = 16 * 1024
"""Bound of a stream's or run's metadata, as JSON text."""

OPTIONS_MAX_BYTES = 64 * 1024
"""Largest body that says what to do with a stream or run; metadata is bounded by itself."""

IDLE_TIMEOUT_MAX_S = 7 * 24 * 3600
"""Longest idle timeout that a producer may ask for."""

LAST_EVENT_ID_MAX_BYTES = 512
"""No cursor relay gives out is longer."""


def is_stream_name(name: str) -> bool:
    """Whether a stream can have this name."""
    return _NAME.fullmatch(name) is not None and name not in _DOTS


def check_stream_name(name: str) -> str:
    """Return a stream name unchanged; raises `InvalidName`."""
    if not is_stream_name(name):
        raise InvalidName("A stream name is 1 to 200 characters of A-Z a-z 0-9 . _ ~ : - and not . or ..")
    return name


def check_run_name(name: str) -> str:
    """Return a run name unchanged; raises `InvalidName`."""
    if _NAME.fullmatch(name) is None or name in _DOTS or name in RUN_WORDS:
        raise InvalidName(
            "A run name is 1 to 200 characters of A-Z a-z 0-9 . _ ~ : - and not 'current' or 'latest'."
        )
    return name
