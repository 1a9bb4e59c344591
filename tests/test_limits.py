"""relay.limits: bounds that are not settings, and the names that are allowed."""

from __future__ import annotations

import pytest

from relay import limits
from relay.cursor import Cursor
from relay.errors import InvalidName

CHECKS = [limits.check_stream_name, limits.check_run_name]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", ["a", "0", "chat-1", "a.b_c~d:e-f", "A" * 200])
def test_a_name_of_allowed_characters_is_kept_as_it_is(check, name):
    assert check(name) == name


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(
    "name",
    [
        *("", "A" * 201, "a b", "a/b", "a\n", "\na", "a\0", "é", "٣"),
        *("a%2Fb", "{a}", "a*", "a?b", "a#b", "a@b", "a\\b"),
    ],
)
def test_any_other_name_is_refused(check, name):
    with pytest.raises(InvalidName):
        check(name)


def test_a_refusal_says_what_kind_of_name_it_was():
    with pytest.raises(InvalidName, match="stream name"):
        limits.check_stream_name("")
    with pytest.raises(InvalidName, match="run name"):
        limits.check_run_name("")


def test_a_page_holds_at_least_one_frame_of_the_largest_size():
    assert limits.PAGE_MAX_BYTES >= limits.FRAME_MAX_BYTES


def test_every_id_relay_gives_out_is_within_the_bound_of_last_event_id():
    longest = f"rly.{'t' * 64}.{Cursor(10**18 - 1, 10**18 - 1)}"
    assert len(longest) <= limits.LAST_EVENT_ID_MAX_BYTES
