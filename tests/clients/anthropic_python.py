"""The package `anthropic`: messages, as a plain stream and put together."""

from __future__ import annotations

from typing import Any

import anthropic
from recorded_answers import ANTHROPIC

from clients.notes import Notes, PythonClient, Wish

_ASKED: Any = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "hello"}]}


def _client(wish: Wish) -> anthropic.Anthropic:
    return anthropic.Anthropic(
        base_url=wish.base, api_key="k", default_headers={"Idempotency-Key": wish.name}
    )


class Messages(PythonClient):
    """`messages.create`."""

    answer = ANTHROPIC
    raises = "APIStatusError: "

    def read(self, wish: Wish, notes: Notes) -> None:
        last = ""
        with _client(wish) as client, client.messages.create(**_ASKED, stream=True) as stream:
            for event in stream:
                if event.type == "content_block_delta" and event.delta.type == "text_delta":
                    notes.say(event.delta.text)
                last = event.type
        assert last == "message_stop"


class MessagesStream(PythonClient):
    """`messages.stream`."""

    answer = ANTHROPIC
    raises = "APIStatusError: "

    def read(self, wish: Wish, notes: Notes) -> None:
        with _client(wish) as client, client.messages.stream(**_ASKED) as stream:
            for text in stream.text_stream:
                notes.say(text)
            assert stream.get_final_message().stop_reason == "tool_use"
