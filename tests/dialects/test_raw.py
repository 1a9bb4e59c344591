from __future__ import annotations

from relay.dialects.base import Delta, Signal
from relay.dialects.raw import Raw
from relay.frame import Event
from relay.lifecycle import Reason, ending


def test_every_byte_of_data_is_text_and_nothing_is_a_marker() -> None:
    assert Raw().read(Event("error", "[DONE] ü".encode())) == Signal(text_bytes=9)


def test_all_data_is_one_part_of_text_whatever_the_event_is_called() -> None:
    assert Raw().deltas(Event("error", "[DONE] ü".encode())) == (Delta("text", 0, "[DONE] ü"),)
    assert Raw().deltas(Event("", b"")) == ()


def test_an_end_without_a_marker_is_no_truncation() -> None:
    assert not Raw().needs_terminal


def test_it_has_no_way_to_say_that_an_answer_broke_off() -> None:
    assert Raw().error_event(ending(Reason.UPSTREAM_TRUNCATED)) is None
