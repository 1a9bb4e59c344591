"""The unmodified OpenAI Python SDK with relay as its base URL."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import openai
import pytest
from reading import Reading
from relay_process import RelayProcess
from run_record import whole_run
from scripted_upstream import Exchange, ScriptedUpstream


def chunk(text: str) -> bytes:
    payload = {
        "id": "c1",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}],
    }
    return b"data: " + json.dumps(payload).encode() + b"\n\n"


@pytest.fixture(scope="module")
def beating(fresh_journal: Callable[[], str], upstream: ScriptedUpstream) -> Iterator[RelayProcess]:
    """A relay that sends heartbeats all the time."""
    with RelayProcess.start(journal=fresh_journal(), upstream=upstream.url, heartbeat_s=0.05) as process:
        yield process


@pytest.fixture
def client(beating: RelayProcess, name: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{beating.url}/{name}/v1",
        api_key="sk-test",
        max_retries=0,
        default_headers={"Relay-Stream": name},
    ) as sdk:
        yield sdk


def ask(client: openai.OpenAI) -> openai.Stream[openai.types.chat.ChatCompletionChunk]:
    return client.chat.completions.create(
        model="m", messages=[{"role": "user", "content": "hello"}], stream=True
    )


def texts(stream: openai.Stream[openai.types.chat.ChatCompletionChunk]) -> Iterator[str]:
    for part in stream:
        yield part.choices[0].delta.content or ""


def await_heartbeats(beating: RelayProcess, name: str) -> None:
    """Several heartbeats on another reader of the stream: as many went to the SDK meanwhile."""
    with Reading(f"{beating.url}/relay/v1/streams/{name}/events?after=tail") as reading:
        beats = 0
        for line in reading.lines():
            beats += line.startswith(": hb")
            if beats == 3:
                return


def test_it_streams_a_completion_to_its_end_through_heartbeats(
    beating: RelayProcess, upstream: ScriptedUpstream, client: openai.OpenAI, name: str
) -> None:
    gate = upstream.gate()

    async def handler(exchange: Exchange) -> None:
        await exchange.head()
        for text in ("Hel", "lo ", "there"):
            await exchange.chunk(chunk(text))
            await gate.wait()
        await exchange.chunk(b"data: [DONE]\n\n")
        await exchange.end()

    upstream.on(f"/{name}/v1/chat/completions", handler)
    seen = []
    for text in texts(ask(client)):
        seen.append(text)
        gate.await_arrival()
        await_heartbeats(beating, name)
        gate.pass_one()
    assert seen == ["Hel", "lo ", "there"]
    record = whole_run(beating, name)
    assert record.outcome == ("completed", "upstream_end")
    assert record.ended["text_bytes"] == 11
    run = beating.json(f"/relay/v1/streams/{name}/runs/{record.ended['run']}")
    assert run["dialect"] == "openai-chat"


def test_it_gets_an_answer_that_is_no_stream(
    upstream: ScriptedUpstream, client: openai.OpenAI, name: str
) -> None:
    completion = {
        "id": "c1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [
            {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "Hello"}}
        ],
    }

    async def handler(exchange: Exchange) -> None:
        assert json.loads(exchange.received.body)["messages"][0]["content"] == "hello"
        await exchange.answer("200 OK", json.dumps(completion).encode())

    upstream.on(f"/{name}/v1/chat/completions", handler)
    answer = client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hello"}])
    assert answer.choices[0].message.content == "Hello"
    assert upstream.received[-1].header("authorization") == "Bearer sk-test"


@pytest.mark.parametrize("how", ["breaks mid-chunk", "ends without its marker"])
def test_it_raises_when_upstream_breaks_in_mid_answer(
    beating: RelayProcess, upstream: ScriptedUpstream, client: openai.OpenAI, name: str, how: str
) -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.head()
        await exchange.chunk(chunk("Hel"))
        if how == "breaks mid-chunk":
            await exchange.send(b"fff\r\ndata: {")
            exchange.writer.close()
        else:
            await exchange.end()

    upstream.on(f"/{name}/v1/chat/completions", handler)
    seen: list[str] = []
    with pytest.raises(openai.APIError) as raised:
        seen.extend(texts(ask(client)))
    assert seen == ["Hel"]
    assert raised.value.code == "upstream_truncated"
    assert whole_run(beating, name).outcome == ("failed", "upstream_truncated")


def test_it_raises_on_upstreams_own_error_event(
    beating: RelayProcess, upstream: ScriptedUpstream, client: openai.OpenAI, name: str
) -> None:
    error = {"error": {"message": "overloaded", "type": "server_error", "code": "busy", "param": None}}
    upstream.on_stream(
        f"/{name}/v1/chat/completions", [chunk("Hel"), b"data: " + json.dumps(error).encode() + b"\n\n"]
    )
    with pytest.raises(openai.APIError, match="overloaded") as raised:
        list(texts(ask(client)))
    assert raised.value.code == "busy"
    record = whole_run(beating, name)
    assert record.outcome == ("failed", "upstream_error")
    assert record.ended["error"] == "overloaded"
    assert len(record.frames) == 2


def test_it_raises_the_error_of_the_status_upstream_answered_with(
    upstream: ScriptedUpstream, client: openai.OpenAI, name: str
) -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.answer("429 Too Many Requests", b'{"error": {"message": "slow down"}}')

    upstream.on(f"/{name}/v1/chat/completions", handler)
    with pytest.raises(openai.RateLimitError, match="slow down"):
        ask(client)
