"""What a process counts while it works, in plain numbers.

Things are counted with every append and every flush, where a metric's own way to do it (labels looked up, a
lock, with several workers a file) would cost several microseconds a time. So they are counted here, and moved
into the metrics when somebody looks: at a scrape, or, with several workers, each second.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from operator import itemgetter

from relay.frame import Event

_DATA_OF = itemgetter(Event._fields.index("data"))

PROXIED = "proxied"
"""A run whose answer relay reads from upstream."""

PUSHED = "pushed"
"""A run whose frames its producer hands over."""

SOURCES = (PROXIED, PUSHED)

DELIVERED, RETRIED, GIVEN_UP = DELIVERY_OUTCOMES = ("delivered", "retried", "given_up")

SHORT_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Bounds for what should take milliseconds."""

LONG_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
"""Bounds for what somebody else takes his time for."""

FRAMES = (0.0, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10_000.0, 30_000.0, 100_000.0, 300_000.0)


class Distribution:
    """How values spread: `counts[i]` of them were at most `bounds[i]` and more than the bound before; the
    last count is of those beyond every bound."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.clear()

    def observe(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def clear(self) -> None:
        """Begin anew."""
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0


class Journaled:
    """What the producers of one source brought: runs begun, frames and bytes of data accepted."""

    __slots__ = ("bytes", "frames", "runs")

    def __init__(self) -> None:
        self.runs = self.frames = self.bytes = 0


class Counts:
    """Everything that is counted so. relay.metrics says what each is."""

    def __init__(self) -> None:
        self.journaled = {source: Journaled() for source in SOURCES}
        self.frames_delivered = 0
        self.delivered_bytes = 0
        self.duplicates_suppressed = 0
        self.orphans_reaped = 0
        self.fenced_appends = 0
        self.journal_reconnects = 0
        self.journal_rewinds = 0
        self.ring_hits = 0
        self.journal_pages = 0
        self.webhook_deliveries: Counter[str] = Counter()
        self.refusals: Counter[str] = Counter()
        self.append_duration = Distribution(SHORT_S)
        self.delivery_delay = Distribution(SHORT_S)
        self.replay_frames = Distribution(FRAMES)
        self.upstream_first_frame = Distribution(LONG_S)
        self.cancel_to_end = Distribution(SHORT_S)

    def appended(self, source: str, events: Sequence[Event], new: int, took_s: float) -> None:
        """The journal has a batch, of which `new` events are new to it."""
        self.append_duration.observe(took_s)
        if not events:
            return
        journaled = self.journaled[source]
        journaled.frames += new
        if len(events) != new:
            self.duplicates_suppressed += len(events) - new
            events = events[len(events) - new :]
        if len(events) == 1:
            journaled.bytes += len(events[0].data)
        else:
            journaled.bytes += sum(map(len, map(_DATA_OF, events)))
