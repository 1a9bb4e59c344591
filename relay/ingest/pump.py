"""The pump: reads one upstream stream to its end and has the writer journal it.

It belongs to relay, not to the client whose request began it. It reads no faster than the journal takes:
while an append waits, upstream is not read.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from relay.dialects.base import Dialect
from relay.dialects.detect import RAW, by_first_event
from relay.errors import Fenced, FrameTooLarge, InvalidEvent, JournalError, RelayError, RunEnded, SequenceGap
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
        return [Event(event, text) for event, text, _ in self._parser.feed(data)]

    def close(self) -> list[Event]:
        """An event without its blank line is none."""
        return []


class Pump:
    """Moves one upstream answer into the journal and ends the run exactly as the answer ended."""

    def __init__(
        self,
        writer: RunWriter,
        answer: Answer,
        parser: Lines | ServerSentEvents,
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
        self.text_bytes = 0
        self._answer = answer
        self._parser = parser
        self._in_hand: Sequence[Event] = ()
        self._in_hand_text = 0
        self._stopped: Ending | None = None
        self._moving: asyncio.Task[None] | None = None
        self._told_error = False
        self._said_end = False
        self._journal_away = False

    @property
    def may_be_abandoned(self) -> bool:
        """Only a raw run may go on for ever without a meaning; the others end by themselves."""
        return self.dialect is None or self.dialect is RAW

    def stop(self, end: Ending) -> None:
        """Stop reading and end the run so."""
        if self._stopped is None:
            self._stopped = end
            if self._moving is not None:
                self._moving.cancel()

    async def run(self) -> None:
        """Pump to the end. Does not raise; the ending is journaled, or kept in `unwritten`."""
        try:
            await self._end(await self._move_until_stopped())
        except (Fenced, RunEnded) as error:
            log.info("run over stream=%s run=%s: %s", self.writer.stream, self.writer.run, error.code)
            self.ended = ending(Reason(error.extra.get("reason", Reason.CLIENT_CANCEL)))
        except RelayError as error:
            log.error("run cannot be ended stream=%s run=%s: %s", self.writer.stream, self.writer.run, error)
            self._break_off()

    async def let_upstream_finish(self) -> None:
        """After the run ended by what upstream said: let upstream end its answer in its own way."""
        if self._said_end:
            await self._answer.finish(FINISH_S, FINISH_MAX_BYTES)

    async def _move_until_stopped(self) -> Ending:
        task = asyncio.current_task()
        assert task is not None
        try:
            if self._stopped is None:
                self._moving = task
                return await self._move()
        except asyncio.CancelledError:
            if self._stopped is None:
                raise
            task.uncancel()
        except SequenceGap as error:
            return self._rewound(error)
        except RelayError:
            raise
        except Exception as error:
            log.exception("run breaks off stream=%s run=%s", self.writer.stream, self.writer.run)
            return ending(Reason.OWNER_LOST, f"relay failed while it read upstream: {type(error).__name__}")
        finally:
            self._moving = None
            if not self._said_end:
                self._answer.close()
        return self._stopped

    def _rewound(self, gap: SequenceGap) -> Ending:
        """The journal lost frames that it had accepted (failover, restore), so it must take no later ones."""
        self.writer.next_seq = gap.extra["expected"]
        self._in_hand, self._in_hand_text, self._told_error = (), 0, False
        return ending(Reason.JOURNAL_LOST, "The journal lost frames that it had accepted.")

    async def _move(self) -> Ending:
        try:
            async for data in self._answer.decoded_body():
                end = await self._journal(self._parser.feed(data))
                if end is not None:
                    return end
            end = await self._journal(self._parser.close())
            if end is not None:
                return end
        except TruncatedBody as error:
            return ending(Reason.UPSTREAM_TRUNCATED, str(error))
        except IdleBody as error:
            return ending(Reason.UPSTREAM_TIMEOUT, str(error))
        if self.dialect is not None and self.dialect.needs_terminal:
            return ending(Reason.UPSTREAM_TRUNCATED, "Upstream ended without its terminal marker.")
        return ending(Reason.UPSTREAM_END)

    async def _journal(self, events: list[Event]) -> Ending | None:
        """Journal parsed events; the ending if one of them, or the parser, ends the run."""
        end: Ending | None = None
        text_bytes = 0
        accepted = 0
        for event in events:
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
            if signal.terminal:
                self._said_end = True
                end = ending(Reason.UPSTREAM_END)
                break
            if signal.error is not None:
                self._told_error = self._said_end = True
                end = ending(Reason.UPSTREAM_ERROR, signal.error)
                break
        self._in_hand = events[:accepted]
        self._in_hand_text = text_bytes
        if end is None and self._parser.overflow is not None:
            end = ending(Reason.FRAME_TOO_LARGE, self._parser.overflow.detail)
        if end is None and self._in_hand:
            try:
                await self.writer.append(self._in_hand, text_bytes, self._dialect_name())
            except JournalError as error:
                self._journal_away = True
                return ending(Reason.JOURNAL_LOST, f"The journal was away for too long: {error}")
            self._in_hand, self._in_hand_text = (), 0
        return end

    async def _end(self, end: Ending) -> None:
        self.unwritten = self._last_words(end)
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

    def _last_words(self, end: Ending) -> tuple[Sequence[Event], Ending]:
        events = list(self._in_hand)
        if end.status is not Status.COMPLETED and not self._told_error:
            error_event = (self.dialect or RAW).error_event(end)
            if error_event is not None:
                events.append(error_event)
        return events, end

    async def write_kept(self) -> None:
        """Journal what is kept, once; raises `JournalError` while that does not work."""
        await self._write_end(self.writer.append_once)

    async def _write_end(
        self, append: Callable[[Sequence[Event], int, str, Ending], Awaitable[None]]
    ) -> None:
        assert self.unwritten is not None
        events, end = self.unwritten
        try:
            await append(events, self._in_hand_text, self._dialect_name(), end)
        except SequenceGap as error:
            events, end = self.unwritten = self._last_words(self._rewound(error))
            await append(events, 0, self._dialect_name(), end)
        self.unwritten = None
        self._ended(end)

    def _ended(self, end: Ending) -> None:
        self.ended = end
        log.info(
            "run ended stream=%s run=%s status=%s reason=%s",
            self.writer.stream, self.writer.run, end.status, end.reason,
        )  # fmt: skip

    def _break_off(self) -> None:
        self.broken = True
        for callback in list(self.on_broken):
            callback()

    def _dialect_name(self) -> str:
        return "" if self.dialect is None else self.dialect.name
