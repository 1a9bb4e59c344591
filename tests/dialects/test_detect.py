from __future__ import annotations

import pytest

from relay.dialects.detect import BY_NAME, OPENAI_CHAT, RAW, by_first_event, by_path
from relay.frame import Event


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/chat/completions", "/openai/x/chat/completions"])
def test_the_path_of_chat_completions_is_known(path: str) -> None:
    assert by_path(path) is OPENAI_CHAT


@pytest.mark.parametrize("path", ["/", "/v1/completions", "/chat/completions/x", "/v1/responses"])
def test_another_path_tells_nothing(path: str) -> None:
    assert by_path(path) is None


def test_a_chunk_tells_its_dialect() -> None:
    assert by_first_event(Event("", b'{"object": "chat.completion.chunk", "choices": []}')) is OPENAI_CHAT


@pytest.mark.parametrize(
    "data",
    [b"", b"hello", b"[DONE]", b"{}", b"[1]", b'{"object": "chat.completion"}', b'{"object": 3}', b"{"],
)
def test_what_is_not_recognised_is_raw(data: bytes) -> None:
    assert by_first_event(Event("", data)) is RAW


def test_every_dialect_is_found_by_its_name() -> None:
    assert {name: dialect.name for name, dialect in BY_NAME.items()} == {
        "raw": "raw",
        "openai-chat": "openai-chat",
    }
