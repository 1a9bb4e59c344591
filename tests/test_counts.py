"""relay.counts: what is counted while a process works."""

from __future__ import annotations

import pytest

from relay.counts import PROXIED, PUSHED, Counts, Distribution
from relay.frame import Event

EVENTS = [Event("", b"a"), Event("note", b"bcd"), Event("", "é".encode())]


@pytest.mark.parametrize(
    ("value", "at"), [(-1.0, 0), (0.0, 0), (1.0, 0), (1.5, 1), (2.0, 1), (2.1, 2), (1e9, 2)]
)
def test_a_value_is_counted_under_the_first_bound_that_it_does_not_exceed(value: float, at: int) -> None:
    spread = Distribution((1.0, 2.0))
    spread.observe(value)
    assert [index for index, count in enumerate(spread.counts) if count] == [at]
    assert spread.total == value


def test_a_distribution_can_begin_anew() -> None:
    spread = Distribution((1.0,))
    spread.observe(5.0)
    spread.clear()
    assert (spread.counts, spread.total) == ([0, 0], 0.0)


def test_an_append_is_counted_for_its_source_with_frames_and_bytes_of_data() -> None:
    counts = Counts()
    counts.appended(PROXIED, EVENTS, 3, 0.002)
    counts.appended(PUSHED, EVENTS[:1], 1, 0.002)
    assert (counts.journaled[PROXIED].frames, counts.journaled[PROXIED].bytes) == (3, 6)
    assert (counts.journaled[PUSHED].frames, counts.journaled[PUSHED].bytes) == (1, 1)
    assert sum(counts.append_duration.counts) == 2
    assert counts.append_duration.total == 0.004


@pytest.mark.parametrize(("new", "size"), [(0, 0), (1, 2), (2, 5)])
def test_what_the_journal_had_already_is_counted_as_that(new: int, size: int) -> None:
    """The repeated frames are the first ones of a batch."""
    counts = Counts()
    counts.appended(PUSHED, EVENTS, new, 0.001)
    assert (counts.journaled[PUSHED].frames, counts.journaled[PUSHED].bytes) == (new, size)
    assert counts.duplicates_suppressed == 3 - new


def test_an_ending_alone_is_an_append_without_frames() -> None:
    counts = Counts()
    counts.appended(PROXIED, (), 0, 0.001)
    assert sum(counts.append_duration.counts) == 1
    assert counts.journaled[PROXIED].frames == counts.duplicates_suppressed == 0
