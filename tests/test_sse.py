"""relay.sse against the event stream format of the WHATWG HTML standard (9.2.5, 9.2.6)."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.errors import FrameTooLarge
from relay.frame import Frame
from relay.sse import (
    LINE_OVERHEAD_BYTES,
    EventStreamParser,
    ServerSentEvent,
    comment,
    encode_event,
    encode_wire,
)

ROOMY = 1 << 20
BOM = b"\xef\xbb\xbf"
LONG = b"x" * 2049


class Outcome(NamedTuple):
    """All that a parse can be seen to do."""

    events: list[ServerSentEvent]
    last_event_id: str
    retry_ms: int | None
    overflowed: bool


def parse(chunks: list[bytes], max_data_bytes: int = ROOMY) -> Outcome:
    parser = EventStreamParser(max_data_bytes)
    events: list[ServerSentEvent] = []
    for chunk in chunks:
        events += parser.feed(chunk)
        if parser.overflow is not None:
            break
    return Outcome(events, parser.last_event_id, parser.retry_ms, parser.overflow is not None)


def reference(body: bytes, max_data_bytes: int = ROOMY) -> Outcome:
    """The spec's steps, one by one, over the whole decoded body."""
    body = body.removeprefix(BOM)
    text = body.decode("utf-8", errors="replace")
    raw_lines = re.split(rb"\r\n|\r|\n", body)
    lines = re.split(r"\r\n|\r|\n", text)
    assert len(lines) == len(raw_lines)

    events: list[ServerSentEvent] = []
    data_buffer = event_type = id_buffer = last_event_id = ""
    retry_ms: int | None = None
    for number, (line, raw_line) in enumerate(zip(lines, raw_lines, strict=True)):
        if len(raw_line) > max_data_bytes + LINE_OVERHEAD_BYTES:
            return Outcome(events, last_event_id, retry_ms, True)
        if number == len(lines) - 1:
            break  # its end has not come
        if line == "":
            last_event_id = id_buffer
            if data_buffer == "":
                event_type = ""
                continue
            data_buffer = data_buffer[:-1]
            events.append(ServerSentEvent(event_type, data_buffer.encode(), last_event_id))
            data_buffer = event_type = ""
            continue
        if line[0] == ":":
            continue
        field, value = line, ""
        if ":" in line:
            field, value = line[: line.index(":")], line[line.index(":") + 1 :]
            if value[:1] == " ":
                value = value[1:]
        if field == "event":
            event_type = value
        elif field == "data":
            data_buffer += value + "\n"
            if len(data_buffer[:-1].encode()) > max_data_bytes:
                return Outcome(events, last_event_id, retry_ms, True)
        elif field == "id":
            if "\0" not in value:
                id_buffer = value
        elif field == "retry" and value != "" and all(character in "0123456789" for character in value):
            retry_ms = int(value)
    return Outcome(events, last_event_id, retry_ms, False)


# The cases of web-platform-tests `eventsource/format-*`, and some of our own.
# name: body, the (event, data, last event id) to be dispatched, the reconnection time to be kept
CASES: dict[str, tuple[bytes, list[tuple[str, bytes, str]], int | None]] = {
    "one byte order mark is dropped, only at the start": (
        BOM + b"data:1\n\n" + BOM + b"data:2\n\ndata:3\n\n",
        [("", b"1", ""), ("", b"3", "")],
        None,
    ),
    "a second byte order mark is part of a field name": (
        BOM + BOM + b"data:1\n\ndata:2\n\ndata:3\n\n",
        [("", b"2", ""), ("", b"3", "")],
        None,
    ),
    "two thirds of a byte order mark are not one": (
        BOM[:2] + b"data:1\n\ndata:2\n\n",
        [("", b"2", "")],
        None,
    ),
    "a byte order mark before a blank line": (BOM + b"\ndata:1\n\n", [("", b"1", "")], None),
    "a byte order mark in data is data": (b"data:" + BOM + b"\n\n", [("", BOM, "")], None),
    "comments of any length and line end are skipped": (
        b"data:1\r:\0\n:\r\ndata:2\n:" + LONG + b"\rdata:3\n:data:fail\r:" + LONG + b"\ndata:4\n\n",
        [("", b"1\n2\n3\n4", "")],
        None,
    ),
    "an event without its blank line is discarded, and so is its id": (
        b"retry:1000\ndata:test1\n\nid:test\ndata:test2",
        [("", b"test1", "")],
        1000,
    ),
    "an event whose last line ended but which has no blank line is discarded": (
        b"data:test1\n\ndata:test2\r\n",
        [("", b"test1", "")],
        None,
    ),
    "empty data is dispatched, and every data line but the last adds a LF": (
        b"data:\n\ndata\ndata\n\ndata:test\n\n",
        [("", b"", ""), ("", b"\n", ""), ("", b"test", "")],
        None,
    ),
    "an event name holds for one event": (
        b"event:test\ndata:x\n\ndata:x\n\n",
        [("test", b"x", ""), ("", b"x", "")],
        None,
    ),
    "the last event name wins": (b"event:a\nevent:b\ndata:x\n\n", [("b", b"x", "")], None),
    "an empty event name is none": (b"event: \ndata:data\n\n", [("", b"data", "")], None),
    "an event field without colon unsets the name": (b"event:a\nevent\ndata:x\n\n", [("", b"x", "")], None),
    "an event name may hold NUL and any Unicode": (
        "event:\0é…\ndata:x\n\n".encode(),
        [("\0é…", b"x", "")],
        None,
    ),
    "an event without data is not dispatched and its name is forgotten": (
        b"event:lost\n\ndata:x\n\n",
        [("", b"x", "")],
        None,
    ),
    "an id may be any Unicode and stays until the next": (
        "id: …\ndata:hello\n\ndata:again\n\nid:2\ndata:other\n\n".encode(),
        [("", b"hello", "…"), ("", b"again", "…"), ("", b"other", "2")],
        None,
    ),
    "an id counts from its event on, wherever it stands in it": (
        b"data:1\nid:a\n\nid:b\ndata:2\n\n",
        [("", b"1", "a"), ("", b"2", "b")],
        None,
    ),
    "an id in a block without data stays": (b"id:1\n\ndata:x\n\n", [("", b"x", "1")], None),
    "an empty id resets it": (
        b"id:1\ndata:a\n\nid\ndata:b\n\nid:2\ndata:c\n\nid:\ndata:d\n\n",
        [("", b"a", "1"), ("", b"b", ""), ("", b"c", "2"), ("", b"d", "")],
        None,
    ),
    "an id that holds NUL is ignored": (
        b"id:ok\ndata:0\n\nid:\0\ndata:1\n\nid:x\0\ndata:2\n\n"
        b"id:\0x\ndata:3\n\nid:x\0x\ndata:4\n\nid: \0\ndata:5\n\n",
        [("", b"%d" % number, "ok") for number in range(6)],
        None,
    ),
    "field names are exact, one space after the colon is dropped": (
        b"data:\0\ndata:  2\rData:1\ndata\0:2\ndata:1\r\0data:4\n"
        b"da-ta:3\rdata_5\ndata:3\rdata:\r\n data:32\ndata:4\n\n",
        [("", b"\0\n 2\n1\n3\n\n4", "")],
        None,
    ),
    "a space before the colon belongs to the name": (b"data :1\ndata: 2\n\n", [("", b"2", "")], None),
    "only the first colon divides": (b"data: a: b\n\n", [("", b"a: b", "")], None),
    "retry is read in base ten": (b"retry:03000\ndata:x\n\n", [("", b"x", "")], 3000),
    "retry needs no event": (b"retry: 7\n", [], 7),
    "retry with anything but digits is ignored": (
        b"retry:3000\nretry:1000x\nretry:-1\nretry:+1\nretry: 1 \nretry:1_0\nretry:1.5\ndata:x\n\n",
        [("", b"x", "")],
        3000,
    ),
    "retry with other digits than ASCII is ignored": ("retry:٣\ndata:x\n\n".encode(), [("", b"x", "")], None),
    "an empty retry is ignored": (b"retry\nretry:\ndata:test\n\n", [("", b"test", "")], None),
    "unknown fields are ignored": (
        b"data:test\n data\ndata\nfoobar:xxx\njustsometext\n:thisisacommentyay\ndata:test\n\n",
        [("", b"test\n\ntest", "")],
        None,
    ),
    "only a space is dropped, not a tab": (
        b"data:\ttest\rdata: \ndata:test\n\n",
        [("", b"\ttest\n\ntest", "")],
        None,
    ),
    "CRLF, LF and CR all end lines, mixed": (
        b"data:test\r\ndata\ndata:test\r\n\r",
        [("", b"test\n\ntest", "")],
        None,
    ),
    "LF CR is two line ends": (b"data:a\n\rdata:b\n\r", [("", b"a", ""), ("", b"b", "")], None),
    "CR CR LF is two line ends": (b"data:a\r\r\ndata:b\r\r\n", [("", b"a", ""), ("", b"b", "")], None),
    "other line ends of Unicode end nothing": (
        "data:a\x0bb\x0cc\x1cd\x85e\u2028f\n\n".encode(),
        [("", "a\x0bb\x0cc\x1cd\x85e\u2028f".encode(), "")],
        None,
    ),
    "NUL is data": (b"data:\0\n\n\n\n", [("", b"\0", "")], None),
    "blank lines dispatch nothing": (b"\n\r\n\r\n\n", [], None),
    "an empty body has no events": (b"", [], None),
    "UTF-8 is kept": ("data:ok…\U0001f600\n\n".encode(), [("", "ok…\U0001f600".encode(), "")], None),
    "each invalid sequence is one U+FFFD for its longest valid start": (
        b"data:\xff|\xe2\x82|\xf0\x9f\x98|\xc0\xaf|\xed\xa0\x80|\x80\n\n",
        [("", "data:\ufffd|\ufffd|\ufffd|\ufffd\ufffd|\ufffd\ufffd\ufffd|\ufffd".encode()[5:], "")],
        None,
    ),
    "a sequence cut off by a line end is replaced and the line still ends": (
        b"data:\xe2\x82\ndata:\xf0\r\n\n",
        [("", "\ufffd\n\ufffd".encode(), "")],
        None,
    ),
    "invalid bytes in names and ids are replaced": (
        b"event:\xff\nid:\xfe\ndata:x\n\n",
        [("\ufffd", b"x", "\ufffd")],
        None,
    ),
    "an invalid byte makes another field": (b"data\xff:x\ndata:y\n\n", [("", b"y", "")], None),
}

each_case = pytest.mark.parametrize(("body", "events", "retry_ms"), CASES.values(), ids=CASES.keys())


@each_case
def test_a_body_fed_whole_is_read_as_the_format_says(body, events, retry_ms):
    outcome = parse([body])
    assert outcome.events == events
    assert outcome.retry_ms == retry_ms
    assert not outcome.overflowed


@each_case
def test_the_reference_of_these_tests_agrees_with_the_cases(body, events, retry_ms):
    outcome = reference(body)
    assert (outcome.events, outcome.retry_ms) == (events, retry_ms)


@each_case
def test_a_body_fed_byte_by_byte_is_read_the_same(body, events, retry_ms):
    outcome = parse([body[at : at + 1] for at in range(len(body))])
    assert outcome.events == events
    assert outcome.retry_ms == retry_ms


@each_case
def test_a_body_cut_anywhere_is_read_the_same(body, events, retry_ms):
    for at in range(len(body) + 1):
        outcome = parse([body[:at], b"", body[at:]])
        assert outcome.events == events, at
        assert outcome.retry_ms == retry_ms, at


@each_case
def test_bytes_that_follow_change_nothing_that_came_before(body, events, retry_ms):
    assert parse([body + b"unfinished"]).events == events
    followed = parse([body + b"unfinished\n\nid\ndata: after\n\n"]).events
    assert followed[: len(events)] == events
    assert followed[-1] == ("", b"after", "")


@pytest.mark.parametrize("end", [b"\n\n", b"\r\r", b"\r\n\r", b"\n\r", b"\r\n\n"])
def test_an_event_is_given_with_the_byte_that_completes_it(end):
    """A lone CR ends a line at once: to wait for a LF would delay the event by a chunk."""
    parser = EventStreamParser(ROOMY)
    body = b"data: x" + end
    assert [parser.feed(body[at : at + 1]) for at in range(len(body) - 1)] == [[]] * (len(body) - 1)
    assert parser.feed(body[-1:]) == [("", b"x", "")]


def test_a_line_feed_that_follows_a_chunk_ending_in_cr_is_no_blank_line():
    parser = EventStreamParser(ROOMY)
    assert parser.feed(b"data: a\r") == []
    assert parser.feed(b"") == []
    assert parser.feed(b"\n") == []
    assert parser.feed(b"data: b\r") == []
    assert parser.feed(b"\ndata: c\n\n") == [("", b"a\nb\nc", "")]


def test_only_one_line_feed_is_swallowed_after_cr():
    parser = EventStreamParser(ROOMY)
    assert parser.feed(b"data: a\r") == []
    assert parser.feed(b"\n\n") == [("", b"a", "")]


def test_the_last_event_id_is_set_by_the_blank_line_and_not_before():
    parser = EventStreamParser(ROOMY)
    parser.feed(b"id: 1\ndata: x\n")
    assert parser.last_event_id == ""
    parser.feed(b"\n")
    assert parser.last_event_id == "1"
    parser.feed(b"id: 2\n\n")
    assert parser.last_event_id == "2"


def test_a_retry_too_long_for_an_integer_is_ignored():
    assert parse([b"retry: " + b"9" * 18 + b"\n"]).retry_ms == 10**18 - 1
    assert parse([b"retry: 5\nretry: " + b"9" * 5000 + b"\n"]).retry_ms == 5


def test_data_of_just_the_bound_passes_and_one_byte_more_overflows():
    body = b"data: 12345678\n\n"
    assert parse([body], 8) == ([("", b"12345678", "")], "", None, False)
    assert parse([body], 7) == ([], "", None, True)


def test_the_line_feeds_between_data_lines_count():
    body = b"data: 123\ndata: 567\n\n"
    assert parse([body], 7).events == [("", b"123\n567", "")]
    assert parse([body], 6).overflowed


def test_replacement_characters_count_as_the_bytes_they_become():
    body = b"data: \xff\xff\n\n"
    assert not parse([body], 6).overflowed
    assert parse([body], 5).overflowed


def test_many_empty_data_lines_are_bounded_too():
    assert parse([b"data\n" * 100 + b"\n"], 98).overflowed
    assert parse([b"data\n" * 100 + b"\n"], 99).events == [("", b"\n" * 99, "")]


@pytest.mark.parametrize("start", [b":", b"unknown:", b"unknown", b"data:", b"id:", b"event:", b"retry:"])
@pytest.mark.parametrize("end", [b"", b"\n", b"\r", b"\r\n\r\n"])
def test_a_line_of_any_kind_is_bounded_whether_it_ends_or_not(start, end):
    line = start.ljust(100 + LINE_OVERHEAD_BYTES + 1, b"1")
    assert parse([line + end], 100).overflowed
    if start != b"data:":
        assert not parse([line[:-1] + end], 100).overflowed


def test_a_byte_order_mark_does_not_count_against_the_first_line():
    line = b":".ljust(LINE_OVERHEAD_BYTES, b"x")
    for chunks in ([BOM + line], [BOM, line], [BOM + line + b"\n"]):
        assert not parse(chunks, 0).overflowed


def test_events_before_an_overflow_are_given_and_later_feeds_raise():
    parser = EventStreamParser(4)
    assert parser.feed(b"id: 7\ndata: ok\n\ndata: too long\n\ndata: no\n\n") == [("", b"ok", "7")]
    assert isinstance(parser.overflow, FrameTooLarge)
    assert "4 bytes" in parser.overflow.detail
    for chunk in (b"data: x\n\n", b""):
        with pytest.raises(FrameTooLarge):
            parser.feed(chunk)


def test_an_event_after_a_large_one_starts_from_nothing():
    body = b"data: 12345678\n\n" * 3
    assert len(parse([body], 8).events) == 3


def test_what_is_kept_of_an_endless_line_is_bounded():
    """P6: a producer that never ends its line costs at most the bound and one chunk."""
    parser = EventStreamParser(1000)
    fed = 0
    while parser.overflow is None:
        assert parser.feed(b"x" * 100) == []
        fed += 100
    assert fed <= 1000 + LINE_OVERHEAD_BYTES + 100


TOKENS = [
    *(b"\n", b"\r", b"\r\n", b"\n\n", b"\r\r", b":", b" ", b": ", b"\0", b"\t", BOM, BOM[:1], BOM[:2]),
    *(b"data", b"data:", b"data: ", b"event:", b"event: e", b"id", b"id:", b"id: 5", b"retry:", b"retry: 12"),
    *(b"Data:", b"x", b"{}", b"7", "é".encode(), "€".encode(), "\U0001f600".encode(), b"\xe2\x82", b"\xff"),
    *(b"\xf0\x9f", b"\x80", "\u2028".encode(), b"\x85", b"\x0b", b"y" * 700, b"z" * 1030),
]
bodies = st.lists(st.sampled_from(TOKENS) | st.binary(max_size=4), max_size=40).map(b"".join) | st.binary()
bounds = st.sampled_from([0, 1, 8, 40, 700, ROOMY])


def cut(body: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(body) + 1) for place in places), len(body)]
    return [body[start:end] for start, end in pairwise(edges)]


@settings(deadline=None, max_examples=1000)
@given(body=bodies, places=st.lists(st.integers(0, 10_000), max_size=8), max_data_bytes=bounds)
def test_any_bytes_in_any_chunks_are_read_as_the_reference_reads_them(body, places, max_data_bytes):
    expected = reference(body, max_data_bytes)
    assert parse([body], max_data_bytes) == expected
    assert parse(cut(body, places), max_data_bytes) == expected
    assert parse([body[at : at + 1] for at in range(len(body))], max_data_bytes) == expected


SHORT = [
    *(b"data: a\n\n", b"data: \n\n", b"data:a\n\n", b"data:  a\n\n", b"data: \xff\n\n", b"data: " + LONG),
    *(b"data: a\r\n\n", b"data: a\rdata: b\n\n", b"data: a\ndata: b\n\n", b"data: a\n\n\n", b"data: a\n"),
    *(b"\n", b"\r", b"id: 5\n", b"id: 6\n\n", b"event: e\n", b": a comment\n\n", b"dat", b"", BOM),
]


@settings(deadline=None, max_examples=500)
@given(chunks=st.lists(st.sampled_from(SHORT), max_size=8), max_data_bytes=bounds)
def test_a_chunk_that_is_one_event_is_read_as_any_other(chunks, max_data_bytes):
    parser = EventStreamParser(max_data_bytes)
    events: list[ServerSentEvent] = []
    for chunk in chunks:
        lone = parser.lone(chunk)
        if lone is not None:
            events.append(ServerSentEvent("", lone, parser.last_event_id))
        else:
            events += parser.feed(chunk)
        if parser.overflow is not None:
            break
    found = Outcome(events, parser.last_event_id, parser.retry_ms, parser.overflow is not None)
    assert found == reference(b"".join(chunks), max_data_bytes)


def test_only_a_chunk_that_is_one_event_is_taken_for_one():
    parser = EventStreamParser(ROOMY)
    assert parser.lone(b"data: a\n\n") is None, "a byte order mark may still come"
    assert parser.feed(b": hello\n\n") == []
    assert parser.lone(b"data: a\n\n") == b"a"
    assert parser.lone(b"data: a\n\ndata: b\n\n") is None
    assert parser.feed(b"event: e\n") == []
    assert parser.lone(b"data: a\n\n") is None, "it has a name"


@settings(deadline=None)
@given(chunks=st.lists(bodies, max_size=6), max_data_bytes=bounds)
def test_no_input_raises_anything_but_frame_too_large(chunks, max_data_bytes):
    parser = EventStreamParser(max_data_bytes)
    for chunk in chunks:
        overflowed = parser.overflow is not None
        try:
            events = parser.feed(chunk)
        except FrameTooLarge:
            assert overflowed
        else:
            assert not overflowed
            assert all(len(event.data) <= max_data_bytes for event in events)
            assert all(event.data.decode().encode() == event.data for event in events)


def frame(event: str, data: bytes, seq: int = 42) -> Frame:
    return Frame(seq, 1763726400860, "run-1", event, data)


@pytest.mark.parametrize(
    ("event", "data", "wire"),
    [
        ("delta", b'{"text":"hel"}', b'event: delta\ndata: {"text":"hel"}\n\n'),
        ("", b"x", b"data: x\n\n"),
        ("", b"", b"data: \n\n"),
        ("", b" x", b"data:  x\n\n"),
        ("", b"a\nb", b"data: a\ndata: b\n\n"),
        ("", b"a\r\nb\rc\n", b"data: a\ndata: b\ndata: c\ndata: \n\n"),
        ("", b"\n\r", b"data: \ndata: \ndata: \n\n"),
        ("", b"100% %s %d", b"data: 100% %s %d\n\n"),
        ("é", "…".encode(), "event: é\ndata: …\n\n".encode()),
    ],
)
def test_a_frame_on_the_wire_is_its_id_its_event_and_a_data_line_per_line(event, data, wire):
    assert encode_wire(frame(event, data)) == b"42-1763726400860\n" + wire


def test_one_encoding_serves_both_routes_and_batches():
    wires = [encode_wire(frame("e", b"one", 1)), encode_wire(frame("", b"two", 2))]
    for prefix in (b"id: ", b"id: rly.secret."):
        events = parse([prefix + prefix.join(wires)]).events
        before = prefix.removeprefix(b"id: ").decode()
        assert events == [
            ("e", b"one", before + "1-1763726400860"),
            ("", b"two", before + "2-1763726400860"),
        ]


def as_lines(data: bytes) -> bytes:
    """What an event stream can carry of data: its line ends all become LF."""
    return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


event_names = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=20)
texts = st.text(st.characters(exclude_categories=["Cs"])) | st.text(alphabet="\r\n :a\ufeff\u2028")


@settings(deadline=None)
@given(
    said=st.lists(st.tuples(event_names, texts), min_size=1, max_size=5),
    places=st.lists(st.integers(0, 999)),
)
def test_frames_come_back_from_the_wire_as_they_went(said, places):
    wires = [encode_wire(frame(event, text.encode(), seq)) for seq, (event, text) in enumerate(said, 1)]
    body = b"id: " + b"id: ".join(wires)
    assert parse(cut(body, places)).events == [
        (event, as_lines(text.encode()), f"{seq}-1763726400860") for seq, (event, text) in enumerate(said, 1)
    ]


@settings(deadline=None)
@given(
    id=st.none() | st.text(st.characters(exclude_characters="\r\n\0", exclude_categories=["Cs"])),
    event=event_names,
    text=texts,
    retry_ms=st.none() | st.integers(0, 10**9),
)
def test_a_control_event_comes_back_as_it_went(id, event, text, retry_ms):
    outcome = parse([encode_event(id=id, event=event, data=text.encode(), retry_ms=retry_ms)])
    assert outcome.events == [(event, as_lines(text.encode()), id or "")]
    assert outcome.retry_ms == retry_ms


def test_a_control_event_without_an_id_leaves_the_readers_id_alone():
    body = encode_wire(frame("", b"x"))
    hello = encode_event(id=None, event="relay", data=b"{}")
    assert hello == b"event: relay\ndata: {}\n\n"
    assert parse([b"id: " + body + hello]).last_event_id == "42-1763726400860"


def test_a_control_event_can_carry_a_retry_of_zero():
    block = encode_event(id="0-0", event="relay", data=b"{}", retry_ms=0)
    assert block == b"id: 0-0\nretry: 0\nevent: relay\ndata: {}\n\n"


def test_a_comment_is_a_bare_line_without_a_blank_one():
    """DESIGN 3.2: the OpenAI Python SDK dispatches at every blank line."""
    assert comment(b"hb") == b": hb\n"


@settings(deadline=None)
@given(text=texts)
def test_a_comment_never_is_anything_but_a_comment(text):
    body = b"data: a\n" + comment(text.encode()) + b"data: b\n\n"
    assert parse([body]).events == [("", b"a\nb", "")]
