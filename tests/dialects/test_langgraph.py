from __future__ import annotations

import json
from typing import Any

import pytest

from relay.dialects.base import Delta, Signal
from relay.dialects.langgraph import LangGraph, is_metadata
from relay.frame import Event
from relay.lifecycle import Reason, ending

GRAPH = LangGraph()


def event(name: str, payload: Any) -> Event:
    return Event(name, json.dumps(payload).encode())


def message(content: Any, kind: str = "AIMessageChunk") -> dict[str, Any]:
    return {"id": "m1", "type": kind, "content": content, "tool_call_chunks": []}


@pytest.mark.parametrize("name", ["messages", "messages|sub:1"])
def test_a_tuple_of_a_message_adds_to_its_part(name: str) -> None:
    said = event(name, [message("ü"), {"langgraph_node": "agent", "type": "ai", "content": "x"}])
    assert GRAPH.deltas(said) == [Delta("text", "m1", "ü")]
    assert GRAPH.read(said) == Signal(2)


@pytest.mark.parametrize("name", ["messages/partial", "messages/complete"])
def test_a_message_with_all_of_its_text_so_far_replaces_its_part(name: str) -> None:
    said = event(name, [message("Hello", "ai")])
    assert GRAPH.deltas(said) == [Delta("text", "m1", "Hello", is_whole=True)]


def test_blocks_of_text_and_of_reasoning_are_put_together() -> None:
    content = [
        {"type": "thinking", "thinking": "h"},
        {"type": "reasoning", "reasoning": "m"},
        {"type": "text", "text": "a"},
        {"type": "tool_use", "input": {}},
        "b",
        {"type": "text", "text": 3},
        7,
    ]
    said = event("messages", [message(content), {}])
    assert GRAPH.deltas(said) == [Delta("text", "m1", "ab"), Delta("reasoning", "m1", "hm")]
    assert GRAPH.read(said) == Signal(2)


@pytest.mark.parametrize(
    "said",
    [
        event("messages", [message("of the user", "human"), {}]),
        event("messages", [message("of a tool", "tool"), {}]),
        event("messages", [message(""), {}]),
        event("messages", {"a": 1}),
        event("messages", [3]),
        Event("messages", b"{"),
        event("messages/metadata", {"m1": {}}),
        event("metadata", {"run_id": "r1"}),
        event("values", {"messages": [message("state")]}),
        event("values", {"text": "says __interrupt__ only"}),
        event("values", {"__interrupt__": []}),
        event("updates", {"agent": {"messages": []}}),
        event("custom", {"type": "error"}),
        event("error|sub:1", {"error": "handled above"}),
    ],
)
def test_everything_else_shows_nothing_and_ends_nothing(said: Event) -> None:
    assert GRAPH.read(said) == Signal()
    assert not GRAPH.deltas(said)


@pytest.mark.parametrize("name", ["values", "updates", "updates|sub:1"])
def test_an_interrupt_waits_for_input(name: str) -> None:
    said = event(name, {"__interrupt__": [{"value": "Approve?", "id": "i1"}]})
    assert GRAPH.read(said) == Signal(reason=Reason.INPUT_REQUIRED)


def test_the_event_end_is_the_terminal_marker_but_none_is_needed() -> None:
    assert GRAPH.read(Event("end", b"null")) == Signal(terminal=True)
    assert not GRAPH.needs_terminal


@pytest.mark.parametrize(
    ("payload", "error"),
    [
        ({"error": "ValueError", "message": "boom"}, "boom"),
        ({"error": "ValueError"}, '{"error": "ValueError"}'),
        ("boom", '"boom"'),
    ],
)
def test_an_error_says_what_upstream_said(payload: Any, error: str) -> None:
    assert GRAPH.read(event("error", payload)) == Signal(error=error)


@pytest.mark.parametrize("error", ["UserInterrupt", "UserRollback"])
def test_a_run_that_its_caller_cancelled_is_no_failure(error: str) -> None:
    said = event("error", {"error": error, "message": "User interrupted the run"})
    assert GRAPH.read(said) == Signal(terminal=True, reason=Reason.UPSTREAM_CANCELLED)


def test_an_answer_that_broke_off_says_so_as_the_server_would() -> None:
    said = GRAPH.error_event(ending(Reason.UPSTREAM_TRUNCATED, "It broke."))
    assert said.event == "error"
    assert json.loads(said.data) == {"error": "upstream_truncated", "message": "It broke."}


def test_a_run_is_known_by_its_metadata() -> None:
    assert is_metadata(event("metadata", {"run_id": "r1", "attempt": 1}))
    assert not is_metadata(event("", {"run_id": "r1"}))
    assert not is_metadata(event("metadata", {}))
    assert not is_metadata(event("metadata", []))
