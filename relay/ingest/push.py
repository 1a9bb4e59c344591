"""Pushes: frames that a producer hands over itself, and the runs it opens for them.

A body is journaled while it arrives, one append for what one read of the connection brought, and no more of
it is read while an append waits. What a producer is told is what the journal has accepted: after an error it
goes on from `next_seq`.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

import orjson

from relay.counts import PUSHED, Counts
from relay.cursor import ORIGIN, Cursor
from relay.dialects.base import Dialect
from relay.dialects.detect import BY_NAME, RAW, by_first_event, error_events
from relay.errors import (
    Busy,
    CallerError,
    Fenced,
    FrameTooLarge,
    InvalidEvent,
    JournalError,
    JournalUnavailable,
    KeyReused,
    RelayError,
    RunEnded,
    RunExists,
    SequenceGap,
    UnknownRun,
    UnknownStream,
)
from relay.frame import Event
from relay.ingest.formats import FrameParser
from relay.ingest.opening import SAID_OF_SUPERSEDED, open_run
from relay.ingest.owned import Facts, OnEnded, OwnedRuns
from relay.ingest.proxy import ClientGone, RunWishes
from relay.ingest.writer import RunWriter
from relay.journal.base import Append, Appended, Journal, Opened, RunInfo, RunOpening
from relay.lifecycle import Ending, Reason, Status, ending
from relay.settings import Settings

log = logging.getLogger("relay.push")

APPEND_MAX_FRAMES = 1000
"""Frames of one append; a larger batch is journaled in several."""

HEAR_S = 1.0
"""What comes without a frame in it (a comment, a blank line) keeps a run alive; told to the journal this
often at most."""

KNOWN_MAX = 10_000
"""Runs that are remembered from one request to the next."""

END_RETRY_S = 1.0
"""Pause before an ending that the journal did not take is put to it again."""

DRAINED_S = 5.0
"""How long producers that were sent away may take to be told."""

_HOLDER = "push"

_NOTHING: Mapping[str, Event] = {}


class Piece(NamedTuple):
    """What one read of a request's body brought; `last` says that nothing follows."""

    data: bytes
    last: bool


NextPiece = Callable[[], Awaitable[Piece]]
"""Waits for the next piece of a body; raises `ClientGone` when it broke off."""


# Frames


@dataclass(slots=True)
class Receipt:
    """What the journal accepted of one request: the ids of its first and last frame, how many it appended,
    how many it had already, and the producer sequence that it expects next (None while that is not known)."""

    first: Cursor | None = None
    last: Cursor | None = None
    appended: int = 0
    duplicates: int = 0
    next_seq: int | None = None

    def note(self, done: Appended, behind: int) -> None:
        """Add what one append did; `behind` of its frames are not the producer's."""
        if done.appended:
            seq, ms = done.last.seq - behind, done.last.ms
            self.first = self.first or Cursor(seq - done.appended + 1, ms)
            self.last = Cursor(seq, ms)
        self.appended += done.appended
        self.duplicates += done.duplicates
        self.next_seq = done.next_seq

    def members(self) -> dict[str, Any]:
        """As members of a JSON answer."""
        return {
            "first": None if self.first is None else str(self.first),
            "last": None if self.last is None else str(self.last),
            "appended": self.appended,
            "duplicates": self.duplicates,
            "next_seq": self.next_seq,
        }


class Push:
    """One request's frames on their way into a run.

    `seq` is the producer sequence of the next frame; 0 leaves them unnumbered: an append whose outcome is not
    known is then not repeated. `dialect` is the run's, None when its first event will tell.
    """

    def __init__(
        self,
        journal: Journal,
        writer: RunWriter,
        dialect: Dialect | None,
        seq: int,
        owned: bool,
        counts: Counts,
    ) -> None:
        self.receipt = Receipt()
        self.writer = writer
        self.dialect = dialect
        self.owned = owned
        """Whether the run is this process's, and ends with the request."""
        self.stopped_by: RelayError | None = None
        self.stopped_as: Ending | None = None
        """How the run is to end because of it."""
        self._journal = journal
        self._seq = seq
        self._counts = counts
        self._acknowledged = ORIGIN
        self._task: asyncio.Task[Any] | None = None
        """Reads the body."""
        self._waiting = False
        """Whether it waits for a piece."""
        self._heard_at: float | None = None

    def stop(self, error: RelayError, end: Ending | None = None) -> None:
        """Read no further: what was read is journaled, then `error` is raised."""
        if self.stopped_by is None:
            self.stopped_by, self.stopped_as = error, end
            if self._waiting and self._task is not None:
                self._task.cancel()

    async def take(self, next_piece: NextPiece, parser: FrameParser, end: Ending | None) -> bool:
        """Journal a body while it arrives, and with its last frames the run's ending if one is given. Whether
        this ended the run. Raises what the body, the journal or `stop` says, and `ClientGone`."""
        now = asyncio.get_running_loop().time
        self._task = asyncio.current_task()
        last = ended = False
        while not last:
            data, last = await self._wait_for(next_piece)
            events = parser.feed(data, last)
            whole = last and parser.error is None
            if events or (whole and end is not None) or self._heard_at is None or (
                not last and now() - self._heard_at >= HEAR_S
            ):  # fmt: skip
                ended = await self.append(events, end if whole else None)
                self._heard_at = now()
            if parser.error is not None:
                raise parser.error
        return ended

    async def append(self, events: Sequence[Event], end: Ending | None = None) -> bool:
        """Journal events, and with the last of them the run's ending; whether this ended the run."""
        was_open, said = False, _NOTHING
        if end is not None:
            was_open, said = await self._before(end)
        for begin in range(0, max(1, len(events)), APPEND_MAX_FRAMES):
            batch = events[begin : begin + APPEND_MAX_FRAMES]
            is_last = begin + len(batch) == len(events)
            await self._append(batch, end if is_last else None, said)
        return was_open

    async def _append(self, events: Sequence[Event], end: Ending | None, said: Mapping[str, Event]) -> None:
        writer = self.writer
        text_bytes = self._read(events)
        dialect = "" if self.dialect is None else self.dialect.name
        error_event = None if end is None else said.get(dialect)
        if self._seq or not events:
            if not self.owned:
                # What a journal lost of the run, it asks the producer for: the next frame leaves a gap.
                writer.acknowledged = ORIGIN
            if not writer.lost:
                writer.next_seq = self._seq
            done = await writer.append(events, text_bytes, dialect, end, error_event)
        else:
            began = perf_counter()
            try:
                done = await self._journal.append(
                    Append(
                        writer.stream, writer.run, writer.token, 0, events, text_bytes, dialect, end,
                        error_event, acknowledged=self._acknowledged,
                    )
                )  # fmt: skip
            except (Fenced, RunEnded):
                self._counts.fenced_appends += 1
                raise
            self._counts.appended(PUSHED, events, done.appended, perf_counter() - began)
            self._acknowledged = done.last
        if self._seq:
            self._seq += len(events)
        self.receipt.note(done, (end is not None) + (error_event is not None))

    def _read(self, events: Sequence[Event]) -> int:
        """The bytes of shown text in events."""
        if self.dialect is None and events:
            self.dialect = by_first_event(events[0])
        return 0 if self.dialect is None else self.dialect.text_bytes(events)

    async def _before(self, end: Ending) -> tuple[bool, Mapping[str, Event]]:
        """Whether the run is open; and what relay has to say of such an end, by dialect: something only to
        those who read the run as an answer of upstream's, which was taken over."""
        try:
            info = await self._journal.run(self.writer.stream, self.writer.run)
        except JournalError:
            return True, _NOTHING  # the append will wait for the journal, and most endings are no repetition
        except (UnknownStream, UnknownRun):
            return False, _NOTHING
        if self.dialect is None:
            self.dialect = BY_NAME.get(info.dialect)
        is_answer = bool(info.answer) and end.status is not Status.COMPLETED
        return info.status is Status.OPEN, error_events(end) if is_answer else _NOTHING

    async def _wait_for(self, next_piece: NextPiece) -> Piece:
        if self.stopped_by is not None:
            raise self.stopped_by
        self._waiting = True
        try:
            return await next_piece()
        except asyncio.CancelledError:
            if self.stopped_by is None or self._task is None:
                raise
            self._task.uncancel()
            raise self.stopped_by from None
        finally:
            self._waiting = False


# Runs


@dataclass(frozen=True, slots=True)
class PushOpening:
    """A run that a producer asks for, in a stream. None is the default idle timeout.

    `key` is a digest of an Idempotency-Key and of whose it is, or empty; `digest` is that of the body."""

    stream: str
    wishes: RunWishes
    idle_timeout_s: float | None = None
    key: str = ""
    digest: str = ""

    @property
    def run(self) -> str:
        """The run's name, if the producer gave one or its key does. Named by its key, a run is opened once
        by the journal itself, as long as the journal knows it."""
        return self.wishes.run or (f"key-{self.key[:32]}" if self.key else "")


@dataclass(frozen=True, slots=True)
class Turn:
    """A run as its producer is told of it: `start` is where a reader of it begins. `writer` is empty when it
    has ended; `opened` is what the journal said if this request opened it."""

    stream: str
    run: str
    writer: str
    start: Cursor
    next_seq: int
    status: Status = Status.OPEN
    reason: str = ""
    opened: Opened | None = None


class Pushes:
    """Opens runs for producers and journals what they push.

    `on_ended` is told of every run that ends here.
    """

    def __init__(
        self,
        journal: Journal,
        settings: Settings,
        owned: OwnedRuns,
        on_ended: OnEnded,
    ) -> None:
        self._journal = journal
        self._settings = settings
        self._owned = owned
        self._on_ended = on_ended
        self._counts = owned.counts
        self._doubted: set[tuple[str, str]] = set()
        """Runs that were cancelled here, perhaps: the journal's answer was lost."""
        self._known: dict[tuple[str, str, str], RunOpening] = {}
        self._bodies: dict[Push, asyncio.Task[Any]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._draining = False

    # Opening

    async def open(self, opening: PushOpening) -> Turn:
        """Open a run. One that is there under the name the producer gave, or under its key, is taken over; if
        it has ended, that is the answer. Raises `KeyReused`, `Busy`, and what `Journal.open_run` does."""
        if self._draining:
            raise Busy("This relay is shutting down.")
        await self.check_key(opening)
        wanted = self._wanted(opening)
        stream, run = wanted.stream, wanted.run
        try:
            opened = await self._opened(wanted)
        except RunExists:
            return await self.rejoin(stream, run)
        self._know(stream, run, wanted.writer, wanted.dialect)
        return Turn(stream, run, wanted.writer, opened.start, 1, opened=opened)

    async def rejoin(self, stream: str, run: str) -> Turn:
        """Take a run over, or learn how it ended. Raises `UnknownStream`, `UnknownRun`."""
        try:
            return await self.take_over(stream, run)
        except RunEnded:
            info = await self._journal.run(stream, run)
            return Turn(stream, run, "", info.start, info.frames + 1, info.status, info.reason)

    async def check_key(self, opening: PushOpening) -> None:
        """Raises `KeyReused` for a key that came with another body before. The claim does nothing but
        remember the body: every request renews it, and none waits for it."""
        if opening.key:
            keep_s = self._settings.idempotency_keep_s
            claim = await self._journal.claim(f"push.{opening.key}", opening.digest, _HOLDER, keep_s, keep_s)
            if claim.state == "mismatch":
                raise KeyReused("This Idempotency-Key was sent before with another body.")

    def _wanted(self, opening: PushOpening, owner: str = "") -> RunOpening:
        settings, wishes, idle_timeout_s = self._settings, opening.wishes, opening.idle_timeout_s
        return RunOpening(
            stream=opening.stream,
            run=opening.run or secrets.token_hex(12),
            writer=secrets.token_urlsafe(16),
            token=secrets.token_urlsafe(24),
            retention=settings.retention,
            dialect=wishes.dialect,
            metadata=wishes.metadata,
            seal=wishes.seal,
            owner=owner,
            idle_timeout_s=settings.idle_timeout_s if idle_timeout_s is None else idle_timeout_s,
            max_run_s=settings.max_run_s,
            supersedes=wishes.supersedes,
            if_busy=wishes.if_busy,
            error_events=SAID_OF_SUPERSEDED,
            deliver=bool(settings.webhook_url),
        )

    async def take_over(self, stream: str, run: str) -> Turn:
        """Make a new writer token for an open run. Raises as `Journal.take_over`."""
        writer = secrets.token_urlsafe(16)
        taken = await self._journal.take_over(stream, run, writer, self._settings.idle_timeout_s)
        info = await self._journal.run(stream, run)
        return Turn(stream, run, writer, info.start, taken.next_seq)

    async def _opened(self, wanted: RunOpening) -> Opened:
        opened = await open_run(self._journal, wanted, self._settings.journal_timeout_s, self._on_ended)
        self._counts.journaled[PUSHED].runs += 1
        return opened

    # Frames

    async def push(
        self,
        stream: str,
        run: str,
        writer: str,
        seq: int,
        frames: Sequence[Event] | FrameParser,
        next_piece: NextPiece,
        end: Ending | None,
    ) -> Receipt:
        """Append frames to an open run, numbered from `seq` (0: not numbered), and end it with the last of
        them: what is given, or what `next_piece` brings to a parser. Raises what the body and the journal
        say, and `Busy` when this process is shutting down before the body was; each with the receipt's
        members."""
        push = self._push(await self._run(stream, run, writer), seq)
        try:
            if isinstance(frames, FrameParser):
                ended = await self._take(push, next_piece, frames, end)
            else:
                ended = await push.append(frames, end)
        except RelayError as error:
            _add_receipt(error, push.receipt)
            raise
        if ended and end is not None:
            await self._count(push.writer.stream, push.writer.run, end)
        return push.receipt

    async def push_whole(
        self,
        opening: PushOpening,
        parser: FrameParser,
        next_piece: NextPiece,
        end: Ending,
    ) -> tuple[Turn, Receipt]:
        """Make a run of one body: open it, journal the body while it arrives, end it.

        A run that the producer can name again, by its own name or by its key, stays open when the body breaks
        off: the same request again goes on with it, and what is there already is not journaled twice. Any
        other run ends at once, and is owned by this process until then. One that has ended already is the
        answer, whatever the body says.
        """
        if not opening.run:
            return await self._push_owned(opening, parser, next_piece, end)
        stream = opening.stream
        turn = await self.open(opening)
        if not turn.writer:
            return turn, Receipt(next_seq=turn.next_seq)
        push = self._push(await self._run(stream, turn.run, turn.writer), 1)
        try:
            ended = await self._take(push, next_piece, parser, end)
        except CallerError as error:
            failed = _failed_by(error)
            if failed is not None:
                try:
                    await self._end(push, failed)
                except JournalError as away:
                    log.warning("run stays open stream=%s run=%s: %s", stream, turn.run, away)
            _add_receipt(error, push.receipt, turn.run)
            raise
        except RelayError as error:
            _add_receipt(error, push.receipt, turn.run)
            raise
        if ended:
            await self._count(push.writer.stream, push.writer.run, end)
        return replace(turn, status=end.status, reason=end.reason), push.receipt

    async def _push_owned(
        self, opening: PushOpening, parser: FrameParser, next_piece: NextPiece, end: Ending
    ) -> tuple[Turn, Receipt]:
        if self._draining:
            raise Busy("This relay is shutting down.")
        wanted = self._wanted(opening, owner=self._owned.name)
        writer = self._writer(wanted)
        push = Push(self._journal, writer, BY_NAME.get(wanted.dialect), 1, True, self._counts)
        self._owned.add(writer, partial(push.stop, Fenced("The run was ended or taken over.")))
        timer: asyncio.TimerHandle | None = None
        try:
            try:
                opened = await self._opened(wanted)
            except JournalUnavailable:
                # It may be open after all: then it must end, and nobody else knows of it.
                self._end_later(wanted.stream, wanted.run, ending(Reason.JOURNAL_LOST))
                raise
            writer.opened(opened)
            max_run_s = self._settings.max_run_s
            if max_run_s:
                too_old = ending(Reason.MAX_RUN, f"The run was open for {max_run_s:g} s.")
                over = RunEnded(too_old.error, run_status=too_old.status, reason=too_old.reason)
                timer = asyncio.get_running_loop().call_later(max_run_s, push.stop, over, too_old)
            await self._take_owned(push, parser, next_piece, end)
        except RelayError as error:
            _add_receipt(error, push.receipt, wanted.run)
            raise
        finally:
            if timer is not None:
                timer.cancel()
            self._owned.discard(writer)
        turn = Turn(wanted.stream, wanted.run, wanted.writer, opened.start, 1, end.status, end.reason, opened)
        return turn, push.receipt

    async def _take_owned(self, push: Push, parser: FrameParser, next_piece: NextPiece, end: Ending) -> None:
        """Journal the body and end the run, in one way or another."""
        try:
            if await self._take(push, next_piece, parser, end):
                await self._count(push.writer.stream, push.writer.run, end)
            return
        except ClientGone:
            failed = ending(Reason.UPSTREAM_TRUNCATED, "The request broke off before its end.")
            await self._end_surely(push, failed)
            raise
        except (Fenced, RunEnded) as error:
            if push.stopped_as is None:
                raise await self._why_over(push, error) from None
            await self._end_surely(push, push.stopped_as)
            raise
        except JournalError as error:
            await self._end_surely(push, ending(Reason.JOURNAL_LOST, str(error)))
            raise
        except RelayError as error:
            failed_by = _failed_by(error) or push.stopped_as or ending(Reason.OWNER_LOST, str(error))
            await self._end_surely(push, failed_by)
            raise
        except Exception as error:
            why = f"relay failed while it read the request: {type(error).__name__}"
            await self._end_surely(push, ending(Reason.OWNER_LOST, why))
            raise

    async def _take(self, push: Push, next_piece: NextPiece, parser: FrameParser, end: Ending | None) -> bool:
        """Have a push read its body, so that it can be stopped when this process shuts down."""
        if self._draining and not push.owned:
            raise Busy("This relay is shutting down.")
        task = asyncio.current_task()
        assert task is not None
        self._bodies[push] = task
        try:
            return await push.take(next_piece, parser, end)
        finally:
            del self._bodies[push]

    def _writer(self, opening: RunOpening) -> RunWriter:
        memory = self._owned.memory
        return RunWriter(self._journal, opening, self._settings, memory, self._counts, PUSHED)

    def _push(self, known: RunOpening, seq: int) -> Push:
        """A push into a run that is not this process's."""
        dialect = BY_NAME.get(known.dialect)
        return Push(self._journal, self._writer(known), dialect, seq, False, self._counts)

    async def _run(self, stream: str, run: str, writer: str) -> RunOpening:
        """What has to be known of a run to push into it; its dialect is empty as long as nothing tells it."""
        known = self._known.get((stream, run, writer))
        if known is None or not known.dialect:
            dialect = (await self._journal.run(stream, run)).dialect
            known = self._know(stream, run, writer, dialect and BY_NAME.get(dialect, RAW).name)
        return known

    def _know(self, stream: str, run: str, writer: str, dialect: str) -> RunOpening:
        while len(self._known) >= KNOWN_MAX:
            del self._known[next(iter(self._known))]
        known = RunOpening(stream, run, writer, "", self._settings.retention, dialect)
        self._known[stream, run, writer] = known
        return known

    # Endings

    async def end(self, stream: str, run: str, writer: str, end: Ending) -> Receipt:
        """End a run as its producer says. Raises as `Journal.append`."""
        push = self._push(RunOpening(stream, run, writer, "", self._settings.retention), 0)
        await self._end(push, end)
        return push.receipt

    async def cancel(self, stream: str, run: str, error: str) -> RunInfo:
        """End a run whoever produces it; how it ended, now or before.

        Raises `UnknownStream`, `UnknownRun`."""
        end = ending(Reason.CLIENT_CANCEL, error)
        began = perf_counter()
        try:
            ended = await self._journal.end_run(stream, run, end, error_events(end))
        except JournalUnavailable:
            self._doubted.add((stream, run))
            self._spawn(self._find_out(stream, run, end))
            raise
        if ended.by_this:
            self._counts.cancel_to_end.observe(perf_counter() - began)
            await self._count(stream, run, end)
        return await self._journal.run(stream, run)

    async def delete(self, stream: str) -> None:
        """Delete a stream, whether or not there is one."""
        end = ending(Reason.STREAM_DELETED)
        for run in await self._journal.delete(stream):
            self._on_ended(stream, run, end, 0, None)

    async def _end(self, push: Push, end: Ending) -> None:
        if await push.append((), end):
            await self._count(push.writer.stream, push.writer.run, end)

    async def _end_surely(self, push: Push, end: Ending) -> None:
        """End a run of this process: now, or when the journal is back."""
        try:
            await self._end(push, end)
        except (JournalError, SequenceGap):
            self._end_later(push.writer.stream, push.writer.run, end)
        except (RunEnded, Fenced, UnknownRun, UnknownStream) as error:
            log.info("run over stream=%s run=%s: %s", push.writer.stream, push.writer.run, error.code)

    async def _find_out(self, stream: str, run: str, end: Ending) -> None:
        """Count an ending whose answer was lost, if it happened and nobody who asked again counts it."""
        info: RunInfo | None = None
        while info is None:
            await asyncio.sleep(END_RETRY_S)
            try:
                info = await self._journal.run(stream, run)
            except JournalError:
                continue
            except (UnknownStream, UnknownRun):
                break
        if (stream, run) in self._doubted:
            self._doubted.discard((stream, run))
            if info is not None and (info.status, info.reason, info.error) == end:
                self._on_ended(stream, run, end, info.text_bytes, Facts.of(info))

    def _end_later(self, stream: str, run: str, end: Ending) -> None:
        self._spawn(self._keep_ending(stream, run, end))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _keep_ending(self, stream: str, run: str, end: Ending) -> None:
        while True:
            await asyncio.sleep(END_RETRY_S)
            try:
                ended = await self._journal.end_run(
                    stream, run, end, error_events(end), owner=self._owned.name
                )
            except JournalError:
                continue
            except (UnknownStream, UnknownRun):
                return
            if ended.by_this or ended.reason == end.reason:  # or the first try was done after all
                self._on_ended(stream, run, end, ended.text_bytes, None)
            return

    async def _count(self, stream: str, run: str, end: Ending) -> None:
        """Count a run that this request ended."""
        self._doubted.discard((stream, run))
        try:
            info = await self._journal.run(stream, run)
        except RelayError:
            self._on_ended(stream, run, end, 0, None)
        else:
            self._on_ended(stream, run, end, info.text_bytes, Facts.of(info))

    async def _why_over(self, push: Push, error: RelayError) -> RelayError:
        """What to tell a producer whose run somebody else ended or took over."""
        try:
            info = await self._journal.run(push.writer.stream, push.writer.run)
        except RelayError as unknown:
            return unknown
        if info.status is Status.OPEN:
            return error
        return RunEnded("The run has ended.", run_status=info.status, reason=info.reason)

    # Shutting down

    async def drain(self) -> None:
        """Open no more runs. Producers that can go on elsewhere are told to; the others get the grace."""
        self._draining = True
        for push in list(self._bodies):
            if not push.owned:
                push.stop(Busy("This relay is shutting down."))
        if self._bodies:
            await asyncio.wait(list(self._bodies.values()), timeout=self._settings.drain_grace_s)
        for push in list(self._bodies):
            push.stop(Busy("This relay is shutting down."), ending(Reason.SHUTDOWN, "relay was shut down."))
        if self._bodies:
            await asyncio.wait(list(self._bodies.values()), timeout=DRAINED_S)

    def close(self) -> None:
        """Give up what the journal has not taken."""
        for task in self._tasks:
            task.cancel()


def key_of(*scope: Any) -> str:
    """A digest of an Idempotency-Key and of all that it is bound to."""
    return hashlib.sha256(orjson.dumps(scope)).hexdigest()


def _failed_by(error: RelayError) -> Ending | None:
    """How a run ends whose body cannot be what its producer meant; None for any other error."""
    if isinstance(error, FrameTooLarge):
        return ending(Reason.FRAME_TOO_LARGE, error.detail)
    if isinstance(error, InvalidEvent):
        return ending(Reason.INVALID_FRAME, error.detail)
    return None


def _add_receipt(error: RelayError, receipt: Receipt, run: str = "") -> None:
    """Tell a producer what was accepted before the error, so that it can go on behind it."""
    known = receipt.members()
    if receipt.next_seq is None:
        known["next_seq"] = error.extra.get("expected")
    if run:
        known["run"] = run
    error.extra |= {name: value for name, value in known.items() if name not in error.extra}
