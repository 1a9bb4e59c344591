"""relay.cursor: reading ids, and judging them against what a journal holds."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from relay.cursor import (
    ORIGIN,
    RESUME_PREFIX,
    Cursor,
    Extent,
    ResumeId,
    Standing,
    judge,
    parse_cursor,
    parse_resume_id,
)
from relay.errors import MalformedCursor, ResumeUnknown

TOKEN = "Abcdefghij_-0123456789"


@pytest.mark.parametrize(
    ("text", "cursor"),
    [
        ("0-0", ORIGIN),
        ("42-1763726400860", Cursor(42, 1763726400860)),
        ("999999999999999999-999999999999999999", Cursor(10**18 - 1, 10**18 - 1)),
    ],
)
def test_a_cursor_is_read_and_written_the_same(text, cursor):
    assert parse_cursor(text) == cursor
    assert str(cursor) == text


MALFORMED = [
    *("", "-", "1", "1-", "-1", "1-2-3", "1_2", "1:2", "a-b", "0x1-0", "1.0-2", "1e3-2"),
    *("0-5", "01-0", "0-00", "+1-2", "--1-2", "1--2", " 1-2", "1-2 ", "1-2\n", "\n1-2", "1 -2", "1-2\0"),
    *("1000000000000000000-0", "0-1000000000000000000", "9" * 5000 + "-0"),
    *("٣-1", "1-\uff11", "1\u20132", "start", "tail"),
]


@pytest.mark.parametrize("text", MALFORMED)
def test_a_malformed_cursor_is_refused_and_never_guessed_at(text):
    with pytest.raises(MalformedCursor):
        parse_cursor(text)


@settings(deadline=None)
@given(st.text())
def test_any_text_is_a_cursor_or_malformed(text):
    try:
        cursor = parse_cursor(text)
    except MalformedCursor:
        return
    assert str(cursor) == text


@settings(deadline=None)
@given(st.integers(1, 10**18 - 1), st.integers(0, 10**18 - 1))
def test_every_cursor_can_be_kept_by_a_journal(seq, ms):
    """Both halves fit the signed 64 bits of SQLite."""
    assert parse_cursor(str(Cursor(seq, ms))) == (seq, ms)
    assert max(seq, ms) < 2**63


def test_cursors_order_by_seq_first():
    assert ORIGIN < Cursor(1, 900) < Cursor(2, 5) < Cursor(2, 6) < Cursor(10, 0)


def test_a_resume_id_is_read_into_its_token_and_cursor():
    assert parse_resume_id(f"rly.{TOKEN}.42-17") == ResumeId(TOKEN, Cursor(42, 17))
    assert parse_resume_id(f"{RESUME_PREFIX}{'a' * 64}.0-0") == ResumeId("a" * 64, ORIGIN)


@pytest.mark.parametrize(
    "text",
    [
        *("", "rly.", "rly..1-2", "42-17", f"rly.{TOKEN}", f"rly.{TOKEN}."),
        *(f"RLY.{TOKEN}.1-2", f"{TOKEN}.1-2"),
        *(f"rly.{TOKEN[:-1]}.1-2", f"rly.{'a' * 65}.1-2", f"rly.{TOKEN}!.1-2", f"rly.{TOKEN}é.1-2"),
        *(f" rly.{TOKEN}.1-2", f"rly.{TOKEN}.1-2\n", f"rly.{TOKEN}. 1-2", f"rly.{TOKEN}.1-2.3"),
        *(f"rly.{TOKEN}.{cursor}" for cursor in MALFORMED),
    ],
)
def test_what_is_not_a_resume_id_is_unknown_and_never_a_malformed_cursor(text):
    """DESIGN 3.2: a forged one is 410 `resume_unknown`, never a new answer."""
    with pytest.raises(ResumeUnknown):
        parse_resume_id(text)


CREATED = 1000
WHOLE = Extent(CREATED, 1, Cursor(10, 1100))  # frames 1..10
TRIMMED = Extent(CREATED, 5, Cursor(10, 1100))  # frames 5..10
ALL_TRIMMED = Extent(CREATED, 11, Cursor(10, 1100))  # no frame is left
EMPTY = Extent(CREATED, 1, ORIGIN)


@pytest.mark.parametrize(
    ("cursor", "extent", "anchor_ms", "standing"),
    [
        (ORIGIN, WHOLE, None, Standing.HERE),
        (ORIGIN, EMPTY, None, Standing.HERE),
        (Cursor(1, 1010), WHOLE, 1010, Standing.HERE),
        (Cursor(10, 1100), WHOLE, 1100, Standing.HERE),
        (Cursor(5, 1050), TRIMMED, 1050, Standing.HERE),
        # the frame itself is gone, all after it are held
        (Cursor(4, 1040), TRIMMED, None, Standing.HERE),
        (Cursor(10, 1100), ALL_TRIMMED, None, Standing.HERE),
        (ORIGIN, TRIMMED, None, Standing.GAP),
        (ORIGIN, ALL_TRIMMED, None, Standing.GAP),
        (Cursor(3, 1030), TRIMMED, None, Standing.GAP),
        (Cursor(9, 1090), ALL_TRIMMED, None, Standing.GAP),
        # older than this life, wherever its seq would fall
        (Cursor(3, 900), WHOLE, 1030, Standing.RECREATED),
        (Cursor(4, 999), TRIMMED, None, Standing.RECREATED),
        (Cursor(3, 900), TRIMMED, None, Standing.RECREATED),
        (Cursor(99, 900), WHOLE, None, Standing.RECREATED),
        (Cursor(1, 900), EMPTY, None, Standing.RECREATED),
        # the same life by its clock, but another frame stands there
        (Cursor(7, 1071), WHOLE, 1070, Standing.DIVERGED),
        (Cursor(10, 1101), TRIMMED, 1100, Standing.DIVERGED),
        (Cursor(11, 1110), WHOLE, None, Standing.AHEAD),
        (Cursor(11, 1110), ALL_TRIMMED, None, Standing.AHEAD),
        (Cursor(1, 1000), EMPTY, None, Standing.AHEAD),
    ],
)
def test_a_cursor_is_judged_by_what_the_journal_holds(cursor, extent, anchor_ms, standing):
    assert judge(cursor, extent, anchor_ms) is standing


def test_every_standing_can_be_the_judgement():
    rows = next(mark for mark in test_a_cursor_is_judged_by_what_the_journal_holds.pytestmark).args[1]
    assert {row[3] for row in rows} == set(Standing)


@pytest.mark.parametrize(
    ("extent", "position"),
    [
        (WHOLE, ORIGIN),
        (EMPTY, ORIGIN),
        (TRIMMED, Cursor(4, CREATED)),
        (ALL_TRIMMED, Cursor(10, CREATED)),
    ],
)
def test_the_position_given_out_with_a_loss_is_before_the_earliest_frame(extent, position):
    assert extent.before_earliest == position


@pytest.mark.parametrize("extent", [WHOLE, EMPTY, TRIMMED, ALL_TRIMMED])
def test_a_reader_told_of_a_loss_is_not_told_again(extent):
    """P8: the position that says it is itself a cursor that stands."""
    assert judge(extent.before_earliest, extent, None) is Standing.HERE


def test_a_reader_told_of_a_loss_is_told_of_the_next_one():
    later = TRIMMED._replace(earliest_seq=8)
    assert judge(TRIMMED.before_earliest, later, None) is Standing.GAP
