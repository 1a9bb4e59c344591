from __future__ import annotations

import json
from typing import Any

import pytest

from relay.dialects.base import Dialect
from relay.dialects.detect import (
    AG_UI,
    AI_SDK,
    ANTHROPIC,
    BY_NAME,
    LANGGRAPH,
    OPENAI_CHAT,
    OPENAI_RESPONSES,
    RAW,
    by_first_event,
    by_head,
    error_events,
)
from relay.frame import Event
from relay.lifecycle import Reason, ending


@pytest.mark.parametrize(
    ("path", "dialect"),
    [
        ("/v1/chat/completions", OPENAI_CHAT),
        ("/chat/completions", OPENAI_CHAT),
        ("/openai/x/chat/completions", OPENAI_CHAT),
        ("/v1/responses", OPENAI_RESPONSES),
        ("/openai/responses", OPENAI_RESPONSES),
        ("/v1/messages", ANTHROPIC),
        ("/runs/stream", LANGGRAPH),
        ("/threads/t1/runs/stream", LANGGRAPH),
        ("/threads/t1/runs/r1/stream", LANGGRAPH),
    ],
)
def test_a_well_known_path_tells_its_dialect(path: str, dialect: Dialect) -> None:
    assert by_head(path, []) is dialect


@pytest.mark.parametrize(
    "path",
    ["/", "/v1/completions", "/chat/completions/x", "/responses", "/api/messages", "/api/chat/1/stream"],
)
def test_another_path_tells_nothing(path: str) -> None:
    assert by_head(path, []) is None


def test_the_header_of_the_ai_sdk_tells_it_whatever_the_path() -> None:
    headers = [(b"x-vercel-ai-ui-message-stream", b"v1")]
    assert by_head("/v1/chat/completions", headers) is AI_SDK


@pytest.mark.parametrize(
    ("name", "payload", "dialect"),
    [
        ("", {"object": "chat.completion.chunk", "choices": []}, OPENAI_CHAT),
        ("response.created", {"type": "response.created", "sequence_number": 0}, OPENAI_RESPONSES),
        ("message_start", {"type": "message_start", "message": {}}, ANTHROPIC),
        ("", {"type": "start", "messageId": "m1"}, AI_SDK),
        ("", {"type": "RUN_STARTED", "threadId": "t", "runId": "r"}, AG_UI),
        ("metadata", {"run_id": "r"}, LANGGRAPH),
    ],
)
def test_a_first_event_tells_its_dialect(name: str, payload: Any, dialect: Dialect) -> None:
    assert by_first_event(Event(name, json.dumps(payload).encode())) is dialect


@pytest.mark.parametrize(
    "data",
    [
        b"", b"hello", b"[DONE]", b"{}", b"[1]", b'{"object": "chat.completion"}', b'{"object": 3}', b"{",
        b'{"type": "start"}', b'{"type": "text", "text": "x"}', b'{"type": "error", "error": "x"}',
    ],
)  # fmt: skip
def test_what_is_not_recognised_is_raw(data: bytes) -> None:
    assert by_first_event(Event("", data)) is RAW


def test_every_dialect_is_found_by_its_name() -> None:
    assert {name: dialect.name for name, dialect in BY_NAME.items()} == {
        name: name
        for name in (
            "raw", "openai-chat", "openai-responses", "anthropic", "ai-sdk", "ag-ui", "langgraph"
        )
    }  # fmt: skip


def test_all_but_raw_have_a_way_to_say_that_an_answer_broke_off() -> None:
    assert set(error_events(ending(Reason.OWNER_LOST))) == set(BY_NAME) - {"raw"}
