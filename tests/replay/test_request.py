"""relay.replay.request: what a read asks for, checked."""

from __future__ import annotations

import pytest

from relay.cursor import ORIGIN, Cursor, ResumeId
from relay.errors import InvalidName, InvalidParameter, MalformedCursor, NotAcceptable, ResumeUnknown
from relay.replay.request import EVENT_STREAM, JSON, NDJSON, read_limit, read_request
from relay.replay.view import EventsView, NdjsonView

TOKEN = "t" * 32


def test_a_bare_read_starts_at_the_start_as_an_event_stream() -> None:
    request = read_request({}, "", "")
    assert (request.media_type, request.cursor, request.from_tail, request.run) == (
        *(EVENT_STREAM, None),
        *(False, None),
    )
    assert (request.control, request.envelope, request.heartbeat_event) == ("events", False, False)
    assert (request.wait_s, request.limit, request.resumes) == (0.0, 1000, False)
    assert isinstance(request.view(None), EventsView)
    assert isinstance(read_request({}, "", NDJSON).view("r"), NdjsonView)


@pytest.mark.parametrize(
    ("query", "header", "cursor", "from_tail", "resumes"),
    [
        ({"after": "start"}, "", None, False, False),
        ({"after": "tail"}, "", None, True, False),
        ({"after": "0-0"}, "", ORIGIN, False, False),
        ({"after": "3-9"}, "", Cursor(3, 9), False, False),
        ({"after": "3-9"}, "4-10", Cursor(4, 10), False, True),
        ({"after": "tail"}, "4-10", Cursor(4, 10), False, True),
        ({}, f"rly.{TOKEN}.4-10", ResumeId(TOKEN, Cursor(4, 10)), False, True),
        ({"after": f"rly.{TOKEN}.0-0"}, "", ResumeId(TOKEN, ORIGIN), False, False),
    ],
)
def test_the_header_wins_over_after(
    query: dict[str, str], header: str, cursor: Cursor | None, from_tail: bool, resumes: bool
) -> None:
    request = read_request(query, header, "")
    assert (request.cursor, request.from_tail, request.resumes) == (cursor, from_tail, resumes)


@pytest.mark.parametrize("text", ["x", "1", "1-", "-1", "01-1", "1-1 ", "0-1", "1-1-1", "9" * 513, "Start"])
def test_what_is_no_cursor_is_refused(text: str) -> None:
    with pytest.raises(MalformedCursor):
        read_request({"after": text}, "", "")
    with pytest.raises(MalformedCursor):
        read_request({}, text, "")


def test_what_is_no_resume_id_is_unknown() -> None:
    with pytest.raises(ResumeUnknown):
        read_request({}, "rly.short.1-1", "")


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [
        ("", EVENT_STREAM),
        ("*/*", EVENT_STREAM),
        ("text/*", EVENT_STREAM),
        ("text/event-stream", EVENT_STREAM),
        ("TEXT/Event-Stream; charset=utf-8", EVENT_STREAM),
        ("application/x-ndjson", NDJSON),
        ("application/json", JSON),
        ("application/json, text/plain, */*", JSON),
        ("application/json, text/event-stream", EVENT_STREAM),
        ("application/json;q=0.5, application/x-ndjson;q=0.9", NDJSON),
        ("text/event-stream;q=0, */*", NDJSON),
        ("text/html, application/xhtml+xml, */*;q=0.8", EVENT_STREAM),
        ("application/*", NDJSON),
        ("application/json; q=1", JSON),
    ],
)
def test_the_format_is_negotiated(accept: str, media_type: str) -> None:
    assert read_request({}, "", accept).media_type == media_type


@pytest.mark.parametrize(
    "accept", ["text/html", "image/*", "*/*;q=0", "application/json;q=many", ",", "json"]
)
def test_a_format_that_is_not_served_is_refused(accept: str) -> None:
    with pytest.raises(NotAcceptable):
        read_request({}, "", accept)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(("wait", text) for text in ("-1", "61", "nan", "inf", "x", "")),
        *(("limit", text) for text in ("0", "1001", "-1", "1.5", "x", "", "9" * 5000, "٣")),
        *(("control", "x"), ("control", ""), ("envelope", "xml"), ("heartbeat", "comment")),
    ],
)
def test_a_parameter_out_of_its_range_is_named(name: str, text: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        read_request({name: text}, "", "")
    assert caught.value.extra == {"parameter": name}
    assert name in caught.value.detail


def test_parameters_within_their_range_are_taken_and_unknown_ones_left_alone() -> None:
    query = {
        "wait": "2.5",
        "limit": "7",
        "control": "none",
        "envelope": "json",
        "heartbeat": "event",
        "_": "x",
    }
    request = read_request(query, "", "")
    assert (request.wait_s, request.limit, request.control) == (2.5, 7, "none")
    assert request.envelope
    assert request.heartbeat_event
    assert read_limit({}, 100) == 100


@pytest.mark.parametrize("run", ["", "a b", "..", "x" * 201])
def test_what_is_no_run_name_is_refused(run: str) -> None:
    with pytest.raises(InvalidName):
        read_request({"run": run}, "", "")


@pytest.mark.parametrize("run", ["current", "latest", "r-1"])
def test_a_run_is_a_word_or_a_name(run: str) -> None:
    assert read_request({"run": run}, "", "").run == run
