"""What a read asks for: the query, the cursor and the format, checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache

from relay.cursor import RESUME_PREFIX, Cursor, ResumeId, parse_cursor, parse_resume_id
from relay.errors import InvalidParameter, MalformedCursor, NotAcceptable
from relay.limits import LAST_EVENT_ID_MAX_BYTES, PAGE_MAX_FRAMES, RUN_WORDS, WAIT_MAX_S, check_run_name
from relay.ndjson import NDJSON
from relay.replay.view import EventsView, NdjsonView, View
from relay.sse import EVENT_STREAM

JSON = "application/json"


@dataclass(frozen=True, slots=True)
class ReadRequest:
    """`cursor` is None when the reader presented none; then it starts at the tail or at the start.

    `resumes` says that the cursor is the last id of an earlier answer to this request (`Last-Event-ID`).
    `run` is a run's name, `current`, `latest` or None. `wait_s` is how long to wait for the stream to exist.
    """

    media_type: str
    cursor: Cursor | ResumeId | None
    resumes: bool
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
            return _ndjson_view(run, self.control, self.heartbeat_event)
        return _events_view(run, self.control, self.envelope, self.heartbeat_event)


# Thousands of readers wish the same.
_events_view = lru_cache(1000)(EventsView)
_ndjson_view = lru_cache(1000)(NdjsonView)


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
        resumes=bool(last_event_id),
        from_tail=not presented and after == "tail",
        run=run,
        wait_s=read_number(query, "wait", 0.0, WAIT_MAX_S),
        control=_word(query, "control", ("events", "comments", "none")),
        envelope=_word(query, "envelope", ("", "json")) == "json",
        heartbeat_event=_word(query, "heartbeat", ("", "event")) == "event",
        limit=read_limit(query, PAGE_MAX_FRAMES),
    )


def read_limit(query: Mapping[str, str], default: int) -> int:
    """The `limit` of a page: 1 to `PAGE_MAX_FRAMES`; raises `InvalidParameter`."""
    text = query.get("limit", str(default))
    if len(text) > 4 or not text.isascii() or not text.isdigit() or not 1 <= int(text) <= PAGE_MAX_FRAMES:
        raise InvalidParameter(f"'limit' is a number from 1 to {PAGE_MAX_FRAMES}.", parameter="limit")
    return int(text)


def read_time(query: Mapping[str, str], name: str) -> int:
    """An RFC 3339 time as milliseconds since 1970, 0 if it is not given; raises `InvalidParameter`."""
    text = query.get(name)
    if text is None:
        return 0
    try:
        # A plus sign that was not escaped has become a space.
        at = datetime.fromisoformat(text.replace(" ", "+"))
    except ValueError:
        at = datetime.min
    if at.tzinfo is None:
        raise InvalidParameter(
            f"'{name}' is a time with its zone, such as 2026-01-31T12:00:00.000Z.", parameter=name
        )
    return round(at.timestamp() * 1000)


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


def read_number(query: Mapping[str, str], name: str, default: float, most: float) -> float:
    """A number from 0 to `most`; raises `InvalidParameter`."""
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
    """The best of our formats by RFC 9110 section 12.5.1: the most specific range that matches a format
    decides its quality. Among equals the one that was named wins, then an event stream."""
    ranges = [_media_range(item) for item in (accept if accept.strip() else "*/*").split(",")]
    best, best_rank = "", (0.0, 0)
    for media_type in (EVENT_STREAM, NDJSON, JSON):
        names = ("*/*", media_type.partition("/")[0] + "/*", media_type)
        matching = [(names.index(name), quality) for name, quality in ranges if name in names]
        if matching:
            specificity, quality = max(matching)
            rank = (quality, specificity)
            if quality > 0 and rank > best_rank:
                best, best_rank = media_type, rank
    if not best:
        raise NotAcceptable(f"This is served as {EVENT_STREAM}, {NDJSON} or {JSON}.")
    return best


def _media_range(item: str) -> tuple[str, float]:
    media_range, *parameters = item.lower().split(";")
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            try:
                quality = float(value)
            except ValueError:
                quality = 0.0
            return media_range.strip(), quality if 0 <= quality <= 1 else 0.0
    return media_range.strip(), 1.0
