"""relay.ndjson: bodies of newline-delimited JSON, cut into lines."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.errors import FrameTooLarge
from relay.ndjson import LineParser

ROOMY = 1 << 20


def parse(chunks: list[bytes], max_data_bytes: int = ROOMY) -> tuple[list[bytes], bool]:
    """All lines of a body that ends, and whether it overflowed."""
    parser = LineParser(max_data_bytes)
    lines: list[bytes] = []
    for chunk in chunks:
        lines += parser.feed(chunk)
        if parser.overflow is not None:
            return lines, True
    lines += parser.close()
    return lines, parser.overflow is not None


def reference(body: bytes, max_data_bytes: int = ROOMY) -> tuple[list[bytes], bool]:
    """The whole body decoded first, then split."""
    lines: list[bytes] = []
    for text in body.decode(errors="replace").split("\n"):
        line = text.removesuffix("\r").encode()
        if len(line) > max_data_bytes:
            return lines, True
        if line.strip(b" \t\r"):
            lines.append(line)
    return lines, False


CASES: dict[str, tuple[bytes, list[bytes]]] = {
    "an empty body has no lines": (b"", []),
    "each LF ends a line": (b'{"a":1}\n{"b":2}\n', [b'{"a":1}', b'{"b":2}']),
    "a last line without LF is a line": (b"1\n2", [b"1", b"2"]),
    "a CR before LF belongs to the line end": (b"1\r\n2\r\n", [b"1", b"2"]),
    "a CR at the end of the body too": (b"1\n2\r", [b"1", b"2"]),
    "only one CR is taken": (b"1\r\r\n", [b"1\r"]),
    "a CR within a line ends nothing": (b"1\r2\n", [b"1\r2"]),
    "blank lines are skipped": (b"\n\r\n1\n\n \t \n\r\r\n2\n\n", [b"1", b"2"]),
    "a last blank line is skipped": (b"1\n  ", [b"1"]),
    "white space around a value is kept": (b" 1 \n", [b" 1 "]),
    "other line ends of Unicode end nothing": (
        "a\x0bb\x0cc\x85d\u2028e\n".encode(),
        ["a\x0bb\x0cc\x85d\u2028e".encode()],
    ),
    "UTF-8 is kept": ('"é…\U0001f600"\n'.encode(), ['"é…\U0001f600"'.encode()]),
    "invalid UTF-8 is replaced": (b"\xff|\xe2\x82\n\xf0\x9f", ["\ufffd|\ufffd".encode(), "\ufffd".encode()]),
    "NUL is kept": (b"\0\n", [b"\0"]),
}

each_case = pytest.mark.parametrize(("body", "lines"), CASES.values(), ids=CASES.keys())


@each_case
def test_a_body_fed_whole_is_cut_into_its_lines(body, lines):
    assert parse([body]) == (lines, False)
    assert reference(body) == (lines, False)


@each_case
def test_a_body_fed_byte_by_byte_is_cut_the_same(body, lines):
    assert parse([body[at : at + 1] for at in range(len(body))]) == (lines, False)


@each_case
def test_a_body_cut_anywhere_gives_the_same_lines(body, lines):
    for at in range(len(body) + 1):
        assert parse([body[:at], b"", body[at:]]) == (lines, False)


@each_case
def test_bytes_that_follow_change_no_line_before_them(body, lines):
    assert parse([body + b"\nafter\n"]) == ([*lines, b"after"], False)


def test_a_line_is_given_with_its_line_feed():
    parser = LineParser(ROOMY)
    assert parser.feed(b"1\r") == []
    assert parser.feed(b"\n2") == [b"1"]
    assert parser.close() == [b"2"]
    assert parser.close() == []


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n", b"\r"])
def test_a_line_of_just_the_bound_passes_and_one_byte_more_overflows(end):
    assert parse([b"12345678" + end], 8) == ([b"12345678"], False)
    assert parse([b"12345678" + end], 7) == ([], True)


def test_replacement_characters_count_as_the_bytes_they_become():
    assert parse([b"\xff\xff\n"], 6) == (["\ufffd\ufffd".encode()], False)
    assert parse([b"\xff\xff\n"], 5) == ([], True)


def test_a_line_of_white_space_is_bounded_like_any_other():
    assert parse([b" " * 9 + b"\n"], 8) == ([], True)


def test_lines_before_an_overflow_are_given_and_later_calls_raise():
    parser = LineParser(4)
    assert parser.feed(b"ok\ntoo long\nno\n") == [b"ok"]
    assert isinstance(parser.overflow, FrameTooLarge)
    assert "4 bytes" in parser.overflow.detail
    with pytest.raises(FrameTooLarge):
        parser.feed(b"")
    with pytest.raises(FrameTooLarge):
        parser.close()


def test_an_overflow_can_be_found_at_the_end_of_the_body():
    parser = LineParser(4)
    assert parser.feed(b"12345") == []
    assert parser.overflow is None  # the fifth byte could have been the CR of a CRLF
    assert parser.close() == []
    assert isinstance(parser.overflow, FrameTooLarge)


def test_what_is_kept_of_an_endless_line_is_bounded():
    """P6: a producer that never ends its line costs at most the bound and one chunk."""
    parser = LineParser(1000)
    fed = 0
    while parser.overflow is None:
        assert parser.feed(b"x" * 100) == []
        fed += 100
    assert fed <= 1100


TOKENS = [b"\n", b"\r", b"\r\n", b" ", b"\t", b"{}", b"\0", "é€".encode(), b"\xff", b"\xe2\x82", b"y" * 40]
bodies = st.lists(st.sampled_from(TOKENS) | st.binary(max_size=4), max_size=30).map(b"".join)


@settings(deadline=None, max_examples=500)
@given(
    body=bodies,
    places=st.lists(st.integers(0, 1000), max_size=8),
    max_data_bytes=st.sampled_from([0, 1, 2, 8, 40, 42, ROOMY]),
)
def test_any_bytes_in_any_chunks_are_cut_as_the_reference_cuts_them(body, places, max_data_bytes):
    edges = [0, *sorted(place % (len(body) + 1) for place in places), len(body)]
    expected = reference(body, max_data_bytes)
    assert parse([body], max_data_bytes) == expected
    assert parse([body[start:end] for start, end in pairwise(edges)], max_data_bytes) == expected
    assert parse([body[at : at + 1] for at in range(len(body))], max_data_bytes) == expected
