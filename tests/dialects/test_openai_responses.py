from __future__ import annotations

import json
from typing import Any

import pytest

from relay.dialects.base import Delta, Signal
from relay.dialects.openai_responses import OpenAIResponses, is_response_event
from relay.frame import Event
from relay.lifecycle import Reason, ending

RESPONSES = OpenAIResponses()


def event(kind: str, **members: Any) -> Event:
    return Event(kind, json.dumps({"type": kind, "sequence_number": 4, **members}).encode())


def last(kind: str, **members: Any) -> Event:
    return event(kind, response={"id": "resp_1", "object": "response", "error": None, **members})


@pytest.mark.parametrize(
    ("kind", "delta", "text_bytes"),
    [
        ("response.output_text.delta", Delta("text", 1, "ü"), 2),
        ("response.refusal.delta", Delta("refusal", 1, "no"), 2),
        ("response.reasoning_summary_text.delta", Delta("reasoning", 1, "hm"), 0),
        ("response.reasoning_text.delta", Delta("reasoning", 1, "hm"), 0),
    ],
)
def test_text_refusal_and_reasoning_are_parts_of_their_item(kind: str, delta: Delta, text_bytes: int) -> None:
    said = event(kind, output_index=1, content_index=0, item_id="msg_1", delta=delta.text)
    assert RESPONSES.deltas(said) == (delta,)
    assert RESPONSES.read(said) == Signal(text_bytes)


@pytest.mark.parametrize(
    "said",
    [
        event("response.function_call_arguments.delta", output_index=0, delta='{"a":'),
        event("response.output_text.done", output_index=0, text="all of it again"),
        event("response.output_text.delta", output_index=0, delta=7),
        event("response.output_text.delta", output_index=0, delta=""),
        last("response.created"),
        last("response.in_progress", status="in_progress"),
        Event("", b'{"type": 3, "delta": "x"}'),
        Event("", b"[DONE]"),
    ],
)
def test_everything_else_shows_nothing_and_ends_nothing(said: Event) -> None:
    assert RESPONSES.read(said) == Signal()
    assert not RESPONSES.deltas(said)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (last("response.completed", status="completed", usage={"output_tokens": 3}), "upstream_end"),
        (last("response.incomplete", incomplete_details={"reason": "max_output_tokens"}), "upstream_end"),
        (last("response.completed", output=[{"type": "function_call"}]), "upstream_end"),
        (last("response.completed", output=[3, {"type": "mcp_approval_request"}]), "input_required"),
        (last("response.cancelled"), "upstream_cancelled"),
        (last("response.incomplete", status="cancelled"), "upstream_cancelled"),
        (event("response.completed", response=None), "upstream_end"),
    ],
)
def test_the_event_with_the_whole_response_is_the_terminal_marker(said: Event, reason: str) -> None:
    assert RESPONSES.read(said) == Signal(terminal=True, reason=Reason(reason))


@pytest.mark.parametrize(
    ("said", "error"),
    [
        (last("response.failed", error={"code": "server_error", "message": "boom"}), "boom"),
        (event("error", code="busy", message="overloaded", param=None), "overloaded"),
        (event("error", error={"message": "nested"}), "nested"),
        (Event("", b'{"error": {"message": "bare"}}'), "bare"),
        (Event("", b'{"type": "response.failed"}'), '{"type": "response.failed"}'),
    ],
)
def test_an_error_says_what_upstream_said(said: Event, error: str) -> None:
    assert RESPONSES.read(said) == Signal(error=error)


def test_an_answer_that_broke_off_says_so_as_documented_and_as_the_sdk_looks_for_it() -> None:
    said = RESPONSES.error_event(ending(Reason.UPSTREAM_TRUNCATED, "It broke."))
    assert said.event == "error"
    assert json.loads(said.data) == {
        "type": "error",
        "sequence_number": 0,
        "code": "upstream_truncated",
        "message": "It broke.",
        "param": None,
        "error": {
            "type": "relay_failed",
            "code": "upstream_truncated",
            "message": "It broke.",
            "param": None,
        },
    }


def test_its_events_are_known_by_type_and_number() -> None:
    assert is_response_event(last("response.created"))
    assert is_response_event(event("response.output_text.delta", delta="taken up again"))
    assert not is_response_event(Event("", b'{"type": "response.created"}'))
    assert not is_response_event(Event("", b'{"type": 3, "sequence_number": 1}'))
    assert not is_response_event(event("error"))
