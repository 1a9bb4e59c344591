"""The pump: reads one upstream stream to its end and has the writer journal it.

It belongs to relay, not to the client whose request began it. It reads no faster than the journal takes:
while an append waits, upstream is not read.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple

from relay.dialects.base import Dialect
from relay.dialects.detect import RAW, by_first_event
from relay.errors import (
    Diverged,
    Fenced,
    FrameTooLarge,
    InvalidEvent,
    JournalError,
    RelayError,
    RunEnded,
    UpstreamError,
    UpstreamSlow,
)
from relay.frame import Event, check_event_name
from relay.ingest.upstream import Answer, IdleBody, TruncatedBody
from relay.ingest.writer import RunWriter
from relay.lifecycle import Ending, Reason, Status, ending
from relay.ndjson import LineParser
from relay.sse import EventStreamParser

log = logging.getLogger("relay.run")

FINISH_S = 30.0
FINISH_MAX_BYTES = 1024 * 1024
"""How long, and how much, upstream may still send after its terminal marker before it is cut off."""

ERROR_READ_MAX_BYTES = 64 * 1024
"""Bytes read of an error's text; less is kept, but what is cut may be half a character."""


class Lines:
    """Lines of JSON as events without a name."""

    def __init__(self, max_data_bytes: int) -> None:
        self._parser = LineParser(max_data_bytes)

    @property
    def overflow(self) -> FrameTooLarge | None:
        """Set when a line was too long."""
        return self._parser.overflow

    def feed(self, data: bytes) -> list[Event]:
        """The events this data completes."""
        return [Event("", line) for line in self._parser.feed(data)]

    def close(self) -> list[Event]:
        """A last line needs no line end."""
        return [Event("", line) for line in self._parser.close()]


class ServerSentEvents:
    """Events of a `text/event-stream`; upstream's ids, retries and comments are dropped."""

    def __init__(self, max_data_bytes: int) -> None:
        self._parser = EventStreamParser(max_data_bytes)

    @property
    def overflow(self) -> FrameTooLarge | None:
        """Set when an event was too long."""
        return self._parser.overflow

    def feed(self, data: bytes) -> list[Event]:
        """The events this data completes."""
        lone = self._parser.lone(data)
        if lone is not None:
            return [Event("", lone)]
        return [Event(event, text) for event, text, _ in self._parser.feed(data)]

    def close(self) -> list[Event]:
        """An event without its blank line is none."""
        return []


Parser = Lines | ServerSentEvents


class Pump:
    """Moves one upstream answer into the journal and ends the run exactly as the answer ended."""

    def __init__(
        self,
        writer: RunWriter,
        answer: Answer | None,
        parser: Parser | None,
        dialect: Dialect | None,
        started_at: float,
    ) -> None:
        self.writer = writer
        self.started_at = started_at
        self.read_at = started_at
        """When a reader of this run was last seen, on the loop's clock."""
        self.dialect = dialect
        self.broken = False
        """The journal did not take the run's end in time: what clients have of it is not the whole."""
        self.on_broken: set[Callable[[], None]] = set()
        self.unwritten: tuple[Sequence[Event], Ending] | None = None
        """What is still to be journaled when the journal is back."""
        self.ended: Ending | None = None
        """How this process ended the run; None also for a run that somebody else ended."""
        self.ended_at = started_at
        self.text_bytes = 0
        self._answer = answer
        self._parser = parser
        self._is_silent = True
        """Whether upstream has said nothing yet."""
        self._in_hand: Sequence[Event] = ()
        self._in_hand_text = 0
        self._kept_head = ""
        self._stopped: Ending | None = None
        self._over = False
        self._moving: asyncio.Task[None] | None = None
        self._told_end = False
        """Upstream's format has said itself how the answer ended."""
        self._said_end = False
        self._finished = False
        self._reason = Reason.UPSTREAM_END
        """Of an end that is none of a failure."""
        self._journal_away = False

    @property
    def may_be_abandoned(self) -> bool:
        """Only a raw run may go on for ever without a meaning; the others end by themselves."""
        return self.dialect is None or self.dialect is RAW

    def stop(self, end: Ending) -> None:
        """Stop reading and end the run so."""
        if self._stopped is None and not self._over:
            self._stopped = end
            if self._moving is not None:
                self._moving.cancel()

    def over(self) -> None:
        """Somebody else ended the run or took it over: close upstream, journal nothing more.

        An ending that is being journaled already is left to find out which of the two came first."""
        if self._stopped is None and not self._over:
            self._over = True
            if self._moving is not None:
                self._moving.cancel()

    async def run(self) -> None:
        """Pump to the end. Does not raise; the ending is journaled, or kept in `unwritten`."""
        try:
            end = await self._move_until_stopped()
            if end is None:
                self._give_way("it was ended or taken over")
            else:
                await self._end(end)
        except (Fenced, RunEnded) as error:
            self._give_way(_who_won(error))
        except RelayError as error:
            log.error("run cannot be ended stream=%s run=%s: %s", self.writer.stream, self.writer.run, error)
            self._break_off()
        except Exception:
            log.exception("run cannot be ended stream=%s run=%s", self.writer.stream, self.writer.run)
            self.unwritten = None
            self._break_off()

    async def let_upstream_finish(self) -> None:
        """After the run ended by what upstream said: let upstream end its answer in its own way."""
        if self._said_end and self._answer is not None:
            await self._answer.finish(FINISH_S, FINISH_MAX_BYTES)

    def _give_way(self, why: str) -> None:
        """The run is another's now, or over; upstream works for nobody."""
        self._over = True
        self.unwritten = None
        self._close_upstream()
        self._answer = None
        log.warning(
            "run is over elsewhere, upstream closed stream=%s run=%s: %s",
            self.writer.stream, self.writer.run, why,
        )  # fmt: skip

    def _close_upstream(self) -> None:
        if self._answer is not None:
            self._answer.close()

    async def _move_until_stopped(self) -> Ending | None:
        """Until upstream, or whoever stops this, ended the run; None when the run is somebody else's."""
        task = asyncio.current_task()
        assert task is not None
        try:
            if self._stopped is None and not self._over:
                self._moving = task
                return await self._move()
        except asyncio.CancelledError:
            if self._stopped is None and not self._over:
                raise
            task.uncancel()
        except Diverged:
            return self._rewound()
        except RelayError:
            raise
        except Exception as error:
            log.exception("run breaks off stream=%s run=%s", self.writer.stream, self.writer.run)
            return ending(Reason.OWNER_LOST, f"relay failed while it read upstream: {type(error).__name__}")
        finally:
            self._moving = None
            if not self._said_end:
                self._close_upstream()
        return self._stopped

    def _rewound(self) -> Ending:
        """The journal lost frames that it had accepted (failover, restore) and that could not be put back, so
        it must take no later ones."""
        self._in_hand, self._in_hand_text, self._told_end = (), 0, False
        return ending(Reason.JOURNAL_LOST, "The journal lost frames that it had accepted.")

    async def _move(self) -> Ending:
        assert self._answer is not None
        assert self._parser is not None
        try:
            read, feed = self._answer.decoded_reads(), self._parser.feed
            while data := await read():
                end = await self._journal(feed(data))
                if end is not None:
                    return end
            end = await self._journal(self._parser.close())
            if end is not None:
                return end
        except (TruncatedBody, IdleBody) as error:
            if not self._finished:
                idle = isinstance(error, IdleBody)
                return ending(Reason.UPSTREAM_TIMEOUT if idle else Reason.UPSTREAM_TRUNCATED, str(error))
        if self._finished:
            self._told_end = True
        elif self.dialect is not None and self.dialect.needs_terminal:
            return ending(Reason.UPSTREAM_TRUNCATED, "Upstream ended without its terminal marker.")
        return ending(self._reason)

    async def _journal(self, events: list[Event]) -> Ending | None:
        """Journal parsed events; the ending if one of them, or the parser, ends the run."""
        assert self._parser is not None
        end: Ending | None = None
        text_bytes = 0
        accepted = 0
        if self._is_silent and events and self._answer is not None:
            self._is_silent = False
            waited_s = asyncio.get_running_loop().time() - self._answer.asked_at
            self.writer.counts.upstream_first_frame.observe(waited_s)
        for event in events:
            if event.event:  # most have none, which needs no check
                try:
                    check_event_name(event.event)
                except InvalidEvent as error:
                    end = ending(Reason.INVALID_FRAME, error.detail)
                    break
            if self.dialect is None:
                self.dialect = by_first_event(event)
            signal = self.dialect.read(event)
            text_bytes += signal.text_bytes
            self.text_bytes += signal.text_bytes
            accepted += 1
            if signal.finished is not None:
                self._finished = signal.finished
            if signal.reason is not None:
                self._reason = signal.reason
            if signal.terminal:
                self._told_end = self._said_end = True
                end = ending(self._reason)
                break
            if signal.error is not None:
                self._told_end = self._said_end = True
                end = ending(Reason.UPSTREAM_ERROR, signal.error)
                break
        self._in_hand = events[:accepted]
        self._in_hand_text = text_bytes
        if end is None and self._parser.overflow is not None:
            end = ending(Reason.FRAME_TOO_LARGE, self._parser.overflow.detail)
        if end is None and self._in_hand:
            try:
                await self.writer.append(
                    self._in_hand, text_bytes, self._dialect_name(), answer=self._kept_head
                )
            except Diverged:
                raise
            except JournalError as error:
                return self._lost_journal(error)
            self._in_hand, self._in_hand_text, self._kept_head = (), 0, ""
        return end

    def _lost_journal(self, error: JournalError) -> Ending:
        self._journal_away = True
        return ending(Reason.JOURNAL_LOST, f"The journal was away for too long: {error}")

    async def _end(self, end: Ending) -> None:
        self.unwritten = self._in_hand, end
        if not self._journal_away:
            try:
                await self._write_end(self.writer.append)
                return
            except JournalError:
                pass
            except RelayError:
                self.unwritten = None
                raise
        self._break_off()

    def _error_event(self, end: Ending) -> Event | None:
        """What upstream's format has to say of an end that upstream itself did not tell."""
        if end.status is Status.COMPLETED or self._told_end:
            return None
        return (self.dialect or RAW).error_event(end)

    async def write_kept(self) -> None:
        """Journal what is kept, once; raises `JournalError` while that does not work."""
        try:
            await self._write_end(self.writer.append_once)
        except (Fenced, RunEnded) as error:
            self._give_way(_who_won(error))

    async def _write_end(self, append: Callable[..., Awaitable[object]]) -> None:
        assert self.unwritten is not None
        events, end = self.unwritten
        text_bytes, dialect = self._in_hand_text, self._dialect_name()
        try:
            await append(events, text_bytes, dialect, end, self._error_event(end), self._kept_head)
        except Diverged:
            end = self._rewound()
            self.unwritten = (), end
            await append((), 0, dialect, end, self._error_event(end))
        self.unwritten = None
        self.ended = end
        self.ended_at = asyncio.get_running_loop().time()

    def _break_off(self) -> None:
        self.broken = True
        for callback in list(self.on_broken):
            callback()

    def _dialect_name(self) -> str:
        return "" if self.dialect is None else self.dialect.name


def _who_won(error: Fenced | RunEnded) -> str:
    if isinstance(error, Fenced):
        return "another writer took it over"
    return f"it had ended {error.extra['run_status']} {error.extra['reason']}"


class Called(NamedTuple):
    """Upstream's answer to a call of relay's own. `parser` is None when it is not a stream; `kept_head` is
    what a later response for the run must look like."""

    answer: Answer
    parser: Parser | None
    dialect: Dialect | None
    kept_head: str


class Whole(NamedTuple):
    """An answer that is no stream, with its body as it came on the wire."""

    answer: Answer
    body: bytes


class CallingPump(Pump):
    """A pump whose run began before upstream was called.

    `awaited` says that a client waits for upstream's answer all the same: `answered` tells it what came.
    """

    def __init__(
        self,
        writer: RunWriter,
        call: Callable[[], Awaitable[Called]],
        dialect: Dialect | None,
        started_at: float,
        frame_max_bytes: int,
        awaited: bool,
    ) -> None:
        super().__init__(writer, None, None, dialect, started_at)
        self.answered: asyncio.Future[Called | Whole | UpstreamError | None] = asyncio.Future()
        """A stream, once the journal knows of it; an answer that is no stream, when it is whole; or why
        neither can be had. None when the run was over before."""
        self._call = call
        self._frame_max_bytes = frame_max_bytes
        self._awaited = awaited

    @property
    def may_be_abandoned(self) -> bool:
        """One that nobody waits for was asked to go on without a reader."""
        return self._awaited and self._parser is not None and super().may_be_abandoned

    async def run(self) -> None:
        """As `Pump.run`."""
        try:
            await super().run()
        finally:
            self._tell(None)

    def _tell(self, what: Called | Whole | UpstreamError | None) -> None:
        if not self.answered.done():
            self.answered.set_result(what)

    async def _move(self) -> Ending:
        try:
            called = await self._call()
        except UpstreamError as error:
            self._tell(error)
            slow = isinstance(error, UpstreamSlow)
            return ending(Reason.UPSTREAM_TIMEOUT if slow else Reason.UPSTREAM_ERROR, error.detail)
        self._answer, self._parser, dialect, self._kept_head = called
        if self._parser is None:
            return await self._take_whole(called.answer)
        self.dialect = dialect
        # Before a client sees the head: who ends the run must know that it has been promised this format. It
        # is sent again with the first frames, because nothing is held of an append that has none.
        try:
            await self.writer.append((), 0, self._dialect_name(), answer=self._kept_head)
        except Diverged:
            raise
        except JournalError as error:
            return self._lost_journal(error)
        self._tell(called)
        return await super()._move()

    def _error_event(self, end: Ending) -> Event | None:
        # Before a stream's head is there, nobody has been promised its format.
        return None if self._parser is None else super()._error_event(end)

    async def _take_whole(self, answer: Answer) -> Ending:
        """An answer that is no stream: one frame if it is a success in text, or the error it tells."""
        is_success = 200 <= answer.status <= 299
        limit = self._frame_max_bytes
        body = bytearray()
        broken: IdleBody | TruncatedBody | TimeoutError | None = None
        try:
            async with asyncio.timeout(None if is_success else FINISH_S):
                async for data in answer.body(answer.idle_s):
                    body += data
                    if len(body) > limit:
                        break
        except (IdleBody, TruncatedBody, TimeoutError) as error:
            broken = error
        end = self._end_of_whole(answer, bytes(body), broken, is_success)
        if broken is None and len(body) <= limit:
            self._tell(Whole(answer, bytes(body)))
        else:
            what = "that broke off" if broken is not None else f"of more than {limit} bytes"
            self._tell(UpstreamError(f"Upstream answered {answer.status} with a body {what}, and no stream."))
        return end

    def _end_of_whole(
        self,
        answer: Answer,
        body: bytes,
        broken: IdleBody | TruncatedBody | TimeoutError | None,
        is_success: bool,
    ) -> Ending:
        limit = self._frame_max_bytes if is_success else ERROR_READ_MAX_BYTES
        try:
            data = answer.decoded(body, limit + 1)
        except TruncatedBody as error:
            data, broken = b"", broken or error
        kept_head, self._kept_head = self._kept_head, ""
        if not is_success:
            text = data[:limit].decode(errors="replace")
            return ending(Reason.UPSTREAM_ERROR, f"Upstream answered {answer.status}: {text}".rstrip(": \n"))
        if broken is not None:
            idle = isinstance(broken, IdleBody)
            return ending(Reason.UPSTREAM_TIMEOUT if idle else Reason.UPSTREAM_TRUNCATED, str(broken))
        too_large = len(data) > limit
        if too_large or not _is_text(answer.media_type):
            what = "more than a frame holds" if too_large else answer.media_type or "something without a type"
            return ending(
                Reason.UPSTREAM_ERROR, f"Upstream answered {answer.status} with {what}, and no stream."
            )
        self._kept_head = kept_head
        self._in_hand = [Event("", data.decode(errors="replace").encode())]
        self._in_hand_text = self.text_bytes = len(self._in_hand[0].data)
        self.dialect = RAW
        return ending(Reason.UPSTREAM_END)


def _is_text(media_type: str) -> bool:
    return media_type.startswith("text/") or media_type == "application/json" or media_type.endswith("+json")
