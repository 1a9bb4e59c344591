"""relay.frame: what is journaled, and the control frames relay journals itself."""

from __future__ import annotations

import orjson
import pytest

from relay.cursor import Cursor
from relay.errors import InvalidEvent
from relay.frame import (
    CONTROL_EVENT,
    Frame,
    check_event_name,
    control,
    frame_object,
    run_ended,
    run_started,
    timestamp,
)
from relay.lifecycle import Reason, ending

FRAME = Frame(42, 1763726400860, "run-1", "delta", '{"text":"hé"}'.encode())


def test_a_frames_id_is_its_cursor():
    assert FRAME.id == Cursor(42, 1763726400860)


def test_only_the_reserved_event_name_makes_a_control_frame():
    assert FRAME._replace(event=CONTROL_EVENT).is_control
    assert not any(FRAME._replace(event=event).is_control for event in ("", "delta", "Relay", "relay "))


@pytest.mark.parametrize("event", ["", "delta", "a b", " a", "relay.x", "Relay", "é…", "a:b", "\u2028"])
def test_an_event_name_that_fits_on_a_line_is_kept_as_it_is(event):
    assert check_event_name(event) == event


@pytest.mark.parametrize("event", [CONTROL_EVENT, "a\nb", "a\rb", "a\r\n", "\n"])
def test_a_reserved_or_unwritable_event_name_is_refused(event):
    with pytest.raises(InvalidEvent):
        check_event_name(event)


@pytest.mark.parametrize(
    ("ms", "text"),
    [
        (0, "1970-01-01T00:00:00.000Z"),
        (7, "1970-01-01T00:00:00.007Z"),
        (1763726400860, "2025-11-21T12:00:00.860Z"),
        (1763726400999, "2025-11-21T12:00:00.999Z"),
        (1763726401000, "2025-11-21T12:00:01.000Z"),
    ],
)
def test_a_time_is_rfc_3339_in_utc_with_milliseconds(ms, text):
    assert timestamp(ms) == text


def test_every_millisecond_of_a_second_keeps_its_second():
    """A float that rounds up would show the next second with the old milliseconds."""
    for ms in range(1000):
        assert timestamp(1763726459000 + ms) == f"2025-11-21T12:00:59.{ms:03d}Z"


def test_a_frame_as_an_object_has_id_event_data_run_and_time():
    assert frame_object(FRAME) == {
        "id": "42-1763726400860",
        "event": "delta",
        "data": '{"text":"hé"}',
        "run": "run-1",
        "at": "2025-11-21T12:00:00.860Z",
    }


def test_control_data_is_one_line_of_json_with_its_type_first():
    data = control("live", cursor="4-2", note="a\nb\rc")
    assert data == b'{"type":"live","cursor":"4-2","note":"a\\nb\\rc"}'


def test_control_data_leaves_out_none_and_only_none():
    assert orjson.loads(control("x", a=None, b=0, c="", d=False, e=[])) == {
        "type": "x",
        "b": 0,
        "c": "",
        "d": False,
        "e": [],
    }


def test_the_frame_that_opens_a_run_names_run_dialect_and_metadata():
    assert orjson.loads(run_started("r1", "openai-chat", {"user": 7})) == {
        "type": "run.started",
        "run": "r1",
        "dialect": "openai-chat",
        "metadata": {"user": 7},
    }
    assert orjson.loads(run_started("r1", None, None)) == {"type": "run.started", "run": "r1"}


def test_the_frame_that_ends_a_run_says_how_and_how_much():
    failed = ending(Reason.UPSTREAM_TRUNCATED, "no [DONE]")
    assert orjson.loads(run_ended("r1", failed, 3, 40)) == {
        "type": "run.ended",
        "run": "r1",
        "status": "failed",
        "reason": "upstream_truncated",
        "error": "no [DONE]",
        "frames": 3,
        "text_bytes": 40,
    }


def test_an_ending_without_an_error_has_no_error_member():
    document = orjson.loads(run_ended("r1", ending(Reason.PRODUCER_END), 0, 0))
    assert "error" not in document
    assert document["frames"] == document["text_bytes"] == 0


@pytest.mark.parametrize("reason", Reason)
def test_every_ending_can_be_written(reason):
    document = orjson.loads(run_ended("r1", ending(reason, "why\ud800"), 1, 1))
    assert document["reason"] == reason.value
    assert document["error"] == "why?"
