from __future__ import annotations

import json
from typing import Any

import pytest

from relay.dialects.base import Delta, Signal
from relay.dialects.openai_chat import OpenAIChat, is_chunk
from relay.frame import Event
from relay.lifecycle import Reason, ending

CHAT = OpenAIChat()


def event(payload: Any) -> Event:
    return Event("", json.dumps(payload, ensure_ascii=False).encode())


def chunk(*deltas: Any) -> Event:
    return event({"object": "chat.completion.chunk", "choices": [{"delta": delta} for delta in deltas]})


@pytest.mark.parametrize(
    ("deltas", "text_bytes"),
    [
        (({"content": "hello"},), 5),
        (({"content": "ü€"},), 5),
        (({"content": "a"}, {"content": "bc"}), 3),
        (({"refusal": "no"},), 2),
        (({"role": "assistant", "content": ""},), 0),
        (({"content": None},), 0),
        (({"reasoning_content": "hm"},), 0),
        (({"tool_calls": [{"function": {"arguments": "{}"}}]},), 0),
        ((None, 3, {"content": 7}), 0),
        ((), 0),
    ],
)
def test_text_is_the_content_and_refusal_of_every_choice(deltas: tuple[Any, ...], text_bytes: int) -> None:
    assert CHAT.read(chunk(*deltas)) == Signal(text_bytes=text_bytes)


def test_a_part_is_the_content_or_the_refusal_of_one_choice() -> None:
    choices = [
        {"index": 1, "delta": {"content": "a", "refusal": "no"}},
        {"delta": {"content": ""}},
        {"index": True, "delta": {"content": "b"}},
        {"index": "x", "delta": {"refusal": "c"}},
    ]
    assert CHAT.deltas(event({"choices": choices})) == [
        Delta("text", 1, "a"),
        Delta("refusal", 1, "no"),
        Delta("text", 2, "b"),
        Delta("refusal", 3, "c"),
    ]


@pytest.mark.parametrize("member", ["reasoning_content", "reasoning"])
def test_reasoning_is_a_part_of_its_own(member: str) -> None:
    assert CHAT.deltas(chunk({member: "hm", "content": "a"})) == [
        Delta("reasoning", 0, "hm"),
        Delta("text", 0, "a"),
    ]


@pytest.mark.parametrize("data", [b"[DONE]", b"[DONE] ", b"hello", b"[]", b"{}"])
def test_what_is_no_chunk_shows_nothing(data: bytes) -> None:
    assert not CHAT.deltas(Event("", data))


def test_an_error_shows_no_text_even_beside_some() -> None:
    said = event({"error": "boom", "choices": [{"delta": {"content": "a"}}]})
    assert not CHAT.deltas(said)
    assert CHAT.read(said).text_bytes == 0


@pytest.mark.parametrize("data", [b"[DONE]", b"[DONE] "])
def test_done_is_the_terminal_marker_as_the_sdk_looks_for_it(data: bytes) -> None:
    assert CHAT.read(Event("", data)) == Signal(terminal=True)


@pytest.mark.parametrize("data", [b"done", b'"[DONE]"', b" [DONE]", b""])
def test_what_only_resembles_it_is_not(data: bytes) -> None:
    assert not CHAT.read(Event("", data)).terminal


@pytest.mark.parametrize(
    ("error", "text"),
    [
        ({"message": "rate limited", "code": 429}, "rate limited"),
        ("boom", "boom"),
        ({"code": 3}, '{"error": {"code": 3}}'),
        ({"message": ""}, '{"error": {"message": ""}}'),
        ([1], '{"error": [1]}'),
    ],
)
def test_an_error_says_what_upstream_said_and_is_never_empty(error: Any, text: str) -> None:
    assert CHAT.read(event({"error": error})).error == text


@pytest.mark.parametrize("error", [None, {}, "", False])
def test_a_member_error_without_an_error_is_none(error: Any) -> None:
    assert CHAT.read(event({"error": error})).error is None


def test_an_answer_that_broke_off_says_why() -> None:
    said = CHAT.error_event(ending(Reason.UPSTREAM_TRUNCATED, "It broke."))
    assert said.event == ""
    assert json.loads(said.data)["error"] == {
        "message": "It broke.",
        "type": "relay_failed",
        "param": None,
        "code": "upstream_truncated",
    }


def test_a_chunk_is_known_by_its_object() -> None:
    assert is_chunk(chunk())
    assert not is_chunk(event({"object": "chat.completion"}))
    assert not is_chunk(Event("", b"[DONE]"))
