"""The package `openai`: chat completions and responses, each as a plain stream and by its other way."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
from recorded_answers import OPENAI_CHAT, OPENAI_RESPONSES

from clients.notes import Notes, PythonClient, Wish

_MESSAGES: Any = [{"role": "user", "content": "hello"}]


def _options(wish: Wish) -> dict[str, Any]:
    return {
        "base_url": f"{wish.base}/v1",
        "api_key": "k",
        "default_headers": {"Idempotency-Key": wish.name},
    }


class Chat(PythonClient):
    """`chat.completions.create`."""

    answer = OPENAI_CHAT
    raises = "APIError: "

    def read(self, wish: Wish, notes: Notes) -> None:
        reason = None
        with openai.OpenAI(**_options(wish)) as client, client.chat.completions.create(
            model="m", messages=_MESSAGES, stream=True
        ) as stream:  # fmt: skip
            for chunk in stream:
                notes.say(chunk.choices[0].delta.content or "")
                reason = chunk.choices[0].finish_reason
        assert reason == "stop"


class AsyncChat(PythonClient):
    """The same of `AsyncOpenAI`."""

    answer = OPENAI_CHAT
    raises = "APIError: "

    def read(self, wish: Wish, notes: Notes) -> None:
        asyncio.run(self._read(wish, notes))

    async def _read(self, wish: Wish, notes: Notes) -> None:
        reason = None
        async with openai.AsyncOpenAI(**_options(wish)) as client, await client.chat.completions.create(
            model="m", messages=_MESSAGES, stream=True
        ) as stream:  # fmt: skip
            async for chunk in stream:
                notes.say(chunk.choices[0].delta.content or "")
                reason = chunk.choices[0].finish_reason
        assert reason == "stop"


class Responses(PythonClient):
    """`responses.create`."""

    answer = OPENAI_RESPONSES
    raises = "APIError: "

    def read(self, wish: Wish, notes: Notes) -> None:
        last = ""
        with openai.OpenAI(**_options(wish)) as client, client.responses.create(
            model="m", input="hello", stream=True
        ) as stream:  # fmt: skip
            for event in stream:
                if event.type == "response.output_text.delta":
                    notes.say(event.delta)
                last = event.type
        assert last == "response.completed"


class ResponsesStream(PythonClient):
    """`responses.stream`, which puts the response together."""

    answer = OPENAI_RESPONSES
    raises = "APIError: "

    def read(self, wish: Wish, notes: Notes) -> None:
        with openai.OpenAI(**_options(wish)) as client, client.responses.stream(
            model="m", input="hello"
        ) as stream:  # fmt: skip
            for event in stream:
                if event.type == "response.output_text.delta":
                    notes.say(event.delta)
            assert stream.get_final_response().output_text == notes.text
