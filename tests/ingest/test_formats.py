"""relay.ingest.formats: whichever way a producer writes its frames, they are the same events."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import msgpack
import pytest

from relay.errors import CallerError, FrameTooLarge, InvalidEvent
from relay.frame import Event
from relay.ingest.formats import FORMATS, FrameParser, events_of_json

MAX_BYTES = 100_000

FRAMES: list[dict[str, Any]] = [
    {"event": "delta", "data": "Grüße \U0001f600"},
    {"data": "two\nlines"},
    {"event": "", "data": ""},
    {"event": "n", "data": {"b": [1, 2.5, None, True], "a": "\u00e9"}},
    {"data": 7},
    {"data": False},
    {"data": "x" * 5000, "id": "3-9", "at": None},
]

EVENTS = [
    Event("delta", "Grüße \U0001f600".encode()),
    Event("", b"two\nlines"),
    Event("", b""),
    Event("n", '{"b":[1,2.5,null,true],"a":"\u00e9"}'.encode()),
    Event("", b"7"),
    Event("", b"false"),
    Event("", b"x" * 5000),
]


def as_event_stream(event: Event) -> bytes:
    lines = [f"event: {event.event}".encode()] if event.event else []
    return b"\n".join([*lines, *(b"data: " + line for line in event.data.split(b"\n"))]) + b"\n\n"


BODIES: dict[str, bytes] = {
    "application/x-ndjson": b"".join(json.dumps(frame).encode() + b"\n" for frame in FRAMES),
    "text/event-stream": b": hi\n\nid: 9\nretry: 5\n\n" + b"".join(map(as_event_stream, EVENTS)),
    "application/msgpack": b"".join(map(msgpack.packb, FRAMES)),
}

Cut = Callable[[bytes], list[bytes]]


def whole(body: bytes) -> list[bytes]:
    return [body]


def bytewise(body: bytes) -> list[bytes]:
    return [body[n : n + 1] for n in range(len(body))]


def sevens(body: bytes) -> list[bytes]:
    return [body[n : n + 7] for n in range(0, len(body), 7)]


def read(media_type: str, pieces: list[bytes], max_bytes: int = MAX_BYTES) -> tuple[list[Event], FrameParser]:
    parser = FORMATS[media_type](max_bytes)
    events: list[Event] = []
    for number, piece in enumerate(pieces, 1):
        events += parser.feed(piece, number == len(pieces))
        if parser.error is not None:
            break
    return events, parser


@pytest.mark.parametrize("media_type", FORMATS)
@pytest.mark.parametrize("cut", [whole, bytewise, sevens])
def test_every_format_says_the_same_however_it_is_cut(media_type: str, cut: Cut) -> None:
    events, parser = read(media_type, cut(BODIES[media_type]))
    assert parser.error is None
    assert events == EVENTS
    assert events == events_of_json(json.dumps(FRAMES).encode(), MAX_BYTES)


@pytest.mark.parametrize("media_type", FORMATS)
@pytest.mark.parametrize("pieces", [[b""], [b"", b""]])
def test_an_empty_body_has_no_frames(media_type: str, pieces: list[bytes]) -> None:
    events, parser = read(media_type, pieces)
    assert (events, parser.error) == ([], None)


@pytest.mark.parametrize(
    ("media_type", "body"),
    [
        ("application/x-ndjson", b'\n  \r\n{"data":"one"}\r\n\n{"data":"two"}'),
        ("text/event-stream", b"data: one\n\ndata: two"),
        ("text/event-stream", b"data: one\r\rdata: two\r"),
        ("text/event-stream", b"\xef\xbb\xbfdata: one\n\ndata: two\n"),
    ],
)
@pytest.mark.parametrize("cut", [whole, bytewise])
def test_the_end_of_a_body_ends_its_last_frame(media_type: str, body: bytes, cut: Cut) -> None:
    events, parser = read(media_type, cut(body))
    assert parser.error is None
    assert events == [Event("", b"one"), Event("", b"two")]


@pytest.mark.parametrize(
    "item",
    [
        7, "text", None, [], [{"data": "x"}], {}, {"data": None}, {"event": "x"}, {"event": 7, "data": "x"},
        {"event": ["x"], "data": "x"}, {"event": False, "data": "x"}, {"event": "relay", "data": "x"},
        {"event": "a\nb", "data": "x"}, {"event": "a\rb", "data": "x"}, {"event": "a\r\nid: 9", "data": "x"},
    ],
)  # fmt: skip
@pytest.mark.parametrize("media_type", ["application/x-ndjson", "application/msgpack"])
@pytest.mark.parametrize("cut", [whole, bytewise])
def test_what_is_no_frame_is_named_by_its_number_behind_those_before_it(
    media_type: str, item: Any, cut: Cut
) -> None:
    items = [{"data": "one"}, {"data": "two"}, item, {"data": "never"}]
    if media_type == "application/x-ndjson":
        body = b"".join(json.dumps(frame).encode() + b"\n" for frame in items)
    else:
        body = b"".join(map(msgpack.packb, items))
    events, parser = read(media_type, cut(body))
    assert events == [Event("", b"one"), Event("", b"two")]
    assert isinstance(parser.error, InvalidEvent)
    assert parser.error.extra["frame"] == 3
    with pytest.raises(InvalidEvent) as raised:
        events_of_json(json.dumps(items).encode(), MAX_BYTES)
    assert raised.value.extra["frame"] == 3


@pytest.mark.parametrize(
    ("media_type", "tail"),
    [
        ("application/x-ndjson", b'{"data":\n'),
        ("application/x-ndjson", b"data: x\n"),
        ("application/x-ndjson", b'{"data":"cut'),
        ("application/x-ndjson", b'{"data":"\\ud800"}\n'),
        ("application/x-ndjson", b"[" * 5000 + b"\n"),
        ("application/x-ndjson", b'{"data":' + b"[" * 300 + b"]" * 300 + b"}\n"),
        ("application/msgpack", b"\xc1"),
        ("application/msgpack", b"\x81\xa4data"),
        ("application/msgpack", b"\x81\xa4data\xa5cut"),
        ("application/msgpack", b"\x81\xa4data\xa2\xff\xfe"),
        ("application/msgpack", b"\x81\x90\xa1x"),
        ("application/msgpack", b"\x81\xa4data\xc4\x01x"),
        ("application/msgpack", b"\x81\xa4data\xd6\xff\x00\x00\x00\x00"),
        ("application/msgpack", b"\x91" * 5000),
        ("application/msgpack", msgpack.packb({"data": {"a": b"x"}})),
        ("text/event-stream", b"event: relay\ndata: x\n\n"),
    ],
)
@pytest.mark.parametrize("cut", [whole, bytewise])
def test_what_cannot_be_read_is_an_invalid_event(media_type: str, tail: bytes, cut: Cut) -> None:
    first = {
        "application/x-ndjson": b'{"data":"one"}\n',
        "application/msgpack": msgpack.packb({"data": "one"}),
        "text/event-stream": b"data: one\n\n",
    }[media_type]
    events, parser = read(media_type, cut(first + tail))
    assert events == [Event("", b"one")]
    assert isinstance(parser.error, InvalidEvent)
    assert parser.error.extra["frame"] == 2


@pytest.mark.parametrize("media_type", FORMATS)
@pytest.mark.parametrize("cut", [whole, sevens])
def test_a_frame_may_be_as_large_as_the_bound_and_no_larger(media_type: str, cut: Cut) -> None:
    def body(data: str) -> bytes:
        if media_type == "application/x-ndjson":
            return json.dumps({"data": data}).encode()
        if media_type == "application/msgpack":
            return bytes(msgpack.packb({"data": data}))
        return f"data: {data}\n\n".encode()

    largest = "é" * 500
    assert read(media_type, cut(body(largest)), 1000)[0] == [Event("", largest.encode())]
    events, parser = read(media_type, cut(body(largest + "x")), 1000)
    assert events == []
    assert isinstance(parser.error, FrameTooLarge)
    assert parser.error.extra == {"frame": 1, "limit": 1000}


@pytest.mark.parametrize(
    ("media_type", "endless"),
    [
        ("application/x-ndjson", b" "),
        ("application/x-ndjson", b"[1,"),
        ("application/msgpack", b"\xdd\xff\xff\xff\xff"),
        ("application/msgpack", b"\x9f"),
        ("application/msgpack", b"\xdc\x00\xff" + b"\xc0" * 200),
        ("text/event-stream", b"data: x\n"),
        ("text/event-stream", b":"),
    ],
)
def test_a_frame_without_end_is_given_up_at_the_bound(media_type: str, endless: bytes) -> None:
    parser = FORMATS[media_type](1000)
    pieces = 0
    while parser.error is None:
        pieces += 1
        assert parser.feed(endless * 100, False) == []
        assert pieces * len(endless) < 20_000
    assert isinstance(parser.error, CallerError)


@pytest.mark.parametrize("body", [b"{", b"nothing", b"\xff", b'{"data":"a"}{"data":"b"}'])
def test_a_json_body_that_is_none_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidEvent):
        events_of_json(body, MAX_BYTES)


def test_a_json_body_may_be_one_frame() -> None:
    assert events_of_json(b'{"data":"one"}', MAX_BYTES) == [Event("", b"one")]
    with pytest.raises(FrameTooLarge):
        events_of_json(b'[{"data":"one"},{"data":"three"}]', 4)
    with pytest.raises(FrameTooLarge):
        events_of_json(b'{"event":"name","data":""}', 3)
