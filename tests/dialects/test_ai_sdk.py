from __future__ import annotations

import json
from typing import Any

import pytest

from relay.dialects.ai_sdk import AISDK, is_start
from relay.dialects.base import Delta, Signal
from relay.frame import Event
from relay.lifecycle import Reason, ending

UI = AISDK()


def chunk(kind: Any, **members: Any) -> Event:
    return Event("", json.dumps({"type": kind, **members}).encode())


def test_text_and_reasoning_are_parts_by_their_id() -> None:
    assert UI.deltas(chunk("text-delta", id="t1", delta="ü")) == (Delta("text", "t1", "ü"),)
    assert UI.read(chunk("text-delta", id="t1", delta="ü")) == Signal(2)
    assert UI.deltas(chunk("reasoning-delta", id="r1", delta="hm")) == (Delta("reasoning", "r1", "hm"),)
    assert UI.read(chunk("reasoning-delta", id="r1", delta="hm")) == Signal()


@pytest.mark.parametrize(
    "said",
    [
        chunk("start", messageId="m1"),
        chunk("text-delta", id="t1", delta=3),
        chunk("tool-input-delta", toolCallId="c1", inputTextDelta="{"),
        chunk("tool-output-available", toolCallId="c1", output="text of a tool"),
        chunk("data-weather", data={"text": "x"}),
        chunk("message-metadata", messageMetadata={"usage": 3}),
        chunk("finish-step"),
        chunk(3, delta="x"),
        Event("", b'"[DONE]"'),
        Event("", b"[DONE] "),
    ],
)
def test_everything_else_shows_nothing_and_ends_nothing(said: Event) -> None:
    assert UI.read(said) == Signal()
    assert not UI.deltas(said)


def test_done_is_the_terminal_marker_and_finish_will_do() -> None:
    assert UI.read(Event("", b"[DONE]")) == Signal(terminal=True)
    assert UI.read(chunk("finish", finishReason="length")) == Signal(finished=True)
    assert UI.read(chunk("abort")) == Signal(finished=True, reason=Reason.UPSTREAM_CANCELLED)


def test_a_request_for_approval_waits_for_input() -> None:
    said = chunk("tool-approval-request", approvalId="a1", toolCallId="c1")
    assert UI.read(said) == Signal(reason=Reason.INPUT_REQUIRED)


def test_an_error_says_what_upstream_said() -> None:
    assert UI.read(chunk("error", errorText="boom")) == Signal(error="boom")
    assert UI.read(chunk("error")) == Signal(error='{"type": "error"}')


def test_an_answer_that_broke_off_says_so_in_a_chunk_of_the_schema() -> None:
    said = UI.error_event(ending(Reason.UPSTREAM_TRUNCATED, "It broke."))
    assert said.event == ""
    assert json.loads(said.data) == {"type": "error", "errorText": "It broke."}


@pytest.mark.parametrize("reason", [Reason.CLIENT_CANCEL, Reason.SUPERSEDED])
def test_an_answer_that_somebody_stopped_is_aborted(reason: Reason) -> None:
    said = json.loads(UI.error_event(ending(reason)).data)
    assert said == {"type": "abort", "reason": f"The answer was cancelled: {reason}."}


def test_a_start_is_known_by_the_id_of_its_message() -> None:
    assert is_start(chunk("start", messageId="m1"))
    assert not is_start(chunk("start"))
    assert not is_start(chunk("start", messageId=3))
    assert not is_start(Event("", b"[]"))
