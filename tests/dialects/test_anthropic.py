from __future__ import annotations

import json
from typing import Any

import pytest

from relay.dialects.anthropic import Anthropic, is_message_start
from relay.dialects.base import Delta, Signal
from relay.frame import Event
from relay.lifecycle import Reason, ending

ANTHROPIC = Anthropic()


def event(kind: str, **members: Any) -> Event:
    return Event(kind, json.dumps({"type": kind, **members}).encode())


@pytest.mark.parametrize(
    ("said", "delta", "text_bytes"),
    [
        (
            event("content_block_delta", index=1, delta={"type": "text_delta", "text": "ü"}),
            Delta("text", 1, "ü"),
            2,
        ),
        (
            event("content_block_delta", index=0, delta={"type": "thinking_delta", "thinking": "hm"}),
            Delta("reasoning", 0, "hm"),
            0,
        ),
        (
            event("content_block_start", index=2, content_block={"type": "text", "text": "So"}),
            Delta("text", 2, "So"),
            2,
        ),
    ],
)
def test_text_and_thinking_are_parts_of_their_block(said: Event, delta: Delta, text_bytes: int) -> None:
    assert ANTHROPIC.deltas(said) == (delta,)
    assert ANTHROPIC.read(said) == Signal(text_bytes)


@pytest.mark.parametrize(
    "said",
    [
        event("ping"),
        event("message_start", message={"usage": {"input_tokens": 3}}),
        event("content_block_start", index=0, content_block={"type": "text", "text": ""}),
        event("content_block_start", index=0, content_block={"type": "tool_use", "name": "f", "input": {}}),
        event("content_block_delta", index=0, delta={"type": "input_json_delta", "partial_json": "{"}),
        event("content_block_delta", index=0, delta={"type": "signature_delta", "signature": "x"}),
        event("content_block_delta", index=0, delta={"type": "text_delta", "text": 3}),
        event("content_block_delta", index=0, delta=None),
        event("message_delta", delta={"stop_reason": "max_tokens"}, usage={"output_tokens": 3}),
        Event("", b"[DONE]"),
    ],
)
def test_everything_else_shows_nothing_and_ends_nothing(said: Event) -> None:
    assert ANTHROPIC.read(said) == Signal()
    assert not ANTHROPIC.deltas(said)


def test_message_stop_is_the_terminal_marker() -> None:
    assert ANTHROPIC.read(event("message_stop")) == Signal(terminal=True)


@pytest.mark.parametrize(
    ("said", "error"),
    [
        (event("error", error={"type": "overloaded_error", "message": "Overloaded"}), "Overloaded"),
        (Event("error", b"not json"), "not json"),
        (Event("error", b'{"a":1}'), '{"a":1}'),
        (Event("", b'{"type":"error","error":{"message":"unnamed"}}'), "unnamed"),
    ],
)
def test_an_error_says_what_upstream_said(said: Event, error: str) -> None:
    assert ANTHROPIC.read(said) == Signal(error=error)
    assert not ANTHROPIC.deltas(said)


def test_an_answer_that_broke_off_says_so_as_documented() -> None:
    said = ANTHROPIC.error_event(ending(Reason.UPSTREAM_TRUNCATED, "It broke."))
    assert said.event == "error"
    assert json.loads(said.data) == {
        "type": "error",
        "error": {"type": "api_error", "message": "It broke.", "code": "upstream_truncated"},
    }


def test_a_message_is_known_by_its_start() -> None:
    assert is_message_start(event("message_start", message={"role": "assistant"}))
    assert not is_message_start(event("message_start"))
    assert not is_message_start(event("ping"))
    assert not is_message_start(Event("", b"[]"))
