from __future__ import annotations

from typing import Any

import pytest

from relay.dialects.payload import byte_length, error_text, is_text, json_object, message_of, place_of
from relay.frame import Event
from relay.lifecycle import Reason, ending


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"3", b"null", b"\xff", b"NaN"])
def test_what_is_no_object_is_none(data: bytes) -> None:
    assert json_object(Event("", data)) is None


def test_an_object_is_read_whatever_the_event_is_called() -> None:
    assert json_object(Event("x", b'{"a":1}')) == {"a": 1}


@pytest.mark.parametrize(
    ("error", "text"),
    [({"message": "no"}, "no"), ("no", "no"), ({"message": " "}, "DATA"), (None, "DATA"), ([1], "DATA")],
)
def test_an_error_says_its_message_or_else_all_of_the_event(error: Any, text: str) -> None:
    assert error_text(error, Event("error", b"DATA")) == text


def test_an_error_is_never_empty() -> None:
    assert error_text(None, Event("error", b"")) == "error"


def test_an_ending_is_told_in_words() -> None:
    assert message_of(ending(Reason.UPSTREAM_ERROR, "no")) == "no"
    assert message_of(ending(Reason.CLIENT_CANCEL)) == "The answer was cancelled: client_cancel."


@pytest.mark.parametrize("text", ["", "abc", "ü€😀"])
def test_length_is_that_in_utf8(text: str) -> None:
    assert byte_length(text) == len(text.encode())


def test_only_what_is_not_empty_is_text() -> None:
    assert [value for value in ("a", "", 3, None, [], {}) if is_text(value)] == ["a"]


@pytest.mark.parametrize(("value", "place"), [(3, 3), ("m1", "m1"), (True, 0), (None, 0), (1.5, 0), ([], 0)])
def test_a_place_is_an_integer_or_text(value: Any, place: int | str) -> None:
    found = place_of(value)
    assert (found, type(found)) == (place, type(place))
