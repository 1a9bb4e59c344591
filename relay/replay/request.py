"""What a read asks for: the query, the cursor and the format, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from relay.cursor import RESUME_PREFIX, Cursor, ResumeId, parse_cursor, parse_resume_id
from relay.errors import InvalidParameter, MalformedCursor, NotAcceptable
from relay.limits import LAST_EVENT_ID_MAX_BYTES, PAGE_MAX_FRAMES, RUN_WORDS, WAIT_MAX_S, check_run_name
from relay.replay.view import EventsView, NdjsonView, View

EVENT_STREAM = "text/event-stream"
NDJSON = "application/x-ndjson"
JSON = "application/json"


@dataclass(frozen=True, slots=True)
class ReadRequest:
    """`cursor` is None when the reader presented none; then it starts at the tail or at the start.

    `run` is a run's name, `current`, `latest` or None. `wait_s` is how long to wait for the stream to exist.
    """

    media_type: str
    cursor: Cursor | ResumeId | None
    from_tail: bool
    run: str | None
    wait_s: float
    control: str
    envelope: bool
    heartbeat_event: bool
    limit: int

    def view(self, run: str | None) -> View:
        """How this reader is shown frames of `run`, or of all runs."""
        if self.media_type == NDJSON:
            return NdjsonView(run, self.control, self.heartbeat_event)
        return EventsView(run, self.control, self.envelope, self.heartbeat_event)


def read_request(query: Mapping[str, str], last_event_id: str, accept: str) -> ReadRequest:
    """Check a read's query parameters and headers. Parameters it does not know are left alone: clients add
    cache busters and tokens.

    Raises `InvalidParameter`, `MalformedCursor`, `ResumeUnknown`, `InvalidName`, `NotAcceptable`.
    """
    run = query.get("run")
    if run is not None and run not in RUN_WORDS:
        check_run_name(run)
    after = query.get("after", "start")
    presented = last_event_id or ("" if after in ("start", "tail") else after)
    return ReadRequest(
        media_type=_negotiate(accept),
        cursor=_cursor(presented) if presented else None,
        from_tail=not presented and after == "tail",
        run=run,
        wait_s=_number(query, "wait", 0.0, WAIT_MAX_S),
        control=_word(query, "control", ("events", "comments", "none")),
        envelope=_word(query, "envelope", ("", "json")) == "json",
        heartbeat_event=_word(query, "heartbeat", ("", "event")) == "event",
        limit=int(_number(query, "limit", PAGE_MAX_FRAMES, PAGE_MAX_FRAMES)) or 1,
    )


def _cursor(text: str) -> Cursor | ResumeId:
    if len(text) > LAST_EVENT_ID_MAX_BYTES:
        raise MalformedCursor("No cursor is that long.")
    return parse_resume_id(text) if text.startswith(RESUME_PREFIX) else parse_cursor(text)


def _word(query: Mapping[str, str], name: str, allowed: tuple[str, ...]) -> str:
    word = query.get(name, allowed[0])
    if word not in allowed:
        choices = ", ".join(word for word in allowed if word)
        raise InvalidParameter(f"'{name}' is one of: {choices}.", parameter=name)
    return word


def _number(query: Mapping[str, str], name: str, default: float, most: float) -> float:
    text = query.get(name)
    if text is None:
        return default
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= most:
        raise InvalidParameter(f"'{name}' is a number from 0 to {most:g}.", parameter=name)
    return number


def _negotiate(accept: str) -> str:
    """The best of our formats by RFC 9110 section 12.5.1; an event stream when nothing else is preferred."""
    best, best_quality = "", 0.0
    for item in accept.split(",") if accept.strip() else ["*/*"]:
        media_range, _, parameters = item.partition(";")
        quality = 1.0
        for parameter in parameters.split(";"):
            name, _, value = parameter.partition("=")
            if name.strip().lower() == "q":
                try:
                    quality = float(value)
                except ValueError:
                    quality = 0.0
        media_range = media_range.strip().lower()
        if media_range in (NDJSON, JSON):
            media_type = media_range
        elif media_range in (EVENT_STREAM, "text/*", "*/*"):
            media_type = EVENT_STREAM
        else:
            continue
        if quality > best_quality:
            best, best_quality = media_type, quality
    if not best:
        raise NotAcceptable(f"This is served as {EVENT_STREAM}, {NDJSON} or {JSON}.")
    return best
