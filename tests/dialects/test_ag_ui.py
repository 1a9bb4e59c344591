from __future__ import annotations

import json
from typing import Any

import pytest

from relay.dialects.ag_ui import AGUI, is_run_started
from relay.dialects.base import Delta, Signal
from relay.frame import Event
from relay.lifecycle import Reason, ending

AG = AGUI()


def event(kind: Any, **members: Any) -> Event:
    return Event("", json.dumps({"type": kind, **members}).encode())


@pytest.mark.parametrize("kind", ["TEXT_MESSAGE_CONTENT", "TEXT_MESSAGE_CHUNK"])
def test_text_is_a_part_of_its_message(kind: str) -> None:
    said = event(kind, messageId="m1", delta="ü")
    assert AG.deltas(said) == (Delta("text", "m1", "ü"),)
    assert AG.read(said) == Signal(2)


@pytest.mark.parametrize(
    "kind", ["REASONING_MESSAGE_CONTENT", "REASONING_MESSAGE_CHUNK", "THINKING_TEXT_MESSAGE_CONTENT"]
)
def test_reasoning_is_a_part_of_its_own(kind: str) -> None:
    assert AG.deltas(event(kind, messageId="r1", delta="hm")) == (Delta("reasoning", "r1", "hm"),)
    assert AG.read(event(kind, messageId="r1", delta="hm")) == Signal()


def test_chunks_without_an_id_are_one_part() -> None:
    assert AG.deltas(event("TEXT_MESSAGE_CHUNK", delta="a")) == (Delta("text", 0, "a"),)


@pytest.mark.parametrize(
    "said",
    [
        event("TOOL_CALL_ARGS", toolCallId="c1", delta="{"),
        event("TOOL_CALL_RESULT", content="text of a tool"),
        event("STATE_DELTA", delta=[{"op": "add"}]),
        event("SUBAGENT_ERROR", message="the run may go on"),
        event("TEXT_MESSAGE_CONTENT", delta=[]),
        event("MESSAGES_SNAPSHOT", messages=[]),
        event(3, delta="x"),
        Event("", b"[DONE]"),
    ],
)
def test_everything_else_shows_nothing_and_ends_nothing(said: Event) -> None:
    assert AG.read(said) == Signal()
    assert not AG.deltas(said)


@pytest.mark.parametrize(
    ("outcome", "reason"),
    [
        (None, "upstream_end"),
        ({"type": "success"}, "upstream_end"),
        ({"type": "interrupt", "interrupts": [{"id": "i1", "reason": "approval"}]}, "input_required"),
        ("interrupt", "input_required"),
        ({"type": "cancelled"}, "upstream_cancelled"),
        ({"type": [1]}, "upstream_end"),
    ],
)
def test_a_finished_run_says_why(outcome: Any, reason: str) -> None:
    said = event("RUN_FINISHED", threadId="t", runId="r", outcome=outcome)
    assert AG.read(said) == Signal(finished=True, reason=Reason(reason))


def test_another_run_in_the_stream_has_to_finish_too() -> None:
    assert AG.read(event("RUN_STARTED", threadId="t", runId="r2")) == Signal(finished=False)


def test_an_error_says_what_upstream_said() -> None:
    assert AG.read(event("RUN_ERROR", message="boom", code="x")) == Signal(error="boom")


def test_an_answer_that_broke_off_says_so_as_documented() -> None:
    said = AG.error_event(ending(Reason.UPSTREAM_TRUNCATED, "It broke."))
    assert said.event == ""
    assert json.loads(said.data) == {
        "type": "RUN_ERROR",
        "message": "It broke.",
        "code": "upstream_truncated",
    }


def test_a_run_is_known_by_its_start() -> None:
    assert is_run_started(event("RUN_STARTED", threadId="t", runId="r"))
    assert not is_run_started(event("RUN_STARTED"))
    assert not is_run_started(Event("", b"3"))
