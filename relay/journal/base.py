"""The journal: what a backend promises, whichever it is.

A journal keeps streams of frames. It is the only place where order and ids are decided, and the only
truth about what was said: everything a reader gets came out of it. Two backends, `redis_streams` and
`sqlite`, are held to one contract (tests/contract).

Every operation either happens as a whole or not at all. `JournalUnavailable` means that the outcome is not
known: the operation may have happened. Each of them is therefore safe to repeat.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from relay.cursor import Cursor, Extent
from relay.frame import Event, Frame
from relay.lifecycle import Ending, Status
from relay.limits import Retention


@dataclass(frozen=True, slots=True)
class RunOpening:
    """A run to open, and the stream to create for it if there is none.

    `writer` is the fencing token its appends must carry; `token` is the secret in its resume ids;
    `metadata` is JSON text or empty; `answer` is what a later response for this run must look like (opaque
    text, not shown to readers). `retention` and `seal` apply only when this creates the stream:
    a sealed stream takes no further run.
    """

    stream: str
    run: str
    writer: str
    token: str
    retention: Retention
    dialect: str = ""
    metadata: str = ""
    answer: str = ""
    seal: bool = False


class Opened(NamedTuple):
    """`start` is the position from which the run's first frame, `run.started`, is the next one."""

    start: Cursor
    first: Cursor


@dataclass(frozen=True, slots=True)
class Append:
    """A batch of one run's frames, and perhaps its ending in the same step.

    `producer_seq` numbers the first event, counting the run's data frames from 1: events numbered at or
    below what the run already has are duplicates and are not journaled again. `text_bytes` is how many
    bytes of shown text all the events carry together; what is counted of a batch that was partly there is
    the share of its new events. `dialect`, when not empty, becomes the run's.
    """

    stream: str
    run: str
    writer: str
    producer_seq: int
    events: Sequence[Event] = ()
    text_bytes: int = 0
    dialect: str = ""
    ending: Ending | None = None


class Appended(NamedTuple):
    """`last` is the stream's last id after the operation; `appended` counts data frames journaled now,
    `duplicates` those that were there already; `next_seq` is the producer sequence the run expects next."""

    last: Cursor
    appended: int
    duplicates: int
    next_seq: int


class Page(NamedTuple):
    """Consecutive frames after a cursor, as many as the bounds allow; one at least if there is any.

    `anchor_ms` is the `ms` of the frame held at the cursor's own seq, None where none is held.
    `extent` is what the stream holds, read in the same instant. `more` says the page was cut by a bound.
    """

    extent: Extent
    anchor_ms: int | None
    frames: Sequence[Frame]
    more: bool


@dataclass(frozen=True, slots=True)
class RunInfo:
    """A run as the journal knows it.

    `start` is the position before its first frame, `last` its newest frame, `last_data` the seq of its newest
    data frame (0: none). `frames` counts data frames, so the producer sequence the run expects next is
    `frames + 1`. Endings outlive the frames, while the stream lives."""

    run: str
    status: Status
    start: Cursor
    last: Cursor
    last_data: int
    frames: int
    text_bytes: int
    started_ms: int
    ended_ms: int = 0
    reason: str = ""
    error: str = ""
    dialect: str = ""
    metadata: str = ""
    answer: str = ""
    token: str = ""


@dataclass(frozen=True, slots=True)
class StreamInfo:
    """A stream as the journal knows it. `open_runs` and `latest_run` are run names, oldest first;
    `last_data` is the seq of its newest data frame (0: none); `bytes_held` counts data of frames held."""

    stream: str
    extent: Extent
    sealed: bool
    open_runs: Sequence[str]
    latest_run: str
    last_data: int
    runs: int
    bytes_held: int
    retention: Retention
    metadata: str = ""
    active_ms: int = 0

    @property
    def finished(self) -> bool:
        """Nothing more will come: sealed, and no run is open."""
        return self.sealed and not self.open_runs


class Claim(NamedTuple):
    """What stands under an idempotency key.

    `state` is `won` (the caller holds the key now and must settle or release it), `pending` (another
    request holds it), `settled` (it led to `stream` and `run`) or `mismatch` (it was used with another body).
    """

    state: str
    stream: str = ""
    run: str = ""


class Follower(Protocol):
    """Who is told of appends. Called on the event loop's thread; must not block and must not raise."""

    def on_frames(self, stream: str, previous: Cursor, frames: Sequence[Frame]) -> None:
        """Frames were appended directly after `previous`. A hint: it may be lost, repeated or late."""

    def on_deleted(self, stream: str) -> None:
        """The stream was deleted."""

    def on_doubt(self, stream: str) -> None:
        """Appends may have been missed, or following has only now begun: read the journal."""


class Journal(Protocol):
    """What a journal does. One object a process; safe to use from one event loop."""

    async def start(self, follower: Follower) -> None:
        """Connect, check that the store can be used, and begin to tell `follower` of watched streams.
        Raises `StartupError` with advice."""

    async def close(self) -> None:
        """Release everything. What was accepted stays accepted."""

    async def open_run(self, opening: RunOpening) -> Opened:
        """Open a run and journal its `run.started`; create the stream if there is none.

        Repeated with the same run and writer it answers as the first time. Raises `RunExists` for the same
        run with another writer, `StreamSealed`."""

    async def append(self, batch: Append) -> Appended:
        """Journal a batch after the stream's last frame, ids contiguous, then apply retention.

        Duplicates are dropped before the run's status is checked, and an ending equal (status and reason) to
        the one the run already has is a duplicate too, so a retry whose first try ended the run succeeds.
        Raises, in this order of precedence, `UnknownStream`, `UnknownRun`, `Fenced` (another writer),
        `SequenceGap` with `expected`, `RunEnded` with `run_status` and `reason`; `JournalRefused`."""

    async def read(self, stream: str, after: Cursor, max_frames: int, max_bytes: int) -> Page:
        """Read frames with seq greater than `after.seq`. Raises `UnknownStream`."""

    async def describe(self, stream: str) -> StreamInfo:
        """Raises `UnknownStream`."""

    async def run(self, stream: str, run: str) -> RunInfo:
        """Raises `UnknownStream`, `UnknownRun`."""

    async def streams(self, after: str, limit: int) -> Sequence[StreamInfo]:
        """Streams by name, those after `after`, `limit` at most."""

    async def tops(self, streams: Sequence[str]) -> Mapping[str, Cursor]:
        """Last ids of many streams at once; one that does not exist is left out."""

    async def trim(self, stream: str, before_seq: int) -> None:
        """Drop frames with seq less than `before_seq`. Raises `UnknownStream`."""

    async def delete(self, stream: str) -> None:
        """Remove the stream, its runs and frames; tell followers. Unknown streams are no error.
        A stream made later under the same name has other ids, whatever the clock does."""

    async def resolve_token(self, token: str) -> tuple[str, str] | None:
        """The stream and run a resume token belongs to."""

    def watch(self, stream: str) -> None:
        """Tell the follower of this stream from now on; calls `on_doubt` once that is in force."""

    def unwatch(self, stream: str) -> None:
        """Stop telling the follower of this stream."""

    async def watchers(self, stream: str) -> int:
        """How many relay processes watch this stream now."""

    async def claim(self, key: str, body_digest: str, owner: str, lease_s: float, keep_s: float) -> Claim:
        """Claim an idempotency key for `lease_s`, or renew the owner's own claim. An unrenewed pending claim
        lapses; a settled one is kept `keep_s`."""

    async def settle(self, key: str, owner: str, stream: str, run: str) -> None:
        """Say which run the owner's claimed key led to. Does nothing if the claim is another's now."""

    async def release(self, key: str, owner: str) -> None:
        """Give up the owner's pending claim. Does nothing when it is no longer the owner's."""

