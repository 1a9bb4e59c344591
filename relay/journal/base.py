"""The journal: what a backend promises, whichever it is.

A journal keeps streams of frames. It is the only place where order and ids are decided, and the only
truth about what was said: everything a reader gets came out of it. Two backends, `redis_streams` and
`sqlite`, are held to one contract (tests/contract).

Every operation either happens as a whole or not at all. `JournalUnavailable` means that the outcome is not
known: the operation may have happened. Each of them is therefore safe to repeat.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from relay.cursor import ORIGIN, Cursor, Extent
from relay.frame import Event, Frame
from relay.lifecycle import Ending, Reason, Status
from relay.limits import Retention


@dataclass(frozen=True, slots=True)
class RunOpening:
    """A run to open, and the stream to create for it if there is none.

    `writer` is the fencing token its appends must carry; `token` is the secret in its resume ids;
    `metadata` is JSON text or empty; `answer` is what a later response for this run must look like (opaque
    text, not shown to readers; empty for a run that was not proxied). `retention` applies only when this
    creates the stream; `seal` makes this the last run of the stream.

    A run with an `owner` lives as long as that process does; one without is lost when nothing was heard of it
    for `idle_timeout_s` (0: never), or cancelled when it is older than `max_run_s` (0: never).

    `supersedes` names runs of this stream, or `latest`; `if_busy` says what to do when runs are open:
    `allow`, `reject`, or `supersede` them all. `error_events` is as for `Journal.end_run`. `deliver` asks for
    the run's end to be queued for delivery.
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
    owner: str = ""
    idle_timeout_s: float = 0
    max_run_s: float = 0
    supersedes: Sequence[str] = ()
    if_busy: str = "allow"
    error_events: Mapping[str, Event] = field(default_factory=dict)
    deliver: bool = False


class Opened(NamedTuple):
    """`start` is the position from which the run's first frame, `run.started`, is the next one, `first` the
    id of that frame, `last` the id of the last frame journaled in the step.

    `superseded` are the runs that this one superseded: first those that were open until then, and in each
    half the oldest first. `frames_after` counts frames of other runs that stood at or after the start of the
    first of them, and `runs_after` names some of those runs (64 at most)."""

    start: Cursor
    first: Cursor
    last: Cursor
    superseded: Sequence[str] = ()
    frames_after: int = 0
    runs_after: Sequence[str] = ()

    @property
    def ended(self) -> Sequence[str]:
        """The superseded runs that were open until then."""
        # The new run holds one `run.superseded` for each of those that had ended before.
        return self.superseded[: len(self.superseded) - (self.last.seq - self.first.seq)]


@dataclass(slots=True)  # frozen it would take three times as long to make, which is once a frame
class Append:
    """A batch of one run's frames, and perhaps its ending in the same step. Nobody changes it.

    `producer_seq` numbers the first event, counting the run's data frames from 1: events numbered at or
    below what the run already has are duplicates and are not journaled again. 0 leaves them unnumbered: they
    are journaled whatever was before, so such an append alone is not safe to repeat. `text_bytes` is how many
    bytes of shown text all the events carry together; what is counted of a batch that was partly there is
    the share of its new events. `dialect` and `answer`, when not empty, become the run's. `error_event` is
    what relay itself says before the terminal frame: journaled with the ending, neither numbered nor counted.

    `acknowledged` is the id of the run's newest frame as its writer knows it (`ORIGIN`: it does not say).
    """

    stream: str
    run: str
    writer: str
    producer_seq: int
    events: Sequence[Event] = ()
    text_bytes: int = 0
    dialect: str = ""
    ending: Ending | None = None
    error_event: Event | None = None
    answer: str = ""
    acknowledged: Cursor = ORIGIN


class Appended(NamedTuple):
    """`last` is the id of the run's newest frame after the operation; the frames of one batch are contiguous
    and share their `ms`. `appended` counts the batch's events journaled now, `duplicates` those that were
    there already; `next_seq` is the producer sequence the run expects next."""

    last: Cursor
    appended: int
    duplicates: int
    next_seq: int


class Held(NamedTuple):
    """Frames of one append, as its writer still holds them: the id of the first, the producer sequence of the
    first (0: this is `run.started`, and `events` is that frame), the events, their bytes of shown text.
    `error_event` and `ending` are as in `Append`, for the append that ended the run; their frames follow
    those of the events, and the run ends again."""

    first: Cursor
    producer_seq: int
    events: Sequence[Event]
    text_bytes: int
    error_event: Event | None = None
    ending: Ending | None = None


class TakenOver(NamedTuple):
    """`next_seq` is the producer sequence the run expects next, `last` the id of its newest frame."""

    next_seq: int
    last: Cursor


class Ended(NamedTuple):
    """How a run ended, and whether it was this operation that ended it. `owner` is the process that held it,
    `text_bytes` what it says it shows."""

    by_this: bool
    status: Status
    reason: str
    owner: str = ""
    text_bytes: int = 0


class RunState(NamedTuple):
    """What a run's owner, or its producer, has to know of it. `last` is the id of its newest frame."""

    status: Status
    reason: str
    writer: str
    last: Cursor


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
    data frame (0: none). `frames` counts the data frames of its producer, so the producer sequence the run
    expects next is `frames + 1`. `owner` and `idle_timeout_s` are as in `RunOpening`; `heard_ms` is when the
    run was last heard of. `superseded_by` names the run that replaced it, whether or not it had ended.
    Endings outlive the frames, while the stream lives."""

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
    owner: str = ""
    idle_timeout_s: float = 0
    heard_ms: int = 0
    superseded_by: str = ""


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

    @property
    def current_run(self) -> str:
        """The newest open run, or "" when none is open."""
        return self.open_runs[-1] if self.open_runs else ""


class StreamChange(NamedTuple):
    """What a caller wants a stream to be; None leaves a member as it is, or as the default has it."""

    max_frames: int | None = None
    max_bytes: int | None = None
    retention_s: int | None = None
    metadata: str | None = None


class StreamTop(NamedTuple):
    """The last id of a stream, and whether it takes no further run."""

    id: Cursor
    sealed: bool


class Renewal(NamedTuple):
    """`unbroken` says that the lease had not lapsed before; `now_ms` is the journal's clock."""

    unbroken: bool
    now_ms: int


class EndedRun(NamedTuple):
    """A run in the order of endings. `place` is where to go on listing after it."""

    place: str
    stream: str
    info: RunInfo


class Delivery(NamedTuple):
    """A run whose end is to be delivered, and how often that was tried before."""

    stream: str
    run: str
    tries: int


class Orphan(NamedTuple):
    """A run that a former process left open and that ended when its journal was opened."""

    stream: str
    run: str
    ended: Ended


@dataclass(frozen=True, slots=True)
class Condition:
    """How the store is. `kind` is `redis` or `sqlite`; `now_ms` is the journal's clock; `waiting_since_ms` is
    when the run ended whose delivery waits longest (0: none waits). `details` is what else the store says of
    itself, by name."""

    kind: str
    version: str
    now_ms: int
    waiting_since_ms: int
    details: Mapping[str, str | int | bool | None]


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
        """The stream was deleted. The endings of its open runs were told just before."""

    def on_sealed(self, stream: str) -> None:
        """The stream takes no further run."""

    def on_doubt(self, stream: str) -> None:
        """Appends may have been missed, or following has only now begun: read the journal."""


class RunOwner(Protocol):
    """This process as the owner of runs."""

    name: str
    """Unguessable, and made anew by every process, so that no process is ever taken for another."""

    def on_run_over(self, stream: str, run: str) -> None:
        """A run that this process owns was ended or taken over by somebody else. A hint, as for
        `Follower`."""


class Journal(Protocol):
    """What a journal does. One object a process; safe to use from one event loop."""

    async def start(self, follower: Follower, owner: RunOwner | None = None) -> Sequence[Orphan]:
        """Connect, check that the store can be used, and begin to tell `follower` of watched streams, and
        `owner` of its runs. A journal that belongs to one process ends here what a former one left open, as
        `lost owner_lost`, and tells of it. Raises `StartupError` with advice."""

    async def close(self) -> None:
        """Release everything. What was accepted stays accepted."""

    @property
    def replaced_at(self) -> float:
        """When this process last found another store than before (failover, restart), on the loop's clock:
        it may have less, until writers put that back. `-inf` for never."""

    @property
    def reconnects(self) -> int:
        """How often a connection to the store was opened again."""

    async def condition(self) -> Condition:
        """How the store is now. Raises `JournalError`."""

    # Streams

    async def put_stream(self, stream: str, retention: Retention, change: StreamChange) -> bool:
        """Create a stream without frames, with `retention` where `change` does not say, or apply `change` to
        the one there is. True when it was created."""

    async def seal(self, stream: str) -> None:
        """Take no further run; tell followers. Safe to repeat. Raises `UnknownStream`."""

    async def trim(self, stream: str, before_seq: int) -> None:
        """Drop frames with seq less than `before_seq`. Raises `UnknownStream`."""

    async def delete(self, stream: str) -> Sequence[str]:
        """End its open runs `cancelled stream_deleted`, then remove the stream, its runs and frames; tell
        followers and owners. Which runs it ended. Unknown streams are no error. Nothing of it is delivered.
        A stream made later under the same name has other ids, whatever the clock does."""

    # Runs

    async def open_run(self, opening: RunOpening) -> Opened:
        """Open a run and journal its `run.started`; create the stream if there is none.

        All in one step: runs to be superseded that are still open are told so by `run.superseded`, and end
        `cancelled superseded`; the new run is opened; for those that had ended before, `run.superseded`
        follows its `run.started`, as a frame of the new run, because a terminal frame stays the last of its
        run.

        Repeated with the same run and writer it answers as the first time and changes nothing. Raises, in
        this order of precedence, `RunExists` for the same run with another writer, `StreamSealed`,
        `StreamBusy` with `open_runs` (only if `if_busy` is `reject`), `UnknownRun` for a run to be superseded
        that the stream does not have (`latest` of a stream without runs is none)."""

    async def append(self, batch: Append) -> Appended:
        """Journal a batch after the stream's last frame, ids contiguous, then apply retention.

        Duplicates are dropped before the run's status is checked, and an ending equal (status and reason) to
        the one the run already has is a duplicate too, so a retry whose first try ended the run succeeds.
        Raises, in this order of precedence, `Rewound` with `last_seq` when the journal has less of the run
        than was `acknowledged` (0: it does not know the run), `UnknownStream`, `UnknownRun`, `Fenced`
        (another writer), `SequenceGap` with `expected`, `RunEnded` with `run_status` and `reason`;
        `JournalRefused`."""

    async def restore(self, opening: RunOpening, held: Held) -> None:
        """Put frames back under the ids they had, into a journal that lost them. Does nothing for those it
        has.

        Only what comes directly after the stream's last frame can be put back; raises `Rewound` with
        `last_seq`, the stream's last, while frames in between are missing, and `Diverged` when the journal
        holds other frames in their place. Raises `Fenced`, `RunEnded` too."""

    async def take_over(self, stream: str, run: str, writer: str, idle_timeout_s: float) -> TakenOver:
        """Make `writer` the run's fencing token, and nobody its owner. A run that had an owner gets
        `idle_timeout_s`. The former owner is told. Safe to repeat. Raises `UnknownStream`, `UnknownRun`,
        `RunEnded` with `run_status` and `reason`."""

    async def hear_of(self, stream: str, run: str, writer: str) -> RunState:
        """Keep a silent run from its idle timeout. An ended run is no error. Raises `UnknownStream`,
        `UnknownRun`, `Fenced`."""

    async def end_run(
        self, stream: str, run: str, ending: Ending, error_events: Mapping[str, Event], *, owner: str = ""
    ) -> Ended:
        """End a run whoever its writer is, if it is open and (unless `owner` is empty) still owned so.

        If the run was proxied and its dialect is in `error_events`, that event is journaled before the
        terminal frame. The run's owner is told. Raises `UnknownStream`, `UnknownRun`."""

    async def run(self, stream: str, run: str) -> RunInfo:
        """Raises `UnknownStream`, `UnknownRun`."""

    async def runs(self, stream: str, after: str, limit: int) -> Sequence[RunInfo]:
        """The stream's runs in the order they were opened, those after run `after`, or all for an empty one.
        Raises `UnknownStream`, `UnknownRun` for one to begin after that is not there."""

    async def states(self, runs: Sequence[tuple[str, str]]) -> Sequence[RunState | None]:
        """What became of many runs (stream, run) at once; None for one that is not there."""

    # Liveness. Every index here is a hint, written before the run it leads to: the run itself decides.

    async def renew(self, owner: str, lease_s: float) -> Renewal:
        """Say that a process lives for another `lease_s`."""

    async def resign(self, owner: str) -> None:
        """Give up a lease. What the process still owns is lost."""

    async def lapsed_owners(self) -> Sequence[str]:
        """Processes that may own open runs and hold no lease now. Costs O(processes)."""

    async def owned(self, owner: str, limit: int) -> Sequence[tuple[str, str]]:
        """Runs (stream, run) that a process may own, `limit` at most."""

    async def due_runs(self, limit: int) -> Sequence[tuple[str, str]]:
        """Runs without an owner that may be past their idle timeout or their greatest age, `limit` at
        most."""

    async def end_due(
        self,
        stream: str,
        run: str,
        reachable_since_ms: int,
        error_events: Mapping[Reason, Mapping[str, Event]],
    ) -> Ended | None:
        """End a run without an owner if it is silent beyond its idle timeout (`lost idle_timeout`) or too old
        (`cancelled max_run`), on the journal's clock; silence counts from `reachable_since_ms` at the
        earliest. None when it is not due: then it is listed again when it will be. An unknown run is not
        listed again."""

    async def file_ending(self, stream: str, run: str) -> None:
        """Do what follows an ending: list it, queue its delivery, drop it from the indexes of open runs. A
        journal does so itself after each ending; who finds an ended run in an index does it again. Does
        nothing for an open run; an unknown one is dropped from the indexes."""

    async def reindex(self, after: str, limit: int) -> str:
        """Write the hints of open runs in up to `limit` streams after that name; where to go on, "" at the
        end."""

    async def ended_runs(self, ended_after_ms: int, after: str, limit: int) -> Sequence[EndedRun]:
        """Runs that ended after that time, in the order of their endings; after `after`, the `place` of
        another, if it is not empty. Complete for the newest 100,000 endings. Raises `InvalidParameter` for
        what is no such place."""

    # Delivery of endings

    async def claim_deliveries(self, limit: int, lease_s: float) -> Sequence[Delivery]:
        """Ended runs whose delivery is due; nobody else is given them for `lease_s`. While one is not
        settled, retention by count and bytes spares the run's frames, up to twice its bounds."""

    async def settle_delivery(self, stream: str, run: str) -> None:
        """The run's end was delivered, or given up."""

    async def postpone_delivery(self, stream: str, run: str, delay_s: float) -> None:
        """A try failed; the next is due after `delay_s`."""

    # Reading

    async def read(self, stream: str, after: Cursor, max_frames: int, max_bytes: int) -> Page:
        """Read frames with seq greater than `after.seq`. Raises `UnknownStream`."""

    async def describe(self, stream: str) -> StreamInfo:
        """Raises `UnknownStream`."""

    async def streams(self, after: str, limit: int) -> Sequence[StreamInfo]:
        """Streams by name, those after `after`, `limit` at most."""

    async def tops(self, streams: Sequence[str]) -> Mapping[str, StreamTop]:
        """Where many streams stand; one that does not exist is left out."""

    async def resolve_token(self, token: str) -> tuple[str, str] | None:
        """The stream and run a resume token belongs to."""

    # Following

    def watch(self, stream: str) -> None:
        """Tell the follower of this stream from now on; calls `on_doubt` once that is in force."""

    def unwatch(self, stream: str) -> None:
        """Stop telling the follower of this stream."""

    async def watchers(self, stream: str) -> int:
        """How many relay processes watch this stream now."""

    # Idempotency keys

    async def claim(self, key: str, body_digest: str, owner: str, lease_s: float, keep_s: float) -> Claim:
        """Claim an idempotency key for `lease_s`, or renew the owner's own claim. An unrenewed pending claim
        lapses; a settled one is kept `keep_s`."""

    async def settle(self, key: str, owner: str, stream: str, run: str) -> None:
        """Say which run the owner's claimed key led to. Does nothing if the claim is another's now."""

    async def release(self, key: str, owner: str) -> None:
        """Give up the owner's pending claim. Does nothing when it is no longer the owner's."""
