"""Trace context (W3C Trace Context): which request of a user's a line of the log belongs to.

relay passes a caller's `traceparent` on to upstream as it is, like any other header, and makes one for runs
that it calls upstream for by itself. It records no spans.
"""

from __future__ import annotations

import re
from contextvars import ContextVar

HEADER = b"traceparent"

TRACE_ID: ContextVar[str] = ContextVar("relay_trace_id", default="")
"""The trace of the request that is served, and of everything that it began: a run's pump outlives it. Empty
for a request that is of none."""

RANDOM_BYTES = 24

# Section 3.2.2. A later version may have more behind the flags.
_TRACEPARENT = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?"
)


def trace_id_of(traceparent: str) -> str:
    """The trace that a header names, as 32 hexadecimal digits; "" for a header that is none."""
    found = _TRACEPARENT.fullmatch(traceparent.strip())
    if found is None or (found[2] and traceparent.startswith("00")):
        return ""
    return found[1]


def new_traceparent(random: bytes) -> str:
    """The header of a new trace, of `RANDOM_BYTES` bytes. It is sampled: otherwise those who go by what their
    caller decided would record nothing of these runs."""
    digits = random.hex()
    return f"00-{digits[:32]}-{digits[32:]}-01"
